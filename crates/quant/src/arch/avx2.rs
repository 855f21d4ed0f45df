//! AVX2 with FMA and F16C.
//!
//! Invariants:
//! 1. An [`Avx2`] exists only where [`Avx2::detect`] saw all three features, so a call through one may run code that needs
//!    them.
//! 2. Loads and stores go through references to arrays of the size that they touch, with instructions that ask for no
//!    alignment, except in 3 of `lanes`: [`Avx2::dequantize`] sees to it.
//!
//! Kernels (`blocks`) unpack a block's codes to bytes in their elements' order, then widen 8 bytes at a time, convert and
//! multiply (`lanes`).
#![allow(unsafe_code)]

use core::arch::x86_64::*;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::ggml::GgmlType;

mod blocks;
mod lanes;

use blocks::*;

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
            // SAFETY: invariant 1; 3 of `lanes`: the address was just looked at.
            unsafe { run::<true>(ty, bytes, out) }
        } else {
            // SAFETY: invariant 1.
            unsafe { run::<false>(ty, bytes, out) }
        }
    }

    pub(super) fn to_f16(self, values: &[f32], out: &mut [f16], stream: bool) {
        if stream && out.as_ptr().addr().is_multiple_of(32) {
            // SAFETY: invariant 1; 3 of `lanes`: the address was just looked at.
            unsafe { to_f16::<true>(values, out) }
        } else {
            // SAFETY: invariant 1.
            unsafe { to_f16::<false>(values, out) }
        }
    }

    pub(super) fn to_bf16(self, values: &[f32], out: &mut [bf16], stream: bool) {
        if stream && out.as_ptr().addr().is_multiple_of(32) {
            // SAFETY: invariant 1; 3 of `lanes`: the address was just looked at.
            unsafe { to_bf16::<true>(values, out) }
        } else {
            // SAFETY: invariant 1.
            unsafe { to_bf16::<false>(values, out) }
        }
    }
}

/// # Safety
///
/// Invariant 1; 3 of `lanes` for `STREAM`.
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

// Narrower floats.

macro_rules! narrow {
    ($name:ident, $number:ident, $eight:expr) => {
        /// # Safety
        ///
        /// Invariant 1; 3 of `lanes` for `STREAM`, with sixteen numbers a store.
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name<const STREAM: bool>(values: &[f32], out: &mut [$number]) {
            let (wide, rest) = values.as_chunks::<16>();
            let (narrow, tail) = out.reinterpret_cast_mut().as_chunks_mut::<16>();
            for (values, out) in wide.iter().zip(narrow) {
                store_u16::<STREAM>(out, $eight(values));
            }
            for (value, out) in rest.iter().zip(tail) {
                *out = $number::from_f32(*value).to_bits();
            }
            if STREAM {
                _mm_sfence();
            }
        }
    };
}

narrow!(to_f16, f16, sixteen_f16);
narrow!(to_bf16, bf16, sixteen_bf16);

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen_f16(values: &[f32; 16]) -> __m256i {
    let [low, high] = load16_f32(values).map(|v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
    _mm256_set_m128i(high, low)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen_bf16(values: &[f32; 16]) -> __m256i {
    let [low, high] = load16_f32(values).map(|values| {
        let bits = _mm256_castps_si256(values);
        // Half of the last place, less one unless that place is odd: then the upper half is the rounded number.
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        // The sum may carry a NaN into a number: these bits make it one again.
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
        let quiet = _mm256_and_si256(nan, _mm256_set1_epi32(0x7FC0));
        _mm256_or_si256(_mm256_srli_epi32::<16>(rounded), quiet)
    });
    // Packing goes by halves: the middle quarters change places.
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load16_f32(values: &[f32; 16]) -> [__m256; 2] {
    let [low, high] = [&values[..8], &values[8..]].map(|values| values.as_ptr());
    // SAFETY: invariant 2.
    let low = unsafe { _mm256_loadu_ps(low) };
    // SAFETY: invariant 2.
    let high = unsafe { _mm256_loadu_ps(high) };
    [low, high]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_u16<const STREAM: bool>(out: &mut [u16; 16], values: __m256i) {
    if STREAM {
        // SAFETY: invariant 2; 3 of `lanes`.
        unsafe { _mm256_stream_si256(out.as_mut_ptr().cast(), values) }
    } else {
        // SAFETY: invariant 2.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), values) }
    }
}
