//! Copying from sources to a sink through one staging buffer a thread.

use tonnage_storage::{Sink, Source};

use crate::control::{Error, Options, Report};
use crate::queue;

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
    let size = options.block() as u64;
    let mut jobs = jobs.to_vec();
    jobs.sort_by_key(|job| job.to);
    let blocks: Vec<Copy<'_>> = join(jobs)
        .into_iter()
        .flat_map(|job| cut(job, size))
        .collect();
    queue::for_each_block(
        blocks,
        options,
        "copy",
        |block| block.len,
        Vec::new,
        |staging: &mut Vec<u8>, block| {
            // At most one block, so the length fits.
            let len = block.len as usize;
            if staging.len() < len {
                staging.resize(len, 0);
            }
            let staging = &mut staging[..len];
            let read = block.source.read_exact_at(block.from, staging);
            read.map_err(|error| Error::Storage {
                error,
                offset: block.from,
            })?;
            sink.write_all_at(block.to, staging)
                .map_err(|error| Error::Storage {
                    error,
                    offset: block.to,
                })?;
            sink.start_writeback(block.to, block.len);
            Ok(())
        },
    )
}

/// Joins ranges that are neighbours on both sides.
fn join(jobs: Vec<Copy<'_>>) -> Vec<Copy<'_>> {
    let mut joined: Vec<Copy<'_>> = Vec::with_capacity(jobs.len());
    for job in jobs {
        match joined.last_mut() {
            Some(last)
                if std::ptr::addr_eq(last.source, job.source)
                    && last.from.checked_add(last.len) == Some(job.from)
                    && last.to.checked_add(last.len) == Some(job.to) =>
            {
                last.len = last.len.saturating_add(job.len);
            }
            _ => joined.push(job),
        }
    }
    joined
}

fn cut(job: Copy<'_>, size: u64) -> impl Iterator<Item = Copy<'_>> {
    (0..job.len.div_ceil(size)).map(move |i| {
        let done = i * size;
        let (from, to) = (job.from.saturating_add(done), job.to.saturating_add(done));
        Copy {
            source: job.source,
            from,
            to,
            len: size.min(job.len - done),
        }
    })
}
