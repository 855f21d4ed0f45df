//! The BLAKE3 hash of a whole source, by several threads (spec 13.14).
//!
//! BLAKE3 is a tree: aligned blocks of a power of two are subtrees, hashed apart and joined afterwards.

use std::sync::{Mutex, PoisonError};

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use tonnage_storage::Source;

use crate::control::{Error, Options};
use crate::passing::Passing;
use crate::queue;

/// Bytes of a block: a power of two, as the tree asks.
const BLOCK: u64 = 4 << 20;

/// The hash of everything that a source has.
///
/// # Errors
/// The first failure of the source, or that the run was cancelled.
pub fn blake3_of(source: &dyn Source, options: &Options<'_>) -> Result<[u8; 32], Error> {
    let (len, passing) = (source.len(), Passing::of(source));
    if len <= BLOCK {
        // A tree of one block has no joints.
        let mut bytes = vec![0; len as usize];
        passing.read(0, &mut bytes)?;
        return Ok(*blake3::hash(&bytes).as_bytes());
    }
    let values = Mutex::new(Vec::new());
    let blocks: Vec<u64> = (0..len.div_ceil(BLOCK))
        .map(|block| block * BLOCK)
        .collect();
    queue::for_each_block(
        blocks,
        options,
        "hash",
        |&offset| (len - offset).min(BLOCK),
        Vec::new,
        |buffer: &mut Vec<u8>, offset| {
            buffer.resize((len - offset).min(BLOCK) as usize, 0);
            passing.read(offset, buffer)?;
            let mut hasher = Hasher::new();
            let value = hasher
                .set_input_offset(offset)
                .update(buffer)
                .finalize_non_root();
            let mut values = values.lock().unwrap_or_else(PoisonError::into_inner);
            values.push((offset, value));
            Ok(())
        },
    )?;
    let mut values = values.into_inner().unwrap_or_else(PoisonError::into_inner);
    values.sort_unstable_by_key(|&(offset, _)| offset);
    let values: Vec<[u8; 32]> = values.into_iter().map(|(_, value)| value).collect();
    let (left, right) = values.split_at(left_of(values.len()));
    Ok(*merge_subtrees_root(&join(left), &join(right), Mode::Hash).as_bytes())
}

/// How many of `n` blocks, more than one, lie in the left half of their tree: the largest power of two
/// below `n`.
fn left_of(n: usize) -> usize {
    n.next_power_of_two() / 2
}

/// The value of the subtree over these blocks.
fn join(values: &[[u8; 32]]) -> [u8; 32] {
    match values {
        [] => [0; 32],
        [value] => *value,
        values => {
            let (left, right) = values.split_at(left_of(values.len()));
            merge_subtrees_non_root(&join(left), &join(right), Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonnage_storage::MemorySource;

    #[test]
    fn it_is_the_hash_of_the_whole_whatever_the_number_of_blocks() {
        let all: Vec<u8> = (0..5 * BLOCK + 1000)
            .map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[7])
            .collect();
        let block = BLOCK as usize;
        for len in [
            0,
            1,
            block,
            block + 1,
            2 * block,
            3 * block,
            4 * block + 7,
            all.len(),
        ] {
            let source = MemorySource::new(&all[..len], "<bytes>");
            let hash = blake3_of(&source, &Options::default()).unwrap();
            assert_eq!(hash, *blake3::hash(&all[..len]).as_bytes(), "{len}");
        }
    }
}
