//! ggml's block types: what GGUF files are made of.
//!
//! A row of a tensor is a run of blocks, each of a fixed number of elements in a fixed number of bytes
//! ([`GgmlType`]); a block has its own scale, so it means something by itself and a tensor may be cut between any two.
//! [`dequantize`] turns whole blocks into numbers and [`quantize`] numbers into blocks. Rows need no care here: cut the
//! bytes at a block's edge, by [`GgmlType::row_bytes`], and hand in the piece.
//!
//! ```
//! use tonnage_quant::ggml::{GgmlType, dequantize, quantize};
//!
//! let values: Vec<f32> = (0..32).map(|i| i as f32 - 15.0).collect();
//! let mut blocks = [0; 34];
//! quantize(GgmlType::Q8_0, &values, &mut blocks)?;
//! let mut again = [0.0; 32];
//! dequantize(GgmlType::Q8_0, &blocks, &mut again)?;
//! assert!(values.iter().zip(again).all(|(a, b)| (a - b).abs() < 0.07));
//! # Ok::<(), tonnage_quant::ggml::GgmlError>(())
//! ```
//!
//! **Exact.** `f32` values are bit for bit ggml's own (`ggml-quants.c`), and those of the `gguf` package for Python:
//! `tests/ggml_files.rs` holds them against files which that package made. Only a NaN's payload is not promised. `f16`
//! and `bf16` values are those rounded once more, to nearest with ties to even.
//!
//! **Fast.** [`dequantize`] takes the widest kernel that the processor has, by a look at run time; the kernels live in
//! `arch` and give the scalar code's bits ([`Level`], [`dequantize_with`], `tests/ggml_fast.rs`).
//!
//! **Quantising is ggml's reference** (`quantize_row_*_ref`): round to nearest, with the small searches for scales that
//! the K types do, without an importance matrix. The grids of IQ1 to IQ3 are not quantised: ggml itself refuses most of
//! them without an importance matrix.

mod dispatch;
mod error;
mod grids;
mod iq;
mod k;
mod legacy;
mod quantize;
mod types;

pub use crate::arch::{Level, Stores};
pub use dispatch::{dequantize, dequantize_bf16, dequantize_f16, dequantize_with};
pub use error::GgmlError;
pub use quantize::quantize;
pub use types::GgmlType;

#[cfg(target_arch = "x86_64")]
pub(crate) use legacy::mxfp4 as mxfp4_scalar;

pub(crate) use k::q3_scales;

use crate::numbers::f16_to_f32;

/// The values that e2m1 stands for in ggml: doubled, so that they are integers.
pub(crate) const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The sixteen uneven values of `IQ4_NL` and `IQ4_XS`.
pub(crate) const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Half the value of an e8m0, for the doubled values; ggml knows no NaN here, and 255 is 2^127.
pub(crate) fn e8m0_half(code: u8) -> f32 {
    match code {
        0 | 1 => f32::from_bits(0x0020_0000 << code),
        _ => f32::from_bits((code as u32 - 1) << 23),
    }
}

/// What ggml multiplies the doubled values of `NVFP4` by: half of each unsigned e4m3.
pub(crate) static NVFP4_SCALES: [f32; 256] = {
    let mut scales = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        scales[code] = crate::numbers::ue4m3_to_f32(code as u8) * 0.5;
        code += 1;
    }
    scales
};

/// The binary16 at `at` of a block.
#[inline]
fn f16_at<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    f16_to_f32(u16_at(block, at))
}

#[inline]
fn u16_at<const N: usize>(block: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

#[inline]
fn u32_at<const N: usize>(block: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// The 6-bit scale and minimum of group `j` (below 8) of a `Q4_K` or `Q5_K` block, from its twelve bytes:
///
/// ```text
///  byte 0..4    high 2 bits of scale 4..8  | scale 0..4
///  byte 4..8    high 2 bits of minimum 4..8| minimum 0..4
///  byte 8..12   low 4 of minimum 4..8      | low 4 of scale 4..8
/// ```
#[inline]
pub(crate) fn scale_min(bytes: &[u8; 12], j: usize) -> (u8, u8) {
    if j < 4 {
        return (bytes[j] & 63, bytes[j + 4] & 63);
    }
    let low = bytes[j + 4];
    let (scale, min) = (bytes[j - 4] >> 6, bytes[j] >> 6);
    (low & 15 | scale << 4, low >> 4 | min << 4)
}
