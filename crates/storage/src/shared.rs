//! A file that several processes fill, each its own ranges.
//!
//! One process makes the file ([`crate::AtomicFile`]), gives it its length and tells the others where it lies;
//! each of them opens it here and writes what is its own. The ranges of two processes must not overlap, and
//! that is all they have to agree on where the file system keeps one truth for a page: on a disk of this
//! machine, and on the parallel file systems that hold locks for it. On those that do not
//! ([`is_coherent`]), two machines must not write to the same page.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::OFlags;

use crate::direct_write::{ALIGN, DirectFile};
use crate::kind;
use crate::{DirectWrite, Durability, Error, Sink, StorageKind};

/// A file that others made, open for writing in place.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    path: PathBuf,
    label: String,
    durability: Durability,
    /// The same file, opened for direct writes when they are first asked for; `None` where they are not
    /// to be had.
    direct: OnceLock<Option<DirectFile>>,
}

impl SharedFile {
    /// Opens a file that exists and has exactly this length.
    ///
    /// # Errors
    /// What the system said; `InvalidInput` for what is no regular file, and `InvalidData` for another
    /// length: then it is not the file that was agreed on.
    pub fn open(path: impl AsRef<Path>, len: u64, durability: Durability) -> Result<Self, Error> {
        let path = path.as_ref();
        let failed = |e: std::io::Error| Error::at("open", path, e);
        // For writing only: a client of NFS that may also read fetches pages before it changes them, and
        // would send back what others have changed since.
        let file = File::options()
            .write(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK).bits() as i32)
            .open(path)
            .map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            let refusal =
                std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file");
            return Err(failed(refusal));
        }
        if meta.len() != len {
            let text = format!("has {} bytes where {len} were agreed on", meta.len());
            return Err(failed(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                text,
            )));
        }
        Ok(SharedFile {
            file,
            path: path.to_owned(),
            label: path.display().to_string(),
            durability,
            direct: OnceLock::new(),
        })
    }
}

impl Sink for SharedFile {
    fn label(&self) -> &str {
        &self.label
    }

    fn write_all_at(&self, offset: u64, src: &[u8]) -> Result<(), Error> {
        self.file
            .write_all_at(src, offset)
            .map_err(|e| Error::new("write", &self.label, e))
    }

    /// The maker has reserved it.
    fn reserve(&self, _: u64) -> Result<(), Error> {
        Ok(())
    }

    /// The length is the maker's to choose; it was compared when the file was opened.
    fn set_len(&self, _: u64) -> Result<(), Error> {
        Ok(())
    }

    #[cfg(target_os = "linux")]
    fn start_writeback(&self, offset: u64, len: u64) {
        if self.durability.syncs_files() {
            // As `AtomicFile` does it.
            let len = std::num::NonZeroU64::new(len);
            let _ = rustix::fs::fadvise(&self.file, offset, len, rustix::fs::Advice::DontNeed);
        }
    }

    fn direct(&self) -> Option<&dyn DirectWrite> {
        if !self.durability.syncs_files() {
            return None;
        }
        let opened = self
            .direct
            .get_or_init(|| DirectFile::beside(&self.file, &self.path));
        match opened {
            Some(direct) if !direct.is_refused() => Some(self),
            _ => None,
        }
    }

    fn sync(&self) -> Result<(), Error> {
        self.file
            .sync_all()
            .map_err(|e| Error::new("bring to the disk", &self.label, e))
    }
}

impl DirectWrite for SharedFile {
    fn align(&self) -> usize {
        ALIGN
    }

    fn write_direct_at(&self, offset: u64, src: &[u8]) -> Result<(), Error> {
        match self.direct.get() {
            Some(Some(direct)) => direct
                .write_all_at(&self.file, offset, src)
                .map_err(|e| Error::new("write", &self.label, e)),
            _ => self.write_all_at(offset, src),
        }
    }
}

/// Whether processes on several machines may write to neighbouring bytes of a file in this folder; otherwise
/// the file system's name. Lustre, GPFS, Ceph, BeeGFS, GFS2 and OCFS2 lock what they cache; NFS, SMB, 9P, AFS
/// and FUSE do not.
///
/// # Errors
/// What the system said when the folder was opened.
pub fn is_coherent(folder: &Path) -> Result<Result<(), &'static str>, Error> {
    const LOCKED: [&str; 6] = ["lustre", "gpfs", "ceph", "beegfs", "gfs2", "ocfs2"];
    let file = File::open(folder).map_err(|e| Error::at("open", folder, e))?;
    Ok(match kind::of_file(&file) {
        StorageKind::Network(name) if !LOCKED.contains(&name) => Err(name),
        _ => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AtomicFile, AtomicOptions};

    #[test]
    fn two_fill_one_file_and_the_third_takes_its_place() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("model");
        std::fs::write(&path, b"old").unwrap();
        let file = AtomicFile::create(&path, &AtomicOptions::default()).unwrap();
        let len = 3 * ALIGN as u64 + 7;
        file.reserve(len).unwrap();
        file.set_len(len).unwrap();
        let open = || SharedFile::open(file.path(), len, Durability::Full).unwrap();
        let (one, two) = (open(), open());
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let middle = ALIGN + 100;
        one.write_all_at(0, &bytes[..middle]).unwrap();
        two.write_all_at(middle as u64, &bytes[middle..]).unwrap();
        two.start_writeback(middle as u64, 1000);
        one.sync().unwrap();
        two.sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        file.commit().unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    }

    #[test]
    fn what_was_not_agreed_on_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, b"12345").unwrap();
        let refused = |path: &Path, len| SharedFile::open(path, len, Durability::None).unwrap_err();
        assert_eq!(refused(&path, 4).kind(), std::io::ErrorKind::InvalidData);
        assert_eq!(
            refused(&folder.path().join("g"), 5).kind(),
            std::io::ErrorKind::NotFound
        );
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(SharedFile::open(&link, 5, Durability::None).is_err());
        SharedFile::open(&path, 5, Durability::None).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"12345");
    }

    #[test]
    fn a_local_folder_is_coherent() {
        let folder = tempfile::tempdir().unwrap();
        is_coherent(folder.path()).unwrap().unwrap();
        assert!(is_coherent(&folder.path().join("none")).is_err());
    }
}
