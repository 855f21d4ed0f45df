//! What the quantisation map says of a GGUF file: which tensors are blocks of which type.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::header::Gguf;
use super::types::{GgmlType, dtype_of};

/// Names of one pattern: the types that they have (`None` for plain numbers), and how many they are.
#[derive(Default)]
struct Alike<'a> {
    types: Vec<Option<GgmlType>>,
    names: Vec<(&'a str, GgmlType)>,
}

/// The quantisation map of some files, as the JSON of the metadata key `quant.map`; `None` where no tensor has
/// blocks. Layers whose tensors of a name are all of one type share a rule; the others have one each.
pub fn quant_map(files: &[&Gguf]) -> Option<String> {
    let mut alike: BTreeMap<String, Alike<'_>> = BTreeMap::new();
    for tensor in files.iter().flat_map(|file| file.tensors()) {
        // Braces are the patterns' own; names with them are in no file of a known writer, and stay bytes.
        if tensor.name.contains(['{', '}']) {
            continue;
        }
        let group = alike.entry(pattern(tensor.name)).or_default();
        let blocks = dtype_of(tensor.ty).is_none().then_some(tensor.ty);
        if !group.types.contains(&blocks) {
            group.types.push(blocks);
        }
        if let Some(ty) = blocks {
            group.names.push((tensor.name, ty));
        }
    }
    let mut rules: Vec<(String, GgmlType)> = Vec::new();
    for (pattern, group) in alike {
        match (&group.types[..], &group.names[..]) {
            ([Some(ty)], [_, _, ..]) => rules.push((pattern, *ty)),
            _ => rules.extend(group.names.iter().map(|&(name, ty)| (name.to_owned(), ty))),
        }
    }
    if rules.is_empty() {
        return None;
    }
    let mut types: Vec<GgmlType> = rules.iter().map(|&(_, ty)| ty).collect();
    types.sort_unstable();
    types.dedup();
    Some(text(&types, &rules))
}

/// The name with the number of its layer left open.
fn pattern(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("blk.")
        && let Some((number, rest)) = rest.split_once('.')
        && !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit())
    {
        return format!("blk.{{}}.{rest}");
    }
    name.to_owned()
}

fn text(types: &[GgmlType], rules: &[(String, GgmlType)]) -> String {
    let mut text = String::from("{\"v\":1,\"schemes\":{");
    for (at, ty) in types.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        let name = ty.name();
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "{comma}\"{}\":{{\"preset\":\"ggml/{name}@1\"}}",
            name.to_lowercase()
        );
    }
    text.push_str("},\"tensors\":[");
    for (at, (name, ty)) in rules.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        let name = serde_json::Value::from(name.as_str());
        let _ = write!(
            text,
            "{comma}{{\"m\":{name},\"s\":\"{}\"}}",
            ty.name().to_lowercase()
        );
    }
    text.push_str("]}");
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, TensorSpec, WriteOptions, layout};
    use super::*;

    #[test]
    fn layers_alike_share_a_rule() {
        use GgmlType::{F32, Q4_K, Q8_0};
        let tensor = |name, ty| TensorSpec {
            name,
            ty,
            shape: &[2, 256],
        };
        let tensors = [
            tensor("token_embd.weight", Q8_0),
            tensor("blk.0.attn_q.weight", Q4_K),
            tensor("blk.1.attn_q.weight", Q4_K),
            tensor("blk.0.ffn_up.weight", Q4_K),
            tensor("blk.1.ffn_up.weight", Q8_0),
            tensor("blk.0.a\"b.weight", Q4_K),
            tensor("blk.0.attn_norm.weight", F32),
            tensor("blk.0.attn_v.weight", Q4_K),
            tensor("blk.1.attn_v.weight", F32),
        ];
        let plan = layout(&[], &tensors, &WriteOptions::default()).unwrap();
        let gguf = Gguf::parse(plan.header, plan.file_len, &Limits::default()).unwrap();
        let map: serde_json::Value = serde_json::from_str(&quant_map(&[&gguf]).unwrap()).unwrap();
        assert_eq!(map["schemes"]["q4_k"]["preset"], "ggml/Q4_K@1");
        let rules: Vec<(&str, &str)> = map["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|rule| (rule["m"].as_str().unwrap(), rule["s"].as_str().unwrap()))
            .collect();
        assert_eq!(
            rules,
            [
                ("blk.0.a\"b.weight", "q4_k"),
                ("blk.{}.attn_q.weight", "q4_k"),
                ("blk.0.attn_v.weight", "q4_k"),
                ("blk.0.ffn_up.weight", "q4_k"),
                ("blk.1.ffn_up.weight", "q8_0"),
                ("token_embd.weight", "q8_0"),
            ]
        );
    }
}
