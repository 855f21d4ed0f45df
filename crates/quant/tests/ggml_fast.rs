//! Whatever instructions the processor has, and however the values are stored, the bits are the scalar code's.

mod ggml_support;

use ggml_support::{Random, assert_same, dequantised};
use tonnage_quant::ggml::{
    GgmlType, Level, Stores, dequantize, dequantize_bf16, dequantize_f16, dequantize_with,
};

/// Any bits at all: scales that are infinite, NaN and subnormal among them.
fn blocks(ty: GgmlType, count: usize, random: &mut Random) -> Vec<u8> {
    random.bytes(count * ty.bytes())
}

#[test]
fn every_level_gives_the_scalar_codes_bits() {
    let mut random = Random(0x5EED);
    for ty in dequantised() {
        let count = 8192 / ty.elements() + 3;
        for _ in 0..20 {
            let bytes = blocks(ty, count, &mut random);
            let mut expected = vec![0.0; count * ty.elements()];
            dequantize_with(Level::SCALAR, Stores::Auto, ty, &bytes, &mut expected).unwrap();
            for level in Level::available() {
                for stores in [Stores::Cached, Stores::Streaming] {
                    let mut out = vec![7.0; expected.len()];
                    dequantize_with(level, stores, ty, &bytes, &mut out).unwrap();
                    assert_same(ty, &out, &expected);
                }
            }
        }
    }
}

/// Outputs on every multiple of four bytes, so aligned for streaming or not, and nothing written beyond them.
#[test]
fn any_alignment_and_any_number_of_blocks() {
    let mut random = Random(77);
    for ty in dequantised() {
        for (count, offset) in (0..5).flat_map(|count| (0..9).map(move |offset| (count, offset))) {
            let bytes = blocks(ty, count, &mut random);
            let len = count * ty.elements();
            let mut expected = vec![0.0; len];
            dequantize_with(Level::SCALAR, Stores::Auto, ty, &bytes, &mut expected).unwrap();
            for level in Level::available() {
                let mut out = vec![7.0; len + 16];
                let target = &mut out[offset..offset + len];
                dequantize_with(level, Stores::Streaming, ty, &bytes, target).unwrap();
                assert_same(ty, target, &expected);
                let (before, after) = (&out[..offset], &out[offset + len..]);
                assert!(
                    before.iter().chain(after).all(|&value| value == 7.0),
                    "{ty}"
                );
            }
        }
    }
}

/// A kernel stands for these types wherever there is a wide level: the test above is not the scalar code beside itself.
#[test]
fn the_wide_level_has_bits_to_get_wrong() {
    let wide: Vec<Level> = Level::available()
        .filter(|&level| level != Level::SCALAR)
        .collect();
    #[cfg(target_arch = "x86_64")]
    assert_eq!(wide.len(), usize::from(is_x86_feature_detected!("avx2")));
    for level in wide {
        assert_ne!(level.name(), "scalar");
    }
    assert_eq!(Level::available().last(), Some(Level::SCALAR));
    assert_eq!(Some(Level::best()), Level::available().next());
}

#[test]
fn narrow_floats_are_rounded_once() {
    let mut random = Random(4);
    for ty in dequantised() {
        let count = 5000 / ty.elements() + 1;
        let bytes = blocks(ty, count, &mut random);
        let len = count * ty.elements();
        let (mut wide, mut f16s, mut bf16s) = (vec![0.0; len], vec![], vec![]);
        f16s.resize(len, half::f16::ZERO);
        bf16s.resize(len, half::bf16::ZERO);
        dequantize(ty, &bytes, &mut wide).unwrap();
        dequantize_f16(ty, &bytes, &mut f16s).unwrap();
        dequantize_bf16(ty, &bytes, &mut bf16s).unwrap();
        for ((wide, f16), bf16) in wide.iter().zip(f16s).zip(bf16s) {
            let expected = half::f16::from_f32_const(*wide);
            assert!(f16.to_bits() == expected.to_bits() || f16.is_nan() && wide.is_nan());
            let expected = half::bf16::from_f32_const(*wide);
            assert!(bf16.to_bits() == expected.to_bits() || bf16.is_nan() && wide.is_nan());
        }
    }
}

/// So many that they are stored past the caches, beginning on any multiple of two bytes.
#[test]
fn many_narrow_floats_are_rounded_once() {
    let ty = GgmlType::Q8_0;
    let len = (8 << 20) / 2 + 32;
    let bytes = blocks(ty, len / 32, &mut Random(8));
    let mut wide = vec![0.0; len];
    dequantize(ty, &bytes, &mut wide).unwrap();
    let (mut f16s, mut bf16s) = (
        vec![half::f16::ZERO; len + 32],
        vec![half::bf16::ZERO; len + 32],
    );
    let aligned = (
        f16s.as_ptr().align_offset(32),
        bf16s.as_ptr().align_offset(32),
    );
    for (f16_at, bf16_at) in [(0, 0), (1, 1), aligned] {
        dequantize_f16(ty, &bytes, &mut f16s[f16_at..][..len]).unwrap();
        dequantize_bf16(ty, &bytes, &mut bf16s[bf16_at..][..len]).unwrap();
        let narrow = f16s[f16_at..].iter().zip(&bf16s[bf16_at..]);
        for (wide, (f16, bf16)) in wide.iter().zip(narrow) {
            let (a, b) = (half::f16::from_f32(*wide), half::bf16::from_f32(*wide));
            assert!(f16.to_bits() == a.to_bits() || f16.is_nan() && wide.is_nan());
            assert!(bf16.to_bits() == b.to_bits() || bf16.is_nan() && wide.is_nan());
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    for &ty in GgmlType::ALL {
        let (elements, bytes) = (ty.elements(), ty.bytes());
        let known = dequantised().any(|known| known == ty);
        let mut out = vec![0.0; 3 * elements];
        let two = vec![0; 2 * bytes];
        assert_eq!(
            dequantize(ty, &two, &mut out[..2 * elements]).is_ok(),
            known,
            "{ty}"
        );
        assert!(dequantize(ty, &two, &mut out).is_err(), "{ty}");
        assert!(dequantize(ty, &two, &mut out[..elements]).is_err(), "{ty}");
        assert!(
            dequantize(ty, &two, &mut out[..2 * elements - 1]).is_err(),
            "{ty}"
        );
        assert_eq!(dequantize(ty, &[], &mut []).is_ok(), known, "{ty}");
        if bytes > 1 {
            assert!(
                dequantize(ty, &two[1..], &mut out[..2 * elements]).is_err(),
                "{ty}"
            );
            assert!(
                dequantize(ty, &two[..bytes + 1], &mut out[..elements]).is_err(),
                "{ty}"
            );
        }
    }
}
