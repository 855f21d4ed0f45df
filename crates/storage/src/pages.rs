//! Pages behind memory that is about to be filled.
//!
//! The first touch of fresh memory is a fault a page, and a fault costs more than reading a page from the
//! cache. Huge pages are 512 times fewer faults; taking pages ahead of the read moves the faults out of it.
//!
//! Invariants:
//! 1. Advice is given only for whole pages that lie inside of a `&mut [u8]`, so it concerns memory of this
//!    process that nobody else uses meanwhile.
//! 2. None of the advices used here changes what the memory holds: they choose the size of pages, and take
//!    pages that are missing.
#![allow(unsafe_code)]

use std::time::Duration;

/// Bytes of a huge page where the system has them for ordinary memory: x86-64, and aarch64 with small pages.
pub const HUGE: usize = 2 << 20;

/// Asks for huge pages behind this memory, or for no more of them. Pages that are there stay as they are.
/// False if the system has none.
pub fn prefer_huge(memory: &mut [u8], huge: bool) -> bool {
    system::prefer_huge(memory, huge)
}

/// Takes the pages behind this memory that are missing, all at once, and says how much processor time that
/// took. `None` if the system can't: then each is taken when it is first touched.
pub fn take(memory: &mut [u8]) -> Option<Duration> {
    system::take(memory)
}

/// The whole pages inside of `memory`, whose pages have `page` bytes.
#[cfg(target_os = "linux")]
fn inside(memory: &mut [u8], page: usize) -> &mut [u8] {
    let head = memory.as_ptr().addr().wrapping_neg() % page;
    let len = memory.len().saturating_sub(head) / page * page;
    match memory.get_mut(head..head.saturating_add(len)) {
        Some(pages) => pages,
        None => &mut [],
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::time::Duration;

    use rustix::mm::Advice;
    use rustix::time::{ClockId, clock_gettime};

    use super::{HUGE, inside};

    pub(super) fn prefer_huge(memory: &mut [u8], huge: bool) -> bool {
        let advice = if huge {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        };
        advise(inside(memory, HUGE), advice)
    }

    pub(super) fn take(memory: &mut [u8]) -> Option<Duration> {
        let before = processor_time();
        let pages = inside(memory, rustix::param::page_size());
        advise(pages, Advice::LinuxPopulateWrite).then(|| processor_time().saturating_sub(before))
    }

    /// What this thread has used. A machine that has more to do makes the clock run, but not this.
    fn processor_time() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(
            time.tv_sec.unsigned_abs(),
            u32::try_from(time.tv_nsec).unwrap_or(0),
        )
    }

    fn advise(pages: &mut [u8], advice: Advice) -> bool {
        if pages.is_empty() {
            return true;
        }
        // SAFETY: invariants 1 and 2.
        unsafe { rustix::mm::madvise(pages.as_mut_ptr().cast(), pages.len(), advice) }.is_ok()
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn prefer_huge(_: &mut [u8], _: bool) -> bool {
        false
    }

    pub(super) fn take(_: &mut [u8]) -> Option<std::time::Duration> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_inside_are_meant() {
        let mut memory = vec![0; 40_000];
        let start = memory.as_ptr().addr();
        let pages = inside(&mut memory[1..], 4096);
        let (from, len) = (pages.as_ptr().addr(), pages.len());
        assert!(from.is_multiple_of(4096) && len.is_multiple_of(4096));
        assert!(from > start && from - start <= 4096 && len >= 40_000 - 2 * 4096 - 1);
        assert!(inside(&mut memory[..100], 4096).is_empty());
        assert!(inside(&mut [], 4096).is_empty());
    }

    #[test]
    fn advice_changes_no_byte() {
        let mut memory = vec![7; 5 << 20];
        for huge in [true, false, true] {
            prefer_huge(&mut memory[3..], huge);
            take(&mut memory[5..]);
        }
        assert!(memory.iter().all(|&byte| byte == 7));
        assert!(take(&mut []).is_some() && prefer_huge(&mut [], true));
    }

    #[test]
    fn taken_pages_are_there() {
        let mut map = memmap2::MmapMut::map_anon(8 << 20).unwrap();
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = resident();
        if take(&mut map).is_some() {
            assert!(resident() >= before + (6 << 20) / rustix::param::page_size());
        }
    }
}
