//! Which way the bytes of a source take, and why.
//!
//! | what is known | way |
//! |---|---|
//! | bytes in memory, an object of another language, a server | its own reads |
//! | a network file system | large reads side by side, through the page cache, which other processes of this machine read the same files from |
//! | the page cache has it | through the page cache: five times the speed of a disk |
//! | the page cache has none of it | past the page cache |
//! | the page cache has some of it | block by block |
//! | no direct reads on this file system | through the page cache, dropped behind the load |

use std::fs::File;

use tonnage_storage::{DirectRead, MmapSource, Residency, Source, StorageKind};

use crate::Strategy;

/// How one source is read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way<'a> {
    /// Past the page cache.
    Direct(&'a dyn DirectRead),
    /// By the source's own reads.
    Buffered {
        /// Whether its pages are dropped from the page cache afterwards.
        forget: bool,
        /// Whether the page cache has them now.
        cached: bool,
    },
    /// Out of a map.
    Mapped(&'a [u8]),
    /// Block by block: direct where the page cache has less than half of it.
    Each(&'a dyn DirectRead, bool),
}

/// A way, and the reason for it in words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen<'a> {
    pub way: Way<'a>,
    /// What reports call the way.
    pub name: &'static str,
    pub reason: &'static str,
    /// Reads at once that it needs at least.
    pub threads: usize,
}

/// What of a source is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub begin: u64,
    pub end: u64,
    /// Bytes wanted between them.
    pub bytes: u64,
}

/// Less than this is not worth a look at the page cache.
const SMALL: u64 = 4 << 20;
/// A disk is near its limit with a few large reads at once: probes in C with blocks of 4 to 8 MiB gave 2.8 to 2.9 GiB/s
/// with one, 2.9 to 3.0 with two, 3.0 with sixteen.
const DISK: usize = 4;
/// A network has a longer way: more reads side by side hide it.
const NETWORK: usize = 16;
/// A file that was opened has its header in the page cache: up to this part counts as none of it.
const NONE: f64 = 0.02;
/// From this part on the rest is not worth another way.
const NEARLY_ALL: f64 = 0.98;

const fn chosen<'a>(way: Way<'a>, threads: usize, reason: &'static str) -> Chosen<'a> {
    let name = match way {
        Way::Direct(_) => "direct",
        Way::Mapped(_) => "mmap",
        Way::Each(..) => "direct and buffered",
        Way::Buffered { .. } => "buffered",
    };
    Chosen {
        way,
        name,
        reason,
        threads,
    }
}

/// The way for a range of a source, for those who read it piece by piece: [`Strategy::Direct`],
/// [`Strategy::Buffered`], or [`Strategy::Auto`] where each piece is to be looked at.
pub fn settle(source: &dyn Source, offset: u64, len: u64) -> Strategy {
    let span = Span {
        begin: offset,
        end: offset.saturating_add(len),
        bytes: len,
    };
    match auto(source, span, false).way {
        Way::Direct(_) => Strategy::Direct,
        Way::Each(..) => Strategy::Auto,
        Way::Buffered { .. } | Way::Mapped(_) => Strategy::Buffered,
    }
}

/// Chooses for one source. `scarce` says that memory is short, so nothing stays in the page cache for long.
pub(crate) fn choose<'a>(
    source: &'a dyn Source,
    map: Option<&'a MmapSource>,
    span: Span,
    strategy: Strategy,
    scarce: bool,
) -> Chosen<'a> {
    let buffered = |forget| Way::Buffered {
        forget,
        cached: false,
    };
    match strategy {
        Strategy::Direct => match source.direct() {
            Some(direct) => chosen(Way::Direct(direct), DISK, "asked for"),
            None => chosen(
                buffered(false),
                1,
                "direct reads were asked for, and there are none here",
            ),
        },
        Strategy::Buffered => chosen(buffered(false), 1, "asked for"),
        Strategy::Mmap => match map.and_then(Source::bytes).or_else(|| source.bytes()) {
            Some(bytes) => chosen(Way::Mapped(bytes), 1, "asked for"),
            None => chosen(
                buffered(false),
                1,
                "a map was asked for, and this is no file",
            ),
        },
        Strategy::Auto | Strategy::Lazy => auto(source, span, scarce),
    }
}

fn auto(source: &dyn Source, span: Span, scarce: bool) -> Chosen<'_> {
    let buffered = |forget| Way::Buffered {
        forget,
        cached: false,
    };
    match source.kind() {
        StorageKind::Memory => {
            return Chosen {
                name: "memory",
                ..chosen(buffered(false), 1, "it is in memory")
            };
        }
        StorageKind::Remote => {
            return chosen(buffered(false), 1, "the source has its own way to read");
        }
        StorageKind::Network(_) if span.bytes >= SMALL => {
            let reason = "a network file system: large reads side by side";
            return chosen(buffered(scarce), NETWORK, reason);
        }
        StorageKind::Network(_) | StorageKind::Local => {}
    }
    if span.bytes < SMALL {
        return chosen(buffered(false), 1, "it is small");
    }
    let length = span.end.saturating_sub(span.begin);
    let cached = source.residency(span.begin, length).fraction();
    match (cached, source.direct()) {
        (None, _) => chosen(
            buffered(false),
            1,
            "the system does not tell what the page cache has",
        ),
        (Some(part), _) if part >= NEARLY_ALL => {
            let way = Way::Buffered {
                forget: scarce,
                cached: true,
            };
            chosen(way, 1, "the page cache has it")
        }
        (Some(part), Some(direct)) if part <= NONE => {
            chosen(Way::Direct(direct), DISK, "the page cache does not have it")
        }
        (Some(_), Some(direct)) => chosen(
            Way::Each(direct, scarce),
            DISK,
            "the page cache has some of it",
        ),
        (Some(part), None) => chosen(
            buffered(part <= NONE || scarce),
            2 * DISK,
            "the file system has no direct reads",
        ),
    }
}

impl Way<'_> {
    /// The way for one block.
    pub fn at(self, source: &dyn Source, offset: u64, len: usize) -> Self {
        match self {
            Way::Each(direct, scarce) => match source.residency(offset, len as u64) {
                Residency::Pages { cached, total } if cached >= total.div_ceil(2) => {
                    Way::Buffered {
                        forget: scarce,
                        cached: true,
                    }
                }
                _ => Way::Direct(direct),
            },
            way => way,
        }
    }
}

/// A map of the source's file, where its own bytes are not in memory already.
pub(crate) fn map_of(source: &dyn Source) -> Option<MmapSource> {
    if source.bytes().is_some() {
        return None;
    }
    let file: File = source.file()?.try_clone().ok()?;
    MmapSource::from_file(file, source.label()).ok()
}
