//! A big-endian file, read as if it were little-endian: numbers are turned round as their bytes pass.
//!
//! Everything above reads positions of a source, so nothing above knows of it. What is read is turned round
//! where it was put; of a number or a block that lies only partly in a read, the whole is read once more.

use std::sync::Arc;

use tonnage_storage::{Error, Residency, Source, StorageKind};

use super::header::Gguf;
use super::types::swaps;
use super::value::ByteOrder;

/// Largest block of a type that is turned round, in bytes: Q6_K's, with room to spare.
const LARGEST: usize = 256;

/// Bytes of a tensor: blocks of one size, and the numbers in each.
#[derive(Clone, Copy, Debug)]
struct Segment {
    start: u64,
    end: u64,
    block: u64,
    numbers: &'static [(u16, u8)],
}

/// A source whose numbers are turned round, tensor by tensor.
#[derive(Debug)]
pub struct Swapped {
    inner: Arc<dyn Source>,
    /// In the order of their bytes, none within another.
    segments: Vec<Segment>,
}

impl Swapped {
    /// The file of a header, if it is big-endian; otherwise `None`, since nothing is to be done.
    pub fn of(gguf: &Gguf, inner: &Arc<dyn Source>) -> Option<Self> {
        Self::at(gguf, inner, |position| {
            gguf.tensor(position).map(|tensor| tensor.offset)
        })
    }

    /// The tensors of a big-endian file where `place` says that each lies in `inner`, by its position in the
    /// header.
    pub fn at(
        gguf: &Gguf,
        inner: &Arc<dyn Source>,
        place: impl Fn(usize) -> Option<u64>,
    ) -> Option<Self> {
        if gguf.byte_order() == ByteOrder::Little {
            return None;
        }
        let mut segments = Vec::new();
        for (position, tensor) in gguf.tensors().enumerate() {
            let numbers = swaps(tensor.ty).unwrap_or(&[]);
            let block = tensor.ty.bytes() as u64;
            if let (Some(start), false) = (place(position), numbers.is_empty() || tensor.len == 0)
                && block as usize <= LARGEST
            {
                segments.push(Segment {
                    start,
                    end: start.saturating_add(tensor.len),
                    block,
                    numbers,
                });
            }
        }
        segments.sort_by_key(|segment| segment.start);
        let inner = Arc::clone(inner);
        Some(Swapped { inner, segments })
    }

    fn turn(&self, segment: &Segment, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        // Both ends lie within the file, so nothing here overflows.
        let end = offset + dst.len() as u64;
        let (from, to) = (offset.max(segment.start), end.min(segment.end));
        let mut at = from - (from - segment.start) % segment.block;
        while at < to {
            let next = at + segment.block;
            let (first, last) = (at.max(from), next.min(to));
            let part = dst.get_mut((first - offset) as usize..(last - offset) as usize);
            let part = part.unwrap_or_default();
            if (first, last) == (at, next) {
                turn_block(part, segment.numbers);
            } else {
                let mut whole = [0; LARGEST];
                let whole = whole.get_mut(..segment.block as usize).unwrap_or_default();
                self.inner.read_exact_at(at, whole)?;
                turn_block(whole, segment.numbers);
                let begin = (first - at) as usize;
                if let Some(wanted) = whole.get(begin..begin + part.len()) {
                    part.copy_from_slice(wanted);
                }
            }
            at = next;
        }
        Ok(())
    }
}

fn turn_block(block: &mut [u8], numbers: &[(u16, u8)]) {
    for &(at, len) in numbers {
        let at = usize::from(at);
        if let Some(number) = block.get_mut(at..at + usize::from(len)) {
            number.reverse();
        }
    }
}

impl Source for Swapped {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        self.inner.read_exact_at(offset, dst)?;
        let end = offset + dst.len() as u64;
        let first = self
            .segments
            .partition_point(|segment| segment.end <= offset);
        let concerned = self.segments.iter().skip(first);
        for segment in concerned.take_while(|segment| segment.start < end) {
            self.turn(segment, offset, dst)?;
        }
        Ok(())
    }

    fn residency(&self, offset: u64, len: u64) -> Residency {
        self.inner.residency(offset, len)
    }

    fn kind(&self) -> StorageKind {
        self.inner.kind()
    }

    fn forget(&self, offset: u64, len: u64) {
        self.inner.forget(offset, len);
    }
}
