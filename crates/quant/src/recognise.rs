//! What an existing checkpoint's tensors mean, from its own words and bytes.
//!
//! In this order: the metadata key `quant.map`; tensors that describe themselves (bitsandbytes, torchao, ComfyUI, HQQ);
//! configuration files; names, dtypes and shapes; and values, of which little is read. Each field keeps who said it and
//! how sure that is ([`crate::map::Evidence`]); where several readings fit, the likeliest is taken and the others are recorded, or all are refused
//! ([`Policy::Strict`]). What nobody knows stays a plain tensor.

mod awq;
mod config;
mod float;
mod gptq;
mod integers;
mod names;
mod opaque;
pub(crate) mod own;
mod pattern;
mod torchao;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::descriptor::{Float, Role};
use crate::error::{Error, Reason};
use crate::map::{Ambiguity, Confidence, Evidence, Policy, Provenance, QTensor, QuantMap};
use crate::scheme::{Param, Params, Part, Parts, Scheme};
pub use config::{Configs, MAX_CONFIG};
use names::Module;

/// Reads bytes of a tensor: its name and a range within its data; `None` where they can't be had.
pub type Sniff<'a> = dyn FnMut(&str, Range<u64>) -> Option<Vec<u8>> + 'a;

/// Most bytes of one tensor that are looked at.
const LOOK: u64 = 4096;
/// Most tensors whose values are looked at to know what a whole checkpoint does.
const SAMPLES: usize = 16;

impl QuantMap {
    /// What the tensors `rows` of a checkpoint mean. `sniff` reads the few bytes that matter.
    ///
    /// # Errors
    /// Under [`Policy::Strict`]: a tensor with several readings, or one that looks like a scheme's and does not fit it.
    pub fn detect(
        rows: &[Part],
        configs: &Configs,
        sniff: &mut Sniff<'_>,
        policy: Policy,
    ) -> Result<QuantMap, Error> {
        let mut map = QuantMap::default();
        if let Some(text) = configs.metadata.get("quant.map") {
            match QuantMap::parse(text, rows, sniff) {
                Ok(map) => return map.under(policy),
                // A version of tomorrow is no mistake.
                Err(error) if policy == Policy::Strict && error.reason != Reason::Unsupported => {
                    return Err(error);
                }
                Err(error) => {
                    let text = format!("quant.map is not followed: {error}");
                    map.warnings.push(text);
                }
            }
        }
        let map = Recogniser::new(rows, configs, sniff, map).run();
        map.under(policy)
    }

    fn under(self, policy: Policy) -> Result<Self, Error> {
        if policy == Policy::Lenient {
            return Ok(self);
        }
        if let Some(first) = self.ambiguities.first() {
            let text = format!(
                "{} can be {}: {}",
                first.field,
                first.readings.join(" or "),
                first.why
            );
            return Err(Error::new(Reason::Ambiguous, text).of(&first.tensor));
        }
        match self.refused.first() {
            Some(error) => Err(error.clone()),
            None => Ok(self),
        }
    }
}

/// What is known on the way.
pub(crate) struct Recogniser<'a, 's> {
    rows: HashMap<&'a str, &'a Part>,
    modules: BTreeMap<&'a str, Module<'a>>,
    configs: &'a Configs,
    sniff: &'a mut Sniff<'s>,
    map: QuantMap,
    /// What the zero points of the first GPTQ tensors say, once they were looked at.
    zeros: Option<gptq::Zeros>,
}

/// A field and its value on the way to a tensor.
pub(crate) struct Field {
    name: &'static str,
    value: Param,
    provenance: Provenance,
    confidence: Confidence,
}

/// The fields of one tensor on the way.
#[derive(Default)]
pub(crate) struct Draft {
    fields: Vec<Field>,
    evidence: Vec<Evidence>,
    ambiguities: Vec<(&'static str, Vec<String>, String)>,
}

impl Draft {
    /// A parameter of the scheme.
    fn put(&mut self, name: &'static str, value: Param, from: Provenance, sure: Confidence) {
        self.fields.push(Field {
            name,
            value,
            provenance: from,
            confidence: sure,
        });
    }

    fn int(&mut self, name: &'static str, value: u64, from: Provenance, sure: Confidence) {
        let value = Param::Int(i64::try_from(value).unwrap_or(i64::MAX));
        self.put(name, value, from, sure);
    }

    /// Something that is known and no parameter.
    fn note(
        &mut self,
        field: &str,
        value: impl std::fmt::Display,
        from: Provenance,
        sure: Confidence,
    ) {
        self.evidence.push(Evidence::new(field, value, from, sure));
    }

    fn dtype(&mut self, dtype: Float, from: Provenance, sure: Confidence) {
        self.put("dtype", Param::Text(dtype.name().to_owned()), from, sure);
    }

    fn ambiguous(&mut self, field: &'static str, readings: Vec<String>, why: &str) {
        self.ambiguities.push((field, readings, why.to_owned()));
    }
}

impl<'a, 's> Recogniser<'a, 's> {
    fn new(
        rows: &'a [Part],
        configs: &'a Configs,
        sniff: &'a mut Sniff<'s>,
        mut map: QuantMap,
    ) -> Self {
        map.warnings.extend(configs.warnings.iter().cloned());
        Recogniser {
            rows: rows.iter().map(|part| (&*part.name, part)).collect(),
            modules: names::modules(rows),
            configs,
            sniff,
            map,
            zeros: None,
        }
    }

    fn run(mut self) -> QuantMap {
        self.torchao();
        self.comfy();
        let modules = std::mem::take(&mut self.modules);
        for module in modules.values() {
            if module
                .parts
                .values()
                .any(|part| self.map.owner(&part.name).is_none())
            {
                self.module(module);
            }
        }
        self.map
    }

    /// One module, by what hangs on it.
    fn module(&mut self, module: &Module<'a>) {
        if self.bitsandbytes(module) || self.hqq(module) || self.quanto(module) {
            return;
        }
        if self.opaque(module) || self.gptq(module) || self.awq(module) || self.marlin(module) {
            return;
        }
        let _ = self.packed(module)
            || self.sparse(module)
            || self.words(module)
            || self.float(module)
            || self.integers(module);
    }

    /// Makes a tensor of a scheme and puts it into the map; what does not fit is recorded. True whenever the tensor is
    /// dealt with.
    fn make(
        &mut self,
        module: &Module<'a>,
        scheme: &str,
        roles: &[(Role, &str)],
        extras: &[&str],
        draft: Draft,
        from: (Provenance, Confidence),
    ) -> bool {
        let name = module.logical();
        let parts: Parts = roles
            .iter()
            .filter_map(|&(role, suffix)| Some((role, (*module.parts.get(suffix)?).clone())))
            .collect();
        let extras: Vec<Part> = extras
            .iter()
            .filter_map(|suffix| Some((*module.parts.get(suffix)?).clone()))
            .collect();
        self.finish(&name, scheme, parts, extras, draft, from)
    }

    /// The same, of parts that are at hand.
    fn finish(
        &mut self,
        name: &str,
        scheme: &str,
        parts: Parts,
        extras: Vec<Part>,
        draft: Draft,
        from: (Provenance, Confidence),
    ) -> bool {
        let fields = draft.fields.iter();
        let params = Params(
            fields
                .map(|field| (field.name.to_owned(), field.value.clone()))
                .collect(),
        );
        let made = match Scheme::find(scheme) {
            Some(row) => QTensor::preset_of(name, row, params, parts),
            None => Ok(QTensor::opaque_of(name, scheme, parts)),
        };
        let mut tensor = match made {
            Ok(tensor) => tensor,
            Err(error) => {
                self.map.refused.push(error.of(name));
                return true;
            }
        };
        tensor.extras = extras;
        let shown = tensor.preset();
        tensor
            .evidence
            .push(Evidence::new("scheme", shown, from.0, from.1));
        tensor
            .evidence
            .extend(draft.fields.into_iter().map(|field| {
                Evidence::new(
                    field.name,
                    shown_param(&field.value),
                    field.provenance,
                    field.confidence,
                )
            }));
        tensor.evidence.extend(draft.evidence);
        let ambiguities = draft
            .ambiguities
            .into_iter()
            .map(|(field, readings, why)| Ambiguity {
                tensor: name.to_owned(),
                field: field.to_owned(),
                readings,
                why,
            });
        let ambiguities: Vec<_> = ambiguities.collect();
        match self.map.insert(tensor) {
            Ok(()) => self.map.ambiguities.extend(ambiguities),
            Err(error) => self.map.refused.push(error),
        }
        true
    }

    /// The first bytes of a part, up to a limit; the whole part where it is smaller.
    fn look(&mut self, part: &Part, limit: u64) -> Option<Vec<u8>> {
        let bits = crate::scheme::bits_of(part).ok()?;
        let len = (bits / 8).min(limit);
        (self.sniff)(&part.name, 0..len).filter(|bytes| bytes.len() as u64 == len)
    }

    /// The dtype of values: the scales' where values can have it, else what the model's configuration says.
    fn dtype_by(&self, draft: &mut Draft, scale: &Part) {
        use tonnage_format::Dtype;
        match scale.dtype {
            Dtype::F16 => draft.dtype(Float::F16, Provenance::Shapes, Confidence::Likely),
            Dtype::BF16 => draft.dtype(Float::Bf16, Provenance::Shapes, Confidence::Likely),
            _ => {
                if let Some((dtype, file)) = self.configs.model_dtype() {
                    draft.dtype(
                        dtype,
                        Provenance::Config(file.to_owned()),
                        Confidence::Likely,
                    );
                }
            }
        }
    }
}

/// A parameter as people read it.
pub(crate) fn shown_param(value: &Param) -> String {
    match value {
        Param::Flag(flag) => flag.to_string(),
        Param::Int(number) => number.to_string(),
        Param::Text(text) => text.clone(),
        Param::List(list) => format!("{list:?}"),
    }
}

/// The two integers of a shape that is a tensor.
pub(crate) fn shape_in(bytes: &[u8]) -> Option<Vec<u64>> {
    let (numbers, []) = bytes.as_chunks::<8>() else {
        return None;
    };
    let numbers = numbers
        .iter()
        .map(|n| u64::try_from(i64::from_le_bytes(*n)));
    numbers.collect::<Result<Vec<_>, _>>().ok()
}

/// A shape as a parameter.
pub(crate) fn sizes(shape: &[u64]) -> Param {
    Param::List(
        shape
            .iter()
            .map(|&len| i64::try_from(len).unwrap_or(i64::MAX))
            .collect(),
    )
}
