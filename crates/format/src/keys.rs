//! Keys that repeat within one object (spec 3.13, 8.3), found without a map and without a copy.

use alloc::string::String;
use alloc::vec::Vec;

use crate::error::Error;
use crate::json::{Cursor, Str};
use crate::names::hash;
use crate::room::grow;

/// Bytes of the shortest member, `"":0`, and its comma.
const SHORTEST_MEMBER: usize = 5;

/// The keys of the objects that are open: eight bytes each, a key's hash above the place where it starts.
/// One stack serves a whole text of less than 2^32 bytes, so looking for repeats allocates next to nothing.
#[derive(Default)]
pub(crate) struct KeyStack {
    keys: Vec<u64>,
    scratch: String,
}

impl KeyStack {
    /// Where the keys of an object that opens now will begin.
    pub fn mark(&self) -> usize {
        self.keys.len()
    }

    /// Notes a key of the innermost object.
    pub fn push(&mut self, key: Str, cursor: &Cursor<'_>) -> Result<(), Error> {
        let hash = if key.escaped {
            self.scratch.clear();
            cursor.decode(key, &mut self.scratch)?;
            hash(self.scratch.as_bytes())
        } else {
            hash(cursor.raw(key))
        };
        let rest = cursor.text.len() - cursor.pos;
        grow(&mut self.keys, 1 + rest / SHORTEST_MEMBER);
        self.keys.push((hash as u64) << 32 | key.start as u64);
        Ok(())
    }

    /// Forgets the keys from `mark` on; says of one that repeats where it starts.
    pub fn close(&mut self, mark: usize, cursor: &Cursor<'_>) -> Option<usize> {
        let keys = self.keys.get_mut(mark..).unwrap_or(&mut []);
        keys.sort_unstable();
        let repeated = keys
            .chunk_by_mut(|a, b| a >> 32 == b >> 32)
            .filter(|run| run.len() > 1)
            .find_map(|run| repeated(run, cursor));
        self.keys.truncate(mark);
        repeated
    }
}

/// Of keys with one hash, one that stands twice. They are compared as decoded, character by character:
/// keys made to collide cost time, no memory.
fn repeated(run: &mut [u64], cursor: &Cursor<'_>) -> Option<usize> {
    let start = |key: u64| key as u32 as usize;
    let text = |key: &u64| cursor.characters(start(*key));
    run.sort_unstable_by(|a, b| text(a).cmp(text(b)).then(a.cmp(b)));
    run.windows(2).find_map(|pair| match pair {
        [a, b] if text(a).eq(text(b)) => Some(start(*b)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of a text such as `"a""b"`, all of one object.
    fn close(text: &str) -> Option<usize> {
        let mut cursor = Cursor::new(text.as_bytes());
        let mut keys = KeyStack::default();
        keys.push(
            Str {
                start: 0,
                end: 0,
                escaped: false,
            },
            &cursor,
        )
        .unwrap();
        let mark = keys.mark();
        while cursor.peek().is_some() {
            let key = cursor.string().unwrap();
            keys.push(key, &cursor).unwrap();
        }
        let repeated = keys.close(mark, &cursor);
        assert_eq!(keys.mark(), mark);
        repeated
    }

    #[test]
    fn a_key_repeats_however_it_is_spelt() {
        assert_eq!(close(r#""a""b""""c""#), None);
        assert_eq!(close(r#""é""é""#), Some(5));
        assert_eq!(close(r#""ab""c""\u0061b""#), Some(8));
        assert_eq!(close(r#""\uD83D\uDE00""😀""#), Some(15));
        assert_eq!(close(r#""\n""n""#), None);
    }

    #[test]
    fn equal_hashes_are_no_repeats() {
        let (text, mut run) = (r#""ab""b""ab""b""#, [1, 5, 8, 12]);
        let cursor = Cursor::new(text.as_bytes());
        assert_eq!(repeated(&mut run[..2], &cursor), None);
        assert_eq!(repeated(&mut run, &cursor), Some(8));
    }
}
