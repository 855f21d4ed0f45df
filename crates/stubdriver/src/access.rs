//! Who touched which bytes, and whether that is in order: vector clocks of streams.
//!
//! A stream's operations are numbered. A clock says, for each stream, up to which number its operations
//! are known to be over before: known to a stream by what it waited for, to the host by what it waited for.
//! Two copies that touch the same bytes, one of them writing, need an order: the clock of the later one
//! has to cover the earlier one. One clock stands for all of the host's threads, so an order that two
//! threads would still have to establish between them is taken for granted: no false alarm, some missed.

/// For each stream, the number of its last operation that is known to be over before; by stream, rising.
/// A process may make a stream for every tensor, and a clock knows all that ever were: joining two is
/// one walk over both.
#[derive(Clone, Debug, Default)]
pub struct Clock(Vec<(u64, u64)>);

impl Clock {
    fn find(&self, stream: u64) -> Result<usize, usize> {
        self.0.binary_search_by_key(&stream, |(id, _)| *id)
    }

    /// The number for a stream.
    pub fn at(&self, stream: u64) -> u64 {
        self.find(stream).map_or(0, |place| self.0[place].1)
    }

    /// Knows more of a stream.
    pub fn raise(&mut self, stream: u64, number: u64) {
        match self.find(stream) {
            Ok(place) => self.0[place].1 = number.max(self.0[place].1),
            Err(place) => self.0.insert(place, (stream, number)),
        }
    }

    /// Knows all that another clock knows.
    pub fn join(&mut self, other: &Clock) {
        let mut place = 0;
        for (stream, number) in &other.0 {
            while self.0.get(place).is_some_and(|(id, _)| id < stream) {
                place += 1;
            }
            match self.0.get_mut(place) {
                Some((id, known)) if id == stream => *known = *number.max(known),
                _ => self.0.insert(place, (*stream, *number)),
            }
        }
    }
}

/// Bytes in rows: `width` of them, `rows` times, `pitch` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Address of the first.
    pub start: usize,
    pub width: usize,
    pub pitch: usize,
    pub rows: usize,
}

impl Rows {
    /// From the first byte to past the last; `None` if there is no such address.
    pub fn span(&self) -> Option<usize> {
        let rest = self.pitch.checked_mul(self.rows.checked_sub(1)?)?;
        let span = rest.checked_add(self.width)?;
        self.start.checked_add(span)?;
        Some(span)
    }

    /// Whether any of these lies in `from .. to`.
    fn touches(&self, from: usize, to: usize) -> bool {
        let span = self.span().unwrap_or(usize::MAX - self.start);
        if from >= self.start + span || to <= self.start {
            return false;
        }
        if self.rows == 1 || self.pitch == self.width {
            return true;
        }
        // The last row that begins at `from` or before, and the next.
        let row = from.saturating_sub(self.start) / self.pitch;
        let begins = |row: usize| self.start + row * self.pitch;
        let ends = begins(row) + self.width;
        (begins(row) < to && ends > from) || (row + 1 < self.rows && begins(row + 1) < to)
    }

    /// Whether they share a byte.
    pub fn overlaps(&self, other: &Rows) -> bool {
        let (few, many) = if self.rows <= other.rows {
            (self, other)
        } else {
            (other, self)
        };
        (0..few.rows).any(|row| {
            let from = few.start + row * few.pitch;
            many.touches(from, from + few.width)
        })
    }
}

/// One operation's use of some bytes.
#[derive(Clone, Debug)]
pub struct Access {
    pub bytes: Rows,
    pub writes: bool,
    pub stream: u64,
    pub number: u64,
}

/// The uses of a block of memory that the host does not know to be over.
#[derive(Debug, Default)]
pub struct Uses(Vec<Access>);

impl Uses {
    /// Takes in one more, which runs with this clock; gives an earlier one that it is in no order with.
    pub fn add(&mut self, new: Access, clock: &Clock, host: &Clock) -> Option<Access> {
        self.forget(host);
        let race = self.0.iter().find(|old| {
            (old.writes || new.writes)
                && clock.at(old.stream) < old.number
                && old.bytes.overlaps(&new.bytes)
        });
        let race = race.cloned();
        self.0.push(new);
        race
    }

    /// Whether an operation that may still run writes to any of these bytes.
    pub fn is_written(&self, bytes: &Rows) -> bool {
        self.0
            .iter()
            .any(|old| old.writes && old.bytes.overlaps(bytes))
    }

    /// Those that the host does not know to be over: stream and number.
    pub fn unfinished(&mut self, host: &Clock) -> Vec<(u64, u64)> {
        self.forget(host);
        self.0.iter().map(|old| (old.stream, old.number)).collect()
    }

    fn forget(&mut self, host: &Clock) {
        self.0.retain(|old| host.at(old.stream) < old.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(start: usize, width: usize, pitch: usize, rows: usize) -> Rows {
        Rows {
            start,
            width,
            pitch,
            rows,
        }
    }

    #[test]
    fn rows_overlap_where_a_byte_is_shared() {
        let all = |r: &Rows| -> Vec<usize> {
            (0..r.rows)
                .flat_map(|row| (0..r.width).map(move |i| (row, i)))
                .map(|(row, i)| r.start + row * r.pitch + i)
                .collect()
        };
        let mut some = Vec::new();
        for start in 0..7 {
            for (width, pitch, count) in [(1, 0, 1), (6, 0, 1), (2, 5, 3), (5, 5, 2), (1, 3, 4)] {
                some.push(rows(start, width, pitch, count));
            }
        }
        for a in &some {
            for b in &some {
                let shared = all(a).iter().any(|byte| all(b).contains(byte));
                assert_eq!(a.overlaps(b), shared, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn a_clock_knows_the_most_of_what_it_was_told() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..500 {
            let (mut one, mut two) = (Clock::default(), Clock::default());
            let mut known = [0; 12];
            for _ in 0..random(30) {
                let (stream, number) = (random(12), random(9) + 1);
                known[stream as usize] = number.max(known[stream as usize]);
                match random(2) {
                    0 => one.raise(stream, number),
                    _ => two.raise(stream, number),
                }
            }
            one.join(&two);
            assert_eq!(std::array::from_fn(|stream| one.at(stream as u64)), known);
            assert!(one.0.is_sorted_by(|a, b| a.0 < b.0), "{one:?}");
        }
    }

    #[test]
    fn only_unordered_conflicts_are_races() {
        let mut uses = Uses::default();
        let host = Clock::default();
        let access = |stream, number, writes| Access {
            bytes: rows(0, 10, 0, 1),
            writes,
            stream,
            number,
        };
        let clock = |known: &[(u64, u64)]| Clock(known.to_vec());
        assert!(
            uses.add(access(1, 1, true), &clock(&[(1, 1)]), &host)
                .is_none()
        );
        // Another stream that did not wait.
        let race = uses.add(access(2, 1, false), &clock(&[(2, 1)]), &host);
        assert_eq!(race.unwrap().stream, 1);
        // One that did; two readers need no order.
        let third = clock(&[(1, 1), (3, 1)]);
        assert!(uses.add(access(3, 1, false), &third, &host).is_none());
        assert_eq!(uses.unfinished(&clock(&[(1, 1), (2, 1)])), [(3, 1)]);
        assert!(uses.unfinished(&clock(&[(3, 1)])).is_empty());
    }
}
