//! One kernel a type: the layouts are drawn beside the scalar code, in `ggml::legacy`, `ggml::k` and `ggml::iq`.

use core::arch::x86_64::*;

use super::lanes::{
    DOWN, add32, bits, each_twice, half, mul16, mul32, nibbles, part, scale, scale_of_scales,
    scales16, store, sub32, table, twice, two, widen,
};
use crate::ggml::{E2M1_DOUBLED, IQ4_VALUES, NVFP4_SCALES, e8m0_half, mxfp4_scalar, q3_scales};

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn f16_8<const STREAM: bool>(bytes: &[u8; 16], out: &mut [f32; 8]) {
    store::<STREAM>(out, _mm256_cvtph_ps(super::lanes::load16(bytes)));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn bf16_8<const STREAM: bool>(bytes: &[u8; 16], out: &mut [f32; 8]) {
    let wide = _mm256_cvtepu16_epi32(super::lanes::load16(bytes));
    store::<STREAM>(out, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q4_0<const STREAM: bool>(block: &[u8; 18], out: &mut [f32; 32]) {
    let codes = about::<8>(nibbles(part::<2, 16, 18>(block)));
    mul32::<STREAM>(out, codes, [scale::<0, 18>(block); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q4_1<const STREAM: bool>(block: &[u8; 20], out: &mut [f32; 32]) {
    let codes = nibbles(part::<4, 16, 20>(block));
    add32::<STREAM>(out, codes, scale::<0, 20>(block), half::<2, 20>(block));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q5_0<const STREAM: bool>(block: &[u8; 22], out: &mut [f32; 32]) {
    // A code without its fifth bit is negative: the nibble below ones is the nibble minus 16.
    let ones = _mm256_set1_epi8(-16);
    let [low, high] = nibbles(part::<6, 16, 22>(block));
    let [low_bits, high_bits] = bits(part::<2, 4, 22>(block));
    let low = _mm256_or_si256(low, _mm256_andnot_si256(low_bits, ones));
    let high = _mm256_or_si256(high, _mm256_andnot_si256(high_bits, ones));
    mul32::<STREAM>(out, [low, high], [scale::<0, 22>(block); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q5_1<const STREAM: bool>(block: &[u8; 24], out: &mut [f32; 32]) {
    let sixteen = _mm256_set1_epi8(16);
    let [low, high] = nibbles(part::<8, 16, 24>(block));
    let [low_bits, high_bits] = bits(part::<4, 4, 24>(block));
    let low = _mm256_or_si256(low, _mm256_and_si256(low_bits, sixteen));
    let high = _mm256_or_si256(high, _mm256_and_si256(high_bits, sixteen));
    add32::<STREAM>(
        out,
        [low, high],
        scale::<0, 24>(block),
        half::<2, 24>(block),
    );
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q8_0<const STREAM: bool>(block: &[u8; 34], out: &mut [f32; 32]) {
    let codes = [
        twice(part::<2, 16, 34>(block)),
        twice(part::<18, 16, 34>(block)),
    ];
    mul32::<STREAM>(out, codes, [scale::<0, 34>(block); 2]);
}

/// Nibbles through a table of signed bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn through(values: &[i8; 16], nibbles: [__m256i; 2]) -> [__m256i; 2] {
    let table = table(values);
    nibbles.map(|nibbles| _mm256_shuffle_epi8(table, nibbles))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn iq4_nl<const STREAM: bool>(block: &[u8; 18], out: &mut [f32; 32]) {
    let codes = through(&IQ4_VALUES, nibbles(part::<2, 16, 18>(block)));
    mul32::<STREAM>(out, codes, [scale::<0, 18>(block); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn mxfp4<const STREAM: bool>(block: &[u8; 17], out: &mut [f32; 32]) {
    // A power below 2^-102 has no normal number 2^24 below it. No real tensor holds one.
    if block[0] < 26 {
        return mxfp4_scalar(block, out);
    }
    let codes = through(&E2M1_DOUBLED, nibbles(part::<1, 16, 17>(block)));
    mul32::<STREAM>(out, codes, [_mm256_set1_ps(e8m0_half(block[0]) * DOWN); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nvfp4<const STREAM: bool>(block: &[u8; 36], out: &mut [f32; 64]) {
    let scales = part::<0, 4, 36>(block).map(|code| NVFP4_SCALES[code as usize]);
    let bytes = part::<4, 32, 36>(block).as_chunks::<8>().0;
    let table = table(&E2M1_DOUBLED);
    let groups = out.as_chunks_mut().0.iter_mut().zip(bytes);
    for ((out, bytes), scale) in groups.zip(scales) {
        // Eight bytes' low nibbles, then their high ones.
        let bytes = _mm256_set1_epi64x(i64::from_le_bytes(*bytes));
        let both = _mm256_blend_epi32::<0b1100_1100>(bytes, _mm256_srli_epi16::<4>(bytes));
        let nibbles = _mm256_and_si256(both, _mm256_set1_epi8(15));
        let codes = _mm256_shuffle_epi8(table, nibbles);
        mul16::<STREAM>(out, codes, _mm256_set1_ps(scale * DOWN));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q2_k<const STREAM: bool>(block: &[u8; 84], out: &mut [f32; 256]) {
    let [scales, mins] = nibbles(part::<0, 16, 84>(block));
    let scales = scales16(scales, scale_of_scales::<80, 84>(block));
    let mins = scales16(mins, scale::<82, 84>(block));
    let bytes = part::<16, 64, 84>(block).as_chunks().0;
    let halves = out.as_chunks_mut::<128>().0.iter_mut().zip(bytes);
    let scales = scales
        .as_chunks::<8>()
        .0
        .iter()
        .zip(mins.as_chunks::<8>().0);
    for ((out, bytes), (scales, mins)) in halves.zip(scales) {
        let mut codes = each_twice(bytes);
        let scales = scales.as_chunks().0.iter().zip(mins.as_chunks().0);
        for (out, (scales, mins)) in out.as_chunks_mut().0.iter_mut().zip(scales) {
            let low = codes.map(|codes| _mm256_and_si256(codes, _mm256_set1_epi8(3)));
            sub32::<STREAM>(out, low, two(scales), two(mins));
            codes = codes.map(|codes| _mm256_srli_epi16::<2>(codes));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q3_k<const STREAM: bool>(block: &[u8; 110], out: &mut [f32; 256]) {
    let scales = q3_scales(part::<96, 12, 110>(block));
    let scales = scales16(table(&scales), scale_of_scales::<108, 110>(block));
    let mut high = each_twice(part::<0, 32, 110>(block));
    let bytes = part::<32, 64, 110>(block).as_chunks().0;
    let halves = out.as_chunks_mut::<128>().0.iter_mut().zip(bytes);
    for ((out, bytes), scales) in halves.zip(scales.as_chunks::<8>().0) {
        let mut codes = each_twice(bytes);
        for (out, scales) in out.as_chunks_mut().0.iter_mut().zip(scales.as_chunks().0) {
            let low = codes.map(|codes| _mm256_and_si256(codes, _mm256_set1_epi8(3)));
            let bits = high.map(|high| _mm256_slli_epi16::<2>(high));
            mul32::<STREAM>(out, about::<4>(with_bit::<4>(low, bits)), two(scales));
            codes = codes.map(|codes| _mm256_srli_epi16::<2>(codes));
            high = high.map(|high| _mm256_srli_epi16::<1>(high));
        }
    }
}

/// The codes with the bits `MASK` of the bytes beside them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_bit<const MASK: i8>(codes: [__m256i; 2], bits: [__m256i; 2]) -> [__m256i; 2] {
    let [bits_a, bits_b] = bits.map(|bits| _mm256_and_si256(bits, _mm256_set1_epi8(MASK)));
    let [a, b] = codes;
    [_mm256_or_si256(a, bits_a), _mm256_or_si256(b, bits_b)]
}

/// The codes less their zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn about<const ZERO: i8>(codes: [__m256i; 2]) -> [__m256i; 2] {
    codes.map(|codes| _mm256_sub_epi8(codes, _mm256_set1_epi8(ZERO)))
}

/// The eight scales (for codes) and minima of `Q4_K` and `Q5_K` (`ggml::scale_min`), four bytes at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales_mins(bytes: &[u8; 12], d: __m256, m: __m256) -> ([f32; 8], [f32; 8]) {
    let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let high = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let eight = |low: u32, high: u32| _mm256_set1_epi64x((low as u64 | (high as u64) << 32) as i64);
    let [scale, _] = widen(eight(a & 0x3F3F_3F3F, c & 0x0F0F_0F0F | high(a)));
    let [min, _] = widen(eight(b & 0x3F3F_3F3F, c >> 4 & 0x0F0F_0F0F | high(b)));
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    store::<false>(&mut scales, _mm256_mul_ps(scale, d));
    store::<false>(&mut mins, _mm256_mul_ps(min, m));
    (scales, mins)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q4_k<const STREAM: bool>(block: &[u8; 144], out: &mut [f32; 256]) {
    let packed = part::<4, 12, 144>(block);
    let (scales, mins) = scales_mins(
        packed,
        scale_of_scales::<0, 144>(block),
        scale::<2, 144>(block),
    );
    let bytes = part::<16, 128, 144>(block).as_chunks::<32>().0;
    let scales = scales.as_chunks().0.iter().zip(mins.as_chunks().0);
    let chunks = out.as_chunks_mut::<64>().0.iter_mut().zip(bytes);
    for ((out, bytes), (scales, mins)) in chunks.zip(scales) {
        let [low_a, high_a] = nibbles(part::<0, 16, 32>(bytes));
        let [low_b, high_b] = nibbles(part::<16, 16, 32>(bytes));
        let groups = out.as_chunks_mut().0.iter_mut();
        let codes = [[low_a, low_b], [high_a, high_b]];
        for (((out, codes), d), m) in groups.zip(codes).zip(two(scales)).zip(two(mins)) {
            sub32::<STREAM>(out, codes, [d; 2], [m; 2]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q5_k<const STREAM: bool>(block: &[u8; 176], out: &mut [f32; 256]) {
    let packed = part::<4, 12, 176>(block);
    let (scales, mins) = scales_mins(
        packed,
        scale_of_scales::<0, 176>(block),
        scale::<2, 176>(block),
    );
    let mut fifth = each_twice(part::<16, 32, 176>(block));
    let bytes = part::<48, 128, 176>(block).as_chunks::<32>().0;
    let scales = scales.as_chunks().0.iter().zip(mins.as_chunks().0);
    let chunks = out.as_chunks_mut::<64>().0.iter_mut().zip(bytes);
    for ((out, bytes), (scales, mins)) in chunks.zip(scales) {
        let [low_a, high_a] = nibbles(part::<0, 16, 32>(bytes));
        let [low_b, high_b] = nibbles(part::<16, 16, 32>(bytes));
        let low_bits = fifth.map(|fifth| _mm256_slli_epi16::<4>(fifth));
        let high_bits = fifth.map(|fifth| _mm256_slli_epi16::<3>(fifth));
        let low = with_bit::<16>([low_a, low_b], low_bits);
        let high = with_bit::<16>([high_a, high_b], high_bits);
        let groups = out.as_chunks_mut().0.iter_mut().zip([low, high]);
        for (((out, codes), d), m) in groups.zip(two(scales)).zip(two(mins)) {
            sub32::<STREAM>(out, codes, [d; 2], [m; 2]);
        }
        fifth = fifth.map(|fifth| _mm256_srli_epi16::<2>(fifth));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q6_k<const STREAM: bool>(block: &[u8; 210], out: &mut [f32; 256]) {
    let scales = twice(part::<192, 16, 210>(block));
    let scales = scales16(scales, scale_of_scales::<208, 210>(block));
    let low = part::<0, 128, 210>(block).as_chunks::<64>().0;
    let high = part::<128, 64, 210>(block).as_chunks().0;
    let halves = out
        .as_chunks_mut::<128>()
        .0
        .iter_mut()
        .zip(low.iter().zip(high));
    for ((out, (low, high)), scales) in halves.zip(scales.as_chunks::<8>().0) {
        let high = each_twice(high);
        let [low_a, up_a] = nibbles(part::<0, 16, 64>(low));
        let [low_b, up_b] = nibbles(part::<16, 16, 64>(low));
        let [low_c, up_c] = nibbles(part::<32, 16, 64>(low));
        let [low_d, up_d] = nibbles(part::<48, 16, 64>(low));
        let quarters = [
            (
                [low_a, low_b],
                high.map(|high| _mm256_slli_epi16::<4>(high)),
            ),
            (
                [low_c, low_d],
                high.map(|high| _mm256_slli_epi16::<2>(high)),
            ),
            ([up_a, up_b], high),
            ([up_c, up_d], high.map(|high| _mm256_srli_epi16::<2>(high))),
        ];
        let quarters = out.as_chunks_mut().0.iter_mut().zip(quarters);
        for ((out, (low, high)), scales) in quarters.zip(scales.as_chunks().0) {
            let codes = about::<32>(with_bit::<0x30>(low, high));
            mul32::<STREAM>(out, codes, two(scales));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn iq4_xs<const STREAM: bool>(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = _mm256_cvtss_f32(scale::<0, 136>(block));
    let mut high = u16::from_le_bytes(*part::<2, 2, 136>(block));
    let mut low = u32::from_le_bytes(*part::<4, 4, 136>(block));
    let bytes = part::<8, 128, 136>(block).as_chunks().0;
    for (out, bytes) in out.as_chunks_mut().0.iter_mut().zip(bytes) {
        let scale = (low & 15) as i32 + ((high & 3) << 4) as i32 - 32;
        let d = _mm256_set1_ps(d * scale as f32);
        mul32::<STREAM>(out, through(&IQ4_VALUES, nibbles(bytes)), [d; 2]);
        (low, high) = (low >> 4, high >> 2);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tq2_0<const STREAM: bool>(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = scale::<64, 66>(block);
    let bytes = part::<0, 64, 66>(block).as_chunks().0;
    for (out, bytes) in out.as_chunks_mut::<128>().0.iter_mut().zip(bytes) {
        let mut codes = each_twice(bytes);
        for out in out.as_chunks_mut().0 {
            let low = codes.map(|codes| _mm256_and_si256(codes, _mm256_set1_epi8(3)));
            mul32::<STREAM>(out, about::<1>(low), [d; 2]);
            codes = codes.map(|codes| _mm256_srli_epi16::<2>(codes));
        }
    }
}
