//! Memory on a device, and the way there: staging buffers and copies in order.
//!
//! A [`Device`] allocates [`Memory`], makes host memory that it copies from at full speed ([`Staging`]),
//! and opens [`Queue`]s. A queue takes a staging [`Slot`] and a list of [`Transfer`]s and gives a
//! [`Ticket`]. What this crate promises:
//!
//! * **A slot is nobody's while a copy runs.** [`Queue::upload`] takes the slot; only [`Ticket::wait`]
//!   gives it back, and a ticket that is dropped waits first. So a buffer can't be reused too early.
//! * **Memory outlives its copies**: a ticket holds what it copies to.
//! * **Nothing is linked.** Drivers are opened at run time; a machine without one gets an error that says
//!   what was looked for.
//! * **Staging is bounded**: all of a process's slots come from one [`Pool`].
//!
//! It leaves out where bytes come from and what they mean: no files, no headers, no tensors.

mod direct;
pub mod dlpack;
pub mod driver;
mod error;
pub mod find;
pub mod gds;
pub mod host;
mod id;
#[cfg(target_vendor = "apple")]
pub mod metal;
mod pool;
mod queue;
mod sync;
pub mod vulkan;

use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

pub use error::{Cause, Error};
pub use host::HostDevice;
pub use id::{DeviceId, Kind};
pub use pool::{Pool, Slot};
pub use queue::{Completion, Queue, Stream, Ticket, Transfer};

/// What a device is and can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its kind and number.
    pub id: DeviceId,
    /// What its maker calls it.
    pub name: String,
    /// Bytes of its memory.
    pub total_memory: u64,
    /// Whether the host and the device share their memory.
    pub unified: bool,
    /// Tensors begin on multiples of this within an allocation: a power of two.
    pub align: u64,
    /// Bytes of one allocation at most.
    pub max_region: u64,
    /// Whether [`Transfer::rows`] may exceed 1.
    pub pitched: bool,
}

/// One device. Shared by all who use it.
pub trait Device: Debug + Send + Sync {
    /// What it is and can do.
    fn info(&self) -> &Info;

    /// Bytes of its memory that are free now.
    ///
    /// # Errors
    /// What the driver said.
    fn free_memory(&self) -> Result<u64, Error>;

    /// Memory of this length, with undefined content, freed when the last reference goes. A length of zero
    /// is allowed.
    ///
    /// # Errors
    /// [`Cause::OutOfMemory`] with what was needed and free; what the driver said.
    fn allocate(&self, len: u64) -> Result<Memory, Error>;

    /// Host memory that copies to this device are fastest from. It starts on a page, so that direct I/O can
    /// read into it.
    ///
    /// # Errors
    /// [`Cause::OutOfMemory`]; what the driver said.
    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error>;

    /// Whether its queues copy from and to this staging memory, which a device of the same name made: maybe
    /// another instance, opened before or with another driver.
    fn copies_from(&self, staging: &dyn Staging) -> bool {
        let _ = staging;
        true
    }

    /// A queue of its own, which waits for nobody else's work.
    ///
    /// # Errors
    /// What the driver said.
    fn queue(&self) -> Result<Box<dyn Queue>, Error>;

    /// Takes in memory that somebody else allocated on this device, e.g. a framework; `owner` is dropped with
    /// the last reference.
    ///
    /// # Safety
    /// `address .. address + len` is memory of this device for as long as `owner` lives, and nobody uses it
    /// while copies to it run, but in the order that [`Queue::after`] and [`Queue::before`] establish.
    ///
    /// # Errors
    /// [`Cause::Unsupported`] for devices whose memory has no addresses.
    #[allow(
        unsafe_code,
        reason = "the signature only; whoever implements it has the invariants"
    )]
    unsafe fn adopt(
        &self,
        address: u64,
        len: u64,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Memory, Error> {
        let _ = (address, len, owner);
        Err(Error::unsupported(self.info().id, "memory of others"))
    }
}

/// Memory on a device, with shared ownership.
pub type Memory = Arc<dyn DeviceMemory>;

/// Memory on a device.
pub trait DeviceMemory: Debug + Send + Sync {
    /// Where it is.
    fn device(&self) -> DeviceId;

    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether it holds nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its address on the device; what the kind of device calls its handle where it has no addresses.
    fn address(&self) -> u64;

    /// Calls `fill` with these bytes, if the host can reach them without a copy. False, and no call, if it
    /// can't, if the range lies outside, or if another call has a range that overlaps.
    fn with_host(&self, range: Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        let _ = (range, fill);
        false
    }

    /// For queues, which find their own kind of memory.
    fn as_any(&self) -> &dyn Any;
}

/// Host memory that a device copies from and to.
pub trait Staging: Debug + Send {
    /// The bytes.
    fn bytes(&self) -> &[u8];

    /// The bytes, to be filled.
    fn bytes_mut(&mut self) -> &mut [u8];

    /// For queues, which find their own kind of staging memory.
    fn as_any(&self) -> &dyn Any;
}
