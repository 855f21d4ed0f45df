//! torchao: the metadata has a JSON text for each logical name, with the Python class and its fields.

use serde_json::{Map, Value};
use tonnage_format::Dtype;

use super::config::float;
use super::{Draft, Recogniser, sizes};
use crate::descriptor::Role;
use crate::map::{Confidence, Provenance};
use crate::scheme::{Param, Part, Parts};
use Confidence::{Certain, Likely};

/// Most bytes of one tensor's text.
const MAX_TEXT: usize = 64 << 10;

/// One tensor's text.
struct Tensor<'a> {
    name: &'a str,
    class: String,
    data: Map<String, Value>,
    /// The parts, by torchao's names for them.
    parts: Vec<(String, &'a Part)>,
}

impl Tensor<'_> {
    fn part(&self, name: &str) -> Option<&Part> {
        let found = self.parts.iter().find(|(own, _)| own == name);
        found.map(|(_, part)| *part)
    }

    /// The text of a value that is wrapped: `{"_type":"torch.dtype","_data":"bfloat16"}`.
    fn wrapped(&self, key: &str) -> Option<&str> {
        self.data.get(key)?.get("_data")?.as_str()
    }

    fn block(&self) -> Option<Vec<u64>> {
        let sizes = self.data.get("block_size")?.as_array()?;
        sizes.iter().map(Value::as_u64).collect()
    }
}

impl<'a> Recogniser<'a, '_> {
    /// Every tensor that torchao's metadata describes.
    pub(super) fn torchao(&mut self) {
        let configs = self.configs;
        for (name, text) in &configs.metadata {
            if text.len() > MAX_TEXT || !text.starts_with("{\"_type\"") {
                continue;
            }
            let Ok(Value::Object(mut map)) = serde_json::from_str::<Value>(text) else {
                continue;
            };
            let (Some(class), Some(Value::Object(data)), Some(parts)) = (
                map.get("_type").and_then(Value::as_str).map(str::to_owned),
                map.remove("_data"),
                map.get("_tensor_data_names").and_then(Value::as_array),
            ) else {
                continue;
            };
            let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
            let dot = if module.is_empty() { "" } else { "." };
            let mut missing = None;
            let mut there = Vec::new();
            for part in parts.iter().take(16).filter_map(Value::as_str) {
                let full = format!("{module}{dot}_{leaf}_{part}");
                match self.rows.get(&*full) {
                    Some(row) => there.push((part.to_owned(), *row)),
                    None => missing = Some(full),
                }
            }
            if let Some(missing) = missing {
                let text = format!("torchao's metadata names {missing:?}, which is not there");
                let error = crate::error::Error::new(crate::error::Reason::Missing, text);
                self.map.refused.push(error.of(name));
                continue;
            }
            self.described(&Tensor {
                name,
                class,
                data,
                parts: there,
            });
        }
    }

    fn described(&mut self, tensor: &Tensor<'a>) {
        let own = Provenance::Own(tensor.name.to_owned());
        let from = (own.clone(), Certain);
        let mut draft = Draft::default();
        let dtype = tensor
            .wrapped("dtype")
            .or_else(|| tensor.wrapped("orig_dtype"));
        if let Some(dtype) = dtype.and_then(float) {
            draft.dtype(dtype, own.clone(), Certain);
        }
        let Some(codes) = tensor.part("qdata") else {
            return self.unread(tensor, draft, from);
        };
        let mut parts = Parts::new();
        let mut extras = Vec::new();
        for (name, part) in &tensor.parts {
            let role = match &**name {
                "qdata" => Role::Codes,
                "scale" => Role::Scale,
                "zero_point" => Role::Zero,
                "per_tensor_scale" => Role::GlobalScale,
                "act_scale" | "act_per_tensor_scale" | "act_quant_scale" => Role::InputScale,
                _ => {
                    extras.push((*part).clone());
                    continue;
                }
            };
            parts.insert(role, (*part).clone());
        }
        let swizzled = tensor
            .data
            .get("is_swizzled_scales")
            .and_then(Value::as_bool)
            == Some(true);
        let block = tensor.block();
        let one_scale = tensor
            .part("scale")
            .is_some_and(|s| crate::scheme::count(s).ok() == Some(1));
        let scheme = match &*tensor.class {
            "Float8Tensor" => {
                draft.note("bits", 8, own.clone(), Certain);
                match block.as_deref() {
                    _ if one_scale => "fp8-tensor",
                    Some(&[1, columns]) if codes.shape.last() == Some(&columns) => "fp8-row",
                    Some(block) => {
                        draft.put("block", sizes(block), own.clone(), Certain);
                        "fp8-block"
                    }
                    None => return self.unread(tensor, draft, from),
                }
            }
            "Int8Tensor" | "IntxUnpackedToInt8Tensor" => {
                let width = tensor
                    .wrapped("target_dtype")
                    .and_then(|name| name.strip_prefix("int"));
                draft.note("bits", width.unwrap_or("8"), own.clone(), Certain);
                if let Some(&[1, columns]) = block.as_deref()
                    && codes.shape.last() != Some(&columns)
                {
                    draft.int("group", columns, own.clone(), Certain);
                }
                "ct-int"
            }
            "MXTensor" => {
                let element = tensor.wrapped("elem_dtype").unwrap_or_default();
                match element {
                    "float4_e2m1fn_x2" => "mxfp4",
                    "float8_e4m3fn" => "mxfp8",
                    "float8_e5m2" => {
                        draft.put(
                            "element",
                            Param::Text("e5m2".to_owned()),
                            own.clone(),
                            Certain,
                        );
                        "mxfp8"
                    }
                    _ => return self.unread(tensor, draft, from),
                }
            }
            "NVFP4Tensor" => "nvfp4-mul",
            _ => return self.unread(tensor, draft, from),
        };
        if matches!(scheme, "mxfp4" | "mxfp8" | "nvfp4-mul") {
            draft.note(
                "bits",
                if scheme == "mxfp8" { 8 } else { 4 },
                own.clone(),
                Certain,
            );
            let group = tensor.data.get("block_size").and_then(Value::as_u64);
            let needed = if scheme == "nvfp4-mul" { 16 } else { 32 };
            if group.is_some_and(|group| group != needed) {
                return self.unread(tensor, draft, from);
            }
            draft.note("group", needed, own.clone(), Certain);
            if swizzled {
                let layout = Param::Text("swizzle_128x4".to_owned());
                draft.put("scale_layout", layout, own, Certain);
            }
        }
        // One zero for signed codes is kept in I8; another dtype is not of these classes.
        if parts
            .get(&Role::Zero)
            .is_some_and(|zero| zero.dtype != Dtype::I8)
        {
            return self.unread(tensor, draft, from);
        }
        self.finish(tensor.name, scheme, parts, extras, draft, from);
    }

    /// A class whose packing is a kernel's own.
    fn unread(&mut self, tensor: &Tensor<'a>, draft: Draft, from: (Provenance, Confidence)) {
        let mut parts = tensor.parts.iter().map(|(_, part)| (*part).clone());
        let codes = parts.next().map(|part| (Role::Codes, part));
        let extras = parts.collect();
        let family = format!("torchao-{}", tensor.class);
        let from = (from.0, Likely.min(from.1));
        self.finish(
            tensor.name,
            &family,
            codes.into_iter().collect(),
            extras,
            draft,
            from,
        );
    }
}
