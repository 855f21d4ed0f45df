//! Patches into a file that others write to as well.
//!
//! A box that is whole in all but its first dimension is one range of the file, and goes the way of every
//! save: gathered into large aligned blocks and written past the page cache where that is to be had. The
//! columns of a matrix are many short ranges with bytes of other ranks between them. They go through the page
//! cache, which puts the ranks' pieces of a page together, and they go first: the system writes them back
//! while the rest follows.

use tonnage_engine::{self as engine, Options, Put, Report};
use tonnage_storage::Sink;

use super::patch::{Patch, Placed, position};
use crate::error::Result;

/// Bytes of short runs that a thread takes at once.
const BLOCK: u64 = 1 << 20;

/// Runs of one patch, from `first` on.
struct Runs<'p, 'a> {
    placed: &'p Placed<'a>,
    first: u64,
    count: u64,
}

/// Writes every patch. They must not overlap in the file, which has `file_len` bytes. Memory: a staging block
/// for each of a few threads.
///
/// # Errors
/// `PATCH` for one that does not fit the file or its memory, before anything is written; what the system said;
/// `CANCELLED`.
pub fn write(
    sink: &dyn Sink,
    file_len: u64,
    patches: &[Patch<'_>],
    options: &Options<'_>,
) -> Result<Report> {
    let placed = patches.iter().map(|patch| patch.placed(file_len));
    let placed: Vec<Placed<'_>> = placed
        .filter_map(Result::transpose)
        .collect::<Result<_>>()?;
    let (whole, strided): (Vec<_>, Vec<_>) = placed.iter().partition(|p| p.outer.is_empty());
    let columns = write_strided(sink, &strided, options)?;
    let puts: Vec<Put<'_>> = whole
        .into_iter()
        .map(|p| match p.memory.straight(0, p.len) {
            Some(bytes) => Put::bytes(p.at, bytes),
            None => Put::fill(p.at, p.len, &p.memory),
        })
        .collect();
    let rows = engine::put(sink, &puts, None, options)?;
    Ok(Report {
        seconds: columns.seconds + rows.seconds,
        bytes: columns.bytes + rows.bytes,
        threads: columns.threads.max(rows.threads),
        ..rows
    })
}

fn write_strided(
    sink: &dyn Sink,
    patches: &[&Placed<'_>],
    options: &Options<'_>,
) -> Result<Report, engine::Error> {
    let mut blocks = Vec::new();
    for placed in patches {
        let runs = placed.len / placed.run;
        let each = (BLOCK / placed.run).max(1);
        blocks.extend((0..runs).step_by(each as usize).map(|first| Runs {
            placed,
            first,
            count: each.min(runs - first),
        }));
    }
    engine::for_each_block(
        blocks,
        options,
        "write",
        |block| block.count * block.placed.run,
        Vec::new,
        |buffer, block| block.write(sink, buffer),
    )
}

impl Runs<'_, '_> {
    fn write(&self, sink: &dyn Sink, buffer: &mut Vec<u8>) -> Result<(), engine::Error> {
        let (placed, run) = (self.placed, self.placed.run);
        for number in self.first..self.first + self.count {
            let offset = placed.at + position(&placed.outer, number);
            let mut done = 0;
            while done < run {
                // A run may be longer than a block.
                let len = (run - done).min(BLOCK);
                let at = number * run + done;
                let bytes = match placed.memory.straight(at, len) {
                    Some(bytes) => bytes,
                    None => {
                        buffer.resize(len as usize, 0);
                        placed.memory.gather(at, buffer);
                        &buffer[..]
                    }
                };
                let offset = offset + done;
                let written = sink.write_all_at(offset, bytes);
                written.map_err(|error| engine::Error::Storage { error, offset })?;
                done += len;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tonnage_storage::MemorySink;

    use super::*;

    fn box_of<'a>(data: &'a [u8], offset: [u64; 2], size: [u64; 2], at: u64) -> Patch<'a> {
        Patch {
            data,
            strides: vec![size[1] * 2, 2],
            offset: offset.to_vec(),
            size: size.to_vec(),
            shape: vec![5, 7],
            unit: 2,
            at,
        }
    }

    /// A matrix of 5 by 7 pairs of bytes, in four boxes that meet in the middle.
    #[test]
    fn boxes_of_four_ranks_make_the_whole() {
        let whole: Vec<u8> = (0..70).collect();
        let boxes = [
            ([0, 0], [2, 3]),
            ([0, 3], [2, 4]),
            ([2, 0], [3, 3]),
            ([2, 3], [3, 4]),
        ];
        let sink = MemorySink::new("<memory>");
        for (offset, size) in boxes {
            let mut part = Vec::new();
            for row in offset[0]..offset[0] + size[0] {
                let begin = (row * 14 + offset[1] * 2) as usize;
                part.extend_from_slice(&whole[begin..begin + size[1] as usize * 2]);
            }
            let patches = [box_of(&part, offset, size, 9)];
            let report = write(&sink, 79, &patches, &Options::default()).unwrap();
            assert_eq!(report.bytes, size[0] * size[1] * 2);
        }
        assert_eq!(sink.into_vec()[9..], whole);
    }

    #[test]
    fn a_patch_that_does_not_fit_writes_nothing() {
        let sink = MemorySink::new("<memory>");
        let data = [1; 70];
        let patches = [
            box_of(&data, [0, 0], [5, 7], 0),
            box_of(&data, [0, 0], [5, 7], 10),
        ];
        assert_eq!(
            write(&sink, 79, &patches, &Options::default())
                .unwrap_err()
                .code(),
            "PATCH"
        );
        assert!(sink.into_vec().is_empty());
    }
}
