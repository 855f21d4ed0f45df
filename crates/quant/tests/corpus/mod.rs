//! The corpus of checkpoints that other libraries wrote, as quantised tensors, and whether they decode to those libraries'
//! own values.

#![allow(dead_code, reason = "each test uses its part")]

mod file;

use std::collections::BTreeMap;
use std::fs;

pub use file::{File, corpus, decoded};
use serde_json::Value;
use tonnage_format::Dtype;
use tonnage_quant::dequantize::dequantize;
use tonnage_quant::descriptor::{Float, Role};
use tonnage_quant::interpret::{Bytes, interpret};
use tonnage_quant::map::QTensor;
use tonnage_quant::scheme::{Param, Params, Part, Parts, Scheme};

/// Schemes in the corpus that the table has no row for yet: their checkpoints stay ordinary tensors.
pub const NO_ROW: &[&str] = &["ct-marlin-24", "ct-sparse-24-bitmask", "ct-sparse-bitmask"];

/// Schemes whose libraries give zeros another sign than the product has: by a table without a negative zero, by
/// a difference taken the other way round, or by a branch for the code.
pub const SIGN_OF_ZERO: &[&str] = &["bnb4", "marlin", "nvfp4-mul"];

fn configuration(case: &Value) -> Value {
    let path = corpus()
        .join(case["path"].as_str().unwrap())
        .join("config.json");
    fs::read(path).map_or(Value::Null, |text| serde_json::from_slice(&text).unwrap())
}

/// What a recogniser would say of a tensor of a case: the row, and its parameters.
fn reading(case: &Value, file: &File, module: &str, shape: &[u64]) -> (&'static str, Params) {
    let scheme = case["scheme"].as_str().unwrap();
    let bits = case["bits"].as_i64();
    let group = case["group"].as_i64().filter(|group| *group > 0);
    let mut params = BTreeMap::new();
    let mut put = |name: &str, value: Param| params.insert(name.to_owned(), value);
    let sizes = |shape: &[u64]| Param::List(shape.iter().map(|len| *len as i64).collect());
    let has = |suffix: &str| file.get(&format!("{module}.{suffix}"));
    let scales = has("weight_scale").map_or(0, |(_, shape, _)| shape.iter().product::<u64>());
    let name = match scheme {
        "gptq" | "auto-round-gptq" | "gptq-v2" | "auto-round" | "gptq-planar" => {
            put("bits", Param::Int(bits.unwrap()));
            if let Some(group) = group {
                put("group", Param::Int(group));
            }
            match scheme {
                "gptq" => {
                    put("zero_wrap", Param::Text("word32".to_owned()));
                    "gptq"
                }
                "auto-round-gptq" => {
                    put("zero_wrap", Param::Text("none".to_owned()));
                    "gptq"
                }
                "gptq-planar" => "gptq-planar",
                _ => "gptq-v2",
            }
        }
        "awq-gemm" | "awq-gemv" | "awq-gemv-fast" | "marlin" => {
            let whole = *shape.last().unwrap() as i64;
            put("group", Param::Int(group.unwrap_or(whole)));
            case["scheme"]
                .as_str()
                .map(|s| Scheme::find(s).unwrap().name)
                .unwrap()
        }
        "ct-pack-dense" | "ct-pack-word" => {
            put("bits", Param::Int(bits.unwrap()));
            put("shape", sizes(shape));
            if let Some(group) = group {
                put("group", Param::Int(group));
            }
            Scheme::find(scheme).unwrap().name
        }
        "ct-int" | "modelopt-int8" | "torchao-int8" | "torchao-intx" => {
            if let Some(group) = group {
                put("group", Param::Int(group));
            }
            "ct-int"
        }
        "ct-float" | "fp8-block" | "fp8-row" | "fp8-tensor" => match case["group"].as_array() {
            Some(block) => {
                let block = block.iter().map(|size| size.as_i64().unwrap());
                put("block", Param::List(block.collect()));
                "fp8-block"
            }
            None if scales == 1 => "fp8-tensor",
            None => "fp8-row",
        },
        "mxfp4" | "ct-mxfp4" | "deepseek-fp4" | "mlx-mxfp4" | "modelopt-mxfp4" => "mxfp4",
        "ct-mxfp6" => "mxfp6",
        "ct-mxfp8" | "mlx-mxfp8" | "modelopt-mxfp8" => "mxfp8",
        "nvfp4-mul" | "mlx-nvfp4" => "nvfp4-mul",
        "ct-nvfp4" => "nvfp4-div",
        "mlx-affine" | "metal" => {
            // The configuration may say something else of a module.
            let own = &configuration(case)["quantization"][module];
            put("bits", Param::Int(own["bits"].as_i64().or(bits).unwrap()));
            put(
                "group",
                Param::Int(own["group_size"].as_i64().or(group).unwrap()),
            );
            "mlx-affine"
        }
        "torchao-float8" => "fp8-row",
        "torchao-mx" | "torchao-nvfp4" => {
            let said = file.header.metadata().unwrap();
            if said
                .get(&format!("{module}.weight"))
                .unwrap()
                .contains("\"is_swizzled_scales\": true")
            {
                put("scale_layout", Param::Text("swizzle_128x4".to_owned()));
            }
            match (scheme, bits) {
                ("torchao-nvfp4", _) => "nvfp4-mul",
                (_, Some(4)) => "mxfp4",
                _ => "mxfp8",
            }
        }
        "bitnet" => {
            let class = &configuration(case)["quantization_config"]["linear_class"];
            let op = if class == "bitlinear" {
                "divide"
            } else {
                "multiply"
            };
            put("scale", Param::Text(op.to_owned()));
            "bitnet"
        }
        "gemma" => {
            put(
                "bits",
                Param::Int(case["bits_of"][module].as_i64().unwrap()),
            );
            put("shape", sizes(shape));
            "gemma"
        }
        "hqq" => {
            put("bits", Param::Int(bits.unwrap()));
            put("axis", Param::Int(case["axis"].as_i64().unwrap()));
            put("shape", sizes(shape));
            "hqq"
        }
        "quanto" => {
            put("bits", Param::Int(bits.unwrap()));
            put("shape", sizes(shape));
            "quanto"
        }
        "modelopt-int4-qtensor" => {
            put("group", Param::Int(group.unwrap()));
            "modelopt-int4-qtensor"
        }
        "bnb8" => "bnb8",
        "bnb4" => {
            let state = ["nf4", "fp4"]
                .iter()
                .find_map(|table| has(&format!("weight.quant_state.bitsandbytes__{table}")))
                .unwrap();
            let state: Value = serde_json::from_slice(state.2).unwrap();
            put("block", Param::Int(state["blocksize"].as_i64().unwrap()));
            put("shape", sizes(shape));
            if let Some(block) = state["nested_blocksize"].as_i64() {
                let offset = state["nested_offset"].as_f64().unwrap() as f32;
                put("nested_block", Param::Int(block));
                put(
                    "nested_offset_bits",
                    Param::Int(i64::from(offset.to_bits())),
                );
            }
            "bnb4"
        }
        other => panic!("{other} has no row, and NO_ROW does not say so"),
    };
    (name, Params(params))
}

/// What a tensor of the corpus is, with its library's own values.
pub struct Told {
    pub tensor: QTensor,
    pub bytes: BTreeMap<Role, Vec<u8>>,
    pub wanted: Vec<f32>,
}

/// The cases of the corpus.
pub fn cases() -> Vec<Value> {
    let list = fs::read(corpus().join("cases.json")).unwrap();
    let list: Value = serde_json::from_slice(&list).unwrap();
    list["cases"].as_array().unwrap().clone()
}

/// A tensor of a case.
pub fn tensor(case: &Value, file: &File, expected: &File, name: &str) -> Result<Told, String> {
    let (dtype, mut shape, bytes) = expected.get(name).ok_or("no expectation")?;
    let mut wanted = decoded(dtype, bytes);
    let module = name.strip_suffix(".weight").unwrap_or(name);
    if case["scheme"] == "mxfp4" && shape.len() == 3 {
        // transformers turns the last two axes of experts.
        let (rows, columns) = (shape[1] as usize, shape[2] as usize);
        let turned = wanted.chunks(rows * columns).flat_map(|matrix| {
            (0..columns * rows).map(move |at| matrix[at % rows * columns + at / rows])
        });
        wanted = turned.collect();
        shape.swap(1, 2);
    }
    let (row, mut params) = reading(case, file, module, &shape);
    params
        .0
        .insert("dtype".to_owned(), Param::Text(dtype.name().to_owned()));
    let scheme = Scheme::find(row).ok_or("no row")?;
    let (mut parts, mut data) = (Parts::new(), BTreeMap::new());
    for part in scheme.parts {
        for suffix in part.suffixes {
            let names = [format!("{module}.{suffix}"), format!("{module}_{suffix}")];
            let found = names.iter().find_map(|name| Some((name, file.get(name)?)));
            let Some((name, (dtype, shape, bytes))) = found else {
                continue;
            };
            if parts.contains_key(&part.role) {
                continue;
            }
            let name = name.clone();
            parts.insert(part.role, Part { name, dtype, shape });
            data.insert(part.role, bytes.to_vec());
        }
    }
    let tensor = QTensor::preset_of(name, scheme, params, parts).map_err(|e| e.to_string())?;
    if tensor.shape != shape {
        return Err(format!("shape {:?}, {shape:?} is needed", tensor.shape));
    }
    Ok(Told {
        tensor,
        bytes: data,
        wanted,
    })
}

/// Whether values are the library's own.
pub fn compare(case: &Value, told: &Told) -> Result<(), String> {
    let meaning = told.tensor.describe().map_err(|e| e.to_string())?;
    let data: Bytes<'_> = (told.bytes.iter())
        .map(|(role, bytes)| (*role, &bytes[..]))
        .collect();
    let wanted = &told.wanted;
    let rows = meaning.shape.iter().rev().skip(1).product();
    let mut values = vec![0.0; wanted.len()];
    interpret(&meaning, &data, 0..rows, &mut values).map_err(|e| e.to_string())?;
    let loose = SIGN_OF_ZERO.contains(&case["scheme"].as_str().unwrap());
    let same = |(a, b): (&f32, &f32)| {
        a.to_bits() == b.to_bits()
            || (a.is_nan() && b.is_nan())
            || (loose && *a == 0.0 && *b == 0.0)
    };
    let differ = values
        .iter()
        .zip(wanted)
        .filter(|pair| !same(*pair))
        .count();
    if differ > 0 {
        let first = values
            .iter()
            .zip(wanted)
            .position(|pair| !same(pair))
            .unwrap();
        return Err(format!(
            "{differ} of {} values differ, first at {first}: {} and {}",
            wanted.len(),
            values[first],
            wanted[first]
        ));
    }
    // The fast way, to the library's own dtype or any other.
    let mut fast = vec![0; wanted.len() * 4];
    dequantize(
        &told.tensor,
        &data,
        0..wanted.len() as u64,
        Float::F32,
        &mut fast,
    )
    .map_err(|e| e.to_string())?;
    let fast = decoded(Dtype::F32, &fast);
    let alike = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    if !values.iter().zip(&fast).all(alike) {
        return Err("the fast way has other values".to_owned());
    }
    // Each part that means something was looked at: without it nothing comes out.
    for role in [Role::Codes, Role::Scale] {
        let mut less = data.clone();
        less.remove(&role);
        assert!(interpret(&meaning, &less, 0..rows, &mut values).is_err());
    }
    Ok(())
}
