//! Several direct reads at once from one thread: io_uring (Linux 5.6).
//!
//! A kernel may lack it, and containers often forbid it, so [`Ring::new`] asks when the program runs. In
//! probes in C on a virtio disk, one thread with 8 reads of 1 MiB under way reached 3.04 GiB/s and 16 threads that
//! each wait for a `pread` 3.03: the disk is the limit of both. Loads use threads, which also copy and take
//! pages while others wait; the ring is for callers that have one thread to give.
//!
//! Invariants:
//! 1. Every buffer that the system may write to is borrowed exclusively for the whole of [`Ring::read`].
//! 2. [`Ring::read`] is left, also by a panic, only when no read is under way: `Flight` waits for all when it
//!    is dropped, and ends the process if the system does not let it wait.
//! 3. The descriptor that entries name is borrowed for the whole of [`Ring::read`].
#![allow(unsafe_code)]

use crate::{DirectRead, Error};

/// One read: bytes of a file from `offset` on, aligned as [`DirectRead::align`] says.
#[derive(Debug)]
pub struct Part<'a> {
    /// The first byte.
    pub offset: u64,
    /// Where the bytes belong; it may reach past the end of the file.
    pub dst: &'a mut [u8],
    /// Bytes that must arrive.
    pub needed: usize,
}

pub use system::Ring;

/// Reads one part without the ring.
fn alone(direct: &dyn DirectRead, part: &mut Part<'_>) -> Result<(), Error> {
    direct
        .read_at_least(part.offset, part.dst, part.needed)
        .map(drop)
}

#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
mod system {
    use std::fmt;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use io_uring::{IoUring, Probe, opcode, types};

    use super::{Part, alone};
    use crate::{DirectRead, Error};

    /// Reads under way at once, from one thread.
    pub struct Ring {
        ring: IoUring,
        depth: usize,
    }

    impl fmt::Debug for Ring {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("Ring").field("depth", &self.depth).finish()
        }
    }

    impl Ring {
        /// A ring for so many reads at once. `None` where the system has no such thing or does not allow it.
        pub fn new(depth: u32) -> Option<Self> {
            let depth = depth.clamp(1, 128);
            let ring = IoUring::new(depth).ok()?;
            let mut probe = Probe::new();
            ring.submitter().register_probe(&mut probe).ok()?;
            let can = probe.is_supported(opcode::Read::CODE);
            can.then_some(Ring {
                ring,
                depth: depth as usize,
            })
        }

        /// Fills every part, several at once. Before each is begun `stop` is asked; once it says yes, what is
        /// under way is waited for and the answer is false.
        ///
        /// # Errors
        /// As [`DirectRead::read_at_least`].
        pub fn read(
            &mut self,
            direct: &dyn DirectRead,
            parts: &mut [Part<'_>],
            stop: &dyn Fn() -> bool,
        ) -> Result<bool, Error> {
            let align = direct.align();
            let fits = |part: &Part<'_>| {
                part.offset.is_multiple_of(align.offset as u64)
                    && part.dst.len().is_multiple_of(align.offset)
                    && part.dst.as_ptr().addr().is_multiple_of(align.memory)
                    && u32::try_from(part.dst.len()).is_ok()
            };
            let Some(file) = direct.descriptor() else {
                for part in parts {
                    alone(direct, part)?;
                }
                return Ok(true);
            };
            let mut undone = Vec::new();
            let mut flight = Flight {
                ring: &mut self.ring,
                under_way: 0,
            };
            let mut next = 0;
            let mut stopped = false;
            while next < parts.len() || flight.under_way > 0 {
                while next < parts.len() && flight.under_way < self.depth && !stopped {
                    stopped = stop();
                    if stopped {
                        break;
                    }
                    let begun = (parts.get_mut(next))
                        .is_some_and(|part| fits(part) && flight.begin(file, next as u64, part));
                    if !begun {
                        // The slow way says what is wrong with it.
                        undone.push(next);
                    }
                    next += 1;
                }
                if flight.under_way == 0 {
                    break;
                }
                for (index, result) in flight.wait() {
                    let needed = parts.get(index).map_or(0, |part| part.needed);
                    if usize::try_from(result).map_or(true, |got| got < needed) {
                        undone.push(index);
                    }
                }
            }
            drop(flight);
            if stopped {
                return Ok(false);
            }
            // Ends of files, and what failed: once more, by a call that says why.
            for index in undone {
                if let Some(part) = parts.get_mut(index) {
                    alone(direct, part)?;
                }
            }
            Ok(true)
        }
    }

    /// The reads that are under way.
    struct Flight<'a> {
        ring: &'a mut IoUring,
        under_way: usize,
    }

    impl Flight<'_> {
        fn begin(&mut self, file: &File, index: u64, part: &mut Part<'_>) -> bool {
            let fd = types::Fd(file.as_raw_fd());
            // `fits` has looked at the length.
            let len = part.dst.len() as u32;
            let entry = opcode::Read::new(fd, part.dst.as_mut_ptr(), len)
                .offset(part.offset)
                .build()
                .user_data(index);
            // SAFETY: invariants 1, 2 and 3: buffer and descriptor stay until the read is over.
            let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
            self.under_way += usize::from(pushed);
            pushed
        }

        /// Waits for one read at least; index and result of each that is over.
        fn wait(&mut self) -> Vec<(usize, i32)> {
            loop {
                match self.ring.submit_and_wait(1) {
                    Ok(_) => {}
                    Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                    Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                    // The system may still write to the buffers, and nobody can say until when.
                    Err(_) => std::process::abort(),
                }
                let over: Vec<(usize, i32)> = (self.ring.completion())
                    .map(|entry| {
                        let index = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
                        (index, entry.result())
                    })
                    .collect();
                if !over.is_empty() {
                    self.under_way = self.under_way.saturating_sub(over.len());
                    return over;
                }
            }
        }
    }

    impl Drop for Flight<'_> {
        fn drop(&mut self) {
            while self.under_way > 0 {
                self.wait();
            }
        }
    }
}

#[cfg(not(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
mod system {
    use super::{Part, alone};
    use crate::{DirectRead, Error};

    /// Reads under way at once, from one thread; not on this system.
    #[derive(Debug)]
    pub struct Ring(());

    impl Ring {
        /// `None`: the system has no such thing.
        pub fn new(_: u32) -> Option<Self> {
            None
        }

        /// Fills every part, one after the other.
        ///
        /// # Errors
        /// As [`DirectRead::read_at_least`].
        pub fn read(
            &mut self,
            direct: &dyn DirectRead,
            parts: &mut [Part<'_>],
            stop: &dyn Fn() -> bool,
        ) -> Result<bool, Error> {
            for part in parts {
                if stop() {
                    return Ok(false);
                }
                alone(direct, part)?;
            }
            Ok(true)
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::ErrorKind;

    use super::*;
    use crate::{FileSource, Source};

    fn content(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 % 251) as u8).collect()
    }

    fn opened(content: &[u8]) -> FileSource {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        FileSource::open(file.path()).unwrap()
    }

    /// Memory whose parts are aligned for any disk.
    fn memory(len: usize) -> memmap2::MmapMut {
        memmap2::MmapMut::map_anon(len).unwrap()
    }

    fn parts<'a>(memory: &'a mut [u8], size: usize, len: usize) -> Vec<Part<'a>> {
        let cut = memory.chunks_mut(size).enumerate();
        cut.map(|(i, dst)| Part {
            offset: (i * size) as u64,
            needed: dst.len().min(len.saturating_sub(i * size)),
            dst,
        })
        .collect()
    }

    #[test]
    fn many_reads_at_once_fill_every_part_up_to_the_end_of_the_file() {
        let expected = content(1_000_003);
        let source = opened(&expected);
        let (Some(direct), Some(mut ring)) = (source.direct(), Ring::new(4)) else {
            return;
        };
        for size in [4096, 64 << 10, 1 << 20] {
            let mut memory = memory(1 << 20);
            let mut parts = parts(&mut memory, size, expected.len());
            assert!(ring.read(direct, &mut parts, &|| false).unwrap());
            assert!(memory[..expected.len()] == expected);
        }
    }

    #[test]
    fn it_stops_when_told_and_says_what_went_wrong() {
        let expected = content(1 << 20);
        let source = opened(&expected);
        let (Some(direct), Some(mut ring)) = (source.direct(), Ring::new(2)) else {
            return;
        };
        let mut memory = memory(1 << 20);
        let asked = std::cell::Cell::new(0);
        let stop = || {
            asked.set(asked.get() + 1);
            asked.get() > 5
        };
        let stopped = ring.read(direct, &mut parts(&mut memory, 64 << 10, 1 << 20), &stop);
        assert!(!stopped.unwrap() && asked.get() == 6);
        let mut past = parts(&mut memory, 1 << 20, 1 << 20);
        past[0].offset = 4096;
        let error = ring.read(direct, &mut past, &|| false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        let mut skewed = [Part {
            offset: 1,
            dst: &mut memory[..4096],
            needed: 1,
        }];
        let error = ring.read(direct, &mut skewed, &|| false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let mut again = parts(&mut memory, 128 << 10, 1 << 20);
        assert!(ring.read(direct, &mut again, &|| false).unwrap());
        assert!(memory[..] == expected, "and goes on to work");
    }

    #[test]
    fn a_panic_waits_for_what_is_under_way() {
        let source = opened(&content(1 << 20));
        let (Some(direct), Some(mut ring)) = (source.direct(), Ring::new(8)) else {
            return;
        };
        let mut memory = memory(1 << 20);
        let asked = std::cell::Cell::new(0);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let stop = || {
                asked.set(asked.get() + 1);
                assert!(asked.get() < 6, "planted");
                false
            };
            ring.read(direct, &mut parts(&mut memory, 64 << 10, 1 << 20), &stop)
        }));
        assert!(result.is_err());
        // Nothing is left of the reads before: every completion is one of this call's.
        let mut again = parts(&mut memory, 128 << 10, 1 << 20);
        assert!(ring.read(direct, &mut again, &|| false).unwrap());
        assert!(memory[..] == content(1 << 20));
    }
}
