//! What every place that bytes come from can do.

use std::fmt::Debug;
use std::fs::File;

use crate::Error;
use crate::direct::DirectRead;
use crate::kind::StorageKind;
use crate::residency::Residency;

/// Bytes that can be read from any position, by several threads at once.
///
/// The contract, tested for each implementation by `tests/contract.rs`: a read fills the whole buffer or
/// is an error; a read that reaches past the end is `UnexpectedEof` and names the source; a read of
/// nothing succeeds anywhere up to the end; no read changes what another sees.
pub trait Source: Send + Sync + Debug {
    /// What messages call it: the path, or `<bytes>`.
    fn label(&self) -> &str;

    /// Length in bytes when it was opened.
    fn len(&self) -> u64;

    /// Whether there is nothing to read.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `dst` with the bytes from `offset` on.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end, else what the system said.
    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error>;

    /// Fills several buffers with consecutive bytes, in one call to the system where that is possible.
    ///
    /// # Errors
    /// As [`Source::read_exact_at`]; the buffers' content is then unspecified.
    fn read_vectored_at(&self, mut offset: u64, dst: &mut [&mut [u8]]) -> Result<(), Error> {
        for part in dst {
            self.read_exact_at(offset, part)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// The whole content, where it lies in memory already.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    /// The open file behind it, where there is one.
    fn file(&self) -> Option<&File> {
        None
    }

    /// Reads that bypass the page cache, where the file system has them. The first call finds out; it may
    /// open the file once more and read a block of it.
    fn direct(&self) -> Option<&dyn DirectRead> {
        None
    }

    /// How much of these bytes is in the page cache. Reads nothing.
    fn residency(&self, offset: u64, len: u64) -> Residency {
        let _ = (offset, len);
        match self.bytes() {
            Some(_) => Residency::all(len),
            None => Residency::Unknown,
        }
    }

    /// What lies behind it; decides how it is read best.
    fn kind(&self) -> StorageKind {
        match self.bytes() {
            Some(_) => StorageKind::Memory,
            None => StorageKind::Remote,
        }
    }

    /// Advice that the page cache need not keep these bytes. Who brought them in calls this when they have
    /// been used, so that a load does not evict what others need. Only whole pages are dropped.
    fn forget(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }
}

/// The end of a read, if it lies within `len`.
pub(crate) fn check(label: &str, offset: u64, wanted: usize, len: u64) -> Result<u64, Error> {
    match offset.checked_add(wanted as u64) {
        Some(end) if end <= len => Ok(end),
        _ => Err(Error::eof(label, offset, wanted, len)),
    }
}
