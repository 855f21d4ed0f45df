//! Host memory that the device copies from and to.
//!
//! Invariants:
//! 1. `start .. start + len` is memory that [`VulkanStaging`] keeps: a map of its own which the driver took in,
//!    or the driver's map of the buffer. It never moves.
//! 2. The device uses it only while a ticket has the slot, and then nobody else has a borrow of it.
//! 3. The buffer goes before the map that it is over: fields drop in their order.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use ash::vk;
use memmap2::{MmapMut, MmapOptions};

use super::buffer::{Buffer, Mapped};
use super::context::Context;
use crate::{Cause, Error, Staging};

const DOING: &str = "make a staging buffer";

/// Where slots have to start, for direct I/O.
const PAGE: usize = 4096;

/// A staging buffer.
pub(super) struct VulkanStaging {
    buffer: Buffer,
    start: Mapped,
    len: usize,
    /// Where in the buffer the first byte is.
    skew: u64,
    _map: Option<MmapMut>,
}

impl VulkanStaging {
    /// Our own pages where the driver takes them in: the kernel reads into them past its cache, which it
    /// refuses for pages that many drivers map. Else the driver's.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Self, Error> {
        match Self::import(context, len) {
            Some(staging) => Ok(staging),
            None => Self::mapped(context, len),
        }
    }

    fn import(context: &Arc<Context>, len: usize) -> Option<Self> {
        let align = usize::try_from(context.facts.import_align?).ok()?.max(PAGE);
        let bytes = len.max(1).checked_next_multiple_of(align)?;
        // Maps start on pages: more than that has to be looked for inside.
        let spare = if align > PAGE { align } else { 0 };
        let all = bytes.checked_add(spare)?;
        isize::try_from(all).ok()?;
        let mut map = MmapOptions::new().len(all).map_anon().ok()?;
        let skip = map.as_ptr().align_offset(align);
        let start = NonNull::from(map.get_mut(skip..skip.checked_add(bytes)?)?).cast();
        let buffer = Buffer::import(context, DOING, start, bytes as u64).ok()?;
        Some(VulkanStaging {
            buffer,
            start: Mapped(start),
            len,
            skew: 0,
            _map: Some(map),
        })
    }

    /// Pages that the driver maps.
    pub fn mapped(context: &Arc<Context>, len: usize) -> Result<Self, Error> {
        let refused = || {
            let cause = Cause::OutOfMemory {
                needed: len as u64,
                free: None,
            };
            Error::new(context.id, DOING, cause)
        };
        // Drivers promise 64 bytes only.
        let all = len.checked_add(PAGE).ok_or_else(refused)?;
        isize::try_from(all).map_err(|_| refused())?;
        let choose = |bits| context.facts.staging_type(bits);
        let buffer = Buffer::new(context, DOING, all as u64, choose)?;
        let start = buffer.map(DOING)?.0;
        let skew = start.as_ptr().align_offset(PAGE);
        if skew >= PAGE {
            return Err(Error::unsupported(context.id, "mapped memory"));
        }
        Ok(VulkanStaging {
            buffer,
            // SAFETY: less than a page, by which the map is longer than `len`.
            start: Mapped(unsafe { start.add(skew) }),
            len,
            skew: skew as u64,
            _map: None,
        })
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.buffer.context
    }

    /// The buffer, and where in it the first byte is.
    pub fn buffer(&self) -> (vk::Buffer, u64) {
        (self.buffer.raw, self.skew)
    }
}

impl Staging for VulkanStaging {
    fn bytes(&self) -> &[u8] {
        // SAFETY: invariants 1 and 2.
        unsafe { std::slice::from_raw_parts(self.start.0.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: invariants 1 and 2.
        unsafe { std::slice::from_raw_parts_mut(self.start.0.as_ptr(), self.len) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl fmt::Debug for VulkanStaging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanStaging")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
