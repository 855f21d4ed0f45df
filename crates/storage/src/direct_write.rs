//! A file opened a second time, for writes that go past the page cache (`O_DIRECT`).
//!
//! A save that waits for the disk gains nothing from the page cache: it costs a copy, and memory that
//! others were using. Measured on a disk that takes 3.9 GiB/s: blocks of 4 MiB from two threads reach that
//! much, and the same through the cache with `fsync` 1.3 to 2.2.
//!
//! Whether a file system writes directly shows only when it is asked to. One that refuses gets the
//! bytes through the cache, from the first refusal on.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

/// Offsets, lengths and addresses of direct writes are multiples of this: a page, and no less than the
/// blocks of any disk in use.
pub(crate) const ALIGN: usize = 4096;

/// The second way into a file.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: File,
    /// [`ALIGN`]; tests try what is too small.
    align: usize,
    refused: AtomicBool,
}

impl DirectFile {
    /// Opens `file`, which lies at `path`, once more; `None` where that does not work or brings nothing.
    #[cfg(target_os = "linux")]
    pub fn beside(file: &File, path: &Path) -> Option<Self> {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

        use rustix::fs::OFlags;

        if !gains(file) {
            return None;
        }
        let mut options = std::fs::OpenOptions::new();
        let flags = OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        options.write(true).custom_flags(flags.bits() as i32);
        let direct = options.open(path).ok()?;
        // Nobody else should know the name. If somebody put another file there, it is not touched.
        let id = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
        (id(&direct)? == id(file)?).then(|| DirectFile {
            file: direct,
            align: ALIGN,
            refused: AtomicBool::new(false),
        })
    }

    /// Elsewhere there is no such flag.
    #[cfg(not(target_os = "linux"))]
    pub fn beside(_file: &File, _path: &Path) -> Option<Self> {
        None
    }

    /// Whether the file system has refused a direct write.
    pub fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Writes all of `src`, directly where it is aligned, else through `plain`, the same file.
    pub fn write_all_at(&self, plain: &File, mut offset: u64, mut src: &[u8]) -> io::Result<()> {
        while !src.is_empty() {
            let direct = is_aligned(offset, src, self.align) && !self.is_refused();
            let file = if direct { &self.file } else { plain };
            match file.write_at(src, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset = offset.saturating_add(written as u64);
                    src = src.get(written..).unwrap_or_default();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if direct && is_refusal(&e) => self.refused.store(true, Ordering::Relaxed),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn is_aligned(offset: u64, src: &[u8], align: usize) -> bool {
    offset.is_multiple_of(align as u64)
        && src.len().is_multiple_of(align)
        && src.as_ptr().align_offset(align) == 0
}

/// What a file system says that does not write directly, or not in blocks like these.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INVAL | Errno::OPNOTSUPP)
    )
}

/// Whether a file lies on a disk of this machine, by the magic numbers of `statfs(2)`. Memory gains
/// nothing, and servers have caches and rules of their own.
#[cfg(target_os = "linux")]
fn gains(file: &File) -> bool {
    // ext2 to ext4, XFS, Btrfs, F2FS, bcachefs; overlays, which hand direct writes down.
    const DISKS: [u32; 6] = [
        0xEF53,
        0x5846_5342,
        0x9123_683E,
        0xF2F5_2010,
        0xCA45_1A4E,
        0x794C_7630,
    ];
    rustix::fs::fstatfs(file).is_ok_and(|stat| DISKS.contains(&(stat.f_type as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that begins on a multiple of [`ALIGN`].
    fn aligned(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
        buffer.resize(len + ALIGN, 0);
        let skip = buffer.as_ptr().align_offset(ALIGN);
        &mut buffer[skip..skip + len]
    }

    #[test]
    fn only_what_is_aligned_in_every_way_goes_directly() {
        let mut buffer = Vec::new();
        let bytes = aligned(&mut buffer, 3 * ALIGN);
        let is = |offset, bytes| is_aligned(offset, bytes, ALIGN);
        assert!(is(0, bytes) && is(8192, &bytes[ALIGN..]));
        assert!(!is(512, bytes) && !is(0, &bytes[..ALIGN + 1]));
        assert!(!is(0, &bytes[1..=ALIGN]));
    }

    /// A block that the file system does not take directly, since it is not aligned at all: the same
    /// bytes arrive, and the refusal is remembered.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_refusal_is_remembered_and_loses_nothing() {
        // Beside the sources: the temporary folder may be memory, which refuses nothing.
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("file");
        let plain = File::create_new(&path).unwrap();
        let Some(direct) = DirectFile::beside(&plain, &path) else {
            eprintln!("not run: {} is not on a disk", path.display());
            return;
        };
        let direct = DirectFile { align: 1, ..direct };
        let bytes: Vec<u8> = (0..5000).map(|i| i as u8).collect();
        direct.write_all_at(&plain, 3, &bytes).unwrap();
        assert!(direct.is_refused());
        direct.write_all_at(&plain, 5003, &bytes).unwrap();
        let expected = [&[0; 3][..], &bytes, &bytes].concat();
        assert!(std::fs::read(&path).unwrap() == expected);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn another_file_under_the_name_is_not_touched() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("file");
        let plain = File::create_new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(DirectFile::beside(&plain, &path).is_none());
        std::fs::write(&path, b"another").unwrap();
        assert!(DirectFile::beside(&plain, &path).is_none());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(DirectFile::beside(&plain, &path).is_none());
    }
}
