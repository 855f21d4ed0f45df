//! What the fuzz target `ggml` holds true of any bytes: as blocks they become the same numbers by every way that this
//! processor has, and as numbers they are refused or become blocks that can be read. `crates/quant/tests/
//! ggml_fuzz_replay.rs` feeds it the committed corpus.
//!
//! The first byte chooses the type, the second where the output begins; the rest are blocks.

use tonnage_quant::ggml::{
    GgmlError, GgmlType, Level, Stores, dequantize, dequantize_bf16, dequantize_f16,
    dequantize_with, quantize,
};

/// Reads the bytes as blocks of a type, then as values to make blocks of.
pub fn ggml(data: &[u8]) {
    let [ty, offset, bytes @ ..] = data else {
        return;
    };
    let ty = GgmlType::ALL[*ty as usize % GgmlType::ALL.len()];
    let blocks = bytes.len() / ty.bytes();
    read(
        ty,
        *offset as usize % 9,
        &bytes[..blocks * ty.bytes()],
        blocks * ty.elements(),
    );
    if bytes.len() % ty.bytes() != 0 {
        let mut out = vec![0.0; blocks * ty.elements()];
        dequantize(ty, bytes, &mut out).unwrap_err();
    }
    let values: Vec<f32> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|&four| f32::from_le_bytes(four))
        .collect();
    made(ty, &values[..values.len() / ty.elements() * ty.elements()]);
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

fn read(ty: GgmlType, offset: usize, bytes: &[u8], elements: usize) {
    let mut expected = vec![0.0; elements];
    let scalar = dequantize_with(Level::SCALAR, Stores::Auto, ty, bytes, &mut expected);
    for level in Level::available() {
        for stores in [Stores::Cached, Stores::Streaming] {
            let mut out = vec![7.0; elements + 9];
            let target = &mut out[offset..offset + elements];
            assert_eq!(dequantize_with(level, stores, ty, bytes, target), scalar);
            if scalar.is_ok() {
                assert!(
                    target.iter().zip(&expected).all(|(&a, &b)| same(a, b)),
                    "{ty}"
                );
            }
            let outside = out[..offset].iter().chain(&out[offset + elements..]);
            assert!(outside.copied().all(|value| value == 7.0), "{ty}");
        }
    }
    let mut f16s = vec![half::f16::ZERO; elements];
    let mut bf16s = vec![half::bf16::ZERO; elements];
    assert_eq!(dequantize_f16(ty, bytes, &mut f16s), scalar);
    assert_eq!(dequantize_bf16(ty, bytes, &mut bf16s), scalar);
    for (wide, (f16, bf16)) in expected.iter().zip(f16s.iter().zip(&bf16s)) {
        assert!(
            same(f16.to_f32(), half::f16::from_f32(*wide).to_f32()),
            "{ty}"
        );
        assert!(
            same(bf16.to_f32(), half::bf16::from_f32(*wide).to_f32()),
            "{ty}"
        );
    }
}

fn made(ty: GgmlType, values: &[f32]) {
    let mut blocks = vec![0; values.len() / ty.elements() * ty.bytes()];
    match quantize(ty, values, &mut blocks) {
        Ok(()) => {
            let mut again = vec![0.0; values.len()];
            dequantize(ty, &blocks, &mut again).unwrap();
            assert!(
                again.iter().all(|value| value.is_finite()),
                "{ty}: {values:?}"
            );
        }
        Err(GgmlError::NotFinite { index }) => assert!(!values[index].is_finite()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
