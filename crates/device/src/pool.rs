//! The process's staging memory: slots that are lent, never more bytes of them than a capacity.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::{Cause, Device, DeviceId, Error, Staging};

/// Staging memory with a capacity. Slots that come back are kept for the next who wants the same.
#[derive(Debug)]
pub struct Pool {
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug)]
struct State {
    capacity: u64,
    /// Bytes of slots that exist, lent or idle.
    bytes: u64,
    /// The most that `bytes` has been.
    peak: u64,
    idle: Vec<(DeviceId, Box<dyn Staging>)>,
    lent: usize,
}

/// How often whoever waits for a slot asks whether to go on.
const LOOK: Duration = Duration::from_millis(20);

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
        };
        Arc::new(Pool {
            state: Mutex::new(state),
            returned: Condvar::new(),
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
    /// `least`, for which it waits. Whoever asks for more than the capacity raises it for good.
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
        let id = device.info().id;
        let mut slots: Vec<Slot> = Vec::with_capacity(count);
        let mut state = self.lock();
        state.capacity = state.capacity.max((least * len) as u64);
        while slots.len() < count {
            let fits =
                |(of, idle): &(DeviceId, Box<dyn Staging>)| *of == id && idle.bytes().len() == len;
            if let Some(at) = state.idle.iter().position(fits) {
                let (_, staging) = state.idle.swap_remove(at);
                state.lent += 1;
                slots.push(Slot::new(self, id, staging));
                continue;
            }
            while state.bytes + len as u64 > state.capacity && state.forget_one() {}
            if state.bytes + len as u64 <= state.capacity {
                state.bytes += len as u64;
                state.peak = state.peak.max(state.bytes);
                state.lent += 1;
                drop(state);
                // The driver may take its time: nobody waits for the lock meanwhile.
                let made = device.staging(len);
                match made {
                    Ok(staging) => slots.push(Slot::new(self, id, staging)),
                    Err(error) => {
                        self.forget(len);
                        return if slots.len() >= least && error.is_out_of_memory() {
                            Ok(slots)
                        } else {
                            Err(error)
                        };
                    }
                }
                state = self.lock();
            } else if slots.len() >= least {
                break;
            } else {
                if cancelled() {
                    drop(state);
                    return Err(Error::new(id, "wait for staging memory", Cause::Cancelled));
                }
                let wait = self.returned.wait_timeout(state, LOOK);
                state = wait.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Ok(slots)
    }

    /// Bytes of slots that exist now, and the most there have been.
    pub fn bytes(&self) -> (u64, u64) {
        let state = self.lock();
        (state.bytes, state.peak)
    }

    /// Frees the slots that nobody has.
    pub fn trim(&self) {
        let mut state = self.lock();
        while state.forget_one() {}
    }

    /// Counts a slot out that is no more.
    fn forget(&self, len: usize) {
        let mut state = self.lock();
        state.bytes -= len as u64;
        state.lent -= 1;
        drop(state);
        self.returned.notify_all();
    }

    fn take_back(&self, device: DeviceId, staging: Box<dyn Staging>) {
        let mut state = self.lock();
        state.lent -= 1;
        state.idle.push((device, staging));
        drop(state);
        self.returned.notify_all();
    }
}

impl State {
    /// Frees one idle slot, if there is one.
    fn forget_one(&mut self) -> bool {
        match self.idle.pop() {
            Some((_, staging)) => {
                self.bytes -= staging.bytes().len() as u64;
                true
            }
            None => false,
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
            self.pool.forget(staging.bytes().len());
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
