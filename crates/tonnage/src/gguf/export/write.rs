//! A tensor's values as ggml's blocks, a piece at a time.

use std::borrow::Cow;

use tonnage_foreign::gguf::names::{Change, rope_row};
use tonnage_format::Dtype;
use tonnage_quant::ggml::{self, GgmlType};

use super::{Planned, refused};
use crate::error::Result;
use crate::quant::{Made, to_f32};
use crate::tensor::room;

/// Values that are in memory at a time, unless the rows of a head are more.
const PIECE: u64 = 1 << 22;

/// Makes a tensor, or says that its bytes are right as they are.
pub(super) fn tensor(
    one: &Planned<'_>,
    made: &mut Made,
    heads: &dyn Fn(&str) -> Option<u64>,
) -> Result<bool> {
    let (dtype, shape) = (one.tensor.dtype()?, one.tensor.shape());
    let same = matches!(
        (one.ty, dtype),
        (GgmlType::F32, Dtype::F32) | (GgmlType::F16, Dtype::F16) | (GgmlType::BF16, Dtype::BF16)
    );
    if same && one.change == Change::None {
        return Ok(true);
    }
    let columns = shape.last().copied().unwrap_or(1);
    let rows = one.tensor.elements().checked_div(columns).unwrap_or(0);
    // Rows that move stay within their head.
    let head = match one.change {
        Change::RopeRows { heads: key } => {
            let text = || format!("{key} is needed for its rows, and nothing says it");
            let heads = heads(key).ok_or_else(|| refused(one.tensor.name(), text()))?;
            // A bias has its rows in its only axis.
            let all = if shape.len() < 2 { columns } else { rows };
            if rope_row(0, all, heads).is_none() && all > 0 {
                let text = format!("{all} rows are no {heads} heads");
                return Err(refused(one.tensor.name(), text));
            }
            Some((heads, all / heads.max(1)))
        }
        _ => None,
    };
    if let (Some((heads, _)), true) = (head, shape.len() < 2) {
        let mut values = to_f32(dtype, &one.tensor.read()?)?;
        let old = values.clone();
        for (row, value) in (0_u64..).zip(&old) {
            let place = rope_row(row, columns, heads).and_then(|at| values.get_mut(at as usize));
            if let Some(slot) = place {
                *slot = *value;
            }
        }
        made.begin(&one.name, Dtype::F32, shape)?;
        blocks(one, &values, made)?;
        return made.end().map(|()| false);
    }
    let (stored, dtype_there) = stored(one)?;
    made.begin(&one.name, dtype_there, &stored)?;
    let mut step = (PIECE / columns.max(1)).max(1);
    if let Some((_, size)) = head {
        step = step.next_multiple_of(size.max(1));
    }
    let width = dtype.bitsize() as u64 / 8;
    let mut row = 0;
    while row < rows {
        let end = rows.min(row.saturating_add(step));
        let mut bytes = room((end - row).saturating_mul(columns).saturating_mul(width))?;
        one.tensor.read_at(row * columns * width, &mut bytes)?;
        let mut values = to_f32(dtype, &bytes)?;
        drop(bytes);
        if one.change == Change::PlusOne {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        let values = match head {
            Some((_, size)) => Cow::Owned(turned(&values, columns, size)),
            None => Cow::Borrowed(&values[..]),
        };
        blocks(one, &values, made)?;
        row = end;
    }
    made.end()?;
    Ok(false)
}

/// Rows of whole heads in GGUF's order.
fn turned(values: &[f32], columns: u64, size: u64) -> Vec<f32> {
    let (columns, size_in) = (columns as usize, size as usize);
    let mut out = vec![0.0; values.len()];
    let heads = values
        .chunks(columns * size_in)
        .zip(out.chunks_mut(columns * size_in));
    for (from, to) in heads {
        for (row, values) in (0_u64..).zip(from.chunks(columns)) {
            let place = rope_row(row, size, 1).map(|at| at as usize * columns);
            if let Some(slot) = place.and_then(|at| to.get_mut(at..at + columns)) {
                slot.copy_from_slice(values);
            }
        }
    }
    out
}

/// Shape and dtype of the tensor's bytes while they wait.
fn stored(one: &Planned<'_>) -> Result<(Vec<u64>, Dtype)> {
    let mut shape = one.tensor.shape().to_vec();
    let dtype = match one.ty {
        GgmlType::F32 => return Ok((shape, Dtype::F32)),
        GgmlType::F16 => return Ok((shape, Dtype::F16)),
        GgmlType::BF16 => return Ok((shape, Dtype::BF16)),
        _ => Dtype::U8,
    };
    if let Some(last) = shape.last_mut() {
        let row = one.ty.row_bytes(*last);
        *last = row.map_err(|e| refused(one.tensor.name(), e.to_string()))?;
    }
    Ok((shape, dtype))
}

fn blocks(one: &Planned<'_>, values: &[f32], made: &mut Made) -> Result<()> {
    let len = values.len() / one.ty.elements() * one.ty.bytes();
    let mut bytes = room(len as u64)?;
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(16);
    let count = (values.len() / one.ty.elements()).div_ceil(workers).max(1);
    let failed = |e: ggml::GgmlError| refused(one.tensor.name(), e.to_string());
    let pieces = values.chunks(count * one.ty.elements());
    let pieces = pieces.zip(bytes.chunks_mut(count * one.ty.bytes()));
    // Each block stands by itself, so threads give the bytes that one gives.
    let results: Vec<Result<(), ggml::GgmlError>> = std::thread::scope(|scope| {
        let work: Vec<_> = pieces
            .map(|(values, bytes)| scope.spawn(move || ggml::quantize(one.ty, values, bytes)))
            .collect();
        let done = work.into_iter().map(|work| work.join());
        done.map(|done| done.unwrap_or(Err(ggml::GgmlError::NotQuantised { ty: one.ty })))
            .collect()
    });
    results
        .into_iter()
        .collect::<Result<(), _>>()
        .map_err(failed)?;
    made.write(&bytes)
}
