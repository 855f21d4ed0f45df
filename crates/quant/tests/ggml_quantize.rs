//! What is quantised is ggml's own bytes; what blocks cannot hold is refused.

mod ggml_support;

use ggml_support::{Random, Vectors, dequantised};
use tonnage_quant::ggml::{GgmlError, GgmlType, dequantize, quantize};

/// The types that `quantize` makes, but for plain ones.
const MADE: &[GgmlType] = &[
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q8_0,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
    GgmlType::IQ4_NL,
    GgmlType::IQ4_XS,
    GgmlType::TQ1_0,
    GgmlType::TQ2_0,
    GgmlType::MXFP4,
    GgmlType::NVFP4,
    GgmlType::Q1_0,
    GgmlType::Q2_0,
];

#[test]
fn the_bytes_are_ggmls() {
    let vectors = Vectors::open("quantized.safetensors");
    let input = vectors.floats("input").unwrap();
    for &ty in MADE {
        let expected = vectors.bytes(&format!("{ty}.blocks")).unwrap();
        let mut blocks = vec![0xAA; expected.len()];
        quantize(ty, &input, &mut blocks).unwrap();
        let pairs = blocks.chunks(ty.bytes()).zip(expected.chunks(ty.bytes()));
        for (i, (found, expected)) in pairs.enumerate() {
            assert_eq!(found, expected, "{ty}, block {i}");
        }
    }
}

/// How far from the value, in parts of the group's largest magnitude, a value may come back.
fn tolerance(ty: GgmlType) -> Option<f32> {
    Some(match ty {
        GgmlType::F32 => 0.0,
        GgmlType::F16 | GgmlType::BF16 => 0.004,
        GgmlType::Q8_0 => 0.005,
        GgmlType::Q6_K => 0.05,
        GgmlType::Q5_0 | GgmlType::Q5_1 | GgmlType::Q5_K => 0.08,
        GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q4_K => 0.15,
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => 0.17,
        GgmlType::MXFP4 | GgmlType::NVFP4 => 0.26,
        GgmlType::Q3_K => 0.3,
        GgmlType::Q2_K | GgmlType::TQ1_0 | GgmlType::TQ2_0 | GgmlType::Q2_0 => 0.55,
        _ => return None,
    })
}

#[test]
fn values_come_back_near() {
    let mut random = Random(9);
    for (ty, tolerance) in dequantised().filter_map(|ty| Some((ty, tolerance(ty)?))) {
        let values: Vec<f32> = (0..4096).map(|_| random.float()).collect();
        let mut blocks = vec![0; values.len() / ty.elements() * ty.bytes()];
        let mut again = vec![0.0; values.len()];
        quantize(ty, &values, &mut blocks).unwrap();
        dequantize(ty, &blocks, &mut again).unwrap();
        for (a, b) in values.iter().zip(&again) {
            assert!((a - b).abs() <= tolerance, "{ty}: {a} came back as {b}");
        }
    }
}

#[test]
fn what_blocks_cannot_hold_is_refused() {
    for ty in dequantised() {
        let mut blocks = vec![0; 2 * ty.bytes()];
        let mut values = vec![0.5; 2 * ty.elements()];
        let made = MADE.contains(&ty) || ty.is_plain();
        let expected = if made {
            Ok(())
        } else {
            Err(GgmlError::NotQuantised { ty })
        };
        assert_eq!(quantize(ty, &values, &mut blocks), expected);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[ty.elements()] = bad;
            let index = ty.elements();
            assert_eq!(
                quantize(ty, &values, &mut blocks),
                Err(GgmlError::NotFinite { index })
            );
        }
        values[ty.elements()] = 3e38;
        let holds = [
            GgmlType::F32,
            GgmlType::BF16,
            GgmlType::MXFP4,
            GgmlType::NVFP4,
        ]
        .contains(&ty);
        if made && !holds {
            let block = GgmlError::TooLarge { block: 1 };
            assert_eq!(quantize(ty, &values, &mut blocks), Err(block), "{ty}");
        }
        assert!(quantize(ty, &values[1..], &mut blocks).is_err());
        assert!(quantize(ty, &values, &mut blocks[1..]).is_err());
    }
}

/// Magnitudes of every size, and groups whose sums overflow: no panic, and what is written can be read.
#[test]
fn any_finite_values() {
    let mut random = Random(31);
    for &ty in MADE {
        for _ in 0..200 {
            let mask = 0x8000_0000 | (random.next() as u32 >> 1);
            let finite = |bits: u32| f32::from_bits(if bits >> 23 & 255 == 255 { 0 } else { bits });
            let values: Vec<f32> = (0..2 * ty.elements())
                .map(|_| finite(random.next() as u32 & mask))
                .collect();
            let mut blocks = vec![0; 2 * ty.bytes()];
            if quantize(ty, &values, &mut blocks).is_ok() {
                let mut again = vec![0.0; values.len()];
                dequantize(ty, &blocks, &mut again).unwrap();
                assert!(
                    again.iter().all(|value| !value.is_nan()),
                    "{ty}: {values:?}"
                );
            }
        }
    }
}
