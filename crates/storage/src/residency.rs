//! How much of a file is in the page cache, asked of `cachestat(2)` (Linux 6.5).
//!
//! `mincore` could tell on older systems, but only of a map, which costs more than the answer is worth: there
//! the answer is "unknown".
//!
//! Invariants:
//! 1. `cachestat` reads one [`Range`] and writes one [`Counts`]; both have the layout of `linux/mman.h`, live on
//!    the stack of the call, and are not used by the system after it.
//! 2. The descriptor belongs to a file that is borrowed for the whole call.
#![allow(unsafe_code)]

use std::fs::File;

/// How much of a range of bytes is in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// The system does not tell.
    Unknown,
    /// So many pages of so many.
    Pages {
        /// Pages in the cache.
        cached: u64,
        /// Pages that the range touches.
        total: u64,
    },
}

/// Pages are counted in this unit where there are none, as for bytes in memory.
const PAGE: u64 = 4096;

impl Residency {
    /// All of so many bytes.
    pub fn all(len: u64) -> Self {
        let total = len.div_ceil(PAGE);
        Residency::Pages {
            cached: total,
            total,
        }
    }

    /// The cached part, from 0 to 1; 1 for a range of nothing. `None` where it is not known.
    pub fn fraction(self) -> Option<f64> {
        match self {
            Residency::Unknown => None,
            Residency::Pages { total: 0, .. } => Some(1.0),
            Residency::Pages { cached, total } => Some(cached as f64 / total as f64),
        }
    }
}

#[cfg(target_os = "linux")]
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

#[cfg(target_os = "linux")]
#[repr(C)]
#[derive(Default)]
struct Counts {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// What the system says of a range that lies within the file.
#[cfg(target_os = "linux")]
pub(crate) fn of_file(file: &File, offset: u64, len: u64) -> Residency {
    use std::os::fd::AsRawFd;

    /// The same on every architecture since calls are numbered together; MIPS adds its own base.
    const CACHESTAT: libc::c_long = match () {
        () if cfg!(target_arch = "mips") => 4451,
        () if cfg!(target_arch = "mips64") => 5451,
        () => 451,
    };
    if len == 0 {
        return Residency::Pages {
            cached: 0,
            total: 0,
        };
    }
    let range = Range { offset, len };
    let mut counts = Counts::default();
    // SAFETY: invariants 1 and 2.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            std::ptr::from_ref(&range),
            std::ptr::from_mut(&mut counts),
            0,
        )
    };
    let page = rustix::param::page_size() as u64;
    let last = offset.saturating_add(len - 1) / page;
    let total = last - offset / page + 1;
    // ENOSYS before 6.5, EOPNOTSUPP for huge pages, EPERM behind a filter.
    if result != 0 {
        return Residency::Unknown;
    }
    // A large folio of the cache may count with pages beyond the range.
    Residency::Pages {
        cached: counts.cache.min(total),
        total,
    }
}

/// The system has no such call.
#[cfg(not(target_os = "linux"))]
pub(crate) fn of_file(_: &File, _: u64, _: u64) -> Residency {
    Residency::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions() {
        assert_eq!(Residency::Unknown.fraction(), None);
        assert_eq!(Residency::all(0).fraction(), Some(1.0));
        assert_eq!(
            Residency::all(4097),
            Residency::Pages {
                cached: 2,
                total: 2
            }
        );
        let half = Residency::Pages {
            cached: 1,
            total: 2,
        };
        assert_eq!(half.fraction(), Some(0.5));
    }
}
