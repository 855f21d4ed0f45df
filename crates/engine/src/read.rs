//! Reading: from sources straight into the buffers of whoever wants the bytes.
//!
//! The way is chosen for each source ([`crate::choose`]), then jobs become blocks: small neighbours joined,
//! large ones cut. A thread does a block in pieces, so that a slow disk does not keep it from looking at the
//! [`Cancel`](crate::Cancel): a piece takes the thread's time, not a number of bytes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tonnage_storage::{MmapSource, Source};

use crate::choose::{self, Chosen, Span, Way};
use crate::control::{Error, Options, Report};
use crate::direct::{self, Ring};
use crate::host::{Taker, available};
use crate::{Strategy, queue};

/// Bytes of a source that belong in a buffer.
#[derive(Debug)]
pub struct Read<'a> {
    /// Where they are.
    pub source: &'a dyn Source,
    /// The first of them.
    pub offset: u64,
    /// Where they belong; its length says how many there are.
    pub dst: &'a mut [u8],
}

/// Neighbouring bytes of one source, for one call to the system.
pub(crate) struct Block<'a> {
    pub source: &'a dyn Source,
    pub way: Way<'a>,
    pub offset: u64,
    pub len: usize,
    pub parts: Vec<&'a mut [u8]>,
    /// Whether it takes no neighbours.
    alone: bool,
}

/// Buffers in one block at most: what one `preadv` takes.
const MAX_PARTS: usize = 1024;
/// Direct blocks of large parts begin on multiples of this: no disk asks for more.
const PAGE: u64 = 4096;
/// A part of this size is read straight into its place: what its unaligned ends cost is little.
const LARGE: usize = 1 << 20;
/// Loads below this need not know how much memory is free.
const MUCH: u64 = 64 << 20;

/// Fills every buffer. When this fails, the content of the buffers is unspecified.
///
/// # Errors
/// The first failure of a source, or that the run was cancelled.
pub fn read(mut jobs: Vec<Read<'_>>, options: &Options<'_>) -> Result<Report, Error> {
    jobs.iter_mut().for_each(|job| Taker::prepare(job.dst));
    let address = |source: &dyn Source| std::ptr::from_ref(source).cast::<()>().addr();
    // Sources are told apart by address: jobs of one file come together and in the order of its bytes.
    jobs.sort_by_key(|job| (address(job.source), job.offset));
    let mut groups: Vec<Vec<Read<'_>>> = Vec::new();
    for job in jobs {
        match groups.last_mut() {
            Some(group) if std::ptr::addr_eq(group[0].source, job.source) => group.push(job),
            _ => groups.push(vec![job]),
        }
    }
    let spans: Vec<Span> = groups.iter().map(|group| span(group)).collect();
    let maps: Vec<Option<MmapSource>> = match options.strategy {
        Strategy::Mmap => groups.iter().map(|g| choose::map_of(g[0].source)).collect(),
        _ => groups.iter().map(|_| None).collect(),
    };
    let total: u64 = spans.iter().map(|span| span.bytes).sum();
    let scarce = total >= MUCH && available().is_some_and(|free| total > free / 2);
    let choices: Vec<Chosen<'_>> = (groups.iter().zip(&spans).zip(&maps))
        .map(|((group, span), map)| {
            choose::choose(
                group[0].source,
                map.as_ref(),
                *span,
                options.strategy,
                scarce,
            )
        })
        .collect();
    let mut blocks = Vec::new();
    let mut forgotten = Vec::new();
    for ((group, choice), span) in groups.into_iter().zip(&choices).zip(&spans) {
        let (source, first) = (group[0].source, blocks.len());
        cut(group, choice.way, options, &mut blocks);
        match choice.way {
            Way::Buffered { forget: true, .. } => forgotten.push((source, *span)),
            Way::Each(..) => {
                // Decided now: what the system reads ahead of a cached block would make the next look cached.
                for block in blocks.iter_mut().skip(first) {
                    block.way = block.way.at(source, block.offset, block.len);
                }
                forgotten.extend(blocks.iter().skip(first).filter_map(Block::not_cached));
            }
            _ => {}
        }
    }
    let report = run(blocks, &choices, options);
    // What the system read ahead of cached blocks as well.
    for (source, span) in forgotten {
        source.forget(span.begin, span.end.saturating_sub(span.begin));
    }
    let mut report = report?;
    (report.strategy, report.reason) = said(&choices, &spans);
    Ok(report)
}

fn span(group: &[Read<'_>]) -> Span {
    let end = |job: &Read<'_>| job.offset.saturating_add(job.dst.len() as u64);
    Span {
        begin: group.first().map_or(0, |job| job.offset),
        end: group.iter().map(end).max().unwrap_or(0),
        bytes: group.iter().map(|job| job.dst.len() as u64).sum(),
    }
}

/// The report's words: the ways that were taken, and the reason for the one that moved the most bytes.
fn said(choices: &[Chosen<'_>], spans: &[Span]) -> (&'static str, &'static str) {
    let largest = (choices.iter().zip(spans)).max_by_key(|(_, span)| span.bytes);
    let Some((chosen, _)) = largest else {
        return ("none", "nothing was wanted");
    };
    let same = choices.iter().all(|other| other.name == chosen.name);
    let name = if same { chosen.name } else { "several" };
    (name, chosen.reason)
}

fn run(
    blocks: Vec<Block<'_>>,
    choices: &[Chosen<'_>],
    options: &Options<'_>,
) -> Result<Report, Error> {
    let least = choices.iter().map(|choice| choice.threads).max();
    let options = Options {
        threads: options
            .threads
            .or_else(|| Some(Options::cores().max(least.unwrap_or(1)))),
        ..*options
    };
    let taker = Taker::default();
    let staging = AtomicU64::new(0);
    let mut report = queue::for_each_block(
        blocks,
        &options,
        "read",
        |block| block.len as u64,
        || Reader {
            ring: Ring::new(&staging),
            pace: Pace::default(),
            taker: &taker,
            options: &options,
        },
        Reader::block,
    )?;
    report.peak_staging = staging.load(Ordering::Relaxed);
    Ok(report)
}

/// One thread at work.
struct Reader<'a> {
    ring: Ring<'a>,
    pace: Pace,
    taker: &'a Taker,
    options: &'a Options<'a>,
}

impl Reader<'_> {
    fn block(&mut self, mut block: Block<'_>) -> Result<(), Error> {
        while let Some(mut piece) = block.split(self.pace.len(block.way)) {
            if self
                .options
                .cancel
                .is_some_and(|cancel| cancel.is_cancelled())
            {
                return Err(Error::Cancelled);
            }
            let start = Instant::now();
            self.piece(&mut piece)?;
            self.pace.took(piece.len, start.elapsed());
        }
        Ok(())
    }

    fn piece(&mut self, piece: &mut Block<'_>) -> Result<(), Error> {
        for part in &mut piece.parts {
            if part.len() >= FEW_PAGES {
                self.taker.take(part);
            }
        }
        let result = match piece.way {
            Way::Direct(direct) | Way::Each(direct, _) => {
                direct::read(direct, piece, &mut self.ring)
            }
            Way::Mapped(bytes) => copy_out(piece, bytes),
            Way::Buffered { forget, .. } => {
                let result = plain(piece);
                if forget {
                    // Whole pages, and those at the ends are not needed again but by a neighbour.
                    let begin = piece.offset / PAGE * PAGE;
                    let end = piece.offset.saturating_add(piece.len as u64);
                    piece
                        .source
                        .forget(begin, end.next_multiple_of(PAGE) - begin);
                }
                result
            }
        };
        result.map_err(|error| {
            let (error, offset) = locate(piece, error);
            Error::Storage { error, offset }
        })?;
        match self.options.check {
            Some(check) => {
                let mut parts = piece.parts.iter().map(|part| &**part);
                check.check(piece.source, piece.offset, &mut parts)
            }
            None => Ok(()),
        }
    }
}

/// Memory of fewer pages is touched as it is filled.
const FEW_PAGES: usize = 64 << 10;

fn plain(piece: &mut Block<'_>) -> Result<(), tonnage_storage::Error> {
    match &mut piece.parts[..] {
        [dst] => piece.source.read_exact_at(piece.offset, dst),
        parts => piece.source.read_vectored_at(piece.offset, parts),
    }
}

fn copy_out(piece: &mut Block<'_>, bytes: &[u8]) -> Result<(), tonnage_storage::Error> {
    let mut at = usize::try_from(piece.offset).unwrap_or(usize::MAX);
    for part in &mut piece.parts {
        let end = at.saturating_add(part.len());
        let Some(from) = bytes.get(at..end) else {
            // The map is shorter: the file says how long it is now.
            return piece.source.read_exact_at(at as u64, part);
        };
        part.copy_from_slice(from);
        at = end;
    }
    Ok(())
}

/// The first part of a failed piece that can't be read for itself, and what its source says of it.
fn locate(piece: &mut Block<'_>, error: tonnage_storage::Error) -> (tonnage_storage::Error, u64) {
    let mut offset = piece.offset;
    if piece.parts.len() > 1 {
        for part in &mut piece.parts {
            if let Err(error) = piece.source.read_exact_at(offset, part) {
                return (error, offset);
            }
            offset = offset.saturating_add(part.len() as u64);
        }
    }
    (error, piece.offset)
}

/// How many bytes a thread reads between two looks at the flag that ends the run: by the time they take.
struct Pace(usize);

impl Pace {
    /// Longest piece; a block is never longer.
    const MOST: usize = Options::BLOCK;
    /// The first piece.
    const FIRST: usize = 1 << 20;
    /// Shortest piece: below this, calls would cost more than bytes.
    const LEAST: usize = 256 << 10;
    /// What a copy out of the page cache takes at once: it stays in the processor's cache together with the
    /// pages it is copied to, which were cleared just before.
    const CACHED: usize = 2 << 20;

    fn len(&self, way: Way<'_>) -> usize {
        match way {
            Way::Buffered { cached: true, .. } => self.0.min(Self::CACHED),
            _ => self.0,
        }
    }

    fn took(&mut self, len: usize, time: Duration) {
        // A read that lasts can't be stopped: what is aimed at stays well below the tenth of a second within which a
        // run ends. Less than that is usual on a busy machine, and no reason for small reads.
        if time > Duration::from_millis(60) {
            let fits = len as f64 * 0.03 / time.as_secs_f64();
            self.0 = (fits as usize)
                .next_multiple_of(PAGE as usize)
                .max(Self::LEAST);
        } else if time < Duration::from_millis(25) && len >= self.0 {
            self.0 = (self.0 * 2).min(Self::MOST);
        }
    }
}

impl Default for Pace {
    fn default() -> Self {
        // Nobody knows yet how slow the source is; a fast one has three reads more.
        Pace(Self::FIRST)
    }
}

impl<'a> Block<'a> {
    /// The block's bytes, if they are read past the page cache because it does not have them.
    fn not_cached(&self) -> Option<(&'a dyn Source, Span)> {
        let end = self.offset.saturating_add(self.len as u64);
        let span = Span {
            begin: self.offset,
            end,
            bytes: self.len as u64,
        };
        matches!(self.way, Way::Direct(_)).then_some((self.source, span))
    }

    /// Takes the first `len` bytes or less off; none from an empty block.
    fn split(&mut self, len: usize) -> Option<Block<'a>> {
        if self.len == 0 {
            return None;
        }
        let mut piece = Block {
            parts: Vec::new(),
            len: 0,
            ..*self
        };
        if self.len <= len {
            piece.parts = std::mem::take(&mut self.parts);
            piece.len = std::mem::take(&mut self.len);
            return Some(piece);
        }
        let mut rest = std::mem::take(&mut self.parts).into_iter();
        for part in rest.by_ref() {
            let room = len - piece.len;
            let (taken, left) = part.split_at_mut(room.min(part.len()));
            piece.len += taken.len();
            piece.parts.push(taken);
            if !left.is_empty() || piece.len == len {
                self.parts.extend((!left.is_empty()).then_some(left));
                break;
            }
        }
        self.parts.extend(rest);
        self.len -= piece.len;
        self.offset = self.offset.saturating_add(piece.len as u64);
        Some(piece)
    }
}

/// Joins small neighbours and cuts what is large, so that every block but the last of a run is large.
fn cut<'a>(group: Vec<Read<'a>>, way: Way<'a>, options: &Options<'_>, into: &mut Vec<Block<'a>>) {
    let first = into.len();
    let size = options.block();
    let direct = matches!(way, Way::Direct(_) | Way::Each(..));
    for Read {
        source,
        mut offset,
        mut dst,
    } in group
    {
        // A large part that is read straight into its place shares its blocks with no other.
        let alone = direct && dst.len() >= LARGE;
        while !dst.is_empty() {
            let room = match into.get(first..).and_then(<[_]>::last) {
                Some(last) if !alone && follows(last, offset) => size.saturating_sub(last.len),
                _ => 0,
            };
            let mut take = if room == 0 { size } else { room };
            if alone {
                // The next block of it begins on a page of the file.
                take = take
                    .saturating_sub((offset % PAGE) as usize)
                    .max(PAGE as usize);
            }
            let (part, rest) = dst.split_at_mut(take.min(dst.len()));
            let len = part.len();
            match into.last_mut() {
                Some(last) if room > 0 => {
                    last.len += len;
                    last.parts.push(part);
                }
                _ => into.push(Block {
                    source,
                    way,
                    offset,
                    len,
                    parts: vec![part],
                    alone,
                }),
            }
            offset = offset.saturating_add(len as u64);
            dst = rest;
        }
    }
}

fn follows(last: &Block<'_>, offset: u64) -> bool {
    !last.alone
        && last.offset.checked_add(last.len as u64) == Some(offset)
        && last.parts.len() < MAX_PARTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_grow_while_they_are_quick_and_shrink_when_one_lasts() {
        let mut pace = Pace::default();
        assert_eq!(pace.0, Pace::FIRST);
        let (quick, usual, long) = (
            Duration::from_millis(1),
            Duration::from_millis(40),
            Duration::from_millis(300),
        );
        pace.took(Pace::FIRST, usual);
        assert_eq!(pace.0, Pace::FIRST);
        pace.took(Pace::FIRST / 2, quick);
        assert_eq!(pace.0, Pace::FIRST, "the end of a block says nothing");
        for _ in 0..8 {
            pace.took(pace.0, quick);
        }
        assert_eq!(pace.0, Pace::MOST);
        pace.took(pace.0, long);
        // What takes 30 ms at that speed.
        assert_eq!(
            pace.0,
            (Pace::MOST / 10).next_multiple_of(PAGE as usize),
            "{}",
            pace.0
        );
        pace.took(pace.0, Duration::from_secs(60));
        assert_eq!(pace.0, Pace::LEAST);
    }
}
