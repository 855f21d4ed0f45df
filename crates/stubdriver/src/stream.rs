//! Streams: work in order, on a thread of its own; and events, which are places in that order.

use std::collections::VecDeque;
use std::time::Duration;

use crate::access::Clock;
use crate::copy::Job;
use crate::raw::{self, HostFn};
use crate::world::{
    Code, Guard, INVALID_HANDLE, INVALID_VALUE, NOT_READY, World, changed, lock, wait,
};

/// What a stream does next.
#[derive(Debug)]
pub enum Work {
    Copy(Box<Job>),
    /// Waits until another stream has done its operation of this number.
    Wait {
        stream: u64,
        number: u64,
    },
    Call(HostFn, usize),
    Nothing,
}

/// One stream.
#[derive(Debug)]
pub struct Stream {
    pub device: usize,
    /// Does not wait for the default stream.
    pub free: bool,
    /// Its handle is valid.
    pub alive: bool,
    /// Its thread may end.
    pub closed: bool,
    pub queue: VecDeque<(u64, Work)>,
    pub issued: u64,
    pub done: u64,
    pub clock: Clock,
    random: u64,
}

impl Stream {
    pub fn new(device: usize, free: bool) -> Self {
        Stream {
            device,
            free,
            alive: true,
            closed: false,
            queue: VecDeque::new(),
            issued: 0,
            done: 0,
            clock: Clock::default(),
            random: 0,
        }
    }
}

/// An event: a place in a stream's order, once recorded.
#[derive(Debug)]
pub struct Event {
    pub device: usize,
    pub timing: bool,
    /// The stream and the number of the operation.
    pub place: Option<(u64, u64)>,
    clock: Clock,
}

/// Starts a stream's thread.
pub fn start(id: u64) {
    // A machine without threads can't run the tests either.
    std::thread::spawn(move || work(id));
}

fn work(id: u64) {
    let mut world = lock();
    loop {
        match world.next(id) {
            Next::End => {
                world.gone(id);
                return;
            }
            Next::Later => world = wait(world),
            Next::Now(number, work) => {
                world = perform(world, id, work);
                if let Some(stream) = world.streams.get_mut(&id) {
                    stream.done = number;
                }
                changed();
            }
        }
    }
}

enum Next {
    End,
    Later,
    Now(u64, Work),
}

fn perform(mut world: Guard, id: u64, work: Work) -> Guard {
    match work {
        Work::Copy(job) => {
            let time = world.pace(id, job.bytes());
            world.started(id, &job);
            drop(world);
            if !time.is_zero() {
                std::thread::sleep(time);
            }
            let result = crate::copy::run(&job);
            world = lock();
            world.ended(id, &job, result);
        }
        Work::Call(function, argument) => {
            drop(world);
            raw::call(function, argument);
            world = lock();
        }
        Work::Wait { .. } | Work::Nothing => {}
    }
    world
}

impl World {
    fn next(&mut self, id: u64) -> Next {
        let Some(stream) = self.streams.get(&id) else {
            return Next::End;
        };
        let broken = self
            .devices
            .get(stream.device)
            .is_none_or(|device| device.broken.is_some());
        let ready = match stream.queue.front() {
            None if stream.closed => return Next::End,
            None => false,
            Some((_, Work::Wait { stream, number })) => broken || self.is_done(*stream, *number),
            Some((_, Work::Copy(_))) => broken || !self.hold,
            Some(_) => true,
        };
        let front = self.streams.get_mut(&id).filter(|_| ready);
        match front.and_then(|stream| stream.queue.pop_front()) {
            Some((number, work)) => Next::Now(number, work),
            None => Next::Later,
        }
    }

    /// A stream is no more. Its device's default stream knows what it knew, for whoever waits for the device.
    fn gone(&mut self, id: u64) {
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        let null = self.device(stream.device).map(|device| device.null);
        if let Some(null) = null.ok().and_then(|null| self.streams.get_mut(&null)) {
            null.clock.join(&stream.clock);
        }
    }

    /// How long a copy takes to begin.
    fn pace(&mut self, id: u64, bytes: usize) -> Duration {
        let settings = &self.settings;
        let (delay, seed, bps) = (settings.delay_us, settings.seed, settings.bps);
        let mut time = Duration::ZERO;
        if let Some(stream) = self.streams.get_mut(&id).filter(|_| delay > 0) {
            // SplitMix64.
            stream.random = stream.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut x = stream.random ^ seed.wrapping_mul(id).rotate_left(17);
            x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            time += Duration::from_micros((x ^ (x >> 31)) % (2 * delay + 1));
        }
        if bps > 0 {
            time += Duration::from_secs_f64(bytes as f64 / bps as f64);
        }
        time
    }

    pub fn is_done(&self, stream: u64, number: u64) -> bool {
        let stream = self.streams.get(&stream);
        stream.is_none_or(|stream| stream.done >= number)
    }

    /// The stream of a handle that a caller passed, on the device that is current.
    pub fn stream_of(&self, device: usize, handle: usize) -> Result<u64, Code> {
        // 0 and CU_STREAM_LEGACY are the default stream.
        if handle <= 1 {
            return Ok(self.device(device)?.null);
        }
        let id = handle as u64;
        let alive = self.streams.get(&id).is_some_and(|stream| stream.alive);
        if alive { Ok(id) } else { Err(INVALID_HANDLE) }
    }

    pub fn open_stream(&mut self, device: usize, free: bool) -> Result<u64, Code> {
        self.use_device(device)?;
        let id = self.id();
        self.streams.insert(id, Stream::new(device, free));
        start(id);
        self.journal.line(
            "stream",
            format_args!("\"stream\":{id},\"device\":{device}"),
        );
        Ok(id)
    }

    /// The stream's work goes on until it is done.
    pub fn close_stream(&mut self, device: usize, handle: usize) -> Result<(), Code> {
        let id = match self.stream_of(device, handle) {
            Ok(id) if handle > 1 => id,
            _ => {
                self.violation(&format!("{handle} is no stream, and is destroyed"));
                return Err(INVALID_HANDLE);
            }
        };
        if let Some(stream) = self.streams.get_mut(&id) {
            (stream.alive, stream.closed) = (false, true);
        }
        self.journal
            .line("stream_close", format_args!("\"stream\":{id}"));
        changed();
        Ok(())
    }

    /// Adds work to a stream, after what the default stream's rules demand; gives its number and clock.
    pub fn enqueue(&mut self, id: u64, work: Work) -> Result<(u64, Clock), Code> {
        let stream = self.streams.get(&id).ok_or(INVALID_HANDLE)?;
        let device = stream.device;
        let null = self.device(device)?.null;
        let mut before = Vec::new();
        for (other, state) in &self.streams {
            let ordered = state.device == device
                && *other != id
                && ((id == null && !state.free) || (*other == null && !stream.free));
            if ordered && state.issued > 0 {
                before.push((*other, state.issued, state.clock.clone()));
            }
        }
        let host = self.host.clone();
        for (other, number, clock) in before {
            self.push(
                id,
                Work::Wait {
                    stream: other,
                    number,
                },
                &clock,
            )?;
        }
        let placed = self.push(id, work, &host)?;
        changed();
        Ok(placed)
    }

    fn push(&mut self, id: u64, work: Work, after: &Clock) -> Result<(u64, Clock), Code> {
        let stream = self.streams.get_mut(&id).ok_or(INVALID_HANDLE)?;
        stream.issued += 1;
        let number = stream.issued;
        stream.clock.join(after);
        stream.clock.raise(id, number);
        stream.queue.push_back((number, work));
        Ok((number, stream.clock.clone()))
    }

    pub fn open_event(&mut self, device: usize, timing: bool) -> Result<u64, Code> {
        self.use_device(device)?;
        let id = self.id();
        let event = Event {
            device,
            timing,
            place: None,
            clock: Clock::default(),
        };
        self.events.insert(id, event);
        Ok(id)
    }

    pub fn close_event(&mut self, id: u64) -> Result<(), Code> {
        if self.events.remove(&id).is_none() {
            self.violation(&format!("{id} is no event, and is destroyed"));
            return Err(INVALID_HANDLE);
        }
        Ok(())
    }

    pub fn record(&mut self, device: usize, event: u64, handle: usize) -> Result<(), Code> {
        self.use_device(device)?;
        let stream = self.stream_of(device, handle)?;
        let of = self.events.get(&event).ok_or(INVALID_HANDLE)?.device;
        if self.streams.get(&stream).is_none_or(|s| s.device != of) {
            return Err(INVALID_HANDLE);
        }
        let (number, clock) = self.enqueue(stream, Work::Nothing)?;
        if let Some(event) = self.events.get_mut(&event) {
            event.place = Some((stream, number));
            event.clock = clock;
        }
        self.journal.line(
            "record",
            format_args!("\"event\":{event},\"stream\":{stream},\"number\":{number}"),
        );
        Ok(())
    }

    /// Makes a stream wait for an event as it is recorded now.
    pub fn wait_event(&mut self, device: usize, handle: usize, event: u64) -> Result<(), Code> {
        self.use_device(device)?;
        let id = self.stream_of(device, handle)?;
        let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        let Some((stream, number)) = event.place else {
            return Ok(());
        };
        let clock = event.clock.clone();
        self.journal.line(
            "wait",
            format_args!("\"stream\":{id},\"for\":{stream},\"number\":{number}"),
        );
        self.push(id, Work::Wait { stream, number }, &clock)?;
        changed();
        Ok(())
    }

    pub fn query_event(&mut self, device: usize, event: u64) -> Result<(), Code> {
        self.use_device(device)?;
        let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        match event.place {
            Some((stream, number)) if !self.is_done(stream, number) => Err(NOT_READY),
            _ => {
                let clock = event.clock.clone();
                self.host.join(&clock);
                Ok(())
            }
        }
    }

    pub fn query_stream(&mut self, device: usize, handle: usize) -> Result<(), Code> {
        self.use_device(device)?;
        let id = self.stream_of(device, handle)?;
        let stream = self.streams.get(&id).ok_or(INVALID_HANDLE)?;
        if stream.done < stream.issued {
            return Err(NOT_READY);
        }
        let clock = stream.clock.clone();
        self.host.join(&clock);
        Ok(())
    }

    /// Milliseconds between two events are not measured; that both happened is checked.
    pub fn both_happened(&self, first: u64, last: u64) -> Result<(), Code> {
        for event in [first, last] {
            let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
            let place = event.place.filter(|_| event.timing);
            let (stream, number) = place.ok_or(INVALID_HANDLE)?;
            if !self.is_done(stream, number) {
                return Err(NOT_READY);
            }
        }
        Ok(())
    }
}

/// Waits until a stream has done its operation of this number; the host knows then what that clock knows.
pub fn await_number(
    mut world: Guard,
    device: usize,
    (id, number): (u64, u64),
    clock: &Clock,
) -> (Guard, Result<(), Code>) {
    while !world.is_done(id, number) {
        world = wait(world);
    }
    world.host.join(clock);
    let broken = world.device(device).map(|device| device.broken);
    let result = broken.and_then(|broken| broken.map_or(Ok(()), Err));
    (world, result)
}

/// Waits for an event.
pub fn sync_event(mut world: Guard, device: usize, event: u64) -> Result<(), Code> {
    world.use_device(device)?;
    let event = world.events.get(&event).ok_or(INVALID_HANDLE)?;
    let Some(place) = event.place else {
        return Ok(());
    };
    let clock = event.clock.clone();
    await_number(world, device, place, &clock).1
}

/// Waits for all work of a stream.
pub fn sync_stream(mut world: Guard, device: usize, handle: usize) -> Result<(), Code> {
    world.use_device(device)?;
    let id = world.stream_of(device, handle)?;
    let stream = world.streams.get(&id).ok_or(INVALID_HANDLE)?;
    let (number, clock) = (stream.issued, stream.clock.clone());
    await_number(world, device, (id, number), &clock).1
}

/// Waits for all work of a device.
pub fn sync_device(mut world: Guard, device: usize) -> Result<(), Code> {
    world.use_device(device)?;
    let all: Vec<(u64, u64, Clock)> = world
        .streams
        .iter()
        .filter(|(_, stream)| stream.device == device)
        .map(|(id, stream)| (*id, stream.issued, stream.clock.clone()))
        .collect();
    for (id, number, clock) in all {
        let (next, result) = await_number(world, device, (id, number), &clock);
        world = next;
        result?;
    }
    Ok(())
}

/// Has a function called when a stream gets there.
pub fn call_later(
    mut world: Guard,
    device: usize,
    handle: usize,
    function: Option<HostFn>,
    argument: usize,
) -> Result<(), Code> {
    world.use_device(device)?;
    let id = world.stream_of(device, handle)?;
    let function = function.ok_or(INVALID_VALUE)?;
    world.enqueue(id, Work::Call(function, argument)).map(drop)
}
