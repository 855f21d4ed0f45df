//! What an element's bits are worth: every real dtype decoded to `f64`, exactly (integers beyond
//! 2^53 rounded). This is for looking at values; loading never goes through it.
//!
//! The small floats are described by four numbers and decoded by one function:
//!
//! ```text
//! F8_E4M3  s eeee mmm      F6_E2M3  s ee mmm      F4  s ee m      F8_E8M0  eeeeeeee
//! ```

use half::{bf16, f16};
use tonnage_format::Dtype;

/// What the patterns of a small float that are not plain numbers mean.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Special {
    /// All exponents are numbers; there is neither infinity nor NaN (OCP MX).
    None,
    /// The top exponent is infinity or NaN, as in IEEE 754.
    Ieee,
    /// Only the pattern of all ones is NaN ("fn").
    Top,
    /// Only the pattern of negative zero is NaN ("fnuz").
    NegativeZero,
}

/// A float of a sign, `exponent` and `mantissa` bits.
#[derive(Clone, Copy)]
pub(crate) struct SmallFloat {
    pub exponent: u32,
    pub mantissa: u32,
    pub bias: i32,
    pub special: Special,
}

impl SmallFloat {
    /// The layout of a dtype that is a small float with a sign.
    pub fn of(dtype: Dtype) -> Option<SmallFloat> {
        let (exponent, mantissa, bias, special) = match dtype {
            Dtype::F4 => (2, 1, 1, Special::None),
            Dtype::F6_E2M3 => (2, 3, 1, Special::None),
            Dtype::F6_E3M2 => (3, 2, 3, Special::None),
            Dtype::F8_E4M3 => (4, 3, 7, Special::Top),
            Dtype::F8_E5M2 => (5, 2, 15, Special::Ieee),
            Dtype::F8_E4M3FNUZ => (4, 3, 8, Special::NegativeZero),
            Dtype::F8_E5M2FNUZ => (5, 2, 16, Special::NegativeZero),
            _ => return None,
        };
        Some(SmallFloat {
            exponent,
            mantissa,
            bias,
            special,
        })
    }

    /// The value of a pattern.
    pub fn decode(self, bits: u8) -> f64 {
        let bits = bits as u32;
        let negative = bits >> (self.exponent + self.mantissa) & 1 == 1;
        let exponent = bits >> self.mantissa & ((1 << self.exponent) - 1);
        let mantissa = bits & ((1 << self.mantissa) - 1);
        let top = (1 << self.exponent) - 1;
        let full = (1 << self.mantissa) - 1;
        let nan = match self.special {
            Special::None => false,
            Special::Ieee => exponent == top && mantissa != 0,
            Special::Top => exponent == top && mantissa == full,
            Special::NegativeZero => negative && exponent == 0 && mantissa == 0,
        };
        let sign = if negative { -1.0 } else { 1.0 };
        if nan {
            return f64::NAN;
        }
        if self.special == Special::Ieee && exponent == top {
            return sign * f64::INFINITY;
        }
        let scale = |power: i32| (power as f64).exp2();
        let fraction = mantissa as f64 / (1 << self.mantissa) as f64;
        sign * match exponent {
            0 => fraction * scale(1 - self.bias),
            _ => (1.0 + fraction) * scale(exponent as i32 - self.bias),
        }
    }
}

/// The value of an `F8_E8M0` pattern: a power of two, or NaN.
fn e8m0(bits: u8) -> f64 {
    if bits == u8::MAX {
        f64::NAN
    } else {
        (bits as f64 - 127.0).exp2()
    }
}

/// Whether [`decode`] knows the dtype: all but complex numbers.
pub fn is_real(dtype: Dtype) -> bool {
    dtype != Dtype::C64
}

/// Appends the elements in `bytes` to `out`. `bytes` holds whole elements; of a sub-byte dtype, as
/// many as fill whole bytes. Complex numbers give nothing ([`is_real`]).
pub fn decode(dtype: Dtype, bytes: &[u8], out: &mut Vec<f64>) {
    macro_rules! wide {
        ($ty:ty, $to:expr) => {
            out.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&chunk| $to(<$ty>::from_le_bytes(chunk))),
            )
        };
    }
    match dtype {
        Dtype::BOOL | Dtype::U8 => out.extend(bytes.iter().map(|&byte| byte as f64)),
        Dtype::I8 => out.extend(bytes.iter().map(|&byte| byte as i8 as f64)),
        Dtype::U16 => wide!(u16, |v| v as f64),
        Dtype::I16 => wide!(i16, |v| v as f64),
        Dtype::U32 => wide!(u32, |v| v as f64),
        Dtype::I32 => wide!(i32, |v| v as f64),
        Dtype::U64 => wide!(u64, |v| v as f64),
        Dtype::I64 => wide!(i64, |v| v as f64),
        Dtype::F16 => wide!(f16, f16::to_f64),
        Dtype::BF16 => wide!(bf16, bf16::to_f64),
        Dtype::F32 => wide!(f32, |v| v as f64),
        Dtype::F64 => wide!(f64, |v| v),
        Dtype::F8_E8M0 => out.extend(bytes.iter().map(|&byte| e8m0(byte))),
        _ => {
            let Some(float) = SmallFloat::of(dtype) else {
                return;
            };
            let table = table(float);
            let value = |pattern: u8| table.get(pattern as usize).copied().unwrap_or(f64::NAN);
            for_each_pattern(dtype.bitsize(), bytes, |pattern| out.push(value(pattern)));
        }
    }
}

fn table(float: SmallFloat) -> Vec<f64> {
    let bits = 1 + float.exponent + float.mantissa;
    (0..=u8::MAX)
        .take(1 << bits)
        .map(|pattern| float.decode(pattern))
        .collect()
}

/// Calls `each` with the patterns of 4, 6 or 8 bits in `bytes`, least significant bits first (spec 5.3).
fn for_each_pattern(bits: usize, bytes: &[u8], mut each: impl FnMut(u8)) {
    match bits {
        4 => bytes.iter().for_each(|&byte| {
            each(byte & 0xF);
            each(byte >> 4);
        }),
        6 => bytes.as_chunks().0.iter().for_each(|&[a, b, c]| {
            let word = u32::from_le_bytes([a, b, c, 0]);
            (0..4).for_each(|i| each((word >> (6 * i) & 0x3F) as u8));
        }),
        _ => bytes.iter().for_each(|&byte| each(byte)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
        let mut out = Vec::new();
        decode(dtype, bytes, &mut out);
        out
    }

    #[test]
    fn known_patterns_have_their_published_values() {
        assert_eq!(
            values(Dtype::F4, &[0x10, 0x72, 0xF9]),
            [0.0, 0.5, 1.0, 6.0, -0.5, -6.0]
        );
        assert_eq!(
            values(Dtype::F8_E4M3, &[0x7E, 0x01, 0xFE]),
            [448.0, 0.001953125, -448.0]
        );
        assert!(values(Dtype::F8_E4M3, &[0x7F])[0].is_nan());
        assert_eq!(
            values(Dtype::F8_E5M2, &[0x7B, 0x7C, 0xFC]),
            [57344.0, f64::INFINITY, f64::NEG_INFINITY]
        );
        assert_eq!(values(Dtype::F8_E4M3FNUZ, &[0x7F, 0xFF]), [240.0, -240.0]);
        assert!(values(Dtype::F8_E5M2FNUZ, &[0x80])[0].is_nan());
        assert_eq!(
            values(Dtype::F8_E8M0, &[127, 0, 254]),
            [1.0, 2f64.powi(-127), 2f64.powi(127)]
        );
        // Four elements in three bytes, least significant bits first: 1, 2, 3, 0x3F.
        let packed = 1_u32 | 2 << 6 | 3 << 12 | 0x3F << 18;
        assert_eq!(
            values(Dtype::F6_E2M3, &packed.to_le_bytes()[..3]),
            [0.125, 0.25, 0.375, -7.5]
        );
        assert_eq!(values(Dtype::F6_E3M2, &[0x1F, 0, 0])[0], 28.0);
    }

    #[test]
    fn wide_types_are_read_little_endian() {
        assert_eq!(values(Dtype::I16, &[0xFF, 0xFF, 1, 0]), [-1.0, 1.0]);
        assert_eq!(values(Dtype::F32, &1.5_f32.to_le_bytes()), [1.5]);
        assert_eq!(values(Dtype::BF16, &[0x80, 0x3F]), [1.0]);
        assert_eq!(
            values(Dtype::U64, &u64::MAX.to_le_bytes()),
            [u64::MAX as f64]
        );
        assert_eq!(values(Dtype::BOOL, &[0, 1, 7]), [0.0, 1.0, 7.0]);
        assert!(values(Dtype::C64, &[0; 8]).is_empty() && !is_real(Dtype::C64));
    }
}
