//! Temporary files beside their target: `.<name>.<pid>.<random>.<suffix>`.
//!
//! The name starts with a dot, so no glob for checkpoints finds it, and says whose it is. While its writer
//! lives it holds a lock (`flock`), which the system releases when the process dies, however it dies.
//! [`sweep`] removes files of this pattern that nobody holds and nobody has touched for [`STALE`], or, on a
//! local file system, where locks do not lie, for [`STALE_LOCAL`].

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::Error;

/// How long a file must have been untouched before [`sweep`] takes it. A lock tells the dead from the
/// living at once, but not on every network file system.
pub const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// The same on a local file system: long enough for a new file to be locked.
pub const STALE_LOCAL: Duration = Duration::from_secs(60);

/// A temporary file that is removed when this is dropped, unless it was renamed or kept.
#[derive(Debug)]
pub struct Temp {
    file: File,
    path: PathBuf,
    armed: bool,
}

impl Temp {
    /// Creates a new, empty, locked file for `target` in the target's folder. Its mode is what the umask leaves of 0666.
    ///
    /// # Errors
    /// What the system said when it was asked to create a file there.
    pub fn beside(target: &Path, suffix: &str) -> Result<Self, Error> {
        let folder = folder_of(target);
        let name = target
            .file_name()
            .ok_or_else(|| Error::at("create", target, io::ErrorKind::InvalidInput))?;
        loop {
            let path = folder.join(temp_name(name, suffix));
            let mut options = OpenOptions::new();
            // Readable as well: a header that outgrew its room is fixed by copying the data out again.
            options.read(true).write(true).create_new(true).mode(0o666);
            match options.open(&path) {
                Ok(file) => {
                    // A file system without locks leaves the age as the only sign.
                    let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
                    return Ok(Temp {
                        file,
                        path,
                        armed: true,
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::at("create", &path, e)),
            }
        }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its final name, replacing what bears that name.
    ///
    /// # Errors
    /// What the system said; the file is then removed.
    pub fn rename(mut self, target: &Path) -> Result<File, Error> {
        std::fs::rename(&self.path, target).map_err(|e| Error::at("replace", target, e))?;
        self.armed = false;
        self.file
            .try_clone()
            .map_err(|e| Error::at("replace", target, e))
    }

    /// Leaves it where it is, under its temporary name.
    pub fn keep(mut self) -> PathBuf {
        self.armed = false;
        self.path.clone()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if self.armed {
            // Nobody is left to be told, and the next sweep tries again.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn temp_name(name: &OsStr, suffix: &str) -> std::ffi::OsString {
    let mut temp = std::ffi::OsString::from(".");
    temp.push(name);
    // The hasher's keys are random per process and differ from one call to the next.
    let random = RandomState::new().build_hasher().finish();
    temp.push(format!(".{}.{random:016x}.{suffix}", std::process::id()));
    temp
}

/// The target's name, if `file_name` follows the pattern of this module with this suffix.
pub fn target_of<'a>(file_name: &'a str, suffix: &str) -> Option<&'a str> {
    let rest = file_name
        .strip_prefix('.')?
        .strip_suffix(suffix)?
        .strip_suffix('.')?;
    let (rest, random) = rest.rsplit_once('.')?;
    let (name, pid) = rest.rsplit_once('.')?;
    let hex = random.len() == 16 && random.bytes().all(|b| b.is_ascii_hexdigit());
    let digits = !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
    (hex && digits && !name.is_empty()).then_some(name)
}

/// Removes stale temporary files with this suffix whose target `mine` says yes to (it is given the
/// target's name and the file's own). What cannot be looked at or removed stays.
pub fn sweep(folder: &Path, suffix: &str, mine: impl Fn(&str, &str) -> bool) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let stale = if is_local(folder) { STALE_LOCAL } else { STALE };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let Some(name) = file_name.to_str() else {
            continue;
        };
        if target_of(name, suffix).is_some_and(|target| mine(target, name))
            && is_stale(&entry.path(), stale)
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn is_stale(path: &Path, stale: Duration) -> bool {
    let Ok(file) = options_for_read()
        .custom_flags(OPEN_FLAGS | OFlags::NOFOLLOW.bits() as i32)
        .open(path)
    else {
        return false;
    };
    let Ok(meta) = file.metadata() else {
        return false;
    };
    let age = meta
        .modified()
        .ok()
        .and_then(|at| SystemTime::now().duration_since(at).ok());
    meta.is_file()
        && age.is_some_and(|age| age > stale)
        && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// Whether a folder is on a file system of this machine alone, by the magic numbers of `statfs(2)`.
fn is_local(folder: &Path) -> bool {
    // ext2 to ext4, XFS, Btrfs, tmpfs, F2FS, ZFS, bcachefs.
    const LOCAL: [u64; 7] = [
        0xEF53,
        0x5846_5342,
        0x9123_683E,
        0x0102_1994,
        0xF2F5_2010,
        0x2FC1_2FC1,
        0xCA45_1A4E,
    ];
    rustix::fs::statfs(folder).is_ok_and(|stat| LOCAL.contains(&(stat.f_type as u32).into()))
}

const OPEN_FLAGS: i32 = OFlags::NONBLOCK.bits() as i32;

/// How this crate opens files that it reads: without waiting for the other end of a pipe.
pub(crate) fn options_for_read() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OPEN_FLAGS);
    options
}

/// The folder that holds `path`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_recognised_and_others_are_not() {
        let name = temp_name(OsStr::new("a.b.safetensors"), "tmp");
        assert_eq!(
            target_of(name.to_str().unwrap(), "tmp"),
            Some("a.b.safetensors")
        );
        for other in [
            ".a.1.0123456789abcdef.bak",
            "a.1.0123456789abcdef.tmp",
            ".a.x.0123456789abcdef.tmp",
            ".tmp",
            ".a.1.0123.tmp",
            "..1.0123456789abcdef.tmp",
        ] {
            assert_eq!(target_of(other, "tmp"), None, "{other}");
        }
    }

    #[test]
    fn only_the_old_and_unlocked_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("t");
        let old = SystemTime::now() - STALE * 2;
        let kept = |temp: Temp, age: bool| {
            if age {
                temp.file().set_modified(old).unwrap();
            }
            temp.keep()
        };
        let young = kept(Temp::beside(&target, "tmp").unwrap(), false);
        let stale = kept(Temp::beside(&target, "tmp").unwrap(), true);
        let other = kept(Temp::beside(&folder.path().join("u"), "tmp").unwrap(), true);
        let held = Temp::beside(&target, "tmp").unwrap();
        held.file().set_modified(old).unwrap();
        sweep(folder.path(), "tmp", |name, _| name == "t");
        assert_eq!(
            [&young, &stale, &other].map(|p| p.exists()),
            [true, false, true]
        );
        let recent = Temp::beside(&target, "tmp").unwrap();
        recent
            .file()
            .set_modified(SystemTime::now() - STALE_LOCAL * 2)
            .unwrap();
        let recent = recent.keep();
        sweep(folder.path(), "tmp", |name, _| name == "t");
        assert_eq!(
            recent.exists(),
            !is_local(folder.path()),
            "locks are believed on local file systems"
        );
        assert!(held.path().exists());
        let path = held.path().to_owned();
        drop(held);
        assert!(!path.exists(), "an abandoned file is removed");
        sweep(&folder.path().join("absent"), "tmp", |_, _| true);
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = Temp::beside(Path::new("/absent-folder/x"), "tmp").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.label().starts_with("/absent-folder/.x."), "{error}");
        assert_eq!(
            Temp::beside(Path::new("/"), "tmp").unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
