//! A rank's reads carried out in host memory: ranges go straight into their tensors; blocks are read once, by a few
//! threads, and what is wanted of them is copied, or cast, from there.
//!
//! ```text
//!  file    ├──── block 1 ────┤├──── block 2 ────┤      each read once, into a thread's staging memory
//!            ▓▓    ▓▓    ▓▓     ▓▓    ▓▓    ▓▓         runs
//!  tensor  ├▓▓▓▓▓▓┤├▓▓▓▓▓▓┤                            in chunks; a thread has one for itself while it writes
//! ```
//!
//! Memory besides the tensors is the staging block of each thread. Chunks are there so that threads may write to
//! one tensor at the same time; a block of a column shard meets one or two of them.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tonnage_engine::{
    self as engine, Error, HostBuffer, OnProgress, Options, Progress, Report, Strategy,
};
use tonnage_format::Dtype;
use tonnage_plan::io::strided::{Strided, Strides};
use tonnage_plan::io::{Copy, IoPlan, IoProfile, Read};
use tonnage_storage::Source;

use crate::cast::cast;

/// Bytes of a chunk, in the tensor's stored dtype: whole elements whatever that is, since 3 divides it as well.
const CHUNK: u64 = 3 << 18;
/// Bytes that are cast at a time.
const CAST: u64 = 256 << 10;
/// Runs from this size on are cast where they are.
const LONG: u64 = 256;
/// Up to this a read is one call to the system, whatever the strategy.
const SHORT: u64 = 64 << 10;
/// Staging memory begins where the file's bytes do, modulo this.
const PAGE: u64 = 4096;

/// Where a file's bytes come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct File<'a> {
    pub source: &'a dyn Source,
    /// Its content, where that is in memory or mapped.
    pub bytes: Option<&'a [u8]>,
}

/// Memory of a local tensor.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub memory: &'a mut [u8],
    /// What it is stored as, and what it becomes, if that differs.
    pub cast: Option<(Dtype, Dtype)>,
}

/// Carries out the reads. Everything that is wanted has been checked to lie within its target by whoever calls;
/// what does not is an error, not a panic. `shared` says that other ranks read the same blocks.
pub(super) fn run(
    files: &[File<'_>],
    io: &IoPlan,
    mut targets: Vec<Target<'_>>,
    shared: bool,
    options: &Options<'_>,
) -> Result<Report, Error> {
    let total = io.read;
    let ranges = ranges(files, io, &mut targets)?;
    let straight: u64 = ranges.iter().map(|read| read.dst.len() as u64).sum();
    let after = |base: u64| {
        move |progress: Progress| {
            if let Some(told) = options.progress {
                let done = base + progress.done;
                told(Progress { done, total });
            }
        }
    };
    let (first, second) = (after(0), after(straight));
    let told = |progress| options.progress.is_some().then_some(progress);
    let mut report = engine::read(
        ranges,
        &Options {
            progress: told(&first as OnProgress<'_>),
            ..*options
        },
    )?;
    let tasks = tasks(files, io, &targets, shared, options.strategy);
    if tasks.is_empty() {
        return Ok(report);
    }
    let options = Options {
        progress: told(&second as OnProgress<'_>),
        ..*options
    };
    let scattered = scatter(tasks, io, targets, &options)?;
    if scattered.bytes > report.bytes {
        (report.strategy, report.reason) = (scattered.strategy, scattered.reason);
    }
    report.seconds += scattered.seconds;
    report.bytes += scattered.bytes;
    report.threads = report.threads.max(scattered.threads);
    report.peak_staging = report.peak_staging.max(scattered.peak_staging);
    Ok(report)
}

/// The ranges that are read straight into their places.
fn ranges<'a>(
    files: &[File<'a>],
    io: &IoPlan,
    targets: &'a mut [Target<'_>],
) -> Result<Vec<engine::Read<'a>>, Error> {
    let mut wanted: Vec<(usize, u64, u64, usize, u64)> = (io.reads.iter())
        .filter_map(|read| match *read {
            Read::Range {
                local,
                file,
                offset,
                dst,
                len,
            } => Some((local, dst, len, file, offset)),
            _ => None,
        })
        .collect();
    wanted.sort_unstable();
    let mut wanted = wanted.into_iter().peekable();
    let mut reads = Vec::with_capacity(wanted.len());
    for (position, target) in targets.iter_mut().enumerate() {
        let (mut rest, mut at) = (&mut *target.memory, 0);
        while let Some(&(local, dst, len, file, offset)) = wanted.peek() {
            if local != position {
                break;
            }
            wanted.next();
            if target.cast.is_some() {
                continue;
            }
            let lost = || misplaced(files, file, offset);
            let before = dst
                .checked_sub(at)
                .and_then(|gap| usize::try_from(gap).ok());
            let before = before.filter(|&gap| gap <= rest.len()).ok_or_else(lost)?;
            let len = usize::try_from(len).map_err(|_| lost())?;
            let (_, after) = std::mem::take(&mut rest).split_at_mut(before);
            let (part, after) = after.split_at_mut_checked(len).ok_or_else(lost)?;
            (rest, at) = (after, dst.saturating_add(len as u64));
            let source = files.get(file).ok_or_else(lost)?.source;
            reads.push(engine::Read {
                source,
                offset,
                dst: part,
            });
        }
    }
    match wanted.next() {
        Some((.., file, offset)) => Err(misplaced(files, file, offset)),
        None => Ok(reads),
    }
}

/// A copy that leaves its tensor: a plan that was verified has none.
fn misplaced(files: &[File<'_>], file: usize, offset: u64) -> Error {
    let label = files
        .get(file)
        .map_or("<unknown>", |file| file.source.label());
    let text = std::io::Error::other("a copy of the plan leaves its tensor");
    Error::Storage {
        error: tonnage_storage::Error::new("place bytes of", label, text),
        offset,
    }
}

/// What one thread does at a time.
struct Task<'a> {
    file: File<'a>,
    strategy: Strategy,
    what: What<'a>,
}

enum What<'a> {
    Block {
        offset: u64,
        len: u64,
        copies: &'a [usize],
    },
    /// Part of a range that is cast.
    Part(Copy),
    Runs(&'a Copy),
}

impl Task<'_> {
    fn bytes(&self) -> u64 {
        match &self.what {
            What::Block { len, .. } => *len,
            What::Part(copy) => copy.strided.bytes(),
            What::Runs(copy) => copy.strided.bytes(),
        }
    }
}

fn tasks<'a>(
    files: &[File<'a>],
    io: &'a IoPlan,
    targets: &[Target<'_>],
    shared: bool,
    asked: Strategy,
) -> Vec<Task<'a>> {
    /// Bytes of a range that are cast by one thread: a multiple of every element.
    const PART: u64 = 3 << 20;
    let mut settled: Vec<Option<Strategy>> = vec![None; files.len()];
    let mut tasks = Vec::new();
    for read in &io.reads {
        let at = read.file();
        let (Some(&file), Some(settled)) = (files.get(at), settled.get_mut(at)) else {
            continue;
        };
        // For all of the file: whether some block of it is cached says little about the next.
        let strategy = *settled.get_or_insert_with(|| match asked {
            Strategy::Auto | Strategy::Lazy => engine::settle(file.source, 0, file.source.len()),
            Strategy::Mmap => Strategy::Buffered,
            asked => asked,
        });
        // The gaps of one rank's blocks are what the others want: through the page cache, a disk reads each block once
        // for all the ranks of a machine; past it, once for each.
        let block = matches!(read, Read::Block { .. });
        let strategy = match asked {
            Strategy::Auto | Strategy::Lazy if shared && block => Strategy::Buffered,
            _ => strategy,
        };
        let mut push = |what| {
            tasks.push(Task {
                file,
                strategy,
                what,
            });
        };
        match read {
            Read::Block {
                offset,
                len,
                copies,
                ..
            } => push(What::Block {
                offset: *offset,
                len: *len,
                copies,
            }),
            Read::Runs(copy) => push(What::Runs(copy)),
            Read::Range {
                local,
                offset,
                dst,
                len,
                ..
            } => {
                let cast = targets
                    .get(*local)
                    .is_some_and(|target| target.cast.is_some());
                for begin in (0..if cast { *len } else { 0 }).step_by(PART as usize) {
                    let strided = Strided {
                        src: offset + begin,
                        dst: dst + begin,
                        run: PART.min(len - begin),
                        axes: Strides::new(),
                    };
                    push(What::Part(Copy {
                        local: *local,
                        file: at,
                        strided,
                    }));
                }
            }
        }
    }
    tasks
}

fn scatter(
    tasks: Vec<Task<'_>>,
    io: &IoPlan,
    targets: Vec<Target<'_>>,
    options: &Options<'_>,
) -> Result<Report, Error> {
    let (strategy, reason) = said(&tasks);
    let places: Vec<Place<'_>> = targets.into_iter().map(Place::new).collect();
    let staging = AtomicU64::new(0);
    let mut report = engine::for_each_block(
        tasks,
        options,
        strategy,
        Task::bytes,
        || Worker {
            io,
            places: &places,
            options,
            memory: RefCell::new(Memory {
                buffer: None,
                total: &staging,
            }),
            scratch: RefCell::default(),
        },
        |worker, task| worker.work(&task),
    )?;
    report.reason = reason;
    report.peak_staging = staging.into_inner();
    Ok(report)
}

/// Threads by default: one a core, and as many as the storage needs to be busy.
pub(super) fn threads(asked: Option<usize>, profile: &IoProfile) -> usize {
    const MOST: usize = 16;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let depth = (profile.depth as usize).clamp(1, MOST);
    asked
        .unwrap_or(cores.min(Options::MAX_THREADS).max(depth))
        .max(1)
}

/// The way taken, and why: those of the largest task.
fn said(tasks: &[Task<'_>]) -> (&'static str, &'static str) {
    let Some(task) = tasks.iter().max_by_key(|task| task.bytes()) else {
        return ("none", "nothing was wanted");
    };
    let reason = match &task.what {
        What::Block { .. } => "strided parts: blocks are read whole and copied from",
        What::Part(_) => "tensors are cast on the way",
        What::Runs(_) => "strided parts: each run is read for itself",
    };
    let name = match (task.file.bytes, task.strategy) {
        (Some(_), _) => "memory",
        (None, Strategy::Direct) => "direct",
        (None, Strategy::Buffered) => "buffered",
        (None, _) => "direct and buffered",
    };
    (name, reason)
}

/// A tensor's memory in chunks.
struct Place<'a> {
    chunks: Vec<Mutex<&'a mut [u8]>>,
    cast: Option<(Dtype, Dtype)>,
}

impl<'a> Place<'a> {
    fn new(target: Target<'a>) -> Self {
        let bytes = match target.cast {
            None => CHUNK as usize,
            Some((from, to)) => CHUNK as usize / from.bitsize() * to.bitsize(),
        };
        Place {
            chunks: target.memory.chunks_mut(bytes).map(Mutex::new).collect(),
            cast: target.cast,
        }
    }
}

/// Staging memory of one thread.
struct Memory<'a> {
    buffer: Option<HostBuffer>,
    /// Bytes of all threads.
    total: &'a AtomicU64,
}

impl Memory<'_> {
    /// Room for `len` bytes that begin in the file at `offset`.
    fn room(&mut self, offset: u64, len: usize) -> Result<&mut [u8], tonnage_storage::Error> {
        let skew = (offset % PAGE) as usize;
        let have = self.buffer.as_ref().map_or(0, HostBuffer::len);
        if have < skew + len {
            let room = len as u64 + PAGE;
            self.buffer = None;
            self.buffer = Some(HostBuffer::new(room)?);
            self.total.fetch_add(room - have as u64, Ordering::Relaxed);
        }
        let buffer = self.buffer.as_mut().map(HostBuffer::as_mut_slice);
        Ok(buffer
            .and_then(|bytes| bytes.get_mut(skew..skew + len))
            .unwrap_or_default())
    }
}

/// One thread at work.
struct Worker<'a> {
    io: &'a IoPlan,
    places: &'a [Place<'a>],
    options: &'a Options<'a>,
    memory: RefCell<Memory<'a>>,
    scratch: RefCell<(Vec<u8>, Vec<u8>)>,
}

/// What leaves its tensor.
struct Lost;

/// Called with a copy, the chunk that it goes to, and the chunk's first byte.
type OnChunk<'a> = &'a mut dyn FnMut(&Strided, &mut [u8], u64) -> Result<(), Lost>;

impl Worker<'_> {
    fn work(&self, task: &Task<'_>) -> Result<(), Error> {
        match &task.what {
            What::Runs(copy) => self.runs(task, copy),
            What::Part(copy) => {
                let (offset, len) = (copy.strided.src, copy.strided.run);
                self.with_bytes(task, offset, len, |bytes| {
                    let put = self.put(copy.local, &copy.strided, bytes, offset);
                    put.map_err(|Lost| misplaced(&[task.file], 0, offset))
                })
            }
            What::Block {
                offset,
                len,
                copies,
            } => self.with_bytes(task, *offset, *len, |bytes| {
                let mut result = Ok(());
                for copy in copies.iter().filter_map(|&at| self.io.copies.get(at)) {
                    let end = offset.saturating_add(*len);
                    copy.strided.within_src(*offset, end, &mut |part| {
                        if result.is_ok() {
                            result = self.put(copy.local, &part, bytes, *offset);
                        }
                    });
                }
                result.map_err(|Lost| misplaced(&[task.file], 0, *offset))
            }),
        }
    }

    /// Calls `with` with bytes of the task's file.
    fn with_bytes(
        &self,
        task: &Task<'_>,
        offset: u64,
        len: u64,
        with: impl FnOnce(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let source = task.file.source;
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        if let Some(bytes) = within(task.file.bytes, offset, len) {
            self.look(source, offset, bytes)?;
            return with(bytes);
        }
        let mut memory = self.memory.borrow_mut();
        let failed = |error| Error::Storage { error, offset };
        let dst = memory.room(offset, size).map_err(failed)?;
        if len <= SHORT {
            source.read_exact_at(offset, dst).map_err(failed)?;
            self.look(source, offset, dst)?;
            return with(dst);
        }
        let read = engine::Read {
            source,
            offset,
            dst: &mut *dst,
        };
        let alone = Options {
            threads: Some(1),
            progress: None,
            strategy: task.strategy,
            ..*self.options
        };
        engine::read(vec![read], &alone)?;
        with(dst)
    }

    /// Shows bytes that no engine read to whoever checks them.
    fn look(&self, source: &dyn Source, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        match self.options.check {
            Some(check) => check.check(source, offset, &mut std::iter::once(bytes)),
            None => Ok(()),
        }
    }

    /// Reads each run for itself, straight into its place where it is not cast.
    fn runs(&self, task: &Task<'_>, copy: &Copy) -> Result<(), Error> {
        let run = copy.strided.run;
        let cast = self
            .places
            .get(copy.local)
            .is_some_and(|place| place.cast.is_some());
        // A run that is cast goes through staging memory in short parts, each of whole elements.
        let staged = cast || task.file.bytes.is_some();
        let step = if staged { SHORT } else { run };
        copy.strided.for_each_run(&mut |src, dst| {
            if self
                .options
                .cancel
                .is_some_and(engine::Cancel::is_cancelled)
            {
                return Err(Error::Cancelled);
            }
            let mut done = 0;
            while done < run {
                let part = Strided {
                    src: src + done,
                    dst: dst + done,
                    run: step.min(run - done),
                    axes: Strides::new(),
                };
                done += part.run;
                if !staged {
                    self.read_run(task, copy.local, &part)?;
                    continue;
                }
                self.with_bytes(task, part.src, part.run, |bytes| {
                    let put = self.put(copy.local, &part, bytes, part.src);
                    put.map_err(|Lost| misplaced(&[task.file], 0, part.src))
                })?;
            }
            Ok(())
        })
    }

    fn read_run(&self, task: &Task<'_>, local: usize, run: &Strided) -> Result<(), Error> {
        let source = task.file.source;
        let mut result = Ok(());
        let placed = self.each_chunk(local, run, &mut |part, memory, base| {
            let begin = usize::try_from(part.dst - base).map_err(|_| Lost)?;
            let end = begin.saturating_add(usize::try_from(part.run).map_err(|_| Lost)?);
            let dst = memory.get_mut(begin..end).ok_or(Lost)?;
            let read = source.read_exact_at(part.src, dst).map_err(|error| {
                let offset = part.src;
                Error::Storage { error, offset }
            });
            result = read.and_then(|()| self.look(source, part.src, dst));
            Ok(())
        });
        placed.map_err(|Lost| misplaced(&[task.file], 0, run.src))?;
        result
    }

    /// Copies a part from bytes that begin at `base` of the file to its place.
    fn put(&self, local: usize, part: &Strided, bytes: &[u8], base: u64) -> Result<(), Lost> {
        let cast = self.places.get(local).ok_or(Lost)?.cast;
        self.each_chunk(local, part, &mut |part, memory, begin| match cast {
            None => part
                .copy(bytes, base, memory, begin)
                .then_some(())
                .ok_or(Lost),
            Some(cast) => self.put_cast(part, bytes, base, memory, begin, cast),
        })
    }

    /// Calls `with` with each part of a copy that lies in one chunk, the chunk, and its first byte in the tensor's
    /// stored dtype.
    fn each_chunk(&self, local: usize, copy: &Strided, with: OnChunk<'_>) -> Result<(), Lost> {
        let chunks = &self.places.get(local).ok_or(Lost)?.chunks;
        let (first, last) = (copy.dst / CHUNK, (copy.dst_end() - 1) / CHUNK);
        for at in first..=last {
            let chunk = usize::try_from(at)
                .ok()
                .and_then(|at| chunks.get(at))
                .ok_or(Lost)?;
            let begin = at * CHUNK;
            let mut result = Ok(());
            let mut lock = || chunk.lock().unwrap_or_else(PoisonError::into_inner);
            if first == last {
                return with(copy, &mut lock(), begin);
            }
            let mut held = None;
            copy.within_dst(begin, begin + CHUNK, &mut |part| {
                if result.is_ok() {
                    result = with(&part, held.get_or_insert_with(&mut lock), begin);
                }
            });
            result?;
        }
        Ok(())
    }

    fn put_cast(
        &self,
        part: &Strided,
        bytes: &[u8],
        base: u64,
        memory: &mut [u8],
        begin: u64,
        (from, to): (Dtype, Dtype),
    ) -> Result<(), Lost> {
        let (small, large) = (from.bitsize() as u64, to.bitsize() as u64);
        let out = |len: u64| usize::try_from(len * large / small).map_err(|_| Lost);
        let place = |at: u64, base: u64| at.checked_sub(base).ok_or(Lost);
        if part.run >= LONG {
            return part.for_each_run(&mut |src, dst| {
                let src = usize::try_from(place(src, base)?).map_err(|_| Lost)?;
                let dst = out(place(dst, begin)?)?;
                let run = bytes.get(src..src.saturating_add(part.run as usize));
                let room = memory.get_mut(dst..dst.saturating_add(out(part.run)?));
                cast(from, run.ok_or(Lost)?, to, room.ok_or(Lost)?).map_err(|_| Lost)
            });
        }
        // Short runs are gathered, cast together, and spread from there.
        let mut result = Ok(());
        let mut scratch = self.scratch.borrow_mut();
        let (packed, made) = &mut *scratch;
        part.portions(CAST, &mut |portion| {
            if result.is_err() {
                return;
            }
            let (mut gather, mut spread) = (portion.clone(), portion.clone());
            (gather.dst, spread.src) = (0, 0);
            let mut step = portion.run;
            for (to, from) in gather.axes.iter_mut().zip(&mut spread.axes).rev() {
                (to.dst, from.src) = (step, step);
                step *= to.extent;
            }
            let scale = |bytes: &mut u64| *bytes = *bytes * large / small;
            spread.dst = match portion.dst.checked_sub(begin) {
                Some(dst) => dst,
                None => return result = Err(Lost),
            };
            scale(&mut spread.dst);
            scale(&mut spread.run);
            for axis in &mut spread.axes {
                scale(&mut axis.src);
                scale(&mut axis.dst);
            }
            packed.resize(step as usize, 0);
            made.resize((step * large / small) as usize, 0);
            let gathered = gather.copy(bytes, base, packed, 0);
            let done = gathered && cast(from, packed, to, made).is_ok();
            if !(done && spread.copy(made, 0, memory, 0)) {
                result = Err(Lost);
            }
        });
        result
    }
}

/// The bytes of a file that is in memory.
fn within(bytes: Option<&[u8]>, offset: u64, len: u64) -> Option<&[u8]> {
    let begin = usize::try_from(offset).ok()?;
    let end = begin.checked_add(usize::try_from(len).ok()?)?;
    bytes?.get(begin..end)
}
