//! What the threads of a pipeline and its owner share: work, news, the first failure, counts.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tonnage_device::{Device, DeviceId, Stream};

use super::block::Block;
use super::failure::Failed;
use super::gds::Straight;
use super::options::PipelineOptions;
use crate::control::{Error, Progress};

/// How often whoever waits looks at whether to go on.
pub(super) const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Shared {
    pub devices: Vec<Arc<dyn Device>>,
    pub options: PipelineOptions,
    pub counts: Counts,
    /// Files that are read without the ring.
    pub straight: Straight,
    state: Mutex<State>,
    work: Condvar,
    news: Condvar,
    /// No block is started any more.
    stopped: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    blocks: VecDeque<Block>,
    /// Parts on their way, by tag.
    left: HashMap<u64, usize>,
    landed: Vec<u64>,
    failure: Option<Failed>,
    closed: bool,
    submitted: u64,
    done: u64,
    /// Streams to wait for, each with the number of the last call that named it.
    streams: Vec<(DeviceId, Stream, u64)>,
    calls: u64,
}

impl State {
    /// The failure, told once; whoever asks again hears that it is over.
    fn told(&mut self) -> Failed {
        let failure = self.failure.take();
        failure.unwrap_or_else(|| Failed::of(Error::Cancelled))
    }
}

/// What is counted while it runs.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub bytes_read: AtomicU64,
    pub bytes_direct: AtomicU64,
    pub bytes_gds: AtomicU64,
    pub reads: AtomicU64,
    pub transfers: AtomicU64,
    staging: AtomicU64,
    pub peak_staging: AtomicU64,
}

impl Counts {
    pub fn lent(&self, bytes: usize) {
        let now = self.staging.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.peak_staging.fetch_max(now, Ordering::Relaxed);
    }

    pub fn given_back(&self, bytes: usize) {
        self.staging.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}

/// What a thread does next.
pub(super) enum Next {
    Block(Box<Block>),
    /// There is nothing to start now.
    Nothing,
    /// It is over.
    Stop,
}

impl Shared {
    pub fn new(devices: Vec<Arc<dyn Device>>, options: PipelineOptions) -> Self {
        Shared {
            devices,
            options,
            counts: Counts::default(),
            straight: Straight::default(),
            state: Mutex::default(),
            work: Condvar::new(),
            news: Condvar::new(),
            stopped: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes work in. `empty` are tags without a byte, which have arrived.
    pub fn submit(&self, blocks: Vec<Block>, empty: Vec<u64>) {
        let mut state = self.lock();
        for part in blocks.iter().flat_map(|block| &block.parts) {
            *state.left.entry(part.tag).or_insert(0) += 1;
        }
        state.submitted += blocks.iter().map(Block::wanted).sum::<u64>();
        state.landed.extend(empty);
        state.blocks.extend(blocks);
        drop(state);
        self.work.notify_all();
        self.news.notify_all();
    }

    /// The next block, if it may be started. Waits a moment for one if `patient`.
    pub fn next(&self, patient: bool) -> Next {
        if self.is_cancelled() {
            return Next::Stop;
        }
        let mut state = self.lock();
        if let Some(block) = state.blocks.pop_front() {
            return Next::Block(Box::new(block));
        }
        if patient && !state.closed {
            let wait = self.work.wait_timeout(state, LOOK);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        match state.blocks.pop_front() {
            _ if self.stopped.load(Ordering::Relaxed) => Next::Stop,
            Some(block) => Next::Block(Box::new(block)),
            None if state.closed => Next::Stop,
            None => Next::Nothing,
        }
    }

    /// Whether no block may be started; a raised flag of the caller's becomes the failure.
    pub fn is_cancelled(&self) -> bool {
        if self.stopped.load(Ordering::Relaxed) {
            return true;
        }
        let cancelled = self.options.cancel.is_cancelled();
        if cancelled {
            self.fail(Failed::of(Error::Cancelled));
        }
        cancelled
    }

    /// Parts of these tags have arrived, with so many bytes in all.
    pub fn land(&self, parts: &[(u64, usize)], bytes: u64) {
        let mut state = self.lock();
        for &(tag, parts) in parts {
            if let Some(left) = state.left.get_mut(&tag) {
                *left = left.saturating_sub(parts);
                if *left == 0 {
                    state.left.remove(&tag);
                    state.landed.push(tag);
                }
            }
        }
        state.done += bytes;
        let total = self.options.total.unwrap_or(state.submitted);
        let progress = Progress {
            done: state.done,
            total,
        };
        drop(state);
        self.news.notify_all();
        if let Some(told) = &self.options.progress {
            told(progress);
        }
    }

    /// Ends everything; the first failure counts.
    pub fn fail(&self, failed: Failed) {
        let mut state = self.lock();
        if !self.stopped.swap(true, Ordering::Relaxed) {
            state.failure = Some(failed);
        }
        // What their memory and sources are needed for is over.
        let blocks = std::mem::take(&mut state.blocks);
        drop(state);
        drop(blocks);
        self.work.notify_all();
        self.news.notify_all();
    }

    /// Ends everything without a failure: nobody wants the rest.
    pub fn stop(&self) {
        self.fail(Failed::of(Error::Cancelled));
    }

    /// No more is submitted.
    pub fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    /// Waits for tags that have arrived, until `end` at most: then there are none. `None`: nothing is under way.
    pub fn landed(&self, end: Option<Instant>) -> Result<Option<Vec<u64>>, Failed> {
        loop {
            self.is_cancelled();
            let mut state = self.lock();
            if self.stopped.load(Ordering::Relaxed) {
                return Err(state.told());
            }
            if !state.landed.is_empty() {
                return Ok(Some(std::mem::take(&mut state.landed)));
            }
            if state.left.is_empty() {
                return Ok(None);
            }
            let left = end.map_or(LOOK, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(Some(Vec::new()));
            }
            drop(self.news.wait_timeout(state, left.min(LOOK)));
        }
    }

    /// Tags that have arrived, without waiting.
    pub fn poll(&self) -> Result<Option<Vec<u64>>, Failed> {
        self.is_cancelled();
        let mut state = self.lock();
        if self.stopped.load(Ordering::Relaxed) {
            return Err(state.told());
        }
        let landed = std::mem::take(&mut state.landed);
        Ok((!landed.is_empty()).then_some(landed))
    }

    /// Bytes that were submitted.
    pub fn submitted(&self) -> u64 {
        self.lock().submitted
    }

    /// From now on, blocks wait for what this stream has been given.
    pub fn after(&self, device: DeviceId, stream: Stream) {
        let mut state = self.lock();
        state.calls += 1;
        let call = state.calls;
        let known = state
            .streams
            .iter_mut()
            .find(|(of, known, _)| (*of, *known) == (device, stream));
        match known {
            Some((.., last)) => *last = call,
            None => state.streams.push((device, stream, call)),
        }
    }

    /// Streams of a device that were named since `seen`, and what has been seen then.
    pub fn streams(&self, device: DeviceId, seen: u64) -> (Vec<Stream>, u64) {
        let state = self.lock();
        let newer = |(of, _, call): &&(DeviceId, Stream, u64)| *of == device && *call > seen;
        (
            state
                .streams
                .iter()
                .filter(newer)
                .map(|(_, stream, _)| *stream)
                .collect(),
            state.calls,
        )
    }
}
