//! Reads that bypass the page cache: `O_DIRECT`.
//!
//! The disk writes straight into the reader's memory, so a large read costs hardly any processor time and
//! leaves the page cache to others. The price is alignment: of the offset and length in the file, and of
//! the address in memory. `statx` says which (Linux 6.1); where it does not, a page is assumed and one read
//! is tried. A file system that has no such reads answers `EINVAL` when the file is opened or when it is
//! read; the first means that there is no [`DirectRead`], the second is answered by an ordinary read.

use std::fmt::Debug;
use std::fs::File;
use std::sync::Arc;

use crate::Error;
use crate::file::read_at;
use crate::source::check;

/// What direct reads ask of their caller; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlign {
    /// Offsets in the file and lengths of reads are multiples of this.
    pub offset: usize,
    /// Addresses of buffers are multiples of this.
    pub memory: usize,
}

/// Reads that bypass the page cache.
pub trait DirectRead: Send + Sync + Debug {
    /// What offset, length and address have to be multiples of.
    fn align(&self) -> DirectAlign;

    /// Reads from `offset` on into `dst`, which may reach past the end of the file. Returns how many bytes
    /// there are now: at least `needed`, and less than `dst` holds only at the end of the file or where the
    /// system gave less and it was enough.
    ///
    /// # Errors
    /// `InvalidInput` if offset, length or address is not aligned, or if more is needed than fits;
    /// `UnexpectedEof` if the source ends before `needed`; else what the system said.
    fn read_at_least(&self, offset: u64, dst: &mut [u8], needed: usize) -> Result<usize, Error>;

    /// Fills several buffers with consecutive bytes, in one call to the system; `dst` as in
    /// [`DirectRead::read_at_least`], each buffer aligned for itself.
    ///
    /// # Errors
    /// As [`DirectRead::read_at_least`]; the buffers' content is then unspecified.
    fn read_vectored_at_least(
        &self,
        mut offset: u64,
        dst: &mut [&mut [u8]],
        mut needed: usize,
    ) -> Result<(), Error> {
        for part in dst {
            let len = part.len();
            self.read_at_least(offset, part, needed.min(len))?;
            needed = needed.saturating_sub(len);
            offset = offset.saturating_add(len as u64);
        }
        Ok(())
    }

    /// The descriptor that reads go through, for interfaces that take several at once.
    fn descriptor(&self) -> Option<&File> {
        None
    }
}

/// A file open a second time, for direct reads.
#[derive(Debug)]
pub(crate) struct DirectFile {
    direct: File,
    plain: Arc<File>,
    label: Arc<str>,
    len: u64,
    align: DirectAlign,
}

impl DirectFile {
    /// Opens the file behind `plain` once more, if its file system has direct reads.
    pub(crate) fn open(plain: &Arc<File>, label: &Arc<str>, len: u64) -> Option<Self> {
        let (direct, align) = system::open(plain)?;
        Some(DirectFile {
            direct,
            plain: Arc::clone(plain),
            label: Arc::clone(label),
            len,
            align,
        })
    }

    fn refuse(&self, text: &str) -> Error {
        let refusal = std::io::Error::new(std::io::ErrorKind::InvalidInput, text);
        Error::new("read", &*self.label, refusal)
    }

    fn check_aligned(&self, offset: u64, dst: &[u8]) -> Result<(), Error> {
        let aligned = offset.is_multiple_of(self.align.offset as u64)
            && dst.len().is_multiple_of(self.align.offset)
            && dst.as_ptr().addr().is_multiple_of(self.align.memory);
        match aligned {
            true => Ok(()),
            false => Err(self.refuse("a direct read is not aligned")),
        }
    }

    /// What is left, by an ordinary read.
    fn plainly(
        &self,
        offset: u64,
        dst: &mut [u8],
        got: usize,
        needed: usize,
    ) -> Result<usize, Error> {
        let rest = dst.get_mut(got..needed).unwrap_or_default();
        read_at(
            &self.plain,
            &self.label,
            offset.saturating_add(got as u64),
            rest,
        )?;
        Ok(needed)
    }
}

impl DirectRead for DirectFile {
    fn align(&self) -> DirectAlign {
        self.align
    }

    fn read_at_least(&self, offset: u64, dst: &mut [u8], needed: usize) -> Result<usize, Error> {
        self.check_aligned(offset, dst)?;
        let step = self.align.offset;
        if needed > dst.len() {
            return Err(self.refuse("more is needed than the buffer holds"));
        }
        check(&self.label, offset, needed, self.len)?;
        let mut got = 0;
        while got < needed {
            let rest = dst.get_mut(got..).unwrap_or_default();
            match rustix::io::pread(&self.direct, rest, offset.saturating_add(got as u64)) {
                Ok(0) => {
                    let len = self.plain.metadata().map_or(0, |meta| meta.len());
                    return Err(Error::eof(&self.label, offset, needed, len));
                }
                Ok(n) => got += n,
                Err(rustix::io::Errno::INTR) => {}
                // What the file system refuses only now, e.g. since the file is compressed or kept inline.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                    return self.plainly(offset, dst, got, needed);
                }
                Err(e) => return Err(Error::new("read", &*self.label, e)),
            }
            if got < needed && !got.is_multiple_of(step) {
                // It ended where no direct read can go on: at an end of the file that has since moved.
                return self.plainly(offset, dst, got, needed);
            }
        }
        Ok(got)
    }

    fn read_vectored_at_least(
        &self,
        offset: u64,
        dst: &mut [&mut [u8]],
        needed: usize,
    ) -> Result<(), Error> {
        let mut total = 0_usize;
        for part in &*dst {
            self.check_aligned(offset, part)?;
            total = total.saturating_add(part.len());
        }
        if needed > total {
            return Err(self.refuse("more is needed than the buffers hold"));
        }
        check(&self.label, offset, needed, self.len)?;
        let mut slices: Vec<std::io::IoSliceMut<'_>> = dst
            .iter_mut()
            .map(|part| std::io::IoSliceMut::new(part))
            .collect();
        let mut done = match rustix::io::preadv(&self.direct, &mut slices, offset) {
            Ok(got) if got >= needed => return Ok(()),
            Ok(got) => got,
            // Refused or interrupted: what is missing is read one buffer at a time.
            Err(_) => 0,
        };
        let (mut offset, mut needed) = (offset, needed);
        for part in dst {
            let (len, wanted) = (part.len(), needed.min(part.len()));
            let have = done.min(wanted) / self.align.offset * self.align.offset;
            let rest = part.get_mut(have..).unwrap_or_default();
            self.read_at_least(offset.saturating_add(have as u64), rest, wanted - have)?;
            (needed, done) = (needed - wanted, done - done.min(len));
            offset = offset.saturating_add(len as u64);
        }
        Ok(())
    }

    fn descriptor(&self) -> Option<&File> {
        Some(&self.direct)
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

    use rustix::fs::{AtFlags, OFlags, StatxFlags};

    use super::DirectAlign;

    /// What is assumed where the system does not tell: no disk asks for more.
    const ASSUMED: DirectAlign = DirectAlign {
        offset: 4096,
        memory: 4096,
    };
    /// More than this would waste more than direct reads win.
    const MOST: usize = 1 << 20;

    pub(super) fn open(plain: &File) -> Option<(File, DirectAlign)> {
        // By the descriptor, not by a path: the name may stand for another file by now.
        let path = format!("/proc/self/fd/{}", plain.as_raw_fd());
        let flags = (OFlags::DIRECT | OFlags::NONBLOCK).bits() as i32;
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .ok()?;
        let same = |a: &File, b: &File| -> std::io::Result<bool> {
            let (a, b) = (a.metadata()?, b.metadata()?);
            Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
        };
        if !same(plain, &direct).unwrap_or(false) {
            return None;
        }
        let align = match told(&direct) {
            Some(align) => align?,
            None if answers(&direct, ASSUMED) => ASSUMED,
            None => return None,
        };
        Some((direct, align))
    }

    /// What `statx` says; the inner `None` means that there are no direct reads, the outer that it does not say.
    fn told(file: &File) -> Option<Option<DirectAlign>> {
        let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let said = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN);
        said.then(|| checked(stat.stx_dio_offset_align, stat.stx_dio_mem_align))
    }

    /// Two numbers of the system, if they make sense. Zero means that there are no direct reads.
    pub(super) fn checked(offset: u32, memory: u32) -> Option<DirectAlign> {
        let (offset, memory) = (offset as usize, memory as usize);
        let fits = |n: usize| n.is_power_of_two() && n <= MOST;
        (fits(offset) && fits(memory)).then_some(DirectAlign { offset, memory })
    }

    /// Whether a direct read of the first block is answered.
    pub(super) fn answers(file: &File, align: DirectAlign) -> bool {
        let mut room = vec![0; align.offset + align.memory];
        let skip = room.as_ptr().addr().wrapping_neg() % align.memory;
        room.get_mut(skip..skip + align.offset)
            .is_some_and(|block| file.read_at(block, 0).is_ok())
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::fs::File;

    use super::DirectAlign;

    pub(super) fn open(_: &File) -> Option<(File, DirectAlign)> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::ErrorKind;

    use super::system::{answers, checked};
    use super::*;

    /// An aligned buffer within `room`.
    fn aligned(room: &mut Vec<u8>, len: usize) -> &mut [u8] {
        room.resize(len + 4096, 0);
        let skip = room.as_ptr().addr().wrapping_neg() % 4096;
        &mut room[skip..skip + len]
    }

    fn opened(content: &[u8]) -> Option<DirectFile> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, content).unwrap();
        let plain = Arc::new(File::open(file.path()).unwrap());
        DirectFile::open(&plain, &Arc::from("direct"), content.len() as u64)
    }

    #[test]
    fn numbers_that_make_no_sense_mean_no_direct_reads() {
        let sound = DirectAlign {
            offset: 512,
            memory: 4,
        };
        assert_eq!(checked(512, 4), Some(sound));
        for (offset, memory) in [(0, 0), (512, 0), (0, 512), (513, 512), (1 << 21, 512)] {
            assert_eq!(checked(offset, memory), None);
        }
    }

    #[test]
    fn a_refused_read_is_answered_by_an_ordinary_one() {
        let content: Vec<u8> = (0..20_000).map(|i| (i % 251) as u8).collect();
        let Some(mut file) = opened(&content) else {
            return;
        };
        // The system refuses what this claims to be aligned.
        file.align = DirectAlign {
            offset: 1,
            memory: 1,
        };
        let mut room = Vec::new();
        let dst = aligned(&mut room, 9_001);
        assert_eq!(file.read_at_least(3, dst, 9_000).unwrap(), 9_000);
        assert!(dst[..9_000] == content[3..9_003]);
        let error = file.read_at_least(19_999, dst, 2).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn where_the_system_does_not_tell_one_read_is_tried() {
        let Some(file) = opened(&[1; 5000]) else {
            return;
        };
        let align = |n| DirectAlign {
            offset: n,
            memory: n,
        };
        assert!(answers(&file.direct, align(4096)));
        assert!(answers(&opened(b"").unwrap().direct, align(4096)));
        assert!(!answers(&File::open("/").unwrap(), align(4096)));
    }
}
