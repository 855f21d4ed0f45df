//! What a run is told, and what it tells.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Strategy;
use tonnage_storage::Source;

use crate::checksum::BadChunk;

/// A flag that ends a run from outside. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A flag that is not raised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises the flag: no further block is started.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the flag is raised.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How far a run is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Called after each block, from the threads that work.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Sync);

/// Looks at what is read. Called from the threads that read, for each block when it is there.
pub trait Check: Sync {
    /// The bytes of a source from `offset` on, in as many parts as they were read into.
    ///
    /// # Errors
    /// What ends the run, such as [`Error::Corrupt`].
    fn check(
        &self,
        source: &dyn Source,
        offset: u64,
        parts: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<(), Error>;
}

/// How to run. The default suits a local disk.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Threads at work; by default one for each core, at most [`Options::MAX_THREADS`], and as many more as a
    /// disk or a network needs to be busy.
    pub threads: Option<usize>,
    /// Bytes of a block; by default [`Options::BLOCK`].
    pub block: Option<usize>,
    /// Told how far the run is.
    pub progress: Option<OnProgress<'a>>,
    /// Ends the run.
    pub cancel: Option<&'a Cancel>,
    /// How sources are read.
    pub strategy: Strategy,
    /// Looks at what [`crate::read()`] and [`crate::put()`] read from sources.
    pub check: Option<&'a dyn Check>,
}

impl Options<'_> {
    /// Threads taken by default at most: more do not make a local disk faster.
    pub const MAX_THREADS: usize = 8;
    /// Bytes of a block by default. Measured: from 4 MiB on, a local disk is at its limit.
    pub const BLOCK: usize = 8 << 20;

    pub(crate) fn threads(&self, blocks: usize) -> usize {
        self.threads.unwrap_or_else(Self::cores).min(blocks).max(1)
    }

    /// Threads that have a core each, at most [`Options::MAX_THREADS`].
    pub(crate) fn cores() -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        cores.min(Self::MAX_THREADS)
    }

    pub(crate) fn block(&self) -> usize {
        // A block below a page would be all overhead.
        self.block.unwrap_or(Self::BLOCK).max(4096)
    }
}

impl fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("threads", &self.threads)
            .field("block", &self.block)
            .field("progress", &self.progress.is_some())
            .field("cancel", &self.cancel)
            .field("strategy", &self.strategy)
            .field("check", &self.check.is_some())
            .finish()
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Wall-clock time.
    pub seconds: f64,
    /// Bytes moved.
    pub bytes: u64,
    /// Threads that worked.
    pub threads: usize,
    /// The way taken: of reads "direct", "buffered", "direct and buffered", "mmap", "memory", or "several" for
    /// sources that differ; else "write", "direct", "read and cast".
    pub strategy: &'static str,
    /// Why this way was taken.
    pub reason: &'static str,
    /// Bytes of memory that were used besides the buffers.
    pub peak_staging: u64,
}

impl Report {
    /// Gigabytes (10^9) a second; 0 for a run too short to time.
    pub fn gb_per_s(&self) -> f64 {
        if self.seconds > 0.0 {
            self.bytes as f64 / self.seconds / 1e9
        } else {
            0.0
        }
    }
}

/// Why a run ended early.
#[derive(Debug)]
pub enum Error {
    /// A source or a sink failed at this byte.
    Storage {
        /// What it said.
        error: tonnage_storage::Error,
        /// First byte of the failed block, in the file that the error names.
        offset: u64,
    },
    /// A device or its driver failed.
    Device(tonnage_device::Error),
    /// Bytes that were read are not those that were written.
    Corrupt {
        /// What the source is called.
        label: String,
        /// Where, and how that was seen.
        bad: BadChunk,
    },
    /// The [`Cancel`] was raised.
    Cancelled,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Storage { error, .. } => error.fmt(f),
            Error::Device(error) => error.fmt(f),
            Error::Corrupt { label, bad } => write!(f, "{label}: {bad}"),
            Error::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Storage { error, .. } => Some(error),
            Error::Device(error) => Some(error),
            Error::Corrupt { .. } | Error::Cancelled => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fit_the_work_and_speed_is_per_second() {
        let options = Options::default();
        assert_eq!((options.threads(0), options.threads(1)), (1, 1));
        assert!(options.threads(100) <= Options::MAX_THREADS);
        assert_eq!(
            Options {
                threads: Some(99),
                ..options
            }
            .threads(50),
            50
        );
        assert_eq!(
            (
                options.block(),
                Options {
                    block: Some(0),
                    ..options
                }
                .block()
            ),
            (8 << 20, 4096)
        );
        assert!(format!("{options:?}").contains("progress: false"));
        let report = Report {
            seconds: 2.0,
            bytes: 4_000_000_000,
            ..Report::default()
        };
        assert_eq!(
            (report.gb_per_s(), Report::default().gb_per_s()),
            (2.0, 0.0)
        );
    }
}
