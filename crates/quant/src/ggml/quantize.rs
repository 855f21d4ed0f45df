//! Numbers to blocks, as ggml's reference does it (`quantize_row_*_ref` of `ggml-quants.c`): round to nearest, the same
//! operations in the same order, so the same bytes. `tests/ggml_quantize.rs` holds them against ggml's own.
//!
//! `IQ4_NL` alone is made as `quantize_iq4_nl` does without an importance matrix, for so are files.
//!
//! Where ggml's C leaves a conversion undefined (a power of two below 2^-125 for `MXFP4`) the nearest legal byte is taken.

mod iq4;
mod k;
mod legacy;
mod search;

use super::{GgmlError, GgmlType};
use crate::numbers::f32_to_f16;

/// Makes whole blocks of `values`, rounding to nearest, as ggml's reference code does without an importance matrix.
///
/// # Errors
///
/// [`GgmlError::Length`] unless `values` are whole blocks and `bytes` has their room; [`GgmlError::NotFinite`] and
/// [`GgmlError::TooLarge`] for values that no block holds (`NVFP4` cuts
/// magnitudes beyond 2688 to that, as ggml does); [`GgmlError::NotQuantised`] for integers, `F64`, the grids of IQ1
/// to IQ3, and types that no file holds. After an error the bytes hold anything.
pub fn quantize(ty: GgmlType, values: &[f32], bytes: &mut [u8]) -> Result<(), GgmlError> {
    let blocks = values.len() / ty.elements();
    let whole = values.len().is_multiple_of(ty.elements());
    if !whole || blocks.checked_mul(ty.bytes()) != Some(bytes.len()) {
        return Err(GgmlError::Length {
            ty,
            bytes: bytes.len(),
            elements: values.len(),
        });
    }
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(GgmlError::NotFinite { index });
    }
    let too_large = |value: &f32| value.abs() > LARGEST;
    if let (true, Some(index)) = (has_half_scale(ty), values.iter().position(too_large)) {
        let block = index / ty.elements();
        return Err(GgmlError::TooLarge { block });
    }
    blocks_of(ty, values, bytes)
}

/// The largest magnitude that any block with a binary16 scale can hold: `Q6_K`'s 65504 times 128 times 32. Beyond it the
/// searches' sums of squares overflow.
const LARGEST: f32 = 65504.0 * 4096.0;

fn has_half_scale(ty: GgmlType) -> bool {
    !ty.is_plain() && !matches!(ty, GgmlType::MXFP4 | GgmlType::NVFP4)
}

fn blocks_of(ty: GgmlType, values: &[f32], bytes: &mut [u8]) -> Result<(), GgmlError> {
    match ty {
        GgmlType::F32 => each(values, bytes, legacy::f32),
        GgmlType::F16 => each(values, bytes, legacy::f16),
        GgmlType::BF16 => each(values, bytes, legacy::bf16),
        GgmlType::Q4_0 => each(values, bytes, legacy::q4_0),
        GgmlType::Q4_1 => each(values, bytes, legacy::q4_1),
        GgmlType::Q5_0 => each(values, bytes, legacy::q5_0),
        GgmlType::Q5_1 => each(values, bytes, legacy::q5_1),
        GgmlType::Q8_0 => each(values, bytes, legacy::q8_0),
        GgmlType::Q2_K => each(values, bytes, k::q2_k),
        GgmlType::Q3_K => each(values, bytes, k::q3_k),
        GgmlType::Q4_K => each(values, bytes, k::q4_k),
        GgmlType::Q5_K => each(values, bytes, k::q5_k),
        GgmlType::Q6_K => each(values, bytes, k::q6_k),
        GgmlType::IQ4_NL => each(values, bytes, iq4::iq4_nl),
        GgmlType::IQ4_XS => each(values, bytes, iq4::iq4_xs),
        GgmlType::TQ1_0 => each(values, bytes, legacy::tq1_0),
        GgmlType::TQ2_0 => each(values, bytes, legacy::tq2_0),
        GgmlType::MXFP4 => each(values, bytes, legacy::mxfp4),
        GgmlType::NVFP4 => each(values, bytes, legacy::nvfp4),
        GgmlType::Q1_0 => each(values, bytes, legacy::q1_0),
        GgmlType::Q2_0 => each(values, bytes, legacy::q2_0),
        _ => Err(GgmlError::NotQuantised { ty }),
    }
}

/// Every block through `one`, which gives nothing where a scale is too large.
fn each<const E: usize, const B: usize>(
    values: &[f32],
    bytes: &mut [u8],
    one: impl Fn(&[f32; E], &mut [u8; B]) -> Option<()>,
) -> Result<(), GgmlError> {
    let pairs = values.as_chunks().0.iter().zip(bytes.as_chunks_mut().0);
    for (block, (values, bytes)) in pairs.enumerate() {
        one(values, bytes).ok_or(GgmlError::TooLarge { block })?;
    }
    Ok(())
}

/// Writes a scale at `at` of a block and gives it as it will be read; nothing when binary16 does not hold it.
fn put_half<const B: usize>(bytes: &mut [u8; B], at: usize, scale: f32) -> Option<f32> {
    let bits = f32_to_f16(scale);
    let read = super::f16_to_f32(bits);
    [bytes[at], bytes[at + 1]] = bits.to_le_bytes();
    read.is_finite().then_some(read)
}

/// One over a scale, or zero for none.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The first value of the largest magnitude.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest: f32, &value| {
        if largest.abs() < value.abs() {
            value
        } else {
            largest
        }
    })
}

/// The largest magnitude.
fn amax(values: &[f32]) -> f32 {
    largest(values).abs()
}

/// The least and the largest value.
fn range(values: &[f32]) -> (f32, f32) {
    let least = |least: f32, &value: &f32| if value < least { value } else { least };
    let most = |most: f32, &value: &f32| if value > most { value } else { most };
    (
        values.iter().fold(f32::MAX, least),
        values.iter().fold(f32::MIN, most),
    )
}
