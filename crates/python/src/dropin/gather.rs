//! Reading the bytes of a slice: exactly the runs it covers where they are long, and whole windows of the
//! file where they are many and close together, since a system call costs more than the bytes between.

use tonnage::format::slice::Runs;
use tonnage::storage::{Error, Source};

/// Runs closer than this are read together: 4 KiB is about what a read call costs in copied bytes.
const GAP: u64 = 4096;
/// Longest stretch of the file read for several runs at once.
const WINDOW: u64 = 1 << 20;

/// Fills `dst` with the bytes of `runs`, which count from `base`. `dst` is as long as all runs together.
pub fn gather(source: &dyn Source, base: u64, runs: Runs, dst: &mut [u8]) -> Result<(), Error> {
    let mut scratch = Vec::new();
    let mut group: Vec<(u64, u64)> = Vec::new();
    let mut rest = dst;
    for (start, len) in runs {
        let joins = match (group.first(), group.last()) {
            (Some(&(first, _)), Some(&(last, length))) => {
                start - (last + length) <= GAP && start + len - first <= WINDOW
            }
            _ => true,
        };
        if !joins {
            rest = read_group(source, base, &group, &mut scratch, rest)?;
            group.clear();
        }
        group.push((start, len));
    }
    read_group(source, base, &group, &mut scratch, rest)?;
    Ok(())
}

/// Reads one group of runs to the start of `dst` and returns what is left of it.
fn read_group<'a>(
    source: &dyn Source,
    base: u64,
    group: &[(u64, u64)],
    scratch: &mut Vec<u8>,
    dst: &'a mut [u8],
) -> Result<&'a mut [u8], Error> {
    let (Some(&(first, only)), Some(&(last, length))) = (group.first(), group.last()) else {
        return Ok(dst);
    };
    if group.len() == 1 {
        let (head, rest) = dst.split_at_mut(only as usize);
        source.read_exact_at(base + first, head)?;
        return Ok(rest);
    }
    scratch.resize((last + length - first) as usize, 0);
    source.read_exact_at(base + first, scratch)?;
    let mut rest = dst;
    for &(start, len) in group {
        let (head, tail) = rest.split_at_mut(len as usize);
        let from = (start - first) as usize;
        head.copy_from_slice(&scratch[from..from + head.len()]);
        rest = tail;
    }
    Ok(rest)
}
