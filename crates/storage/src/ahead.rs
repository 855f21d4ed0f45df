//! Reading ahead for callers that take many small pieces one after the other.
//!
//! A system call for every tensor of a few bytes costs more than the bytes. A read that begins where the
//! one before it ended is answered with a block, and the following ones out of that block. Any other read
//! takes exactly what was asked, and large ones never pass through here.

use std::fs::File;
use std::sync::{Mutex, TryLockError};

use crate::source::check;
use crate::{DirectRead, Error, Residency, Source, StorageKind};

/// Longest read that is served from a block: beyond this the copy costs more than the call.
const SMALL: usize = 16 << 10;
/// Bytes of a block. 256 KiB of small tensors cost one call, and fit in the second-level cache.
const AHEAD: u64 = 256 << 10;

/// A source with a block of what was read ahead; the block is its only memory.
#[derive(Debug)]
pub struct ReadAhead<S> {
    inner: S,
    block: Mutex<Block>,
}

#[derive(Debug)]
struct Block {
    start: u64,
    bytes: Vec<u8>,
    /// Where a read begins that goes on from the last one.
    next: u64,
}

impl Block {
    fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(from..from.checked_add(len)?)
    }
}

impl<S: Source> ReadAhead<S> {
    /// Reads of `inner`, small ones in a row by blocks.
    pub fn new(inner: S) -> Self {
        let (bytes, next) = (Vec::new(), u64::MAX);
        let block = Block {
            start: 0,
            bytes,
            next,
        };
        ReadAhead {
            inner,
            block: Mutex::new(block),
        }
    }

    /// Answers from the block, filling it first where the read goes on from the last one. False if the
    /// read is for the source itself.
    fn serve(&self, block: &mut Block, offset: u64, dst: &mut [u8]) -> bool {
        let follows = std::mem::replace(&mut block.next, offset + dst.len() as u64) == offset;
        if let Some(bytes) = block.get(offset, dst.len()) {
            dst.copy_from_slice(bytes);
            return true;
        }
        let len = AHEAD.min(self.inner.len() - offset);
        if !follows || len <= dst.len() as u64 {
            return false;
        }
        block.start = offset;
        block.bytes.resize(len as usize, 0);
        if self.inner.read_exact_at(offset, &mut block.bytes).is_err() {
            // What was asked for may still be there; the source says so itself.
            block.bytes.clear();
            return false;
        }
        block.get(offset, dst.len()).is_some_and(|bytes| {
            dst.copy_from_slice(bytes);
            true
        })
    }
}

impl<S: Source> Source for ReadAhead<S> {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        check(self.label(), offset, dst.len(), self.len())?;
        if !dst.is_empty() && dst.len() <= SMALL {
            // Whoever comes while another reads does not wait.
            let mut block = match self.block.try_lock() {
                Ok(block) => block,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return self.inner.read_exact_at(offset, dst),
            };
            if self.serve(&mut block, offset, dst) {
                return Ok(());
            }
        }
        self.inner.read_exact_at(offset, dst)
    }

    fn read_vectored_at(&self, offset: u64, dst: &mut [&mut [u8]]) -> Result<(), Error> {
        self.inner.read_vectored_at(offset, dst)
    }

    fn bytes(&self) -> Option<&[u8]> {
        self.inner.bytes()
    }

    fn file(&self) -> Option<&File> {
        self.inner.file()
    }

    fn direct(&self) -> Option<&dyn DirectRead> {
        self.inner.direct()
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::MemorySource;

    #[derive(Debug)]
    struct Counted(MemorySource, AtomicU64, AtomicU64);

    impl Source for Counted {
        fn label(&self) -> &str {
            self.0.label()
        }

        fn len(&self) -> u64 {
            self.0.len()
        }

        fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.2.fetch_add(dst.len() as u64, Ordering::Relaxed);
            self.0.read_exact_at(offset, dst)
        }
    }

    fn counted(len: usize) -> (Vec<u8>, ReadAhead<Counted>) {
        let data: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
        let memory = MemorySource::new(data.clone(), "memory");
        let source = Counted(memory, AtomicU64::new(0), AtomicU64::new(0));
        (data, ReadAhead::new(source))
    }

    #[test]
    fn small_reads_in_a_row_take_few_calls() {
        let (data, source) = counted(1 << 20);
        for (i, wanted) in data.chunks(64).enumerate() {
            let mut found = [0; 64];
            source.read_exact_at(i as u64 * 64, &mut found).unwrap();
            assert_eq!(found, wanted);
        }
        assert!(source.inner.1.load(Ordering::Relaxed) <= 6);
    }

    #[test]
    fn other_reads_take_what_was_asked() {
        let (data, source) = counted(1 << 20);
        let mut asked = 0;
        for offset in (0..1 << 20).step_by(4096) {
            let mut found = [0; 64];
            source.read_exact_at(offset as u64, &mut found).unwrap();
            assert_eq!(found, data[offset..offset + 64]);
            asked += 64;
        }
        let mut large = vec![0; SMALL + 1];
        source.read_exact_at(64, &mut large).unwrap();
        asked += large.len() as u64;
        assert_eq!(source.inner.2.load(Ordering::Relaxed), asked);
        let (_, source) = counted(100);
        source.read_exact_at(0, &mut [0; 50]).unwrap();
        source.read_exact_at(50, &mut [0; 50]).unwrap();
        assert!(source.read_exact_at(100, &mut [0; 1]).is_err());
        assert!(source.read_exact_at(u64::MAX, &mut [0; 1]).is_err());
    }
}
