//! Loads of quantised checkpoints as numbers: each tensor under its logical name, what the room of schemes says it is, by
//! every way that tensors are read.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tonnage::format::Dtype;
use tonnage::plan::QuantMap;
use tonnage::{Checkpoint, Load, Save, TensorData, save};
use tonnage_quant::dequantize::dequantize;
use tonnage_quant::descriptor::Float;
use tonnage_quant::interpret::Bytes;

fn random(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A GPTQ module, an FP8 module in blocks, MXFP4 experts, and a plain tensor.
fn checkpoint(folder: &Path) -> (Checkpoint, QuantMap) {
    let parts: [(&str, Dtype, &[u64]); 8] = [
        ("a.qweight", Dtype::I32, &[128 / 8, 96]),
        ("a.qzeros", Dtype::I32, &[4, 12]),
        ("a.scales", Dtype::F16, &[4, 96]),
        ("b.weight", Dtype::F8_E4M3, &[200, 130]),
        ("b.weight_scale_inv", Dtype::F32, &[2, 2]),
        ("c_blocks", Dtype::U8, &[2, 50, 3, 16]),
        ("c_scales", Dtype::U8, &[2, 50, 3]),
        ("norm", Dtype::F32, &[96]),
    ];
    let bytes: Vec<Vec<u8>> = (parts.iter().zip(1..))
        .map(|((_, dtype, shape), seed)| {
            random(
                shape.iter().product::<u64>() as usize * dtype.bitsize() / 8,
                seed,
            )
        })
        .collect();
    let tensors: Vec<TensorData<'_>> = (parts.iter().zip(&bytes))
        .map(|(&(name, dtype, shape), data)| TensorData {
            name,
            dtype,
            shape,
            data,
        })
        .collect();
    let path = folder.join("model.safetensors");
    let how = Save {
        checksums: true,
        ..Save::default()
    };
    save(&tensors, &path, &how).unwrap();
    let checkpoint = Checkpoint::open(path).unwrap();
    let said = r#"{"a.weight": {"preset": "gptq", "params": {"bits": 4, "group": 32}},
        "b.weight": {"preset": "fp8-block", "params": {"block": [128, 128]}},
        "c.weight": {"preset": "mxfp4"}}"#;
    let _: Value = serde_json::from_str(said).unwrap();
    let map = checkpoint.described(said).unwrap();
    assert_eq!(map.len(), 3);
    (checkpoint, map)
}

/// What the room of schemes says.
fn wanted(checkpoint: &Checkpoint, map: &QuantMap, float: Float) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for tensor in map.tensors() {
        let parts: Vec<_> = (tensor.parts.iter())
            .map(|(role, part)| (*role, checkpoint.read(&part.name).unwrap()))
            .collect();
        let parts: Bytes<'_> = parts
            .iter()
            .map(|(role, bytes)| (*role, &bytes[..]))
            .collect();
        let elements = tensor.shape.iter().product::<u64>();
        let mut out = vec![0; elements as usize * float.bytes()];
        dequantize(tensor, &parts, 0..elements, float, &mut out).unwrap();
        all.insert(tensor.name.clone(), out);
    }
    all
}

#[test]
fn a_load_has_numbers_under_logical_names() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, map) = checkpoint(folder.path());
    for (dtype, float) in [(Dtype::F32, Float::F32), (Dtype::BF16, Float::Bf16)] {
        for verify in [false, true] {
            let load = Load {
                dequantize: Some(&map),
                dtype: Some(dtype),
                verify,
                ..Load::default()
            };
            let loaded = checkpoint.load(&load).unwrap();
            let names: Vec<_> = loaded
                .iter()
                .map(|(tensor, _)| tensor.name.as_str())
                .collect();
            assert_eq!(names.len(), 4, "{names:?}");
            for (name, bytes) in wanted(&checkpoint, &map, float) {
                let (tensor, found) = loaded.get(&name).unwrap();
                assert_eq!((tensor.dtype, found), (dtype, &bytes[..]), "{name}");
            }
            assert_eq!(loaded.get("norm").unwrap().0.dtype, dtype);
            assert_eq!(checkpoint.report().unwrap().loaded, 4);
        }
    }
}

#[test]
fn any_bytes_of_a_tensor_are_read_alike() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, map) = checkpoint(folder.path());
    let numbers = checkpoint.dequantized(&map, None).unwrap();
    assert_eq!(
        numbers.tensor("a.weight").unwrap().dtype().unwrap(),
        Dtype::F16
    );
    assert!(numbers.get("a.qweight").is_none() && numbers.get("b.weight_scale_inv").is_none());
    for tensor in numbers
        .iter()
        .filter(|tensor| map.get(tensor.name()).is_some())
    {
        let whole = tensor.read().unwrap();
        let source = numbers.source(tensor.file()).unwrap();
        for (from, to) in [(0, 1), (1, 8), (3, 4), (777, 2301), (4095, whole.len())] {
            let mut some = vec![0; to - from];
            source.read_exact_at(from as u64, &mut some).unwrap();
            assert!(some == whole[from..to], "{} {from}..{to}", tensor.name());
        }
        let mut past = [0; 2];
        assert!(
            source
                .read_exact_at(whole.len() as u64 - 1, &mut past)
                .is_err()
        );
    }
    assert!(numbers.metadata().get("quant.map").is_none());
}

#[test]
fn changed_codes_are_seen_before_they_are_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, map) = checkpoint(folder.path());
    let at = checkpoint.tensor("b.weight").unwrap().offset() as usize;
    drop(checkpoint);
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let load = |verify| Load {
        dequantize: Some(&map),
        select: vec!["b.*".to_owned()],
        verify,
        ..Load::default()
    };
    assert!(checkpoint.load(&load(false)).is_ok());
    let error = checkpoint.load(&load(true)).unwrap_err();
    assert_eq!(error.code(), "CHECKSUM_MISMATCH", "{error}");
}
