//! Quantising by rounding to nearest: values to codes, scales and zero points, written in any form.
//!
//! Nothing here looks at activations or searches: a scale comes from the largest magnitude (or the least and the largest
//! value) of its block, by the rule of the form's own library where it has one, and each value becomes the nearest code.
//!
//! | form | scale of a block | code |
//! |---|---|---|
//! | integers, symmetric | 2·amax / (2^b − 1), rounded to the scales' dtype | rint(x / s) + 2^(b−1), cut to b bits |
//! | integers, asymmetric | (max − min) / (2^b − 1), zero included; z = rint(−min / s) | rint(x / s) + z, cut |
//! | MLX affine | as `mx.quantize`: the step that makes the larger end a whole code | rint((x − bias) / s), cut |
//! | FP8 | amax / 448 (57344 for e5m2, 240 for the FNUZ e4m3) | nearest, cut |
//! | MX | 2^(floor(log2 amax) − emax), as OCP MX 1.0, 6.3 | nearest to x / s, cut |
//! | NVFP4 | e4m3(amax / 6 / t) with t = amax of the tensor / (6·448) | nearest to x / (s·t), cut |
//! | NF4 | amax | nearest entry of the table |
//! | ggml | [`crate::ggml::quantize`] | |
//!
//! A block of zeros has scale 1 (of MX: 2^−127). Integers are compressed-tensors' and GPTQ's rule, with the scale rounded
//! to its dtype first, so that codes are the nearest ones under the scale that is stored.

mod floats;
mod integers;

use std::collections::BTreeMap;

use tonnage_format::Dtype;

use crate::descriptor::{Float, Role};
use crate::error::{Error, Reason};
use crate::ggml::{self, GgmlType};
use crate::map::QTensor;
use crate::pack::{Notes, is_integer, pack};
use crate::packed::{Packed, from_ggml, rows_of};
use crate::scheme::Part;
use crate::target::{Target, To};

/// Quantises a tensor: `values` are row-major of `shape`, and `dtype` is what its values are once they are read again.
///
/// # Errors
/// A value is not finite, or too large for the scales; the form has no such shape or option.
pub fn quantize(
    name: &str,
    values: &[f32],
    shape: &[u64],
    dtype: Float,
    target: &Target,
) -> Result<Packed, Error> {
    let named = |error: Error| error.of(name);
    let (rows, columns) = rows_of(shape).map_err(named)?;
    if rows.checked_mul(columns) != Some(values.len() as u64) || values.is_empty() {
        let text = format!("{} values for {shape:?}", values.len());
        return Err(named(Error::new(Reason::Usage, text)));
    }
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let text = format!(
            "element {at} is {}, and only finite numbers have codes",
            values[at]
        );
        return Err(named(Error::new(Reason::Usage, text)));
    }
    let form = match target.to {
        To::Ggml(ty) => return blocks(name, values, shape, dtype, ty).map_err(named),
        To::Form(form) => form,
    };
    if form.name == "bnb4" {
        return crate::nested::quantize(name, values, shape, dtype, target).map_err(named);
    }
    let loose = if is_integer(form) {
        integers::loose(values, shape, dtype, form, target)
    } else {
        floats::loose(values, shape, dtype, form, target)
    };
    // Bits, groups and numbers are settled: what is left of the target is how they are written.
    let as_made = Target {
        bits: None,
        group: None,
        element: None,
        ..target.clone()
    };
    let mut notes = Notes::new();
    let loose = loose.map_err(named)?;
    Ok(pack(name, &loose, &as_made, true, &mut notes)?.0)
}

fn blocks(
    name: &str,
    values: &[f32],
    shape: &[u64],
    dtype: Float,
    ty: GgmlType,
) -> Result<Packed, Error> {
    let (rows, columns) = rows_of(shape)?;
    let row = ty.row_bytes(columns).map_err(from_ggml)?;
    let len = rows
        .checked_mul(row)
        .and_then(|len| usize::try_from(len).ok());
    let mut bytes = vec![0; len.ok_or_else(crate::packed::too_large)?];
    ggml::quantize(ty, values, &mut bytes).map_err(from_ggml)?;
    let mut stored = shape.to_vec();
    if let Some(last) = stored.last_mut() {
        *last = row;
    }
    let part = Part {
        name: name.to_owned(),
        dtype: Dtype::U8,
        shape: stored,
    };
    let mut tensor = QTensor::ggml_of(name, ty, part)?;
    tensor.dtype = dtype;
    Packed::new(tensor, BTreeMap::from([(Role::Codes, bytes)]))
}

/// A number for each block, from the elements of each: `fold` joins an element to what came before.
fn over_blocks<T: Copy>(
    shape: &[u64],
    places: &crate::loose::Blocks,
    values: &[f32],
    start: T,
    fold: impl Fn(T, f32) -> T,
) -> Vec<T> {
    let count: u64 = places.shape.iter().product();
    let mut made = vec![start; count as usize];
    each(shape, places, values, |place, value| {
        if let Some(slot) = made.get_mut(place) {
            *slot = fold(*slot, value);
        }
    });
    made
}

/// Every value, in order, with the place of its block.
fn each(
    shape: &[u64],
    places: &crate::loose::Blocks,
    values: &[f32],
    mut with: impl FnMut(usize, f32),
) {
    let columns = shape.last().copied().unwrap_or(0);
    let size = places.block.last().copied().unwrap_or(0);
    let lead = shape.len().saturating_sub(1);
    let chunk = usize::try_from(columns).unwrap_or(usize::MAX).max(1);
    for (row, values) in (0_u64..).zip(values.chunks(chunk)) {
        let mut index = crate::loose::unravel(row, shape.get(..lead).unwrap_or(&[]));
        index.push(0);
        let first = places.place(&index);
        for (column, value) in (0_u64..).zip(values) {
            with(
                first + column.checked_div(size).unwrap_or(0) as usize,
                *value,
            );
        }
    }
}
