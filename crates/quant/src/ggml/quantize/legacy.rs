//! Plain floats, blocks with one scale, and the ternary types.

use super::{amax, inverse, largest, put_half, range};
use crate::ggml::{E2M1_DOUBLED, NVFP4_SCALES, e8m0_half};
use crate::numbers::{f32_to_bf16, f32_to_ue4m3};

pub(super) fn f32(x: &[f32; 1], out: &mut [u8; 4]) -> Option<()> {
    *out = x[0].to_le_bytes();
    Some(())
}

/// A number beyond binary16 is refused, as a scale is.
pub(super) fn f16(x: &[f32; 1], out: &mut [u8; 2]) -> Option<()> {
    put_half(out, 0, x[0]).map(drop)
}

pub(super) fn bf16(x: &[f32; 1], out: &mut [u8; 2]) -> Option<()> {
    let bits = f32_to_bf16(x[0]);
    *out = bits.to_le_bytes();
    (bits & 0x7FFF != 0x7F80).then_some(())
}

/// Writes 32 codes as nibbles in split halves, and gives their fifth bits.
fn pack(codes: &[u8; 32], out: &mut [u8]) -> u32 {
    let (low, high) = codes.split_at(16);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = (low & 15) | (high << 4);
    }
    let bit = |(i, &code): (usize, &u8)| ((code >> 4 & 1) as u32) << i;
    codes.iter().enumerate().map(bit).sum()
}

/// Codes about `zero`, of the scale that makes the largest magnitude the least code.
fn about(x: &[f32; 32], zero: u8) -> ([u8; 32], f32) {
    let d = largest(x) / -(zero as f32);
    let id = inverse(d);
    let code = |v: f32| ((v * id + (zero as f32 + 0.5)) as i8).min(2 * zero as i8 - 1) as u8;
    (x.map(code), d)
}

/// Codes from the least value on.
fn from_least(x: &[f32; 32], most: u8) -> ([u8; 32], f32, f32) {
    let (least, largest) = range(x);
    let d = (largest - least) / most as f32;
    let id = inverse(d);
    let code = |v: f32| (((v - least) * id + 0.5) as i8).min(most as i8) as u8;
    (x.map(code), d, least)
}

pub(super) fn q4_0(x: &[f32; 32], out: &mut [u8; 18]) -> Option<()> {
    let (codes, d) = about(x, 8);
    pack(&codes, &mut out[2..]);
    put_half(out, 0, d).map(drop)
}

pub(super) fn q4_1(x: &[f32; 32], out: &mut [u8; 20]) -> Option<()> {
    let (codes, d, m) = from_least(x, 15);
    pack(&codes, &mut out[4..]);
    put_half(out, 0, d)?;
    put_half(out, 2, m).map(drop)
}

pub(super) fn q5_0(x: &[f32; 32], out: &mut [u8; 22]) -> Option<()> {
    let (codes, d) = about(x, 16);
    let high = pack(&codes, &mut out[6..]);
    out[2..6].copy_from_slice(&high.to_le_bytes());
    put_half(out, 0, d).map(drop)
}

pub(super) fn q5_1(x: &[f32; 32], out: &mut [u8; 24]) -> Option<()> {
    let (codes, d, m) = from_least(x, 31);
    let high = pack(&codes, &mut out[8..]);
    out[4..8].copy_from_slice(&high.to_le_bytes());
    put_half(out, 0, d)?;
    put_half(out, 2, m).map(drop)
}

pub(super) fn q8_0(x: &[f32; 32], out: &mut [u8; 34]) -> Option<()> {
    let d = amax(x) / 127.0;
    let id = inverse(d);
    for (out, v) in out[2..].iter_mut().zip(x) {
        *out = (v * id).round() as i8 as u8;
    }
    put_half(out, 0, d).map(drop)
}

/// The doubled e2m1 nearest to `x / d`, the first of equals.
fn nearest_e2m1(x: f32, d: f32) -> u8 {
    let mut best = (0, f32::INFINITY);
    for (code, &value) in E2M1_DOUBLED.iter().enumerate() {
        let error = (value as f32 * d - x).abs();
        if error < best.1 {
            best = (code, error);
        }
    }
    best.0 as u8
}

/// The power of two that brings the largest magnitude to the top binade of e2m1. The logarithm is rounded to `f32` before
/// its floor, as `log2f` is: just below a large power of two that is the power itself.
pub(super) fn mxfp4(x: &[f32; 32], out: &mut [u8; 17]) -> Option<()> {
    let amax = amax(x);
    out[0] = match amax > 0.0 {
        true => (((amax as f64).log2() as f32).floor() - 2.0 + 127.0) as u8,
        false => 0,
    };
    let d = e8m0_half(out[0]);
    pack(&x.map(|v| nearest_e2m1(v, d)), &mut out[1..]);
    Some(())
}

/// Scales end at 448, so magnitudes beyond 2688 are cut to it, as ggml does.
pub(super) fn nvfp4(x: &[f32; 64], out: &mut [u8; 36]) -> Option<()> {
    for (group, x) in x.as_chunks::<16>().0.iter().enumerate() {
        let scale = f32_to_ue4m3(amax(x) / 6.0);
        out[group] = scale;
        let d = NVFP4_SCALES[scale as usize];
        let (low, high) = x.split_at(8);
        let out = out[4 + 8 * group..].iter_mut();
        for ((out, &low), &high) in out.zip(low).zip(high) {
            *out = nearest_e2m1(low, d) | nearest_e2m1(high, d) << 4;
        }
    }
    Some(())
}

/// Signs, and the mean magnitude.
pub(super) fn q1_0(x: &[f32; 128], out: &mut [u8; 18]) -> Option<()> {
    let sum = x.iter().fold(0.0, |sum, v| sum + v.abs());
    for (out, x) in out[2..].iter_mut().zip(x.as_chunks::<8>().0) {
        let bit = |(i, &v): (usize, &f32)| u8::from(v >= 0.0) << i;
        *out = x.iter().enumerate().map(bit).sum();
    }
    put_half(out, 0, sum / 128.0).map(drop)
}

pub(super) fn q2_0(x: &[f32; 64], out: &mut [u8; 18]) -> Option<()> {
    let d = amax(x);
    let id = inverse(d);
    for (out, x) in out[2..].iter_mut().zip(x.as_chunks::<4>().0) {
        let code = |v: f32| ((v * id).round() as i32).saturating_add(1).clamp(0, 3) as u8;
        *out = x.iter().rev().fold(0, |byte, &v| byte << 2 | code(v));
    }
    put_half(out, 0, d).map(drop)
}

/// -1, 0 or 1 as 0, 1 or 2.
fn trit(value: f32, id: f32) -> u8 {
    ((value * id).round() as i32).clamp(-1, 1).saturating_add(1) as u8
}

/// Five ternary digits, the first on top, as a fraction of 256 rounded up.
fn five(digits: [u8; 5]) -> u8 {
    let number = digits
        .iter()
        .fold(0_u16, |number, &digit| number * 3 + digit as u16);
    (number * 256).div_ceil(243) as u8
}

pub(super) fn tq1_0(x: &[f32; 256], out: &mut [u8; 54]) -> Option<()> {
    let d = amax(x);
    let id = inverse(d);
    for (start, width, first) in [(0, 32, 0), (32, 16, 160)] {
        for m in 0..width {
            out[start + m] = five(std::array::from_fn(|n| trit(x[first + m + n * width], id)));
        }
    }
    for m in 0..4 {
        let digit = |n: usize| {
            if n < 4 {
                trit(x[240 + m + 4 * n], id)
            } else {
                0
            }
        };
        out[48 + m] = five(std::array::from_fn(digit));
    }
    put_half(out, 52, d).map(drop)
}

pub(super) fn tq2_0(x: &[f32; 256], out: &mut [u8; 66]) -> Option<()> {
    let d = amax(x);
    let id = inverse(d);
    for (half, x) in x.as_chunks::<128>().0.iter().enumerate() {
        for m in 0..32 {
            let code = |n: usize| trit(x[m + 32 * n], id) << (2 * n);
            out[32 * half + m] = (0..4).map(code).sum();
        }
    }
    put_half(out, 64, d).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Powers of two so small that ggml's conversion to a byte is undefined become the least one.
    #[test]
    fn tiny_blocks_have_the_least_power() {
        let mut out = [0; 17];
        for tiny in [1e-45, 1e-40, 2f32.powi(-126)] {
            mxfp4(&[tiny; 32], &mut out).unwrap();
            assert_eq!(out[0], 0);
        }
        mxfp4(&[2f32.powi(-124); 32], &mut out).unwrap();
        assert_eq!(out[0], 1);
        // log2f of the number just below 2^100 is 100.
        mxfp4(&[2f32.powi(100).next_down(); 32], &mut out).unwrap();
        assert_eq!(out[0], 225);
    }
}
