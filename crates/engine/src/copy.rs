//! Copying from sources to a sink through one staging buffer a thread.

use tonnage_storage::{Sink, Source};

use crate::control::{Error, Options, Report};
use crate::put::{Put, put};

/// Bytes of a source that belong at a place of a sink.
#[derive(Clone, Copy, Debug)]
pub struct Copy<'a> {
    /// Where they are.
    pub source: &'a dyn Source,
    /// The first of them there.
    pub from: u64,
    /// Where the first of them belongs.
    pub to: u64,
    /// How many there are.
    pub len: u64,
}

/// Copies every range. Ranges of the sink must not overlap. Memory: threads × block.
///
/// # Errors
/// The first failure of a source or the sink, or that the run was cancelled.
pub fn copy(sink: &dyn Sink, jobs: &[Copy<'_>], options: &Options<'_>) -> Result<Report, Error> {
    let puts: Vec<Put<'_>> = jobs
        .iter()
        .map(|job| Put::source(job.to, job.source, job.from, job.len))
        .collect();
    put(sink, &puts, None, options)
}
