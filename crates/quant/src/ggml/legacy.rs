//! The plain types, and blocks of up to 128 elements with one scale, to `f32`: one function a type, as ggml has them,
//! with nothing clever. What the kernels give is held against these.
//!
//! Nibbles lie in *split halves*: byte `j` of a block of 32 holds element `j` low and element `j + 16` high.

use super::{E2M1_DOUBLED, IQ4_VALUES, NVFP4_SCALES, e8m0_half, f16_at, u32_at};
use crate::numbers::bf16_to_f32;

pub(super) fn f32(bytes: &[u8; 4], out: &mut [f32; 1]) {
    out[0] = f32::from_le_bytes(*bytes);
}

pub(super) fn f16(bytes: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = f16_at(bytes, 0);
}

pub(super) fn bf16(bytes: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = bf16_to_f32(u16::from_le_bytes(*bytes));
}

/// The two nibbles of each of 16 bytes in split halves, with bit `i` of `high` as element `i`'s fifth bit.
#[inline]
fn codes(block: &[u8], high: u32) -> [u8; 32] {
    let mut codes = [0; 32];
    for (j, &byte) in block.iter().take(16).enumerate() {
        codes[j] = (byte & 15) | ((high >> j & 1) as u8 * 16);
        codes[j + 16] = (byte >> 4) | ((high >> (j + 16) & 1) as u8 * 16);
    }
    codes
}

/// d f16 at 0, 16 bytes of nibbles at 2: `(q - 8) d`.
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (out, q) in out.iter_mut().zip(codes(&block[2..], 0)) {
        *out = (q as i8 - 8) as f32 * d;
    }
}

/// d f16 at 0, m f16 at 2, nibbles at 4: `q d + m`.
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (out, q) in out.iter_mut().zip(codes(&block[4..], 0)) {
        *out = q as f32 * d + m;
    }
}

/// d f16 at 0, the fifth bits at 2, nibbles at 6: `(q - 16) d`.
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (out, q) in out.iter_mut().zip(codes(&block[6..], u32_at(block, 2))) {
        *out = (q as i8 - 16) as f32 * d;
    }
}

/// d f16 at 0, m f16 at 2, the fifth bits at 4, nibbles at 8: `q d + m`.
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (out, q) in out.iter_mut().zip(codes(&block[8..], u32_at(block, 4))) {
        *out = q as f32 * d + m;
    }
}

/// d f16 at 0, 32 signed bytes at 2: `q d`.
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = q as i8 as f32 * d;
    }
}

/// d f16 at 0, nibbles at 2: `values[q] d`.
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (out, q) in out.iter_mut().zip(codes(&block[2..], 0)) {
        *out = d * IQ4_VALUES[q as usize & 15] as f32;
    }
}

/// An e8m0 at 0, nibbles at 1: `e2m1(q) 2^(e - 127)`.
pub(crate) fn mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    let d = e8m0_half(block[0]);
    for (out, q) in out.iter_mut().zip(codes(&block[1..], 0)) {
        *out = E2M1_DOUBLED[q as usize & 15] as f32 * d;
    }
}

/// Four unsigned e4m3 at 0, then for each of them 8 bytes of nibbles in split halves: `e2m1(q) d`.
pub(super) fn nvfp4(block: &[u8; 36], out: &mut [f32; 64]) {
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let d = NVFP4_SCALES[block[group] as usize];
        for j in 0..8 {
            let byte = block[4 + 8 * group + j];
            out[j] = E2M1_DOUBLED[byte as usize & 15] as f32 * d;
            out[j + 8] = E2M1_DOUBLED[byte as usize >> 4] as f32 * d;
        }
    }
}

/// d f16 at 0, 128 bits at 2, lowest first: d, or -d where the bit is clear.
pub(super) fn q1_0(block: &[u8; 18], out: &mut [f32; 128]) {
    let d = f16_at(block, 0);
    for (j, out) in out.iter_mut().enumerate() {
        let set = block[2 + j / 8] >> (j % 8) & 1 == 1;
        *out = if set { d } else { -d };
    }
}

/// d f16 at 0, 64 codes of 2 bits at 2, lowest first: `(q - 1) d`.
pub(super) fn q2_0(block: &[u8; 18], out: &mut [f32; 64]) {
    let d = f16_at(block, 0);
    for (j, out) in out.iter_mut().enumerate() {
        let q = block[2 + j / 4] >> (2 * (j % 4)) & 3;
        *out = (q as i8 - 1) as f32 * d;
    }
}
