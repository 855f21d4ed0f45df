//! Blocks that go from a file straight to a card's memory, by GPUDirect Storage.
//!
//! ```text
//!  file      ─┬────────┬────────┬────────┬─      pages
//!  wanted         ├──────── bytes ───────────┤
//!  blocks         │head│  straight      │tail│    head and tail go through the ring
//! ```
//!
//! It is opt-in, and what it can't do the ring does: a file system without it, a read that failed or came short. So a
//! file that is truncated or unreadable gives the same error, with the same names, as without it. Bytes that are to be
//! checked, cast or gathered have to be seen by the host, and go through the ring, too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonnage_device::gds::{GdsFile, Use};
use tonnage_device::{Device, Kind};
use tonnage_storage::Source;

use super::block::{Block, PAGE, Part};
use super::options::PipelineOptions;
use crate::strategy::Strategy;

/// Shorter ranges are not worth a call of their own.
const LEAST: u64 = 64 << 10;

type Known = (Arc<dyn Source>, Option<Arc<GdsFile>>);

/// The files of a pipeline that cuFile reads, and why it does not read others.
#[derive(Debug, Default)]
pub(super) struct Straight {
    files: Mutex<Vec<Known>>,
    refused: Mutex<Option<String>>,
}

impl Straight {
    fn files(&self) -> MutexGuard<'_, Vec<Known>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file behind a source; none if cuFile does not take it.
    pub fn file(
        &self,
        source: &Arc<dyn Source>,
        options: &PipelineOptions,
    ) -> Option<Arc<GdsFile>> {
        let Use::On(gds) = &options.gds else {
            return None;
        };
        let mut files = self.files();
        if let Some((_, file)) = files.iter().find(|(of, _)| Arc::ptr_eq(of, source)) {
            return file.clone();
        }
        let taken = source.direct().and_then(|direct| direct.descriptor());
        let file = taken.and_then(|taken| match gds.file(taken) {
            Ok(file) => Some(Arc::new(file)),
            Err(error) => {
                self.note(format!("{}: {}", source.label(), error.cause()));
                None
            }
        });
        files.push((Arc::clone(source), file.clone()));
        file
    }

    /// From now on this source is read through the ring.
    pub fn refuse(&self, source: &Arc<dyn Source>, why: String) {
        let mut files = self.files();
        for (of, file) in files.iter_mut() {
            if Arc::ptr_eq(of, source) {
                *file = None;
            }
        }
        drop(files);
        self.note(why);
    }

    /// The first reason counts.
    fn note(&self, why: String) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.get_or_insert(why);
    }

    /// Why something was read through the ring after all.
    pub fn refused(&self) -> Option<String> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.clone()
    }
}

/// Why it is not used, where it was asked for.
pub(super) fn why_not(options: &PipelineOptions, devices: &[Arc<dyn Device>]) -> Option<String> {
    match &options.gds {
        Use::Off => None,
        Use::Not(why) => Some(why.clone()),
        Use::On(_) if options.check.is_some() => {
            Some("bytes are compared with checksums on their way through the host".to_owned())
        }
        Use::On(_) if !matches!(options.strategy, Strategy::Auto | Strategy::Direct) => {
            Some(format!(
                "strategy {:?} goes through the page cache",
                options.strategy.name()
            ))
        }
        Use::On(_) if !devices.iter().any(|device| is_cuda(&**device)) => {
            Some("it is for CUDA devices".to_owned())
        }
        Use::On(_) => None,
    }
}

/// Whether pieces for this device may go straight there.
pub(super) fn goes(options: &PipelineOptions, device: &dyn Device) -> bool {
    let suits = matches!(options.strategy, Strategy::Auto | Strategy::Direct);
    matches!(options.gds, Use::On(_)) && options.check.is_none() && suits && is_cuda(device)
}

fn is_cuda(device: &dyn Device) -> bool {
    device.info().id.kind == Kind::Cuda
}

/// Cuts the parts out of blocks that are to go straight, if any is.
pub(super) fn cut(
    blocks: Vec<Block>,
    options: &PipelineOptions,
    devices: &[Arc<dyn Device>],
) -> Vec<Block> {
    let mut all = Vec::with_capacity(blocks.len());
    for block in blocks {
        let fits = devices
            .get(block.device)
            .is_some_and(|device| goes(options, &**device))
            && block.source.file().is_some();
        match &block.parts[..] {
            [part] if fits && plain(&block, part) => split(&block, part, &mut all),
            _ => all.push(block),
        }
    }
    all
}

/// Whether a block is one range that goes to the memory as it is.
fn plain(block: &Block, part: &Part) -> bool {
    let (begin, end) = inner(block);
    !block.mapped
        && part.rows == 1
        && part.out.is_none()
        && part.cast.is_none()
        && (part.from, part.len) == (block.skew, block.len)
        && end.saturating_sub(begin) >= LEAST
}

/// The whole pages of a block.
fn inner(block: &Block) -> (u64, u64) {
    (
        block.offset().next_multiple_of(PAGE),
        block.end() / PAGE * PAGE,
    )
}

fn split(block: &Block, part: &Part, all: &mut Vec<Block>) {
    let (begin, end) = inner(block);
    let ranges = [
        (block.offset(), begin, false),
        (begin, end, true),
        (end, block.end(), false),
    ];
    for (from, to, gds) in ranges.into_iter().filter(|(from, to, _)| from < to) {
        let mut one = Block::new(&block.source, block.device, false, from);
        one.len = (to - from) as usize;
        one.gds = gds;
        one.parts.push(Part {
            from: one.skew,
            len: one.len,
            rows: 1,
            pitch: 0,
            out: None,
            out_len: one.len,
            memory: part.memory.clone(),
            at: part.at + (from - block.offset()),
            memory_pitch: 0,
            slack: if to == block.end() { part.slack } else { 0 },
            tag: part.tag,
            cast: None,
        });
        all.push(one);
    }
}
