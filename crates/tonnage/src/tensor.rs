//! One tensor of a checkpoint, and slices of it. Neither reads anything until asked.

use std::sync::Arc;

use tonnage_engine as engine;
use tonnage_format::slice::{Range, Runs, runs, shape_of};
use tonnage_format::{Dtype, Row};
use tonnage_storage::Source;

use crate::checkpoint::{Checkpoint, check_buffer};
use crate::error::{Error, Result};

/// A tensor: name, dtype, shape, and where its bytes are.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) position: usize,
    pub(crate) row: Row<'a>,
}

impl<'a> TensorRef<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        self.row.name
    }

    /// Its position in the checkpoint, for [`Checkpoint::at`] and [`Checkpoint::read_many`].
    pub fn index(&self) -> usize {
        self.position
    }

    /// Its dtype.
    ///
    /// # Errors
    /// `UNSUPPORTED_DTYPE`, if the specification's table does not have it.
    pub fn dtype(&self) -> Result<Dtype> {
        let known = self.row.dtype.known();
        known.map_err(|e| Error::from(e.tensor(self.row.name)).in_file(self.file_label()))
    }

    /// The dtype's name as the header writes it.
    pub fn dtype_name(&self) -> &'a str {
        self.row.dtype.name()
    }

    /// Its extents in elements.
    pub fn shape(&self) -> &'a [u64] {
        self.row.shape
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> u64 {
        self.row.len
    }

    /// Elements it has.
    pub fn elements(&self) -> u64 {
        self.row.elements()
    }

    /// Position of its file in [`Checkpoint::files`].
    pub fn file(&self) -> usize {
        self.row.source
    }

    /// Its file's path, or what the source is called.
    pub fn file_label(&self) -> &'a str {
        self.checkpoint
            .files()
            .get(self.row.source)
            .map_or("", |file| &file.label)
    }

    /// Its first byte, counted from the start of the file.
    pub fn offset(&self) -> u64 {
        self.row.offset
    }

    /// Its source, shared.
    pub(crate) fn shared_source(&self) -> Result<Arc<dyn Source>> {
        let source = self.checkpoint.source(self.row.source);
        source
            .map(Arc::clone)
            .ok_or_else(|| Error::usage("BUFFER_SIZE", "no such file"))
    }

    pub(crate) fn source(&self) -> Result<&'a dyn Source> {
        let source = self.checkpoint.source(self.row.source);
        source
            .map(|source| &**source)
            .ok_or_else(|| Error::usage("BUFFER_SIZE", "no such file"))
    }

    /// Its bytes where they lie; see [`Checkpoint::view`].
    ///
    /// # Errors
    /// As [`Checkpoint::view`].
    pub fn view(&self) -> Result<&'a [u8]> {
        self.checkpoint.bytes_of(&self.row)
    }

    /// Its bytes, read.
    ///
    /// # Errors
    /// What the system said.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = room(self.byte_len())?;
        self.read_into(&mut bytes)?;
        Ok(bytes)
    }

    /// Its bytes, read into `dst`.
    ///
    /// # Errors
    /// What the system said; `BUFFER_SIZE` if `dst` has another length.
    pub fn read_into(&self, dst: &mut [u8]) -> Result<()> {
        check_buffer(self.row.name, self.row.len, dst.len())?;
        let job = engine::Read {
            source: self.source()?,
            offset: self.row.offset,
            dst,
        };
        let read = engine::read(vec![job], &engine::Options::default());
        read.map(drop)
            .map_err(|error| self.checkpoint.name_tensor(error))
    }

    /// Some of its bytes, from `offset` within the tensor on, read into `dst`.
    ///
    /// # Errors
    /// What the system said; `BUFFER_SIZE` if the tensor does not have that many.
    pub fn read_at(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(dst.len() as u64);
        if end.is_none_or(|end| end > self.row.len) {
            let (name, len, wanted) = (self.row.name, self.row.len, dst.len());
            let text =
                format!("tensor {name:?} has {len} bytes, asked were {wanted} from {offset} on");
            return Err(Error::usage("BUFFER_SIZE", text));
        }
        Ok(self
            .source()?
            .read_exact_at(self.row.offset.saturating_add(offset), dst)?)
    }

    /// A slice, one range a dimension; dimensions without one are taken whole.
    ///
    /// # Errors
    /// `SLICE` where the ranges do not fit the shape, `PARTIAL_BYTE` where a run would begin or end
    /// inside a byte, `UNSUPPORTED_DTYPE`.
    pub fn slice(&self, ranges: &[Range]) -> Result<SliceRef<'a>> {
        let in_file = |e: tonnage_format::Error| {
            Error::from(e.tensor(self.row.name)).in_file(self.file_label())
        };
        let runs = runs(self.dtype()?, self.row.shape, ranges).map_err(in_file)?;
        Ok(SliceRef {
            tensor: *self,
            shape: shape_of(self.row.shape, ranges),
            runs,
        })
    }
}

/// A slice of a tensor: some byte runs of it, and a shape with as many dimensions.
#[derive(Clone, Debug)]
pub struct SliceRef<'a> {
    tensor: TensorRef<'a>,
    shape: Vec<u64>,
    runs: Runs,
}

impl<'a> SliceRef<'a> {
    /// The tensor.
    pub fn tensor(&self) -> TensorRef<'a> {
        self.tensor
    }

    /// Its extents in elements.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> u64 {
        self.runs.byte_len()
    }

    /// Its bytes in row-major order, read.
    ///
    /// # Errors
    /// What the system said.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = room(self.byte_len())?;
        self.read_into(&mut bytes, &engine::Options::default())?;
        Ok(bytes)
    }

    /// Its bytes, read into `dst`. Reads the runs that the slice covers and, where they lie close
    /// together, what is between them: never more than [`GAP`] bytes for each run.
    ///
    /// # Errors
    /// What the system said; `BUFFER_SIZE` if `dst` has another length; `CANCELLED`.
    pub fn read_into(&self, dst: &mut [u8], options: &engine::Options<'_>) -> Result<()> {
        check_buffer(self.tensor.row.name, self.byte_len(), dst.len())?;
        let source = self.tensor.source()?;
        let base = self.tensor.row.offset;
        let mut direct = Vec::new();
        let mut staging = Vec::new();
        let mut rest = dst;
        for window in Windows(self.runs.clone().peekable()) {
            let (part, after) = rest.split_at_mut(
                usize::try_from(window.taken)
                    .unwrap_or(usize::MAX)
                    .min(rest.len()),
            );
            rest = after;
            let offset = base.saturating_add(window.begin);
            if window.runs.is_empty() {
                direct.push(engine::Read {
                    source,
                    offset,
                    dst: part,
                });
                continue;
            }
            if options.cancel.is_some_and(engine::Cancel::is_cancelled) {
                return Err(engine::Error::Cancelled.into());
            }
            // At most `WINDOW` bytes.
            staging.resize(window.len as usize, 0);
            source.read_exact_at(offset, &mut staging)?;
            if let Some(check) = options.check {
                check.check(source, offset, &mut [&staging[..]].into_iter())?;
            }
            gather(&staging, &window, part);
        }
        let read = engine::read(direct, options);
        read.map(drop)
            .map_err(|error| self.tensor.checkpoint.name_tensor(error))
    }
}

/// Bytes between two runs up to which they are read together: a call to the system costs about as much.
pub const GAP: u64 = 16 << 10;
/// Bytes that are read together at most.
const WINDOW: u64 = 4 << 20;

/// Neighbouring runs that are read in one call.
struct Window {
    begin: u64,
    len: u64,
    /// Bytes of the slice in it.
    taken: u64,
    /// Begin and length of each run in it; empty for a single run, which needs no gathering.
    runs: Vec<(u64, u64)>,
}

struct Windows(std::iter::Peekable<Runs>);

impl Iterator for Windows {
    type Item = Window;

    fn next(&mut self) -> Option<Window> {
        let (begin, len) = self.0.next()?;
        let mut window = Window {
            begin,
            len,
            taken: len,
            runs: Vec::new(),
        };
        while let Some(&(next, more)) = self.0.peek() {
            // Runs ascend, and all of them lie within the tensor, so nothing here overflows.
            let gap = next - (begin + window.len);
            if gap > GAP || next + more - begin > WINDOW {
                break;
            }
            if window.runs.is_empty() {
                window.runs.push((begin, len));
            }
            window.runs.push((next, more));
            window.len = next + more - begin;
            window.taken += more;
            self.0.next();
        }
        Some(window)
    }
}

fn gather(staging: &[u8], window: &Window, mut dst: &mut [u8]) {
    for &(begin, len) in &window.runs {
        let (from, len) = ((begin - window.begin) as usize, len as usize);
        let (part, rest) = dst.split_at_mut(len.min(dst.len()));
        part.copy_from_slice(&staging[from..from + part.len()]);
        dst = rest;
    }
}

/// Zeros to be read into. The length comes from a file whose real length was checked against it.
pub(crate) fn room(len: u64) -> Result<Vec<u8>> {
    let refused = || {
        tonnage_storage::Error::new(
            "reserve memory of",
            format!("{len} bytes"),
            std::io::ErrorKind::OutOfMemory,
        )
    };
    let len = usize::try_from(len).map_err(|_| refused())?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| refused())?;
    bytes.resize(len, 0);
    Ok(bytes)
}
