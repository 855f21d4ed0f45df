//! Blocks of memory: a device's, which the host can't touch, and page-locked ones of the host.

use std::collections::BTreeMap;

use crate::access::{Rows, Uses};
use crate::raw;
use crate::world::{Code, INVALID_VALUE, OUT_OF_MEMORY};

/// Where allocations begin, as on real cards.
const ALIGN: usize = 512;
/// What fresh memory is filled with: nothing may count on zeros.
const POISON: u8 = 0xCD;
const PAGE: usize = 4096;

/// One allocation.
#[derive(Debug)]
pub struct Block {
    pub len: usize,
    pub uses: Uses,
}

/// A device's memory. Callers' addresses are a map without permissions; the driver has another map of the
/// same file. Addresses go around before they are used again, so that a late use of freed memory is seen.
#[derive(Debug)]
pub struct Arena {
    file: i32,
    outer: usize,
    inner: usize,
    span: usize,
    pub total: usize,
    pub used: usize,
    cursor: usize,
    pub blocks: BTreeMap<usize, Block>,
    freed: BTreeMap<usize, usize>,
}

impl Arena {
    pub fn new(total: usize) -> Result<Self, Code> {
        let span = total.checked_mul(2).ok_or(INVALID_VALUE)?;
        let file = raw::memory_file(span)?;
        Ok(Arena {
            file,
            outer: raw::map(Some(file), span, false)?,
            inner: raw::map(Some(file), span, true)?,
            span,
            total,
            used: 0,
            cursor: 0,
            blocks: BTreeMap::new(),
            freed: BTreeMap::new(),
        })
    }

    /// Unmaps it. Nothing of it is used any more.
    pub fn close(self) {
        raw::unmap(self.outer, self.span);
        raw::unmap(self.inner, self.span);
        raw::close(self.file);
    }

    /// A block, by its caller's address.
    pub fn allocate(&mut self, len: usize, poison: bool) -> Result<usize, Code> {
        let size = len.checked_next_multiple_of(ALIGN).ok_or(OUT_OF_MEMORY)?;
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        if size > self.total - self.used {
            return Err(OUT_OF_MEMORY);
        }
        let at = self.gap(self.cursor, size).or_else(|| self.gap(0, size));
        let at = at.ok_or(OUT_OF_MEMORY)?;
        let dead: Vec<usize> = self
            .freed
            .range(..at + size)
            .rev()
            .take_while(|(start, len)| **start + **len > at)
            .map(|(start, _)| *start)
            .collect();
        dead.iter().for_each(|start| {
            self.freed.remove(start);
        });
        self.cursor = at + size;
        self.used += size;
        let uses = Uses::default();
        self.blocks.insert(at, Block { len, uses });
        if poison {
            raw::fill(self.inner + at, POISON, len);
        }
        Ok(self.outer + at)
    }

    /// Room of this size at `from` or behind.
    fn gap(&self, from: usize, size: usize) -> Option<usize> {
        let end = |(start, block): (&usize, &Block)| start + block.len.next_multiple_of(ALIGN);
        let before = self.blocks.range(..from).next_back().map_or(0, end);
        let mut at = from.max(before);
        for next in self.blocks.range(at..) {
            if next.0 - at >= size {
                break;
            }
            at = end(next);
        }
        (self.span.checked_sub(at)? >= size).then_some(at)
    }

    /// Whether an address is one of this device.
    pub fn contains(&self, address: usize) -> bool {
        (self.outer..self.outer + self.span).contains(&address)
    }

    /// The start of the block that all of a range lies in.
    pub fn find(&self, address: usize, span: usize) -> Option<usize> {
        let at = address.checked_sub(self.outer)?;
        let (start, block) = self.blocks.range(..=at).next_back()?;
        (at.checked_add(span)? <= start + block.len).then_some(*start)
    }

    /// Whether an address was in a block that has been freed.
    pub fn was_freed(&self, address: usize) -> bool {
        let at = address.wrapping_sub(self.outer);
        let before = self.freed.range(..=at).next_back();
        before.is_some_and(|(start, len)| at < start + len)
    }

    /// The driver's own address of a caller's.
    pub fn inner(&self, bytes: Rows) -> Rows {
        Rows {
            start: bytes.start - self.outer + self.inner,
            ..bytes
        }
    }

    pub fn block(&mut self, address: usize) -> Option<&mut Block> {
        let at = address.checked_sub(self.outer)?;
        self.blocks.get_mut(&at)
    }

    /// Takes a block away, whose copies are over.
    pub fn free(&mut self, address: usize) {
        let at = address.wrapping_sub(self.outer);
        if let Some(block) = self.blocks.remove(&at) {
            self.used -= block.len.next_multiple_of(ALIGN);
            self.freed.insert(at, block.len);
            let (from, to) = (at.next_multiple_of(PAGE), (at + block.len) / PAGE * PAGE);
            if from < to {
                raw::punch(self.file, from, to - from);
            }
        }
    }
}

/// Memory of the host that copies run late from.
#[derive(Debug)]
pub struct Pinned {
    pub block: Block,
    /// Allocated by the driver, not only registered with it.
    pub ours: bool,
    /// The device that was current.
    pub device: usize,
}

impl Pinned {
    /// Bytes of the map of one that is ours.
    pub fn map_len(&self) -> usize {
        self.block.len.next_multiple_of(PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_apart_and_freed_ones_stay_known() {
        let mut arena = Arena::new(1 << 20).unwrap();
        let first = arena.allocate(1000, true).unwrap();
        let second = arena.allocate(1, true).unwrap();
        assert!(second >= first + 1000 && second.is_multiple_of(512));
        assert!(arena.find(first + 999, 1).is_some() && arena.find(first + 999, 2).is_none());
        arena.free(first);
        assert!(arena.was_freed(first + 999) && !arena.was_freed(second));
        // The room is there again, at other addresses as long as there are any.
        let rest = arena.total - arena.used;
        let all = arena.allocate(rest, false).unwrap();
        assert!(all > second && arena.was_freed(first));
        assert_eq!(arena.allocate(1, false), Err(OUT_OF_MEMORY));
        assert_eq!(arena.allocate(usize::MAX, false), Err(OUT_OF_MEMORY));
        arena.free(all);
        for _ in 0..100 {
            let block = arena.allocate(300_000, true).unwrap();
            arena.free(block);
        }
        assert_eq!(arena.used, 512);
        arena.close();
    }
}
