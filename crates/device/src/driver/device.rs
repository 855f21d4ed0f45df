//! A driver's devices and their memory.
//!
//! Invariants:
//! 1. A [`DriverStaging`]'s memory is `len` zeroed bytes of the host that the driver gave and that only it
//!    frees; no copy runs on it while anybody has a borrow of its bytes, since a queue takes the whole slot.
#![allow(unsafe_code)]

use std::any::Any;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use super::call::{OUT_OF_MEMORY, Was};
use super::queue::DriverQueue;
use super::table::{Handle, Table};
use crate::{Cause, Device, DeviceId, DeviceMemory, Error, Info, Kind, Memory, Queue, Staging};

/// Where tensors begin: what every kernel's vector loads are content with, and a driver's own granularity.
const ALIGN: u64 = 256;
/// `CU_DEVICE_ATTRIBUTE_INTEGRATED`: the device has no memory of its own.
const INTEGRATED: i32 = 18;

/// A driver that was opened.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    table: &'static Table,
    count: u32,
}

impl Driver {
    /// Opens NVIDIA's or AMD's driver under its usual names.
    ///
    /// # Errors
    /// [`Cause::Missing`] where there is none, with what was looked for; what the driver said.
    pub fn open(kind: Kind) -> Result<Self, Error> {
        Self::with(kind, None)
    }

    /// Opens the library at a path as the driver of a kind.
    ///
    /// # Errors
    /// As [`Driver::open`].
    pub fn open_at(kind: Kind, path: &Path) -> Result<Self, Error> {
        Self::with(kind, Some(path))
    }

    fn with(kind: Kind, path: Option<&Path>) -> Result<Self, Error> {
        let id = DeviceId::new(kind, 0);
        let table = Table::open(kind, path)?;
        // Some drivers refuse to start where there is no device; that is not an error here.
        let count = match table.init(id) {
            Ok(()) => table.count(id)?,
            Err(error) => match error.cause() {
                Cause::Driver {
                    code: 100 | 101, ..
                } => 0,
                _ => return Err(error),
            },
        };
        Ok(Driver { table, count })
    }

    /// How many devices it has.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The driver's version, as it counts.
    ///
    /// # Errors
    /// What the driver said.
    pub fn version(&self) -> Result<i32, Error> {
        self.table.version(DeviceId::new(self.table.kind, 0))
    }

    /// What a device is, without making use of it.
    ///
    /// # Errors
    /// What the driver said.
    pub fn info(&self, index: u32) -> Result<Info, Error> {
        let (table, id) = (self.table, DeviceId::new(self.table.kind, index));
        if index >= self.count {
            let text = format!("the driver has {} devices", self.count);
            return Err(Error::new(id, "find the device", Cause::Missing(text)));
        }
        let device = table.device(id)?;
        let total = table.total(id, device)?;
        Ok(Info {
            id,
            name: table.device_name(id, device)?,
            total_memory: total,
            unified: table.kind == Kind::Cuda && table.attribute(device, INTEGRATED) != 0,
            align: ALIGN,
            max_region: total,
            pitched: true,
        })
    }

    /// A device, ready for use.
    ///
    /// # Errors
    /// What the driver said.
    pub fn device(&self, index: u32) -> Result<DriverDevice, Error> {
        let info = self.info(index)?;
        let device = self.table.device(info.id)?;
        let context = self.table.retain(info.id, device)?;
        Ok(DriverDevice(Arc::new(Shared {
            table: self.table,
            device,
            context,
            info,
        })))
    }
}

/// What a device, its memory and its queues share: the driver's handles.
#[derive(Debug)]
pub(super) struct Shared {
    pub table: &'static Table,
    device: i32,
    context: Handle,
    pub info: Info,
}

impl Shared {
    /// Makes the device current until the result is dropped.
    pub fn enter(&self) -> Result<Entered<'_>, Error> {
        let was = self.table.enter(self.info.id, self.device, self.context)?;
        Ok(Entered(self, was))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.table.release(self.device);
    }
}

pub(super) struct Entered<'a>(&'a Shared, Was);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.table.leave(self.1);
    }
}

/// A device of NVIDIA's or AMD's driver.
#[derive(Clone, Debug)]
pub struct DriverDevice(Arc<Shared>);

impl DriverDevice {
    fn error(&self, doing: &'static str, code: i32, needed: u64) -> Error {
        let (shared, id) = (&self.0, self.0.info.id);
        if code == OUT_OF_MEMORY {
            let free = self.free_memory().ok();
            return Error::new(id, doing, Cause::OutOfMemory { needed, free });
        }
        shared.table.error(id, doing, code)
    }
}

impl Device for DriverDevice {
    fn info(&self) -> &Info {
        &self.0.info
    }

    fn free_memory(&self) -> Result<u64, Error> {
        let _entered = self.0.enter()?;
        Ok(self.0.table.memory_info(self.0.info.id)?.0)
    }

    fn allocate(&self, len: u64) -> Result<Memory, Error> {
        const DOING: &str = "allocate";
        let shared = &self.0;
        let mut memory = DriverMemory {
            shared: Arc::clone(shared),
            address: 0,
            len,
            owner: None,
        };
        if len == 0 {
            return Ok(Arc::new(memory));
        }
        // More than there is could be taken for an invalid argument.
        let size = usize::try_from(len)
            .ok()
            .filter(|_| len <= shared.info.total_memory);
        let size = size.ok_or_else(|| self.error(DOING, OUT_OF_MEMORY, len))?;
        let entered = shared.enter()?;
        let allocated = shared.table.allocate(size);
        drop(entered);
        memory.address = allocated.map_err(|code| self.error(DOING, code, len))?;
        Ok(Arc::new(memory))
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        const DOING: &str = "make a staging buffer";
        let shared = &self.0;
        let entered = shared.enter()?;
        // The driver locks whole pages, and an empty range has no address.
        let start = shared.table.host_allocate(len.max(1));
        drop(entered);
        let start = start.map_err(|code| match code {
            // The host's memory: the device's free bytes would mislead.
            OUT_OF_MEMORY => {
                let cause = Cause::OutOfMemory {
                    needed: len as u64,
                    free: None,
                };
                Error::new(shared.info.id, DOING, cause)
            }
            code => shared.table.error(shared.info.id, DOING, code),
        })?;
        Ok(Box::new(DriverStaging {
            shared: Arc::clone(shared),
            start,
            len,
        }))
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        Ok(Box::new(DriverQueue::open(&self.0)?))
    }

    unsafe fn adopt(
        &self,
        address: u64,
        len: u64,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Memory, Error> {
        let shared = Arc::clone(&self.0);
        if address.checked_add(len).is_none() || (address == 0 && len > 0) {
            let text = format!("{len} bytes at {address:#x} are no memory");
            return Err(Error::new(
                shared.info.id,
                "use memory of others",
                Cause::Invalid(text),
            ));
        }
        Ok(Arc::new(DriverMemory {
            shared,
            address,
            len,
            owner: Some(Owner(Mutex::new(owner))),
        }))
    }
}

/// Whoever owns memory that was adopted; only ever dropped.
struct Owner(#[allow(dead_code, reason = "held for its drop")] Mutex<Box<dyn Any + Send + Sync>>);

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Owner")
    }
}

/// Memory of a device: ours, or somebody's who owns it.
#[derive(Debug)]
pub(super) struct DriverMemory {
    shared: Arc<Shared>,
    pub address: u64,
    len: u64,
    owner: Option<Owner>,
}

impl DeviceMemory for DriverMemory {
    fn device(&self) -> DeviceId {
        self.shared.info.id
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn address(&self) -> u64 {
        self.address
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for DriverMemory {
    fn drop(&mut self) {
        if self.owner.is_none()
            && self.address != 0
            && let Ok(_entered) = self.shared.enter()
        {
            self.shared.table.free(self.address);
        }
    }
}

/// Page-locked memory of the host.
#[derive(Debug)]
pub(super) struct DriverStaging {
    shared: Arc<Shared>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory with one owner (invariant 1).
unsafe impl Send for DriverStaging {}

impl DriverStaging {
    /// Its address.
    pub fn address(&self) -> usize {
        self.start.as_ptr().expose_provenance()
    }
}

impl Staging for DriverStaging {
    fn bytes(&self) -> &[u8] {
        // SAFETY: invariant 1.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: invariant 1; `&mut self` is the only way to the bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for DriverStaging {
    fn drop(&mut self) {
        if let Ok(_entered) = self.shared.enter() {
            self.shared.table.host_free(self.start);
        }
    }
}
