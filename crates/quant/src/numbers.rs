//! The small numbers that quantised tensors are made of: each pattern's exact value in `f32`, and the pattern
//! nearest to an `f32`.
//!
//! ```text
//!  e2m1    s ee m       1,2 bits   bias 1   no infinity, no NaN               OCP MX 1.0, 5.3.3
//!  e2m3    s ee mmm                bias 1   no infinity, no NaN               OCP MX 1.0, 5.3.2
//!  e3m2    s eee mm                bias 3   no infinity, no NaN               OCP MX 1.0, 5.3.2
//!  e4m3fn  s eeee mmm              bias 7   NaN = all ones, no infinity       OCP FP8 1.0
//!  e5m2    s eeeee mm              bias 15  infinity and NaN as in IEEE 754   OCP FP8 1.0
//!  e4m3fnuz, e5m2fnuz              bias 8, 16   NaN = 0x80, no infinity, no negative zero
//!  e8m0    eeeeeeee                2^(e-127), NaN = 0xFF; no sign, no zero    OCP MX 1.0, 5.4.1
//!  ue4m3   - eeee mmm              e4m3fn without a sign, 0x7F is zero        ggml
//! ```
//!
//! Decoding is exact: `f32` holds every one of these numbers. A NaN decodes to the quiet NaN of its sign.
//! Encoding rounds to nearest, ties to even, and takes the rounding to decide what is too large: a number that
//! rounds to the largest finite one is that number. What happens beyond it:
//!
//! | format | too large, infinity | NaN |
//! |---|---|---|
//! | `f16`, `bf16` | infinity | quiet NaN |
//! | `e4m3fn`, `e5m2`, both `fnuz` | as [`Overflow`] says | NaN |
//! | `e2m1`, `e2m3`, `e3m2` | the largest number | negative zero, as in `ml_dtypes` |
//! | `e8m0` | NaN | NaN; so are negative numbers |
//! | `ue4m3` | 448 | zero; so are negative numbers |

use half::{bf16, f16};

/// What a number too large for an 8-bit float becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The largest finite number of its sign; so does infinity.
    Saturate,
    /// Infinity where the format has one, else NaN.
    Special,
}

/// What the patterns that are not plain numbers mean.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Special {
    None,
    Ieee,
    AllOnes,
    NegativeZero,
}

/// A float of one sign, `exponent` and `mantissa` bits.
#[derive(Clone, Copy)]
struct Format {
    exponent: u32,
    mantissa: u32,
    bias: i32,
    special: Special,
}

const fn format(exponent: u32, mantissa: u32, bias: i32, special: Special) -> Format {
    Format {
        exponent,
        mantissa,
        bias,
        special,
    }
}

const E2M1: Format = format(2, 1, 1, Special::None);
const E2M3: Format = format(2, 3, 1, Special::None);
const E3M2: Format = format(3, 2, 3, Special::None);
const E4M3FN: Format = format(4, 3, 7, Special::AllOnes);
const E5M2: Format = format(5, 2, 15, Special::Ieee);
const E4M3FNUZ: Format = format(4, 3, 8, Special::NegativeZero);
const E5M2FNUZ: Format = format(5, 2, 16, Special::NegativeZero);

/// 2 to a power that a normal `f32` has.
const fn power_of_two(power: i32) -> f32 {
    f32::from_bits(((power + 127) as u32) << 23)
}

impl Format {
    const fn bits(self) -> u32 {
        1 + self.exponent + self.mantissa
    }

    /// The pattern of the largest finite number.
    const fn largest(self) -> u32 {
        let all = (1 << (self.bits() - 1)) - 1;
        match self.special {
            Special::None | Special::NegativeZero => all,
            Special::AllOnes => all - 1,
            Special::Ieee => all - (1 << self.mantissa),
        }
    }

    const fn decode(self, code: u32) -> f32 {
        let negative = code >> (self.bits() - 1) & 1 == 1;
        let magnitude = code & ((1 << (self.bits() - 1)) - 1);
        if magnitude > self.largest() {
            let infinite = matches!(self.special, Special::Ieee) && magnitude == self.largest() + 1;
            let bits = if infinite { 0x7F80_0000 } else { 0x7FC0_0000 };
            return f32::from_bits(bits | (negative as u32) << 31);
        }
        if negative && magnitude == 0 && matches!(self.special, Special::NegativeZero) {
            return f32::from_bits(0xFFC0_0000);
        }
        let exponent = (magnitude >> self.mantissa) as i32;
        let fraction = magnitude & ((1 << self.mantissa) - 1);
        let smallest = 1 - self.bias - self.mantissa as i32;
        let value = match exponent {
            0 => fraction as f32 * power_of_two(smallest),
            _ => (fraction + (1 << self.mantissa)) as f32 * power_of_two(smallest + exponent - 1),
        };
        if negative { -value } else { value }
    }

    /// The magnitude's pattern, nearest with ties to even; past [`Format::largest`] where it is too large.
    fn nearest(self, magnitude: f32) -> u32 {
        let smallest_normal = power_of_two(1 - self.bias);
        if magnitude < smallest_normal {
            // The sum's last place is the format's smallest number, so the adder rounds for us.
            let magic = power_of_two(1 - self.bias - self.mantissa as i32 + 23);
            return (magnitude + magic).to_bits() - magic.to_bits();
        }
        let shift = 23 - self.mantissa;
        let bits = magnitude.to_bits();
        let odd = bits >> shift & 1;
        let rounded = (bits + (1 << (shift - 1)) - 1 + odd) >> shift;
        rounded - (((127 - self.bias) as u32) << self.mantissa)
    }

    fn encode(self, value: f32, overflow: Overflow) -> u8 {
        let sign = (value.is_sign_negative() as u32) << (self.bits() - 1);
        let nan = match self.special {
            Special::None | Special::NegativeZero => 1 << (self.bits() - 1),
            Special::AllOnes => sign | 0x7F,
            Special::Ieee => sign | 0x7E,
        };
        if value.is_nan() {
            return nan as u8;
        }
        let code = self.nearest(value.abs());
        let code = match (code > self.largest(), overflow, self.special) {
            (false, ..) => code,
            (true, Overflow::Saturate, _) | (true, _, Special::None) => self.largest(),
            (true, _, Special::Ieee) => self.largest() + 1,
            (true, ..) => return nan as u8,
        };
        match (code, self.special) {
            (0, Special::NegativeZero) => 0,
            _ => (sign | code) as u8,
        }
    }
}

const fn table<const N: usize>(format: Format) -> [f32; N] {
    let mut table = [0.0; N];
    let mut code = 0;
    while code < N {
        table[code] = format.decode(code as u32);
        code += 1;
    }
    table
}

static E2M1_VALUES: [f32; 16] = table(E2M1);
static E2M3_VALUES: [f32; 64] = table(E2M3);
static E3M2_VALUES: [f32; 64] = table(E3M2);
static E4M3FN_VALUES: [f32; 256] = table(E4M3FN);
static E5M2_VALUES: [f32; 256] = table(E5M2);
static E4M3FNUZ_VALUES: [f32; 256] = table(E4M3FNUZ);
static E5M2FNUZ_VALUES: [f32; 256] = table(E5M2FNUZ);

/// The value of the low 4 bits as an e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
#[inline]
pub fn e2m1_to_f32(code: u8) -> f32 {
    E2M1_VALUES[code as usize & 15]
}

/// The value of the low 6 bits as an e2m3 (at most 7.5).
#[inline]
pub fn e2m3_to_f32(code: u8) -> f32 {
    E2M3_VALUES[code as usize & 63]
}

/// The value of the low 6 bits as an e3m2 (at most 28).
#[inline]
pub fn e3m2_to_f32(code: u8) -> f32 {
    E3M2_VALUES[code as usize & 63]
}

/// The value of an e4m3fn (at most 448).
#[inline]
pub fn e4m3fn_to_f32(code: u8) -> f32 {
    E4M3FN_VALUES[code as usize]
}

/// The value of an e5m2 (at most 57344, then infinity).
#[inline]
pub fn e5m2_to_f32(code: u8) -> f32 {
    E5M2_VALUES[code as usize]
}

/// The value of an e4m3fnuz (at most 240).
#[inline]
pub fn e4m3fnuz_to_f32(code: u8) -> f32 {
    E4M3FNUZ_VALUES[code as usize]
}

/// The value of an e5m2fnuz (at most 57344).
#[inline]
pub fn e5m2fnuz_to_f32(code: u8) -> f32 {
    E5M2FNUZ_VALUES[code as usize]
}

/// The value of an e8m0: 2^(code-127), NaN for 255. Code 0 is 2^-127, a subnormal `f32`.
#[inline]
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    }
}

/// The value of ggml's unsigned e4m3. Codes 0 and 0x7F are zero; the top bit is not looked at otherwise, so that
/// 0xFF is 480, as in ggml. (ggml's own function gives half of this, for its table of e2m1 is doubled.)
#[inline]
pub const fn ue4m3_to_f32(code: u8) -> f32 {
    match code {
        0x7F => 0.0,
        0xFF => 480.0,
        _ => E4M3FN.decode(code as u32 & 0x7F),
    }
}

/// The value of an IEEE 754 binary16.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// The value of a bfloat16.
#[inline]
pub fn bf16_to_f32(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}

/// The nearest binary16, ties to even; infinity beyond 65504.
#[inline]
pub fn f32_to_f16(value: f32) -> u16 {
    f16::from_f32(value).to_bits()
}

/// The nearest bfloat16, ties to even; infinity beyond the largest.
#[inline]
pub fn f32_to_bf16(value: f32) -> u16 {
    bf16::from_f32(value).to_bits()
}

/// The nearest e2m1, ties to even; at most 6 in magnitude; negative zero for NaN.
#[inline]
pub fn f32_to_e2m1(value: f32) -> u8 {
    E2M1.encode(value, Overflow::Saturate)
}

/// The nearest e2m3, ties to even; at most 7.5 in magnitude; negative zero for NaN.
#[inline]
pub fn f32_to_e2m3(value: f32) -> u8 {
    E2M3.encode(value, Overflow::Saturate)
}

/// The nearest e3m2, ties to even; at most 28 in magnitude; negative zero for NaN.
#[inline]
pub fn f32_to_e3m2(value: f32) -> u8 {
    E3M2.encode(value, Overflow::Saturate)
}

/// The nearest e4m3fn, ties to even.
#[inline]
pub fn f32_to_e4m3fn(value: f32, overflow: Overflow) -> u8 {
    E4M3FN.encode(value, overflow)
}

/// The nearest e5m2, ties to even.
#[inline]
pub fn f32_to_e5m2(value: f32, overflow: Overflow) -> u8 {
    E5M2.encode(value, overflow)
}

/// The nearest e4m3fnuz, ties to even.
#[inline]
pub fn f32_to_e4m3fnuz(value: f32, overflow: Overflow) -> u8 {
    E4M3FNUZ.encode(value, overflow)
}

/// The nearest e5m2fnuz, ties to even.
#[inline]
pub fn f32_to_e5m2fnuz(value: f32, overflow: Overflow) -> u8 {
    E5M2FNUZ.encode(value, overflow)
}

/// The nearest power of two, ties to the larger one (as PyTorch and `ml_dtypes` do), as an e8m0. Zero and what is
/// below 2^-127 become 2^-127; NaN, infinity, negative numbers, and 1.5·2^127 and more become NaN.
#[inline]
pub fn f32_to_e8m0(value: f32) -> u8 {
    let bits = value.to_bits();
    if bits > 0x7F80_0000 && bits != 0x8000_0000 {
        return 255;
    }
    let magnitude = value.abs().to_bits();
    let exponent = magnitude >> 23;
    let up = match exponent {
        // 2^-127 is 0x400000; 1.5 times that is the tie with 2^-126.
        0 => magnitude >= 0x0060_0000,
        _ => magnitude >> 22 & 1 == 1,
    };
    (exponent + up as u32).min(255) as u8
}

/// ggml's rounding to its unsigned e4m3: nearest, ties upwards, and 448 for all that is 256 or more. Zero, negative
/// numbers and NaN become zero.
#[inline]
pub fn f32_to_ue4m3(value: f32) -> u8 {
    if value.is_nan() || value <= 0.0 {
        return 0;
    }
    let bits = value.min(448.0).to_bits();
    if bits >> 23 < 121 {
        // Below 2^-6 the step is 2^-9, and 7 of them are the most.
        return ((value * 512.0 + 0.5) as u8).min(7);
    }
    // The exponent's bias and the carry of the rounding both fall out of one addition.
    let code = (bits >> 20) + (bits >> 19 & 1) - (120 << 3);
    match code >> 3 {
        0..15 => code as u8,
        _ => 0x7E,
    }
}

#[cfg(test)]
mod tests;
