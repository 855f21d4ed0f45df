//! Writing: large pieces straight out of the caller's memory, small neighbours gathered first.

use tonnage_storage::Sink;

use crate::control::{Error, Options, Report};
use crate::queue;

/// Bytes that belong at a place of a sink.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// Where the first of them belongs.
    pub offset: u64,
    /// The bytes.
    pub data: &'a [u8],
}

/// Neighbouring bytes, for one call to the system.
struct Block<'a> {
    offset: u64,
    len: usize,
    parts: Vec<&'a [u8]>,
}

/// Pieces below this are copied together before they are written: a call for each would cost more.
const SMALL: usize = 256 << 10;

/// Writes every piece. Pieces must not overlap. When this fails, some of them may have been written.
///
/// # Errors
/// The first failure of the sink, or that the run was cancelled.
pub fn write(sink: &dyn Sink, jobs: &[Write<'_>], options: &Options<'_>) -> Result<Report, Error> {
    let mut jobs = jobs.to_vec();
    jobs.sort_by_key(|job| job.offset);
    let blocks = cut(&jobs, options.block());
    queue::for_each_block(
        blocks,
        options,
        "write",
        |block| block.len as u64,
        Vec::new,
        |gathered, block| {
            let data = match block.parts[..] {
                [data] => data,
                ref parts => {
                    gathered.clear();
                    parts
                        .iter()
                        .for_each(|part| gathered.extend_from_slice(part));
                    &gathered[..]
                }
            };
            sink.write_all_at(block.offset, data)
                .map_err(|error| Error::Storage {
                    error,
                    offset: block.offset,
                })?;
            sink.start_writeback(block.offset, data.len() as u64);
            Ok(())
        },
    )
}

fn cut<'a>(jobs: &[Write<'a>], size: usize) -> Vec<Block<'a>> {
    let mut blocks: Vec<Block<'a>> = Vec::new();
    for job in jobs.iter().filter(|job| !job.data.is_empty()) {
        let end = |last: &Block<'_>| last.offset.checked_add(last.len as u64);
        match blocks.last_mut() {
            // A block of small pieces stays below 2 × SMALL: that is the memory a thread gathers in.
            Some(last)
                if last.len < SMALL && job.data.len() < SMALL && end(last) == Some(job.offset) =>
            {
                last.len += job.data.len();
                last.parts.push(job.data);
            }
            _ => {
                let mut offset = job.offset;
                for data in job.data.chunks(size) {
                    blocks.push(Block {
                        offset,
                        len: data.len(),
                        parts: vec![data],
                    });
                    offset = offset.saturating_add(data.len() as u64);
                }
            }
        }
    }
    blocks
}
