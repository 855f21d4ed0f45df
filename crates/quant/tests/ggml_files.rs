//! Blocks mean what the `gguf` package says they mean, bit for bit; what is quantised is what ggml makes.

mod ggml_support;

use ggml_support::{Vectors, assert_same, dequantised};
use tonnage_quant::ggml::{GgmlType, Level, Stores, dequantize, dequantize_with};

#[test]
fn every_type_has_the_packages_values() {
    let vectors = Vectors::open("blocks.safetensors");
    for ty in dequantised().filter(|ty| !ty.is_plain()) {
        let blocks = vectors.bytes(&format!("{ty}.blocks")).unwrap();
        let values = vectors.floats(&format!("{ty}.values")).unwrap();
        for level in Level::available() {
            let mut out = vec![f32::NAN; values.len()];
            dequantize_with(level, Stores::Auto, ty, blocks, &mut out).unwrap();
            assert_same(ty, &out, &values);
        }
    }
}

/// FNV-1a of 64 bits.
fn fnv1a(values: &[f32]) -> u64 {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ byte as u64).wrapping_mul(0x100_0000_01B3)
    })
}

/// Blocks that name every point of a grid, by a hash of what the package makes of them.
#[test]
fn every_point_of_every_grid_is_the_packages() {
    let vectors = Vectors::open("blocks.safetensors");
    let mut grids = 0;
    for ty in dequantised() {
        let Some(blocks) = vectors.bytes(&format!("{ty}.points")) else {
            continue;
        };
        let hash = vectors.bytes(&format!("{ty}.points_hash")).unwrap();
        let mut out = vec![f32::NAN; blocks.len() / ty.bytes() * ty.elements()];
        dequantize(ty, blocks, &mut out).unwrap();
        assert_eq!(fnv1a(&out).to_le_bytes(), hash, "{ty}");
        grids += 1;
    }
    assert_eq!(grids, 7, "{:?}", GgmlType::ALL);
}
