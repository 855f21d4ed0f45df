//! Checkpoints that libraries wrote (`conformance/quant`) are recognised from their files alone, as what they are;
//! and by that reading the interpreter gives the libraries' own values, bit for bit.
#![allow(
    clippy::disallowed_methods,
    reason = "the corpus is files; the room's own code reads none"
)]

mod recognised;

use std::collections::BTreeMap;

use recognised::{Case, cases};
use serde_json::Value;
use tonnage_quant::descriptor::Float;
use tonnage_quant::interpret::{Bytes, interpret};
use tonnage_quant::map::{Meaning, Policy, QTensor, QuantMap};
use tonnage_quant::scheme::{Param, Scheme};

/// What a kind of the corpus is called in the table of schemes.
fn row_of(case: &Value) -> &str {
    let scales = |shape: &Value| shape.is_array();
    match case["scheme"].as_str().unwrap() {
        "auto-round" => "gptq-v2",
        "auto-round-gptq" => "gptq",
        "modelopt-int8" | "torchao-int8" | "torchao-intx" => "ct-int",
        "ct-float" if scales(&case["group"]) => "fp8-block",
        "ct-float" if case["group"].is_null() => "fp8-tensor",
        "ct-float" | "torchao-float8" => "fp8-row",
        "ct-mxfp4" | "deepseek-fp4" | "mlx-mxfp4" | "modelopt-mxfp4" => "mxfp4",
        "ct-mxfp6" => "mxfp6",
        "ct-mxfp8" | "mlx-mxfp8" | "modelopt-mxfp8" => "mxfp8",
        "torchao-mx" if case["bits"] == 4 => "mxfp4",
        "torchao-mx" => "mxfp8",
        "mlx-nvfp4" | "torchao-nvfp4" => "nvfp4-mul",
        "ct-nvfp4" => "nvfp4-div",
        "metal" => "mlx-affine",
        other => other,
    }
}

#[test]
fn every_file_is_recognised_as_what_it_is_and_decodes_by_that() {
    let (mut seen, mut wrong) = (BTreeMap::<String, usize>::new(), Vec::new());
    for case in cases() {
        let map = match case.detect(Policy::Lenient) {
            Ok(map) => map,
            Err(error) => {
                wrong.push(format!("{}: {error}", case.path));
                continue;
            }
        };
        if !map.refused.is_empty() || !map.warnings.is_empty() {
            wrong.push(format!(
                "{}: {:?} {:?}",
                case.path, map.refused, map.warnings
            ));
        }
        for (name, _) in &case.expected.tensors() {
            match check(&case, &map, name) {
                Ok(true) => *seen.entry(case.scheme().to_owned()).or_default() += 1,
                Ok(false) => {
                    *seen
                        .entry(format!("{} (carried)", case.scheme()))
                        .or_default() += 1
                }
                Err(what) => wrong.push(format!("{} {name}: {what}", case.path)),
            }
        }
        // Nothing but what the library quantised is taken for quantised.
        let expected = case.expected.tensors().len();
        if map.len() != expected {
            let names: Vec<&str> = map.tensors().map(|t| &*t.name).collect();
            wrong.push(format!("{}: {names:?}, {expected} expected", case.path));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}\nright: {seen:?}",
        wrong.len(),
        wrong.join("\n")
    );
    assert_eq!(cases().len(), 229);
    assert!(seen.len() >= 40, "{seen:?}");
}

fn check(case: &Case, map: &QuantMap, name: &str) -> Result<bool, String> {
    let tensor = map.get(name).ok_or("plain")?;
    let row = row_of(&case.row);
    if Scheme::find(row).is_none() {
        return match &tensor.meaning {
            Meaning::Opaque(family) if family == row => Ok(false),
            _ => Err(format!("{}, opaque/{row} is needed", tensor.preset())),
        };
    }
    match &tensor.meaning {
        Meaning::Preset(scheme, _) if scheme.name == row => {}
        _ => return Err(format!("{}, {row} is needed", tensor.preset())),
    }
    let evidence = |field: &str| tensor.evidence.iter().any(|e| e.field == field);
    if !evidence("scheme") || !evidence("bits") && !row.starts_with("ct-sparse") {
        return Err(format!("{:?}", tensor.evidence));
    }
    values(case, tensor, name).map(|()| true)
}

fn values(case: &Case, tensor: &QTensor, name: &str) -> Result<(), String> {
    let (dtype, shape, wanted) = case.wanted(name);
    // quanto's shape is in no file of its own, and neither are rows of Gemma's that end inside a byte.
    if tensor.shape != shape && !matches!(case.scheme(), "quanto" | "gemma") {
        return Err(format!("shape {:?}, {shape:?} is needed", tensor.shape));
    }
    let mut tensor = tensor.clone();
    tensor.dtype = match dtype {
        "F16" => Float::F16,
        "BF16" => Float::Bf16,
        _ => Float::F32,
    };
    if case.scheme() == "gemma"
        && let Meaning::Preset(_, params) = &mut tensor.meaning
    {
        let shape = shape.iter().map(|len| *len as i64).collect();
        params.0.insert("shape".to_owned(), Param::List(shape));
    }
    let meaning = tensor.describe().map_err(|e| e.to_string())?;
    let bytes: Bytes<'_> = tensor
        .parts
        .iter()
        .map(|(role, part)| (*role, case.model.get(&part.name).unwrap().2))
        .collect();
    let rows = meaning.shape.iter().rev().skip(1).product();
    let mut values = vec![0.0; wanted.len()];
    interpret(&meaning, &bytes, 0..rows, &mut values).map_err(|e| e.to_string())?;
    let same = |(a, b): (&f32, &f32)| {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()) || (*a == 0.0 && *b == 0.0)
    };
    match values
        .iter()
        .zip(&wanted)
        .filter(|pair| !same(*pair))
        .count()
    {
        0 => Ok(()),
        differ => Err(format!("{differ} of {} values differ", wanted.len())),
    }
}

#[test]
fn strict_refuses_what_has_two_readings_and_says_which() {
    let refused: Vec<String> = cases()
        .iter()
        .filter_map(|case| {
            let error = case.detect(Policy::Strict).err()?;
            assert!(!error.tensor.is_empty(), "{error}");
            Some(format!("{}: {error}", case.path))
        })
        .collect();
    // Only quanto's packed codes, whose shape is in no file.
    let known = |text: &String| text.contains("shape can be") && text.starts_with("quanto/qint");
    assert!(refused.iter().all(known), "{refused:#?}");
    assert_eq!(refused.len(), 5, "{refused:#?}");
}
