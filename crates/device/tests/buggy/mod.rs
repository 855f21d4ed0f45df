//! A device whose queues have one bug on purpose, to see that the tests of devices and of what stands on
//! them notice it. Without a bug it keeps the contract.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::sync::Arc;

use tonnage_device::driver::{Driver, DriverDevice};
use tonnage_device::{
    Cause, Completion, Device, Error, Info, Kind, Memory, Queue, Slot, Staging, Stream, Ticket,
    Transfer,
};
use tonnage_stubdriver::find::Stub;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    None,
    /// Tickets say at once that their copies are over: slots are reused, and memory is freed, too early.
    Hasty,
    /// Copies do not wait for the stream that they are to follow.
    NoAfter,
    /// A stream does not wait for the copies that it is to follow.
    NoBefore,
    /// Events are never destroyed.
    Leak,
    /// Events are destroyed twice.
    Twice,
    /// Rows are copied as if nothing lay between them.
    Pitch,
    /// A transfer's range is not checked.
    Unchecked,
}

impl Bug {
    pub const ALL: [Bug; 7] = [
        Bug::Hasty,
        Bug::NoAfter,
        Bug::NoBefore,
        Bug::Leak,
        Bug::Twice,
        Bug::Pitch,
        Bug::Unchecked,
    ];
}

type Code = i32;

/// The few functions of the driver that a queue needs.
#[derive(Clone, Copy, Debug)]
struct Calls {
    create: extern "C" fn(*mut usize, u32) -> Code,
    destroy: extern "C" fn(usize) -> Code,
    sync: extern "C" fn(usize) -> Code,
    wait: extern "C" fn(usize, usize, u32) -> Code,
    to_device: extern "C" fn(u64, usize, usize, usize) -> Code,
    to_host: extern "C" fn(usize, u64, usize, usize) -> Code,
    event: extern "C" fn(*mut usize, u32) -> Code,
    record: extern "C" fn(usize, usize) -> Code,
    query: extern "C" fn(usize) -> Code,
    event_sync: extern "C" fn(usize) -> Code,
    event_destroy: extern "C" fn(usize) -> Code,
    set_device: extern "C" fn(i32) -> Code,
}

/// A device of the stub driver, under HIP's names, which need no context.
#[derive(Debug)]
pub struct Buggy {
    inner: DriverDevice,
    calls: Calls,
    bug: Bug,
}

impl Buggy {
    pub fn new(stub: &Stub, bug: Bug) -> Self {
        let driver = Driver::open_at(Kind::Rocm, stub.path()).unwrap();
        let calls = Calls {
            create: stub.function("hipStreamCreateWithFlags"),
            destroy: stub.function("hipStreamDestroy"),
            sync: stub.function("hipStreamSynchronize"),
            wait: stub.function("hipStreamWaitEvent"),
            to_device: stub.function("hipMemcpyHtoDAsync"),
            to_host: stub.function("hipMemcpyDtoHAsync"),
            event: stub.function("hipEventCreateWithFlags"),
            record: stub.function("hipEventRecord"),
            query: stub.function("hipEventQuery"),
            event_sync: stub.function("hipEventSynchronize"),
            event_destroy: stub.function("hipEventDestroy"),
            set_device: stub.function("hipSetDevice"),
        };
        Buggy {
            inner: driver.device(0).unwrap(),
            calls,
            bug,
        }
    }
}

impl Device for Buggy {
    fn info(&self) -> &Info {
        self.inner.info()
    }

    fn free_memory(&self) -> Result<u64, Error> {
        self.inner.free_memory()
    }

    fn allocate(&self, len: u64) -> Result<Memory, Error> {
        self.inner.allocate(len)
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        self.inner.staging(len)
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        let (calls, mut stream) = (self.calls, 0);
        assert_eq!((calls.create)(&mut stream, 1), 0);
        let id = self.inner.info().id;
        Ok(Box::new(BuggyQueue(Arc::new(Line {
            calls,
            stream,
            bug: self.bug,
            id,
        }))))
    }
}

#[derive(Debug)]
struct Line {
    calls: Calls,
    stream: usize,
    bug: Bug,
    id: tonnage_device::DeviceId,
}

impl Line {
    fn check(&self, code: Code) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        let (code, text) = (code.into(), String::new());
        Err(Error::new(self.id, "copy", Cause::Driver { code, text }))
    }

    fn mark(&self, stream: usize) -> Result<usize, Error> {
        let mut event = 0;
        self.check((self.calls.event)(&mut event, 2))?;
        self.check((self.calls.record)(event, stream))?;
        Ok(event)
    }

    fn discard(&self, event: usize) {
        if self.bug != Bug::Leak {
            (self.calls.event_destroy)(event);
        }
        if self.bug == Bug::Twice {
            (self.calls.event_destroy)(event);
        }
    }

    fn order(&self, first: usize, then: usize) -> Result<(), Error> {
        let event = self.mark(first)?;
        let code = (self.calls.wait)(then, event, 0);
        self.discard(event);
        self.check(code)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        (self.calls.sync)(self.stream);
        (self.calls.destroy)(self.stream);
    }
}

#[derive(Debug)]
struct BuggyQueue(Arc<Line>);

impl BuggyQueue {
    fn run(&self, up: bool, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        let line = &self.0;
        let fits = transfers.iter().all(|t| t.fits(slot.bytes().len()));
        if !fits && line.bug != Bug::Unchecked {
            let cause = Cause::Invalid("a transfer does not fit".to_owned());
            return Err(Error::new(line.id, "copy", cause));
        }
        let host = slot.bytes().as_ptr().expose_provenance();
        for transfer in &transfers {
            for row in 0..transfer.rows {
                let (mut far, mut near) = (transfer.memory_pitch as usize, transfer.slot_pitch);
                if line.bug == Bug::Pitch {
                    (far, near) = (transfer.len, transfer.len);
                }
                let device = transfer.memory.address().wrapping_add(transfer.offset);
                let device = device.wrapping_add((row * far) as u64);
                let host = host.wrapping_add(transfer.at).wrapping_add(row * near);
                let code = if up {
                    (line.calls.to_device)(device, host, transfer.len, line.stream)
                } else {
                    (line.calls.to_host)(host, device, transfer.len, line.stream)
                };
                line.check(code)?;
            }
        }
        let event = line.mark(line.stream)?;
        let line = Arc::clone(line);
        if line.bug == Bug::Hasty {
            // The memory's last reference may go as well.
            let end = End { line, event };
            return Ok(Ticket::new(Box::new(end), slot, Vec::new()));
        }
        Ok(Ticket::new(Box::new(End { line, event }), slot, transfers))
    }
}

impl Queue for BuggyQueue {
    fn upload(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.run(true, slot, transfers)
    }

    fn download(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.run(false, slot, transfers)
    }

    fn after(&mut self, stream: Stream) -> Result<(), Error> {
        if self.0.bug == Bug::NoAfter {
            return Ok(());
        }
        self.0.order(stream.raw() as usize, self.0.stream)
    }

    fn before(&mut self, stream: Stream) -> Result<(), Error> {
        if self.0.bug == Bug::NoBefore {
            return Ok(());
        }
        self.0.order(self.0.stream, stream.raw() as usize)
    }

    fn drain(&mut self) -> Result<(), Error> {
        self.0.check((self.0.calls.sync)(self.0.stream))
    }
}

#[derive(Debug)]
struct End {
    line: Arc<Line>,
    event: usize,
}

impl Completion for End {
    fn is_done(&mut self) -> Result<bool, Error> {
        if self.line.bug == Bug::Hasty {
            return Ok(true);
        }
        match (self.line.calls.query)(self.event) {
            600 => Ok(false),
            code => self.line.check(code).map(|()| true),
        }
    }

    fn wait(&mut self) -> Result<(), Error> {
        if self.line.bug == Bug::Hasty {
            return Ok(());
        }
        self.line.check((self.line.calls.event_sync)(self.event))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.line.discard(self.event);
    }
}
