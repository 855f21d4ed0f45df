//! Metal: Apple's processors, which share their memory with the host.
//!
//! There are two ways in. [`Device::allocate`] makes a shared buffer, which files are read into; nothing is
//! copied twice. [`Device::adopt`] takes in whole pages of a file's map as they are; nothing is copied at all,
//! and the pages stay clean, so the system can drop them and read them again.
//!
//! Invariants:
//! 1. A shared buffer's `contents` is its length of memory that the host may read and write; it does not move
//!    and lives as long as the buffer, which [`MetalMemory`] keeps.
//! 2. No two borrows of these bytes overlap: each takes its range in `taken` first and gives it back after.
//! 3. Metal's devices and buffers are used from any thread: the methods called here change nothing that others
//!    see.
//! 4. Memory of others lives until Metal has let go of it: the block that Metal calls then keeps the owner.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use block2::RcBlock;
use objc2::rc::Retained;
use objc2::runtime::ProtocolObject;
use objc2_metal::{MTLBuffer, MTLCreateSystemDefaultDevice, MTLDevice, MTLResourceOptions};

use crate::direct::{DirectQueue, HostStaging, Ranges};
use crate::{Cause, Device, DeviceId, DeviceMemory, Error, Info, Kind, Memory, Queue, Staging};

// The system's default device is found only where this is linked too.
#[link(name = "CoreGraphics", kind = "framework")]
unsafe extern "C" {}

const ID: DeviceId = DeviceId::new(Kind::Metal, 0);

/// The system's device.
///
/// # Errors
/// [`Cause::Missing`] where there is none.
pub fn devices() -> Result<Vec<Info>, Error> {
    Ok(vec![open()?.info.clone()])
}

/// Opens the system's device.
///
/// # Errors
/// As [`devices`].
pub fn open() -> Result<Arc<MetalDevice>, Error> {
    let missing = || Cause::Missing("this system offers no Metal device".to_owned());
    let raw = MTLCreateSystemDefaultDevice().ok_or_else(|| Error::new(ID, "open", missing()))?;
    let info = Info {
        id: ID,
        name: raw.name().to_string(),
        total_memory: raw.recommendedMaxWorkingSetSize(),
        unified: true,
        align: 256,
        max_region: (raw.maxBufferLength() as u64).max(1),
        pitched: true,
    };
    Ok(Arc::new(MetalDevice { info, raw }))
}

/// A Metal device.
pub struct MetalDevice {
    info: Info,
    raw: Retained<ProtocolObject<dyn MTLDevice>>,
}

impl MetalDevice {
    fn free(&self) -> u64 {
        let used = self.raw.currentAllocatedSize() as u64;
        self.info.total_memory.saturating_sub(used)
    }

    fn full(&self, needed: u64) -> Error {
        let free = Some(self.free());
        Error::new(ID, "allocate", Cause::OutOfMemory { needed, free })
    }
}

impl Device for MetalDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    /// What is left of the size that the system recommends.
    fn free_memory(&self) -> Result<u64, Error> {
        Ok(self.free())
    }

    fn allocate(&self, len: u64) -> Result<Memory, Error> {
        let fits = len <= self.info.max_region && len <= self.info.total_memory;
        let bytes = usize::try_from(len).ok().filter(|_| fits);
        let bytes = bytes.ok_or_else(|| self.full(len))?;
        // A buffer of nothing is refused.
        let made = self
            .raw
            .newBufferWithLength_options(bytes.max(1), MTLResourceOptions::StorageModeShared);
        Ok(Arc::new(MetalMemory {
            buffer: Buffer(made.ok_or_else(|| self.full(len))?),
            len,
            ours: true,
            taken: Ranges::default(),
        }))
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        Ok(Box::new(HostStaging::new(ID, len)?))
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        let queue = DirectQueue::new(ID, |memory, range, fill| {
            let memory = memory.as_any().downcast_ref::<MetalMemory>();
            memory.map(|memory| memory.with(range, fill))
        });
        Ok(Box::new(queue))
    }

    /// Here `address` is the host's: of a page, and `len` is a number of whole pages, of 16 KiB on Apple's
    /// processors. The host does not write to it: copies to it are refused.
    unsafe fn adopt(
        &self,
        address: u64,
        len: u64,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Memory, Error> {
        let refused = || {
            let text = format!("Metal takes in whole pages only, not {len} bytes at {address:#x}");
            Error::new(ID, "take in memory", Cause::Invalid(text))
        };
        let start = std::ptr::with_exposed_provenance_mut::<c_void>(
            usize::try_from(address).map_err(|_| refused())?,
        );
        let start = NonNull::new(start).ok_or_else(refused)?;
        let bytes = usize::try_from(len).map_err(|_| refused())?;
        // Metal calls the block once, from any thread; dropping the block drops the owner.
        let release = RcBlock::new(move |_: NonNull<c_void>, _: usize| {
            let _ = &owner;
        });
        // SAFETY: the caller says that this memory lives while the owner does, which the block keeps
        // (invariant 4); the owner may be sent.
        let made = unsafe {
            self.raw
                .newBufferWithBytesNoCopy_length_options_deallocator(
                    start,
                    bytes,
                    MTLResourceOptions::StorageModeShared,
                    Some(&release),
                )
        };
        Ok(Arc::new(MetalMemory {
            buffer: Buffer(made.ok_or_else(refused)?),
            len,
            ours: false,
            taken: Ranges::default(),
        }))
    }
}

impl fmt::Debug for MetalDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetalDevice")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

struct Buffer(Retained<ProtocolObject<dyn MTLBuffer>>);

// SAFETY: invariant 3.
unsafe impl Send for Buffer {}
// SAFETY: invariant 3.
unsafe impl Sync for Buffer {}

/// Memory of a Metal device: an `MTLBuffer` from its first byte on.
pub struct MetalMemory {
    buffer: Buffer,
    len: u64,
    /// Whether the host may write to it.
    ours: bool,
    taken: Ranges,
}

impl MetalMemory {
    /// The buffer, for those who compute with it.
    pub fn buffer(&self) -> &ProtocolObject<dyn MTLBuffer> {
        &self.buffer.0
    }

    fn with(&self, range: Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        if !self.ours {
            return false;
        }
        let Some(_taken) = self.taken.take(range.clone(), self.len) else {
            return false;
        };
        let contents: NonNull<u8> = self.buffer.0.contents().cast();
        // SAFETY: within the buffer (invariant 1; the range was checked).
        let start = unsafe { contents.add(range.start as usize) };
        let len = (range.end - range.start) as usize;
        // SAFETY: within the buffer, and nobody else has an overlapping range (invariants 1 and 2).
        fill(unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) });
        true
    }
}

impl DeviceMemory for MetalMemory {
    fn device(&self) -> DeviceId {
        ID
    }

    fn len(&self) -> u64 {
        self.len
    }

    /// The `id<MTLBuffer>`, valid for as long as this is.
    fn address(&self) -> u64 {
        Retained::as_ptr(&self.buffer.0)
            .cast::<c_void>()
            .expose_provenance() as u64
    }

    fn with_host(&self, range: Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        self.with(range, fill)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl fmt::Debug for MetalMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetalMemory")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
