//! One tensor, in memory.

use tonnage_format::Dtype;
use tonnage_quant::packed::Packed;
use tonnage_quant::repack::Report;
use tonnage_quant::target::Target;

use super::quantize::{float, to_f32};
use super::raised;
use crate::error::{Error, Result};

/// Reads a target such as `q4_k`, `awq` or `gptq:bits=4,group=128,symmetric=false`.
///
/// # Errors
/// `QUANT_UNSUPPORTED` for a scheme that is not known, `QUANT_OPTION` for an option.
pub fn target(text: &str) -> Result<Target> {
    Target::parse(text).map_err(raised)
}

/// Quantises a tensor of floats: row-major, little-endian.
///
/// # Errors
/// `QUANT_VALUE`, `QUANT_UNSUPPORTED`, `QUANT_OPTION`; bytes that are no floats.
pub fn quantize_tensor(
    name: &str,
    dtype: Dtype,
    shape: &[u64],
    bytes: &[u8],
    target: &Target,
) -> Result<Packed> {
    if !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        let text = format!("{dtype} is not quantised: F32, F16, BF16 and F64 are");
        return Err(Error::usage("QUANT_UNSUPPORTED", text).about(name, None));
    }
    let values = to_f32(dtype, bytes)?;
    tonnage_quant::quantize::quantize(name, &values, shape, float(dtype), target).map_err(raised)
}

/// Makes a quantised tensor into a target: see [`tonnage_quant::repack`].
///
/// # Errors
/// `QUANT_LOSSY` where something would be lost and `lossy` is not set; `QUANT_UNSUPPORTED`, `QUANT_OPTION`.
pub fn repack_tensor(packed: &Packed, target: &Target, lossy: bool) -> Result<(Packed, Report)> {
    tonnage_quant::repack::repack(packed, target, lossy).map_err(raised)
}

/// All values of a quantised tensor, row-major.
///
/// # Errors
/// `QUANT_SIZE` where its parts don't fit, `QUANT_UNSUPPORTED` where nobody here can read them.
pub fn values(packed: &Packed) -> Result<Vec<f32>> {
    packed.all_values().map_err(raised)
}
