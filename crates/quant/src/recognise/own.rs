//! Tensors that describe themselves: bitsandbytes' state, HQQ's scalars, quanto's names, ComfyUI's marks.
//!
//! All of it is parsed as data of a closed form. HQQ's own loader evaluates the text of `compute_dtype`; here it is one of three words.

use serde::Deserialize;
use serde_json::Value;
use tonnage_format::Dtype;

use super::config::float;
use super::names::HQQ_SCALARS;
use super::{Draft, Recogniser, shape_in, sizes};
use crate::descriptor::Role;
use crate::error::{Error, Reason};
use crate::map::{Confidence, Provenance};
use crate::recognise::names::Module;
use crate::scheme::{Param, Params};
use Confidence::{Certain, Guess, Likely};

/// Most bytes of a tensor's own description.
const MAX_STATE: u64 = 64 << 10;
/// Most layers of a description in metadata that are followed.
const MAX_LAYERS: usize = 1 << 20;

const STATES: &[&str] = &[
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
];

/// What bitsandbytes keeps of a tensor.
#[derive(Debug, Deserialize)]
struct State {
    blocksize: i64,
    shape: Vec<i64>,
    dtype: String,
    nested_blocksize: Option<i64>,
    nested_offset: Option<f64>,
}

/// The parameters of `bnb4` that a tensor's own state says.
pub(crate) fn bnb_state(text: &[u8]) -> Result<Params, Error> {
    let state: State = serde_json::from_slice(text)
        .map_err(|e| Error::new(Reason::Parameter, format!("the state of bitsandbytes: {e}")))?;
    let mut params = Params::of([
        ("block", Param::Int(state.blocksize)),
        ("shape", Param::List(state.shape)),
    ]);
    let mut put = |name: &str, value| params.0.insert(name.to_owned(), value);
    if let Some(dtype) = float(&state.dtype) {
        put("dtype", Param::Text(dtype.name().to_owned()));
    }
    if let Some(block) = state.nested_blocksize {
        let offset = state.nested_offset.unwrap_or(0.0) as f32;
        put("nested_block", Param::Int(block));
        put(
            "nested_offset_bits",
            Param::Int(i64::from(offset.to_bits())),
        );
    }
    Ok(params)
}

impl<'a> Recogniser<'a, '_> {
    /// bitsandbytes' code books, by the state that lies beside each tensor.
    pub(super) fn bitsandbytes(&mut self, module: &Module<'a>) -> bool {
        if module.get(".weight.absmax").is_none() || module.get(".weight").is_none() {
            return false;
        }
        let Some((at, part)) = module.first(STATES) else {
            // Without its state neither shape nor block is known.
            let draft = Draft::default();
            return self.make(
                module,
                "bnb4-without-state",
                &[
                    (Role::Codes, ".weight"),
                    (Role::Scale, ".weight.absmax"),
                    (Role::Table, ".weight.quant_map"),
                ],
                &[".weight.nested_absmax", ".weight.nested_quant_map"],
                draft,
                (Provenance::Shapes, Likely),
            );
        };
        let name = module.logical();
        let state = match self.look(part, MAX_STATE) {
            Some(text) => bnb_state(&text),
            None => Err(Error::new(
                Reason::Missing,
                format!("{:?} can't be read", part.name),
            )),
        };
        let state = match state {
            Ok(state) => state,
            Err(error) => {
                self.map.refused.push(error.of(&name));
                return true;
            }
        };
        let from = Provenance::Own(at.trim_start_matches('.').to_owned());
        let mut draft = Draft::default();
        draft.note("bits", 4, from.clone(), Certain);
        for (name, field) in [
            ("block", "block"),
            ("shape", "shape"),
            ("nested_block", "nested_block"),
            ("nested_offset_bits", "nested_offset_bits"),
            ("dtype", "dtype"),
        ] {
            if let Some(value) = state.0.get(name) {
                draft.put(field, value.clone(), from.clone(), Certain);
            }
        }
        let roles = [
            (Role::Codes, ".weight"),
            (Role::Scale, ".weight.absmax"),
            (Role::Table, ".weight.quant_map"),
            (Role::NestedScale, ".weight.nested_absmax"),
            (Role::NestedTable, ".weight.nested_quant_map"),
            (Role::State, at),
        ];
        self.make(module, "bnb4", &roles, &[], draft, (from, Certain))
    }

    /// HQQ's encoded state: scalars that are tensors.
    pub(super) fn hqq(&mut self, module: &Module<'a>) -> bool {
        if module.get(".W_q").is_none() || module.get(".nbits").is_none() {
            return false;
        }
        let own = |name: &str| Provenance::Own(name.to_owned());
        let scalar = |this: &mut Self, suffix: &str| -> Option<u64> {
            let bytes = this.look(module.get(suffix)?, 8)?;
            let value = match *bytes {
                [byte] => i64::from(byte),
                [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
                [a, b, c, d, e, f, g, h] => i64::from_le_bytes([a, b, c, d, e, f, g, h]),
                _ => return None,
            };
            u64::try_from(value).ok()
        };
        let mut draft = Draft::default();
        let bits = scalar(self, ".nbits");
        let group = scalar(self, ".group_size");
        let axis = scalar(self, ".axis");
        let nested =
            scalar(self, ".quant_scale").unwrap_or(0) + scalar(self, ".quant_zero").unwrap_or(0);
        let shape = module
            .get(".shape")
            .and_then(|p| self.look(p, 16))
            .and_then(|b| shape_in(&b));
        let text = module
            .get(".compute_dtype")
            .and_then(|part| self.look(part, 64));
        let dtype = text
            .as_deref()
            .map(|text| std::str::from_utf8(text).ok().and_then(float));
        let name = module.logical();
        let (Some(bits), Some(axis), Some(shape)) = (bits, axis, shape) else {
            let error = Error::new(Reason::Missing, "HQQ's nbits, axis or shape can't be read");
            self.map.refused.push(error.of(&name));
            return true;
        };
        match dtype {
            Some(Some(dtype)) => draft.dtype(dtype, own("compute_dtype"), Certain),
            Some(None) => {
                // Lint Q014: HQQ's loader would evaluate it.
                let error = Error::new(
                    Reason::Parameter,
                    "compute_dtype is not the name of a dtype; HQQ's own loader would run it as a program",
                );
                self.map.refused.push(error.of(&name));
                return true;
            }
            None => {}
        }
        draft.int("bits", bits, own("nbits"), Certain);
        draft.note("group", group.unwrap_or(0), own("group_size"), Certain);
        draft.int("axis", axis, own("axis"), Certain);
        draft.put("shape", sizes(&shape), own("shape"), Certain);
        let roles = [
            (Role::Codes, ".W_q"),
            (Role::Scale, ".scale"),
            (Role::Zero, ".zero"),
        ];
        let scheme = if nested > 0 { "hqq-nested" } else { "hqq" };
        self.make(
            module,
            scheme,
            &roles,
            HQQ_SCALARS,
            draft,
            (own("encoded_state_dict"), Certain),
        )
    }

    /// quanto, by its names; neither axis nor group of packed codes is in its files.
    pub(super) fn quanto(&mut self, module: &Module<'a>) -> bool {
        let Some((codes_at, codes)) = module.first(&[".weight._data._data", ".weight._data"])
        else {
            return false;
        };
        let Some(scale) = module.get(".weight._scale") else {
            return false;
        };
        let said = self.configs.by(&["quanto"]).cloned();
        let kind = said.as_ref().and_then(|s| {
            let own = s.map.get(module.name)?.as_object()?;
            Some((own.get("weights")?.as_str()?.to_owned(), s.file.clone()))
        });
        let mut draft = Draft::default();
        self.dtype_by(&mut draft, scale);
        let roles = [
            (Role::Codes, codes_at),
            (Role::Scale, ".weight._scale"),
            (Role::Zero, ".weight._shift"),
            (Role::InputScale, ".input_scale"),
        ];
        if codes_at == ".weight._data" {
            draft.int("bits", 8, Provenance::Shapes, Certain);
            return self.make(
                module,
                "quanto",
                &roles,
                &[".output_scale"],
                draft,
                (Provenance::Shapes, Certain),
            );
        }
        let (&[rows, group], Some(&groups)) = (&codes.shape[..], scale.shape.first()) else {
            return false;
        };
        let Some(bits) = (groups > 0)
            .then(|| rows.saturating_mul(8) / groups)
            .filter(|b| matches!(b, 2 | 4))
        else {
            return false;
        };
        match kind {
            Some((_, file)) => draft.int("bits", bits, Provenance::Config(file), Certain),
            None => draft.int("bits", bits, Provenance::Shapes, Certain),
        }
        draft.note("group", group, Provenance::Shapes, Likely);
        draft.put("shape", sizes(&[groups, group]), Provenance::Default, Guess);
        draft.ambiguous(
            "shape",
            vec![
                format!("[{groups}, {group}]"),
                "any other of as many elements".to_owned(),
            ],
            "quanto's files hold rows of groups, and neither the shape nor the axis",
        );
        self.make(
            module,
            "quanto",
            &roles,
            &[".output_scale"],
            draft,
            (Provenance::Shapes, Certain),
        )
    }

    /// ComfyUI's marks: a key of the metadata, or a tensor of JSON beside each weight.
    pub(super) fn comfy(&mut self) {
        let key = self.configs.metadata.get("_quantization_metadata").cloned();
        let layers: Option<Value> = key.and_then(|text| serde_json::from_str(&text).ok());
        let layers = layers
            .as_ref()
            .and_then(|all| all.get("layers")?.as_object());
        let mut found: Vec<(String, String, Provenance)> = Vec::new();
        for (name, layer) in layers.into_iter().flatten().take(MAX_LAYERS) {
            if let Some(format) = layer.get("format").and_then(Value::as_str) {
                let from = Provenance::Own("_quantization_metadata".to_owned());
                found.push((name.clone(), format.to_owned(), from));
            }
        }
        let marked: Vec<_> = self
            .modules
            .values()
            .filter_map(|module| Some((module.name, module.get(".comfy_quant")?)))
            .collect();
        for (name, part) in marked {
            let text = self.look(part, MAX_STATE);
            let value: Option<Value> = text.and_then(|text| serde_json::from_slice(&text).ok());
            if let Some(format) = value.as_ref().and_then(|v| v.get("format")?.as_str()) {
                let from = Provenance::Own("comfy_quant".to_owned());
                found.push((name.to_owned(), format.to_owned(), from));
            }
        }
        for (name, format, from) in found {
            // A prefix that was taken off the tensors' names is still there in the key, or the other way round.
            let Some(module) = self.modules.remove(&*name) else {
                let text = format!("ComfyUI's metadata names {name:?}, which is no module here");
                self.map.warnings.push(text);
                continue;
            };
            if module.get(".weight").is_none() {
                continue;
            }
            self.comfy_layer(&module, &format, from);
        }
    }

    fn comfy_layer(&mut self, module: &Module<'a>, format: &str, from: Provenance) {
        let mut draft = Draft::default();
        let fp8 = module
            .get(".weight")
            .is_some_and(|part| matches!(part.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2));
        let mut roles = vec![
            (Role::Codes, ".weight"),
            (Role::Scale, ".weight_scale"),
            (Role::State, ".comfy_quant"),
            (Role::InputScale, ".input_scale"),
        ];
        if fp8 && format.starts_with("float8_e") && module.get(".weight_scale").is_some() {
            draft.note("bits", 8, from.clone(), Certain);
            self.model_dtype_comfy(&mut draft);
            self.make(module, "fp8-tensor", &roles, &[], draft, (from, Certain));
            return;
        }
        // Its other formats are laid out for its own kernels.
        roles.push((Role::GlobalScale, ".weight_scale_2"));
        let family = format!("comfy-{format}");
        self.make(module, &family, &roles, &[], draft, (from, Certain));
    }

    fn model_dtype_comfy(&self, draft: &mut Draft) {
        if let Some((dtype, file)) = self.configs.model_dtype() {
            draft.dtype(dtype, Provenance::Config(file.to_owned()), Likely);
        }
    }
}
