//! AVX2 with FMA and F16C.
//!
//! Invariants:
//! 1. An [`Avx2`] exists only where [`Avx2::detect`] saw all three features, so a call through one may run code that needs
//!    them.
//! 2. Loads and stores go through references to arrays of the size that they touch, with instructions that ask for no
//!    alignment, except in 3.
//! 3. `STREAM` is true only where the output's first element lies on a multiple of 32 bytes; every store goes to a multiple
//!    of 8 elements from there, and `_mm256_stream_ps` needs just that.
//!
//! Every kernel unpacks a block's codes to bytes in their elements' order, then widens 8 bytes at a time, converts and
//! multiplies. Products are exact (see `ggml::k`), so a fused multiplication gives the scalar code's bits.
#![allow(unsafe_code)]

use core::arch::x86_64::*;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::ggml::{E2M1_DOUBLED, GgmlType, IQ4_VALUES, NVFP4_SCALES, e8m0_half, q3_scales};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Avx2> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }

    /// Whether there is a kernel for the type; if so, `out` is filled.
    pub(super) fn dequantize(
        self,
        ty: GgmlType,
        bytes: &[u8],
        out: &mut [f32],
        stream: bool,
    ) -> bool {
        if stream && out.as_ptr().addr().is_multiple_of(32) {
            // SAFETY: invariants 1 and 3: the address was just looked at.
            unsafe { run::<true>(ty, bytes, out) }
        } else {
            // SAFETY: invariant 1.
            unsafe { run::<false>(ty, bytes, out) }
        }
    }

    pub(super) fn to_f16(self, values: &[f32], out: &mut [f16]) {
        // SAFETY: invariant 1.
        unsafe { to_f16(values, out) }
    }

    pub(super) fn to_bf16(self, values: &[f32], out: &mut [bf16]) {
        // SAFETY: invariant 1.
        unsafe { to_bf16(values, out) }
    }
}

/// # Safety
///
/// Invariants 1 and 3.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run<const STREAM: bool>(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> bool {
    macro_rules! each {
        ($kernel:ident) => {
            for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
                $kernel::<STREAM>(block, out);
            }
        };
    }
    macro_rules! plain {
        ($kernel:ident, $number:ident) => {{
            let (wide, rest) = out.as_chunks_mut::<8>();
            let (blocks, tail) = bytes.as_chunks::<16>();
            for (block, out) in blocks.iter().zip(wide) {
                $kernel::<STREAM>(block, out);
            }
            for (bytes, out) in tail.as_chunks().0.iter().zip(rest) {
                *out = $number::from_le_bytes(*bytes).to_f32();
            }
        }};
    }
    match ty {
        GgmlType::F16 => plain!(f16_8, f16),
        GgmlType::BF16 => plain!(bf16_8, bf16),
        GgmlType::Q4_0 => each!(q4_0),
        GgmlType::Q4_1 => each!(q4_1),
        GgmlType::Q5_0 => each!(q5_0),
        GgmlType::Q5_1 => each!(q5_1),
        GgmlType::Q8_0 => each!(q8_0),
        GgmlType::Q2_K => each!(q2_k),
        GgmlType::Q3_K => each!(q3_k),
        GgmlType::Q4_K => each!(q4_k),
        GgmlType::Q5_K => each!(q5_k),
        GgmlType::Q6_K => each!(q6_k),
        GgmlType::IQ4_NL => each!(iq4_nl),
        GgmlType::IQ4_XS => each!(iq4_xs),
        GgmlType::TQ2_0 => each!(tq2_0),
        GgmlType::MXFP4 => each!(mxfp4),
        GgmlType::NVFP4 => each!(nvfp4),
        _ => return false,
    }
    if STREAM {
        _mm_sfence();
    }
    true
}

// Bytes in, floats out.

/// `N` bytes of a block from `AT` on, which the block has.
#[inline]
fn part<const AT: usize, const N: usize, const B: usize>(block: &[u8; B]) -> &[u8; N] {
    const { assert!(AT + N <= B) };
    block[AT..].first_chunk().unwrap_or(&[0; N])
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: invariant 2.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: invariant 2.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn table(values: &[i8; 16]) -> __m128i {
    load16(&values.map(|value| value as u8))
}

/// The binary16 at `AT`, eight times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half<const AT: usize, const B: usize>(block: &[u8; B]) -> __m256 {
    let bits = u16::from_le_bytes(*part::<AT, 2, B>(block));
    _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store<const STREAM: bool>(out: &mut [f32; 8], values: __m256) {
    if STREAM {
        // SAFETY: invariants 2 and 3.
        unsafe { _mm256_stream_ps(out.as_mut_ptr(), values) }
    } else {
        // SAFETY: invariant 2.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) }
    }
}

/// Eight signed bytes, the low half of `codes`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(codes: __m128i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))
}

/// `codes d`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mul16<const STREAM: bool>(out: &mut [f32; 16], codes: __m128i, d: __m256) {
    let high = _mm_unpackhi_epi64(codes, codes);
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip([codes, high]) {
        store::<STREAM>(out, _mm256_mul_ps(widen(codes), d));
    }
}

/// `codes d + m`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add16<const STREAM: bool>(out: &mut [f32; 16], codes: __m128i, d: __m256, m: __m256) {
    let high = _mm_unpackhi_epi64(codes, codes);
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip([codes, high]) {
        store::<STREAM>(out, _mm256_fmadd_ps(widen(codes), d, m));
    }
}

/// `codes d - m`: not [`add16`] of the negated minimum, which has another zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sub16<const STREAM: bool>(out: &mut [f32; 16], codes: __m128i, d: __m256, m: __m256) {
    let high = _mm_unpackhi_epi64(codes, codes);
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip([codes, high]) {
        store::<STREAM>(out, _mm256_fmsub_ps(widen(codes), d, m));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(codes: __m256i) -> [__m128i; 2] {
    [
        _mm256_castsi256_si128(codes),
        _mm256_extracti128_si256::<1>(codes),
    ]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mul32<const STREAM: bool>(out: &mut [f32; 32], codes: __m256i, d: [__m256; 2]) {
    for ((out, codes), d) in out.as_chunks_mut().0.iter_mut().zip(halves(codes)).zip(d) {
        mul16::<STREAM>(out, codes, d);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add32<const STREAM: bool>(out: &mut [f32; 32], codes: __m256i, d: __m256, m: __m256) {
    for (out, codes) in out.as_chunks_mut().0.iter_mut().zip(halves(codes)) {
        add16::<STREAM>(out, codes, d, m);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sub32<const STREAM: bool>(out: &mut [f32; 32], codes: __m256i, d: [__m256; 2], m: [__m256; 2]) {
    let parts = out.as_chunks_mut().0.iter_mut().zip(halves(codes));
    for (((out, codes), d), m) in parts.zip(d).zip(m) {
        sub16::<STREAM>(out, codes, d, m);
    }
}

/// Sixteen bytes of nibbles in split halves: the low ones, then the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(bytes: &[u8; 16]) -> __m256i {
    let bytes = load16(bytes);
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// Bytes of all ones where the element's bit is set.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bits(bytes: &[u8; 4]) -> __m256i {
    let word = _mm256_set1_epi32(i32::from_le_bytes(*bytes));
    let spread = _mm256_setr_epi64x(
        0,
        0x0101010101010101,
        0x0202020202020202,
        0x0303030303030303,
    );
    let bytes = _mm256_shuffle_epi8(word, spread);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit)
}

// One kernel a type: the layouts are drawn beside the scalar code.

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn f16_8<const STREAM: bool>(bytes: &[u8; 16], out: &mut [f32; 8]) {
    store::<STREAM>(out, _mm256_cvtph_ps(load16(bytes)));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bf16_8<const STREAM: bool>(bytes: &[u8; 16], out: &mut [f32; 8]) {
    let wide = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load16(bytes)));
    store::<STREAM>(out, _mm256_castsi256_ps(wide));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q4_0<const STREAM: bool>(block: &[u8; 18], out: &mut [f32; 32]) {
    let codes = _mm256_sub_epi8(nibbles(part::<2, 16, 18>(block)), _mm256_set1_epi8(8));
    mul32::<STREAM>(out, codes, [half::<0, 18>(block); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q4_1<const STREAM: bool>(block: &[u8; 20], out: &mut [f32; 32]) {
    let codes = nibbles(part::<4, 16, 20>(block));
    add32::<STREAM>(out, codes, half::<0, 20>(block), half::<2, 20>(block));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q5_0<const STREAM: bool>(block: &[u8; 22], out: &mut [f32; 32]) {
    // A code without its fifth bit is negative: the nibble below ones is the nibble minus 16.
    let clear = _mm256_andnot_si256(bits(part::<2, 4, 22>(block)), _mm256_set1_epi8(-16));
    let codes = _mm256_or_si256(nibbles(part::<6, 16, 22>(block)), clear);
    mul32::<STREAM>(out, codes, [half::<0, 22>(block); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q5_1<const STREAM: bool>(block: &[u8; 24], out: &mut [f32; 32]) {
    let set = _mm256_and_si256(bits(part::<4, 4, 24>(block)), _mm256_set1_epi8(16));
    let codes = _mm256_or_si256(nibbles(part::<8, 16, 24>(block)), set);
    add32::<STREAM>(out, codes, half::<0, 24>(block), half::<2, 24>(block));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0<const STREAM: bool>(block: &[u8; 34], out: &mut [f32; 32]) {
    mul32::<STREAM>(
        out,
        load32(part::<2, 32, 34>(block)),
        [half::<0, 34>(block); 2],
    );
}

/// Nibbles through a table of signed bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn through(values: &[i8; 16], nibbles: __m256i) -> __m256i {
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table(values)), nibbles)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn iq4_nl<const STREAM: bool>(block: &[u8; 18], out: &mut [f32; 32]) {
    let codes = through(&IQ4_VALUES, nibbles(part::<2, 16, 18>(block)));
    mul32::<STREAM>(out, codes, [half::<0, 18>(block); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mxfp4<const STREAM: bool>(block: &[u8; 17], out: &mut [f32; 32]) {
    let codes = through(&E2M1_DOUBLED, nibbles(part::<1, 16, 17>(block)));
    mul32::<STREAM>(out, codes, [_mm256_set1_ps(e8m0_half(block[0])); 2]);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nvfp4<const STREAM: bool>(block: &[u8; 36], out: &mut [f32; 64]) {
    let bytes = load32(part::<4, 32, 36>(block));
    let mask = _mm256_set1_epi8(15);
    let low = through(&E2M1_DOUBLED, _mm256_and_si256(bytes, mask));
    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
    let high = through(&E2M1_DOUBLED, high);
    // Groups 0 and 2, then 1 and 3: 8 bytes of low nibbles and the same bytes' high ones.
    let [zero, two] = halves(_mm256_unpacklo_epi64(low, high));
    let [one, three] = halves(_mm256_unpackhi_epi64(low, high));
    let scales = part::<0, 4, 36>(block).map(|code| NVFP4_SCALES[code as usize]);
    let groups = out.as_chunks_mut().0.iter_mut();
    for ((out, codes), scale) in groups.zip([zero, one, two, three]).zip(scales) {
        mul16::<STREAM>(out, codes, _mm256_set1_ps(scale));
    }
}

/// Sixteen signed bytes times `d`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales16(codes: __m128i, d: __m256) -> [f32; 16] {
    let mut scales = [0.0; 16];
    mul16::<false>(&mut scales, codes, d);
    scales
}

/// Two scales of sixteen, each eight times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn two(scales: &[f32; 2]) -> [__m256; 2] {
    [_mm256_set1_ps(scales[0]), _mm256_set1_ps(scales[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q2_k<const STREAM: bool>(block: &[u8; 84], out: &mut [f32; 256]) {
    let packed = load16(part::<0, 16, 84>(block));
    let mask = _mm_set1_epi8(15);
    let scales = scales16(_mm_and_si128(packed, mask), half::<80, 84>(block));
    let mins = _mm_and_si128(_mm_srli_epi16::<4>(packed), mask);
    let mins = scales16(mins, half::<82, 84>(block));
    let bytes = part::<16, 64, 84>(block).as_chunks().0;
    let halves = out.as_chunks_mut::<128>().0.iter_mut().zip(bytes);
    let scales = scales
        .as_chunks::<8>()
        .0
        .iter()
        .zip(mins.as_chunks::<8>().0);
    for ((out, bytes), (scales, mins)) in halves.zip(scales) {
        let mut codes = load32(bytes);
        let scales = scales.as_chunks().0.iter().zip(mins.as_chunks().0);
        for (out, (scales, mins)) in out.as_chunks_mut().0.iter_mut().zip(scales) {
            let low = _mm256_and_si256(codes, _mm256_set1_epi8(3));
            sub32::<STREAM>(out, low, two(scales), two(mins));
            codes = _mm256_srli_epi16::<2>(codes);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q3_k<const STREAM: bool>(block: &[u8; 110], out: &mut [f32; 256]) {
    let scales = q3_scales(part::<96, 12, 110>(block));
    let scales = scales16(table(&scales), half::<108, 110>(block));
    let mut high = load32(part::<0, 32, 110>(block));
    let bytes = part::<32, 64, 110>(block).as_chunks().0;
    let halves = out.as_chunks_mut::<128>().0.iter_mut().zip(bytes);
    for ((out, bytes), scales) in halves.zip(scales.as_chunks::<8>().0) {
        let mut codes = load32(bytes);
        for (out, scales) in out.as_chunks_mut().0.iter_mut().zip(scales.as_chunks().0) {
            let low = _mm256_and_si256(codes, _mm256_set1_epi8(3));
            let bit = _mm256_and_si256(_mm256_slli_epi16::<2>(high), _mm256_set1_epi8(4));
            let code = _mm256_sub_epi8(_mm256_or_si256(low, bit), _mm256_set1_epi8(4));
            mul32::<STREAM>(out, code, two(scales));
            codes = _mm256_srli_epi16::<2>(codes);
            high = _mm256_srli_epi16::<1>(high);
        }
    }
}

/// The eight scales times `d` and minima times `m` of `Q4_K` and `Q5_K` (`ggml::scale_min`), four bytes at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales_mins(bytes: &[u8; 12], d: __m256, m: __m256) -> ([f32; 8], [f32; 8]) {
    let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let high = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let eight = |low: u32, high: u32| _mm_set_epi64x(0, (low as u64 | (high as u64) << 32) as i64);
    let scale = eight(a & 0x3F3F_3F3F, c & 0x0F0F_0F0F | high(a));
    let min = eight(b & 0x3F3F_3F3F, c >> 4 & 0x0F0F_0F0F | high(b));
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    store::<false>(&mut scales, _mm256_mul_ps(widen(scale), d));
    store::<false>(&mut mins, _mm256_mul_ps(widen(min), m));
    (scales, mins)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q4_k<const STREAM: bool>(block: &[u8; 144], out: &mut [f32; 256]) {
    let packed = part::<4, 12, 144>(block);
    let (scales, mins) = scales_mins(packed, half::<0, 144>(block), half::<2, 144>(block));
    let bytes = part::<16, 128, 144>(block).as_chunks().0;
    let scales = scales
        .as_chunks::<2>()
        .0
        .iter()
        .zip(mins.as_chunks::<2>().0);
    for ((out, bytes), (scales, mins)) in out
        .as_chunks_mut::<64>()
        .0
        .iter_mut()
        .zip(bytes)
        .zip(scales)
    {
        let bytes = load32(bytes);
        let mask = _mm256_set1_epi8(15);
        let low = _mm256_and_si256(bytes, mask);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
        let groups = out.as_chunks_mut().0.iter_mut().zip([low, high]);
        for ((out, codes), (d, m)) in groups.zip(two(scales).into_iter().zip(two(mins))) {
            sub32::<STREAM>(out, codes, [d; 2], [m; 2]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q5_k<const STREAM: bool>(block: &[u8; 176], out: &mut [f32; 256]) {
    let packed = part::<4, 12, 176>(block);
    let (scales, mins) = scales_mins(packed, half::<0, 176>(block), half::<2, 176>(block));
    let mut fifth = load32(part::<16, 32, 176>(block));
    let bytes = part::<48, 128, 176>(block).as_chunks().0;
    let scales = scales
        .as_chunks::<2>()
        .0
        .iter()
        .zip(mins.as_chunks::<2>().0);
    for ((out, bytes), (scales, mins)) in out
        .as_chunks_mut::<64>()
        .0
        .iter_mut()
        .zip(bytes)
        .zip(scales)
    {
        let bytes = load32(bytes);
        let (mask, sixteen) = (_mm256_set1_epi8(15), _mm256_set1_epi8(16));
        let low = _mm256_and_si256(bytes, mask);
        let low = _mm256_or_si256(
            low,
            _mm256_and_si256(_mm256_slli_epi16::<4>(fifth), sixteen),
        );
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
        let high = _mm256_or_si256(
            high,
            _mm256_and_si256(_mm256_slli_epi16::<3>(fifth), sixteen),
        );
        let groups = out.as_chunks_mut().0.iter_mut().zip([low, high]);
        for ((out, codes), (d, m)) in groups.zip(two(scales).into_iter().zip(two(mins))) {
            sub32::<STREAM>(out, codes, [d; 2], [m; 2]);
        }
        fifth = _mm256_srli_epi16::<2>(fifth);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q6_k<const STREAM: bool>(block: &[u8; 210], out: &mut [f32; 256]) {
    let scales = scales16(load16(part::<192, 16, 210>(block)), half::<208, 210>(block));
    let low = part::<0, 128, 210>(block).as_chunks::<64>().0;
    let high = part::<128, 64, 210>(block).as_chunks().0;
    let halves = out
        .as_chunks_mut::<128>()
        .0
        .iter_mut()
        .zip(low.iter().zip(high));
    for ((out, (low, high)), scales) in halves.zip(scales.as_chunks::<8>().0) {
        let (mask, two_bits) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
        let (a, b) = (
            load32(part::<0, 32, 64>(low)),
            load32(part::<32, 32, 64>(low)),
        );
        let high = load32(high);
        let joined = [
            (a, _mm256_slli_epi16::<4>(high)),
            (b, _mm256_slli_epi16::<2>(high)),
            (_mm256_srli_epi16::<4>(a), high),
            (_mm256_srli_epi16::<4>(b), _mm256_srli_epi16::<2>(high)),
        ];
        let quarters = out.as_chunks_mut().0.iter_mut().zip(joined);
        for ((out, (low, high)), scales) in quarters.zip(scales.as_chunks().0) {
            let low = _mm256_and_si256(low, mask);
            let codes = _mm256_or_si256(low, _mm256_and_si256(high, two_bits));
            mul32::<STREAM>(
                out,
                _mm256_sub_epi8(codes, _mm256_set1_epi8(32)),
                two(scales),
            );
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn iq4_xs<const STREAM: bool>(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = _mm256_cvtss_f32(half::<0, 136>(block));
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
fn tq2_0<const STREAM: bool>(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = half::<64, 66>(block);
    let bytes = part::<0, 64, 66>(block).as_chunks().0;
    for (out, bytes) in out.as_chunks_mut::<128>().0.iter_mut().zip(bytes) {
        let mut codes = load32(bytes);
        for out in out.as_chunks_mut().0 {
            let low = _mm256_and_si256(codes, _mm256_set1_epi8(3));
            mul32::<STREAM>(out, _mm256_sub_epi8(low, _mm256_set1_epi8(1)), [d; 2]);
            codes = _mm256_srli_epi16::<2>(codes);
        }
    }
}

// Narrower floats.

#[target_feature(enable = "avx2,fma,f16c")]
fn to_f16(values: &[f32], out: &mut [f16]) {
    let (wide, rest) = values.as_chunks::<8>();
    let (narrow, tail) = out.reinterpret_cast_mut().as_chunks_mut::<8>();
    for (values, out) in wide.iter().zip(narrow) {
        // SAFETY: invariant 2.
        let values = unsafe { _mm256_loadu_ps(values.as_ptr()) };
        store_u16(out, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values));
    }
    for (value, out) in rest.iter().zip(tail) {
        *out = f16::from_f32(*value).to_bits();
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn to_bf16(values: &[f32], out: &mut [bf16]) {
    let (wide, rest) = values.as_chunks::<8>();
    let (narrow, tail) = out.reinterpret_cast_mut().as_chunks_mut::<8>();
    for (values, out) in wide.iter().zip(narrow) {
        // SAFETY: invariant 2.
        let values = unsafe { _mm256_loadu_ps(values.as_ptr()) };
        let bits = _mm256_castps_si256(values);
        // Half of the last place, less one unless that place is odd: then the upper half is the rounded number.
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
        let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
        let [low, high] = halves(high);
        store_u16(out, _mm_packus_epi32(low, high));
    }
    for (value, out) in rest.iter().zip(tail) {
        *out = bf16::from_f32(*value).to_bits();
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_u16(out: &mut [u16; 8], values: __m128i) {
    // SAFETY: invariant 2.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), values) }
}
