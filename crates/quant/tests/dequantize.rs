//! The fast way gives the interpreter's bits: for random tensors of every scheme, whole, cut, and by any range of their
//! elements, from no more than the bytes that it said it needs.

#[path = "slices/samples.rs"]
mod samples;

use std::collections::{BTreeMap, BTreeSet};

use samples::{Rng, Sample, sample};
use tonnage_quant::dequantize::{Dequantizer, Window, Windows, dequantize};
use tonnage_quant::descriptor::{Float, Role};
use tonnage_quant::ggml::{GgmlError, GgmlType};
use tonnage_quant::interpret::{Bytes, interpret};
use tonnage_quant::map::QTensor;
use tonnage_quant::numbers::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use tonnage_quant::scheme::{Part, Scheme};
use tonnage_quant::slice::{Fallback, Sliced, apply};

type Data = BTreeMap<Role, Vec<u8>>;

/// The bits of values, NaNs alike.
fn bits(values: impl Iterator<Item = f32>) -> Vec<u32> {
    let of = |value: f32| {
        if value.is_nan() {
            u32::MAX
        } else {
            value.to_bits()
        }
    };
    values.map(of).collect()
}

/// What the interpreter says, as bits of a dtype.
fn slow(tensor: &QTensor, data: &Data, dtype: Float) -> Vec<u32> {
    let meaning = tensor.describe().unwrap();
    let bytes: Bytes<'_> = data.iter().map(|(role, b)| (*role, &b[..])).collect();
    let rows = meaning.shape.iter().rev().skip(1).product();
    let mut values = vec![0.0; meaning.view.iter().product::<u64>() as usize];
    interpret(&meaning, &bytes, 0..rows, &mut values).unwrap();
    bits(values.into_iter().map(|value| match dtype {
        Float::F32 => value,
        Float::F16 => f16_to_f32(f32_to_f16(value)),
        Float::Bf16 => bf16_to_f32(f32_to_bf16(value)),
    }))
}

fn decoded(dtype: Float, bytes: &[u8]) -> Vec<u32> {
    let halves = bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|b| u16::from_le_bytes(*b));
    match dtype {
        Float::F32 => bits(
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b)),
        ),
        Float::F16 => bits(halves.map(f16_to_f32)),
        Float::Bf16 => bits(halves.map(bf16_to_f32)),
    }
}

/// Elements of a tensor from windows of just what they need, with nothing else of the parts.
fn piece(ready: &Dequantizer, data: &Data, from: u64, to: u64, dtype: Float) -> (Vec<u32>, u64) {
    let needs = ready.needs(from..to);
    let mut windows = Windows::new();
    let mut read = 0;
    for (role, span) in needs {
        let bytes = &data[&role][span.start as usize..span.end as usize];
        read += bytes.len() as u64;
        windows.insert(
            role,
            Window {
                start: span.start,
                bytes,
            },
        );
    }
    let mut out = vec![0; (to - from) as usize * dtype.bytes()];
    ready.run(from..to, &windows, dtype, &mut out).unwrap();
    (decoded(dtype, &out), read)
}

fn check(tensor: &QTensor, data: &Data, r: &mut Rng, told: &dyn Fn() -> String) {
    let ready = Dequantizer::new(tensor).unwrap();
    let elements = ready.elements();
    assert_eq!(elements, tensor.shape.iter().product::<u64>());
    for dtype in [Float::F32, Float::F16, Float::Bf16] {
        let wanted = slow(tensor, data, dtype);
        let bytes: Bytes<'_> = data.iter().map(|(role, b)| (*role, &b[..])).collect();
        let mut out = vec![0; wanted.len() * dtype.bytes()];
        dequantize(tensor, &bytes, 0..elements, dtype, &mut out).unwrap();
        assert!(decoded(dtype, &out) == wanted, "{dtype:?} {}", told());
        for _ in 0..3 {
            let (a, b) = (r.below(elements + 1), r.below(elements + 1));
            let (from, to) = (a.min(b), a.max(b));
            let (found, _) = piece(&ready, data, from, to, dtype);
            let wanted = &wanted[from as usize..to as usize];
            assert!(found == wanted, "{dtype:?} {from}..{to} {}", told());
        }
    }
}

fn cut(of: &Sample, r: &mut Rng) -> Option<(Sliced, Data)> {
    let whole = Sliced::whole(of.scheme, &of.params, &of.parts).unwrap();
    let axis = r.below(whole.meaning.view.len() as u64) as usize;
    let len = whole.meaning.view[axis];
    let start = r.below(len);
    let cut = whole.cut(axis, start..len, Fallback::Lossless).ok()?;
    let parts = cut.parts.keys().map(|role| {
        let steps = cut.steps.get(role).map_or(&[][..], |steps| steps);
        (
            *role,
            apply(&of.parts[role], &of.bytes[role], steps).unwrap(),
        )
    });
    let data = parts.collect();
    Some((cut, data))
}

#[test]
fn every_scheme_s_fast_way_is_the_interpreter() {
    let (mut whole, mut begun) = (BTreeMap::new(), BTreeSet::new());
    for scheme in Scheme::all() {
        for seed in 1..17 {
            let r = &mut Rng(0x51_7CC1_B727_220A ^ (seed << 24));
            let mut of = sample(scheme.name, r);
            if seed % 4 == 0 {
                // Any bits at all as scales and tables: infinities, NaNs, negative zeros.
                for (role, bytes) in &mut of.bytes {
                    if *role != Role::GroupIndex {
                        bytes.fill_with(|| r.next() as u8);
                    }
                }
            }
            let told = || format!("{} seed {seed} {:?} {:?}", scheme.name, of.params, of.parts);
            let tensor = QTensor::preset_of("w", scheme, of.params.clone(), of.parts.clone());
            check(&tensor.unwrap(), &of.bytes, r, &told);
            *whole.entry(scheme.name).or_insert(0) += 1;
            if let Some((cut, data)) = cut(&of, r) {
                let params = cut.params.clone();
                begun.extend(params.0.contains_key("phase").then_some(scheme.name));
                let tensor = QTensor::preset_of("w", scheme, params, cut.parts.clone()).unwrap();
                check(&tensor, &data, r, &told);
            }
        }
    }
    assert_eq!(whole.len(), Scheme::all().count());
    assert!(
        begun.contains("bnb4") && begun.contains("fp8-block"),
        "{begun:?}"
    );
}

#[test]
fn any_range_of_ggml_s_blocks() {
    let r = &mut Rng(7);
    let mut seen = 0;
    for ty in GgmlType::ALL.iter().copied() {
        let (rows, blocks) = (1 + r.below(5), 1 + r.below(30));
        let columns = blocks * ty.bytes() as u64;
        let part = Part {
            name: "w".to_owned(),
            dtype: tonnage_format::Dtype::U8,
            shape: vec![rows, columns],
        };
        let mut data = vec![0; (rows * columns) as usize];
        data.fill_with(|| r.next() as u8);
        let tensor = QTensor::ggml_of("w", ty, part).unwrap();
        let mut wanted = vec![0.0; (rows * blocks) as usize * ty.elements()];
        if let Err(error) = tonnage_quant::ggml::dequantize(ty, &data, &mut wanted) {
            assert!(matches!(error, GgmlError::NotDequantised { .. }), "{error}");
            assert!(Dequantizer::new(&tensor).is_err());
            continue;
        }
        seen += 1;
        let wanted = bits(wanted.into_iter());
        let ready = Dequantizer::new(&tensor).unwrap();
        assert_eq!(ready.elements(), wanted.len() as u64);
        let data = Data::from([(Role::Codes, data)]);
        for _ in 0..8 {
            let (a, b) = (r.below(ready.elements() + 1), r.below(ready.elements() + 1));
            let (from, to) = (a.min(b), a.max(b));
            let (found, read) = piece(&ready, &data, from, to, Float::F32);
            assert!(
                found == wanted[from as usize..to as usize],
                "{ty} {from}..{to}"
            );
            let most = (to - from) / ty.elements() as u64 + 2;
            assert!(
                read <= most * ty.bytes() as u64,
                "{ty} {from}..{to}: {read} bytes"
            );
        }
    }
    assert!(seen >= 25, "{seen}");
}

/// Rows that lie side by side are read with little besides.
#[test]
fn a_row_needs_its_own_bytes() {
    let part = |name: &str, dtype, shape: &[u64]| Part {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    use tonnage_format::Dtype;
    let parts = BTreeMap::from([
        (Role::Codes, part("c", Dtype::F8_E4M3, &[4096, 4096])),
        (Role::Scale, part("s", Dtype::F32, &[32, 32])),
    ]);
    let params = serde_json::from_str(r#"{"block": [128, 128]}"#).unwrap();
    let scheme = Scheme::find("fp8-block").unwrap();
    let tensor = QTensor::preset_of("w", scheme, params, parts).unwrap();
    let ready = Dequantizer::new(&tensor).unwrap();
    let needs = ready.needs(200 * 4096..210 * 4096);
    assert!(needs[&Role::Codes].start == 200 * 4096);
    assert!(needs[&Role::Codes].end <= 210 * 4096 + 4);
    assert_eq!(needs[&Role::Scale], 128..260.min(needs[&Role::Scale].end));
}

#[test]
fn what_is_not_there_is_an_error() {
    let r = &mut Rng(3);
    for scheme in Scheme::all() {
        let of = sample(scheme.name, r);
        let tensor = QTensor::preset_of("w", scheme, of.params, of.parts).unwrap();
        let ready = Dequantizer::new(&tensor).unwrap();
        let whole = || {
            let parts = of.bytes.iter();
            parts.map(|(role, bytes)| (*role, Window { start: 0, bytes }))
        };
        let elements = ready.elements();
        let mut out = vec![0; elements as usize * 4];
        for role in [Role::Codes, Role::Scale, Role::Table, Role::GroupIndex] {
            if of.bytes.contains_key(&role) {
                let less: Windows<'_> = whole().filter(|(there, _)| *there != role).collect();
                let told = ready.run(0..elements, &less, Float::F32, &mut out);
                assert!(told.is_err(), "{} without {role:?}", scheme.name);
            }
        }
        let all: Windows<'_> = whole().collect();
        assert!(ready.run(0..elements, &all, Float::F16, &mut out).is_err());
        assert!(
            ready
                .run(1..elements + 1, &all, Float::F32, &mut out)
                .is_err()
        );
    }
}
