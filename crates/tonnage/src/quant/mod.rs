//! Quantised checkpoints: made, and converted from scheme to scheme.
//!
//! The mechanisms are `tonnage-quant`'s and work on one tensor; here they go through whole checkpoints, with one tensor
//! in memory at a time, and what they write is there whole or not at all.

mod config;
mod dequantize;
mod detect;
mod one;
mod quantize;
mod repack;
mod spool;

pub use one::{quantize_tensor, repack_tensor, target, values};
pub use quantize::{Quantized, Rule, quantize, rules};
pub use repack::{Repacked, read, repack};
pub use tonnage_quant::descriptor::Role;
pub use tonnage_quant::map::{
    Ambiguity, Confidence, Evidence, Meaning, Policy, Provenance, QTensor, QuantMap,
};
pub use tonnage_quant::packed::{Difference, Packed};
pub use tonnage_quant::repack::{How, Report};
pub use tonnage_quant::scheme::{Param, Part};
pub use tonnage_quant::target::{FORMS, Form, Target, To};

pub(crate) use config::read as config_of;
pub(crate) use quantize::to_f32;
pub(crate) use spool::Made;

use tonnage_engine as engine;
use tonnage_quant::{Error as QuantError, Reason};

use crate::error::{Error, Result};
use crate::save::Save;

/// What the room of schemes said, as the façade says it.
pub(crate) fn raised(error: QuantError) -> Error {
    let code = match error.reason {
        Reason::Lossy => "QUANT_LOSSY",
        Reason::Unsupported => "QUANT_UNSUPPORTED",
        Reason::Parameter => "QUANT_OPTION",
        Reason::Ambiguous => "AMBIGUOUS",
        Reason::Usage => "QUANT_VALUE",
        _ => "QUANT_SIZE",
    };
    let text = error.text.clone();
    let named = Error::usage(code, text);
    match error.tensor.is_empty() {
        true => named,
        false => named.about(&error.tensor, None),
    }
}

/// A tensor that was asked for and can't be had.
pub(crate) fn failed(tensor: &str, why: String) -> Error {
    Error::usage("QUANT_UNSUPPORTED", why).about(tensor, None)
}

/// Stops where the caller wants it.
pub(crate) fn cancelled(save: &Save<'_>) -> Result<()> {
    match save.cancel.is_some_and(engine::Cancel::is_cancelled) {
        true => Err(engine::Error::Cancelled.into()),
        false => Ok(()),
    }
}
