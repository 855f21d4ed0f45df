//! All that the driver knows, behind one lock: devices, contexts, streams, events, page-locked memory.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::access::Clock;
use crate::cufile::Gds;
use crate::journal::Journal;
use crate::memory::{Arena, Block, Pinned};
use crate::raw;
use crate::settings::Settings;
use crate::stream::{Event, Stream};

/// A result of CUDA or HIP, whose numbers agree where both have them.
pub type Code = c_int;
pub const INVALID_VALUE: Code = 1;
pub const OUT_OF_MEMORY: Code = 2;
pub const NOT_INITIALIZED: Code = 3;
pub const INVALID_DEVICE: Code = 101;
pub const INVALID_CONTEXT: Code = 201;
pub const INVALID_HANDLE: Code = 400;
pub const NOT_FOUND: Code = 500;
pub const NOT_READY: Code = 600;
pub const CONTEXT_DESTROYED: Code = 709;
pub const LAUNCH_FAILED: Code = 719;

/// One device, with its primary context.
#[derive(Debug)]
pub struct Device {
    pub arena: Arena,
    /// Why nothing works on it any more.
    pub broken: Option<Code>,
    /// How often its primary context is retained.
    pub retained: u64,
    /// Its default stream.
    pub null: u64,
}

/// What the driver counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub allocations: u64,
    pub pinned: u64,
    /// Copies that were asked for.
    pub copies: u64,
    /// Copies that ran or run.
    pub ran: u64,
    pub context_calls: u64,
    pub in_flight: u64,
    pub max_in_flight: u64,
    pub violations: u64,
}

/// Everything.
#[derive(Debug)]
pub struct World {
    pub ready: bool,
    /// Which start this is; contexts of earlier ones are not valid.
    pub epoch: u64,
    pub settings: Settings,
    pub devices: Vec<Device>,
    pub streams: BTreeMap<u64, Stream>,
    pub events: BTreeMap<u64, Event>,
    pub pinned: BTreeMap<usize, Pinned>,
    /// Page-locked blocks that were freed: their start and the length of their map.
    pub unpinned: BTreeMap<usize, usize>,
    /// What the host knows to be over.
    pub host: Clock,
    /// Reads of files into device memory.
    pub gds: Gds,
    pub journal: Journal,
    pub counts: Counts,
    /// No copy begins while this is set.
    pub hold: bool,
    pub next_id: u64,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(|| Mutex::new(World::nothing()));
static CHANGED: Condvar = Condvar::new();

/// The lock on everything.
pub type Guard = MutexGuard<'static, World>;

pub fn lock() -> Guard {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for some change.
pub fn wait(world: Guard) -> Guard {
    CHANGED.wait(world).unwrap_or_else(PoisonError::into_inner)
}

/// Tells whoever waits that something changed.
pub fn changed() {
    CHANGED.notify_all();
}

impl World {
    fn nothing() -> World {
        World {
            ready: false,
            epoch: 0,
            settings: Settings::default(),
            devices: Vec::new(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            pinned: BTreeMap::new(),
            unpinned: BTreeMap::new(),
            host: Clock::default(),
            gds: Gds::default(),
            journal: Journal::open(None).unwrap_or_else(|_| unreachable!("no file to open")),
            counts: Counts::default(),
            hold: false,
            next_id: 0x5000,
        }
    }

    /// Starts the driver, if it has not been.
    pub fn init(&mut self) -> Result<(), Code> {
        if self.ready {
            return Ok(());
        }
        let begun = Settings::from_environment().and_then(|settings| self.begin(settings));
        begun.map_err(|error| {
            eprintln!("stub driver: {error}");
            NOT_INITIALIZED
        })
    }

    /// Starts it with these settings.
    pub fn begin(&mut self, settings: Settings) -> Result<(), String> {
        self.journal = Journal::open(settings.journal.as_deref())?;
        let total = settings.mem_mib.checked_mul(1 << 20);
        let total = total.and_then(|total| usize::try_from(total).ok());
        for index in 0..settings.devices {
            let arena = total.ok_or(INVALID_VALUE).and_then(Arena::new);
            let arena = arena.map_err(|code| format!("no memory for device {index}: {code}"))?;
            let null = self.id();
            self.streams
                .insert(null, Stream::new(index as usize, false));
            crate::stream::start(null);
            self.devices.push(Device {
                arena,
                broken: None,
                retained: 0,
                null,
            });
        }
        self.settings = settings;
        self.epoch += 1;
        self.ready = true;
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| raw::at_exit(crate::end::at_exit));
        Ok(())
    }

    /// Forgets everything. Nothing may be under way.
    pub fn forget(&mut self) {
        for stream in self.streams.values_mut() {
            stream.closed = true;
        }
        for device in self.devices.drain(..) {
            device.arena.close();
        }
        for (start, pinned) in std::mem::take(&mut self.pinned) {
            if pinned.ours {
                raw::unmap(start, pinned.map_len());
            }
        }
        for (start, len) in std::mem::take(&mut self.unpinned) {
            raw::unmap(start, len);
        }
        self.journal.flush();
        let (epoch, next_id) = (self.epoch, self.next_id);
        *self = World {
            epoch,
            next_id,
            ..World::nothing()
        };
        changed();
    }

    pub fn id(&mut self) -> u64 {
        self.next_id += 16;
        self.next_id
    }

    pub fn device(&self, index: usize) -> Result<&Device, Code> {
        if !self.ready {
            return Err(NOT_INITIALIZED);
        }
        self.devices.get(index).ok_or(INVALID_DEVICE)
    }

    pub fn device_mut(&mut self, index: usize) -> Result<&mut Device, Code> {
        if !self.ready {
            return Err(NOT_INITIALIZED);
        }
        self.devices.get_mut(index).ok_or(INVALID_DEVICE)
    }

    /// A rule was broken.
    pub fn violation(&mut self, what: &str) {
        self.counts.violations += 1;
        eprintln!("stub driver: VIOLATION: {what}");
        self.journal
            .line("violation", format_args!("\"what\":\"{what}\""));
    }

    /// Counts a call that needs a device in order; the one that was chosen loses its context.
    pub fn use_device(&mut self, index: usize) -> Result<(), Code> {
        self.counts.context_calls += 1;
        let lost = self.counts.context_calls == self.settings.lose_context;
        let device = self.device_mut(index)?;
        if lost {
            device.broken = Some(CONTEXT_DESTROYED);
            changed();
        }
        device.broken.map_or(Ok(()), Err)
    }

    pub fn allocate(&mut self, index: usize, len: usize) -> Result<usize, Code> {
        self.use_device(index)?;
        self.counts.allocations += 1;
        if self.counts.allocations == self.settings.fail_alloc {
            return Err(OUT_OF_MEMORY);
        }
        let poison = self.settings.poison;
        let address = self.device_mut(index)?.arena.allocate(len, poison)?;
        self.journal.line(
            "alloc",
            format_args!("\"device\":{index},\"address\":{address},\"bytes\":{len}"),
        );
        Ok(address)
    }

    pub fn pin(&mut self, index: usize, len: usize) -> Result<usize, Code> {
        self.use_device(index)?;
        self.counts.pinned += 1;
        if self.counts.pinned == self.settings.fail_pinned {
            return Err(OUT_OF_MEMORY);
        }
        let size = len.checked_next_multiple_of(4096).filter(|_| len > 0);
        let start = raw::map(None, size.ok_or(INVALID_VALUE)?, true)?;
        self.take_pinned(index, start, len, true);
        Ok(start)
    }

    pub fn register(&mut self, index: usize, start: usize, len: usize) -> Result<(), Code> {
        self.use_device(index)?;
        let end = start.checked_add(len).filter(|_| start > 0 && len > 0);
        let end = end.ok_or(INVALID_VALUE)?;
        let before = self.pinned.range(..end).next_back();
        if before.is_some_and(|(at, pinned)| at + pinned.block.len > start) {
            // HOST_MEMORY_ALREADY_REGISTERED.
            return Err(712);
        }
        self.take_pinned(index, start, len, false);
        Ok(())
    }

    fn take_pinned(&mut self, device: usize, start: usize, len: usize, ours: bool) {
        self.journal.line(
            "pin",
            format_args!("\"address\":{start},\"bytes\":{len},\"ours\":{ours}"),
        );
        let uses = crate::access::Uses::default();
        let block = Block { len, uses };
        let pinned = Pinned {
            block,
            ours,
            device,
        };
        self.pinned.insert(start, pinned);
    }
}
