//! Checkpoints of the corpus as quantised tensors, for the schemes that are repacked.

#![allow(dead_code, reason = "each test uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tonnage_format::{Dtype, Header, ReadOptions};
use tonnage_quant::descriptor::Float;
use tonnage_quant::map::{Meaning, QTensor};
use tonnage_quant::packed::Packed;
use tonnage_quant::repack::{How, repack};
use tonnage_quant::scheme::{Param, Params, Part, Parts, Scheme};
use tonnage_quant::target::Target;

/// A tensor of the corpus.
pub struct Case {
    /// The checkpoint's path.
    pub path: String,
    /// The tensor.
    pub packed: Packed,
}

/// A generator of random numbers that needs nothing.
pub fn random(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// A target, from its text.
pub fn target(text: &str) -> Target {
    Target::parse(text).unwrap()
}

/// The bits that a tensor's scheme is told.
pub fn bits(packed: &Packed) -> Option<u32> {
    match &packed.tensor.meaning {
        Meaning::Preset(_, params) => params.int("bits").unwrap().map(|bits| bits as u32),
        _ => None,
    }
}

/// There and back again, and what is between has the same values.
pub fn round_trip(packed: &Packed, there: &str, back: &str, how: How) {
    let (name, from) = (&packed.tensor.name, packed.tensor.preset());
    let (made, report) = repack(packed, &target(there), false)
        .unwrap_or_else(|e| panic!("{name} {from} to {there}: {e}"));
    assert_eq!(report.how, how, "{name} {from} to {there}");
    assert_eq!(report.difference.changed, 0);
    let difference = packed.difference(&made).unwrap();
    assert_eq!(difference.changed, 0, "{from} to {there}: {difference:?}");
    let mut back = target(back);
    if back.bits.is_none() {
        back.bits = bits(packed);
    }
    let (again, _) = repack(&made, &back, false)
        .unwrap_or_else(|e| panic!("{name} {from} from {there} back: {e}"));
    for (role, bytes) in &packed.bytes {
        assert!(
            again.bytes[role] == *bytes,
            "{name} {from} by {there}: {role:?} differs"
        );
    }
    if how == How::Rearranged {
        assert_eq!(again.tensor.dtype, packed.tensor.dtype);
    }
}

/// Every tensor of a scheme of the corpus, read as `preset` with these parameters on top of bits, group and shape.
pub fn cases(scheme: &str, preset: &str, more: &[(&str, &str)]) -> Vec<Case> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/quant");
    let list: Value =
        serde_json::from_slice(&fs::read(corpus.join("cases.json")).unwrap()).unwrap();
    let mut found = Vec::new();
    for case in list["cases"].as_array().unwrap() {
        let path = case["path"].as_str().unwrap();
        let swizzled = more.iter().any(|(key, _)| *key == "scale_layout");
        if case["scheme"] != scheme || swizzled && !path.contains("swizzled") {
            continue;
        }
        let bytes = fs::read(corpus.join(path).join("model.safetensors")).unwrap();
        let len = Some(bytes.len() as u64);
        let header = Header::parse(bytes.clone(), len, &ReadOptions::strict()).unwrap();
        for (name, said) in case["tensors"].as_object().unwrap() {
            let packed = tensor(case, name, said, &header, &bytes, preset, more);
            found.push(Case {
                path: path.to_owned(),
                packed,
            });
        }
    }
    assert!(!found.is_empty(), "no case of {scheme}");
    found
}

fn tensor(
    case: &Value,
    name: &str,
    said: &Value,
    header: &Header,
    bytes: &[u8],
    preset: &str,
    more: &[(&str, &str)],
) -> Packed {
    let row = Scheme::find(preset).unwrap();
    let shape: Vec<i64> = said["shape"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_i64().unwrap())
        .collect();
    let mut params = BTreeMap::new();
    let mut put = |key: &str, value: Param| {
        if row.params.contains(&key) {
            params.insert(key.to_owned(), value);
        }
    };
    if let Some(bits) = case["bits"].as_i64() {
        put("bits", Param::Int(bits));
    }
    let group = case["group"].as_i64().filter(|group| *group > 0);
    put("group", Param::Int(group.unwrap_or(*shape.last().unwrap())));
    if !preset.starts_with("mx") && !preset.starts_with("nv") {
        put("shape", Param::List(shape));
    }
    put(
        "dtype",
        Param::Text(said["dtype"].as_str().unwrap().to_owned()),
    );
    for (key, value) in more {
        put(key, Param::Text((*value).to_owned()));
    }
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let (mut parts, mut data) = (Parts::new(), BTreeMap::new());
    for part in row.parts {
        for suffix in part.suffixes {
            let names = [format!("{module}.{suffix}"), format!("{module}_{suffix}")];
            let there = names
                .iter()
                .find_map(|name| Some((name, header.get(name)?)));
            let Some((name, info)) = there.filter(|_| !parts.contains_key(&part.role)) else {
                continue;
            };
            let start = (header.data_start() + info.begin) as usize;
            data.insert(
                part.role,
                bytes[start..start + info.byte_len() as usize].to_vec(),
            );
            let dtype: Dtype = info.dtype.known().unwrap();
            let (name, shape) = (name.clone(), info.shape.to_vec());
            parts.insert(part.role, Part { name, dtype, shape });
        }
    }
    let mut tensor = QTensor::preset_of(name, row, Params(params), parts).unwrap();
    tensor.dtype = match said["dtype"].as_str().unwrap() {
        "F16" => Float::F16,
        "BF16" => Float::Bf16,
        _ => Float::F32,
    };
    Packed::new(tensor, data).unwrap()
}

/// The nested tensors of bitsandbytes.
pub fn nested() -> Vec<(String, Packed)> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/quant");
    let list: Value =
        serde_json::from_slice(&fs::read(corpus.join("cases.json")).unwrap()).unwrap();
    let mut found = Vec::new();
    for case in list["cases"].as_array().unwrap() {
        let path = case["path"].as_str().unwrap();
        if case["scheme"] != "bnb4" || !path.contains("nested") {
            continue;
        }
        let bytes = fs::read(corpus.join(path).join("model.safetensors")).unwrap();
        let len = Some(bytes.len() as u64);
        let header = Header::parse(bytes.clone(), len, &ReadOptions::strict()).unwrap();
        for (name, said) in case["tensors"].as_object().unwrap() {
            let state = ["nf4", "fp4"].iter().find_map(|table| {
                let info = header.get(&format!("{name}.quant_state.bitsandbytes__{table}"))?;
                let start = (header.data_start() + info.begin) as usize;
                serde_json::from_slice::<Value>(&bytes[start..start + info.byte_len() as usize])
                    .ok()
            });
            let state = state.unwrap();
            let row = Scheme::find("bnb4").unwrap();
            let shape = said["shape"]
                .as_array()
                .unwrap()
                .iter()
                .map(|n| n.as_i64().unwrap());
            let offset = state["nested_offset"].as_f64().unwrap() as f32;
            let params = Params::of([
                ("block", Param::Int(state["blocksize"].as_i64().unwrap())),
                ("shape", Param::List(shape.collect())),
                (
                    "nested_block",
                    Param::Int(state["nested_blocksize"].as_i64().unwrap()),
                ),
                ("nested_offset_bits", Param::Int(offset.to_bits().into())),
                (
                    "dtype",
                    Param::Text(said["dtype"].as_str().unwrap().to_owned()),
                ),
            ]);
            let (mut parts, mut data) = (Parts::new(), BTreeMap::new());
            let module = name.strip_suffix(".weight").unwrap();
            for part in row.parts {
                for suffix in part.suffixes {
                    let name = format!("{module}.{suffix}");
                    let Some(info) = header.get(&name) else {
                        continue;
                    };
                    let start = (header.data_start() + info.begin) as usize;
                    data.insert(
                        part.role,
                        bytes[start..start + info.byte_len() as usize].to_vec(),
                    );
                    let (dtype, shape) = (info.dtype.known().unwrap(), info.shape.to_vec());
                    parts.insert(part.role, Part { name, dtype, shape });
                }
            }
            let tensor = QTensor::preset_of(name, row, params, parts).unwrap();
            found.push((path.to_owned(), Packed::new(tensor, data).unwrap()));
        }
    }
    found
}
