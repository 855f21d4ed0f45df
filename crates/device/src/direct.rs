//! Devices whose memory the host writes itself: who is at which bytes, a queue whose copies are over when
//! they return, and staging buffers of plain memory.

use std::any::Any;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapOptions};

use crate::{
    Cause, Completion, DeviceId, DeviceMemory, Error, Queue, Slot, Staging, Stream, Ticket,
    Transfer,
};

/// Ranges of one memory that are in use, no two of which overlap.
#[derive(Debug, Default)]
pub(crate) struct Ranges(Mutex<Vec<Range<u64>>>);

impl Ranges {
    fn lock(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a range of memory of this length, until what it returns is dropped. None if the range lies
    /// outside, or if someone has a range that overlaps.
    pub fn take(&self, range: Range<u64>, len: u64) -> Option<Taken<'_>> {
        if range.start > range.end || range.end > len {
            return None;
        }
        let mut taken = self.lock();
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        if taken.iter().any(overlaps) {
            return None;
        }
        taken.push(range.clone());
        Some(Taken(self, range))
    }
}

/// A range that is in use.
#[derive(Debug)]
pub(crate) struct Taken<'a>(&'a Ranges, Range<u64>);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut taken = self.0.lock();
        if let Some(at) = taken.iter().position(|range| *range == self.1) {
            taken.swap_remove(at);
        }
    }
}

/// Gives the bytes of a range to a function, if nobody else is at them. None for memory of other devices.
pub(crate) type Reach =
    fn(&dyn DeviceMemory, Range<u64>, &mut dyn FnMut(&mut [u8])) -> Option<bool>;

/// A queue that copies while it is called.
#[derive(Debug)]
pub(crate) struct DirectQueue {
    device: DeviceId,
    reach: Reach,
}

impl DirectQueue {
    pub fn new(device: DeviceId, reach: Reach) -> Self {
        DirectQueue { device, reach }
    }

    fn run(
        &self,
        slot: &mut Slot,
        transfers: &[Transfer],
        copy: fn(&mut [u8], &mut [u8]),
    ) -> Result<(), Error> {
        let refused = |text: &str| Error::new(self.device, "copy", Cause::Invalid(text.to_owned()));
        for transfer in transfers {
            if !transfer.fits(slot.bytes().len()) {
                return Err(refused("a transfer leaves its slot or its memory"));
            }
            for row in 0..transfer.rows {
                // `fits` has checked that all of this stays within bounds.
                let from = transfer.at + row * transfer.slot_pitch;
                let to = transfer.offset + row as u64 * transfer.memory_pitch;
                let part = &mut slot.bytes_mut()[from..from + transfer.len];
                let range = to..to + transfer.len as u64;
                let reached =
                    (self.reach)(&*transfer.memory, range, &mut |bytes| copy(part, bytes));
                match reached {
                    Some(true) => {}
                    Some(false) => {
                        return Err(refused("two copies to the same memory at the same time"));
                    }
                    None => return Err(refused("memory of another device")),
                }
            }
        }
        Ok(())
    }
}

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

impl Queue for DirectQueue {
    fn upload(&mut self, mut slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.run(&mut slot, &transfers, |slot, memory| {
            memory.copy_from_slice(slot)
        })?;
        Ok(Ticket::new(Box::new(Over), slot, transfers))
    }

    fn download(&mut self, mut slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.run(&mut slot, &transfers, |slot, memory| {
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

/// Anonymous memory of the host, zeroed.
pub(crate) fn map(id: DeviceId, len: u64, doing: &'static str) -> Result<MmapMut, Error> {
    let refused = || {
        Error::new(
            id,
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

/// Anonymous memory of the host as a staging buffer.
#[derive(Debug)]
pub(crate) struct HostStaging {
    map: MmapMut,
    len: usize,
}

impl HostStaging {
    pub(crate) fn new(id: DeviceId, len: usize) -> Result<Self, Error> {
        let map = map(id, len as u64, "make a staging buffer")?;
        Ok(HostStaging { map, len })
    }
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
