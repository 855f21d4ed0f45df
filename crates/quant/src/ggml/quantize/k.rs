//! Super-blocks of 256 elements with quantised scales.

use super::put_half;
use super::search::{Affine, EPSILON, affine, nearest, symmetric, three_bits};
use crate::ggml::{q3_scales, scale_min};

/// Codes of a half of 128 as four 2-bit fields a byte: elements `l`, `l + 32`, `l + 64`, `l + 96`.
fn pack_pairs(codes: &[u8; 256], out: &mut [u8]) {
    let halves = codes.as_chunks::<128>().0.iter();
    for (out, codes) in out.as_chunks_mut::<32>().0.iter_mut().zip(halves) {
        for (l, out) in out.iter_mut().enumerate() {
            let field = |n: usize| (codes[l + 32 * n] & 3) << (2 * n);
            *out = (0..4).map(field).sum();
        }
    }
}

/// Codes of 64 as nibbles of 32 bytes: the low ones, then the high ones.
fn pack_nibbles(codes: &[u8; 256], out: &mut [u8]) {
    let chunks = codes.as_chunks::<64>().0.iter();
    for (out, codes) in out.as_chunks_mut::<32>().0.iter_mut().zip(chunks) {
        let (low, high) = codes.split_at(32);
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = (low & 15) | (high << 4);
        }
    }
}

/// The codes of a group once its scale is rounded; they stay what the search found where that scale is zero.
fn again<const N: usize>(codes: &mut [u8; N], x: &[f32; N], d: f32, m: f32, most: i32) {
    if d == 0.0 {
        return;
    }
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest((x + m) / d).clamp(0, most) as u8;
    }
}

pub(super) fn q2_k(x: &[f32; 256], out: &mut [u8; 84]) -> Option<()> {
    const HOW: Affine = Affine {
        most: 3,
        first: -0.5,
        step: 0.1,
        steps: 15,
        magnitudes: true,
    };
    let mut codes = [0; 256];
    let (mut scales, mut mins) = ([0.0; 16], [0.0; 16]);
    let groups = x.as_chunks::<16>().0;
    for ((x, codes), (scale, min)) in groups
        .iter()
        .zip(codes.as_chunks_mut().0)
        .zip(scales.iter_mut().zip(&mut mins))
    {
        (*scale, *min) = affine(&HOW, x, &x.map(f32::abs), codes);
    }
    // Four bits each; nothing where there is no scale, or no minimum, at all.
    let (max_scale, max_min) = (most(&scales), most(&mins));
    let four = |max: f32, value: f32| match max > 0.0 {
        true => nearest(15.0 / max * value),
        false => 0,
    };
    for ((out, &scale), &min) in out.iter_mut().zip(&scales).zip(&mins) {
        *out = four(max_scale, scale) as u8 | (four(max_min, min) << 4) as u8;
    }
    let d = put_half(out, 80, max_scale / 15.0)?;
    let dmin = put_half(out, 82, max_min / 15.0)?;
    for ((codes, x), &byte) in codes.as_chunks_mut().0.iter_mut().zip(groups).zip(&*out) {
        again(
            codes,
            x,
            d * (byte & 15) as f32,
            dmin * (byte >> 4) as f32,
            3,
        );
    }
    pack_pairs(&codes, &mut out[16..80]);
    Some(())
}

/// The largest of numbers, at least zero.
fn most(values: &[f32]) -> f32 {
    values.iter().fold(
        0.0,
        |most: f32, &value| if value > most { value } else { most },
    )
}

pub(super) fn q3_k(x: &[f32; 256], out: &mut [u8; 110]) -> Option<()> {
    let mut codes = [0; 256];
    let mut scales = [0.0; 16];
    let groups = x.as_chunks::<16>().0;
    for ((scale, x), codes) in scales.iter_mut().zip(groups).zip(codes.as_chunks_mut().0) {
        *scale = three_bits(x, codes);
    }
    let max_scale = super::largest(&scales);
    let mut packed = [0; 12];
    let mut d = 0.0;
    if max_scale != 0.0 {
        let iscale = -32.0 / max_scale;
        for (j, scale) in scales.iter().enumerate() {
            let level = ((nearest(iscale * scale) as i8).clamp(-32, 31) + 32) as u8;
            packed[j % 8] |= (level & 15) << (4 * (j / 8));
            packed[8 + j % 4] |= (level >> 4) << (2 * (j / 4));
        }
        d = 1.0 / iscale;
    }
    out[96..108].copy_from_slice(&packed);
    let d = put_half(out, 108, d)?;
    let levels = q3_scales(&packed);
    for ((codes, x), level) in codes
        .as_chunks_mut::<16>()
        .0
        .iter_mut()
        .zip(groups)
        .zip(levels)
    {
        let d = d * level as f32;
        if d != 0.0 {
            *codes = x.map(|x| (nearest(x / d).clamp(-4, 3) + 4) as u8);
        }
    }
    for (m, out) in out[..32].iter_mut().enumerate() {
        let bit = |g: usize| (codes[32 * g + m] >> 2 & 1) << g;
        *out = (0..8).map(bit).sum();
    }
    pack_pairs(&codes, &mut out[32..96]);
    Some(())
}

/// What `Q4_K` and `Q5_K` have in common: codes, with d, dmin and twelve bytes of scales written at the block's start.
fn affine_k<const B: usize>(how: &Affine, x: &[f32; 256], out: &mut [u8; B]) -> Option<[u8; 256]> {
    let mut codes = [0; 256];
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    let groups = x.as_chunks::<32>().0;
    for ((x, codes), (scale, min)) in groups
        .iter()
        .zip(codes.as_chunks_mut().0)
        .zip(scales.iter_mut().zip(&mut mins))
    {
        let sum = x.iter().fold(0.0_f32, |sum, x| sum + x * x);
        let mean = (sum / 32.0).sqrt();
        (*scale, *min) = affine(how, x, &x.map(|x| mean + x.abs()), codes);
    }
    let (max_scale, max_min) = (most(&scales), most(&mins));
    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let packed = pack_scales(
        scales.map(|scale| (nearest(inverse(max_scale) * scale) as u8).min(63)),
        mins.map(|min| (nearest(inverse(max_min) * min) as u8).min(63)),
    );
    out[4..16].copy_from_slice(&packed);
    let d = put_half(out, 0, max_scale / 63.0)?;
    let dmin = put_half(out, 2, max_min / 63.0)?;
    for (j, (codes, x)) in codes.as_chunks_mut().0.iter_mut().zip(groups).enumerate() {
        let (scale, min) = scale_min(&packed, j);
        again(codes, x, d * scale as f32, dmin * min as f32, how.most);
    }
    Some(codes)
}

/// The inverse of [`scale_min`].
fn pack_scales(scales: [u8; 8], mins: [u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = scales[j] | (scales[j + 4] >> 4) << 6;
        packed[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6;
        packed[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
    packed
}

pub(super) fn q4_k(x: &[f32; 256], out: &mut [u8; 144]) -> Option<()> {
    const HOW: Affine = Affine {
        most: 15,
        first: -1.0,
        step: 0.1,
        steps: 20,
        magnitudes: false,
    };
    let codes = affine_k(&HOW, x, out)?;
    pack_nibbles(&codes, &mut out[16..]);
    Some(())
}

pub(super) fn q5_k(x: &[f32; 256], out: &mut [u8; 176]) -> Option<()> {
    const HOW: Affine = Affine {
        most: 31,
        first: -0.5,
        step: 0.1,
        steps: 15,
        magnitudes: false,
    };
    let codes = affine_k(&HOW, x, out)?;
    for (l, out) in out[16..48].iter_mut().enumerate() {
        let bit = |g: usize| (codes[32 * g + l] >> 4 & 1) << g;
        *out = (0..8).map(bit).sum();
    }
    pack_nibbles(&codes, &mut out[48..]);
    Some(())
}

pub(super) fn q6_k(x: &[f32; 256], out: &mut [u8; 210]) -> Option<()> {
    let groups = x.as_chunks::<16>().0;
    let mut scales = [0.0; 16];
    let mut codes = [0; 256];
    for ((scale, x), codes) in scales.iter_mut().zip(groups).zip(codes.as_chunks_mut().0) {
        *scale = symmetric(x, 32, codes);
    }
    let max_scale = super::largest(&scales);
    *out = [0; 210];
    if max_scale.abs() < EPSILON {
        return Some(());
    }
    let iscale = -128.0 / max_scale;
    let d = put_half(out, 208, 1.0 / iscale)?;
    let levels = scales.map(|scale| nearest(iscale * scale).min(127) as i8);
    for ((codes, x), level) in codes
        .as_chunks_mut::<16>()
        .0
        .iter_mut()
        .zip(groups)
        .zip(levels)
    {
        let d = d * level as f32;
        if d != 0.0 {
            *codes = x.map(|x| (nearest(x / d).clamp(-32, 31) + 32) as u8);
        }
    }
    for (out, level) in out[192..208].iter_mut().zip(levels) {
        *out = level as u8;
    }
    for (half, q) in codes.as_chunks::<128>().0.iter().enumerate() {
        for l in 0..32 {
            out[64 * half + l] = (q[l] & 15) | q[l + 64] << 4;
            out[64 * half + l + 32] = (q[l + 32] & 15) | q[l + 96] << 4;
            let high = |n: usize| (q[l + 32 * n] >> 4) << (2 * n);
            out[128 + 32 * half + l] = (0..4).map(high).sum();
        }
    }
    Some(())
}
