//! Writing from anywhere: memory, a source, or whatever makes bytes block by block.
//!
//! There are two ways to a sink. A file that is to be durable on a local disk is written past the page
//! cache ([`Sink::direct`]): the bytes are gathered in aligned staging blocks, a block a thread, and go to
//! the disk from there; that was at the disk's own rate where it was measured (BENCHMARKS.md). Everywhere
//! else large pieces of memory are written from where they lie, and the rest is gathered first.

use tonnage_storage::{DirectWrite, Sink, Source};

use crate::checksum::Sums;
use crate::control::{Check, Error, Options, Report};
use crate::queue;

/// Bytes that belong at a place of a sink.
#[derive(Clone, Copy, Debug)]
pub struct Put<'a> {
    /// Where the first of them belongs.
    pub offset: u64,
    /// How many there are.
    pub len: u64,
    /// Where they come from.
    pub from: Origin<'a>,
}

/// Where bytes come from.
#[derive(Clone, Copy)]
pub enum Origin<'a> {
    /// Memory; as many bytes as [`Put::len`] says.
    Bytes(&'a [u8]),
    /// A source, from this byte on.
    Source(&'a dyn Source, u64),
    /// Something that makes them when their turn comes.
    Fill(&'a dyn Fill),
}

/// Makes bytes block by block: casts, copies from a device.
pub trait Fill: Sync {
    /// Makes the bytes from `at` on, counted from the first that it can make, and fills `dst` with them.
    /// It is called from several threads at once, in any order, for each byte once.
    ///
    /// # Errors
    /// Whatever ends the run.
    fn fill(&self, at: u64, dst: &mut [u8]) -> Result<(), Error>;
}

impl std::fmt::Debug for Origin<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Bytes(data) => write!(f, "Bytes({})", data.len()),
            Origin::Source(source, at) => write!(f, "Source({:?}, {at})", source.label()),
            Origin::Fill(_) => f.write_str("Fill"),
        }
    }
}

impl<'a> Put<'a> {
    /// Memory.
    pub fn bytes(offset: u64, data: &'a [u8]) -> Self {
        Put {
            offset,
            len: data.len() as u64,
            from: Origin::Bytes(data),
        }
    }

    /// `len` bytes of a source, from `at` on.
    pub fn source(offset: u64, source: &'a dyn Source, at: u64, len: u64) -> Self {
        Put {
            offset,
            len,
            from: Origin::Source(source, at),
        }
    }

    /// `len` bytes that are made.
    pub fn fill(offset: u64, len: u64, fill: &'a dyn Fill) -> Self {
        Put {
            offset,
            len,
            from: Origin::Fill(fill),
        }
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Some bytes of a put: `len` of them, from its byte `at` on.
#[derive(Clone, Copy)]
struct Part<'a> {
    from: Origin<'a>,
    at: u64,
    len: usize,
}

/// Neighbouring parts, for one call to the system.
struct Block<'a> {
    offset: u64,
    len: usize,
    parts: Vec<Part<'a>>,
}

/// Pieces of memory below this are copied together before they are written: a call for each would cost more.
const SMALL: usize = 256 << 10;
/// Bytes of a staging block for direct writes.
const STAGING: usize = 4 << 20;
/// Threads that write directly, by default and at most: the disk is busy with two, the others fill
/// their blocks meanwhile. Together their blocks stay far below the 64 MiB that a save may take.
const WRITERS: (usize, usize) = (3, 8);
/// Below this a save is as soon done through the page cache.
const DIRECT_FROM: u64 = 8 << 20;

/// Writes every put. They must not overlap. When this fails, some of them may have been written. `sums`
/// are fed with what is written, each byte once; [`Options::check`] looks at what is read from sources, before it
/// is written. Memory: threads × block.
///
/// # Errors
/// The first failure of a source, of the check, of what makes bytes, or of the sink; or that the run was cancelled.
pub fn put(
    sink: &dyn Sink,
    puts: &[Put<'_>],
    sums: Option<&Sums>,
    options: &Options<'_>,
) -> Result<Report, Error> {
    let total = puts
        .iter()
        .fold(0, |sum: u64, put| sum.saturating_add(put.len));
    let direct = sink.direct().filter(|_| total >= DIRECT_FROM);
    let (size, threads) = match direct {
        Some(_) => {
            let threads = options.threads.unwrap_or(WRITERS.0).clamp(1, WRITERS.1);
            (STAGING, Some(threads))
        }
        None => (options.block(), options.threads),
    };
    let options = Options {
        threads,
        ..*options
    };
    let blocks = cut(join(puts), size as u64);
    let looks = Looks {
        sums,
        check: options.check,
    };
    queue::for_each_block(
        blocks,
        &options,
        if direct.is_some() { "direct" } else { "write" },
        |block| block.len as u64,
        Staging::default,
        |staging, block| match direct {
            Some(direct) => write_directly(sink, direct, &block, staging, looks),
            None => write_through(sink, &block, staging, looks),
        },
    )
}

/// The puts in the order of the sink, those of a source joined where they are neighbours on both sides.
fn join<'a>(puts: &[Put<'a>]) -> Vec<Put<'a>> {
    let mut puts: Vec<Put<'a>> = puts.iter().filter(|put| put.len > 0).copied().collect();
    puts.sort_by_key(|put| put.offset);
    let mut joined: Vec<Put<'a>> = Vec::with_capacity(puts.len());
    for put in puts {
        if let (Some(last), Origin::Source(source, at)) = (joined.last_mut(), put.from)
            && let Origin::Source(before, begin) = last.from
            && std::ptr::addr_eq(before, source)
            && begin.checked_add(last.len) == Some(at)
            && last.end() == put.offset
        {
            last.len = last.len.saturating_add(put.len);
            continue;
        }
        joined.push(put);
    }
    joined
}

/// Cuts what is written at multiples of `size`, so that every block but those at the seams is full.
fn cut<'a>(puts: Vec<Put<'a>>, size: u64) -> Vec<Block<'a>> {
    let mut blocks: Vec<Block<'a>> = Vec::new();
    for put in puts {
        let mut done = 0;
        while done < put.len {
            let offset = put.offset.saturating_add(done);
            let room = size - offset % size;
            // At most a block, so it fits.
            let len = room.min(put.len - done) as usize;
            let part = Part {
                from: put.from,
                at: done,
                len,
            };
            done += len as u64;
            match blocks.last_mut() {
                Some(last)
                    if last.offset.checked_add(last.len as u64) == Some(offset)
                        && !offset.is_multiple_of(size) =>
                {
                    last.len += len;
                    last.parts.push(part);
                }
                _ => blocks.push(Block {
                    offset,
                    len,
                    parts: vec![part],
                }),
            }
        }
    }
    blocks
}

/// Memory for a block, aligned as its bytes will be in the file.
#[derive(Default)]
struct Staging(Vec<u8>);

impl Staging {
    /// Room for `len` bytes, the first of which is `skew` bytes behind a multiple of `align`.
    fn room(&mut self, len: usize, align: usize, skew: usize) -> &mut [u8] {
        let needed = len + 2 * align;
        if self.0.len() < needed {
            // What it held is of no use.
            self.0.clear();
            self.0.resize(needed, 0);
        }
        let begin = self.0.as_ptr().align_offset(align).min(align) + skew;
        &mut self.0[begin..begin + len]
    }
}

impl Part<'_> {
    /// The bytes, where they lie in memory.
    fn in_memory(&self) -> Option<Result<&[u8], Error>> {
        let Origin::Bytes(data) = self.from else {
            return None;
        };
        let at = usize::try_from(self.at).unwrap_or(usize::MAX);
        let found = at.checked_add(self.len).and_then(|end| data.get(at..end));
        Some(found.ok_or_else(|| {
            let short = std::io::Error::other("fewer bytes were given than announced");
            Error::Storage {
                error: tonnage_storage::Error::new("write", "memory", short),
                offset: self.at,
            }
        }))
    }

    fn fill(&self, dst: &mut [u8], check: Option<&dyn Check>) -> Result<(), Error> {
        match self.from {
            Origin::Bytes(_) => {
                if let Some(data) = self.in_memory() {
                    dst.copy_from_slice(data?);
                }
                Ok(())
            }
            Origin::Source(source, begin) => {
                let offset = begin.saturating_add(self.at);
                let read = source.read_exact_at(offset, dst);
                read.map_err(|error| Error::Storage { error, offset })?;
                match check {
                    Some(check) => check.check(source, offset, &mut [&*dst].into_iter()),
                    None => Ok(()),
                }
            }
            Origin::Fill(fill) => fill.fill(self.at, dst),
        }
    }
}

/// Who looks at the bytes on their way.
#[derive(Clone, Copy)]
struct Looks<'a> {
    /// At what is written.
    sums: Option<&'a Sums>,
    /// At what is read.
    check: Option<&'a dyn Check>,
}

fn gather(parts: &[Part<'_>], mut dst: &mut [u8], check: Option<&dyn Check>) -> Result<(), Error> {
    for part in parts {
        let (now, rest) = dst.split_at_mut(part.len);
        part.fill(now, check)?;
        dst = rest;
    }
    Ok(())
}

/// Gathers a block and writes it past the page cache, but for the ends that are no whole pages: their
/// other halves belong to other blocks, or to a header that is not known yet.
fn write_directly(
    sink: &dyn Sink,
    direct: &dyn DirectWrite,
    block: &Block<'_>,
    staging: &mut Staging,
    looks: Looks<'_>,
) -> Result<(), Error> {
    let align = direct.align().max(1);
    let skew = (block.offset % align as u64) as usize;
    let bytes = staging.room(block.len, align, skew);
    gather(&block.parts, bytes, looks.check)?;
    if let Some(sums) = looks.sums {
        sums.feed(block.offset, [&*bytes]);
    }
    let failed = |offset| move |error| Error::Storage { error, offset };
    let head = ((align - skew) % align).min(block.len);
    let (head, rest) = bytes.split_at(head);
    let (body, tail) = rest.split_at(rest.len() - rest.len() % align);
    let at = |before: usize| block.offset.saturating_add(before as u64);
    if !head.is_empty() {
        sink.write_all_at(block.offset, head)
            .map_err(failed(block.offset))?;
    }
    if !body.is_empty() {
        let offset = at(head.len());
        direct
            .write_direct_at(offset, body)
            .map_err(failed(offset))?;
    }
    if !tail.is_empty() {
        let offset = at(head.len() + body.len());
        sink.write_all_at(offset, tail).map_err(failed(offset))?;
    }
    Ok(())
}

/// Writes a block through the page cache: large pieces of memory from where they lie, the rest gathered.
fn write_through(
    sink: &dyn Sink,
    block: &Block<'_>,
    staging: &mut Staging,
    looks: Looks<'_>,
) -> Result<(), Error> {
    let write = |offset: u64, bytes: &[u8]| {
        if let Some(sums) = looks.sums {
            sums.feed(offset, [bytes]);
        }
        sink.write_all_at(offset, bytes)
            .map_err(|error| Error::Storage { error, offset })
    };
    let is_large = |part: &Part<'_>| part.len >= SMALL && part.in_memory().is_some();
    let mut offset = block.offset;
    for parts in block.parts.chunk_by(|a, b| !is_large(a) && !is_large(b)) {
        let len = parts.iter().map(|part| part.len).sum();
        match parts {
            [part] if part.in_memory().is_some() => {
                if let Some(bytes) = part.in_memory() {
                    write(offset, bytes?)?;
                }
            }
            parts => {
                let bytes = staging.room(len, 1, 0);
                gather(parts, bytes, looks.check)?;
                write(offset, bytes)?;
            }
        }
        offset = offset.saturating_add(len as u64);
    }
    sink.start_writeback(block.offset, block.len as u64);
    Ok(())
}
