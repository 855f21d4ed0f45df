//! A stream of a device: copies in order, an event for each slot.

use std::sync::{Arc, Mutex, PoisonError};

use super::call::{Grid, NOT_READY, Way};
use super::device::{DriverMemory, DriverStaging, Shared};
use super::part::{Part, parts};
use super::table::Handle;
use crate::{Cause, Completion, Error, Queue, Slot, Stream, Ticket, Transfer};

/// A stream and the events that were made for it.
#[derive(Debug)]
struct Line {
    shared: Arc<Shared>,
    stream: Handle,
    /// Events that nobody waits for any more.
    idle: Mutex<Vec<Handle>>,
}

impl Line {
    fn error(&self, doing: &'static str, code: i32) -> Error {
        self.shared.table.error(self.shared.info.id, doing, code)
    }

    /// An event, marked to happen once the stream has done what it was given so far.
    fn mark(&self, stream: Handle) -> Result<Handle, Error> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let event = match idle {
            Some(event) => event,
            None => self.shared.table.event(self.shared.info.id)?,
        };
        match self.shared.table.event_record(event, stream) {
            0 => Ok(event),
            code => {
                self.put_back(event);
                Err(self.error("mark the end of a copy", code))
            }
        }
    }

    /// What one stream has been given so far comes before what the other is given from now on.
    fn order(&self, first: Handle, then: Handle) -> Result<(), Error> {
        let _entered = self.shared.enter()?;
        let event = self.mark(first)?;
        let code = self.shared.table.stream_wait(then, event);
        // The wait is for what the event stands for now: it may be used again at once.
        self.put_back(event);
        match code {
            0 => Ok(()),
            code => Err(self.error("wait for a stream", code)),
        }
    }

    fn put_back(&self, event: Handle) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let Ok(_entered) = self.shared.enter() else {
            return;
        };
        let table = self.shared.table;
        // Tickets hold what copies use, and the line: nothing runs any more, unless the context is lost.
        let _ = table.stream_sync(self.stream);
        let idle = self.idle.get_mut().unwrap_or_else(PoisonError::into_inner);
        idle.drain(..).for_each(|event| table.event_destroy(event));
        table.stream_destroy(self.stream);
    }
}

/// Copies of one device in order.
#[derive(Debug)]
pub struct DriverQueue(Arc<Line>);

impl DriverQueue {
    pub(super) fn open(shared: &Arc<Shared>) -> Result<Self, Error> {
        let entered = shared.enter()?;
        let stream = shared.table.stream(shared.info.id)?;
        drop(entered);
        let (shared, idle) = (Arc::clone(shared), Mutex::new(Vec::new()));
        Ok(DriverQueue(Arc::new(Line {
            shared,
            stream,
            idle,
        })))
    }

    fn run(&self, way: Way, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        let line = &self.0;
        let (host, parts) = check(line, &slot, &transfers)?;
        let _entered = line.shared.enter()?;
        let mut flight = Flight {
            line,
            held: Some((slot, transfers)),
        };
        for part in parts {
            start(line, way, host, part)?;
        }
        let event = line.mark(line.stream)?;
        let end = End {
            line: Arc::clone(line),
            event,
            over: false,
        };
        match flight.held.take() {
            Some((slot, transfers)) => Ok(Ticket::new(Box::new(end), slot, transfers)),
            None => unreachable!("nobody else takes what is held"),
        }
    }
}

/// A slot and memory while copies between them are started. Dropped before a ticket has them, be it by an
/// error or a panic, it waits for what was started.
struct Flight<'a> {
    line: &'a Line,
    held: Option<(Slot, Vec<Transfer>)>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if let Some((slot, transfers)) = self.held.take()
            && self.line.shared.table.stream_sync(self.line.stream) != 0
        {
            // Nobody knows what still runs.
            slot.abandon();
            std::mem::forget(transfers);
        }
    }
}

/// Checks every transfer, and gives the slot's address and what there is to copy.
fn check(line: &Line, slot: &Slot, transfers: &[Transfer]) -> Result<(usize, Vec<Part>), Error> {
    let refused =
        |text: &str| Error::new(line.shared.info.id, "copy", Cause::Invalid(text.to_owned()));
    let staging = slot
        .staging()
        .and_then(|staging| staging.as_any().downcast_ref::<DriverStaging>());
    let staging = staging.filter(|staging| staging.is_of(&line.shared));
    let staging = staging.ok_or_else(|| refused("staging memory of another kind of device"))?;
    let mut addresses = Vec::with_capacity(transfers.len());
    for transfer in transfers {
        if !transfer.fits(slot.bytes().len()) {
            return Err(refused("a transfer leaves its slot or its memory"));
        }
        let memory = transfer.memory.as_any().downcast_ref::<DriverMemory>();
        let memory = memory.filter(|memory| memory.is_of(&line.shared));
        let memory = memory.ok_or_else(|| refused("memory of another device"))?;
        addresses.push(memory.address);
    }
    let parts = parts(transfers.iter().zip(addresses));
    Ok((staging.address(), parts))
}

/// Starts one copy, which was checked.
fn start(line: &Line, way: Way, host: usize, part: Part) -> Result<(), Error> {
    let (table, stream) = (line.shared.table, line.stream);
    let farthest = part.device_pitch.max(part.slot_pitch);
    let code = if part.rows == 1 {
        table.copy(way, part.device, host + part.at, part.len, stream)
    } else if farthest > line.shared.max_pitch {
        return part
            .each_row()
            .try_for_each(|row| start(line, way, host, row));
    } else {
        let grid = Grid {
            device: part.device,
            device_pitch: part.device_pitch,
            host: host + part.at,
            host_pitch: part.slot_pitch,
            width: part.len,
            height: part.rows,
        };
        table.copy_rows(way, grid, stream)
    };
    match (code, way) {
        (0, _) => Ok(()),
        (code, Way::ToDevice) => Err(line.error("copy to it", code)),
        (code, Way::ToHost) => Err(line.error("copy from it", code)),
    }
}

impl Queue for DriverQueue {
    fn upload(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.run(Way::ToDevice, slot, transfers)
    }

    fn download(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.run(Way::ToHost, slot, transfers)
    }

    fn after(&mut self, stream: Stream) -> Result<(), Error> {
        self.0.order(stream.raw() as Handle, self.0.stream)
    }

    fn before(&mut self, stream: Stream) -> Result<(), Error> {
        self.0.order(self.0.stream, stream.raw() as Handle)
    }

    fn drain(&mut self) -> Result<(), Error> {
        let line = &self.0;
        let _entered = line.shared.enter()?;
        match line.shared.table.stream_sync(line.stream) {
            0 => Ok(()),
            code => Err(line.error("wait for its copies", code)),
        }
    }
}

/// The event after a slot's copies.
#[derive(Debug)]
struct End {
    line: Arc<Line>,
    event: Handle,
    over: bool,
}

impl Completion for End {
    fn is_done(&mut self) -> Result<bool, Error> {
        if self.over {
            return Ok(true);
        }
        let _entered = self.line.shared.enter()?;
        match self.line.shared.table.event_query(self.event) {
            0 => self.over = true,
            NOT_READY => (),
            code => return Err(self.line.error("copy", code)),
        }
        Ok(self.over)
    }

    fn wait(&mut self) -> Result<(), Error> {
        if self.over {
            return Ok(());
        }
        let _entered = self.line.shared.enter()?;
        match self.line.shared.table.event_sync(self.event) {
            0 => {
                self.over = true;
                Ok(())
            }
            code => Err(self.line.error("copy", code)),
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.line.put_back(self.event);
    }
}
