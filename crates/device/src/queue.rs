//! Copies in order: what goes in, and the ticket for what is under way.

use std::fmt::Debug;

use crate::{Error, Memory, Slot};

/// Bytes of a slot that belong at a place of a device's memory, or the other way round.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The device's side.
    pub memory: Memory,
    /// First byte there.
    pub offset: u64,
    /// First byte in the slot.
    pub at: usize,
    /// Bytes of a row; of everything, if there is one row.
    pub len: usize,
    /// How many rows, at least 1.
    pub rows: usize,
    /// From one row to the next in the device's memory.
    pub memory_pitch: u64,
    /// From one row to the next in the slot.
    pub slot_pitch: usize,
}

impl Transfer {
    /// A copy of consecutive bytes.
    pub fn plain(memory: Memory, offset: u64, at: usize, len: usize) -> Self {
        Transfer {
            memory,
            offset,
            at,
            len,
            rows: 1,
            memory_pitch: 0,
            slot_pitch: 0,
        }
    }

    /// Whether all of it lies within its memory and a slot of this length. Every queue checks it.
    pub fn fits(&self, slot: usize) -> bool {
        let end = |start: u64, pitch: u64| {
            let rows = (self.rows as u64).checked_sub(1)?;
            pitch
                .checked_mul(rows)?
                .checked_add(self.len as u64)?
                .checked_add(start)
        };
        let apart =
            self.rows == 1 || (self.memory_pitch >= self.len as u64 && self.slot_pitch >= self.len);
        apart
            && end(self.offset, self.memory_pitch).is_some_and(|end| end <= self.memory.len())
            && end(self.at as u64, self.slot_pitch as u64).is_some_and(|end| end <= slot as u64)
    }
}

/// A stream of a framework, by the driver's handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(u64);

impl Stream {
    /// The driver's default stream.
    pub const DEFAULT: Stream = Stream(0);

    /// The stream of this handle.
    ///
    /// # Safety
    /// It is a live stream of the device that it is used with, for as long as this is.
    #[allow(
        unsafe_code,
        reason = "the signature only: whoever calls it knows the handle"
    )]
    pub unsafe fn from_raw(handle: u64) -> Self {
        Stream(handle)
    }

    /// The driver's handle.
    pub fn raw(self) -> u64 {
        self.0
    }
}

/// Copies of one device in the order in which they were given, at the same time as the host's work.
///
/// An error leaves nothing under way: before it returns, the queue has waited for what it had started,
/// and the slot is back in its pool.
pub trait Queue: Debug + Send {
    /// Copies from the slot to the device.
    ///
    /// # Errors
    /// A transfer that does not fit; what the driver said.
    fn upload(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error>;

    /// Copies from the device into the slot.
    ///
    /// # Errors
    /// As [`Queue::upload`].
    fn download(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error>;

    /// What is given to this queue from now on runs after what that stream has been given so far.
    ///
    /// # Errors
    /// What the driver said.
    fn after(&mut self, stream: Stream) -> Result<(), Error>;

    /// What that stream is given from now on runs after what this queue has been given so far. The host
    /// does not wait.
    ///
    /// # Errors
    /// What the driver said.
    fn before(&mut self, stream: Stream) -> Result<(), Error>;

    /// Waits until everything is done.
    ///
    /// # Errors
    /// What the driver said of any copy so far.
    fn drain(&mut self) -> Result<(), Error>;
}

/// When a copy is over.
pub trait Completion: Debug + Send {
    /// Whether it is.
    ///
    /// # Errors
    /// What the driver said of the copy.
    fn is_done(&mut self) -> Result<bool, Error>;

    /// Waits for it, without keeping a core busy.
    ///
    /// # Errors
    /// What the driver said of the copy.
    fn wait(&mut self) -> Result<(), Error>;
}

/// A copy under way. Holds the slot and the memory until it is over; dropping it waits.
#[derive(Debug)]
pub struct Ticket {
    completion: Box<dyn Completion>,
    slot: Option<Slot>,
    /// What it holds while it runs.
    transfers: Vec<Transfer>,
}

impl Ticket {
    /// The ticket for a copy that `completion` tells the end of.
    pub fn new(completion: Box<dyn Completion>, slot: Slot, transfers: Vec<Transfer>) -> Self {
        Ticket {
            completion,
            slot: Some(slot),
            transfers,
        }
    }

    /// Whether the copy is over.
    ///
    /// # Errors
    /// What the driver said of the copy.
    pub fn is_done(&mut self) -> Result<bool, Error> {
        self.completion.is_done()
    }

    /// Waits for the copy and gives the slot back.
    ///
    /// # Errors
    /// What the driver said of the copy. Nobody knows then whether it still runs, so slot and memory are given
    /// up: they are never used or freed again.
    pub fn wait(mut self) -> Result<Slot, Error> {
        self.finish()
    }

    fn finish(&mut self) -> Result<Slot, Error> {
        let over = self.completion.wait();
        match (over, self.slot.take()) {
            (Ok(()), Some(slot)) => Ok(slot),
            (Err(error), slot) => {
                slot.into_iter().for_each(Slot::abandon);
                std::mem::forget(std::mem::take(&mut self.transfers));
                Err(error)
            }
            (Ok(()), None) => unreachable!("only `wait` takes the slot, and it takes the ticket"),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.slot.is_some() {
            // The error is told where someone waits; a slot that is given back goes to its pool.
            let _ = self.finish();
        }
    }
}
