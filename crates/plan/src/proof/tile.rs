//! Whether lattices of numbers cover `0..size` exactly, each number as often as any other.
//!
//! Most sets of lattices are one that is all of the range: loops whose strides are the products of
//! the extents inside of them. Else the runs are sorted, and the first gap or overlap has a place.
//! Where there are too many runs for that, the sets are compared by a fingerprint: a lattice is the
//! polynomial `Σ xⁿ` over its numbers `n`, which for a run and loops is a product of geometric
//! series, and two sets of numbers are equal if their polynomials are. They are compared at points
//! that depend on the lattices themselves, modulo 2⁶¹ − 1: for ranges below 2⁴⁰ numbers, sets that
//! differ pass three points with a probability below 2⁻⁶⁰.

use smallvec::SmallVec;

/// `start + Σ kₐ · strideₐ`, and `run` numbers from each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lattice {
    pub start: u64,
    pub run: u64,
    /// Extent and stride.
    pub loops: SmallVec<[(u64, u64); 4]>,
}

impl Lattice {
    /// How many numbers it has, those twice counted twice; `None` past 2⁶⁴.
    pub(super) fn count(&self) -> Option<u64> {
        self.loops
            .iter()
            .try_fold(self.run, |product, (extent, _)| {
                product.checked_mul(*extent)
            })
    }

    /// One past the largest number.
    fn end(&self) -> Option<u64> {
        let start = self.start.checked_add(self.run);
        self.loops
            .iter()
            .try_fold(start?, |end, &(extent, stride)| {
                end.checked_add(extent.saturating_sub(1).checked_mul(stride)?)
            })
    }

    /// Joins loops that go on where the run ends.
    fn joined(mut self) -> Lattice {
        self.loops.retain(|one| one.0 != 1);
        self.loops.sort_unstable_by_key(|one| one.1);
        while let Some(&(extent, stride)) = self.loops.first() {
            let Some(run) = self.run.checked_mul(extent).filter(|_| stride == self.run) else {
                break;
            };
            self.run = run;
            self.loops.remove(0);
        }
        self
    }
}

/// How lattices cover a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cover {
    /// Each number this often.
    Times(u64),
    /// These numbers are in no lattice.
    Gap(u64, u64),
    /// These numbers are in more lattices than others.
    Over(u64, u64),
    /// These numbers lie past the range.
    Past(u64, u64),
    /// Some numbers are in more lattices than others; too many runs to say which.
    Unlike,
}

/// Runs that are sorted, at most.
const SORTED: u64 = 1 << 17;
/// Runs that are sorted to say where what is known to be wrong is wrong.
const SEARCHED: u64 = 1 << 22;

/// How these lattices cover `0..size`.
pub(super) fn cover(size: u64, lattices: impl Iterator<Item = Lattice>) -> Cover {
    let lattices: SmallVec<[Lattice; 4]> = lattices.map(Lattice::joined).collect();
    let mut sum = 0_u128;
    for one in &lattices {
        match (one.end(), one.count()) {
            (Some(end), Some(count)) if end <= size => sum += u128::from(count),
            (end, _) => return Cover::Past(size, end.unwrap_or(u64::MAX)),
        }
    }
    if size == 0 {
        return Cover::Times(1);
    }
    if lattices
        .iter()
        .all(|one| (one.start, one.run) == (0, size) && one.loops.is_empty())
    {
        return match lattices.len() as u64 {
            0 => Cover::Gap(0, size),
            times => Cover::Times(times),
        };
    }
    let runs = lattices.iter().fold(0_u64, |sum, one| {
        sum.saturating_add(one.count().unwrap_or(u64::MAX) / one.run.max(1))
    });
    if runs <= SORTED {
        return sorted(size, &lattices);
    }
    let times = (sum / u128::from(size)) as u64;
    if sum.is_multiple_of(u128::from(size)) && alike(size, times, &lattices) {
        return Cover::Times(times);
    }
    match runs <= SEARCHED {
        true => sorted(size, &lattices),
        false => Cover::Unlike,
    }
}

/// Calls `each` with the first number of every run.
fn each_run(lattice: &Lattice, each: &mut dyn FnMut(u64)) {
    fn walk(start: u64, loops: &[(u64, u64)], each: &mut dyn FnMut(u64)) {
        match loops.split_last() {
            None => each(start),
            Some((&(extent, stride), inner)) => {
                for k in 0..extent {
                    walk(start + k * stride, inner, each);
                }
            }
        }
    }
    walk(lattice.start, &lattice.loops, each);
}

fn sorted(size: u64, lattices: &[Lattice]) -> Cover {
    // Where the number of lattices that have a number changes, and by how much.
    let mut edges: Vec<(u64, i64)> = Vec::new();
    for lattice in lattices {
        each_run(lattice, &mut |start| {
            edges.push((start, 1));
            edges.push((start + lattice.run, -1));
        });
    }
    edges.sort_unstable_by_key(|edge| edge.0);
    let mut pieces: Vec<(u64, u64, i64)> = Vec::new();
    let (mut from, mut depth) = (0, 0);
    for (at, change) in edges {
        if at > from {
            match pieces.last_mut() {
                Some(last) if last.2 == depth => last.1 = at,
                _ => pieces.push((from, at, depth)),
            }
            from = at;
        }
        depth += change;
    }
    if from < size {
        pieces.push((from, size, depth));
    }
    let least = pieces.iter().map(|piece| piece.2).min().unwrap_or(0);
    let uneven = |piece: &&(u64, u64, i64)| piece.2 > least;
    if let Some(gap) = pieces.iter().find(|piece| piece.2 == 0) {
        return Cover::Gap(gap.0, gap.1);
    }
    match pieces.iter().find(uneven) {
        Some(over) => Cover::Over(over.0, over.1),
        None => Cover::Times(least as u64),
    }
}

/// 2⁶¹ − 1, a prime.
const PRIME: u64 = (1 << 61) - 1;

fn times(a: u64, b: u64) -> u64 {
    (u128::from(a) * u128::from(b) % u128::from(PRIME)) as u64
}

fn power(mut base: u64, mut exponent: u64) -> u64 {
    let mut product = 1;
    while exponent > 0 {
        if exponent & 1 == 1 {
            product = times(product, base);
        }
        base = times(base, base);
        exponent >>= 1;
    }
    product
}

/// `1 + y + … + yⁿ⁻¹` for `y = x^stride`.
fn series(x: u64, stride: u64, count: u64) -> u64 {
    let y = power(x, stride);
    if y == 1 {
        return count % PRIME;
    }
    let above = power(y, count) + PRIME - 1;
    let below = y - 1;
    times(above % PRIME, power(below, PRIME - 2))
}

fn value(x: u64, lattice: &Lattice) -> u64 {
    let run = times(power(x, lattice.start), series(x, 1, lattice.run));
    lattice.loops.iter().fold(run, |value, &(extent, stride)| {
        times(value, series(x, stride, extent))
    })
}

/// Whether the lattices have each number of `0..size` so many times, by their fingerprints.
fn alike(size: u64, count: u64, lattices: &[Lattice]) -> bool {
    let mut hasher = blake3::Hasher::new();
    for lattice in lattices {
        hasher.update(&lattice.start.to_le_bytes());
        hasher.update(&lattice.run.to_le_bytes());
        for (extent, stride) in &lattice.loops {
            hasher.update(&extent.to_le_bytes());
            hasher.update(&stride.to_le_bytes());
        }
        hasher.update(b"|");
    }
    let seed = hasher.finalize();
    let points = seed.as_bytes().chunks_exact(8).take(3);
    points
        .map(|bytes| {
            bytes
                .iter()
                .fold(0_u64, |x, &byte| x << 8 | u64::from(byte))
        })
        .all(|x| {
            let x = x % (PRIME - 2) + 2;
            let sum = lattices
                .iter()
                .fold(0, |sum, one| (sum + value(x, one)) % PRIME);
            sum == times(count % PRIME, series(x, 1, size))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use smallvec::smallvec;

    fn one(start: u64, run: u64, loops: &[(u64, u64)]) -> Lattice {
        Lattice {
            start,
            run,
            loops: loops.into(),
        }
    }

    #[test]
    fn a_range_is_covered_by_loops_in_any_order() {
        let all = one(0, 4, &[(3, 4), (5, 12)]);
        assert_eq!(cover(60, [all.clone()].into_iter()), Cover::Times(1));
        assert_eq!(cover(60, [all.clone(), all].into_iter()), Cover::Times(2));
        let halves = [one(0, 2, &[(15, 4)]), one(2, 2, &[(15, 4)])];
        assert_eq!(cover(60, halves.into_iter()), Cover::Times(1));
        assert_eq!(cover(0, [].into_iter()), Cover::Times(1));
        assert_eq!(cover(3, [].into_iter()), Cover::Gap(0, 3));
    }

    #[test]
    fn what_is_wrong_has_a_place() {
        let found = |size, lattices: &[Lattice]| cover(size, lattices.iter().cloned());
        assert_eq!(found(8, &[one(0, 2, &[(2, 4)])]), Cover::Gap(2, 4));
        assert_eq!(
            found(8, &[one(0, 6, &[]), one(4, 4, &[])]),
            Cover::Over(4, 6)
        );
        assert_eq!(found(8, &[one(4, 5, &[])]), Cover::Past(8, 9));
        assert_eq!(found(8, &[one(u64::MAX, 5, &[])]), Cover::Past(8, u64::MAX));
    }

    #[test]
    fn fingerprints_tell_sets_of_many_runs_apart() {
        let many = 1 << 21;
        let woven = |shift: u64| [one(0, 1, &[(many, 2)]), one(shift, 1, &[(many, 2)])];
        assert_eq!(cover(2 * many, woven(1).into_iter()), Cover::Times(1));
        assert!(alike(2 * many, 1, &woven(1)));
        assert!(!alike(2 * many, 1, &woven(0)));
        assert!(!alike(
            2 * many,
            1,
            &[
                one(0, 1, &[(many, 2)]),
                one(1, 1, &[(many - 1, 2)]),
                one(0, 1, &[])
            ]
        ));
        let large = 1 << 30;
        let most = [
            one(0, 1, &[(large, 2)]),
            one(1, 1, &[(large - 1, 2)]),
            one(7, 1, &[]),
        ];
        assert_eq!(cover(2 * large, most.into_iter()), Cover::Unlike);
        let small: SmallVec<[(u64, u64); 4]> = smallvec![(3, 0)];
        let repeated = Lattice {
            start: 0,
            run: 5,
            loops: small,
        };
        assert_eq!(cover(5, [repeated].into_iter()), Cover::Times(3));
    }
}
