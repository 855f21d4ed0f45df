//! A cut tensor is the slice of the whole one's values, for every scheme; and what can be cut is what the layouts say.

#[path = "slices/samples.rs"]
mod samples;

use std::collections::BTreeMap;

use samples::{Rng, Sample, sample};
use tonnage_format::Dtype;
use tonnage_quant::descriptor::{Descriptor, Role};
use tonnage_quant::interpret::{Bytes, interpret};
use tonnage_quant::scheme::{Param, Params, Part, Parts, Scheme};
use tonnage_quant::slice::{Fallback, How, Sliced, apply};
use tonnage_quant::{Error, Reason};

fn values(meaning: &Descriptor, bytes: &BTreeMap<Role, Vec<u8>>) -> Vec<u32> {
    let bytes: Bytes<'_> = bytes
        .iter()
        .map(|(role, bytes)| (*role, &bytes[..]))
        .collect();
    let rows = meaning.shape.iter().rev().skip(1).product();
    let mut out = vec![0.0; meaning.view.iter().product::<u64>() as usize];
    interpret(meaning, &bytes, 0..rows, &mut out).unwrap();
    let bits = |value: &f32| {
        if value.is_nan() {
            u32::MAX
        } else {
            value.to_bits()
        }
    };
    out.iter().map(bits).collect()
}

fn sliced<T: Copy>(all: &[T], shape: &[u64], axis: usize, start: u64, stop: u64) -> Vec<T> {
    let inner = shape[axis + 1..].iter().product::<u64>();
    let mut kept = Vec::new();
    for one in all.chunks((shape[axis] * inner).max(1) as usize) {
        kept.extend_from_slice(&one[(start * inner) as usize..(stop * inner) as usize]);
    }
    kept
}

/// The parts of a cut, from the whole ones.
fn parts_of(of: &Sample, cut: &Sliced) -> BTreeMap<Role, Vec<u8>> {
    let roles = cut.parts.iter();
    roles
        .map(|(role, part)| {
            let steps = cut.steps.get(role).map_or(&[][..], |steps| steps);
            let made = apply(&of.parts[role], &of.bytes[role], steps).unwrap();
            let bytes = part.shape.iter().product::<u64>() as usize * part.dtype.bitsize() / 8;
            assert_eq!(made.len(), bytes, "{role:?} {steps:?}");
            (*role, made)
        })
        .collect()
}

fn edge(r: &mut Rng, len: u64, unit: u64) -> u64 {
    match r.below(4) {
        0 => r.below(len + 1),
        1 => len,
        _ => (r.below(len / unit.max(1) + 2) * unit).min(len),
    }
}

#[test]
fn a_cut_is_the_slice_of_the_values() {
    let mut made = BTreeMap::<(&str, &str), usize>::new();
    for scheme in Scheme::all() {
        for seed in 1..60 {
            let r = &mut Rng(0x9E37_79B9_7F4A_7C15 ^ (seed << 20));
            let tensor = sample(scheme.name, r);
            let told = || {
                format!(
                    "{} seed {seed}: {:?} {:?}",
                    scheme.name, tensor.params, tensor.parts
                )
            };
            let whole = Sliced::whole(scheme, &tensor.params, &tensor.parts)
                .unwrap_or_else(|e| panic!("{e}, {}", told()));
            let mut wanted = values(&whole.meaning, &tensor.bytes);
            let mut cut = whole;
            // Cuts of cuts, on any axes.
            for _ in 0..2 {
                let shape = cut.meaning.view.clone();
                let axis = r.below(shape.len() as u64) as usize;
                let Ok(grain) = cut.granularity(axis) else {
                    // Groups as rows that share bytes: the tensor is read whole.
                    assert!(matches!(scheme.name, "hqq" | "quanto"), "{}", told());
                    continue;
                };
                let unit = r.pick(&[grain.carrier, grain.clean()]);
                let (a, b) = (edge(r, shape[axis], unit), edge(r, shape[axis], unit));
                let (start, stop) = (a.min(b), a.max(b));
                if start == stop {
                    continue;
                }
                match cut.cut(axis, start..stop, Fallback::Lossless) {
                    Ok(smaller) => {
                        wanted = sliced(&wanted, &shape, axis, start, stop);
                        let found = values(&smaller.meaning, &parts_of(&tensor, &smaller));
                        assert!(
                            found == wanted,
                            "{start}..{stop} of axis {axis}, {:?}, {}",
                            smaller.how,
                            told()
                        );
                        let how = match smaller.how.get(&axis) {
                            Some(How::Regroup { .. }) => "regroup",
                            Some(How::Phase { .. }) => "phase",
                            _ => "clean",
                        };
                        *made.entry((scheme.name, how)).or_default() += 1;
                        cut = smaller;
                    }
                    Err(Error {
                        reason: Reason::Granularity,
                        ..
                    }) => {
                        // Its scales lie in another order where one group is left.
                        if scheme.name == "marlin" && axis == 1 {
                            continue;
                        }
                        let on = |at: u64| at.is_multiple_of(grain.clean()) || at == shape[axis];
                        assert!(
                            grain.phase > 0 || !on(start) || !on(stop),
                            "{start}..{stop} of axis {axis}, {grain:?}, {}",
                            told()
                        );
                    }
                    Err(other) => panic!("{other}, {start}..{stop} of axis {axis}, {}", told()),
                }
            }
        }
        assert!(
            made.get(&(scheme.name, "clean")) > Some(&10),
            "{} is hardly cut: {made:?}",
            scheme.name
        );
    }
    for name in [
        "gptq",
        "gptq-v2",
        "gptq-planar",
        "awq-gemm",
        "ct-pack-word",
        "ct-int",
        "mlx-affine",
        "marlin",
    ] {
        assert!(made.contains_key(&(name, "regroup")), "{name}: {made:?}");
    }
    for name in ["fp8-block", "bnb4"] {
        assert!(made.contains_key(&(name, "phase")), "{name}: {made:?}");
    }
}

fn part(role: Role, dtype: Dtype, shape: &[u64]) -> (Role, Part) {
    let (name, shape) = (format!("{role:?}"), shape.to_vec());
    (role, Part { name, dtype, shape })
}

/// What can be cut of a 256 × 512 tensor: along its outputs, along its inputs, each without a fallback.
fn grains(name: &str, params: Params, parts: Parts) -> [u64; 2] {
    let whole = Sliced::whole(Scheme::find(name).unwrap(), &params, &parts).unwrap();
    assert_eq!(whole.meaning.view, [256, 512], "{name}");
    [0, 1].map(|axis| whole.granularity(axis).unwrap().clean())
}

#[test]
fn granularity_is_what_the_layouts_say() {
    use Dtype::{BF16, F8_E4M3, F16, F32, I8, I16, I32, U8, U32};
    use Role::{Codes, GlobalScale, GroupIndex, Scale, Table, Zero};
    let int = |bits: i64, group: i64| {
        Params::of([("bits", Param::Int(bits)), ("group", Param::Int(group))])
    };
    let (out, inner) = (256_u64, 512_u64);
    let gptq = |bits: u64| {
        Parts::from([
            part(Codes, I32, &[inner * bits / 32, out]),
            part(Zero, I32, &[4, out * bits / 32]),
            part(Scale, F16, &[4, out]),
        ])
    };
    for (bits, across) in [(2, 16), (4, 8), (8, 4), (3, 32)] {
        assert_eq!(
            grains("gptq", int(bits as i64, 128), gptq(bits)),
            [across, 128],
            "{bits} bits"
        );
        let mut indexed = gptq(bits);
        indexed.extend([part(GroupIndex, I32, &[inner])]);
        // With an index of groups only the words of codes matter: scales and zeros stay whole.
        assert_eq!(
            grains("gptq", int(bits as i64, 128), indexed),
            [across, across]
        );
    }
    for bits in [3, 5, 6, 7] {
        assert_eq!(
            grains(
                "gptq-planar",
                int(bits as i64, 16),
                Parts::from([
                    part(Codes, I32, &[inner * bits / 32, out]),
                    part(Zero, I32, &[32, out * bits / 32]),
                    part(Scale, F16, &[32, out]),
                ])
            ),
            [32, 32]
        );
    }
    let group = |group: i64| Params::of([("group", Param::Int(group))]);
    let gemm = Parts::from([
        part(Codes, I32, &[inner, out / 8]),
        part(Zero, I32, &[4, out / 8]),
        part(Scale, F16, &[4, out]),
    ]);
    assert_eq!(grains("awq-gemm", group(128), gemm), [8, 128]);
    // Eight groups' zero points share a word; a cut between them would shift nibbles.
    let gemv = Parts::from([
        part(Codes, I32, &[out, inner / 8]),
        part(Zero, I32, &[out, 2]),
        part(Scale, F16, &[out, 16]),
    ]);
    assert_eq!(grains("awq-gemv", group(32), gemv), [1, 256]);
    let fast = Parts::from([
        part(Codes, I16, &[out / 4, inner]),
        part(Zero, F16, &[16, out]),
        part(Scale, F16, &[16, out]),
    ]);
    assert_eq!(grains("awq-gemv-fast", group(32), fast), [4, 64]);
    let marlin = Parts::from([
        part(Codes, I32, &[inner / 16, out * 2]),
        part(Scale, F16, &[4, out]),
    ]);
    assert_eq!(grains("marlin", group(128), marlin), [64, 128]);
    let ct = |bits: u64, zero: bool| {
        let mut parts = Parts::from([
            part(Codes, I32, &[out, inner * bits / 32]),
            part(Scale, BF16, &[out, 4]),
        ]);
        if zero {
            parts.extend([part(Zero, I32, &[out * bits / 32, 4])]);
        }
        parts
    };
    let shaped = |bits: i64| {
        Params::of([
            ("bits", Param::Int(bits)),
            ("group", Param::Int(128)),
            ("shape", Param::List(vec![256, 512])),
        ])
    };
    assert_eq!(grains("ct-pack-dense", shaped(4), ct(4, false)), [1, 128]);
    assert_eq!(grains("ct-pack-dense", shaped(4), ct(4, true)), [8, 128]);
    assert_eq!(grains("ct-pack-dense", shaped(3), ct(3, true)), [32, 128]);
    let float =
        |scale: &[u64]| Parts::from([part(Codes, F8_E4M3, &[out, inner]), part(Scale, F32, scale)]);
    assert_eq!(grains("fp8-tensor", Params::default(), float(&[])), [1, 1]);
    assert_eq!(
        grains("fp8-row", Params::default(), float(&[out, 1])),
        [1, 1]
    );
    assert_eq!(
        grains("fp8-block", Params::default(), float(&[2, 4])),
        [128, 128]
    );
    let mx =
        |shape: &[u64]| Parts::from([part(Codes, U8, shape), part(Scale, U8, &[out, inner / 32])]);
    assert_eq!(
        grains("mxfp4", Params::default(), mx(&[out, inner / 2])),
        [1, 32]
    );
    assert_eq!(
        grains("mxfp4", Params::default(), mx(&[out, inner / 32, 16])),
        [1, 32]
    );
    assert_eq!(
        grains("mxfp6", Params::default(), mx(&[out, inner * 3 / 4])),
        [1, 32]
    );
    let nv = |scale: &[u64]| {
        Parts::from([
            part(Codes, U8, &[out, inner / 2]),
            part(Scale, F8_E4M3, scale),
            part(GlobalScale, F32, &[1]),
        ])
    };
    assert_eq!(
        grains("nvfp4-div", Params::default(), nv(&[out, 32])),
        [1, 16]
    );
    let swizzled = Params::of([("scale_layout", Param::Text("swizzle_128x4".to_owned()))]);
    assert_eq!(grains("nvfp4-mul", swizzled, nv(&[64, 128])), [128, 64]);
    for bits in [2, 3, 4, 5, 6, 8] {
        let parts = Parts::from([
            part(Codes, U32, &[out, inner * bits / 32]),
            part(Scale, BF16, &[out, 8]),
            part(Zero, BF16, &[out, 8]),
        ]);
        assert_eq!(grains("mlx-affine", int(bits as i64, 64), parts), [1, 64]);
    }
    let bnb = |block: i64| {
        let params = Params::of([
            ("block", Param::Int(block)),
            ("shape", Param::List(vec![256, 512])),
        ]);
        let blocks = out * inner / block as u64;
        (
            params,
            Parts::from([
                part(Codes, U8, &[out * inner / 2, 1]),
                part(Scale, F32, &[blocks]),
                part(Table, F32, &[16]),
            ]),
        )
    };
    let (params, parts) = bnb(64);
    assert_eq!(grains("bnb4", params, parts), [1, 64]);
    let (params, parts) = bnb(1024);
    assert_eq!(grains("bnb4", params, parts), [2, 512]);
    let rows = Parts::from([part(Codes, I8, &[out, inner]), part(Scale, F32, &[out])]);
    assert_eq!(grains("bnb8", Params::default(), rows), [1, 1]);
    // Four rows that lie far apart share a byte: only the whole axis is whole bytes.
    let bitnet = Parts::from([part(Codes, U8, &[out / 4, inner]), part(Scale, BF16, &[1])]);
    let multiply = Params::of([("scale", Param::Text("multiply".to_owned()))]);
    assert_eq!(grains("bitnet", multiply, bitnet), [256, 1]);
}

#[test]
fn a_cut_that_can_t_be_is_refused_with_what_can() {
    let r = &mut Rng(7);
    let tensor = sample("awq-gemm", r);
    let whole = Sliced::whole(tensor.scheme, &tensor.params, &tensor.parts).unwrap();
    let refused = whole.cut(0, 4..12, Fallback::Lossless).unwrap_err();
    assert!(
        refused.reason == Reason::Granularity && refused.to_string().contains("multiples of 8"),
        "{refused}"
    );
    assert_eq!(
        whole
            .cut(0, 0..1 << 40, Fallback::Lossless)
            .unwrap_err()
            .reason,
        Reason::Usage
    );
    assert!(whole.granularity(7).is_err() || whole.cut(7, 0..1, Fallback::Lossless).is_err());
    let strict = whole.cut(1, 8..16, Fallback::Refuse).unwrap_err();
    assert_eq!(strict.reason, Reason::Granularity);
}
