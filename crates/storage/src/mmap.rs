//! Files seen through the page table: the only `unsafe` of this crate.
//!
//! A map is a choice, not a fate: views use it, bulk loading reads. Reading the memory of a map whose
//! file has since been truncated raises SIGBUS, so nothing in here touches that memory on its own;
//! only who asks for the bytes does, and the documentation of each such method says so.
//!
//! Invariants:
//! 1. The file is open for reading and regular, and its length was taken from the open file itself.
//! 2. A map is never longer than its file was at that moment.
//! 3. A map lives as long as the value that owns it; slices of it borrow that value.
//! 4. A shared map is read-only: this process cannot write to it. Another process that changes the
//!    file changes the bytes; only plain bytes are ever read from it, for which every pattern is valid.
//! 5. A private map is writable memory of this process alone: writes copy the page and never reach the
//!    file. Rust code sees it through a raw pointer or a borrow that its caller answers for.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::{Advice, Mmap, MmapOptions, MmapRaw};

use crate::file::{FileSource, regular_len};
use crate::{DirectRead, Error, Residency, Source, StorageKind};

/// A file and a shared read-only map of it. [`Source::bytes`] is the map; `read_exact_at` does not use it.
#[derive(Debug)]
pub struct MmapSource {
    map: Mmap,
    file: FileSource,
}

impl MmapSource {
    /// Opens and maps a regular file.
    ///
    /// # Errors
    /// As [`FileSource::open`], and `OutOfMemory` where there is no room in the address space.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::over(FileSource::open(path)?)
    }

    /// Maps an open file; messages call it `label`.
    ///
    /// # Errors
    /// As [`MmapSource::open`].
    pub fn from_file(file: File, label: impl Into<String>) -> Result<Self, Error> {
        Self::over(FileSource::from_file(file, label)?)
    }

    fn over(source: FileSource) -> Result<Self, Error> {
        let refused = |e: std::io::Error| Error::new("map", source.label(), e);
        let no_room = |_| refused(std::io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(source.len()).map_err(no_room)?;
        let file = source.file();
        let file = file.ok_or_else(|| refused(std::io::ErrorKind::Unsupported.into()))?;
        let mut options = MmapOptions::new();
        options.len(len);
        // SAFETY: invariants 1, 2 and 4; the source took the length from this very file.
        let map = unsafe { options.map(file) }.map_err(refused)?;
        Ok(MmapSource { map, file: source })
    }

    /// Tells the system that these bytes will be wanted soon; it starts to read them.
    pub fn will_need(&self, offset: u64, len: u64) {
        let (offset, len) = clamp(offset, len, self.map.len());
        // Advice: whoever cannot follow it loses nothing.
        let _ = self.map.advise_range(Advice::WillNeed, offset, len);
    }

    /// Fills the page table for these bytes, so that reading them takes no fault. Reads the file.
    pub fn populate(&self, offset: u64, len: u64) {
        let (offset, len) = clamp(offset, len, self.map.len());
        let _ = self.map.advise_range(POPULATE, offset, len);
    }
}

impl Source for MmapSource {
    fn label(&self) -> &str {
        self.file.label()
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        self.file.read_exact_at(offset, dst)
    }

    fn read_vectored_at(&self, offset: u64, dst: &mut [&mut [u8]]) -> Result<(), Error> {
        self.file.read_vectored_at(offset, dst)
    }

    /// The map. Reading it after the file was truncated raises SIGBUS.
    fn bytes(&self) -> Option<&[u8]> {
        Some(&self.map)
    }

    fn file(&self) -> Option<&File> {
        self.file.file()
    }

    fn direct(&self) -> Option<&dyn DirectRead> {
        self.file.direct()
    }

    fn residency(&self, offset: u64, len: u64) -> Residency {
        self.file.residency(offset, len)
    }

    fn kind(&self) -> StorageKind {
        self.file.kind()
    }

    /// Pages that are in use through the map stay.
    fn forget(&self, offset: u64, len: u64) {
        self.file.forget(offset, len);
    }
}

/// A private, writable map of a file: what a caller outside Rust gets as a buffer. Writing to it copies
/// the page; the file never changes.
#[derive(Debug)]
pub struct PrivateMap {
    map: MmapRaw,
    label: String,
}

impl PrivateMap {
    /// Opens and maps a regular file.
    ///
    /// # Errors
    /// As [`MmapSource::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let source = FileSource::open(path)?;
        match source.file() {
            Some(file) => Self::from_file(file, source.label()),
            None => Err(Error::new(
                "map",
                source.label(),
                std::io::ErrorKind::Unsupported,
            )),
        }
    }

    /// Maps an open file, which may be closed afterwards.
    ///
    /// # Errors
    /// As [`MmapSource::open`].
    pub fn from_file(file: &File, label: impl Into<String>) -> Result<Self, Error> {
        let label = label.into();
        let len = map_len(file, &label)?;
        let mut options = MmapOptions::new();
        // Without this the system counts the whole file against its limit of committed memory, though
        // hardly a page of it is ever written to, and refuses large files on small machines.
        options.len(len).no_reserve_swap();
        // SAFETY: invariants 1, 2 and 5.
        let map = unsafe { options.map_copy(file) }.map_err(|e| Error::new("map", &label, e))?;
        Ok(PrivateMap {
            map: map.into(),
            label,
        })
    }

    /// What messages call it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// The first byte. Valid as long as `self` lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.map.as_ptr()
    }

    /// The first byte, to be written through. Valid as long as `self` lives; who writes through it answers
    /// for nobody reading at the same time through [`PrivateMap::as_slice`].
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// The bytes. Reading them after the file was truncated raises SIGBUS. Must not be held while someone
    /// writes through [`PrivateMap::as_mut_ptr`].
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: invariants 2, 3 and 5: the pointer is valid for `len` bytes while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), self.map.len()) }
    }

    /// Tells the system that these bytes will be wanted soon; it starts to read them.
    pub fn will_need(&self, offset: u64, len: u64) {
        let (offset, len) = clamp(offset, len, self.map.len());
        let _ = self.map.advise_range(Advice::WillNeed, offset, len);
    }

    /// Fills the page table for these bytes, so that reading them takes no fault. Reads the file.
    pub fn populate(&self, offset: u64, len: u64) {
        let (offset, len) = clamp(offset, len, self.map.len());
        let _ = self.map.advise_range(POPULATE, offset, len);
    }
}

#[cfg(target_os = "linux")]
const POPULATE: Advice = Advice::PopulateRead;
#[cfg(not(target_os = "linux"))]
const POPULATE: Advice = Advice::WillNeed;

fn map_len(file: &File, label: &str) -> Result<usize, Error> {
    let len = regular_len(file, label)?;
    usize::try_from(len).map_err(|_| Error::new("map", label, std::io::ErrorKind::OutOfMemory))
}

fn clamp(offset: u64, len: u64, map: usize) -> (usize, usize) {
    let offset = usize::try_from(offset).unwrap_or(map).min(map);
    (
        offset,
        usize::try_from(len).unwrap_or(map).min(map - offset),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_map_shows_the_file_and_keeps_writes_to_itself() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7u8; 10_000]).unwrap();
        let map = PrivateMap::open(file.path()).unwrap();
        assert_eq!((map.len(), map.is_empty()), (10_000, false));
        map.populate(0, u64::MAX);
        map.will_need(5_000, 1);
        // SAFETY: the byte lies in the map and nobody reads it meanwhile.
        unsafe { map.as_mut_ptr().write(1) };
        assert_eq!(map.as_slice()[..2], [1, 7]);
        assert_eq!(map.as_ptr(), map.as_slice().as_ptr());
        assert_eq!(std::fs::read(file.path()).unwrap()[0], 7);
    }

    #[test]
    fn an_empty_file_maps_to_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(PrivateMap::open(file.path()).unwrap().as_slice().is_empty());
        assert_eq!(
            MmapSource::open(file.path()).unwrap().bytes(),
            Some(&[][..])
        );
        assert_eq!(
            PrivateMap::open("/").unwrap_err().kind(),
            std::io::ErrorKind::IsADirectory
        );
    }
}
