//! Opening what an index file names, and nothing else (spec 8.6 and 8.7).
//!
//! An index comes from a stranger. The name in it has passed the grammar (spec 8.4: no `..`, nothing
//! absolute), but a symbolic link in the folder can still lead anywhere. Linux resolves the whole path
//! beneath the folder in one call (`openat2`); where that is not available, each component is opened in
//! turn and no link is followed.
//!
//! One layout of links is trusted: the Hugging Face cache, where `snapshots/<revision>/` holds links to
//! `blobs/` of the same repository. There the limit is the repository's folder instead.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::Error;

/// What to do about symbolic links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Links {
    /// None may lead out of the folder, or in a Hugging Face cache, out of the repository's folder.
    #[default]
    Within,
    /// They may lead anywhere: the caller trusts the folder.
    Follow,
}

/// Why a file was not opened.
#[derive(Debug)]
pub enum Refusal {
    /// It lies outside of the folder.
    Escapes,
    /// It is a folder, a pipe, a device.
    NotRegular,
    /// There is no such file.
    Missing,
    /// Anything else the system said.
    Io(Error),
}

/// Opens the regular file `name`, relative to `root`, for reading.
///
/// # Errors
/// The [`Refusal`].
pub fn open(root: &Path, name: &str, links: Links) -> Result<File, Refusal> {
    let path = root.join(name);
    let plain = Path::new(name)
        .components()
        .all(|c| matches!(c, Component::Normal(_)));
    if !plain || name.is_empty() {
        return Err(Refusal::Escapes);
    }
    let fd = match links {
        Links::Follow => rustix::fs::open(&path, FLAGS, Mode::empty()),
        Links::Within => within(root, name),
    };
    let file = File::from(fd.map_err(|e| refusal(&path, e))?);
    match file.metadata() {
        Ok(meta) if meta.is_file() => Ok(file),
        Ok(_) => Err(Refusal::NotRegular),
        Err(e) => Err(Refusal::Io(Error::at("open", &path, e))),
    }
}

const FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK);

/// A folder on the way to a file. Linux opens it without the right to read it.
#[cfg(target_os = "linux")]
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
#[cfg(not(target_os = "linux"))]
const FOLDER: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

fn refusal(path: &Path, error: Errno) -> Refusal {
    match error {
        Errno::XDEV | Errno::LOOP => Refusal::Escapes,
        Errno::NOENT => Refusal::Missing,
        Errno::NXIO => Refusal::NotRegular,
        other => Refusal::Io(Error::at("open", path, other)),
    }
}

fn within(root: &Path, name: &str) -> Result<OwnedFd, Errno> {
    let limit = cache_repository(root).unwrap_or_else(|| (root.to_owned(), PathBuf::new()));
    let (folder, prefix) = limit;
    let folder = rustix::fs::open(&folder, FOLDER, Mode::empty())?;
    beneath(folder, &prefix.join(name))
}

/// `path` beneath `folder`, as the kernel resolves it in one call.
#[cfg(target_os = "linux")]
fn beneath(folder: OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    use rustix::fs::{ResolveFlags, openat2};

    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    // EAGAIN: a rename somewhere raced with the check; the kernel asks to try again.
    for _ in 0..16 {
        match openat2(&folder, path, FLAGS, Mode::empty(), how) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            // Kernels before 5.6, and sandboxes that do not know the call.
            Err(Errno::NOSYS | Errno::PERM) => return step_by_step(folder, path),
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

#[cfg(not(target_os = "linux"))]
fn beneath(folder: OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    step_by_step(folder, path)
}

/// `path` beneath `folder`, one component at a time, following no link at all.
fn step_by_step(mut folder: OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let mut components = path.components().peekable();
    while let Some(component) = components.next() {
        let last = components.peek().is_none();
        let flags = if last { FLAGS } else { FOLDER };
        let next = openat(
            &folder,
            component.as_os_str(),
            flags | OFlags::NOFOLLOW,
            Mode::empty(),
        );
        folder = next.map_err(|e| {
            if e == Errno::NOTDIR && !last {
                Errno::LOOP
            } else {
                e
            }
        })?;
    }
    Ok(folder)
}

/// If `root` is `<repository>/snapshots/<revision>` with `<repository>/blobs` beside it, or a folder
/// below such a one: the repository's folder, and the way from there to `root`.
fn cache_repository(root: &Path) -> Option<(PathBuf, PathBuf)> {
    let root = std::fs::canonicalize(root).ok()?;
    let snapshots = root
        .ancestors()
        .skip(1)
        .find(|a| a.file_name().is_some_and(|n| n == "snapshots"))?;
    let repository = snapshots.parent()?;
    let ours =
        repository.join("blobs").is_dir() && repository.join("refs").symlink_metadata().is_ok();
    let named = repository.file_name()?.to_str()?.contains("--");
    (ours || (named && repository.join("blobs").is_dir())).then(|| {
        Some((
            repository.to_owned(),
            root.strip_prefix(repository).ok()?.to_owned(),
        ))
    })?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn verdict(result: Result<File, Refusal>) -> &'static str {
        match result {
            Ok(_) => "ok",
            Err(Refusal::Escapes) => "escapes",
            Err(Refusal::NotRegular) => "not regular",
            Err(Refusal::Missing) => "missing",
            Err(Refusal::Io(_)) => "io",
        }
    }

    #[test]
    fn nothing_outside_of_the_folder_is_opened() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("model");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(top.path().join("secret"), b"s").unwrap();
        std::fs::write(root.join("sub/a"), b"a").unwrap();
        symlink("../secret", root.join("out")).unwrap();
        symlink(top.path().join("secret"), root.join("absolute")).unwrap();
        symlink("sub/a", root.join("inside")).unwrap();
        symlink("..", root.join("up")).unwrap();
        for (name, expected) in [
            ("sub/a", "ok"),
            ("inside", "ok"),
            ("out", "escapes"),
            ("absolute", "escapes"),
            ("up/secret", "escapes"),
            ("../secret", "escapes"),
            ("/etc/passwd", "escapes"),
            ("", "escapes"),
            ("./sub/a", "escapes"),
            ("sub", "not regular"),
            ("absent", "missing"),
            ("sub/a/b", "io"),
        ] {
            assert_eq!(
                verdict(open(&root, name, Links::Within)),
                expected,
                "{name}"
            );
        }
        assert_eq!(verdict(open(&root, "out", Links::Follow)), "ok");
        assert_eq!(verdict(open(&root, "../secret", Links::Follow)), "escapes");
    }

    #[test]
    fn the_step_by_step_way_follows_no_link() {
        let top = tempfile::tempdir().unwrap();
        std::fs::create_dir(top.path().join("sub")).unwrap();
        std::fs::write(top.path().join("sub/a"), b"a").unwrap();
        symlink("sub", top.path().join("link")).unwrap();
        symlink("sub/a", top.path().join("file-link")).unwrap();
        let root = || -> OwnedFd { File::open(top.path()).unwrap().into() };
        assert!(step_by_step(root(), Path::new("sub/a")).is_ok());
        assert_eq!(
            step_by_step(root(), Path::new("link/a")).unwrap_err(),
            Errno::LOOP
        );
        assert_eq!(
            step_by_step(root(), Path::new("file-link")).unwrap_err(),
            Errno::LOOP
        );
    }

    #[test]
    fn a_hugging_face_cache_may_link_to_its_own_blobs() {
        let top = tempfile::tempdir().unwrap();
        let repository = top.path().join("models--org--name");
        let root = repository.join("snapshots/abc");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir(repository.join("blobs")).unwrap();
        std::fs::write(repository.join("blobs/1"), b"1").unwrap();
        std::fs::write(top.path().join("other"), b"o").unwrap();
        symlink("../../blobs/1", root.join("model")).unwrap();
        symlink("../../../other", root.join("stray")).unwrap();
        assert_eq!(verdict(open(&root, "model", Links::Within)), "ok");
        assert_eq!(verdict(open(&root, "stray", Links::Within)), "escapes");
        let below = root.join("unet");
        std::fs::create_dir(&below).unwrap();
        symlink("../../../blobs/1", below.join("model")).unwrap();
        assert_eq!(verdict(open(&below, "model", Links::Within)), "ok");
    }
}
