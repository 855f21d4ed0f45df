//! Memory that several processes of one machine see: two halves that they fill together, turn by turn.
//!
//! A window is a file, best in a file system that lies in memory (`/dev/shm`), mapped by all. Member 0 makes it and
//! the others open it; once all have, its name is gone, and the memory is free with the last of them, however they
//! end. What a member 0 leaves that dies before, the next one removes.
//!
//! ```text
//!  0        64                64 (members + 1)   page                page + half
//!  ├ header ┤├ a slot a member ┤ … ───────────────┤├── half 0 ────────┤├── half 1 ────────┤
//! ```
//!
//! A slot says which turn its member has reached. Who has reached a turn waits until all have
//! ([`Window::arrive`]): by looking, in naps that grow to a millisecond, for at most the time given. Each member
//! holds a lock on a byte of the file, which the system releases when the process dies; so the others know of a
//! death at once where the system has such locks (Linux), and after that time elsewhere.
//!
//! What makes turns enough: who fills half `k % 2` in turn `k` has reached turn `k`, hence has all that others have
//! taken from that half in turn `k - 2` behind it, since they said so by reaching `k - 1`.
//!
//! Invariants:
//! 1. The map is as long as the file, whose memory was reserved before anybody mapped it, and no member ever
//!    shortens it; the map lives as long as the value that owns it.
//! 2. The header and the slots are only touched by atomic operations, and lie at multiples of 8 bytes.
//! 3. In each turn a member writes to the parts of a half that are its own by a plan that all members compared
//!    (the digest in the header), which are disjoint from those of the others, before it says that it has arrived;
//!    it reads the half after all have arrived. Nobody writes to that half again before all have arrived once more.
//! 4. Slices of a window borrow it: within this process nothing reads while something writes.
//! 5. The descriptor of a lock is that of a file that is borrowed for the whole call; the system reads the lock's
//!    description, writes to it, and keeps nothing of it.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::OFlags;

use crate::Error;

const MAGIC: u64 = u64::from_le_bytes(*b"tonnage\x01");
const PAGE: u64 = 4096;
/// Bytes of the header, and of a slot: a line of the cache each.
const LINE: u64 = 64;
/// The slot of a member that went before the end.
const GONE: u64 = u64::MAX;
/// The slot of a member whose plan is another.
const REFUSED: u64 = u64::MAX - 1;
/// Members at most: no machine has more devices.
pub const MEMBERS: u32 = 4096;
/// Naps while waiting, and how often the living are counted.
const NAP: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(1));
const LOOK: Duration = Duration::from_millis(20);
/// From this age on a window without its maker's lock is an abandoned one.
const OLD: Duration = Duration::from_secs(60);

/// What all members of a window must have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// How many they are.
    pub members: u32,
    /// Bytes of a half.
    pub half: u64,
    /// Of what they do with it.
    pub digest: [u8; 32],
}

/// How long members wait for each other.
pub struct Patience<'a> {
    /// At most.
    pub timeout: Duration,
    /// Asked while waiting: whether to give up.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl std::fmt::Debug for Patience<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Patience({:?})", self.timeout)
    }
}

/// One process's view of a window.
#[derive(Debug)]
pub struct Window {
    map: MmapRaw,
    file: File,
    path: PathBuf,
    agreed: Agreed,
    member: u32,
    turn: u64,
    /// Whether the name is this member's to remove.
    named: bool,
    finished: bool,
}

impl Window {
    /// Makes the window, as member 0, or opens it, and waits until all members have.
    ///
    /// # Errors
    /// `TimedOut` where a member did not come, `ConnectionAborted` where one died or went, `InvalidData` where
    /// members have not the same in common, `StorageFull` where there is no room for the halves, `AlreadyExists`
    /// where another group uses the name, `Interrupted` where it was cancelled; else what the system said.
    pub fn join(
        path: impl AsRef<Path>,
        agreed: Agreed,
        member: u32,
        patience: &Patience<'_>,
    ) -> Result<Window, Error> {
        let path = path.as_ref();
        let refused = |text: &str| {
            Error::at(
                "join",
                path,
                std::io::Error::new(ErrorKind::InvalidInput, text),
            )
        };
        if agreed.members == 0 || agreed.members > MEMBERS || member >= agreed.members {
            return Err(refused("a member beyond the number of members"));
        }
        let len = total(&agreed).ok_or_else(|| refused("halves that no memory has room for"))?;
        let mut window = match member {
            0 => Window::make(path, agreed, len)?,
            _ => Window::open(path, agreed, member, patience)?,
        };
        window.arrive(patience)?;
        if member == 0 {
            window.forget_name();
        }
        Ok(window)
    }

    fn make(path: &Path, agreed: Agreed, len: u64) -> Result<Window, Error> {
        sweep(path);
        let file = match create(path) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists && is_abandoned(path) => {
                // Left by a group whose member 0 died before all had opened it.
                let _ = std::fs::remove_file(path);
                create(path)
            }
            made => made,
        };
        let file = file.map_err(|e| Error::at("make", path, e))?;
        match Window::prepare(&file, path, len) {
            Ok(map) => {
                let window = Window {
                    map,
                    file,
                    path: path.to_owned(),
                    agreed,
                    member: 0,
                    turn: 0,
                    named: true,
                    finished: false,
                };
                for (at, value) in window.header().into_iter().enumerate().rev() {
                    // The first word last: whoever sees it sees the others.
                    window.word(8 * at as u64).store(value, Ordering::Release);
                }
                Ok(window)
            }
            Err(error) => {
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    fn prepare(file: &File, path: &Path, len: u64) -> Result<MmapRaw, Error> {
        let failed = |e: std::io::Error| Error::at("make", path, e);
        lock(file, 0).map_err(failed)?;
        // Reserved, so that a full file system is an error here and no signal later.
        reserve(file, len).map_err(failed)?;
        map(file, len).map_err(failed)
    }

    fn header(&self) -> [u64; 7] {
        let Agreed {
            members,
            half,
            digest,
        } = self.agreed;
        let mut words = [MAGIC, u64::from(members), half, 0, 0, 0, 0];
        for (word, bytes) in words.iter_mut().skip(3).zip(digest.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        words
    }

    fn open(
        path: &Path,
        agreed: Agreed,
        member: u32,
        patience: &Patience<'_>,
    ) -> Result<Window, Error> {
        let (began, mut nap) = (Instant::now(), NAP.0);
        loop {
            if let Some(window) = Window::try_open(path, agreed, member)? {
                return Ok(window);
            }
            wait(path, began, &mut nap, patience, "for member 0 to make it")?;
        }
    }

    /// The window, if it is there and its maker lives.
    fn try_open(path: &Path, agreed: Agreed, member: u32) -> Result<Option<Window>, Error> {
        let failed = |e: std::io::Error| Error::at("open", path, e);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits() as i32);
        let file = match options.open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let len = file.metadata().map_err(failed)?.len();
        if len < PAGE || is_locked(&file, 0) == Some(false) {
            return Ok(None);
        }
        let mut window = Window {
            map: map(&file, len).map_err(failed)?,
            file,
            path: path.to_owned(),
            agreed,
            member,
            turn: 0,
            named: false,
            finished: true,
        };
        let found = std::array::from_fn(|at| window.word(8 * at as u64).load(Ordering::Acquire));
        if found[0] != MAGIC {
            return Ok(None);
        }
        if found != window.header() || Some(len) != total(&agreed) {
            let room = LINE * (u64::from(member) + 2)
                <= len.min(found[1].saturating_add(1).saturating_mul(LINE));
            if room {
                window.slot(member).store(REFUSED, Ordering::Release);
            }
            let text = "the members of a window have another plan, or another number or size";
            return Err(failed(std::io::Error::new(ErrorKind::InvalidData, text)));
        }
        match lock(&window.file, member) {
            Ok(()) => {
                window.finished = false;
                Ok(Some(window))
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let text = format!("two processes say that they are member {member}");
                Err(failed(std::io::Error::new(ErrorKind::AlreadyExists, text)))
            }
            Err(e) => Err(failed(e)),
        }
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at + 8 <= self.map.len() as u64);
        let word = self
            .map
            .as_mut_ptr()
            .wrapping_add(at as usize)
            .cast::<u64>();
        // SAFETY: invariants 1 and 2; callers name the header or the slot of a member, both before the halves.
        unsafe { AtomicU64::from_ptr(word) }
    }

    fn slot(&self, member: u32) -> &AtomicU64 {
        self.word(LINE * (1 + u64::from(member)))
    }

    /// What this process's messages call it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next turn: says that this member has done its part of the last, and waits until all have.
    ///
    /// # Errors
    /// As [`Window::join`].
    pub fn arrive(&mut self, patience: &Patience<'_>) -> Result<(), Error> {
        self.turn += 1;
        self.slot(self.member).store(self.turn, Ordering::Release);
        let (began, mut nap, mut looked) = (Instant::now(), NAP.0, Instant::now());
        for _ in 0..64 {
            if self.missing()?.is_none() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        while let Some(missing) = self.missing()? {
            if looked.elapsed() >= LOOK {
                self.count_the_living()?;
                looked = Instant::now();
            }
            let what = format!("for member {missing}");
            wait(&self.path, began, &mut nap, patience, &what)?;
        }
        Ok(())
    }

    /// The first member that has not reached this turn.
    fn missing(&self) -> Result<Option<u32>, Error> {
        for member in 0..self.agreed.members {
            let reached = self.slot(member).load(Ordering::Acquire);
            let text = match reached {
                GONE => "ended before the others: its own error says why",
                REFUSED => "has another plan",
                reached if reached < self.turn => return Ok(Some(member)),
                _ => continue,
            };
            return Err(self.lost(member, text));
        }
        Ok(None)
    }

    fn count_the_living(&self) -> Result<(), Error> {
        for member in 0..self.agreed.members {
            let reached = self.slot(member).load(Ordering::Acquire);
            let waited_for = member != self.member && (1..self.turn).contains(&reached);
            // It may have reached the turn and ended well in between.
            if waited_for
                && is_locked(&self.file, member) == Some(false)
                && self.slot(member).load(Ordering::Acquire) == reached
            {
                return Err(self.lost(member, "died"));
            }
        }
        Ok(())
    }

    fn lost(&self, member: u32, text: &str) -> Error {
        let text = format!("member {member} of {} {text}", self.agreed.members);
        Error::at(
            "share",
            &self.path,
            std::io::Error::new(ErrorKind::ConnectionAborted, text),
        )
    }

    fn at_half(&self, half: u64) -> usize {
        (front(self.agreed.members) + (half % 2) * rounded(self.agreed.half)) as usize
    }

    /// Parts of a half, to be written to: first byte and length of each, in rising order.
    ///
    /// # Errors
    /// `InvalidInput` for parts that overlap or leave the half.
    pub fn parts(&mut self, half: u64, parts: &[(u64, u64)]) -> Result<Vec<&mut [u8]>, Error> {
        let base = self.at_half(half);
        let (mut made, mut end) = (Vec::with_capacity(parts.len()), 0);
        for &(begin, len) in parts {
            let until = begin
                .checked_add(len)
                .filter(|&until| begin >= end && until <= self.agreed.half);
            let Some(until) = until else {
                let text = "parts that overlap or leave the window";
                let error = std::io::Error::new(ErrorKind::InvalidInput, text);
                return Err(Error::at("share", &self.path, error));
            };
            end = until;
            let start = self.map.as_mut_ptr().wrapping_add(base + begin as usize);
            // SAFETY: within the half, hence the map (invariant 1), disjoint from the parts before; this member's
            // alone until it arrives (invariant 3); borrows the window (invariant 4).
            made.push(unsafe { std::slice::from_raw_parts_mut(start, len as usize) });
        }
        Ok(made)
    }

    /// A half, filled by all in the turn that has just been reached.
    pub fn bytes(&self, half: u64) -> &[u8] {
        let start = self.map.as_ptr().wrapping_add(self.at_half(half));
        // SAFETY: invariants 1, 3 and 4.
        unsafe { std::slice::from_raw_parts(start, self.agreed.half as usize) }
    }

    /// Ends this member's part: it has reached all turns that there are.
    pub fn finish(mut self) {
        self.finished = true;
    }

    fn forget_name(&mut self) {
        if std::mem::take(&mut self.named) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if !self.finished {
            self.slot(self.member).store(GONE, Ordering::Release);
        }
        self.forget_name();
    }
}

/// Bytes before the halves.
fn front(members: u32) -> u64 {
    rounded(LINE * (u64::from(members) + 1))
}

fn rounded(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE) * PAGE
}

fn total(agreed: &Agreed) -> Option<u64> {
    let half = agreed.half.checked_next_multiple_of(PAGE)?;
    let len = half.checked_mul(2)?.checked_add(front(agreed.members))?;
    isize::try_from(len).is_ok().then_some(len)
}

fn create(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.custom_flags((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits() as i32);
    options.open(path)
}

/// Whether a window of this name was left behind by a member 0 that is dead.
fn is_abandoned(path: &Path) -> bool {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.custom_flags((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits() as i32);
    let file = options.open(path);
    file.is_ok_and(|file| is_locked(&file, 0) == Some(false))
}

/// Removes windows that other groups left in the folder, where each group has a name of its own and would never meet
/// another's: those named as this one is, which nobody has touched for a while, of a member 0 that is dead.
fn sweep(path: &Path) {
    let (Some(folder), true) = (path.parent(), is_one_of_many(path)) else {
        return;
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let other = entry.path();
        // A young one may not have its lock yet.
        let old = entry.metadata().is_ok_and(|found| {
            let age = found.modified().ok().and_then(|at| at.elapsed().ok());
            found.is_file() && age.is_some_and(|age| age >= OLD)
        });
        if old && is_one_of_many(&other) && is_abandoned(&other) {
            let _ = std::fs::remove_file(&other);
        }
    }
}

/// Whether a name is one that no other group has: `tonnage-` and 32 digits of a random number.
fn is_one_of_many(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let digits = name.and_then(|name| name.strip_prefix("tonnage-"));
    digits.is_some_and(|text| text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn map(file: &File, len: u64) -> std::io::Result<MmapRaw> {
    let len = usize::try_from(len).map_err(|_| ErrorKind::OutOfMemory)?;
    MmapOptions::new().len(len).map_raw(file)
}

#[cfg(target_os = "linux")]
fn reserve(file: &File, len: u64) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    Ok(fallocate(file, FallocateFlags::empty(), 0, len)?)
}

#[cfg(not(target_os = "linux"))]
fn reserve(file: &File, len: u64) -> std::io::Result<()> {
    file.set_len(len)
}

/// One nap, or why not.
fn wait(
    path: &Path,
    began: Instant,
    nap: &mut Duration,
    patience: &Patience<'_>,
    what: &str,
) -> Result<(), Error> {
    if (patience.cancelled)() {
        return Err(Error::at("share", path, ErrorKind::Interrupted));
    }
    if began.elapsed() >= patience.timeout {
        let text = format!("waited {:.1} s {what}", patience.timeout.as_secs_f64());
        return Err(Error::at(
            "share",
            path,
            std::io::Error::new(ErrorKind::TimedOut, text),
        ));
    }
    sleep((*nap).min(patience.timeout));
    *nap = (*nap * 2).min(NAP.1);
    Ok(())
}

/// A lock on a byte of the file that belongs to this opening of it, and ends with it.
#[cfg(target_os = "linux")]
fn described(member: u32) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: libc::off_t::from(member),
        l_len: 1,
        // Must be 0 for this kind of lock.
        l_pid: 0,
    }
}

#[cfg(target_os = "linux")]
fn lock(file: &File, member: u32) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let wanted = described(member);
    // SAFETY: invariant 5.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &wanted) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Whether another opening of the file holds a member's lock; `None` where the system does not tell.
#[cfg(target_os = "linux")]
fn is_locked(file: &File, member: u32) -> Option<bool> {
    use std::os::fd::AsRawFd;
    let mut found = described(member);
    // SAFETY: invariant 5.
    let code = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut found) };
    (code == 0).then_some(found.l_type != libc::F_UNLCK as libc::c_short)
}

#[cfg(not(target_os = "linux"))]
fn lock(_: &File, _: u32) -> std::io::Result<()> {
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn is_locked(_: &File, _: u32) -> Option<bool> {
    None
}

#[cfg(test)]
mod tests;
