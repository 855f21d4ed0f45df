//! What of a checkpoint belongs where in a device's memory, as the engine takes it.

use std::sync::Arc;

use pyo3::prelude::*;
use tonnage::engine::{Cast, Piece};
use tonnage::format::slice::runs;
use tonnage::{Checkpoint, Dtype, Slice, cast};

use super::memory::Region;
use crate::paved::failure::{raise, usage};

/// Position of the tensor; its tag; the memory and the first byte there; ranges, if a slice is wanted; the
/// dtype that floats are cast to; where the memory has gaps, bytes of the source that make a row, and bytes
/// from one row to the next in the memory; bytes behind it that may be overwritten.
pub type Job<'py> = (
    usize,
    u64,
    Bound<'py, Region>,
    u64,
    Option<Vec<(u64, u64, u64)>>,
    Option<String>,
    Option<(u64, u64)>,
    u64,
);

/// Elements of one dtype into another's, in the byte order of whoever uses them.
#[derive(Debug)]
struct Elements {
    from: Dtype,
    to: Dtype,
    swap: bool,
}

impl Cast for Elements {
    fn unit(&self) -> (usize, usize) {
        // Sub-byte elements are cast to whole bytes by eight, which fill bytes whatever their size.
        if self.from.bitsize() < 8 || self.to.bitsize() < 8 {
            return (self.from.bitsize(), self.to.bitsize());
        }
        let bytes = |dtype: Dtype| dtype.bitsize() / 8;
        (bytes(self.from), bytes(self.to))
    }

    fn cast(
        &self,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        cast::cast(self.from, src, self.to, dst)?;
        let unit = self.to.swap_unit();
        if self.swap && unit > 1 {
            dst.chunks_exact_mut(unit).for_each(<[u8]>::reverse);
        }
        Ok(())
    }
}

/// The cast that a tensor needs, if it needs one.
pub fn cast_of(from: Dtype, to: Dtype, region: &Region) -> Option<Arc<dyn Cast>> {
    let swap = cfg!(target_endian = "big") && region.device.info().unified && to.swap_unit() > 1;
    (from != to || swap).then(|| Arc::new(Elements { from, to, swap }) as Arc<dyn Cast>)
}

/// The pieces of a job.
pub fn pieces(checkpoint: &Checkpoint, job: &Job<'_>, into: &mut Vec<Piece>) -> PyResult<()> {
    let (position, tag, region, at, ranges, wanted, rows, slack) = job;
    let region = region.get();
    let unknown = || {
        usage(
            "UNKNOWN_TENSOR",
            &format!("no tensor has position {position}"),
        )
    };
    let tensor = checkpoint.at(*position).ok_or_else(unknown)?;
    let dtype = tensor.dtype().map_err(|e| raise(&e))?;
    let source = checkpoint.source(tensor.file()).ok_or_else(unknown)?;
    let memory = Arc::clone(&region.memory);
    let mut whole = Piece::plain(
        Arc::clone(source),
        tensor.offset(),
        tensor.byte_len(),
        memory,
        *at,
        *tag,
    );
    let to = match wanted {
        Some(name) => Dtype::from_name(name).ok_or_else(|| usage("DTYPE", name))?,
        None => dtype,
    };
    whole.cast = cast_of(dtype, to, region);
    whole.slack = *slack;
    if (ranges, rows) == (&None, &None) {
        into.push(whole);
        return Ok(());
    }
    whole.slack = 0;
    if let Some((0, _)) = rows {
        return Err(usage("BUFFER", "a row has no bytes"));
    }
    match ranges {
        None => spread(&whole, std::iter::once((0, whole.len)), *rows, into),
        Some(ranges) => {
            let ranges: Vec<Slice> = ranges
                .iter()
                .map(|&(start, stop, step)| Slice { start, stop, step })
                .collect();
            let runs = runs(dtype, tensor.shape(), &ranges)
                .map_err(|e| raise(&e.tensor(tensor.name()).into()))?;
            spread(&whole, runs, *rows, into);
        }
    }
    Ok(())
}

/// Pieces for runs of a tensor's bytes, one behind the other in the memory, or in rows there; those of one
/// length at equal distances become the rows of one piece.
fn spread(
    whole: &Piece,
    runs: impl Iterator<Item = (u64, u64)>,
    rows: Option<(u64, u64)>,
    into: &mut Vec<Piece>,
) {
    let unit = whole.cast.as_ref().map_or((1, 1), |cast| cast.unit());
    let out = |len: u64| len / (unit.0 as u64).max(1) * unit.1 as u64;
    let (first, mut done) = (into.len(), 0_u64);
    for (start, mut left) in runs {
        let mut offset = whole.offset.saturating_add(start);
        while left > 0 {
            let (len, at) = match rows {
                None => (left, out(done)),
                Some((row, pitch)) => {
                    let within = done % row;
                    let begin = (done / row).saturating_mul(pitch);
                    (left.min(row - within), begin.saturating_add(out(within)))
                }
            };
            let piece = Piece {
                offset,
                len,
                at: whole.at.saturating_add(at),
                ..whole.clone()
            };
            let last = into.get_mut(first..).and_then(<[Piece]>::last_mut);
            if !last.is_some_and(|last| joined(last, &piece, out(len))) {
                into.push(piece);
            }
            offset = offset.saturating_add(len);
            left -= len;
            done = done.saturating_add(len);
        }
    }
    if into.len() == first {
        into.push(Piece {
            len: 0,
            ..whole.clone()
        });
    }
}

/// Whether a piece became the next row of another.
fn joined(last: &mut Piece, next: &Piece, out: u64) -> bool {
    let apart = |to: u64, from: u64, pitch: u64| {
        to.checked_sub(from)?
            .checked_sub(pitch.checked_mul(last.rows - 1)?)
    };
    let (Some(pitch), Some(memory_pitch)) = (
        apart(next.offset, last.offset, last.pitch),
        apart(next.at, last.at, last.memory_pitch),
    ) else {
        return false;
    };
    let steady = last.rows == 1 || (pitch, memory_pitch) == (last.pitch, last.memory_pitch);
    if next.len != last.len || !steady || pitch < next.len || memory_pitch < out {
        return false;
    }
    (last.pitch, last.memory_pitch) = (pitch, memory_pitch);
    last.rows += 1;
    true
}
