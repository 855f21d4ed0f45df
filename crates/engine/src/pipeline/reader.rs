//! One thread of a pipeline: it reads blocks into its slots, and copies run meanwhile.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tonnage_device::{Cause, Device, DeviceId, Memory, Queue, Slot, Ticket, Transfer};

use super::block::{Block, Part};
use super::failure::{Failed, Place};
use super::fill::{self, Pace};
use super::options::Ring;
use super::shared::{Next, Shared};
use crate::control::Error;

/// A copy under way, and what has arrived when it is over.
struct UnderWay {
    ticket: Ticket,
    device: usize,
    parts: Vec<(u64, usize)>,
    bytes: u64,
    place: Place,
}

/// A queue, and which call to wait for streams it has followed.
struct Lane {
    queue: Box<dyn Queue>,
    seen: u64,
    /// As `seen`, when this thread last waited for all of it.
    drained: u64,
}

pub(super) struct Reader {
    shared: Arc<Shared>,
    ring: Ring,
    lanes: Vec<Option<Lane>>,
    under_way: VecDeque<UnderWay>,
    free: Vec<(usize, Slot)>,
    /// Slots that this thread has, free or under way.
    slots: usize,
    pace: Pace,
}

/// Ends the pipeline if its thread ends by a panic, e.g. of a cast.
struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let cause = Cause::Invalid("a thread of the pipeline panicked".to_owned());
            let error = tonnage_device::Error::new(DeviceId::HOST, "go on", cause);
            self.0.fail(Failed::of(Error::Device(error)));
        }
    }
}

impl Reader {
    pub fn new(shared: Arc<Shared>, ring: Ring) -> Self {
        Reader {
            lanes: shared.devices.iter().map(|_| None).collect(),
            shared,
            ring,
            under_way: VecDeque::new(),
            free: Vec::new(),
            slots: 0,
            pace: Pace::new(),
        }
    }

    /// Works until the pipeline is closed or has failed. What is under way is over when this returns.
    pub fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let _guard = Guard(&shared);
        if let Err(failed) = self.work() {
            shared.fail(failed);
        }
        while let Some(last) = self.under_way.pop_front() {
            drop(last.ticket);
        }
        for (_, slot) in self.free.drain(..) {
            shared.counts.given_back(slot.bytes().len());
        }
    }

    fn work(&mut self) -> Result<(), Failed> {
        loop {
            self.collect()?;
            let idle = self.under_way.is_empty();
            match self.shared.next(idle) {
                Next::Block(block) => self.bring(&block)?,
                Next::Nothing if idle => self.rest(),
                Next::Stop if idle || self.shared.is_cancelled() => return Ok(()),
                Next::Nothing | Next::Stop => self.wait_oldest()?,
            }
        }
    }

    /// Gives slots back that another pipeline may be waiting for.
    fn rest(&mut self) {
        for (_, slot) in self.free.drain(..) {
            self.slots -= 1;
            self.shared.counts.given_back(slot.bytes().len());
        }
    }

    fn bring(&mut self, block: &Block) -> Result<(), Failed> {
        let failed = |error| Failed::at(error, Place::of(block));
        if block.gds && self.read_by_gds(block).map_err(failed)? {
            self.shared.land(&tags(block), block.wanted());
            return Ok(());
        }
        if let Some(part) = block.straight()
            && fill::direct_for(block, self.shared.options.strategy).is_none()
        {
            self.read_straight(block, part).map_err(failed)?;
            self.shared.land(&tags(block), block.wanted());
            return Ok(());
        }
        let mut slot = self.slot(block.device).map_err(failed)?;
        let filled = fill::read(&self.shared, block, slot.bytes_mut(), &mut self.pace)
            .and_then(|()| fill::prepare(block, slot.bytes_mut()));
        if let Err(error) = filled {
            self.free.push((block.device, slot));
            return Err(failed(error));
        }
        let transfers = fill::transfers(block);
        let counts = &self.shared.counts;
        counts
            .transfers
            .fetch_add(transfers.len() as u64, Ordering::Relaxed);
        if block.mapped {
            let copied = transfers
                .iter()
                .try_for_each(|transfer| copy(slot.bytes(), transfer));
            self.free.push((block.device, slot));
            copied.map_err(failed)?;
            self.shared.land(&tags(block), block.wanted());
            return Ok(());
        }
        let lane = self.lane(block.device).map_err(failed)?;
        let ticket = lane.queue.upload(slot, transfers);
        let ticket = match ticket {
            Ok(ticket) => ticket,
            Err(error) => {
                self.slots -= 1;
                self.shared.counts.given_back(self.ring.slot);
                return Err(failed(Error::Device(error)));
            }
        };
        self.under_way.push_back(UnderWay {
            ticket,
            device: block.device,
            parts: tags(block),
            bytes: block.wanted(),
            place: Place::of(block),
        });
        Ok(())
    }

    /// Reads from the file straight to the device. False if that did not work: then the ring does it, and says
    /// what is wrong with the file, if something is.
    fn read_by_gds(&mut self, block: &Block) -> Result<bool, Error> {
        let shared = Arc::clone(&self.shared);
        let file = shared.straight.file(&block.source, &shared.options);
        let (Some(file), [part]) = (file, &block.parts[..]) else {
            return Ok(false);
        };
        // cuFile follows no stream.
        let lane = self.lane(block.device)?;
        if lane.drained != lane.seen {
            lane.queue.drain().map_err(Error::Device)?;
            lane.drained = lane.seen;
        }
        let mut done = 0;
        while done < block.len {
            fill::check(&shared)?;
            let step = self.pace.step().min(block.len - done);
            let (offset, at) = (block.offset() + done as u64, part.at + done as u64);
            let start = Instant::now();
            let why = match file.read(offset, &*part.memory, at, step) {
                Ok(got) if got == step => None,
                Ok(got) => Some(format!("a read gave {got} bytes of {step}")),
                Err(error) => Some(error.to_string()),
            };
            if let Some(why) = why {
                let label = block.source.label();
                shared
                    .straight
                    .refuse(&block.source, format!("{label}: {why}"));
                return Ok(false);
            }
            self.pace.took(step, start.elapsed());
            shared.counts.reads.fetch_add(1, Ordering::Relaxed);
            done += step;
        }
        let bytes = block.len as u64;
        shared.counts.bytes_gds.fetch_add(bytes, Ordering::Relaxed);
        shared.counts.bytes_read.fetch_add(bytes, Ordering::Relaxed);
        Ok(true)
    }

    /// Reads into memory that the host reaches, without a slot between.
    fn read_straight(&mut self, block: &Block, part: &Part) -> Result<(), Error> {
        let (shared, pace) = (&self.shared, &mut self.pace);
        let range = part.at..part.at + part.len as u64;
        let mut result = Ok(());
        let reached = part.memory.with_host(range, &mut |bytes| {
            result = fill::read_buffered(shared, block, bytes, pace)
                .and_then(|()| fill::look(shared, block, bytes));
        });
        if reached {
            result
        } else {
            Err(unreachable_memory(&part.memory))
        }
    }

    /// A slot to read into: a free one, or one more as long as every other is busy and the budget allows
    /// it, or the one whose copy is over first. So the ring has as many slots as the device's pace needs.
    fn slot(&mut self, device: usize) -> Result<Slot, Error> {
        loop {
            if let Some(at) = self.free.iter().position(|(of, _)| *of == device) {
                return Ok(self.free.swap_remove(at).1);
            }
            if let Some((_, other)) = self.free.pop() {
                // Of another device: its room is needed here.
                self.slots -= 1;
                self.shared.counts.given_back(other.bytes().len());
            }
            if self.slots < self.ring.slots
                && let Some(slot) = self.lend(device)?
            {
                return Ok(slot);
            }
            match self.take_oldest() {
                Some(result) => result.map_err(Failed::into_error)?,
                None if self.shared.is_cancelled() => return Err(Error::Cancelled),
                None => {}
            }
        }
    }

    fn lend(&mut self, device: usize) -> Result<Option<Slot>, Error> {
        let shared = &self.shared;
        let Some(of) = shared.devices.get(device) else {
            return Ok(None);
        };
        // The first slot is waited for; one more is taken if there is room.
        let least = usize::from(self.slots == 0);
        let pool = &shared.options.pool;
        let lent = pool.lend(&**of, self.ring.slot, 1, least, &|| shared.is_cancelled());
        match lent {
            Ok(mut slots) => {
                let slot = slots.pop();
                if slot.is_some() {
                    self.slots += 1;
                    shared.counts.lent(self.ring.slot);
                }
                Ok(slot)
            }
            Err(error) if *error.cause() == Cause::Cancelled => Err(Error::Cancelled),
            // What there is has to do.
            Err(error) if error.is_out_of_memory() && self.slots > 0 => {
                self.ring.slots = self.slots;
                Ok(None)
            }
            Err(error) => Err(Error::Device(error)),
        }
    }

    /// The queue of a device, which from now on runs after the streams that were named.
    fn lane(&mut self, device: usize) -> Result<&mut Lane, Error> {
        let missing = || {
            let cause = Cause::Invalid("no such device in this pipeline".to_owned());
            Error::Device(tonnage_device::Error::new(DeviceId::HOST, "copy", cause))
        };
        let of: &Arc<dyn Device> = self.shared.devices.get(device).ok_or_else(missing)?;
        let place = self.lanes.get_mut(device).ok_or_else(missing)?;
        let lane = match place {
            Some(lane) => lane,
            None => place.insert(Lane {
                queue: of.queue().map_err(Error::Device)?,
                seen: 0,
                drained: 0,
            }),
        };
        let (streams, seen) = self.shared.streams(of.info().id, lane.seen);
        for stream in streams {
            lane.queue.after(stream).map_err(Error::Device)?;
        }
        lane.seen = seen;
        Ok(lane)
    }

    /// Takes in what is over, without waiting.
    fn collect(&mut self) -> Result<(), Failed> {
        while let Some(oldest) = self.under_way.front_mut() {
            let done = oldest.ticket.is_done();
            if !done.map_err(|error| Failed::at(Error::Device(error), oldest.place.clone()))? {
                break;
            }
            self.wait_oldest()?;
        }
        Ok(())
    }

    fn wait_oldest(&mut self) -> Result<(), Failed> {
        self.take_oldest().unwrap_or(Ok(()))
    }

    /// Waits for the oldest copy; `None` if there is none.
    fn take_oldest(&mut self) -> Option<Result<(), Failed>> {
        let UnderWay {
            ticket,
            device,
            parts,
            bytes,
            place,
        } = self.under_way.pop_front()?;
        match ticket.wait() {
            Ok(slot) => {
                self.free.push((device, slot));
                self.shared.land(&parts, bytes);
                Some(Ok(()))
            }
            Err(error) => {
                self.slots -= 1;
                self.shared.counts.given_back(self.ring.slot);
                Some(Err(Failed::at(Error::Device(error), place)))
            }
        }
    }
}

/// How many parts a block has of each tag.
fn tags(block: &Block) -> Vec<(u64, usize)> {
    let mut tags: Vec<(u64, usize)> = Vec::new();
    for part in &block.parts {
        match tags.last_mut() {
            Some((tag, parts)) if *tag == part.tag => *parts += 1,
            _ => tags.push((part.tag, 1)),
        }
    }
    tags
}

fn unreachable_memory(memory: &Memory) -> Error {
    let text = "somebody else is writing to the same memory".to_owned();
    Error::Device(tonnage_device::Error::new(
        memory.device(),
        "write to",
        Cause::Invalid(text),
    ))
}

/// Copies to memory that the host reaches.
fn copy(slot: &[u8], transfer: &Transfer) -> Result<(), Error> {
    for row in 0..transfer.rows {
        let from = transfer.at + row * transfer.slot_pitch;
        let to = transfer.offset + row as u64 * transfer.memory_pitch;
        let src = slot.get(from..from + transfer.len);
        let Some(src) = src.filter(|_| transfer.fits(slot.len())) else {
            return Err(unreachable_memory(&transfer.memory));
        };
        let range = to..to + transfer.len as u64;
        if !transfer
            .memory
            .with_host(range, &mut |dst| dst.copy_from_slice(src))
        {
            return Err(unreachable_memory(&transfer.memory));
        }
    }
    Ok(())
}
