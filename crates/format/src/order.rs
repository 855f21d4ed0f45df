//! Names in order (spec 9.6), and names that repeat (spec 9.1), without comparing them whole.
//!
//! Names of one model share long beginnings and lie scattered in memory, so a sort that compares them whole
//! waits for memory at each step. Here 40 bytes of each name are copied beside its position; those are
//! sorted, and only names that agree so far are visited again for their next 40.

use alloc::vec::Vec;

/// Words of a name that a row holds.
const WORDS: usize = 5;
/// Bytes of a name that a row holds.
const CHUNK: usize = WORDS * 8;
/// The name goes on after this chunk.
const GOES_ON: u32 = CHUNK as u32 + 1;

/// A piece of a name, as numbers that compare as its bytes do. The derived order is that of the fields.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    words: [u64; WORDS],
    /// Bytes of the chunk that are the name's. A name that ends is filled up with zeros, and comes before
    /// one whose own bytes they are.
    used: u32,
    at: u32,
}

impl Row {
    /// The chunk of `name` at `depth`.
    #[inline]
    fn new(name: &[u8], depth: usize, at: u32) -> Self {
        let rest = name.get(depth..).unwrap_or(&[]);
        let mut bytes = [0; CHUNK];
        let used = match rest.split_first_chunk() {
            Some((chunk, after)) => {
                bytes = *chunk;
                CHUNK as u32 + u32::from(!after.is_empty())
            }
            None => {
                if let Some(start) = bytes.get_mut(..rest.len()) {
                    start.copy_from_slice(rest);
                }
                rest.len() as u32
            }
        };
        let (chunks, _) = bytes.as_chunks();
        let mut words = [0; WORDS];
        for (word, chunk) in words.iter_mut().zip(chunks) {
            *word = u64::from_be_bytes(*chunk);
        }
        Row { words, used, at }
    }

    /// Whether two rows have nothing between them yet.
    fn ties(&self, other: &Row) -> bool {
        self.words == other.words && self.used == other.used
    }
}

/// The positions of `names`, fewer than 2^32, in the order of their bytes; names that repeat keep theirs.
///
/// # Errors
/// The position of a name that stands twice.
pub(crate) fn by_name<'a>(
    names: impl ExactSizeIterator<Item = &'a [u8]>,
    name: impl Fn(u32) -> &'a [u8],
) -> Result<Vec<u32>, u32> {
    let mut rows: Vec<Row> = names
        .enumerate()
        .map(|(at, name)| Row::new(name, 0, at as u32))
        .collect();
    rows.sort_unstable();
    // Ranges of rows that agree on every byte before the depth.
    let mut open = Vec::new();
    push_ties(&rows, 0, CHUNK, &mut open)?;
    while let Some((start, end, depth)) = open.pop() {
        let Some(rows) = rows.get_mut(start..end) else {
            continue;
        };
        for row in rows.iter_mut() {
            *row = Row::new(name(row.at), depth, row.at);
        }
        rows.sort_unstable();
        push_ties(rows, start, depth + CHUNK, &mut open)?;
    }
    Ok(rows.into_iter().map(|row| row.at).collect())
}

/// Notes the ranges of `rows`, which begin at `start`, that are still to be told apart at `depth`.
fn push_ties(
    rows: &[Row],
    start: usize,
    depth: usize,
    open: &mut Vec<(usize, usize, usize)>,
) -> Result<(), u32> {
    let mut from = start;
    for group in rows.chunk_by(Row::ties) {
        if let [first, _, ..] = group {
            if first.used != GOES_ON {
                return Err(first.at);
            }
            open.push((from, from + group.len(), depth));
        }
        from += group.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    fn check(names: &[String]) {
        let found = by_name(names.iter().map(|name| name.as_bytes()), |at| {
            names[at as usize].as_bytes()
        });
        let mut expected: Vec<u32> = (0..names.len() as u32).collect();
        expected.sort_by_key(|&at| &names[at as usize]);
        let twice = |pair: &[u32]| names[pair[0] as usize] == names[pair[1] as usize];
        match found {
            Ok(found) => {
                assert_eq!(found, expected);
                assert!(!expected.windows(2).any(twice));
            }
            Err(at) => assert!(
                names
                    .iter()
                    .filter(|name| **name == names[at as usize])
                    .count()
                    > 1
            ),
        }
    }

    proptest! {
        /// Few letters and NULs, so that names share beginnings and end at every place of a row.
        #[test]
        fn the_order_is_that_of_comparing(names in prop::collection::vec("[a\\x00]{0,90}|a{38,42}", 0..60)) {
            check(&names);
        }
    }

    #[test]
    fn long_beginnings_and_repeats() {
        let ends = ["", "layer", "layer.weight", "layer.weight\0", "layer.bias"];
        let long = "x".repeat(10_000);
        let mut names: Vec<String> = ends.map(|end| alloc::format!("{long}{end}")).into();
        check(&names);
        for end in ["layer", ""] {
            names.push(alloc::format!("{long}{end}"));
            check(&names);
        }
    }
}
