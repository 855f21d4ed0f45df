//! Host memory for loaded tensors: one anonymous map, and how its pages are taken.
//!
//! Faults of the destination cost more than reading a cached file: measured for 4 GiB, 0.9 s with huge
//! pages and 4 s or more with small ones. In a virtual machine that gives free memory back to its host the order
//! can turn: for 1 GiB after 8 s of idling, 1.7 to 2.6 s with huge pages and 0.8 s with small ones, which come
//! from memory that the host has not taken; for 4 GiB huge pages win even then (3.4 s, 7 s). No rule
//! foresees this, so [`Taker`] measures: it starts with huge pages, tries small ones when they are slow, and
//! goes on with what was faster.

use std::sync::{Mutex, PoisonError};

use memmap2::{MmapMut, MmapOptions};
use tonnage_storage::{Error, pages};

/// A buffer of zeros that its owner fills.
#[derive(Debug)]
pub struct HostBuffer {
    map: Option<MmapMut>,
    skip: usize,
    len: usize,
}

/// From this size on a buffer begins where a huge page does.
const LARGE: usize = 2 * pages::HUGE;

impl HostBuffer {
    /// Reserves `len` bytes, which begin on a page. Pages are taken when they are first written to.
    ///
    /// # Errors
    /// `OutOfMemory` where there is no room.
    pub fn new(len: u64) -> Result<Self, Error> {
        let failed = |e: std::io::Error| Error::new("reserve memory of", format!("{len} bytes"), e);
        let no_room = || failed(std::io::ErrorKind::OutOfMemory.into());
        if len == 0 {
            return Ok(HostBuffer {
                map: None,
                skip: 0,
                len: 0,
            });
        }
        // No allocation may exceed `isize::MAX`; the map's own check says "invalid data" of it.
        let fits = isize::try_from(len)
            .ok()
            .and_then(|len| usize::try_from(len).ok());
        let len = fits.ok_or_else(no_room)?;
        let spare = if len >= LARGE { pages::HUGE } else { 0 };
        let room = len.checked_add(spare);
        let room = room.filter(|&room| isize::try_from(room).is_ok());
        let room = room.ok_or_else(no_room)?;
        let map = MmapOptions::new().len(room).map_anon().map_err(failed)?;
        let skip = match spare {
            0 => 0,
            _ => map.as_ptr().addr().wrapping_neg() % pages::HUGE,
        };
        Ok(HostBuffer {
            map: Some(map),
            skip,
            len,
        })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        let map = self.map.as_deref().unwrap_or(&[]);
        map.get(self.skip..self.skip + self.len).unwrap_or(&[])
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let map = self.map.as_deref_mut().unwrap_or(&mut []);
        map.get_mut(self.skip..self.skip + self.len)
            .unwrap_or(&mut [])
    }

    /// The first byte; valid as long as `self` lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.as_slice().as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl AsRef<[u8]> for HostBuffer {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// Takes pages for memory that is about to be filled, of the size that proves faster.
#[derive(Debug, Default)]
pub(crate) struct Taker(Mutex<Rates>);

/// Seconds of processor time a byte for each size of pages, the last pieces weighing most.
#[derive(Debug, Default)]
struct Rates {
    huge: Option<f64>,
    small: Option<f64>,
    /// Pieces since the size that loses was tried.
    since: u32,
}

/// Below this there is nothing to choose: huge pages are at their usual speed (4 GiB/s of one thread).
const FAST: f64 = 1.0 / (1.5 * (1 << 30) as f64);
/// So many pieces go to the size that wins before the other one is tried again.
const AGAIN: u32 = 32;
/// Pieces below this say nothing about speed.
const TELLING: usize = 1 << 20;

impl Rates {
    fn huge_next(&mut self) -> bool {
        let huge_wins = match (self.huge, self.small) {
            (None, _) => true,
            (Some(huge), _) if huge < FAST => return true,
            (Some(_), None) => false,
            (Some(huge), Some(small)) => huge <= small,
        };
        self.since += 1;
        if self.since > AGAIN {
            self.since = 0;
            return !huge_wins;
        }
        huge_wins
    }

    fn learn(&mut self, huge: bool, rate: f64) {
        let known = match huge {
            true => &mut self.huge,
            false => &mut self.small,
        };
        *known = Some(known.map_or(rate, |old| (old + rate) / 2.0));
    }
}

impl Taker {
    /// Asks for huge pages, before anything is taken: doing so piece by piece would stop the other threads each time.
    pub fn prepare(memory: &mut [u8]) {
        if memory.len() >= pages::HUGE {
            pages::prefer_huge(memory, true);
        }
    }

    /// Takes the pages behind `memory`. Memory whose pages are there already costs next to nothing.
    pub fn take(&self, memory: &mut [u8]) {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let telling = memory.len() >= TELLING;
        let huge = !telling || lock().huge_next();
        if !huge {
            pages::prefer_huge(memory, false);
        }
        if let Some(time) = pages::take(memory)
            && telling
        {
            let rate = time.as_secs_f64() / memory.len() as f64;
            lock().learn(huge, rate);
        }
    }
}

/// Bytes of memory that can be had without swapping, where the system tells.
pub(crate) fn available() -> Option<u64> {
    let number = |path: &str| -> Option<u64> {
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().parse().ok()
    };
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let machine = line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10;
    // A container's share, as it is seen from inside.
    let share = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(most, used)| most.saturating_sub(used));
    Some(share.unwrap_or(machine).min(machine))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_until_filled_and_the_impossible_is_refused() {
        for len in [5000, LARGE + 5000] {
            let mut buffer = HostBuffer::new(len as u64).unwrap();
            assert!(buffer.as_slice().iter().all(|&b| b == 0));
            buffer.as_mut_slice()[len - 1] = 1;
            assert_eq!(
                (buffer.as_ref().last(), buffer.len(), buffer.is_empty()),
                (Some(&1), len, false)
            );
            assert_eq!(buffer.as_ptr(), buffer.as_slice().as_ptr());
            let page = if len > LARGE { pages::HUGE } else { 4096 };
            assert!(buffer.as_ptr().addr().is_multiple_of(page));
        }
        assert!(HostBuffer::new(0).unwrap().is_empty());
        for len in [u64::MAX, isize::MAX as u64] {
            let error = HostBuffer::new(len).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::OutOfMemory);
        }
    }

    #[test]
    fn the_faster_pages_are_taken_and_the_others_tried_again() {
        let mut rates = Rates::default();
        assert!(rates.huge_next(), "huge pages come first");
        rates.huge = Some(FAST / 2.0);
        assert!((0..100).all(|_| rates.huge_next()), "fast enough");
        rates = Rates {
            huge: Some(FAST * 4.0),
            ..Rates::default()
        };
        assert!(!rates.huge_next(), "slow: small ones are tried");
        rates.small = Some(FAST * 2.0);
        let huge = (0..100).filter(|_| rates.huge_next()).count();
        assert!((1..=4).contains(&huge), "{huge} of 100");
        rates.small = Some(FAST * 8.0);
        let huge = (0..100).filter(|_| rates.huge_next()).count();
        assert!((96..100).contains(&huge), "{huge} of 100");
    }

    #[test]
    fn taking_pages_changes_no_byte() {
        let taker = Taker::default();
        let mut memory = vec![3; 9 << 20];
        for part in memory.chunks_mut(3 << 20) {
            taker.take(part);
        }
        taker.take(&mut []);
        assert!(memory.iter().all(|&byte| byte == 3));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_system_tells_what_is_free() {
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
    }
}
