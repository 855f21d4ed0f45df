//! What every place that bytes come from can do.

use std::fmt::Debug;
use std::fs::File;

use crate::Error;

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
}

/// The end of a read, if it lies within `len`.
pub(crate) fn check(label: &str, offset: u64, wanted: usize, len: u64) -> Result<u64, Error> {
    match offset.checked_add(wanted as u64) {
        Some(end) if end <= len => Ok(end),
        _ => Err(Error::eof(label, offset, wanted, len)),
    }
}
