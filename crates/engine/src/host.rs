//! Host memory for loaded tensors: one anonymous map.
//!
//! Huge pages were tried here and are not asked for. Where memory is already in the machine's hands they make
//! a warm load of 1 GiB up to five times as fast (0.2 s instead of 1.5 s); in a virtual machine that
//! gives free memory back to its host, the first touch of each costs so much that a cold load takes
//! 5 s instead of 1.7 s. Small pages were never slower than the reference.

use memmap2::{MmapMut, MmapOptions};
use tonnage_storage::Error;

/// A buffer of zeros that its owner fills.
#[derive(Debug)]
pub struct HostBuffer(Option<MmapMut>);

impl HostBuffer {
    /// Reserves `len` bytes. Pages are taken when they are first written to.
    ///
    /// # Errors
    /// `OutOfMemory` where there is no room.
    pub fn new(len: u64) -> Result<Self, Error> {
        let failed = |e: std::io::Error| Error::new("reserve memory of", format!("{len} bytes"), e);
        if len == 0 {
            return Ok(HostBuffer(None));
        }
        // No allocation may exceed `isize::MAX`; the map's own check says "invalid data" of it.
        let fits = isize::try_from(len)
            .ok()
            .and_then(|len| usize::try_from(len).ok());
        let len = fits.ok_or_else(|| failed(std::io::ErrorKind::OutOfMemory.into()))?;
        let map = MmapOptions::new().len(len).map_anon().map_err(failed)?;
        Ok(HostBuffer(Some(map)))
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or(&mut [])
    }

    /// The first byte; valid as long as `self` lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.as_slice().as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

impl AsRef<[u8]> for HostBuffer {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_until_filled_and_the_impossible_is_refused() {
        let mut buffer = HostBuffer::new(5000).unwrap();
        assert!(buffer.as_slice().iter().all(|&b| b == 0));
        buffer.as_mut_slice()[4999] = 1;
        assert_eq!(
            (buffer.as_ref().last(), buffer.len(), buffer.is_empty()),
            (Some(&1), 5000, false)
        );
        assert_eq!(buffer.as_ptr(), buffer.as_slice().as_ptr());
        assert!(HostBuffer::new(0).unwrap().is_empty());
        assert_eq!(
            HostBuffer::new(u64::MAX).unwrap_err().kind(),
            std::io::ErrorKind::OutOfMemory
        );
    }
}
