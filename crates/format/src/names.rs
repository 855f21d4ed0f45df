//! Finding a tensor by name, and names that repeat, without a map.
//!
//! One `u64` a name: its 32-bit hash above its position, sorted. Names are looked at only where
//! hashes agree, so a table of 100,000 names costs 800 kB and no string is copied. A hash table
//! would need a secret key against crafted collisions, which a crate without randomness has not;
//! sorting needs none: names made to collide are put in order by their bytes.

use alloc::vec::Vec;

use crate::room::grow;

#[derive(Clone, Debug, Default)]
pub(crate) struct NameIndex {
    slots: Vec<u64>,
}

/// Mixes eight bytes a step (the multiplier is the golden ratio's, as in Fibonacci hashing).
#[inline]
pub(crate) fn hash(name: &[u8]) -> u32 {
    const K: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut state = K ^ name.len() as u64;
    let (words, tail) = name.as_chunks();
    for word in words {
        state = (state ^ u64::from_le_bytes(*word)).wrapping_mul(K);
        state ^= state >> 32;
    }
    let mut last = 0;
    for &byte in tail {
        last = last << 8 | byte as u64;
    }
    state = (state ^ last).wrapping_mul(K);
    (state >> 32) as u32
}

fn position(slot: u64) -> u32 {
    slot as u32
}

fn hash_of(slot: u64) -> u32 {
    (slot >> 32) as u32
}

impl NameIndex {
    /// Notes that the name at `position` is `name`, and that at most `more` names follow
    /// (`usize::MAX` where nobody knows). Call
    /// [`NameIndex::finish`] before looking up.
    #[inline]
    pub fn push(&mut self, name: &[u8], position: u32, more: usize) {
        grow(&mut self.slots, more.saturating_add(1));
        self.slots.push((hash(name) as u64) << 32 | position as u64);
    }

    /// Makes room for `more` names.
    pub fn reserve(&mut self, more: usize) {
        self.slots.reserve_exact(more);
    }

    /// Puts the index in order and calls `repeated(earlier, later)` for each pair of neighbours
    /// with one name.
    pub fn finish<'a, E>(
        &mut self,
        name_of: impl Fn(u32) -> &'a [u8],
        mut repeated: impl FnMut(u32, u32) -> Result<(), E>,
    ) -> Result<(), E> {
        sort(&mut self.slots);
        for run in self.slots.chunk_by_mut(|a, b| hash_of(*a) == hash_of(*b)) {
            if run.len() == 1 {
                continue;
            }
            run.sort_unstable_by(|a, b| {
                let names = name_of(position(*a)).cmp(name_of(position(*b)));
                names.then(position(*a).cmp(&position(*b)))
            });
            for pair in run.windows(2) {
                if let [a, b] = *pair
                    && name_of(position(a)) == name_of(position(b))
                {
                    repeated(position(a), position(b))?;
                }
            }
        }
        Ok(())
    }

    /// The position of `name`; of names that repeat, the last.
    pub fn find<'a>(&self, name: &[u8], name_of: impl Fn(u32) -> &'a [u8]) -> Option<u32> {
        let wanted = hash(name);
        let from = self.slots.partition_point(|slot| hash_of(*slot) < wanted);
        let rest = self.slots.get(from..)?;
        let run = rest.get(..rest.partition_point(|slot| hash_of(*slot) == wanted))?;
        let end = run.partition_point(|slot| name_of(position(*slot)) <= name);
        let slot = *run.get(end.checked_sub(1)?)?;
        (name_of(position(slot)) == name).then(|| position(slot))
    }
}

/// Sorts slots. Hashes spread evenly unless somebody works against it, so one pass puts each slot
/// among the few that share its upper bits, and sorting those is nearly free: a third of the time of
/// sorting all at once. Names made to collide share a bucket and cost what sorting them costs.
fn sort(slots: &mut Vec<u64>) {
    const FEW: usize = 64;
    // Beyond this, the second copy weighs more than the time (spec 10.1).
    const MANY: usize = 1 << 20;
    if !(FEW..MANY).contains(&slots.len()) {
        return slots.sort_unstable();
    }
    // About two slots a bucket, and no more buckets than a level-two cache holds.
    let bits = (slots.len().ilog2() - 1).min(16);
    let bucket = |slot: u64| (slot >> (u64::BITS - bits)) as usize;
    let mut ends = alloc::vec![0_u32; 1 << bits];
    for &slot in slots.iter() {
        if let Some(count) = ends.get_mut(bucket(slot)) {
            *count += 1;
        }
    }
    let mut start = 0;
    for count in &mut ends {
        start += core::mem::replace(count, start);
    }
    let mut sorted = alloc::vec![0_u64; slots.len()];
    for &slot in slots.iter() {
        // The bucket's start moves up with each slot until it is the bucket's end.
        if let Some(end) = ends.get_mut(bucket(slot)) {
            if let Some(place) = sorted.get_mut(*end as usize) {
                *place = slot;
            }
            *end += 1;
        }
    }
    let mut start = 0;
    for end in ends {
        if let Some(bucket) = sorted.get_mut(start..end as usize) {
            bucket.sort_unstable();
        }
        start = end as usize;
    }
    *slots = sorted;
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use core::convert::Infallible;

    fn index(names: &[String]) -> (NameIndex, Vec<(u32, u32)>) {
        let mut index = NameIndex::default();
        let mut pairs = Vec::new();
        for (i, name) in names.iter().enumerate() {
            index.push(name.as_bytes(), i as u32, names.len());
        }
        let name_of = |i: u32| names[i as usize].as_bytes();
        let done: Result<(), Infallible> = index.finish(name_of, |a, b| {
            pairs.push((a, b));
            Ok(())
        });
        done.unwrap();
        (index, pairs)
    }

    #[test]
    fn every_name_is_found_and_no_other() {
        let names: Vec<String> = (0..2000)
            .map(|i| alloc::format!("layer.{i}.weight"))
            .collect();
        let (index, pairs) = index(&names);
        assert!(pairs.is_empty());
        for (i, name) in names.iter().enumerate() {
            let found = index.find(name.as_bytes(), |i| names[i as usize].as_bytes());
            assert_eq!(found, Some(i as u32));
        }
        assert_eq!(
            index.find(b"layer.2000.weight", |i| names[i as usize].as_bytes()),
            None
        );
        assert_eq!(NameIndex::default().find(b"", |_| b""), None);
    }

    #[test]
    fn slots_are_sorted_however_they_fall() {
        for count in [0, 1, 63, 64, 65, 1000, 100_000, 1_u64 << 20] {
            for spread in [1, 0x9E37_79B9_7F4A_7C15, u64::MAX, 1 << 63] {
                let mut slots: Vec<u64> = (0..count).map(|i| i.wrapping_mul(spread)).collect();
                let mut expected = slots.clone();
                expected.sort_unstable();
                sort(&mut slots);
                assert!(slots == expected, "{count} {spread:x}");
            }
        }
    }

    #[test]
    fn repeated_names_are_reported_and_the_last_is_found() {
        let names: Vec<String> = ["a", "b", "a", "a"].map(String::from).into();
        let (index, mut pairs) = index(&names);
        pairs.sort_unstable();
        assert_eq!(pairs, [(0, 2), (2, 3)]);
        assert_eq!(index.find(b"a", |i| names[i as usize].as_bytes()), Some(3));
    }
}
