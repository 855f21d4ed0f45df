//! Writing out of the caller's memory.

use tonnage_storage::Sink;

use crate::control::{Error, Options, Report};
use crate::put::{Put, put};

/// Bytes that belong at a place of a sink.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// Where the first of them belongs.
    pub offset: u64,
    /// The bytes.
    pub data: &'a [u8],
}

/// Writes every piece. Pieces must not overlap. When this fails, some of them may have been written.
///
/// # Errors
/// The first failure of the sink, or that the run was cancelled.
pub fn write(sink: &dyn Sink, jobs: &[Write<'_>], options: &Options<'_>) -> Result<Report, Error> {
    let puts: Vec<Put<'_>> = jobs
        .iter()
        .map(|job| Put::bytes(job.offset, job.data))
        .collect();
    put(sink, &puts, None, options)
}
