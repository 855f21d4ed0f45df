//! A driver's devices and their memory.
//!
//! Invariants:
//! 1. A [`DriverStaging`]'s memory is `len` bytes of the host, with some content, that the driver gave and
//!    that only it frees; no copy runs on it while anybody has a borrow of its bytes, since a queue takes the
//!    whole slot.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::OnceLock;

use super::call::{INVALID_DEVICE, NO_DEVICE, OUT_OF_MEMORY, Was};
use super::queue::DriverQueue;
use super::remedy;
use super::table::{Handle, Table};
use crate::{Cause, Device, DeviceId, DeviceMemory, Error, Info, Kind, Memory, Queue, Staging};

/// Where tensors begin: what every kernel's vector loads are content with, and a driver's own granularity.
const ALIGN: u64 = 256;
/// What direct I/O wants of addresses.
const PAGE: usize = 4096;
/// `CU_DEVICE_ATTRIBUTE_INTEGRATED`, and HIP's since 4.0: the device has no memory of its own. Nothing else
/// says that: a card may well see pageable memory, or use the host's page tables.
const CUDA_INTEGRATED: i32 = 18;
const HIP_INTEGRATED: i32 = 16;
/// `CU_DEVICE_ATTRIBUTE_MAX_PITCH`: how far apart the rows of one copy may be.
const CUDA_MAX_PITCH: i32 = 11;

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
        let count = match table.init(id).and_then(|()| table.count(id)) {
            Ok(count) => count,
            Err(error) => match code(&error) {
                Some(NO_DEVICE | INVALID_DEVICE) => 0,
                code => return Err(with_remedy(kind, code, error)),
            },
        };
        Ok(Driver { table, count })
    }

    /// Every device that it lets this process see.
    ///
    /// # Errors
    /// [`Cause::Missing`] with what there is to do, where there is none; what the driver said.
    pub fn devices(&self) -> Result<Vec<Info>, Error> {
        match self.count {
            0 => Err(self.none()),
            count => (0..count).map(|index| self.info(index)).collect(),
        }
    }

    fn none(&self) -> Error {
        let kind = self.table.kind;
        let todo = remedy::no_device(kind);
        let text = format!("the driver finds no device: {todo}");
        Error::new(DeviceId::new(kind, 0), "open", Cause::Missing(text))
    }

    /// How many devices it has.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// What it is, and its version: `CUDA 13.0`, `HIP 6.3`.
    ///
    /// # Errors
    /// What the driver said.
    pub fn version(&self) -> Result<String, Error> {
        let version = self.table.version(DeviceId::new(self.table.kind, 0))?;
        Ok(match self.table.kind {
            Kind::Cuda => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
            // HIP's numbers grew with 4.0.
            _ => format!("HIP {}.{}", version / 10_000_000, version / 100_000 % 100),
        })
    }

    /// What a device is, without making use of it.
    ///
    /// # Errors
    /// What the driver said.
    pub fn info(&self, index: u32) -> Result<Info, Error> {
        let (table, id) = (self.table, DeviceId::new(self.table.kind, index));
        if self.count == 0 {
            return Err(self.none());
        }
        if index >= self.count {
            let text = match self.count {
                1 => "there is one device, and its number is 0".to_owned(),
                count => format!("there are {count} devices, numbered from 0"),
            };
            return Err(Error::new(id, "open", Cause::Missing(text)));
        }
        let device = table.device(id)?;
        let total = table.total(id, device)?;
        let integrated = match table.kind {
            Kind::Cuda => CUDA_INTEGRATED,
            _ => HIP_INTEGRATED,
        };
        Ok(Info {
            id,
            name: table.device_name(id, device)?,
            total_memory: total,
            unified: table.attribute(device, integrated) == 1,
            align: ALIGN,
            max_region: total.max(1),
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
        let max_pitch = match self.table.kind {
            Kind::Cuda => self.table.attribute(device, CUDA_MAX_PITCH),
            _ => 0,
        };
        Ok(DriverDevice(Arc::new(Shared {
            table: self.table,
            device,
            context,
            // What drivers say that say something.
            max_pitch: usize::try_from(max_pitch).map_or(0, |pitch| match pitch {
                0 => i32::MAX as usize,
                pitch => pitch,
            }),
            info,
        })))
    }
}

/// The driver's number for an error.
fn code(error: &Error) -> Option<i32> {
    match error.cause() {
        Cause::Driver { code, .. } => i32::try_from(*code).ok(),
        _ => None,
    }
}

/// An error of the driver's start, with what there is to do about it, where that is known.
fn with_remedy(kind: Kind, code: Option<i32>, error: Error) -> Error {
    match code.and_then(|code| remedy::start(kind, code)) {
        Some(todo) => {
            let text = format!("{}: {todo}", error.cause());
            Error::new(error.device(), "open the driver", Cause::Missing(text))
        }
        None => error,
    }
}

/// What a device, its memory and its queues share: the driver's handles.
#[derive(Debug)]
pub(super) struct Shared {
    pub table: &'static Table,
    device: i32,
    context: Handle,
    pub max_pitch: usize,
    pub info: Info,
}

impl Shared {
    /// Makes the device current until the result is dropped.
    pub fn enter(&self) -> Result<Entered<'_>, Error> {
        let was = self.table.enter(self.info.id, self.device, self.context)?;
        Ok(Entered(self, was, PhantomData))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.table.release(self.device);
    }
}

/// The device is current on this thread, and on no other, for as long as this lives.
pub(super) struct Entered<'a>(&'a Shared, Was, PhantomData<*const ()>);

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
            taken: OnceLock::new(),
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
        let whole = len.max(1).checked_next_multiple_of(PAGE);
        let whole = whole.filter(|whole| isize::try_from(*whole).is_ok());
        let start = whole.map_or(Err(OUT_OF_MEMORY), |len| shared.table.host_allocate(len));
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
        let staging = DriverStaging {
            shared: Arc::clone(shared),
            start,
            len,
        };
        if !staging.address().is_multiple_of(PAGE) {
            let cause = Cause::Unsupported("a driver whose host memory begins within a page");
            return Err(Error::new(shared.info.id, DOING, cause));
        }
        Ok(Box::new(staging))
    }

    fn copies_from(&self, staging: &dyn Staging) -> bool {
        let staging = staging.as_any().downcast_ref::<DriverStaging>();
        staging.is_some_and(|staging| staging.is_of(&self.0))
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
        const DOING: &str = "use memory of others";
        let shared = Arc::clone(&self.0);
        let refused = |text: String| Error::new(shared.info.id, DOING, Cause::Invalid(text));
        if address.checked_add(len).is_none() || (address == 0 && len > 0) {
            return Err(refused(format!(
                "{len} bytes at {address:#x} are no memory"
            )));
        }
        if len > 0 {
            let _entered = shared.enter()?;
            let other = shared.table.ordinal(address);
            if let Some(other) = other.filter(|other| *other != shared.info.id.index) {
                return Err(refused(format!("it is of device {other}")));
            }
        }
        Ok(Arc::new(DriverMemory {
            shared,
            address,
            len,
            owner: Some(Owner(owner)),
            taken: OnceLock::new(),
        }))
    }
}

/// Whoever owns memory that was adopted; only ever dropped.
struct Owner(#[allow(dead_code, reason = "held for its drop")] Box<dyn Any + Send + Sync>);

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
    /// Whether cuFile has it, once that was asked; what gives it back to us.
    taken: OnceLock<Option<crate::gds::Taken>>,
}

/// Memory of NVIDIA's driver, for reads of files into it.
#[derive(Debug)]
pub(crate) struct CudaMemory<'a>(&'a DriverMemory);

impl<'a> CudaMemory<'a> {
    /// The memory as such, if it is.
    pub fn of(memory: &'a dyn DeviceMemory) -> Option<Self> {
        let memory = memory.as_any().downcast_ref::<DriverMemory>()?;
        let is = memory.device().kind == Kind::Cuda;
        is.then_some(CudaMemory(memory))
    }

    /// Makes its device current until the result is dropped.
    pub fn enter(&self) -> Result<impl Sized + 'a, Error> {
        self.0.shared.enter()
    }

    /// Has cuFile take it, the first time.
    pub fn register(&self, take: impl FnOnce() -> Option<crate::gds::Taken>) {
        self.0.taken.get_or_init(take);
    }
}

impl DriverMemory {
    /// Whether it is of this device, as this driver has it.
    pub fn is_of(&self, shared: &Shared) -> bool {
        std::ptr::eq(self.shared.table, shared.table) && self.shared.device == shared.device
    }
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
        if let Some(Some(taken)) = self.taken.take() {
            let _entered = self.shared.enter();
            drop(taken);
        }
        // A driver waits for whatever still uses the memory, frameworks' work included.
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
    /// Whether this device's driver made it; all of its devices may copy from it.
    pub fn is_of(&self, shared: &Shared) -> bool {
        std::ptr::eq(self.shared.table, shared.table)
    }

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
