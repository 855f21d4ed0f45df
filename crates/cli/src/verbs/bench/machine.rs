//! What this machine can do by the plainest means: copies, fresh memory, reads of the same files.
//!
//! None of it goes through the loader, so that the loader can be held against it.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use memmap2::MmapMut;
use tonnage::storage::{Residency, Source, StorageKind};
use tonnage::{Checkpoint, TensorRef};

use super::report::Limit;
use crate::exit::Failure;

/// Bytes of one read: large enough for every disk to reach its speed.
const BLOCK: usize = 4 << 20;
/// Bytes that a thread copies within: more than the caches hold.
const COPY: usize = 64 << 20;
/// Fresh memory that is touched.
const FRESH: usize = 256 << 20;
/// A direct read's offset, length and address are multiples of this at most, on every disk there is.
const PAGE: usize = 4096;

/// How memory is backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    Small,
    Huge,
}

/// An anonymous map; what the system thinks of the advice is its own affair.
fn fresh(len: usize, pages: Pages) -> Result<MmapMut, Failure> {
    let map = MmapMut::map_anon(len).map_err(|error| {
        tonnage::Error::from(tonnage::storage::Error::new("map", "fresh memory", error))
    })?;
    #[cfg(target_os = "linux")]
    let _ = map.advise(match pages {
        Pages::Small => memmap2::Advice::NoHugePage,
        Pages::Huge => memmap2::Advice::HugePage,
    });
    #[cfg(not(target_os = "linux"))]
    let _ = pages;
    Ok(map)
}

fn touch(map: &mut [u8]) {
    for page in map.chunks_mut(PAGE) {
        if let Some(first) = page.first_mut() {
            *first = 1;
        }
    }
    std::hint::black_box(map);
}

/// 1, 2, 4 … and all of the processors.
pub fn thread_counts(most: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(n * 2))
        .take_while(|&n| n < most)
        .collect();
    counts.push(most.max(1));
    counts
}

/// How many threads may run at a time.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `work` on so many threads that begin together, and gives the seconds until the last is done.
fn together<T: Send>(
    parts: Vec<T>,
    work: impl Fn(T) -> Result<(), Failure> + Sync,
) -> Result<f64, Failure> {
    let barrier = Arc::new(Barrier::new(parts.len() + 1));
    let (work, barrier) = (&work, &barrier);
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts
            .into_iter()
            .map(|part| {
                scope.spawn(move || {
                    barrier.wait();
                    work(part)
                })
            })
            .collect();
        barrier.wait();
        let start = Instant::now();
        for thread in threads {
            match thread.join() {
                Ok(done) => done?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(start.elapsed().as_secs_f64())
    })
}

/// Memory: copies by 1 to n threads, and the price of fresh pages.
///
/// # Errors
/// No memory.
pub fn memory() -> Result<Vec<Limit>, Failure> {
    const TIMES: usize = 4;
    let mut limits = Vec::new();
    for threads in thread_counts(processors().min(16)) {
        let mut maps = Vec::with_capacity(threads);
        for _ in 0..threads {
            let mut pair = (fresh(COPY, Pages::Huge)?, fresh(COPY, Pages::Huge)?);
            touch(&mut pair.0);
            touch(&mut pair.1);
            maps.push(pair);
        }
        let mut limit = Limit::new("memory", format!("memory copy, {}", name(threads)));
        for _ in 0..3 {
            let seconds = together(maps.iter_mut().collect(), |(to, from)| {
                for _ in 0..TIMES {
                    to.copy_from_slice(std::hint::black_box(from));
                }
                std::hint::black_box(to);
                Ok(())
            })?;
            limit.add((threads * TIMES * COPY) as u64, seconds);
        }
        limits.push(limit);
    }
    for (pages, what) in [(Pages::Small, "4 KiB"), (Pages::Huge, "huge")] {
        let mut limit = Limit::new("memory", format!("fresh memory touched, {what} pages"));
        // The first round is not counted: on a virtual machine it may have to ask the host for memory.
        for round in 0..4 {
            let mut map = fresh(FRESH, pages)?;
            let start = Instant::now();
            touch(&mut map);
            if round > 0 {
                limit.add(FRESH as u64, start.elapsed().as_secs_f64());
            }
        }
        limits.push(limit);
    }
    Ok(limits)
}

fn name(threads: usize) -> String {
    match threads {
        1 => "1 thread".to_owned(),
        n => format!("{n} threads"),
    }
}

/// Bytes of a checkpoint that are measured: for each file a range that holds the tensors in question.
#[derive(Debug)]
pub struct Stretch<'a> {
    source: &'a Arc<dyn Source>,
    range: Range<u64>,
}

/// Where these tensors lie, file by file.
pub fn stretches<'a>(checkpoint: &'a Checkpoint, tensors: &[TensorRef<'a>]) -> Vec<Stretch<'a>> {
    let mut found: Vec<(usize, Range<u64>)> = Vec::new();
    for tensor in tensors {
        let (begin, end) = (
            tensor.offset(),
            tensor.offset().saturating_add(tensor.byte_len()),
        );
        match found.iter_mut().find(|(file, _)| *file == tensor.file()) {
            Some((_, range)) => *range = range.start.min(begin)..range.end.max(end),
            None => found.push((tensor.file(), begin..end)),
        }
    }
    let with_source = |(file, range)| {
        checkpoint
            .source(file)
            .map(|source| Stretch { source, range })
    };
    found.into_iter().filter_map(with_source).collect()
}

/// Drops these bytes, and nothing else, from the page cache. False if they stay, e.g. in tmpfs.
pub fn evict(stretches: &[Stretch<'_>]) -> bool {
    stretches.iter().all(|stretch| {
        // Pages that are not on the disk yet cannot be dropped.
        let _ = stretch.source.file().map(File::sync_data);
        stretch
            .source
            .forget(stretch.range.start, stretch.range.end - stretch.range.start);
        resident(stretch).is_some_and(|part| part < 0.02)
    })
}

/// Which part is in the page cache, if the system says so.
fn resident(stretch: &Stretch<'_>) -> Option<f64> {
    let len = stretch.range.end - stretch.range.start;
    match stretch.source.residency(stretch.range.start, len) {
        Residency::Unknown => None,
        known => known.fraction(),
    }
}

/// Brings these bytes into the page cache.
///
/// # Errors
/// What the system said.
pub fn warm(stretches: &[Stretch<'_>]) -> Result<(), Failure> {
    let blocks = blocks(stretches, u64::MAX, 1);
    let parts = deal(&blocks, processors().min(8));
    together(parts, |part| {
        let mut buffer = vec![0; BLOCK];
        for (source, range) in part {
            let room = buffer.get_mut(..(range.end - range.start) as usize);
            source
                .read_exact_at(range.start, room.unwrap_or_default())
                .map_err(tonnage::Error::from)?;
        }
        Ok(())
    })?;
    Ok(())
}

type Block<'a> = (&'a Arc<dyn Source>, Range<u64>);

/// Blocks of the stretches whose bounds are multiples of `step`, of so many bytes at most together.
fn blocks<'a>(stretches: &[Stretch<'a>], most: u64, step: u64) -> Vec<Block<'a>> {
    let (mut found, mut left) = (Vec::new(), most);
    for stretch in stretches {
        let mut at = stretch.range.start / step * step;
        let end = stretch.range.end / step * step;
        while at < end && left > 0 {
            let next = at.saturating_add(BLOCK as u64).min(end);
            found.push((stretch.source, at..next));
            left = left.saturating_sub(next - at);
            at = next;
        }
    }
    found
}

/// Deals blocks to threads, so that together they go through the files in order.
fn deal<'a, 'b>(blocks: &'b [Block<'a>], threads: usize) -> Vec<Vec<&'b Block<'a>>> {
    let part = |n| blocks.iter().skip(n).step_by(threads).collect();
    (0..threads).map(part).collect()
}

/// The disk: reads of the checkpoint itself that bypass the page cache. Empty where there are none.
///
/// # Errors
/// What the system said.
pub fn disk(stretches: &[Stretch<'_>], most: u64) -> Result<Vec<Limit>, Failure> {
    let mut limits = Vec::new();
    let direct = |stretch: &Stretch<'_>| stretch.source.direct().is_some();
    if !stretches.iter().all(direct) {
        return Ok(limits);
    }
    let blocks = blocks(stretches, most, PAGE as u64);
    for threads in [1, 2, 4, 8] {
        let mut limit = Limit::new(
            "disk",
            format!("disk, O_DIRECT, 4 MiB reads, {}", name(threads)),
        );
        evict(stretches);
        let parts = deal(&blocks, threads);
        let seconds = together(parts, |part| {
            let mut buffer = fresh(BLOCK, Pages::Huge)?;
            for (source, range) in part {
                let len = (range.end - range.start) as usize;
                let (room, direct) = (buffer.get_mut(..len), source.direct());
                if let (Some(room), Some(direct)) = (room, direct) {
                    let read = direct.read_at_least(range.start, room, len);
                    read.map_err(tonnage::Error::from)?;
                }
            }
            Ok(())
        })?;
        limit.add(bytes(&blocks), seconds);
        limits.push(limit);
    }
    Ok(limits)
}

fn bytes(blocks: &[Block<'_>]) -> u64 {
    blocks
        .iter()
        .map(|(_, range)| range.end - range.start)
        .sum()
}

/// The page cache: reads of the checkpoint itself, into one buffer a thread, and into fresh memory as a
/// loader must.
///
/// # Errors
/// What the system said.
pub fn page_cache(stretches: &[Stretch<'_>], most: u64) -> Result<Vec<Limit>, Failure> {
    const OWN: u64 = 512 << 20;
    let mut limits = Vec::new();
    let blocks = blocks(stretches, most, 1);
    for threads in thread_counts(processors().min(16)) {
        let mut limit = Limit::new(
            "page cache",
            format!("page cache, 4 MiB reads, {}", name(threads)),
        );
        for _ in 0..2 {
            let seconds = together(deal(&blocks, threads), |part| {
                let mut buffer = fresh(BLOCK, Pages::Huge)?;
                part.into_iter()
                    .try_for_each(|block| plain_read(block, &mut buffer))
            })?;
            limit.add(bytes(&blocks), seconds);
        }
        limits.push(limit);
    }
    let some: Vec<Block<'_>> = self::blocks(stretches, most.min(OWN), 1);
    let threads = processors().min(8);
    let what = format!("page cache into fresh huge pages, {}", name(threads));
    let mut limit = Limit::new("page cache", what);
    for round in 0..3 {
        let mut map = fresh((bytes(&some) as usize).max(1), Pages::Huge)?;
        let start = Instant::now();
        let mut parts: Vec<Vec<(&Block<'_>, &mut [u8])>> =
            (0..threads).map(|_| Vec::new()).collect();
        let mut rest = &mut map[..];
        for (number, block) in some.iter().enumerate() {
            let (room, after) = rest.split_at_mut((block.1.end - block.1.start) as usize);
            rest = after;
            if let Some(part) = parts.get_mut(number % threads) {
                part.push((block, room));
            }
        }
        together(parts, |part| {
            part.into_iter()
                .try_for_each(|(block, room)| plain_read(block, room))
        })?;
        if round > 0 {
            limit.add(bytes(&some), start.elapsed().as_secs_f64());
        }
    }
    limits.push(limit);
    Ok(limits)
}

/// By the system's call itself where there is a file.
fn plain_read((source, range): &Block<'_>, room: &mut [u8]) -> Result<(), Failure> {
    let room = room
        .get_mut(..(range.end - range.start) as usize)
        .unwrap_or_default();
    match source.file() {
        Some(file) => file.read_exact_at(room, range.start).map_err(|error| {
            tonnage::Error::from(tonnage::storage::Error::new("read", source.label(), error)).into()
        }),
        None => Ok(source
            .read_exact_at(range.start, room)
            .map_err(tonnage::Error::from)?),
    }
}

/// The machine in words, as far as the system tells.
#[derive(Debug)]
pub struct Description {
    /// The processor's name.
    pub processor: String,
    /// How many threads run at a time.
    pub threads: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// The system and its release.
    pub system: String,
    /// Name of the file system that the checkpoint is on.
    pub file_system: String,
    /// What is behind it.
    pub storage: &'static str,
}

/// Looks at the machine, and where the checkpoint is.
pub fn description(stretches: &[Stretch<'_>]) -> Description {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
    };
    let memory = field(&text("/proc/meminfo"), "MemTotal")
        .and_then(|value| value.trim_end_matches(" kB").parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024));
    let release = text("/proc/sys/kernel/osrelease");
    let first = stretches.first();
    Description {
        processor: field(&text("/proc/cpuinfo"), "model name")
            .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        threads: processors(),
        memory,
        system: format!("{} {}", std::env::consts::OS, release.trim())
            .trim()
            .to_owned(),
        file_system: first.map_or_else(String::new, |stretch| {
            file_system(stretch.source.label(), &text("/proc/self/mountinfo"))
        }),
        storage: match first.map(|stretch| stretch.source.kind()) {
            Some(StorageKind::Local) => "local",
            Some(StorageKind::Network(_)) => "network",
            Some(StorageKind::Memory) => "memory",
            _ => "unknown",
        },
    }
}

/// The type of the file system that a path is on, by the table of mounts: the last that covers it.
fn file_system(path: &str, mounts: &str) -> String {
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let mut best = (0, String::new());
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(point), Some(kind)) = (left.split(' ').nth(4), right.split(' ').next()) else {
            continue;
        };
        let point = point.replace("\\040", " ");
        if path.starts_with(&point) && point.len() >= best.0 {
            best = (point.len(), kind.to_owned());
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_double_and_end_with_all() {
        assert_eq!(thread_counts(1), [1]);
        assert_eq!(thread_counts(2), [1, 2]);
        assert_eq!(thread_counts(12), [1, 2, 4, 8, 12]);
        assert_eq!(thread_counts(0), [1]);
    }

    #[test]
    fn the_innermost_mount_counts() {
        let mounts = "21 1 8:1 / / rw - ext4 /dev/sda rw\n\
                      22 21 0:5 / /x\\040y rw shared:1 - tmpfs none rw\n\
                      garbage\n";
        assert_eq!(file_system("/x y/model.safetensors", mounts), "tmpfs");
        assert_eq!(file_system("/x/model.safetensors", mounts), "ext4");
    }

    #[test]
    fn all_work_is_done_by_the_time_that_is_told() {
        let mut parts = vec![0_u8; 5];
        together(parts.iter_mut().collect(), |part| {
            std::thread::sleep(std::time::Duration::from_millis(2));
            *part += 1;
            Ok(())
        })
        .map(|seconds| assert!(seconds >= 0.002))
        .unwrap();
        assert_eq!(parts, [1; 5]);
    }
}
