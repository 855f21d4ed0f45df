//! Super-blocks of 256 elements with quantised scales, and the ternary types, to `f32`: one function a type, as ggml has
//! them.
//!
//! The products of a scale (binary16, times an integer of up to 7 bits) with a code fit 24 bits, so they are exact in
//! `f32` and only the subtraction of a minimum rounds: a kernel may multiply in another order, or fuse, and give the same
//! bits.

use super::{f16_at, scale_min};

/// Sub-array of a block; the caller's numbers lie within it.
#[inline]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .unwrap_or(&[0; N])
}

/// 16 scales at 0 (scale low, minimum high nibble), 2-bit codes at 16, d at 80, dmin at 82: `d s q - dmin m`.
///
/// A byte of the codes holds elements `l`, `l + 32`, `l + 64`, `l + 96` of a half of 128, lowest first.
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, min) = (f16_at(block, 80), f16_at(block, 82));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = block[group];
        let (d, m) = (d * (scale & 15) as f32, min * (scale >> 4) as f32);
        let (half, shift) = (group / 8, group % 8 / 2 * 2);
        let codes: &[u8; 16] = part(block, 16 + 32 * half + 16 * (group % 2));
        for (out, code) in out.iter_mut().zip(codes) {
            *out = d * (code >> shift & 3) as f32 - m;
        }
    }
}

/// The sixteen 6-bit scales of a `Q3_K` block: low nibbles in bytes 0 to 7 (scale `j` low, `j + 8` high), the high two bits
/// in bytes 8 to 11, four to a byte.
#[inline]
pub(crate) fn q3_scales(bytes: &[u8; 12]) -> [i8; 16] {
    std::array::from_fn(|j| {
        let low = bytes[j % 8] >> (4 * (j / 8)) & 15;
        let high = bytes[8 + j % 4] >> (2 * (j / 4)) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// High bits at 0, 2-bit codes at 32, 12 bytes of scales at 96, d at 108: `d (s - 32) (q - 4)` with q of three bits.
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(block, 108);
    let scales = q3_scales(part(block, 96));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let d = d * scales[group] as f32;
        let (half, shift) = (group / 8, group % 8 / 2 * 2);
        let high: &[u8; 16] = part(block, 16 * (group % 2));
        let codes: &[u8; 16] = part(block, 32 + 32 * half + 16 * (group % 2));
        for ((out, code), high) in out.iter_mut().zip(codes).zip(high) {
            let bit = high >> (group / 2) & 1;
            *out = d * ((code >> shift & 3 | bit << 2) as i8 - 4) as f32;
        }
    }
}

/// d at 0, dmin at 2, 12 bytes of scales at 4, nibbles at 16: `d s q - dmin m`. 32 bytes hold two groups of 32: the
/// low nibbles, then the high ones.
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, min) = (f16_at(block, 0), f16_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, m) = scale_min(part(block, 4), group);
        let (d, m) = (d * scale as f32, min * m as f32);
        let codes: &[u8; 32] = part(block, 16 + 32 * (group / 2));
        for (out, code) in out.iter_mut().zip(codes) {
            *out = d * (code >> (4 * (group % 2)) & 15) as f32 - m;
        }
    }
}

/// As `Q4_K`, with the fifth bits at 16 (bit `g` of byte `l` is element `l` of group `g`) and the nibbles at 48.
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, min) = (f16_at(block, 0), f16_at(block, 2));
    let high: &[u8; 32] = part(block, 16);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, m) = scale_min(part(block, 4), group);
        let (d, m) = (d * scale as f32, min * m as f32);
        let codes: &[u8; 32] = part(block, 48 + 32 * (group / 2));
        for ((out, code), high) in out.iter_mut().zip(codes).zip(high) {
            let q = code >> (4 * (group % 2)) & 15 | (high >> group & 1) << 4;
            *out = d * q as f32 - m;
        }
    }
}

/// Low nibbles at 0, high two bits at 128, 16 signed scales at 192, d at 208: `d s (q - 32)`.
///
/// In a half of 128, nibble bytes `l` and `l + 32` hold elements `l`, `l + 64` and `l + 32`, `l + 96`; the byte of high bits
/// `l` holds those of elements `l`, `l + 32`, `l + 64`, `l + 96`, lowest first.
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16_at(block, 208);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let d = d * block[192 + group] as i8 as f32;
        let (half, quarter, odd) = (group / 8, group % 8 / 2, group % 2);
        let low: &[u8; 16] = part(block, 64 * half + 32 * (quarter % 2) + 16 * odd);
        let high: &[u8; 16] = part(block, 128 + 32 * half + 16 * odd);
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let q = low >> (4 * (quarter / 2)) & 15 | (high >> (2 * quarter) & 3) << 4;
            *out = d * (q as i8 - 32) as f32;
        }
    }
}

/// The ternary digit `n` of a byte: five digits are written as a fraction of 256, so a multiplication brings each of them
/// to the top.
#[inline]
fn trit(byte: u8, n: usize) -> i8 {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let rest = byte.wrapping_mul(POWERS[n]);
    ((rest as u16 * 3) >> 8) as i8 - 1
}

/// 48 bytes of five digits, 4 bytes of four at 48, d at 52: `t d`. Digit `n` of the bytes goes to places that are as far
/// apart as there are bytes: 32, then 16, then 4.
pub(super) fn tq1_0(block: &[u8; 54], out: &mut [f32; 256]) {
    let d = f16_at(block, 52);
    let mut at = 0;
    for (start, width, digits) in [(0, 32, 5), (32, 16, 5), (48, 4, 4)] {
        for n in 0..digits {
            for byte in &block[start..start + width] {
                out[at] = trit(*byte, n) as f32 * d;
                at += 1;
            }
        }
    }
}

/// 2-bit codes at 0, d at 64: `(q - 1) d`. A byte holds elements `l`, `l + 32`, `l + 64`, `l + 96` of a half of 128.
pub(super) fn tq2_0(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(block, 64);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let codes: &[u8; 32] = part(block, 32 * (group / 4));
        for (out, code) in out.iter_mut().zip(codes) {
            *out = ((code >> (2 * (group % 4)) & 3) as i8 - 1) as f32 * d;
        }
    }
}
