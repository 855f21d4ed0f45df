//! From scheme to scheme and back: the same bytes, and the same values; losses are refused and counted.
#![allow(
    clippy::disallowed_methods,
    reason = "the corpus is files; the room's own code reads none"
)]

mod support;

use support::{random, round_trip, target};
use tonnage_quant::Reason;
use tonnage_quant::descriptor::{Float, Role};
use tonnage_quant::packed::Packed;
use tonnage_quant::quantize::quantize;
use tonnage_quant::repack::{How, repack};

fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let one = |_| {
        let (a, b) = (random(&mut state) as f32, random(&mut state) as f32);
        // Sums of two are denser in the middle, as weights are.
        ((a + b) / (1_u64 << 31) as f32 - 1.0) * 0.1
    };
    (0..count).map(one).collect()
}

fn made(text: &str, rows: u64, columns: u64, dtype: Float, seed: u64) -> Packed {
    let values = values((rows * columns) as usize, seed);
    quantize(
        "m.0.proj.weight",
        &values,
        &[rows, columns],
        dtype,
        &target(text),
    )
    .unwrap()
}

#[test]
fn four_bit_integers_go_round_through_every_layout() {
    let asymmetric = [
        "gptq-v2",
        "gptq-planar",
        "awq",
        "awq-gemv",
        "awq-gemv-fast",
        "ct-pack",
        "ct-pack-word",
        "ct-int",
    ];
    for (at, first) in asymmetric.iter().enumerate() {
        for second in asymmetric {
            for group in [32, 64, 128] {
                let text = format!(
                    "{first}:symmetric=false,group={group},bits={}",
                    if *first == "ct-int" { 8 } else { 4 }
                );
                let packed = made(&text, 64, 256, Float::F16, at as u64 + 5);
                if *first == "ct-int" && !second.starts_with("gptq") && !second.starts_with("ct") {
                    continue;
                }
                round_trip(&packed, second, first, How::Rearranged);
            }
        }
    }
    for first in ["gptq", "gptq-v2", "awq", "marlin", "ct-pack", "q4_0"] {
        for second in ["gptq", "awq", "marlin", "ct-pack", "q4_0"] {
            let packed = made("gptq:group=32", 64, 128, Float::F16, 9);
            let (packed, _) = repack(&packed, &target(first), false).unwrap();
            round_trip(&packed, second, first, How::Rearranged);
        }
    }
}

#[test]
fn every_width_goes_round() {
    for bits in 2..=8 {
        for symmetric in [true, false] {
            let packed = made(
                &format!("ct-pack:bits={bits},group=32,symmetric={symmetric}"),
                64,
                96,
                Float::Bf16,
                bits,
            );
            for there in ["gptq-planar", "ct-pack-word", "gptq"] {
                if there == "gptq" && !symmetric {
                    continue;
                }
                round_trip(&packed, there, "ct-pack", How::Rearranged);
            }
            if bits != 7 {
                round_trip(&packed, "mlx", "ct-pack:scale=BF16", How::SameValues);
            }
        }
    }
}

#[test]
fn ggml_s_blocks_are_groups_of_integers() {
    for (ty, there) in [
        ("q4_0", "gptq"),
        ("q4_0", "awq"),
        ("q4_0", "ct-pack"),
        ("q5_0", "ct-pack"),
        ("q8_0", "ct-int"),
        ("q8_0", "gptq-v2"),
    ] {
        round_trip(
            &made(ty, 64, 256, Float::F32, 3),
            there,
            ty,
            How::Rearranged,
        );
    }
    for ty in ["q4_0", "q5_0", "q8_0", "q4_1", "q5_1"] {
        round_trip(
            &made(ty, 64, 256, Float::F32, 4),
            "mlx",
            ty,
            How::SameValues,
        );
    }
    for ty in ["q2_k", "q4_k", "q5_k", "q3_k", "q6_k"] {
        let packed = made(ty, 8, 512, Float::F32, 5);
        let (mlx, report) = repack(&packed, &target("mlx"), false).unwrap();
        assert_eq!(
            (report.how, report.difference.changed),
            (How::SameValues, 0),
            "{ty}"
        );
        assert_eq!(packed.difference(&mlx).unwrap().changed, 0);
    }
    for ty in ["q3_k", "q6_k"] {
        let packed = made(ty, 8, 512, Float::F32, 6);
        let (ct, report) = repack(&packed, &target("ct-pack"), false).unwrap();
        assert_eq!(report.how, How::Rearranged);
        assert_eq!(packed.difference(&ct).unwrap().changed, 0);
    }
    // A group of 128 is four blocks.
    let wide = made("gptq:group=128", 64, 256, Float::F16, 7);
    round_trip(&wide, "q4_0", "gptq:group=128", How::Rearranged);
}

#[test]
fn small_floats_are_the_same_bytes_elsewhere() {
    let mx = made("mxfp4", 128, 256, Float::Bf16, 11);
    for there in [
        "mxfp4-gpt-oss",
        "mxfp4-deepseek",
        "mxfp4-f4",
        "mxfp4-mlx",
        "mxfp4:",
    ] {
        round_trip(&mx, there, "mxfp4", How::Rearranged);
        let (other, _) = repack(&mx, &target(there), false).unwrap();
        assert!(other.bytes == mx.bytes, "{there} is another name only");
    }
    round_trip(&mx, "ggml/MXFP4", "mxfp4-gpt-oss", How::Rearranged);
    let blocks = made("q4_0", 1, 32, Float::F32, 1);
    assert!(repack(&blocks, &target("mxfp4"), false).is_err());
    round_trip(
        &made("mxfp8", 64, 96, Float::Bf16, 12),
        "mxfp8-mlx",
        "mxfp8",
        How::Rearranged,
    );
    let nv = made("nvfp4", 192, 192, Float::F32, 13);
    round_trip(&nv, "nvfp4-torchao", "nvfp4", How::Rearranged);
    let (swizzled, _) = repack(&nv, &target("nvfp4-torchao"), false).unwrap();
    assert!(swizzled.bytes[&Role::Scale] != nv.bytes[&Role::Scale]);
    // ggml multiplies by the tensor's scale last: values differ in their last bit, codes and scales don't.
    let (ggml, report) =
        repack(&nv, &target("ggml/NVFP4"), false).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(report.how, How::Rearranged);
    let (again, _) = repack(&ggml, &target("nvfp4"), false).unwrap();
    assert_eq!(again.bytes, nv.bytes);
}

/// The text of a refusal.
fn refusal(packed: &Packed, to: &str) -> String {
    let error = repack(packed, &target(to), false).unwrap_err();
    assert_eq!(error.reason, Reason::Lossy, "{error}");
    assert_eq!(error.tensor, packed.tensor.name);
    error.to_string()
}

#[test]
fn losses_are_refused_with_their_number_and_counted_when_they_are_wanted() {
    // Zero points of 0 are all ones in version 1.
    let zeros = quantize(
        "w",
        &[vec![0.0; 32], (1..=32).map(|v| v as f32).collect()]
            .concat()
            .repeat(16),
        &[32, 32],
        Float::F16,
        &target("awq:group=32"),
    );
    let zeros = zeros.unwrap();
    assert!(
        refusal(&zeros, "gptq").contains("32 of 32 zero points are 0"),
        "{}",
        refusal(&zeros, "gptq")
    );
    let (written, report) = repack(&zeros, &target("gptq"), true).unwrap();
    assert!(report.notes[0].contains("32 of 32"), "{report:?}");
    assert!(refusal(&written, "awq").contains("32 of 32 stored zero points are all ones"));

    // Zero points that are not in the middle.
    let asymmetric = made("awq:group=32", 64, 64, Float::F16, 21);
    for to in ["marlin", "q4_0"] {
        let text = refusal(&asymmetric, to);
        assert!(
            text.contains("of 128 zero points are not in the middle"),
            "{text}"
        );
        let (_, report) = repack(&asymmetric, &target(to), true).unwrap();
        assert_eq!(report.how, How::Requantised);
        assert_eq!(report.difference.elements, 64 * 64);
        assert!(
            report.difference.changed > 0 && report.difference.largest < 0.02,
            "{report:?}"
        );
    }
    // MLX's biases in F16 don't hold all of them; in F32 they do.
    assert!(refusal(&asymmetric, "mlx:scale=F16").contains("biases have no such number"));
    round_trip(&asymmetric, "mlx", "awq:scale=F16", How::SameValues);

    // A scale of scales that is turned round.
    let nv = quantize(
        "w",
        &values(64 * 64, 3),
        &[64, 64],
        Float::F32,
        &target("nvfp4"),
    )
    .unwrap();
    let (div, report) = repack(&nv, &target("nvfp4-ct"), true).unwrap();
    assert_eq!(report.difference, nv.difference(&div).unwrap());
    match report.difference.changed {
        0 => assert_eq!(report.how, How::SameValues),
        changed => {
            assert_eq!(report.how, How::Changed);
            assert!(refusal(&nv, "nvfp4-ct").contains(&format!("{changed} of 4096 values change")));
        }
    }
    let text = refusal(&div, "ggml/NVFP4");
    assert!(text.contains("divided by"), "{text}");

    // FP8 in blocks can't be in rows; a tensor's scale can be each row's.
    let blocks = made("fp8-block:block=32x32", 64, 64, Float::F32, 2);
    assert!(refusal(&blocks, "fp8-row").contains("64 of 64 blocks have several scales"));
    let (_, report) = repack(&blocks, &target("fp8-tensor"), true).unwrap();
    assert_eq!(report.how, How::Requantised);
    let tensor = made("fp8-tensor", 64, 64, Float::F32, 2);
    round_trip(&tensor, "fp8-row", "fp8-tensor", How::Rearranged);
    round_trip(&tensor, "fp8-block", "fp8-tensor", How::Rearranged);
}

#[test]
fn fnuz_has_half_the_value_for_the_same_bits() {
    let mut values = values(64 * 64, 8);
    values[5] = -1e-9;
    let packed = quantize("w", &values, &[64, 64], Float::F32, &target("fp8-row")).unwrap();
    let negative = packed.bytes[&Role::Codes]
        .iter()
        .filter(|code| **code == 0x80)
        .count();
    assert!(negative > 0, "a negative zero is among the codes");
    let (fnuz, report) = repack(&packed, &target("fp8-row:element=e4m3fnuz"), false).unwrap();
    assert_eq!(packed.difference(&fnuz).unwrap().changed, 0, "{report:?}");
    assert!(!fnuz.bytes[&Role::Codes].contains(&0x80));
    let (again, _) =
        repack(&fnuz, &target("fp8-row:element=e4m3"), false).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(again.bytes[&Role::Scale], packed.bytes[&Role::Scale]);
}
