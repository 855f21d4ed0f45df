//! The process's staging memory: slots that are lent, never more bytes of them than a capacity.
//!
//! Whoever wants slots gets all that it needs at once, or waits without holding any: two who wait can't wait
//! for each other. Who came first is served first, so nobody waits for ever. The driver's calls, which may
//! take their time, are made while nobody waits for the lock.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use std::time::Duration;

use crate::sync::{Condvar, Instant, Mutex, MutexGuard, sleep, spawn};
use crate::{Cause, Device, DeviceId, Error, Staging};

/// Staging memory with a capacity. Slots that come back are kept for the next who wants the same, and freed a
/// few seconds after the last one has come back.
#[derive(Debug)]
pub struct Pool {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    capacity: u64,
    /// Bytes of slots that exist, lent or idle, or are being made or freed.
    bytes: u64,
    /// The most that `bytes` has been.
    peak: u64,
    idle: Vec<(DeviceId, Box<dyn Staging>)>,
    /// Slots that are lent, or are being made to be.
    lent: usize,
    /// When the last one came back.
    since: Instant,
    /// Whether a thread is there that will free what is idle.
    sweeping: bool,
    /// Who waits, in the order of coming.
    line: VecDeque<u64>,
    next: u64,
}

/// How often whoever waits for a slot asks whether to go on.
const LOOK: Duration = Duration::from_millis(20);

/// How long idle slots are kept: a program that loads one file after the other locks their pages once, which
/// takes longer than to read into them; and soon after the last file the memory is the system's again.
const LINGER: Duration = Duration::from_secs(5);
/// How often the thread that frees them looks whether the pool is still there.
const SWEEP: Duration = Duration::from_millis(50);

/// What was granted: slots that were idle, and how many more to make after freeing these.
struct Grant {
    slots: Vec<Slot>,
    make: Making,
    evicted: Vec<Box<dyn Staging>>,
    /// Bytes that are the evicted ones' beyond those of the ones to be made.
    excess: u64,
}

impl Pool {
    /// Bytes of staging memory by default.
    pub const CAPACITY: u64 = 256 << 20;

    /// A pool of its own.
    pub fn new(capacity: u64) -> Arc<Pool> {
        let state = State {
            capacity,
            bytes: 0,
            peak: 0,
            idle: Vec::new(),
            lent: 0,
            since: Instant::now(),
            sweeping: false,
            line: VecDeque::new(),
            next: 0,
        };
        Arc::new(Pool {
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    /// The process's pool.
    pub fn global() -> &'static Arc<Pool> {
        static GLOBAL: OnceLock<Arc<Pool>> = OnceLock::new();
        GLOBAL.get_or_init(|| Pool::new(Self::CAPACITY))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends up to `count` slots of `len` bytes for a device: as many as there is room for, at least
    /// `least`, for which it waits its turn. Without a `least` it never waits. Whoever asks for more than the
    /// capacity raises it for good. Who has slots already should not wait for more: others may do the same.
    ///
    /// # Errors
    /// [`Cause::Cancelled`] once `cancelled` says so; those of [`Device::staging`].
    pub fn lend(
        self: &Arc<Self>,
        device: &dyn Device,
        len: usize,
        count: usize,
        least: usize,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Vec<Slot>, Error> {
        let least = least.min(count);
        let grant = self.grant(device, len, count, least, cancelled)?;
        drop(grant.evicted);
        if grant.excess > 0 {
            self.lock().bytes -= grant.excess;
            self.changed.notify_all();
        }
        let (mut slots, mut make) = (grant.slots, grant.make);
        while make.left > 0 {
            match device.staging(len) {
                Ok(staging) => slots.push(make.made(staging)),
                Err(error) if !error.is_out_of_memory() => return Err(error),
                // Others' idle slots may be what is in the way.
                Err(_) if self.free_idle() => {}
                Err(_) if slots.len() >= least => break,
                Err(error) => return Err(error),
            }
        }
        Ok(slots)
    }

    /// Waits for its turn and for room.
    fn grant(
        self: &Arc<Self>,
        device: &dyn Device,
        len: usize,
        count: usize,
        least: usize,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Grant, Error> {
        let id = device.info().id;
        let needed = (least as u64).checked_mul(len as u64);
        let Some(needed) = needed.filter(|needed| *needed <= isize::MAX as u64) else {
            let cause = Cause::OutOfMemory {
                needed: needed.unwrap_or(u64::MAX),
                free: None,
            };
            return Err(Error::new(id, "make a staging buffer", cause));
        };
        // It goes after the lock does, should a function of the caller panic.
        let mut place = Place(None, self);
        let mut state = self.lock();
        state.capacity = state.capacity.max(needed);
        place.take(&mut state);
        loop {
            if state.line.front().copied() == place.0 {
                let suits = |(of, idle): &(DeviceId, Box<dyn Staging>)| {
                    *of == id && idle.bytes().len() == len && device.copies_from(&**idle)
                };
                if let Some(granted) = state.grant(suits, len, count, least) {
                    place.leave(&mut state);
                    return Ok(self.lent(id, len, granted));
                }
            }
            if least == 0 || cancelled() {
                place.leave(&mut state);
                drop(state);
                // Whoever is next may want less.
                self.changed.notify_all();
                return match least {
                    0 => Ok(self.lent(id, len, Granted::default())),
                    _ => Err(Error::new(id, "wait for staging memory", Cause::Cancelled)),
                };
            }
            let wait = self.changed.wait_timeout(state, LOOK);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lent(self: &Arc<Self>, id: DeviceId, len: usize, granted: Granted) -> Grant {
        self.changed.notify_all();
        let slot = |staging| Slot::new(self, id, staging);
        Grant {
            slots: granted.idle.into_iter().map(slot).collect(),
            make: Making {
                pool: Arc::clone(self),
                device: id,
                len,
                left: granted.make,
            },
            evicted: granted.evicted,
            excess: granted.excess,
        }
    }

    /// Bytes of slots that exist now, and the most there have been.
    pub fn bytes(&self) -> (u64, u64) {
        let state = self.lock();
        (state.bytes, state.peak)
    }

    /// Frees the slots that nobody has.
    pub fn trim(&self) {
        self.free_idle();
    }

    /// Whether there were any.
    fn free_idle(&self) -> bool {
        let idle = std::mem::take(&mut self.lock().idle);
        self.free(idle)
    }

    fn free(&self, idle: Vec<(DeviceId, Box<dyn Staging>)>) -> bool {
        let bytes: u64 = idle.iter().map(|(_, idle)| idle.bytes().len() as u64).sum();
        let some = !idle.is_empty();
        drop(idle);
        if some {
            self.lock().bytes -= bytes;
            self.changed.notify_all();
        }
        some
    }

    /// Counts slots out that are no more, or never were.
    fn forget(&self, len: usize, count: usize) {
        let mut state = self.lock();
        state.bytes -= len as u64 * count as u64;
        state.lent -= count;
        drop(state);
        self.changed.notify_all();
    }

    fn take_back(self: &Arc<Self>, device: DeviceId, staging: Box<dyn Staging>) {
        let mut state = self.lock();
        state.lent -= 1;
        state.idle.push((device, staging));
        let start = state.lent == 0 && !state.sweeping;
        if state.lent == 0 {
            state.since = Instant::now();
            state.sweeping = true;
        }
        drop(state);
        self.changed.notify_all();
        if start {
            let pool = Arc::downgrade(self);
            if spawn("tonnage-staging", move || sweep(&pool)).is_err() {
                // Without a thread, slots stay until someone trims or the next sweeper comes.
                self.lock().sweeping = false;
            }
        }
    }
}

/// Frees what is idle once nobody has had a slot for long enough. Ends as soon as someone has.
fn sweep(pool: &Weak<Pool>) {
    let mut wait = LINGER;
    loop {
        let begun = Instant::now();
        while begun.elapsed() < wait {
            sleep(SWEEP.min(wait));
            // A pool that is gone has freed its slots: its thread must not outlive it for long.
            if pool.strong_count() == 0 {
                return;
            }
        }
        let Some(pool) = pool.upgrade() else { return };
        let mut state = pool.lock();
        if state.lent == 0 {
            wait = LINGER.saturating_sub(state.since.elapsed());
            if !wait.is_zero() {
                continue;
            }
        }
        state.sweeping = false;
        let idle = match state.lent {
            0 => std::mem::take(&mut state.idle),
            // The last of them to come back starts another thread.
            _ => Vec::new(),
        };
        drop(state);
        pool.free(idle);
        return;
    }
}

/// What there is for someone, counted as lent.
#[derive(Default)]
struct Granted {
    idle: Vec<Box<dyn Staging>>,
    make: usize,
    evicted: Vec<Box<dyn Staging>>,
    excess: u64,
}

impl State {
    /// Up to `count` slots, if there are `least`: idle ones that suit, and room for new ones, for which
    /// others that are idle have to go.
    fn grant(
        &mut self,
        suits: impl Fn(&(DeviceId, Box<dyn Staging>)) -> bool,
        len: usize,
        count: usize,
        least: usize,
    ) -> Option<Granted> {
        let (mut kept, mut others) = (Vec::new(), Vec::new());
        for idle in std::mem::take(&mut self.idle) {
            match kept.len() < count && suits(&idle) {
                true => kept.push(idle),
                false => others.push(idle),
            }
        }
        let size = |(_, idle): &(DeviceId, Box<dyn Staging>)| idle.bytes().len() as u64;
        // What is lent, and what will be; the rest may go.
        let used = self.bytes - others.iter().map(size).sum::<u64>();
        let room = self.capacity.saturating_sub(used) / (len as u64).max(1);
        let missing = count - kept.len();
        let make = usize::try_from(room).map_or(missing, |room| room.min(missing));
        self.idle = others;
        let slots = kept.len() + make;
        if slots < least {
            self.idle.append(&mut kept);
            return None;
        }
        let mut granted = Granted {
            idle: kept.into_iter().map(|(_, idle)| idle).collect(),
            make,
            ..Granted::default()
        };
        let new = make as u64 * len as u64;
        let mut gone = 0;
        while self.bytes - gone + new > self.capacity
            && let Some(idle) = self.idle.pop()
        {
            gone += size(&idle);
            granted.evicted.push(idle.1);
        }
        // Evicted ones count until they are freed.
        granted.excess = gone.saturating_sub(new);
        self.bytes += new.saturating_sub(gone);
        self.peak = self.peak.max(self.bytes);
        self.lent += slots;
        Some(granted)
    }
}

/// A place in the line.
struct Place<'a>(Option<u64>, &'a Pool);

impl Place<'_> {
    fn take(&mut self, state: &mut State) {
        let number = state.next;
        state.next += 1;
        state.line.push_back(number);
        self.0 = Some(number);
    }

    fn leave(&mut self, state: &mut State) {
        if let Some(number) = self.0.take() {
            state.line.retain(|other| *other != number);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.0.is_some() {
            let pool = self.1;
            self.leave(&mut pool.lock());
            pool.changed.notify_all();
        }
    }
}

/// Slots that are counted already and are still to be made.
struct Making {
    pool: Arc<Pool>,
    device: DeviceId,
    len: usize,
    left: usize,
}

impl Making {
    fn made(&mut self, staging: Box<dyn Staging>) -> Slot {
        self.left -= 1;
        Slot::new(&self.pool, self.device, staging)
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if self.left > 0 {
            self.pool.forget(self.len, self.left);
        }
    }
}

/// A staging buffer on loan. It goes back to its pool when it is dropped.
#[derive(Debug)]
pub struct Slot {
    pool: Arc<Pool>,
    device: DeviceId,
    staging: Option<Box<dyn Staging>>,
}

impl Slot {
    fn new(pool: &Arc<Pool>, device: DeviceId, staging: Box<dyn Staging>) -> Self {
        Slot {
            pool: Arc::clone(pool),
            device,
            staging: Some(staging),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.staging.as_ref().map_or(&[], |staging| staging.bytes())
    }

    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.staging
            .as_mut()
            .map_or(&mut [], |staging| staging.bytes_mut())
    }

    /// The memory, for queues.
    pub fn staging(&self) -> Option<&dyn Staging> {
        self.staging.as_deref()
    }

    /// Gives it up: its memory is never used or freed again, since a copy may still run on it.
    pub fn abandon(mut self) {
        if let Some(staging) = self.staging.take() {
            self.pool.forget(staging.bytes().len(), 1);
            std::mem::forget(staging);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(staging) = self.staging.take() {
            self.pool.take_back(self.device, staging);
        }
    }
}
