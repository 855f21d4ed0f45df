//! The way back: bytes of a device's memory, made block by block for whoever writes them.
//!
//! A save never has a whole tensor in host memory: each thread that writes asks for a block, which comes
//! through one or two slots of the ring. Two at a time, so that one is copied out while the other is
//! being filled.

use std::sync::{Arc, Mutex, PoisonError};

use tonnage_device::{Cause, Device, Memory, Pool, Queue, Stream, Ticket, Transfer};

use crate::control::{Cancel, Error};
use crate::put::Fill;

/// Brings bytes back from one device. Threads share its queues and slots.
#[derive(Debug)]
pub struct Downloads {
    device: Arc<dyn Device>,
    pool: Arc<Pool>,
    after: Vec<Stream>,
    cancel: Cancel,
    idle: Mutex<Vec<Box<dyn Queue>>>,
}

/// Some bytes of a device's memory, as they are wanted by [`put`](crate::put()).
#[derive(Clone, Copy, Debug)]
pub struct FromDevice<'a> {
    downloads: &'a Downloads,
    memory: &'a Memory,
    offset: u64,
}

impl Downloads {
    /// Bytes of a slot.
    const SLOT: usize = 2 << 20;

    /// From this device, through slots of this pool. What is read was written by the streams `after`, or
    /// is there already.
    pub fn new(
        device: Arc<dyn Device>,
        pool: Arc<Pool>,
        after: Vec<Stream>,
        cancel: Cancel,
    ) -> Self {
        Downloads {
            device,
            pool,
            after,
            cancel,
            idle: Mutex::default(),
        }
    }

    /// The bytes of `memory` from `offset` on.
    pub fn from<'a>(&'a self, memory: &'a Memory, offset: u64) -> FromDevice<'a> {
        FromDevice {
            downloads: self,
            memory,
            offset,
        }
    }

    /// A queue that nobody else uses now.
    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        if let Some(queue) = idle {
            return Ok(queue);
        }
        let mut queue = self.device.queue().map_err(Error::Device)?;
        for &stream in &self.after {
            queue.after(stream).map_err(Error::Device)?;
        }
        Ok(queue)
    }

    /// Copies bytes of the device to `dst`.
    ///
    /// # Errors
    /// A range outside of the memory; what the driver said; `Cancelled`.
    pub fn read(&self, memory: &Memory, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        let end = offset.checked_add(dst.len() as u64);
        let Some(end) = end.filter(|&end| end <= memory.len()) else {
            let cause = Cause::Invalid("a range outside of its memory".to_owned());
            let id = memory.device();
            return Err(Error::Device(tonnage_device::Error::new(
                id,
                "read from",
                cause,
            )));
        };
        if memory.with_host(offset..end, &mut |bytes| dst.copy_from_slice(bytes)) {
            return Ok(());
        }
        let mut queue = self.queue()?;
        self.copy(queue.as_mut(), memory, offset, dst)?;
        // After a failure the queue is dropped: who knows what state it is in.
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(queue);
        Ok(())
    }

    fn copy(
        &self,
        queue: &mut dyn Queue,
        memory: &Memory,
        mut offset: u64,
        dst: &mut [u8],
    ) -> Result<(), Error> {
        let count = dst.len().div_ceil(Self::SLOT).min(2);
        let cancelled = || self.cancel.is_cancelled();
        let lent = self
            .pool
            .lend(&*self.device, Self::SLOT, count, 1, &cancelled);
        let mut free = lent.map_err(|error| match error.cause() {
            Cause::Cancelled => Error::Cancelled,
            _ => Error::Device(error),
        })?;
        let mut under_way: Option<(Ticket, &mut [u8])> = None;
        for part in dst.chunks_mut(Self::SLOT) {
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if free.is_empty()
                && let Some((ticket, part)) = under_way.take()
            {
                free.push(take(ticket, part)?);
            }
            let Some(slot) = free.pop() else { continue };
            let from = Transfer::plain(Arc::clone(memory), offset, 0, part.len());
            let ticket = queue.download(slot, vec![from]).map_err(Error::Device)?;
            offset += part.len() as u64;
            if let Some((before, part)) = under_way.replace((ticket, part)) {
                free.push(take(before, part)?);
            }
        }
        if let Some((ticket, part)) = under_way {
            take(ticket, part)?;
        }
        Ok(())
    }
}

/// Waits for a copy and takes its bytes.
fn take(ticket: Ticket, part: &mut [u8]) -> Result<tonnage_device::Slot, Error> {
    let slot = ticket.wait().map_err(Error::Device)?;
    part.copy_from_slice(slot.bytes().get(..part.len()).unwrap_or_default());
    Ok(slot)
}

impl Fill for FromDevice<'_> {
    fn fill(&self, at: u64, dst: &mut [u8]) -> Result<(), Error> {
        self.downloads
            .read(self.memory, self.offset.saturating_add(at), dst)
    }
}
