//! Bytes in, floats out: what the kernels of `blocks` are made of.
//!
//! Invariants:
//! 1. These functions run only where an [`Avx2`](super::Avx2) was found.
//! 2. Loads and stores go through references to arrays of the size that they touch, with instructions that ask for no
//!    alignment, except in 3.
//! 3. `STREAM` is true only where the output's first element lies on a multiple of 32 bytes; every store goes to a multiple
//!    of 8 elements from there, and `_mm256_stream_ps` needs just that.
//!
//! Sixteen codes are sixteen bytes, the same in both halves of a register ([`twice`]): one shuffle within the halves then puts
//! eight of them on top of eight 32-bit lanes, which is the code times 2^24 as a signed integer. Scales are multiplied by
//! 2^-24 once, in [`scale`]. Both are exact, and so is the product (see `ggml::k`): a fused multiplication gives the scalar
//! code's bits. `vpmovsxbd` would do the same with two operations in place of one, and a code from the upper half needs
//! another: on a Zen 3 that was half as fast.
#![allow(unsafe_code)]

use core::arch::x86_64::*;

/// What a scale is multiplied by, for codes are 2^24 times too large.
pub(super) const DOWN: f32 = 1.0 / (1 << 24) as f32;

/// `N` bytes of a block from `AT` on, which the block has.
#[inline]
pub(super) fn part<const AT: usize, const N: usize, const B: usize>(block: &[u8; B]) -> &[u8; N] {
    const { assert!(AT + N <= B) };
    block[AT..].first_chunk().unwrap_or(&[0; N])
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: invariant 2.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// Sixteen bytes in both halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn twice(bytes: &[u8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(load16(bytes))
}

/// The two halves of 32 bytes, each [`twice`]. Loading them so is free; to spread a register's halves is not.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn each_twice(bytes: &[u8; 32]) -> [__m256i; 2] {
    [
        twice(part::<0, 16, 32>(bytes)),
        twice(part::<16, 16, 32>(bytes)),
    ]
}

/// A table of sixteen signed bytes for [`_mm256_shuffle_epi8`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn table(values: &[i8; 16]) -> __m256i {
    twice(&values.map(|value| value as u8))
}

/// The binary16 at `AT`, eight times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn half<const AT: usize, const B: usize>(block: &[u8; B]) -> __m256 {
    let bits = u16::from_le_bytes(*part::<AT, 2, B>(block));
    _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32)))
}

/// The binary16 at `AT` as a scale of codes, eight times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scale<const AT: usize, const B: usize>(block: &[u8; B]) -> __m256 {
    _mm256_mul_ps(half::<AT, B>(block), _mm256_set1_ps(DOWN))
}

/// The binary16 at `AT` as a scale of codes that are themselves scales of codes, eight times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scale_of_scales<const AT: usize, const B: usize>(block: &[u8; B]) -> __m256 {
    _mm256_mul_ps(half::<AT, B>(block), _mm256_set1_ps(DOWN * DOWN))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store<const STREAM: bool>(out: &mut [f32; 8], values: __m256) {
    if STREAM {
        // SAFETY: invariants 2 and 3.
        unsafe { _mm256_stream_ps(out.as_mut_ptr(), values) }
    } else {
        // SAFETY: invariant 2.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) }
    }
}

/// Sixteen codes that are there [`twice`], times 2^24.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen(codes: __m256i) -> [__m256; 2] {
    // Byte i to the top of lane i, zeros (an index with its top bit set) below.
    let low = _mm256_setr_epi32(
        0x0080_8080,
        0x0180_8080,
        0x0280_8080,
        0x0380_8080,
        0x0480_8080,
        0x0580_8080,
        0x0680_8080,
        0x0780_8080,
    );
    let high = _mm256_or_si256(low, _mm256_set1_epi32(0x0800_0000));
    [low, high].map(|places| _mm256_cvtepi32_ps(_mm256_shuffle_epi8(codes, places)))
}

/// `codes d`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn mul16<const STREAM: bool>(out: &mut [f32; 16], codes: __m256i, d: __m256) {
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip(widen(codes)) {
        store::<STREAM>(out, _mm256_mul_ps(codes, d));
    }
}

/// `codes d + m`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add16<const STREAM: bool>(out: &mut [f32; 16], codes: __m256i, d: __m256, m: __m256) {
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip(widen(codes)) {
        store::<STREAM>(out, _mm256_fmadd_ps(codes, d, m));
    }
}

/// `codes d - m`: not [`add16`] of the negated minimum, which has another zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sub16<const STREAM: bool>(out: &mut [f32; 16], codes: __m256i, d: __m256, m: __m256) {
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip(widen(codes)) {
        store::<STREAM>(out, _mm256_fmsub_ps(codes, d, m));
    }
}

/// `codes d`, of 32 codes that are there [`twice`], with a scale for each 16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn mul32<const STREAM: bool>(out: &mut [f32; 32], codes: [__m256i; 2], d: [__m256; 2]) {
    for ((out, codes), d) in out.as_chunks_mut().0.iter_mut().zip(codes).zip(d) {
        mul16::<STREAM>(out, codes, d);
    }
}

/// `codes d + m`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add32<const STREAM: bool>(
    out: &mut [f32; 32],
    codes: [__m256i; 2],
    d: __m256,
    m: __m256,
) {
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip(codes) {
        add16::<STREAM>(out, codes, d, m);
    }
}

/// `codes d - m`, with a scale and a minimum for each 16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sub32<const STREAM: bool>(
    out: &mut [f32; 32],
    codes: [__m256i; 2],
    d: [__m256; 2],
    m: [__m256; 2],
) {
    let parts = out.as_chunks_mut().0.iter_mut().zip(codes);
    for (((out, codes), d), m) in parts.zip(d).zip(m) {
        sub16::<STREAM>(out, codes, d, m);
    }
}

/// Sixteen bytes of nibbles in split halves: the low ones, then the high ones, each [`twice`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nibbles(bytes: &[u8; 16]) -> [__m256i; 2] {
    let bytes = twice(bytes);
    let mask = _mm256_set1_epi8(15);
    [bytes, _mm256_srli_epi16::<4>(bytes)].map(|bytes| _mm256_and_si256(bytes, mask))
}

/// Bytes of all ones where the element's bit is set, of 16 elements each and each [`twice`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn bits(bytes: &[u8; 4]) -> [__m256i; 2] {
    let word = _mm256_set1_epi32(i32::from_le_bytes(*bytes));
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let low = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0, 0x0101_0101_0101_0101);
    let high = _mm256_or_si256(low, _mm256_set1_epi8(2));
    [low, high].map(|spread| {
        let bytes = _mm256_shuffle_epi8(word, spread);
        _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit)
    })
}

/// Sixteen codes that are there [`twice`], times `d`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scales16(codes: __m256i, d: __m256) -> [f32; 16] {
    let mut scales = [0.0; 16];
    mul16::<false>(&mut scales, codes, d);
    scales
}

/// Two scales of sixteen, each eight times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn two(scales: &[f32; 2]) -> [__m256; 2] {
    [_mm256_set1_ps(scales[0]), _mm256_set1_ps(scales[1])]
}
