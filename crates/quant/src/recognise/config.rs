//! What configuration files beside a checkpoint say of its quantisation.
//!
//! `config.json`'s `quantization_config` or MLX's `quantization`, `hf_quant_config.json`, `quantize_config.json`,
//! `quant_config.json`, `quanto_qmap.json`. They are read as data of a known form: unknown keys are passed over, and a value of another kind
//! than its key has is as if it was not there.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::pattern::Pattern;
use crate::descriptor::Float;
use crate::error::{Error, Reason};

/// Most bytes of one configuration file.
pub const MAX_CONFIG: usize = 16 << 20;
/// Most entries of a list of modules or of groups that are followed.
const MAX_LIST: usize = 4096;

/// One description of how a checkpoint is quantised.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    /// The file.
    pub(crate) file: String,
    /// The method, in lower case: `gptq`, `awq`, `mlx`…
    pub(crate) method: String,
    /// The object.
    pub(crate) map: Map<String, Value>,
}

/// What is said beside and within a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Configs {
    pub(crate) said: Vec<Said>,
    dtype: Option<(Float, String)>,
    /// The metadata of the checkpoint's files.
    pub metadata: BTreeMap<String, String>,
    /// Files that can't be read as what they should be.
    pub warnings: Vec<String>,
}

impl Configs {
    /// The files that are looked for beside a checkpoint, most telling first.
    pub const FILES: &[&str] = &[
        "config.json",
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "quanto_qmap.json",
    ];

    /// With the metadata of the checkpoint.
    pub fn new(metadata: BTreeMap<String, String>) -> Self {
        Configs {
            metadata,
            ..Configs::default()
        }
    }

    /// Adds a file, by its name. What can't be read is a warning, and the checkpoint is recognised without it.
    pub fn add(&mut self, file: &str, text: &[u8]) {
        if let Err(error) = self.read(file, text) {
            self.warnings.push(format!("{file}: {error}"));
        }
    }

    fn read(&mut self, file: &str, text: &[u8]) -> Result<(), Error> {
        let refused = |text: String| Error::new(Reason::Parameter, text);
        if text.len() > MAX_CONFIG {
            return Err(refused(format!(
                "{} bytes, {MAX_CONFIG} at most",
                text.len()
            )));
        }
        let value: Value = serde_json::from_slice(text).map_err(|e| refused(e.to_string()))?;
        let Value::Object(mut root) = value else {
            return Err(refused("no JSON object".to_owned()));
        };
        let mut said = |method: Option<&str>, map: Map<String, Value>| {
            let own = ["quant_method", "method"]
                .iter()
                .find_map(|k| map.get(*k)?.as_str());
            let method = own.or(method).unwrap_or_default().to_lowercase();
            self.said.push(Said {
                file: file.to_owned(),
                method,
                map,
            });
        };
        match file {
            "config.json" => {
                let dtype = ["dtype", "torch_dtype"]
                    .iter()
                    .find_map(|k| root.get(*k)?.as_str());
                let text = root.get("text_config").and_then(Value::as_object);
                let inner = text.and_then(|t| {
                    ["dtype", "torch_dtype"]
                        .iter()
                        .find_map(|k| t.get(*k)?.as_str())
                });
                self.dtype = dtype
                    .or(inner)
                    .and_then(float)
                    .map(|dtype| (dtype, file.to_owned()));
                let nested = text.and_then(|t| t.get("quantization_config")).cloned();
                let mlx = root.remove("quantization");
                let plain = root.remove("quantization_config").or(nested);
                if let Some(Value::Object(map)) = mlx {
                    said(Some("mlx"), map);
                }
                if let Some(Value::Object(map)) = plain {
                    // MLX writes its own under both names.
                    let mlx = map.contains_key("group_size") && map.contains_key("bits");
                    said(mlx.then_some("mlx"), map);
                }
            }
            "hf_quant_config.json" => {
                if let Some(Value::Object(map)) = root.remove("quantization") {
                    said(Some("modelopt"), map);
                }
            }
            "quanto_qmap.json" => said(Some("quanto"), root),
            "quant_config.json" => said(Some("awq"), root),
            _ => said(Some("gptq"), root),
        }
        Ok(())
    }

    /// The dtype of the model's values, and the file that says it.
    pub(crate) fn model_dtype(&self) -> Option<(Float, &str)> {
        let (dtype, file) = self.dtype.as_ref()?;
        Some((*dtype, file))
    }

    /// The description of one of these methods.
    pub(crate) fn by(&self, methods: &[&str]) -> Option<&Said> {
        self.said
            .iter()
            .find(|said| methods.contains(&said.method.as_str()))
    }
}

impl Said {
    /// A number under the first of these keys that has one.
    pub(crate) fn int(&self, keys: &[&str]) -> Option<i64> {
        keys.iter().find_map(|key| self.map.get(*key)?.as_i64())
    }

    /// A text under the first of these keys that has one.
    pub(crate) fn text(&self, keys: &[&str]) -> Option<&str> {
        keys.iter().find_map(|key| self.map.get(*key)?.as_str())
    }

    /// A flag.
    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        self.map.get(key)?.as_bool()
    }

    /// Two sizes of a block.
    pub(crate) fn block(&self, key: &str) -> Option<Vec<i64>> {
        block(self.map.get(key)?)
    }

    /// What an object under `key` says of a module: under its name, or under an expression that finds it.
    pub(crate) fn of_module<'a>(
        &'a self,
        key: &str,
        module: &str,
    ) -> Option<&'a Map<String, Value>> {
        let own = self.map.get(key)?.as_object()?;
        if let Some(Value::Object(found)) = own.get(module) {
            return Some(found);
        }
        own.iter().take(MAX_LIST).find_map(|(key, value)| {
            let expression = key.strip_prefix("re:").unwrap_or(key);
            Pattern::parse(expression)?
                .matches(module, false)
                .then(|| value.as_object())?
        })
    }

    /// compressed-tensors: the group that a module belongs to. A target that is a class (`Linear`) has what no other group names.
    pub(crate) fn group(&self, module: &str) -> Option<Group<'_>> {
        let groups = self.map.get("config_groups").and_then(Value::as_object);
        let all: Vec<Group<'_>> = groups
            .into_iter()
            .flat_map(|groups| groups.values().take(MAX_LIST))
            .filter_map(|group| {
                let group = group.as_object()?;
                Some(Group {
                    targets: group.get("targets").and_then(Value::as_array),
                    weights: group.get("weights")?.as_object()?,
                })
            })
            .collect();
        if let Some(named) = all.iter().find(|group| group.names(module)) {
            return Some(*named);
        }
        let mut rest = all
            .iter()
            .filter(|group| all.len() == 1 || group.is_of_class());
        match (rest.next(), rest.next()) {
            (Some(only), None) => Some(*only),
            _ => None,
        }
    }
}

/// A group of compressed-tensors' configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group<'a> {
    targets: Option<&'a Vec<Value>>,
    /// Its `weights`.
    pub(crate) weights: &'a Map<String, Value>,
}

impl Group<'_> {
    /// Whether a target names the module, or finds it. A target that is a class says nothing here.
    fn names(&self, module: &str) -> bool {
        let targets = self.targets.into_iter().flatten().take(MAX_LIST);
        targets
            .filter_map(Value::as_str)
            .any(|target| match target.strip_prefix("re:") {
                Some(expression) => {
                    Pattern::parse(expression).is_some_and(|p| p.matches(module, true))
                }
                None => target == module || module.ends_with(&format!(".{target}")),
            })
    }

    /// Whether a target is a class of modules.
    fn is_of_class(&self) -> bool {
        let targets = self.targets.into_iter().flatten().take(MAX_LIST);
        targets.filter_map(Value::as_str).any(|target| {
            target.starts_with(|c: char| c.is_ascii_uppercase()) && !target.contains('.')
        })
    }

    /// A number of the weights.
    pub(crate) fn int(&self, key: &str) -> Option<i64> {
        self.weights.get(key)?.as_i64()
    }
}

/// Two sizes of a block, as a list or as `128x128`.
pub(crate) fn block(value: &Value) -> Option<Vec<i64>> {
    let sizes: Vec<i64> = match value {
        Value::Array(list) => list.iter().map(Value::as_i64).collect::<Option<_>>()?,
        Value::String(text) => text
            .split('x')
            .map(|size| size.trim().parse().ok())
            .collect::<Option<_>>()?,
        _ => return None,
    };
    (sizes.len() == 2 && sizes.iter().all(|size| *size > 0)).then_some(sizes)
}

/// A dtype of values by the names that torch and configurations use.
pub(crate) fn float(name: &str) -> Option<Float> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float16" | "half" => Some(Float::F16),
        "bfloat16" => Some(Float::Bf16),
        "float32" | "float" => Some(Float::F32),
        _ => None,
    }
}

/// Whether a version `a.b.c` is at least `major.minor`; `None` where it is no version.
pub(crate) fn at_least(version: &str, major: u64, minor: u64) -> Option<bool> {
    let mut parts = version.split('.');
    let first: u64 = parts.next()?.parse().ok()?;
    let second: u64 = parts
        .next()?
        .chars()
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .ok()?;
    Some((first, second) >= (major, minor))
}
