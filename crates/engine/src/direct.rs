//! One block past the page cache: straight into its place where that is aligned, else through a ring.
//!
//! ```text
//!  file   ─┬────────┬── … ──┬────────┬─      units of the disk
//!  wanted      ├──── bytes ─────┤
//!  read    edge │   in place    │ edge       one call; the edges go to the ring, and from there what is wanted
//! ```
//!
//! A disk writes to addresses that agree with the offset in the file, modulo its alignment. The buffers of a
//! framework rarely do; then all of a block is read into the ring and copied, at four times the speed of
//! the disk, while other threads wait for theirs.

use std::sync::atomic::{AtomicU64, Ordering};

use tonnage_storage::{DirectAlign, DirectRead, Error};

use crate::HostBuffer;
use crate::read::Block;

/// Aligned memory of one thread, as large as its largest block so far.
#[derive(Debug)]
pub(crate) struct Ring<'a> {
    memory: Option<HostBuffer>,
    /// Bytes of all rings.
    total: &'a AtomicU64,
}

impl<'a> Ring<'a> {
    pub fn new(total: &'a AtomicU64) -> Self {
        Ring {
            memory: None,
            total,
        }
    }

    fn get(&mut self, len: usize) -> Result<&mut [u8], Error> {
        let have = self.memory.as_ref().map_or(0, HostBuffer::len);
        if have < len {
            self.memory = None;
            self.memory = Some(HostBuffer::new(len as u64)?);
            self.total.fetch_add((len - have) as u64, Ordering::Relaxed);
        }
        let memory = self.memory.as_mut().map(HostBuffer::as_mut_slice);
        Ok(memory.and_then(|m| m.get_mut(..len)).unwrap_or_default())
    }
}

/// Below this a part is not worth a place of its own in the call.
const LEAST: usize = 64 << 10;

/// Fills the parts of a block.
pub(crate) fn read(
    direct: &dyn DirectRead,
    block: &mut Block<'_>,
    ring: &mut Ring<'_>,
) -> Result<(), Error> {
    let align = direct.align();
    if let [part] = &mut block.parts[..]
        && part.len() >= LEAST.max(4 * align.offset)
        && agrees(part, block.offset, align)
    {
        return in_place(direct, block.offset, part, ring);
    }
    let skew = (block.offset % align.offset as u64) as usize;
    let needed = skew.saturating_add(block.len);
    let memory = ring.get(needed.next_multiple_of(align.offset))?;
    direct.read_at_least(block.offset - skew as u64, memory, needed)?;
    let mut rest = memory.get(skew..needed).unwrap_or_default();
    for part in &mut block.parts {
        let (bytes, after) = rest.split_at(part.len().min(rest.len()));
        part.copy_from_slice(bytes);
        rest = after;
    }
    Ok(())
}

/// Whether the bytes of a part lie in memory as they lie in the file, as far as the disk cares.
fn agrees(part: &[u8], offset: u64, align: DirectAlign) -> bool {
    let head = offset.wrapping_neg() % align.offset as u64;
    let inner = part.as_ptr().addr().wrapping_add(head as usize);
    inner.is_multiple_of(align.memory)
}

fn in_place(
    direct: &dyn DirectRead,
    offset: u64,
    part: &mut [u8],
    ring: &mut Ring<'_>,
) -> Result<(), Error> {
    let DirectAlign {
        offset: step,
        memory,
    } = direct.align();
    // The part has several units, so the edges lie within it and do not meet.
    let head = (offset.wrapping_neg() % step as u64) as usize;
    let tail = (part.len() - head) % step;
    let before = (step - head) % step;
    let begin = offset - before as u64;
    let apart = step.max(memory);
    let (first, last) = ring.get(2 * apart)?.split_at_mut(apart);
    let (first, last) = (&mut first[..step], &mut last[..step]);
    let inner_end = part.len() - tail;
    let inner = part.get_mut(head..inner_end).unwrap_or_default();
    let mut parts: Vec<&mut [u8]> = Vec::with_capacity(3);
    if head > 0 {
        parts.push(&mut *first);
    }
    parts.push(inner);
    if tail > 0 {
        parts.push(&mut *last);
    }
    direct.read_vectored_at_least(begin, &mut parts, before + inner_end + tail)?;
    if let Some((to, from)) = part.get_mut(..head).zip(first.get(before..)) {
        to.copy_from_slice(from.get(..head).unwrap_or_default());
    }
    if let Some((to, from)) = part.get_mut(inner_end..).zip(last.get(..tail)) {
        to.copy_from_slice(from);
    }
    Ok(())
}
