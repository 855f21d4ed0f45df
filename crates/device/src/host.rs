//! The host as a device: its memory is memory, and a copy is over when it returns.
//!
//! Invariants:
//! 1. [`HostMemory`] owns one anonymous map, which never moves and lives as long as it does.
//! 2. No two borrows of its bytes overlap: each takes its range in `taken` first and gives it back after.
#![allow(unsafe_code)]

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapMut, MmapOptions, MmapRaw};

use crate::{
    Cause, Completion, Device, DeviceId, DeviceMemory, Error, Info, Memory, Queue, Slot, Staging,
    Stream, Ticket, Transfer,
};

/// The host's own memory.
#[derive(Debug)]
pub struct HostDevice {
    info: Info,
    direct: bool,
}

impl Default for HostDevice {
    fn default() -> Self {
        HostDevice::new(true)
    }
}

impl HostDevice {
    /// The host. Unless `direct`, its memory is reached by copies only, as a card's is.
    pub fn new(direct: bool) -> Self {
        let info = Info {
            id: DeviceId::HOST,
            name: "host memory".to_owned(),
            total_memory: u64::MAX,
            unified: true,
            align: 64,
            max_region: isize::MAX as u64,
            pitched: true,
        };
        HostDevice { info, direct }
    }
}

fn map(len: u64, doing: &'static str) -> Result<MmapMut, Error> {
    let refused = || {
        Error::new(
            DeviceId::HOST,
            doing,
            Cause::OutOfMemory {
                needed: len,
                free: None,
            },
        )
    };
    let fits = isize::try_from(len)
        .ok()
        .and_then(|len| usize::try_from(len).ok());
    // A map of nothing is refused by the system.
    let len = fits.ok_or_else(refused)?.max(1);
    MmapOptions::new()
        .len(len)
        .map_anon()
        .map_err(|_| refused())
}

impl Device for HostDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn free_memory(&self) -> Result<u64, Error> {
        Ok(u64::MAX)
    }

    fn allocate(&self, len: u64) -> Result<Memory, Error> {
        let map = MmapRaw::from(map(len, "allocate")?);
        let taken = Mutex::new(Vec::new());
        Ok(Arc::new(HostMemory {
            map,
            len,
            direct: self.direct,
            taken,
        }))
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        Ok(Box::new(HostStaging {
            map: map(len as u64, "make a staging buffer")?,
            len,
        }))
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        Ok(Box::new(HostQueue))
    }
}

#[derive(Debug)]
struct HostMemory {
    map: MmapRaw,
    len: u64,
    direct: bool,
    /// Ranges that someone has a borrow of.
    taken: Mutex<Vec<Range<u64>>>,
}

impl HostMemory {
    fn with(&self, range: Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        if range.start > range.end || range.end > self.len {
            return false;
        }
        let lock = || self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = lock();
        if taken
            .iter()
            .any(|other| other.start < range.end && range.start < other.end)
        {
            return false;
        }
        taken.push(range.clone());
        drop(taken);
        let _given_back = GiveBack(self, range.clone());
        // SAFETY: within the map (invariant 1; the range was checked).
        let start = unsafe { self.map.as_mut_ptr().add(range.start as usize) };
        // SAFETY: within the map, and nobody else has an overlapping range (invariants 1 and 2).
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(start, (range.end - range.start) as usize) };
        fill(bytes);
        true
    }
}

struct GiveBack<'a>(&'a HostMemory, Range<u64>);

impl Drop for GiveBack<'_> {
    fn drop(&mut self) {
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = taken.iter().position(|range| *range == self.1) {
            taken.swap_remove(at);
        }
    }
}

impl DeviceMemory for HostMemory {
    fn device(&self) -> DeviceId {
        DeviceId::HOST
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn address(&self) -> u64 {
        self.map.as_ptr().addr() as u64
    }

    fn with_host(&self, range: Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        self.direct && self.with(range, fill)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct HostStaging {
    map: MmapMut,
    len: usize,
}

impl Staging for HostStaging {
    fn bytes(&self) -> &[u8] {
        &self.map[..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[..self.len]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct HostQueue;

#[derive(Debug)]
struct Over;

impl Completion for Over {
    fn is_done(&mut self) -> Result<bool, Error> {
        Ok(true)
    }

    fn wait(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

impl HostQueue {
    fn run(
        slot: &mut Slot,
        transfers: &[Transfer],
        copy: fn(&mut [u8], &mut [u8]),
    ) -> Result<(), Error> {
        let refused =
            |text: &str| Error::new(DeviceId::HOST, "copy", Cause::Invalid(text.to_owned()));
        for transfer in transfers {
            if !transfer.fits(slot.bytes().len()) {
                return Err(refused("a transfer leaves its slot or its memory"));
            }
            let memory = transfer.memory.as_any().downcast_ref::<HostMemory>();
            let memory = memory.ok_or_else(|| refused("memory of another device"))?;
            for row in 0..transfer.rows {
                // `fits` has checked that all of this stays within bounds.
                let from = transfer.at + row * transfer.slot_pitch;
                let to = transfer.offset + row as u64 * transfer.memory_pitch;
                let part = &mut slot.bytes_mut()[from..from + transfer.len];
                if !memory.with(to..to + transfer.len as u64, &mut |bytes| copy(part, bytes)) {
                    return Err(refused("two copies to the same memory at the same time"));
                }
            }
        }
        Ok(())
    }
}

impl Queue for HostQueue {
    fn upload(&mut self, mut slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        Self::run(&mut slot, &transfers, |slot, memory| {
            memory.copy_from_slice(slot)
        })?;
        Ok(Ticket::new(Box::new(Over), slot, transfers))
    }

    fn download(&mut self, mut slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        Self::run(&mut slot, &transfers, |slot, memory| {
            slot.copy_from_slice(memory)
        })?;
        Ok(Ticket::new(Box::new(Over), slot, transfers))
    }

    fn after(&mut self, _: Stream) -> Result<(), Error> {
        Ok(())
    }

    fn before(&mut self, _: Stream) -> Result<(), Error> {
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
