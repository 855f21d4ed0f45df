//! What goes to a device, tensor by tensor: selection, casts and slices turned into pieces.

use std::sync::Arc;

use tonnage_device::Memory;
use tonnage_engine::{Cast, Piece};
use tonnage_format::Dtype;
use tonnage_format::slice::{Runs, runs, shape_of};
use tonnage_plan::Local;
use tonnage_storage::{MemorySource, Source};

use crate::cast::{cast, cast_len, castable};
use crate::checkpoint::Checkpoint;
use crate::device_load::{DeviceLoad, DeviceMap, DeviceTensor};
use crate::error::{Error, Result};
use crate::names::near;
use crate::plan::device::{self, Copies};
use crate::tensor::TensorRef;

/// A tensor that goes to a device.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// Position of its device in the map.
    pub device: usize,
    /// Bytes it takes there.
    pub len: u64,
    /// Position of its file.
    pub file: usize,
    source: Arc<dyn Source>,
    offset: u64,
    byte_len: u64,
    runs: Option<Runs>,
    /// What it is made of instead, where a plan says so.
    copies: Option<Arc<Copies>>,
    cast: Option<Arc<dyn Cast>>,
}

/// What a load brings, in the order of the files, and names that select nothing.
pub(crate) fn plan(
    checkpoint: &Checkpoint,
    map: &DeviceMap,
    load: &DeviceLoad,
) -> Result<(Vec<Planned>, Vec<String>)> {
    let (positions, missing) = checkpoint.select(&load.select);
    if let ([], Some(first)) = (&positions[..], missing.first()) {
        let text = format!("nothing is selected: no tensor matches {first:?}");
        return Err(Error::usage("SELECT", text).suggest(near(first, checkpoint.names())));
    }
    let names = load.slices.keys().chain(load.into.keys());
    for name in names {
        checkpoint.tensor(name)?;
    }
    let tensors = positions
        .iter()
        .filter_map(|&position| checkpoint.at(position));
    let planned = tensors.map(|tensor| Planned::new(checkpoint, tensor, map, load));
    Ok((planned.collect::<Result<_>>()?, missing))
}

impl Planned {
    fn new(
        checkpoint: &Checkpoint,
        tensor: TensorRef<'_>,
        map: &DeviceMap,
        load: &DeviceLoad,
    ) -> Result<Self> {
        let name = tensor.name();
        let no_device =
            || Error::usage("SELECT", format!("no device is given for tensor {name:?}"));
        let device = map.position(name).ok_or_else(no_device)?;
        let from = tensor.dtype()?;
        let to = load.dtype.filter(|&to| castable(from, to)).unwrap_or(from);
        let in_file =
            |e: tonnage_format::Error| Error::from(e.tensor(name)).in_file(tensor.file_label());
        let (byte_len, shape, runs) = match load.slices.get(name) {
            None => (tensor.byte_len(), tensor.shape().to_vec(), None),
            Some(ranges) => {
                let runs = runs(from, tensor.shape(), ranges).map_err(in_file)?;
                (
                    runs.byte_len(),
                    shape_of(tensor.shape(), ranges),
                    Some(runs),
                )
            }
        };
        let lost = || Error::usage("SELECT", "no such file");
        let source = checkpoint.source(tensor.file()).ok_or_else(lost)?;
        Ok(Planned {
            name: name.to_owned(),
            dtype: to,
            shape,
            device,
            len: if from == to {
                byte_len
            } else {
                cast_len(from, byte_len, to).map_err(in_file)?
            },
            file: tensor.file(),
            source: Arc::clone(source),
            offset: tensor.offset(),
            byte_len,
            runs,
            copies: None,
            cast: (from != to).then(|| Arc::new(FloatCast { from, to }) as Arc<dyn Cast>),
        })
    }

    /// A tensor of a plan, which takes `len` bytes as `to`.
    pub fn of_local(
        local: &Local,
        to: Dtype,
        len: u64,
        device: usize,
        copies: Copies,
    ) -> Result<Self> {
        let from = local.dtype;
        let nothing = || Arc::new(MemorySource::new(Vec::new(), "<nothing>")) as Arc<dyn Source>;
        let source = copies
            .first()
            .map_or_else(nothing, |(source, _)| Arc::clone(source));
        Ok(Planned {
            name: local.name.to_string(),
            dtype: to,
            shape: local.shape.to_vec(),
            device,
            len,
            file: 0,
            source,
            offset: 0,
            byte_len: copies.iter().map(|(_, copy)| copy.bytes()).sum(),
            runs: None,
            copies: Some(Arc::new(copies)),
            cast: (from != to).then(|| Arc::new(FloatCast { from, to }) as Arc<dyn Cast>),
        })
    }

    /// Bytes that are wanted of the file.
    pub fn wanted(&self) -> u64 {
        self.byte_len
    }

    /// The pieces that bring it to its place.
    pub fn pieces(&self, memory: &Memory, at: u64, slack: u64, tag: u64, into: &mut Vec<Piece>) {
        let plain = |offset: u64, len: u64, at: u64| Piece {
            cast: self.cast.clone(),
            ..Piece::plain(
                Arc::clone(&self.source),
                offset,
                len,
                Arc::clone(memory),
                at,
                tag,
            )
        };
        if let Some(copies) = &self.copies {
            if copies.is_empty() {
                into.push(plain(0, 0, at));
            }
            for (source, copy) in copies.iter() {
                let of_source = |offset, len, place| Piece {
                    source: Arc::clone(source),
                    ..plain(offset, len, at.saturating_add(self.out(place)))
                };
                device::pieces(copy, &of_source, &|len| self.out(len), into);
            }
            return;
        }
        let Some(runs) = &self.runs else {
            into.push(Piece {
                slack,
                ..plain(self.offset, self.byte_len, at)
            });
            return;
        };
        if self.byte_len == 0 {
            into.push(plain(self.offset, 0, at));
        }
        let mut done = at;
        for Rows {
            offset,
            len,
            rows,
            pitch,
        } in rows_of(runs.clone())
        {
            // Casts have a fixed ratio, so this is exact: whole elements on both sides.
            let out = self.out(len);
            into.push(Piece {
                rows,
                pitch,
                memory_pitch: out,
                ..plain(self.offset.saturating_add(offset), len, done)
            });
            done = done.saturating_add(out.saturating_mul(rows));
        }
    }

    fn out(&self, len: u64) -> u64 {
        let Some(cast) = &self.cast else { return len };
        let (from, to) = cast.unit();
        len / (from as u64).max(1) * to as u64
    }

    pub fn on_device(&self, memory: Memory, offset: u64) -> DeviceTensor {
        DeviceTensor {
            name: self.name.clone(),
            dtype: self.dtype,
            shape: self.shape.clone(),
            memory,
            offset,
            len: self.len,
        }
    }

    /// Whether memory of the caller's has room for it and is where it is to go.
    pub fn check_target(&self, memory: &Memory, offset: u64, map: &DeviceMap) -> Result<()> {
        let (name, len) = (&self.name, self.len);
        let room = memory.len().saturating_sub(offset);
        if room < len {
            let text = format!("tensor {name:?} takes {len} bytes, the memory has {room}");
            return Err(Error::usage("BUFFER_SIZE", text));
        }
        let wanted = map
            .devices()
            .get(self.device)
            .map(|device| device.info().id);
        if wanted != Some(memory.device()) {
            let text = format!(
                "tensor {name:?} is to go elsewhere than {}",
                memory.device()
            );
            return Err(Error::usage("BUFFER_SIZE", text));
        }
        Ok(())
    }
}

/// Runs of one length at one distance from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rows {
    offset: u64,
    len: u64,
    rows: u64,
    pitch: u64,
}

/// Runs of a slice joined to rows: two-dimensional pieces, of which devices copy a whole one at once.
fn rows_of(mut runs: Runs) -> impl Iterator<Item = Rows> {
    let mut now: Option<Rows> = None;
    let one = |offset, len| Rows {
        offset,
        len,
        rows: 1,
        pitch: 0,
    };
    std::iter::from_fn(move || {
        for (offset, len) in runs.by_ref() {
            let Some(rows) = &mut now else {
                now = Some(one(offset, len));
                continue;
            };
            // Runs ascend.
            let apart = offset - rows.offset - rows.pitch * (rows.rows - 1);
            if len == rows.len && (rows.rows == 1 || apart == rows.pitch) {
                (rows.rows, rows.pitch) = (rows.rows + 1, apart);
            } else {
                return now.replace(one(offset, len));
            }
        }
        now.take()
    })
}

/// Casts blocks of a tensor on their way.
#[derive(Debug)]
struct FloatCast {
    from: Dtype,
    to: Dtype,
}

impl Cast for FloatCast {
    fn unit(&self) -> (usize, usize) {
        // The fewest elements that are whole bytes on both sides.
        let (from, to) = (self.from.bitsize(), self.to.bitsize());
        let whole = |n: usize| (n * from).is_multiple_of(8) && (n * to).is_multiple_of(8);
        let elements = [1, 2, 4].into_iter().find(|&n| whole(n)).unwrap_or(8);
        (elements * from / 8, elements * to / 8)
    }

    fn cast(
        &self,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(cast(self.from, src, self.to, dst)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::slice::Range;

    fn rows(shape: &[u64], ranges: &[(u64, u64, u64)]) -> Vec<(u64, u64, u64, u64)> {
        let ranges: Vec<Range> = ranges
            .iter()
            .map(|&(start, stop, step)| Range { start, stop, step })
            .collect();
        let runs = runs(Dtype::U8, shape, &ranges).unwrap();
        rows_of(runs)
            .map(|r| (r.offset, r.len, r.rows, r.pitch))
            .collect()
    }

    #[test]
    fn slices_become_rows() {
        assert_eq!(rows(&[4, 10], &[(1, 3, 1)]), [(10, 20, 1, 0)]);
        assert_eq!(rows(&[4, 10], &[(0, 4, 1), (2, 5, 1)]), [(2, 3, 4, 10)]);
        assert_eq!(
            rows(&[2, 3, 10], &[(0, 2, 1), (0, 2, 1), (4, 5, 1)]),
            [(4, 1, 2, 10), (34, 1, 2, 10)]
        );
        assert_eq!(rows(&[10], &[(1, 10, 3)]), [(1, 1, 3, 3)]);
        assert_eq!(rows(&[10], &[(3, 3, 1)]), []);
    }

    #[test]
    fn units_are_whole_bytes() {
        for &row in Dtype::ALL {
            for to in [Dtype::F32, Dtype::BF16, Dtype::F8_E5M2, Dtype::F64] {
                if castable(row, to) && row != to {
                    let cast = FloatCast { from: row, to };
                    let (a, b) = cast.unit();
                    assert_eq!(cast_len(row, a as u64, to).unwrap(), b as u64, "{row} {to}");
                }
            }
        }
    }
}
