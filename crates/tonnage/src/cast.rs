//! Casting floats to other floats: one rounding, to nearest, ties to even, whatever the pair.
//!
//! Every source decodes exactly to `f64`, so the only rounding is the one into the target. Values
//! beyond the target's range become its infinity, or NaN where it has none, as in PyTorch and
//! `ml_dtypes`.

use half::{bf16, f16};
use tonnage_format::{Dtype, Error, Kind, Reason};

use crate::values::{SmallFloat, Special, decode};

/// Whether values of `from` can be cast to `to`: both real floats, and `to` at least one byte wide
/// with a sign. (`F4`, `F6` and `F8_E8M0` belong to block formats, where a scale goes with them.)
pub fn castable(from: Dtype, to: Dtype) -> bool {
    let float = |dtype: Dtype| dtype.row().kind == Kind::Float;
    from == to || float(from) && float(to) && to.bitsize() >= 8 && to != Dtype::F8_E8M0
}

/// Bytes that `len` bytes of `from` take as `to`.
///
/// # Errors
/// [`Reason::SizeOverflow`], and [`Reason::PartialByte`] where `len` does not hold whole elements.
pub fn cast_len(from: Dtype, len: u64, to: Dtype) -> Result<u64, Error> {
    let (from_bits, to_bits) = (from.bitsize() as u64, to.bitsize() as u64);
    let bits = len
        .checked_mul(8)
        .ok_or_else(|| Error::new(Reason::SizeOverflow))?;
    if !bits.is_multiple_of(from_bits) {
        return Err(Error::new(Reason::PartialByte).found(format_args!("{len} bytes of {from}")));
    }
    let bits = (bits / from_bits)
        .checked_mul(to_bits)
        .ok_or_else(|| Error::new(Reason::SizeOverflow))?;
    Ok(bits.div_ceil(8))
}

/// Casts the elements in `src` into `dst`, which has exactly [`cast_len`] bytes.
///
/// # Errors
/// [`Reason::Cast`] for a pair that is not [`castable`] or a `dst` of another length; those of
/// [`cast_len`].
pub fn cast(from: Dtype, src: &[u8], to: Dtype, dst: &mut [u8]) -> Result<(), Error> {
    if !castable(from, to) {
        return Err(Error::new(Reason::Cast)
            .found(format_args!("{from} to {to}"))
            .needed("a float dtype of at least 8 bits with a sign, from floats"));
    }
    let wanted = cast_len(from, src.len() as u64, to)?;
    if wanted != dst.len() as u64 {
        return Err(Error::new(Reason::Cast)
            .found(format_args!("room for {} bytes", dst.len()))
            .needed(format_args!("{wanted}")));
    }
    match (from, to) {
        _ if from == to => dst.copy_from_slice(src),
        (Dtype::F32, Dtype::BF16) => each(src, dst, |v| {
            bf16::from_f32(f32::from_le_bytes(v)).to_le_bytes()
        }),
        (Dtype::F32, Dtype::F16) => each(src, dst, |v| {
            f16::from_f32(f32::from_le_bytes(v)).to_le_bytes()
        }),
        (Dtype::BF16, Dtype::F32) => {
            each(src, dst, |v| bf16::from_le_bytes(v).to_f32().to_le_bytes())
        }
        (Dtype::F16, Dtype::F32) => {
            each(src, dst, |v| f16::from_le_bytes(v).to_f32().to_le_bytes())
        }
        (Dtype::BF16, Dtype::F16) => each(src, dst, |v| {
            f16::from_f32(bf16::from_le_bytes(v).to_f32()).to_le_bytes()
        }),
        (Dtype::F16, Dtype::BF16) => each(src, dst, |v| {
            bf16::from_f32(f16::from_le_bytes(v).to_f32()).to_le_bytes()
        }),
        _ => through_f64(from, src, to, dst),
    }
    Ok(())
}

/// Casts element by element with one function, for pairs that models are full of.
fn each<const N: usize, const M: usize>(
    src: &[u8],
    dst: &mut [u8],
    f: impl Fn([u8; N]) -> [u8; M],
) {
    let (src, dst) = (src.as_chunks::<N>().0, dst.as_chunks_mut::<M>().0);
    for (from, to) in src.iter().zip(dst) {
        *to = f(*from);
    }
}

/// Any pair, by blocks, so that the `f64`s stay in the cache.
fn through_f64(from: Dtype, src: &[u8], to: Dtype, dst: &mut [u8]) {
    // A multiple of 8 elements is whole bytes in every dtype.
    const ELEMENTS: usize = 4096;
    let (src_block, dst_block) = (ELEMENTS * from.bitsize() / 8, ELEMENTS * to.bitsize() / 8);
    let mut values = Vec::with_capacity(ELEMENTS);
    for (src, dst) in src.chunks(src_block).zip(dst.chunks_mut(dst_block)) {
        values.clear();
        decode(from, src, &mut values);
        encode(to, &values, dst);
    }
}

fn encode(to: Dtype, values: &[f64], dst: &mut [u8]) {
    fn put<const N: usize>(values: &[f64], dst: &mut [u8], f: impl Fn(f64) -> [u8; N]) {
        for (&value, to) in values.iter().zip(dst.as_chunks_mut::<N>().0) {
            *to = f(value);
        }
    }
    match to {
        Dtype::F64 => put(values, dst, f64::to_le_bytes),
        Dtype::F32 => put(values, dst, |v| (v as f32).to_le_bytes()),
        Dtype::F16 => put(values, dst, |v| f16::from_f32(to_odd_f32(v)).to_le_bytes()),
        Dtype::BF16 => put(values, dst, |v| bf16::from_f32(to_odd_f32(v)).to_le_bytes()),
        _ => {
            let Some(float) = SmallFloat::of(to) else {
                return;
            };
            put(values, dst, |v| [small_from_f64(float, v)]);
        }
    }
}

/// The `f32` next to `value` that is odd in its last bit, or `value` itself where `f32` holds it.
///
/// `half` rounds an `f64` to `f32` first, and two roundings to nearest can end a tie on the wrong
/// side. Rounding to odd keeps the trace of what was cut off, so the second rounding is right.
fn to_odd_f32(value: f64) -> f32 {
    let near = value as f32;
    if value.is_nan() || near as f64 == value || near.is_infinite() {
        return near;
    }
    let bits = near.to_bits();
    let other = if (near as f64).abs() > value.abs() {
        bits - 1
    } else {
        bits + 1
    };
    f32::from_bits(if bits & 1 == 1 { bits } else { other })
}

/// Rounds to the nearest value of a small float, ties to even.
fn small_from_f64(float: SmallFloat, value: f64) -> u8 {
    let sign_shift = float.exponent + float.mantissa;
    let sign = (value.is_sign_negative() as u8) << sign_shift;
    let magnitude_mask = (1_u8 << sign_shift) - 1;
    let nan = match float.special {
        Special::NegativeZero => 1 << sign_shift,
        Special::Ieee => {
            sign | magnitude_mask & !((1 << float.mantissa) - 1) | 1 << (float.mantissa - 1)
        }
        Special::Top | Special::None => sign | magnitude_mask,
    };
    if value.is_nan() {
        return nan;
    }
    let largest = match float.special {
        Special::Ieee => (((1_u8 << float.exponent) - 1) << float.mantissa) - 1,
        Special::Top => magnitude_mask - 1,
        Special::NegativeZero | Special::None => magnitude_mask,
    };
    let overflow = if float.special == Special::Ieee {
        sign | (largest + 1)
    } else {
        nan
    };
    let magnitude = value.abs();
    if magnitude.is_infinite() {
        return overflow;
    }
    // The exponent of the value, not below that of the subnormals.
    let lowest = 1 - float.bias;
    let exponent = if magnitude == 0.0 {
        lowest
    } else {
        ilogb(magnitude).max(lowest)
    };
    // The value in units of the last place: exact in f64, since scaling is by a power of two.
    let units = magnitude * ((float.mantissa as i32 - exponent) as f64).exp2();
    let rounded = units.round_ties_even() as u64;
    // The units carry into the exponent by themselves: patterns are in order.
    let pattern = rounded + (((exponent - lowest) as u64) << float.mantissa);
    if pattern > largest as u64 {
        return overflow;
    }
    match (pattern, float.special) {
        (0, Special::NegativeZero) => 0,
        _ => sign | pattern as u8,
    }
}

/// The exponent of a positive finite value: 0 for [1, 2).
fn ilogb(value: f64) -> i32 {
    let field = (value.to_bits() >> 52 & 0x7FF) as i32;
    // Subnormal doubles are far below every target; any exponent below the lowest serves.
    field - 1023
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_one(from: Dtype, src: &[u8], to: Dtype) -> Vec<u8> {
        let mut dst = vec![0; cast_len(from, src.len() as u64, to).unwrap() as usize];
        cast(from, src, to, &mut dst).unwrap();
        dst
    }

    /// Every pattern of every small float survives the way to f32 and back.
    #[test]
    fn small_floats_round_trip() {
        for to in [
            Dtype::F8_E4M3,
            Dtype::F8_E5M2,
            Dtype::F8_E4M3FNUZ,
            Dtype::F8_E5M2FNUZ,
        ] {
            for pattern in 0..=u8::MAX {
                let wide = to_one(to, &[pattern], Dtype::F32);
                let value = f32::from_le_bytes(wide[..].try_into().unwrap());
                let back = to_one(Dtype::F32, &wide, to)[0];
                if value.is_nan() {
                    let again = to_one(to, &[back], Dtype::F32);
                    assert!(f32::from_le_bytes(again[..].try_into().unwrap()).is_nan());
                } else {
                    assert_eq!(back, pattern, "{to} {value}");
                }
            }
        }
    }

    /// Against the definition: the nearest of all values, and of two the even pattern.
    #[test]
    fn small_floats_round_to_nearest_even() {
        for to in [
            Dtype::F8_E4M3,
            Dtype::F8_E5M2,
            Dtype::F8_E4M3FNUZ,
            Dtype::F8_E5M2FNUZ,
        ] {
            let float = SmallFloat::of(to).unwrap();
            let values: Vec<f64> = (0..128)
                .map(|p| float.decode(p))
                .filter(|v| v.is_finite())
                .collect();
            for (i, pair) in values.windows(2).enumerate() {
                let middle = (pair[0] + pair[1]) / 2.0;
                let even = if i % 2 == 0 { i } else { i + 1 };
                assert_eq!(
                    small_from_f64(float, middle) as usize,
                    even,
                    "{to} {middle}"
                );
                assert_eq!(small_from_f64(float, middle.next_down()) as usize, i);
                assert_eq!(small_from_f64(float, middle.next_up()) as usize, i + 1);
            }
            let last = values.len() - 1;
            let step = values[last] - values[last - 1];
            assert_eq!(
                small_from_f64(float, values[last] + step * 0.49) as usize,
                last
            );
            assert!(
                !float
                    .decode(small_from_f64(float, values[last] + step * 0.51))
                    .is_finite()
            );
        }
    }

    #[test]
    fn doubles_round_once() {
        // Just above a tie of bf16: rounding through f32 first would lose the excess.
        let tie = 1.0 + 2f64.powi(-8);
        let above = tie + 2f64.powi(-40);
        let bf16_of = |v: f64| {
            bf16::from_le_bytes(
                to_one(Dtype::F64, &v.to_le_bytes(), Dtype::BF16)[..]
                    .try_into()
                    .unwrap(),
            )
        };
        assert_eq!(bf16_of(tie).to_f64(), 1.0);
        assert_eq!(bf16_of(above).to_f64(), 1.0 + 2f64.powi(-7));
        assert_eq!(bf16_of(-above).to_f64(), -1.0 - 2f64.powi(-7));
        let tie = 1.0 + 2f64.powi(-11);
        let above = tie + 2f64.powi(-40);
        let f16_of = |v: f64| {
            f16::from_le_bytes(
                to_one(Dtype::F64, &v.to_le_bytes(), Dtype::F16)[..]
                    .try_into()
                    .unwrap(),
            )
        };
        assert_eq!(f16_of(tie).to_f64(), 1.0);
        assert_eq!(f16_of(above).to_f64(), 1.0 + 2f64.powi(-10));
        assert!(f16_of(1e9).is_infinite() && bf16_of(f64::NAN).is_nan());
    }

    #[test]
    fn what_cannot_be_cast_is_refused() {
        assert!(castable(Dtype::F4, Dtype::BF16) && !castable(Dtype::F32, Dtype::F4));
        assert!(castable(Dtype::I8, Dtype::I8) && !castable(Dtype::I8, Dtype::F32));
        let wrong = |from, src: &[u8], to, len| {
            cast(from, src, to, &mut vec![0; len]).unwrap_err().reason()
        };
        assert_eq!(wrong(Dtype::I32, &[0; 4], Dtype::F32, 4), Reason::Cast);
        assert_eq!(wrong(Dtype::F32, &[0; 4], Dtype::F16, 3), Reason::Cast);
        assert_eq!(
            wrong(Dtype::F32, &[0; 3], Dtype::F16, 2),
            Reason::PartialByte
        );
        assert_eq!(
            cast_len(Dtype::F16, u64::MAX, Dtype::F64)
                .unwrap_err()
                .reason(),
            Reason::SizeOverflow
        );
        assert!(to_one(Dtype::F32, &[], Dtype::F8_E5M2).is_empty());
    }

    #[test]
    fn the_common_pairs_agree_with_the_general_way() {
        let mut state = 1_u32;
        let mut src = Vec::new();
        for _ in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            src.extend_from_slice(&state.to_le_bytes());
        }
        for (from, to) in [
            (Dtype::F32, Dtype::BF16),
            (Dtype::F32, Dtype::F16),
            (Dtype::BF16, Dtype::F32),
            (Dtype::F16, Dtype::F32),
            (Dtype::BF16, Dtype::F16),
            (Dtype::F16, Dtype::BF16),
        ] {
            let fast = to_one(from, &src, to);
            let mut slow = vec![0; fast.len()];
            through_f64(from, &src, to, &mut slow);
            let (mut a, mut b) = (Vec::new(), Vec::new());
            decode(to, &fast, &mut a);
            decode(to, &slow, &mut b);
            assert!(
                a.iter()
                    .zip(&b)
                    .all(|(x, y)| x == y || x.is_nan() && y.is_nan()),
                "{from} {to}"
            );
        }
    }
}
