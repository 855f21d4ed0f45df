//! One block: read it, cast and gather it, and say which copies bring it to its places.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tonnage_device::{Cause, Transfer};
use tonnage_storage::{DirectRead, StorageKind};

use super::block::{Block, PAGE, Part};
use super::shared::Shared;
use crate::control::Error;
use crate::strategy::Strategy;

/// A read takes about so long at most, so that a raised flag is seen in time.
const STEP: Duration = Duration::from_millis(25);
const MIN_STEP: usize = 256 << 10;
const FIRST_STEP: usize = 2 << 20;

/// How many bytes are read at once, by how fast it went so far.
#[derive(Debug)]
pub(super) struct Pace(usize);

impl Pace {
    pub fn new() -> Self {
        Pace(FIRST_STEP)
    }

    /// Bytes of the next read at most, whole pages.
    pub fn step(&self) -> usize {
        self.0.next_multiple_of(PAGE as usize)
    }

    pub fn took(&mut self, bytes: usize, time: Duration) {
        let nanos = time.as_nanos().max(1);
        let fitting = bytes as u128 * STEP.as_nanos() / nanos;
        let fitting = usize::try_from(fitting).unwrap_or(usize::MAX) / MIN_STEP * MIN_STEP;
        // A read that was slow once may be fast the next time: it grows back by doubling.
        self.0 = fitting
            .clamp(MIN_STEP, self.0.saturating_mul(2))
            .min(64 << 20);
    }
}

/// Reads past the page cache for a block, if that is the better way.
pub(super) fn direct_for(block: &Block, strategy: Strategy) -> Option<&dyn DirectRead> {
    let source = &block.source;
    let wanted = match strategy {
        Strategy::Direct => true,
        Strategy::Auto => source.kind() == StorageKind::Local && !is_cached(block),
        Strategy::Lazy | Strategy::Buffered | Strategy::Mmap => false,
    };
    let direct = source.direct().filter(|_| wanted)?;
    let align = direct.align();
    let fits = |align: usize| align.is_power_of_two() && align as u64 <= PAGE;
    (fits(align.offset) && fits(align.memory)).then_some(direct)
}

/// Whether the page cache has most of it, as far as the system tells. Where it does not tell, reading
/// through the cache loses less if that is wrong: it is 5 times as fast if the file is there, and 10 %
/// slower if it is not.
pub(super) fn is_cached(block: &Block) -> bool {
    let residency = block.source.residency(block.offset(), block.len as u64);
    residency.fraction().is_none_or(|cached| cached >= 0.5)
}

/// Reads a block into the beginning of a slot.
pub(super) fn read(
    shared: &Shared,
    block: &Block,
    slot: &mut [u8],
    pace: &mut Pace,
) -> Result<(), Error> {
    let failed = |error| Error::Storage {
        error,
        offset: block.offset(),
    };
    let wanted = block.skew + block.len;
    if let Some(direct) = direct_for(block, shared.options.strategy) {
        let room = block.read_len();
        let mut at = 0;
        while at < wanted {
            check(shared)?;
            let step = pace.step().min(room - at);
            let (dst, offset) = (part_of(slot, at, step)?, block.start + at as u64);
            let start = Instant::now();
            direct
                .read_at_least(offset, dst, step.min(wanted - at))
                .map_err(failed)?;
            pace.took(step, start.elapsed());
            at += step;
            shared.counts.reads.fetch_add(1, Ordering::Relaxed);
        }
        shared
            .counts
            .bytes_direct
            .fetch_add(room as u64, Ordering::Relaxed);
        shared
            .counts
            .bytes_read
            .fetch_add(room as u64, Ordering::Relaxed);
    } else {
        let dst = part_of(slot, block.skew, block.len)?;
        read_buffered(shared, block, dst, pace)?;
    }
    let seen = part_of(slot, block.skew, block.len)?;
    look(shared, block, seen)
}

/// Shows what was read to whoever checks it.
pub(super) fn look(shared: &Shared, block: &Block, bytes: &[u8]) -> Result<(), Error> {
    let Some(check) = &shared.options.check else {
        return Ok(());
    };
    check.check(&*block.source, block.offset(), &mut std::iter::once(bytes))
}

/// Reads a block through the page cache, and leaves that as it was found.
pub(super) fn read_buffered(
    shared: &Shared,
    block: &Block,
    dst: &mut [u8],
    pace: &mut Pace,
) -> Result<(), Error> {
    let forget = shared.options.strategy == Strategy::Auto && !is_cached(block);
    let mut offset = block.offset();
    let mut rest = dst;
    while !rest.is_empty() {
        check(shared)?;
        let (part, after) = rest.split_at_mut(pace.0.min(rest.len()));
        let start = Instant::now();
        let read = block.source.read_exact_at(offset, part);
        read.map_err(|error| Error::Storage { error, offset })?;
        pace.took(part.len(), start.elapsed());
        offset += part.len() as u64;
        shared.counts.reads.fetch_add(1, Ordering::Relaxed);
        rest = after;
    }
    shared
        .counts
        .bytes_read
        .fetch_add(block.len as u64, Ordering::Relaxed);
    if forget {
        block.source.forget(block.offset(), block.len as u64);
    }
    Ok(())
}

pub(super) fn check(shared: &Shared) -> Result<(), Error> {
    if shared.is_cancelled() {
        return Err(Error::Cancelled);
    }
    Ok(())
}

/// A part of a slot. Blocks are cut to fit, so this is never refused.
fn part_of(slot: &mut [u8], at: usize, len: usize) -> Result<&mut [u8], Error> {
    let end = at.saturating_add(len);
    slot.get_mut(at..end).ok_or_else(|| {
        let text = "a block is larger than its slot";
        let cause = Cause::Invalid(text.to_owned());
        Error::Device(tonnage_device::Error::new(
            tonnage_device::DeviceId::HOST,
            "stage",
            cause,
        ))
    })
}

/// Casts and gathers what was read, behind it.
pub(super) fn prepare(block: &Block, slot: &mut [u8]) -> Result<(), Error> {
    let (read, out) = slot.split_at_mut(block.read_len().min(slot.len()));
    for part in &block.parts {
        let Some(begin) = part.out else { continue };
        for row in 0..part.rows {
            let src = part_of(read, part.from + row * part.pitch, part.len)?;
            let dst = part_of(out, begin + row * part.out_len, part.out_len)?;
            match &part.cast {
                None => dst.copy_from_slice(src),
                Some(cast) => cast.cast(src, dst).map_err(|error| Error::Storage {
                    error: tonnage_storage::Error::new(
                        "cast",
                        block.source.label(),
                        std::io::Error::other(error),
                    ),
                    offset: block.offset(),
                })?,
            }
        }
    }
    Ok(())
}

/// The copies that bring a filled slot to its places, joined where that gives the same.
pub(super) fn transfers(block: &Block) -> Vec<Transfer> {
    let behind = block.read_len();
    let mut transfers: Vec<Transfer> = Vec::new();
    let mut slack = 0;
    for part in &block.parts {
        let next = transfer(part, behind);
        match transfers.last_mut() {
            Some(last) if joins(last, &next, slack) => last.len = next.at + next.len - last.at,
            _ => transfers.push(next),
        }
        slack = part.slack;
    }
    transfers
}

fn transfer(part: &Part, behind: usize) -> Transfer {
    match part.out {
        // Gathered rows lie side by side on both sides.
        Some(out) => Transfer::plain(
            part.memory.clone(),
            part.at,
            behind + out,
            part.out_len * part.rows,
        ),
        None => Transfer {
            rows: part.rows,
            memory_pitch: part.memory_pitch,
            slot_pitch: part.pitch,
            ..Transfer::plain(part.memory.clone(), part.at, part.from, part.len)
        },
    }
}

/// Whether one copy can do both: as far apart in the slot as in the memory, with nothing between them
/// that anybody needs.
fn joins(last: &Transfer, next: &Transfer, slack: u64) -> bool {
    let end = last.offset + last.len as u64;
    let gap = next.offset.checked_sub(end);
    (last.rows, next.rows) == (1, 1)
        && Arc::ptr_eq(&last.memory, &next.memory)
        && gap.is_some_and(|gap| gap <= slack)
        && next.at.checked_sub(last.at).map(|apart| apart as u64) == Some(next.offset - last.offset)
}
