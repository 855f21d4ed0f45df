//! A file, read by `pread`: no shared position, so threads do not disturb each other.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::direct::{DirectFile, DirectRead};
use crate::kind::{self, StorageKind};
use crate::residency::{self, Residency};
use crate::source::{Source, check};
use crate::{Error, temp};

/// An open regular file.
#[derive(Debug)]
pub struct FileSource {
    file: Arc<File>,
    label: Arc<str>,
    len: u64,
    kind: StorageKind,
    /// The file open once more, for direct reads; from the first time that someone asks.
    direct: OnceLock<Option<DirectFile>>,
}

/// Linux takes at most 1024 buffers in one `preadv`.
const MAX_BUFFERS: usize = 1024;

impl FileSource {
    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// What the system said, its kind kept; `IsADirectory` for a folder, `InvalidInput` for a pipe or a device.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        // Without O_NONBLOCK the open of a pipe would wait for a writer.
        let file = temp::options_for_read()
            .open(path)
            .map_err(|e| Error::at("open", path, e))?;
        Self::from_file(file, path.display().to_string())
    }

    /// Takes over an open file; messages call it `label`.
    ///
    /// # Errors
    /// As [`FileSource::open`].
    pub fn from_file(file: File, label: impl Into<String>) -> Result<Self, Error> {
        let label: Arc<str> = label.into().into();
        let len = regular_len(&file, &label)?;
        Ok(FileSource {
            kind: kind::of_file(&file),
            file: Arc::new(file),
            label,
            len,
            direct: OnceLock::new(),
        })
    }
}

/// The file's length, if it is a regular file.
pub(crate) fn regular_len(file: &File, label: &str) -> Result<u64, Error> {
    let meta = file.metadata().map_err(|e| Error::new("open", label, e))?;
    if meta.is_dir() {
        return Err(Error::new("open", label, rustix::io::Errno::ISDIR));
    }
    if !meta.is_file() {
        let refusal = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(Error::new("open", label, refusal));
    }
    Ok(meta.len())
}

/// `pread` until `dst` is full. Says so if the file has become shorter than it was.
pub(crate) fn read_at(file: &File, label: &str, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
    file.read_exact_at(dst, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::eof(
            label,
            offset,
            dst.len(),
            file.metadata().map_or(0, |m| m.len()),
        ),
        _ => Error::new("read", label, e),
    })
}

fn read_vectored(
    file: &File,
    label: &str,
    mut offset: u64,
    dst: &mut [&mut [u8]],
) -> Result<(), Error> {
    for group in dst.chunks_mut(MAX_BUFFERS) {
        let wanted: usize = group.iter().map(|part| part.len()).sum();
        let mut slices: Vec<IoSliceMut<'_>> =
            group.iter_mut().map(|part| IoSliceMut::new(part)).collect();
        let mut got = match rustix::io::preadv(file, &mut slices, offset) {
            Ok(got) => got,
            // Interrupted before the first byte: the plain reads below start at the beginning.
            Err(rustix::io::Errno::INTR) => 0,
            Err(e) => return Err(Error::new("read", label, e)),
        };
        let complete = got == wanted;
        if !complete {
            // A short read: finish what is left one buffer at a time.
            let mut at = offset;
            for part in group.iter_mut() {
                let have = got.min(part.len());
                read_at(file, label, at + have as u64, part.split_at_mut(have).1)?;
                got -= have;
                at += part.len() as u64;
            }
        }
        offset += wanted as u64;
    }
    Ok(())
}

impl Source for FileSource {
    fn label(&self) -> &str {
        &self.label
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        check(&self.label, offset, dst.len(), self.len)?;
        read_at(&self.file, &self.label, offset, dst)
    }

    fn read_vectored_at(&self, offset: u64, dst: &mut [&mut [u8]]) -> Result<(), Error> {
        let wanted = dst
            .iter()
            .try_fold(0usize, |sum, part| sum.checked_add(part.len()))
            .unwrap_or(usize::MAX);
        check(&self.label, offset, wanted, self.len)?;
        read_vectored(&self.file, &self.label, offset, dst)
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn direct(&self) -> Option<&dyn DirectRead> {
        let open = || DirectFile::open(&self.file, &self.label, self.len);
        let direct = self.direct.get_or_init(open).as_ref()?;
        Some(direct)
    }

    fn residency(&self, offset: u64, len: u64) -> Residency {
        // What was cut off of the file meanwhile is not there, so it is not in the cache either.
        let offset = offset.min(self.len);
        residency::of_file(&self.file, offset, len.min(self.len - offset))
    }

    fn kind(&self) -> StorageKind {
        self.kind
    }

    fn forget(&self, offset: u64, len: u64) {
        #[cfg(target_os = "linux")]
        if let Some(len) = std::num::NonZeroU64::new(len) {
            // Advice: if it is not followed, nothing is lost but room.
            let dont_need = rustix::fs::Advice::DontNeed;
            let _ = rustix::fs::fadvise(&*self.file, offset, Some(len), dont_need);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }
}
