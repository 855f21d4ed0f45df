//! Writes a loose tensor in a form: codes, scales and zero points at the addresses that the scheme's layout has proven.

mod blocks;
mod plan;
mod ready;
mod write;

use tonnage_format::Dtype;

use crate::descriptor::{Float, Number};
use crate::error::{Error, Reason};
use crate::loose::{Blocks, INTEGER, Loose, Zeros};
use crate::packed::Packed;
use crate::target::{Form, Target, To};

pub(crate) use ready::float_blocks;

/// What kept its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Codes, scales and zero points: the way back gives the same bytes.
    Codes,
    /// Something was written another way: values are to be compared.
    Values,
}

/// What is written where the format knows several readings, or loses something that values don't show.
pub(crate) type Notes = Vec<String>;

/// A tensor in a form, nothing rounded: what can't be kept is refused as [`Reason::Lossy`].
pub(crate) fn pack(
    name: &str,
    loose: &Loose,
    target: &Target,
    lossy: bool,
    notes: &mut Notes,
) -> Result<(Packed, Kept), Error> {
    let named = |error: Error| error.of(name);
    let (made, kept) = match target.to {
        To::Ggml(ty) => blocks::blocks(name, loose, ty).map_err(named)?,
        To::Form(form) => {
            let ready = ready::ready(loose, form, target).map_err(named)?;
            write::write(name, ready, form, target, lossy, notes).map_err(named)?
        }
    };
    // Sums with biases round twice, products with zero points once.
    let biased = matches!(loose.zero, Zeros::Bias(_));
    Ok((made, if biased { Kept::Values } else { kept }))
}

pub(crate) fn lossy(count: u64, of: u64, what: &str) -> Error {
    Error::new(Reason::Lossy, format!("{count} of {of} {what}"))
}

fn none_lost(count: u64, of: u64, what: &str) -> Result<(), Error> {
    if count == 0 {
        Ok(())
    } else {
        Err(lossy(count, of, what))
    }
}

fn unfit(what: String) -> Error {
    Error::new(Reason::Unsupported, what)
}

pub(crate) fn number_of(dtype: Dtype) -> Result<Number, Error> {
    Ok(match dtype {
        Dtype::F32 => Number::F32,
        Dtype::F16 => Number::F16,
        Dtype::BF16 => Number::Bf16,
        Dtype::F8_E8M0 | Dtype::U8 => Number::E8m0,
        Dtype::F8_E4M3 => Number::E4m3,
        other => return Err(unfit(format!("scales of {other}"))),
    })
}

fn dtype_of(number: Number) -> Dtype {
    match number {
        Number::F16 => Dtype::F16,
        Number::Bf16 => Dtype::BF16,
        Number::E4m3 => Dtype::F8_E4M3,
        Number::E5m2 => Dtype::F8_E5M2,
        Number::E4m3Fnuz => Dtype::F8_E4M3FNUZ,
        Number::E5m2Fnuz => Dtype::F8_E5M2FNUZ,
        _ => Dtype::F32,
    }
}

/// Whether a form's codes are integers.
pub(crate) fn is_integer(form: &Form) -> bool {
    matches!(form.codes, Dtype::I32 | Dtype::I16) || ["mlx", "ct-int"].contains(&form.name)
}

/// Integers of a form, as quantisers make them.
pub(crate) fn integers(
    shape: &[u64],
    bits: u32,
    codes: Vec<u8>,
    scale: Blocks,
    zero: Zeros,
    dtype: Float,
) -> Loose {
    Loose {
        shape: shape.to_vec(),
        element: INTEGER,
        bits,
        codes,
        scale,
        global: None,
        zero,
        group_index: None,
        dtype,
    }
}
