//! Reading: from sources straight into the buffers of whoever wants the bytes.

use tonnage_storage::Source;

use crate::control::{Error, Options, Report};
use crate::queue;

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
struct Block<'a> {
    source: &'a dyn Source,
    offset: u64,
    len: usize,
    parts: Vec<&'a mut [u8]>,
}

/// Buffers in one block at most: what one `preadv` takes.
const MAX_PARTS: usize = 1024;

/// Fills every buffer. When this fails, the content of the buffers is unspecified.
///
/// # Errors
/// The first failure of a source, or that the run was cancelled.
pub fn read(mut jobs: Vec<Read<'_>>, options: &Options<'_>) -> Result<Report, Error> {
    // Sources are told apart by address: jobs of one file come together and in the order of its bytes.
    jobs.sort_by_key(|job| {
        (
            std::ptr::from_ref(job.source).cast::<()>() as usize,
            job.offset,
        )
    });
    let blocks = cut(jobs, options.block());
    queue::for_each_block(
        blocks,
        options,
        "read",
        |block| block.len as u64,
        || (),
        |(), mut block| {
            let result = match &mut block.parts[..] {
                [dst] => block.source.read_exact_at(block.offset, dst),
                parts => block.source.read_vectored_at(block.offset, parts),
            };
            result.map_err(|error| Error::Storage {
                error,
                offset: block.offset,
            })?;
            match options.check {
                Some(check) => {
                    let mut parts = block.parts.iter().map(|part| &**part);
                    check.check(block.source, block.offset, &mut parts)
                }
                None => Ok(()),
            }
        },
    )
}

/// Joins small neighbours and cuts what is large, so that every block but the last of a run is large.
fn cut<'a>(jobs: Vec<Read<'a>>, size: usize) -> Vec<Block<'a>> {
    let mut blocks: Vec<Block<'a>> = Vec::new();
    for Read {
        source,
        mut offset,
        mut dst,
    } in jobs
    {
        while !dst.is_empty() {
            let room = match blocks.last() {
                Some(last) if follows(last, source, offset) => size.saturating_sub(last.len),
                _ => 0,
            };
            let take = if room == 0 { size } else { room };
            let (part, rest) = dst.split_at_mut(take.min(dst.len()));
            let len = part.len();
            match blocks.last_mut() {
                Some(last) if room > 0 => {
                    last.len += len;
                    last.parts.push(part);
                }
                _ => blocks.push(Block {
                    source,
                    offset,
                    len,
                    parts: vec![part],
                }),
            }
            offset = offset.saturating_add(len as u64);
            dst = rest;
        }
    }
    blocks
}

fn follows(last: &Block<'_>, source: &dyn Source, offset: u64) -> bool {
    std::ptr::addr_eq(last.source, source)
        && last.offset.checked_add(last.len as u64) == Some(offset)
        && last.parts.len() < MAX_PARTS
}
