//! A file that is replaced whole or not at all.
//!
//! The order is: temporary file beside the target, `fallocate` (a full disk is met here), writes (past the
//! page cache where they are to be durable and the disk takes it: `direct_write.rs`), mode and owner, `fsync` of the file, `rename`, `fsync` of the folder. Up to the rename the old file is untouched;
//! the rename itself is atomic; after the last step the new file survives a power cut. An error or a drop
//! on the way removes the temporary file.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Access, FallocateFlags, Gid, Uid};
use rustix::io::Errno;

use crate::direct_write::{ALIGN, DirectFile};
use crate::temp::{Temp, folder_of, sweep};
use crate::{DirectWrite, Error, Sink};

/// What a save survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The end of this process, not a power cut: nothing waits for the disk.
    None,
    /// A power cut leaves the old or the new content, but perhaps still the old one.
    File,
    /// After success, a power cut leaves the new content.
    #[default]
    Full,
}

impl Durability {
    /// Whether file content is brought to the disk.
    pub fn syncs_files(self) -> bool {
        self != Durability::None
    }

    /// Whether folders are, too.
    pub fn syncs_folders(self) -> bool {
        self == Durability::Full
    }
}

/// How to replace a file.
#[derive(Clone, Debug, Default)]
pub struct AtomicOptions {
    /// What the save survives.
    pub durability: Durability,
    /// The temporary file's suffix; `tmp` if empty.
    pub suffix: String,
    /// Replace a symbolic link itself rather than the file it leads to.
    pub replace_link: bool,
}

/// A file being written that will take its target's place on [`AtomicFile::commit`].
#[derive(Debug)]
pub struct AtomicFile {
    temp: Temp,
    target: PathBuf,
    label: String,
    durability: Durability,
    /// The same file, opened for direct writes when they are first asked for; `None` where they are not
    /// to be had.
    direct: OnceLock<Option<DirectFile>>,
    /// Bytes that room was made for.
    reserved: AtomicU64,
}

/// A complete file, still under its temporary name, and on the disk if that was asked for.
#[derive(Debug)]
pub struct Staged {
    temp: Temp,
    target: PathBuf,
    durability: Durability,
}

impl AtomicFile {
    /// Starts to replace `path`, or to create it. A symbolic link is followed: what it leads to is replaced.
    ///
    /// # Errors
    /// What the system said; `IsADirectory` and `InvalidInput` where the target is no regular file,
    /// `PermissionDenied` also where the target exists and may not be written to.
    pub fn create(path: impl AsRef<Path>, options: &AtomicOptions) -> Result<Self, Error> {
        let path = path.as_ref();
        let target = if options.replace_link {
            path.to_owned()
        } else {
            resolve(path)?
        };
        let existing = existing(&target)?;
        let suffix = if options.suffix.is_empty() {
            SUFFIX
        } else {
            &options.suffix
        };
        if suffix == SUFFIX {
            // Files with a suffix of their own may be in use under their temporary name (see
            // [`Staged::keep`]): only who chose the suffix knows when they are not.
            let name = target
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            sweep(folder_of(&target), suffix, |swept, _| swept == name);
        }
        let temp = Temp::beside(&target, suffix)?;
        if let Some(meta) = existing {
            inherit(temp.file(), &meta)
                .map_err(|e| Error::at("set the mode of", temp.path(), e))?;
        }
        Ok(AtomicFile {
            temp,
            target,
            label: path.display().to_string(),
            durability: options.durability,
            direct: OnceLock::new(),
            reserved: AtomicU64::new(0),
        })
    }

    /// The file that will be replaced: the end of a symbolic link.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where the temporary file lies.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// The temporary file, open for reading and writing.
    pub fn file(&self) -> &File {
        self.temp.file()
    }

    /// Completes the content without giving it its name yet.
    ///
    /// # Errors
    /// What the system said when the content was brought to the disk.
    pub fn stage(self) -> Result<Staged, Error> {
        if self.durability.syncs_files() {
            self.sync()?;
        }
        Ok(Staged {
            temp: self.temp,
            target: self.target,
            durability: self.durability,
        })
    }

    /// Takes the target's place.
    ///
    /// # Errors
    /// What the system said. Up to the rename the target is as it was; an error of the last step, the
    /// folder's `fsync`, leaves the new file in place.
    pub fn commit(self) -> Result<(), Error> {
        self.stage()?.commit()
    }
}

impl Staged {
    /// Where it lies now.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// What it will replace.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Gives it another target in the same folder, whose mode and owner it takes over if that exists.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn retarget(&mut self, target: &Path) -> Result<(), Error> {
        if let Some(meta) = existing(target)? {
            inherit(self.temp.file(), &meta)
                .map_err(|e| Error::at("set the mode of", self.temp.path(), e))?;
        }
        self.target = target.to_owned();
        Ok(())
    }

    /// Takes the target's place, durably if that was asked for.
    ///
    /// # Errors
    /// As [`AtomicFile::commit`].
    pub fn commit(self) -> Result<(), Error> {
        let (target, durability) = (self.target.clone(), self.durability);
        self.rename()?;
        if durability.syncs_folders() {
            sync_dir(folder_of(&target))
        } else {
            Ok(())
        }
    }

    /// Takes the target's place; the folder is the caller's to sync.
    ///
    /// # Errors
    /// As [`AtomicFile::commit`].
    pub fn rename(self) -> Result<(), Error> {
        self.temp.rename(&self.target).map(drop)
    }

    /// Leaves it under its temporary name for good.
    pub fn keep(self) -> PathBuf {
        self.temp.keep()
    }
}

impl Sink for AtomicFile {
    fn label(&self) -> &str {
        &self.label
    }

    fn write_all_at(&self, offset: u64, src: &[u8]) -> Result<(), Error> {
        self.file()
            .write_all_at(src, offset)
            .map_err(|e| Error::new("write", &self.label, e))
    }

    fn reserve(&self, len: u64) -> Result<(), Error> {
        // Asked again as a file grows, only the rest is reserved.
        let before = self.reserved.load(Ordering::Relaxed);
        let Some(more) = len.checked_sub(before).filter(|&more| more > 0) else {
            return Ok(());
        };
        match rustix::fs::fallocate(self.file(), FallocateFlags::empty(), before, more) {
            Ok(()) => {
                self.reserved.fetch_max(len, Ordering::Relaxed);
                Ok(())
            }
            // File systems that cannot reserve will say so at the write instead.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::INTR) => Ok(()),
            Err(e) => Err(Error::new("reserve room for", &self.label, e)),
        }
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        self.file()
            .set_len(len)
            .map_err(|e| Error::new("write", &self.label, e))
    }

    #[cfg(target_os = "linux")]
    fn start_writeback(&self, offset: u64, len: u64) {
        if self.durability.syncs_files() {
            // On Linux this starts writing the range's dirty pages and waits for nothing: the final fsync then
            // finds little left to do. Pages still dirty stay cached.
            let len = std::num::NonZeroU64::new(len);
            let _ = rustix::fs::fadvise(self.file(), offset, len, rustix::fs::Advice::DontNeed);
        }
    }

    fn direct(&self) -> Option<&dyn DirectWrite> {
        // What nobody waits for is soonest done in the page cache.
        if !self.durability.syncs_files() {
            return None;
        }
        let opened = self
            .direct
            .get_or_init(|| DirectFile::beside(self.file(), self.temp.path()));
        match opened {
            Some(direct) if !direct.is_refused() => Some(self),
            _ => None,
        }
    }

    fn sync(&self) -> Result<(), Error> {
        self.file()
            .sync_all()
            .map_err(|e| Error::new("bring to the disk", &self.label, e))
    }
}

impl DirectWrite for AtomicFile {
    fn align(&self) -> usize {
        ALIGN
    }

    fn write_direct_at(&self, offset: u64, src: &[u8]) -> Result<(), Error> {
        match self.direct.get() {
            Some(Some(direct)) => direct
                .write_all_at(self.file(), offset, src)
                .map_err(|e| Error::new("write", &self.label, e)),
            _ => self.write_all_at(offset, src),
        }
    }
}

/// The suffix of temporary files that are of no use to anyone but their writer.
const SUFFIX: &str = "tmp";

/// Locks a folder against others who do the same, until the result is dropped. Where the file system
/// has no such locks, this does nothing.
///
/// # Errors
/// What the system said when the folder was opened.
pub fn lock_folder(folder: &Path) -> Result<File, Error> {
    let file = File::open(folder).map_err(|e| Error::at("open", folder, e))?;
    let _ = rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive);
    Ok(file)
}

/// Locks a file against others who do the same, until the result is dropped. `None` where another holds it, or where
/// the file system has no such locks, so that nobody can tell.
///
/// # Errors
/// What the system said when the file was opened.
pub fn try_lock(path: &Path) -> Result<Option<File>, Error> {
    let file = File::open(path).map_err(|e| Error::at("open", path, e))?;
    let locked = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    Ok(locked.is_ok().then_some(file))
}

/// Brings a folder's entries to the disk, so that a rename in it survives a power cut.
///
/// # Errors
/// What the system said. A file system that does not sync folders counts as done.
pub fn sync_dir(folder: &Path) -> Result<(), Error> {
    let file = File::open(folder).map_err(|e| Error::at("bring to the disk", folder, e))?;
    match file.sync_all() {
        Err(e) if Errno::from_io_error(&e) != Some(Errno::INVAL) => {
            Err(Error::at("bring to the disk", folder, e))
        }
        _ => Ok(()),
    }
}

/// The end of a chain of symbolic links, which need not exist.
fn resolve(path: &Path) -> Result<PathBuf, Error> {
    // As many as Linux follows in one path.
    const MAX_LINKS: usize = 40;
    let mut target = path.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::read_link(&target) {
            Ok(next) => target = folder_of(&target).join(next),
            // Not a link, or nothing there yet; other troubles come back when the file is created.
            Err(_) => return Ok(target),
        }
    }
    Err(Error::at("open", path, Errno::LOOP))
}

fn existing(target: &Path) -> Result<Option<Metadata>, Error> {
    let meta = match std::fs::symlink_metadata(target) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::at("open", target, e)),
    };
    if meta.is_dir() {
        return Err(Error::at("replace", target, Errno::ISDIR));
    }
    if meta.is_symlink() {
        return Ok(None);
    }
    if !meta.is_file() {
        let refusal = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(Error::at("replace", target, refusal));
    }
    // A rename would replace a file that its owner protected from writing.
    rustix::fs::access(target, Access::WRITE_OK).map_err(|e| Error::at("replace", target, e))?;
    Ok(Some(meta))
}

/// Gives the new file the old one's owner, as far as this process may, and its mode.
fn inherit(file: &File, old: &Metadata) -> io::Result<()> {
    let new = file.metadata()?;
    let mut mode = old.mode() & 0o7777;
    if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
        let owner = rustix::fs::fchown(
            file,
            Some(Uid::from_raw(old.uid())),
            Some(Gid::from_raw(old.gid())),
        );
        if owner.is_err() {
            // Only root may give files away. Another owner must not inherit set-id bits.
            mode &= 0o1777;
        }
    }
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}
