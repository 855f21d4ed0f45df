//! A stream of a device: copies in order, an event for each slot.

use std::sync::{Arc, Mutex, PoisonError};

use super::call::{Grid, NOT_READY, Way};
use super::device::{DriverMemory, DriverStaging, Shared};
use super::table::Handle;
use crate::{Cause, Completion, DeviceMemory, Error, Queue, Slot, Stream, Ticket, Transfer};

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
        let host = check(line, &slot, &transfers)?;
        let _entered = line.shared.enter()?;
        let begun = transfers
            .iter()
            .try_for_each(|transfer| start(line, way, host, transfer));
        match begun.and_then(|()| line.mark(line.stream)) {
            Ok(event) => {
                let end = End {
                    line: Arc::clone(line),
                    event,
                    over: false,
                };
                Ok(Ticket::new(Box::new(end), slot, transfers))
            }
            Err(error) => {
                // What was started may still read the slot.
                if line.shared.table.stream_sync(line.stream) != 0 {
                    slot.abandon();
                    transfers
                        .into_iter()
                        .for_each(|transfer| std::mem::forget(transfer.memory));
                }
                Err(error)
            }
        }
    }
}

/// Checks every transfer, and gives the slot's address.
fn check(line: &Line, slot: &Slot, transfers: &[Transfer]) -> Result<usize, Error> {
    let refused =
        |text: &str| Error::new(line.shared.info.id, "copy", Cause::Invalid(text.to_owned()));
    let staging = slot
        .staging()
        .and_then(|staging| staging.as_any().downcast_ref::<DriverStaging>());
    let staging = staging.ok_or_else(|| refused("staging memory of another kind of device"))?;
    for transfer in transfers {
        if !transfer.fits(slot.bytes().len()) {
            return Err(refused("a transfer leaves its slot or its memory"));
        }
        let memory = transfer.memory.as_any().downcast_ref::<DriverMemory>();
        if memory.is_none_or(|memory| memory.device() != line.shared.info.id) {
            return Err(refused("memory of another device"));
        }
    }
    Ok(staging.address())
}

/// Starts one transfer, which was checked.
fn start(line: &Line, way: Way, host: usize, transfer: &Transfer) -> Result<(), Error> {
    if transfer.len == 0 {
        return Ok(());
    }
    let (device, host) = (
        transfer.memory.address() + transfer.offset,
        host + transfer.at,
    );
    let table = line.shared.table;
    let code = if transfer.rows == 1 {
        table.copy(way, device, host, transfer.len, line.stream)
    } else {
        let grid = Grid {
            device,
            device_pitch: transfer.memory_pitch as usize,
            host,
            host_pitch: transfer.slot_pitch,
            width: transfer.len,
            height: transfer.rows,
        };
        table.copy_rows(way, grid, line.stream)
    };
    match code {
        0 => Ok(()),
        code => Err(line.error(
            if way == Way::ToDevice {
                "copy to it"
            } else {
                "copy from it"
            },
            code,
        )),
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
        let line = &self.0;
        let _entered = line.shared.enter()?;
        let event = line.mark(stream.raw() as Handle)?;
        let code = line.shared.table.stream_wait(line.stream, event);
        line.put_back(event);
        if code == 0 {
            Ok(())
        } else {
            Err(line.error("wait for a stream", code))
        }
    }

    fn before(&mut self, stream: Stream) -> Result<(), Error> {
        let line = &self.0;
        let _entered = line.shared.enter()?;
        let event = line.mark(line.stream)?;
        let code = line.shared.table.stream_wait(stream.raw() as Handle, event);
        line.put_back(event);
        if code == 0 {
            Ok(())
        } else {
            Err(line.error("make a stream wait", code))
        }
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
