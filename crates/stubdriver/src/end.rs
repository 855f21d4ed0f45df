//! What has to be given back: frees, and the look at what is left.

use crate::raw;
use crate::settings::ExitCheck;
use crate::world::{Code, Guard, INVALID_VALUE, World, lock, wait};

/// What is alive.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Blocks of device memory.
    pub allocations: u64,
    /// Blocks of page-locked memory.
    pub pinned: u64,
    /// Streams that were not destroyed.
    pub streams: u64,
    /// Events that were not destroyed.
    pub events: u64,
    /// How often primary contexts are retained.
    pub contexts: u64,
    /// Files that cuFile has.
    pub gds_files: u64,
    /// Device memory that cuFile has.
    pub gds_buffers: u64,
}

impl Live {
    /// All of them.
    pub fn total(&self) -> u64 {
        let driver = self.allocations + self.pinned + self.streams + self.events + self.contexts;
        driver + self.gds_files + self.gds_buffers
    }
}

impl World {
    /// What has not been given back. A broken device's objects count as well: whoever can still call the
    /// driver is to give back what nothing runs on.
    pub fn live(&self) -> Live {
        let blocks = self.devices.iter().map(|device| device.arena.blocks.len());
        let default: Vec<u64> = self.devices.iter().map(|device| device.null).collect();
        let streams = self.streams.iter();
        let alive = streams.filter(|(id, stream)| stream.alive && !default.contains(id));
        Live {
            allocations: blocks.sum::<usize>() as u64,
            pinned: self.pinned.len() as u64,
            streams: alive.count() as u64,
            events: self.events.len() as u64,
            contexts: self.devices.iter().map(|device| device.retained).sum(),
            gds_files: self.gds.files.len() as u64,
            gds_buffers: self.gds.buffers.len() as u64,
        }
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        let mut streams = self.streams.values();
        streams.all(|stream| stream.done == stream.issued)
    }
}

/// Frees device memory.
pub fn free(mut world: Guard, device: usize, address: usize) -> Result<(), Code> {
    if address == 0 {
        return Ok(());
    }
    let state = world.use_device(device);
    let broken = world.devices.iter().any(|device| device.broken.is_some());
    let of = world
        .devices
        .iter()
        .position(|device| device.arena.contains(address));
    let host = world.host.clone();
    let Some(arena) = of
        .and_then(|of| world.devices.get_mut(of))
        .map(|d| &mut d.arena)
    else {
        world.violation(&format!("{address} was never allocated, and is freed"));
        return Err(INVALID_VALUE);
    };
    let (twice, block) = (arena.was_freed(address), arena.block(address));
    let Some(block) = block else {
        world.violation(&format!(
            "device memory at {address} is freed {}",
            if twice {
                "twice"
            } else {
                "by an address within it"
            }
        ));
        return Err(INVALID_VALUE);
    };
    let unfinished = block.uses.unfinished(&host);
    if world.gds.buffers.contains_key(&address) {
        world.violation(&format!(
            "device memory at {address} is freed, and cuFile still has it"
        ));
    }
    if !unfinished.is_empty() && !broken {
        world.violation(&format!(
            "device memory at {address} is freed, and nobody waited for its copies"
        ));
    }
    world = settle(world, &unfinished).0;
    if let Some(device) = of.and_then(|of| world.devices.get_mut(of)) {
        device.arena.free(address);
    }
    world
        .journal
        .line("free", format_args!("\"address\":{address}"));
    state
}

/// Frees page-locked memory, or only unregisters it.
pub fn unpin(mut world: Guard, device: usize, start: usize, ours: bool) -> Result<(), Code> {
    let state = world.use_device(device);
    let broken = world.devices.iter().any(|device| device.broken.is_some());
    let host = world.host.clone();
    let found = world.pinned.get_mut(&start).filter(|p| p.ours == ours);
    let Some(pinned) = found else {
        let twice = world.unpinned.contains_key(&start);
        if twice {
            world.violation(&format!("page-locked memory at {start} is freed twice"));
        } else {
            world.violation(&format!("{start} is no page-locked memory, and is freed"));
        }
        return Err(INVALID_VALUE);
    };
    let unfinished = pinned.block.uses.unfinished(&host);
    if !unfinished.is_empty() && !broken {
        world.violation(&format!(
            "page-locked memory at {start} is freed, and nobody waited for its copies"
        ));
    }
    let over;
    (world, over) = settle(world, &unfinished);
    let pinned = world.pinned.remove(&start);
    if let Some(pinned) = pinned.filter(|_| ours) {
        world.unpinned.insert(start, pinned.map_len());
        if over {
            // Nobody gets these addresses again: a late use, or a second free, is told from a new block's.
            raw::seal(start, pinned.map_len());
        }
    }
    world
        .journal
        .line("unpin", format_args!("\"address\":{start}"));
    state
}

/// Waits until these are over, so that memory goes only then, whatever its user did; false if a test holds
/// copies back.
fn settle(mut world: Guard, uses: &[(u64, u64)]) -> (Guard, bool) {
    loop {
        let over = uses
            .iter()
            .all(|(stream, number)| world.is_done(*stream, *number));
        if over || world.hold {
            return (world, over);
        }
        world = wait(world);
    }
}

/// The end of the process.
pub extern "C" fn at_exit() {
    let mut world = lock();
    world.journal.flush();
    if !world.ready || world.settings.exit_check == ExitCheck::Off {
        return;
    }
    let live = world.live();
    let left = match world.settings.exit_check {
        ExitCheck::All => live.total(),
        _ => live.allocations,
    };
    let violations = world.counts.violations;
    if left > 0 || violations > 0 {
        eprintln!("stub driver: at the end, {violations} violations, and alive: {live:?}");
        raw::exit_now(crate::EXIT);
    }
}
