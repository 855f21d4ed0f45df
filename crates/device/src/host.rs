//! The host as a device: its memory is memory, and a copy is over when it returns.
//!
//! Invariants:
//! 1. `HostMemory` owns one anonymous map, which never moves and lives as long as it does.
//! 2. No two borrows of its bytes overlap: each takes its range in `taken` first and gives it back after.
#![allow(unsafe_code)]

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use memmap2::MmapRaw;

use crate::direct::{DirectQueue, HostStaging, Ranges, map};
use crate::{Device, DeviceId, DeviceMemory, Error, Info, Memory, Queue, Staging};

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

impl Device for HostDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn free_memory(&self) -> Result<u64, Error> {
        Ok(u64::MAX)
    }

    fn allocate(&self, len: u64) -> Result<Memory, Error> {
        let map = MmapRaw::from(map(DeviceId::HOST, len, "allocate")?);
        Ok(Arc::new(HostMemory {
            map,
            len,
            direct: self.direct,
            taken: Ranges::default(),
        }))
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        Ok(Box::new(HostStaging::new(DeviceId::HOST, len)?))
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        let queue = DirectQueue::new(DeviceId::HOST, |memory, range, fill| {
            let memory = memory.as_any().downcast_ref::<HostMemory>();
            memory.map(|memory| memory.with(range, fill))
        });
        Ok(Box::new(queue))
    }
}

#[derive(Debug)]
struct HostMemory {
    map: MmapRaw,
    len: u64,
    direct: bool,
    /// Ranges that someone has a borrow of.
    taken: Ranges,
}

impl HostMemory {
    fn with(&self, range: Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        let Some(_taken) = self.taken.take(range.clone(), self.len) else {
            return false;
        };
        // SAFETY: within the map (invariant 1; the range was checked).
        let start = unsafe { self.map.as_mut_ptr().add(range.start as usize) };
        // SAFETY: within the map, and nobody else has an overlapping range (invariants 1 and 2).
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(start, (range.end - range.start) as usize) };
        fill(bytes);
        true
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
