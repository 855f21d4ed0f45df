//! Kernels for what the processor at hand has, chosen at run time. Each gives the bits of the scalar code beside which it
//! stands; the only `unsafe` of this crate is below this file.
//!
//! ```text
//!  x86_64    Avx2     AVX2, FMA, F16C: 32 elements of a block as bytes, widened 8 at a time
//!  others    Scalar   the code in `ggml`
//! ```
//!
//! A new set of instructions is a variant of `Set`, a line in [`Level::available`] and a file here; `tests/ggml_fast.rs`
//! tries every level that the machine has. AVX-512 is not among them: `std` has it from Rust 1.89 on, and this crate
//! builds with 1.88.

use crate::ggml::GgmlType;

#[cfg(target_arch = "x86_64")]
mod avx2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
}

/// A set of instructions that this processor has: there is no other way to one than [`Level::available`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Set);

impl Level {
    /// The scalar code, which every processor runs.
    pub const SCALAR: Level = Level(Set::Scalar);

    /// All levels that this processor has, the widest first.
    pub fn available() -> impl Iterator<Item = Level> {
        #[cfg(target_arch = "x86_64")]
        let wide = avx2::Avx2::detect().map(|avx2| Level(Set::Avx2(avx2)));
        #[cfg(not(target_arch = "x86_64"))]
        let wide = None;
        wide.into_iter().chain([Level::SCALAR])
    }

    /// The widest level that this processor has.
    pub fn best() -> Level {
        Level::available().next().unwrap_or(Level::SCALAR)
    }

    /// The level's name: `scalar`, `avx2`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(_) => "avx2",
        }
    }
}

/// How kernels write what they make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stores {
    /// Past the caches where the output is larger than 8 MiB (and 32-byte aligned), else through them.
    #[default]
    Auto,
    /// Through the caches: the values are wanted at once.
    Cached,
    /// Past the caches, which need not read the lines first: the output is a piece of something larger.
    Streaming,
}

/// From here on an output is larger than what a core can hope to keep of its caches.
const STREAM_FROM: usize = 8 << 20;

impl Stores {
    pub(crate) fn streaming(self, bytes: usize) -> bool {
        match self {
            Stores::Auto => bytes >= STREAM_FROM,
            Stores::Cached => false,
            Stores::Streaming => true,
        }
    }
}

/// Turns whole blocks into numbers if there is a kernel for them, and says whether there was.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(crate) fn dequantize(
    level: Level,
    stores: Stores,
    ty: GgmlType,
    bytes: &[u8],
    out: &mut [f32],
) -> bool {
    match level.0 {
        Set::Scalar => false,
        #[cfg(target_arch = "x86_64")]
        Set::Avx2(avx2) => avx2.dequantize(ty, bytes, out, stores.streaming(size_of_val(out))),
    }
}

/// Rounds to binary16.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(crate) fn to_f16(level: Level, stream: bool, values: &[f32], out: &mut [half::f16]) {
    match level.0 {
        Set::Scalar => {
            for (out, value) in out.iter_mut().zip(values) {
                *out = half::f16::from_f32(*value);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Set::Avx2(avx2) => avx2.to_f16(values, out, stream),
    }
}

/// Rounds to bfloat16.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(crate) fn to_bf16(level: Level, stream: bool, values: &[f32], out: &mut [half::bf16]) {
    match level.0 {
        Set::Scalar => {
            for (out, value) in out.iter_mut().zip(values) {
                *out = half::bf16::from_f32(*value);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Set::Avx2(avx2) => avx2.to_bf16(values, out, stream),
    }
}
