//! Blocks to numbers: lengths checked, then the processor's kernel, or the scalar code.

use half::{bf16, f16};

use super::{GgmlError, GgmlType, iq, k, legacy};
use crate::arch::{self, Level, Stores};

/// Turns whole blocks into `f32`, as ggml does, bit for bit.
///
/// # Errors
///
/// [`GgmlError::Length`] unless `bytes` is a whole number of blocks with as many elements as `out`;
/// [`GgmlError::NotDequantised`] for integers, `F64`, and types that no file holds.
pub fn dequantize(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), GgmlError> {
    dequantize_with(Level::best(), Stores::Auto, ty, bytes, out)
}

/// [`dequantize`] with the instructions and the way of storing named: the same bits.
///
/// # Errors
///
/// As [`dequantize`].
pub fn dequantize_with(
    level: Level,
    stores: Stores,
    ty: GgmlType,
    bytes: &[u8],
    out: &mut [f32],
) -> Result<(), GgmlError> {
    check(ty, bytes, out.len())?;
    if arch::dequantize(level, stores, ty, bytes, out) {
        return Ok(());
    }
    scalar(ty, bytes, out)
}

/// Turns whole blocks into binary16: what [`dequantize`] gives, rounded to nearest, ties to even.
///
/// # Errors
///
/// As [`dequantize`].
pub fn dequantize_f16(ty: GgmlType, bytes: &[u8], out: &mut [f16]) -> Result<(), GgmlError> {
    narrow(ty, bytes, out, arch::to_f16)
}

/// Turns whole blocks into bfloat16: what [`dequantize`] gives, rounded to nearest, ties to even.
///
/// # Errors
///
/// As [`dequantize`].
pub fn dequantize_bf16(ty: GgmlType, bytes: &[u8], out: &mut [bf16]) -> Result<(), GgmlError> {
    narrow(ty, bytes, out, arch::to_bf16)
}

/// The elements that are `f32` at a time on the way to something narrower: in the first cache, and whole blocks of any type.
const PIECE: usize = 2048;

fn narrow<T>(
    ty: GgmlType,
    bytes: &[u8],
    out: &mut [T],
    round: fn(Level, bool, &[f32], &mut [T]),
) -> Result<(), GgmlError> {
    check(ty, bytes, out.len())?;
    let (level, stream) = (Level::best(), Stores::Auto.streaming(size_of_val(out)));
    let mut wide = [0.0; PIECE];
    let piece = PIECE / ty.elements() * ty.bytes();
    for (bytes, out) in bytes.chunks(piece).zip(out.chunks_mut(PIECE)) {
        let wide = &mut wide[..out.len()];
        dequantize_with(level, Stores::Cached, ty, bytes, wide)?;
        round(level, stream, wide, out);
    }
    Ok(())
}

fn check(ty: GgmlType, bytes: &[u8], elements: usize) -> Result<(), GgmlError> {
    let blocks = bytes.len() / ty.bytes();
    let whole = bytes.len().is_multiple_of(ty.bytes())
        && blocks.checked_mul(ty.elements()) == Some(elements);
    match (whole, is_dequantised(ty)) {
        (_, false) => Err(GgmlError::NotDequantised { ty }),
        (true, true) => Ok(()),
        (false, true) => Err(GgmlError::Length {
            ty,
            bytes: bytes.len(),
            elements,
        }),
    }
}

/// Whether [`dequantize`] knows the type.
const fn is_dequantised(ty: GgmlType) -> bool {
    use GgmlType::{F64, I8, I16, I32, I64};
    !matches!(ty, F64 | I8 | I16 | I32 | I64) && !ty.is_runtime_only()
}

/// Every block through `one`.
#[inline]
fn each<const B: usize, const E: usize>(
    bytes: &[u8],
    out: &mut [f32],
    one: impl Fn(&[u8; B], &mut [f32; E]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        one(block, out);
    }
}

fn scalar(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), GgmlError> {
    match ty {
        GgmlType::F32 => each(bytes, out, legacy::f32),
        GgmlType::F16 => each(bytes, out, legacy::f16),
        GgmlType::BF16 => each(bytes, out, legacy::bf16),
        GgmlType::Q4_0 => each(bytes, out, legacy::q4_0),
        GgmlType::Q4_1 => each(bytes, out, legacy::q4_1),
        GgmlType::Q5_0 => each(bytes, out, legacy::q5_0),
        GgmlType::Q5_1 => each(bytes, out, legacy::q5_1),
        GgmlType::Q8_0 => each(bytes, out, legacy::q8_0),
        GgmlType::Q2_K => each(bytes, out, k::q2_k),
        GgmlType::Q3_K => each(bytes, out, k::q3_k),
        GgmlType::Q4_K => each(bytes, out, k::q4_k),
        GgmlType::Q5_K => each(bytes, out, k::q5_k),
        GgmlType::Q6_K => each(bytes, out, k::q6_k),
        GgmlType::IQ2_XXS => each(bytes, out, iq::iq2_xxs),
        GgmlType::IQ2_XS => each(bytes, out, iq::iq2_xs),
        GgmlType::IQ2_S => each(bytes, out, iq::iq2_s),
        GgmlType::IQ3_XXS => each(bytes, out, iq::iq3_xxs),
        GgmlType::IQ3_S => each(bytes, out, iq::iq3_s),
        GgmlType::IQ1_S => each(bytes, out, iq::iq1_s),
        GgmlType::IQ1_M => each(bytes, out, iq::iq1_m),
        GgmlType::IQ4_NL => each(bytes, out, legacy::iq4_nl),
        GgmlType::IQ4_XS => each(bytes, out, iq::iq4_xs),
        GgmlType::TQ1_0 => each(bytes, out, k::tq1_0),
        GgmlType::TQ2_0 => each(bytes, out, k::tq2_0),
        GgmlType::MXFP4 => each(bytes, out, legacy::mxfp4),
        GgmlType::NVFP4 => each(bytes, out, legacy::nvfp4),
        GgmlType::Q1_0 => each(bytes, out, legacy::q1_0),
        GgmlType::Q2_0 => each(bytes, out, legacy::q2_0),
        GgmlType::Q8_1
        | GgmlType::Q8_K
        | GgmlType::I8
        | GgmlType::I16
        | GgmlType::I32
        | GgmlType::I64
        | GgmlType::F64 => return Err(GgmlError::NotDequantised { ty }),
    }
    Ok(())
}
