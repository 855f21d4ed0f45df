//! From storage to the memory of devices: a few threads read into a ring of staging slots while what
//! they read before is being copied.
//!
//! ```text
//!  pieces ─► blocks ─► thread 1: read │ copy under way │ read │ …      slots of thread 1
//!                      thread 2:      read │ copy under way │ …        slots of thread 2
//!                                          └──► landed: tags
//! ```
//!
//! What it promises:
//!
//! * **Memory is the ring**: threads × slots × bytes of a slot, at most
//!   [`PipelineOptions::staging`], whatever the amount of data. A thread takes one more slot only when all that it has
//!   are busy, so a fast device needs few.
//! * **Reading and copying overlap.** Small neighbours are read together and copied together; large pieces are cut
//!   where a page of the file ends, so that nothing is read twice.
//! * **What has landed is there**: a tag is told when the copies of all its bytes are over, so that any
//!   stream may use it at once. Before copies begin, they wait for the streams named by
//!   [`Pipeline::after`], in whose order the memory was allocated; nothing waits for the whole device.
//! * **The first failure ends it**, and [`Failed`] says which source, bytes and tag it was about. A raised
//!   [`Cancel`](crate::Cancel) ends it within milliseconds.
//! * **GPUDirect Storage, where it is asked for and works**: whole pages of large pieces go from the disk to a CUDA
//!   device without the host's memory; whatever is in its way, the ring does it ([`PipelineOptions::gds`]).
//! * **However it ends, copies are over first**: dropping a pipeline joins its threads, whose tickets wait.
//!   No slot is freed or lent again before.
//!
//! ```
//! use std::sync::Arc;
//! use tonnage_device::{Device, HostDevice};
//! use tonnage_engine::{Piece, Pipeline, PipelineOptions};
//! use tonnage_storage::{MemorySource, Source};
//!
//! let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
//! let source: Arc<dyn Source> = Arc::new(MemorySource::new(*b"0123456789", "<bytes>"));
//! let memory = device.allocate(4)?;
//! let pipeline = Pipeline::start(vec![device], PipelineOptions::default())?;
//! pipeline.submit(vec![Piece::plain(source, 3, 4, memory, 0, 7)])?;
//! assert_eq!(pipeline.landed()?.unwrap().tags, [7]);
//! assert!(pipeline.landed()?.is_none());
//! assert_eq!(pipeline.finish()?.bytes, 4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod back;
mod block;
mod failure;
mod fill;
mod gds;
mod options;
mod piece;
mod reader;
mod shared;

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tonnage_device::{Cause, Device, DeviceId, Stream};
use tonnage_storage::StorageKind;

pub use back::{Downloads, FromDevice};
pub use failure::Failed;
pub use options::{DeviceReport, PipelineOptions, SharedProgress};
pub use piece::{Cast, Landed, Piece};

use crate::control::Error;
use crate::strategy::Strategy;
use block::{Cutter, Way};
use failure::Place;
use options::Ring;
use reader::Reader;
use shared::Shared;

/// Threads by default at most, for a disk of this machine. What is cached comes at 3 GB/s a thread, so
/// 16 of them keep up with a card's bus; more did not help.
const MAX_THREADS: usize = 16;
/// Threads by default for sources behind a network, where each read waits.
const NETWORK_THREADS: usize = 16;
/// A cast's smallest part, before and after together, at most: it has to fit every slot.
const MAX_UNIT: usize = 4096;

/// Brings pieces of sources to devices. See the [module](self).
#[derive(Debug)]
pub struct Pipeline {
    shared: Arc<Shared>,
    threads: Mutex<Threads>,
    start: Instant,
}

#[derive(Debug)]
struct Threads {
    /// Decided by the first pieces.
    ring: Option<Ring>,
    running: Vec<JoinHandle<()>>,
    reason: String,
}

impl Pipeline {
    /// A pipeline to these devices, which share its ring. Threads start when there is work for them.
    ///
    /// # Errors
    /// A budget below [`PipelineOptions::MIN_STAGING`]; a device named twice, or none.
    pub fn start(
        devices: Vec<Arc<dyn Device>>,
        options: PipelineOptions,
    ) -> Result<Pipeline, Failed> {
        let ids: Vec<DeviceId> = devices.iter().map(|device| device.info().id).collect();
        let id = ids.first().copied().unwrap_or(DeviceId::HOST);
        let refused = |text: String| {
            let error = tonnage_device::Error::new(id, "start a pipeline", Cause::Invalid(text));
            Err(Failed::of(Error::Device(error)))
        };
        if ids.is_empty() {
            return refused("no device is given".to_owned());
        }
        if let Some(twice) = ids
            .iter()
            .enumerate()
            .find(|(at, id)| ids[..*at].contains(id))
        {
            return refused(format!("{} is given twice", twice.1));
        }
        if options.ring(1).is_none() {
            let (found, needed) = (options.staging, PipelineOptions::MIN_STAGING);
            return refused(format!(
                "{found} bytes of staging memory are given, {needed} are needed"
            ));
        }
        Ok(Pipeline {
            shared: Arc::new(Shared::new(devices, options)),
            threads: Mutex::new(Threads {
                ring: None,
                running: Vec::new(),
                reason: String::new(),
            }),
            start: Instant::now(),
        })
    }

    /// Gives pieces, which are brought in this order. Returns at once.
    ///
    /// # Errors
    /// A piece that does not lie within its source and its memory, or is for another device: then none is taken.
    /// Whether the pipeline has failed meanwhile is told by [`Pipeline::landed`].
    pub fn submit(&self, pieces: Vec<Piece>) -> Result<(), Failed> {
        let ways = pieces
            .iter()
            .map(|piece| self.way(piece))
            .collect::<Result<Vec<Way>, Failed>>()?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = match threads.ring {
            Some(ring) => ring,
            None => {
                let Some(first) = pieces.first() else {
                    return Ok(());
                };
                let (wanted, reason) = self.decide(first);
                threads.reason = reason;
                let Some(ring) = self.shared.options.ring(wanted) else {
                    return Ok(());
                };
                *threads.ring.insert(ring)
            }
        };
        let mut cutter = Cutter::new(ring.slot);
        for (piece, way) in pieces.iter().zip(ways) {
            cutter.add(piece, way);
        }
        let empty = without_bytes(&pieces);
        let blocks = gds::cut(cutter.finish(), &self.shared.options, &self.shared.devices);
        let busy = threads.running.len() + blocks.len();
        self.shared.submit(blocks, empty);
        while threads.running.len() < ring.threads.min(busy) {
            let reader = Reader::new(Arc::clone(&self.shared), ring);
            let name = std::thread::Builder::new().name("tonnage-read".to_owned());
            match name.spawn(move || reader.run()) {
                Ok(thread) => threads.running.push(thread),
                // A few threads do as well, if more slowly.
                Err(_) if !threads.running.is_empty() => break,
                Err(error) => {
                    let error = tonnage_storage::Error::new("start a thread for", "reading", error);
                    let failed = Failed::of(Error::Storage { error, offset: 0 });
                    self.shared.stop();
                    return Err(failed);
                }
            }
        }
        Ok(())
    }

    fn way(&self, piece: &Piece) -> Result<Way, Failed> {
        let id = piece.memory.device();
        let refused = |text: &str| {
            let cause = Cause::Invalid(text.to_owned());
            let error = Error::Device(tonnage_device::Error::new(id, "copy to", cause));
            Err(Failed::at(error, Place::of_piece(piece)))
        };
        let unit = piece.cast.as_ref().map_or((1, 1), |cast| cast.unit());
        if !piece.fits() {
            return refused("a piece leaves its source or its memory, or its rows overlap");
        }
        if unit.0.saturating_add(unit.1) > MAX_UNIT {
            return refused("a cast works on parts that are too large");
        }
        let at = self
            .shared
            .devices
            .iter()
            .position(|device| device.info().id == id);
        match at.and_then(|at| Some((at, self.shared.devices.get(at)?))) {
            None => refused("memory of a device that this pipeline does not have"),
            Some((at, device)) => Ok(Way {
                device: at,
                mapped: piece.memory.with_host(0..0, &mut |_| ()),
                pitched: device.info().pitched,
                gds: gds::goes(&self.shared.options, &**device),
            }),
        }
    }

    /// Threads by default, and why bytes are read as they are.
    fn decide(&self, first: &Piece) -> (usize, String) {
        let source = &first.source;
        let kind = source.kind();
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let threads = match kind {
            StorageKind::Network(_) | StorageKind::Remote => NETWORK_THREADS,
            StorageKind::Local | StorageKind::Memory => cores.clamp(2, MAX_THREADS),
        };
        let strategy = self.shared.options.strategy;
        let cached = source.residency(first.offset, first.len).fraction();
        let reason = match (strategy, kind) {
            (Strategy::Auto, StorageKind::Network(name)) => {
                format!("large parallel reads, since the file lies on {name}")
            }
            (Strategy::Auto, StorageKind::Remote | StorageKind::Memory) => {
                "the source is no file on a disk".to_owned()
            }
            (Strategy::Auto, StorageKind::Local) => match (cached, source.direct().is_some()) {
                (_, false) => "the file system has no direct reads".to_owned(),
                (None, _) => "the system does not tell what the page cache has".to_owned(),
                (Some(part), _) => {
                    format!(
                        "block by block; the page cache has {:.0} % of the first piece",
                        part * 100.0
                    )
                }
            },
            (Strategy::Lazy | Strategy::Mmap, _) => {
                format!("{strategy} is for host memory; a device is read to through the page cache")
            }
            (Strategy::Direct | Strategy::Buffered, _) => "as asked".to_owned(),
        };
        match gds::why_not(&self.shared.options, &self.shared.devices) {
            Some(why) => (threads, format!("no GPUDirect Storage: {why}; {reason}")),
            None => (threads, reason),
        }
    }

    /// Waits for the next tags whose every byte has arrived. `None` when nothing is under way; more may be
    /// submitted then.
    ///
    /// # Errors
    /// The first failure, once; `Cancelled` if it is asked again.
    pub fn landed(&self) -> Result<Option<Landed>, Failed> {
        Ok(self.shared.landed(None)?.map(|tags| Landed { tags }))
    }

    /// As [`Pipeline::landed`], but waits no longer than `limit`: no tags then. For callers that have to look at
    /// something else now and then.
    ///
    /// # Errors
    /// As [`Pipeline::landed`].
    pub fn landed_within(&self, limit: Duration) -> Result<Option<Landed>, Failed> {
        let end = Instant::now().checked_add(limit);
        Ok(self.shared.landed(end)?.map(|tags| Landed { tags }))
    }

    /// Tags that have arrived since they were last asked for, without waiting; `None` if there are none.
    ///
    /// # Errors
    /// As [`Pipeline::landed`].
    pub fn poll(&self) -> Result<Option<Landed>, Failed> {
        Ok(self.shared.poll()?.map(|tags| Landed { tags }))
    }

    /// Pieces that are submitted from now on are copied after what this stream of a device has been given so
    /// far. The memory of an allocator that works in stream order has to be waited for like this. Memory that
    /// the host reaches without a copy is written to at once.
    pub fn after(&self, device: DeviceId, stream: Stream) {
        self.shared.after(device, stream);
    }

    /// Waits for everything, and says what was done.
    ///
    /// # Errors
    /// As [`Pipeline::landed`].
    pub fn finish(self) -> Result<DeviceReport, Failed> {
        while self.landed()?.is_some() {}
        self.shared.close();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let count = threads.running.len();
        threads.running.drain(..).for_each(join);
        Ok(self.report(count, &threads.reason))
    }

    /// What was done so far.
    pub fn progress_report(&self) -> DeviceReport {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        self.report(threads.running.len(), &threads.reason)
    }

    fn report(&self, threads: usize, reason: &str) -> DeviceReport {
        let counts = &self.shared.counts;
        let (read, direct, straight) = (
            counts.bytes_read.load(Ordering::Relaxed),
            counts.bytes_direct.load(Ordering::Relaxed),
            counts.bytes_gds.load(Ordering::Relaxed),
        );
        let reason = match self.shared.straight.refused() {
            Some(why) => format!("{reason}; not all by GPUDirect Storage: {why}"),
            None => reason.to_owned(),
        };
        DeviceReport {
            seconds: self.start.elapsed().as_secs_f64(),
            bytes: self.shared.submitted(),
            bytes_read: read,
            bytes_direct: direct,
            reads: counts.reads.load(Ordering::Relaxed),
            transfers: counts.transfers.load(Ordering::Relaxed),
            peak_staging: counts.peak_staging.load(Ordering::Relaxed),
            threads,
            bytes_gds: straight,
            strategy: match direct {
                _ if straight > read / 2 => "gds",
                0 => "buffered",
                _ if direct == read => "direct",
                _ => "direct and buffered",
            },
            reason,
        }
    }
}

/// Tags that have pieces, but no byte: they have arrived.
fn without_bytes(pieces: &[Piece]) -> Vec<u64> {
    let empty = |piece: &&Piece| piece.byte_len() == 0;
    let mut tags: Vec<u64> = pieces.iter().filter(empty).map(|piece| piece.tag).collect();
    tags.sort_unstable();
    tags.dedup();
    if !tags.is_empty() {
        let full: HashSet<u64> = pieces
            .iter()
            .filter(|piece| !empty(piece))
            .map(|piece| piece.tag)
            .collect();
        tags.retain(|tag| !full.contains(tag));
    }
    tags
}

fn join(thread: JoinHandle<()>) {
    // A panic has become the pipeline's failure already.
    let _ = thread.join();
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.shared.stop();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.running.drain(..).for_each(join);
    }
}
