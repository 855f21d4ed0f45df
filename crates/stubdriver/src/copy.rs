//! Copies: checked when they are asked for, run when their stream gets to them.

use crate::access::{Access, Clock, Rows};
use crate::raw;
use crate::stream::{Work, await_number};
use crate::world::{Code, Guard, INVALID_VALUE, LAUNCH_FAILED, World, lock};

/// Which memory an address has to be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Host,
    Device,
    /// The address tells.
    Either,
}

/// Where the bytes come from.
#[derive(Clone, Copy, Debug)]
enum Source {
    Memory(Rows),
    /// This byte, again and again.
    Value(u8),
}

/// A copy that was checked.
#[derive(Debug)]
pub struct Job {
    to: Rows,
    from: Source,
    /// What the source was when the copy was asked for.
    hash: Option<u64>,
    device: usize,
}

impl Job {
    pub fn bytes(&self) -> usize {
        self.to.width * self.to.rows
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub device: usize,
    pub stream: usize,
    pub to: (Side, Rows),
    pub from: (Side, Rows),
    /// The caller waits.
    pub sync: bool,
}

/// Where some bytes are.
#[derive(Clone, Copy, Debug)]
enum Home {
    Device(usize, usize),
    Pinned(usize),
    /// Memory that copies have to be over with when the call returns.
    Pageable,
}

/// Starts a copy; waits for it where the API does.
pub fn ask(request: Request) -> Result<(), Code> {
    let mut world = lock();
    world.use_device(request.device)?;
    world.counts.copies += 1;
    if world.counts.copies == world.settings.fail_issue {
        return Err(INVALID_VALUE);
    }
    let stream = world.stream_of(request.device, request.stream)?;
    if request.to.1.width == 0 || request.to.1.rows == 0 {
        return Ok(());
    }
    let (to_home, to) = world.place(request.to)?;
    let (from_home, from) = world.place(request.from)?;
    let pageable = matches!(to_home, Home::Pageable) || matches!(from_home, Home::Pageable);
    let late = !request.sync && !pageable;
    let check = late && world.settings.check_source && matches!(from_home, Home::Pinned(_));
    let settled = check && !world.is_written(from_home, &request.from.1);
    let job = Job {
        to,
        from: Source::Memory(from),
        hash: settled.then(|| hash(&from)),
        device: request.device,
    };
    let (number, clock) = world.enqueue(stream, Work::Copy(Box::new(job)))?;
    world.issued(stream, number, &request);
    world.used(to_home, request.to.1, true, (stream, number), &clock);
    world.used(from_home, request.from.1, false, (stream, number), &clock);
    finish(world, request.device, (stream, number), &clock, late)
}

/// Sets bytes of a device's memory.
pub fn set(device: usize, stream: usize, to: Rows, value: u8, sync: bool) -> Result<(), Code> {
    let mut world = lock();
    world.use_device(device)?;
    let stream = world.stream_of(device, stream)?;
    if to.width == 0 {
        return Ok(());
    }
    let (home, inner) = world.place((Side::Device, to))?;
    let job = Job {
        to: inner,
        from: Source::Value(value),
        hash: None,
        device,
    };
    let (number, clock) = world.enqueue(stream, Work::Copy(Box::new(job)))?;
    world.counts.in_flight += 1;
    world.used(home, to, true, (stream, number), &clock);
    finish(world, device, (stream, number), &clock, !sync)
}

fn finish(
    world: Guard,
    device: usize,
    place: (u64, u64),
    clock: &Clock,
    late: bool,
) -> Result<(), Code> {
    if late {
        return Ok(());
    }
    await_number(world, device, place, clock).1
}

fn hash(rows: &Rows) -> u64 {
    (0..rows.rows).fold(0, |sum: u64, row| {
        sum.rotate_left(7) ^ raw::hash(rows.start + row * rows.pitch, rows.width)
    })
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The device was broken before.
    Skipped,
    /// The source is not what it was when the copy was asked for.
    Changed,
}

/// Runs a copy. The lock is not held; the memory stays: see `raw`.
pub fn run(job: &Job) -> Outcome {
    let broken = |world: &World| {
        world
            .device(job.device)
            .is_ok_and(|device| device.broken.is_some())
    };
    if broken(&lock()) {
        return Outcome::Skipped;
    }
    let mut outcome = Outcome::Done;
    if let (Some(wanted), Source::Memory(from)) = (job.hash, job.from)
        && hash(&from) != wanted
    {
        outcome = Outcome::Changed;
    }
    for row in 0..job.to.rows {
        let to = job.to.start + row * job.to.pitch;
        match job.from {
            Source::Memory(from) => raw::copy(to, from.start + row * from.pitch, job.to.width),
            Source::Value(value) => raw::fill(to, value, job.to.width),
        }
    }
    outcome
}

impl World {
    /// Checks that bytes are of one block, and gives the driver's own address of them.
    fn place(&mut self, (side, bytes): (Side, Rows)) -> Result<(Home, Rows), Code> {
        let span = bytes.span().ok_or(INVALID_VALUE)?;
        let address = bytes.start;
        let of = self
            .devices
            .iter()
            .position(|device| device.arena.contains(address));
        if let Some(index) = of {
            let arena = &self.device(index)?.arena;
            let found = arena
                .find(address, span)
                .map(|block| (block, arena.inner(bytes)));
            let freed = arena.was_freed(address);
            return match found {
                Some((block, inner)) if side != Side::Host => {
                    Ok((Home::Device(index, block), inner))
                }
                Some(_) => Err(INVALID_VALUE),
                None => {
                    if freed {
                        self.violation(&format!(
                            "device memory at {address} is used after it was freed"
                        ));
                    }
                    Err(INVALID_VALUE)
                }
            };
        }
        if side == Side::Device || address == 0 {
            return Err(INVALID_VALUE);
        }
        let before = |of: usize, len: usize| address < of + len;
        match self.pinned.range(..=address).next_back() {
            Some((start, pinned)) if before(*start, pinned.block.len) => {
                if address + span > start + pinned.block.len {
                    return Err(INVALID_VALUE);
                }
                Ok((Home::Pinned(*start), bytes))
            }
            _ => {
                let old = self.unpinned.range(..=address).next_back();
                if old.is_some_and(|(start, len)| before(*start, *len)) {
                    self.violation(&format!(
                        "page-locked memory at {address} is used after it was freed"
                    ));
                    return Err(INVALID_VALUE);
                }
                Ok((Home::Pageable, bytes))
            }
        }
    }

    fn uses(&mut self, home: Home) -> Option<&mut crate::access::Uses> {
        match home {
            Home::Device(device, block) => {
                let blocks = &mut self.devices.get_mut(device)?.arena.blocks;
                blocks.get_mut(&block).map(|block| &mut block.uses)
            }
            Home::Pinned(start) => {
                let pinned = self.pinned.get_mut(&start);
                pinned.map(|pinned| &mut pinned.block.uses)
            }
            Home::Pageable => None,
        }
    }

    fn is_written(&mut self, home: Home, bytes: &Rows) -> bool {
        self.uses(home).is_some_and(|uses| uses.is_written(bytes))
    }

    /// Notes a use, and looks for an earlier one that it is in no order with.
    fn used(
        &mut self,
        home: Home,
        bytes: Rows,
        writes: bool,
        (stream, number): (u64, u64),
        clock: &Clock,
    ) {
        let host = self.host.clone();
        let access = Access {
            bytes,
            writes,
            stream,
            number,
        };
        let race = self
            .uses(home)
            .and_then(|uses| uses.add(access, clock, &host));
        if let Some(old) = race {
            let verb = |writes| if writes { "writes" } else { "reads" };
            self.violation(&format!(
                "race: stream {stream} {} {} bytes at {} while stream {} {} there, and no event orders them",
                verb(writes),
                bytes.width * bytes.rows,
                bytes.start,
                old.stream,
                verb(old.writes),
            ));
        }
    }

    fn issued(&mut self, stream: u64, number: u64, request: &Request) {
        self.counts.in_flight += 1;
        self.counts.max_in_flight = self.counts.max_in_flight.max(self.counts.in_flight);
        let (to, from) = (request.to.1, request.from.1);
        self.journal.line(
            "issue",
            format_args!(
                "\"stream\":{stream},\"number\":{number},\"to\":{},\"from\":{},\"bytes\":{},\"rows\":{},\"in_flight\":{}",
                to.start,
                from.start,
                to.width * to.rows,
                to.rows,
                self.counts.in_flight
            ),
        );
    }

    /// A copy begins.
    pub fn started(&mut self, stream: u64, job: &Job) {
        if matches!(job.from, Source::Memory(_)) {
            self.counts.ran += 1;
            let fails = self.counts.ran == self.settings.fail_copy;
            if let Ok(device) = self.device_mut(job.device)
                && fails
                && device.broken.is_none()
            {
                device.broken = Some(LAUNCH_FAILED);
            }
        }
        self.journal.line(
            "start",
            format_args!("\"stream\":{stream},\"bytes\":{}", job.bytes()),
        );
    }

    /// A copy is over.
    pub fn ended(&mut self, stream: u64, job: &Job, outcome: Outcome) {
        self.counts.in_flight -= 1;
        if let (Outcome::Changed, Source::Memory(from)) = (outcome, job.from) {
            self.violation(&format!(
                "{} bytes at {} changed before stream {stream} had copied them: a staging buffer was reused too early",
                job.bytes(),
                from.start
            ));
        }
        self.journal.line(
            "done",
            format_args!(
                "\"stream\":{stream},\"bytes\":{},\"ran\":{}",
                job.bytes(),
                outcome != Outcome::Skipped
            ),
        );
    }
}
