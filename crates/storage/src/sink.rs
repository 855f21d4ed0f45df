//! What every place that bytes go to can do.

use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Error;

/// Bytes that can be written at any position, by several threads at once where the ranges are disjoint.
pub trait Sink: Send + Sync + Debug {
    /// What messages call it.
    fn label(&self) -> &str;

    /// Writes all of `src` from `offset` on.
    ///
    /// # Errors
    /// What the system said, e.g. that the disk is full.
    fn write_all_at(&self, offset: u64, src: &[u8]) -> Result<(), Error>;

    /// Makes room for `len` bytes, so that a full disk is met now and not after half of the work.
    /// Where room cannot be reserved, this does nothing.
    ///
    /// # Errors
    /// As [`Sink::write_all_at`].
    fn reserve(&self, len: u64) -> Result<(), Error>;

    /// Sets the length.
    ///
    /// # Errors
    /// As [`Sink::write_all_at`].
    fn set_len(&self, len: u64) -> Result<(), Error>;

    /// Hints that this range is complete: it may go to the disk while others are still written.
    fn start_writeback(&self, _offset: u64, _len: u64) {}

    /// Writing past the page cache, where this sink can do that and gains by it.
    fn direct(&self) -> Option<&dyn DirectWrite> {
        None
    }

    /// Returns when everything written is on the disk.
    ///
    /// # Errors
    /// As [`Sink::write_all_at`].
    fn sync(&self) -> Result<(), Error>;
}

/// Writes that go from memory to the disk, past the page cache.
///
/// They and [`Sink::write_all_at`] may be mixed in one file, as long as no aligned block of
/// [`DirectWrite::align`] bytes is written to in both ways.
pub trait DirectWrite: Send + Sync {
    /// What offsets, lengths and addresses have to be multiples of.
    fn align(&self) -> usize;

    /// Writes all of `src` from `offset` on.
    ///
    /// # Errors
    /// As [`Sink::write_all_at`]. What is not aligned, or is refused by a file system that does not
    /// write directly after all, is written the other way and is no error.
    fn write_direct_at(&self, offset: u64, src: &[u8]) -> Result<(), Error>;
}

/// A sink in memory: what becomes of a file that nobody wants on a disk.
#[derive(Debug)]
pub struct MemorySink {
    bytes: Mutex<Vec<u8>>,
    label: String,
}

impl MemorySink {
    /// An empty sink.
    pub fn new(label: impl Into<String>) -> Self {
        MemorySink {
            bytes: Mutex::new(Vec::new()),
            label: label.into(),
        }
    }

    /// What was written.
    pub fn into_vec(self) -> Vec<u8> {
        self.bytes
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grow(&self, bytes: &mut Vec<u8>, len: u64) -> Result<(), Error> {
        let no_room = || Error::new("write", &self.label, std::io::ErrorKind::OutOfMemory);
        let len = usize::try_from(len).map_err(|_| no_room())?;
        if len > bytes.len() {
            bytes
                .try_reserve(len - bytes.len())
                .map_err(|_| no_room())?;
            bytes.resize(len, 0);
        }
        Ok(())
    }
}

impl Sink for MemorySink {
    fn label(&self) -> &str {
        &self.label
    }

    fn write_all_at(&self, offset: u64, src: &[u8]) -> Result<(), Error> {
        let mut bytes = self.lock();
        let end = offset.saturating_add(src.len() as u64);
        self.grow(&mut bytes, end)?;
        // Both ends are indices of a vector that exists.
        bytes[offset as usize..end as usize].copy_from_slice(src);
        Ok(())
    }

    fn reserve(&self, len: u64) -> Result<(), Error> {
        let mut bytes = self.lock();
        let more = usize::try_from(len).map(|len| len.saturating_sub(bytes.len()));
        let reserved = more.is_ok_and(|more| bytes.try_reserve(more).is_ok());
        if reserved {
            Ok(())
        } else {
            Err(Error::new(
                "write",
                &self.label,
                std::io::ErrorKind::OutOfMemory,
            ))
        }
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        let mut bytes = self.lock();
        self.grow(&mut bytes, len)?;
        bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_takes_writes_in_any_order_and_refuses_the_impossible() {
        let sink = MemorySink::new("<bytes>");
        sink.reserve(9).unwrap();
        sink.write_all_at(6, b"two").unwrap();
        sink.write_all_at(0, b"forty-").unwrap();
        sink.start_writeback(0, 6);
        sink.sync().unwrap();
        assert_eq!(
            sink.reserve(u64::MAX).unwrap_err().kind(),
            std::io::ErrorKind::OutOfMemory
        );
        assert!(sink.write_all_at(u64::MAX, b"x").is_err());
        sink.set_len(5).unwrap();
        sink.set_len(6).unwrap();
        assert_eq!(sink.label(), "<bytes>");
        assert_eq!(sink.into_vec(), b"forty\0");
    }
}
