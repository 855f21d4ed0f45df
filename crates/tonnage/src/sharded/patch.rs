//! The geometry of a patch: a box of a tensor, in memory on one side and in the file on the other.

use tonnage_engine::{self as engine, Fill};

use crate::error::{Error, Result};

/// A box of a tensor that this process has in memory, and where the tensor lies in the file.
#[derive(Clone, Debug)]
pub struct Patch<'a> {
    /// Memory, from the box's first element on.
    pub data: &'a [u8],
    /// For each dimension, how many bytes the next index is away in memory.
    pub strides: Vec<u64>,
    /// The box's first index in each dimension of the whole tensor.
    pub offset: Vec<u64>,
    /// The box's extents.
    pub size: Vec<u64>,
    /// The whole tensor's extents.
    pub shape: Vec<u64>,
    /// Bytes of one element. Of dtypes that pack several elements in a byte, a byte counts as one.
    pub unit: u64,
    /// The whole tensor's first byte in the file.
    pub at: u64,
}

/// A patch whose numbers have been checked.
#[derive(Debug)]
pub(super) struct Placed<'a> {
    /// File byte of the first run.
    pub at: u64,
    /// Bytes that are neighbours in the file.
    pub run: u64,
    /// How often the run occurs: for each outer dimension its extent and its distance in the file.
    pub outer: Vec<Axis>,
    /// Bytes of the box.
    pub len: u64,
    pub memory: Memory<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    pub extent: u64,
    pub stride: u64,
}

/// A box in memory, its bytes counted in row-major order.
#[derive(Debug)]
pub(super) struct Memory<'a> {
    data: &'a [u8],
    /// Bytes that are neighbours in memory.
    run: u64,
    outer: Vec<Axis>,
}

impl<'a> Patch<'a> {
    fn wrong(&self, what: &str) -> Error {
        let Patch {
            offset,
            size,
            shape,
            strides,
            ..
        } = self;
        Error::usage(
            "PATCH",
            format!(
                "a box at {offset:?} of {size:?} in {shape:?} with strides {strides:?}: {what}"
            ),
        )
    }

    /// Checks all numbers; `None` for a box without elements.
    pub(super) fn placed(&self, file_len: u64) -> Result<Option<Placed<'a>>> {
        let rank = self.shape.len();
        if [self.strides.len(), self.offset.len(), self.size.len()] != [rank; 3] || self.unit == 0 {
            return Err(self.wrong("not as many numbers as dimensions"));
        }
        let inside = |d: usize| {
            let end = self.offset[d].checked_add(self.size[d]);
            end.is_some_and(|end| end <= self.shape[d])
        };
        if !(0..rank).all(inside) {
            return Err(self.wrong("it does not lie inside"));
        }
        if self.size.contains(&0) {
            return Ok(None);
        }
        let far = || self.wrong("beyond 64 bits");
        let last = (self.size.iter().zip(&self.strides)).try_fold(self.unit, |end, (&n, &step)| {
            end.checked_add((n - 1).checked_mul(step)?)
        });
        if last.is_none_or(|last| last > self.data.len() as u64) {
            return Err(self.wrong("its memory is shorter"));
        }
        // Distances in the file, the innermost dimension first.
        let mut steps = vec![0; rank];
        let mut bytes = self.unit;
        for (step, &extent) in steps.iter_mut().zip(&self.shape).rev() {
            *step = bytes;
            bytes = bytes.checked_mul(extent).ok_or_else(far)?;
        }
        if self.at.checked_add(bytes).is_none_or(|end| end > file_len) {
            return Err(self.wrong("its tensor ends behind the file"));
        }
        // What follows lies inside of the tensor, so it fits.
        let before: u64 = self.offset.iter().zip(&steps).map(|(&o, &s)| o * s).sum();
        let (run, outer) = joined(self.unit, &self.size, &steps);
        let (inner, axes) = joined(self.unit, &self.size, &self.strides);
        Ok(Some(Placed {
            at: self.at + before,
            run,
            outer,
            len: self.size.iter().product::<u64>() * self.unit,
            memory: Memory {
                data: self.data,
                run: inner,
                outer: axes,
            },
        }))
    }
}

/// The longest run of neighbours, and the axes along which it repeats, the outermost first.
fn joined(unit: u64, size: &[u64], steps: &[u64]) -> (u64, Vec<Axis>) {
    let mut run = unit;
    let mut outer: Vec<Axis> = Vec::new();
    for (&extent, &stride) in size.iter().zip(steps).rev() {
        match outer.last_mut() {
            _ if extent == 1 => {}
            None if stride == run => run *= extent,
            Some(inner) if inner.stride.checked_mul(inner.extent) == Some(stride) => {
                inner.extent *= extent;
            }
            _ => outer.push(Axis { extent, stride }),
        }
    }
    outer.reverse();
    (run, outer)
}

/// The distance of the run with this number.
pub(super) fn position(outer: &[Axis], mut number: u64) -> u64 {
    let mut at = 0;
    for axis in outer.iter().rev() {
        at += number % axis.extent * axis.stride;
        number /= axis.extent;
    }
    at
}

impl<'a> Memory<'a> {
    /// Bytes of the box from `at` on, if they are neighbours.
    pub fn straight(&self, at: u64, len: u64) -> Option<&'a [u8]> {
        let (number, skip) = (at / self.run, at % self.run);
        if skip + len > self.run {
            return None;
        }
        let begin = position(&self.outer, number) + skip;
        let begin = usize::try_from(begin).ok()?;
        self.data
            .get(begin..begin.checked_add(usize::try_from(len).ok()?)?)
    }

    /// Copies the bytes of the box from `at` on.
    pub fn gather(&self, at: u64, mut dst: &mut [u8]) {
        let (mut number, mut skip) = (at / self.run, at % self.run);
        while !dst.is_empty() {
            // Along the innermost axis from here on, without counting anew for each run.
            let along = self.outer.last().map(|axis| (axis.extent, axis.stride));
            let (extent, stride) = along.unwrap_or((1, 0));
            let mut from = position(&self.outer, number);
            let count = extent - number % extent;
            for _ in 0..count {
                let take = (self.run - skip).min(dst.len() as u64);
                let (now, rest) = std::mem::take(&mut dst).split_at_mut(take as usize);
                let begin = (from + skip) as usize;
                // `placed` has compared the memory's length with the farthest element.
                if let Some(src) = self.data.get(begin..begin + now.len()) {
                    now.copy_from_slice(src);
                }
                (dst, skip) = (rest, 0);
                if dst.is_empty() {
                    return;
                }
                from += stride;
            }
            number += count;
        }
    }
}

impl Fill for Memory<'_> {
    fn fill(&self, at: u64, dst: &mut [u8]) -> Result<(), engine::Error> {
        self.gather(at, dst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch<'a>(
        data: &'a [u8],
        strides: &[u64],
        offset: &[u64],
        size: &[u64],
        shape: &[u64],
    ) -> Patch<'a> {
        Patch {
            data,
            strides: strides.to_vec(),
            offset: offset.to_vec(),
            size: size.to_vec(),
            shape: shape.to_vec(),
            unit: 1,
            at: 100,
        }
    }

    #[test]
    fn rows_are_one_run_and_columns_are_many() {
        let data = [0; 24];
        let rows = patch(&data, &[4, 1], &[2, 0], &[3, 4], &[6, 4]);
        let rows = rows.placed(124).unwrap().unwrap();
        assert_eq!(
            (rows.at, rows.run, rows.outer.len(), rows.len),
            (108, 12, 0, 12)
        );
        let columns = patch(&data, &[2, 1], &[0, 2], &[6, 2], &[6, 4]);
        let columns = columns.placed(124).unwrap().unwrap();
        assert_eq!((columns.at, columns.run), (102, 2));
        assert_eq!(
            columns.outer,
            [Axis {
                extent: 6,
                stride: 4
            }]
        );
        // Both of the outer dimensions are one axis.
        let deep = patch(&data, &[6, 3, 1], &[0, 0, 1], &[2, 2, 1], &[2, 2, 3]);
        let deep = deep.placed(112).unwrap().unwrap();
        assert_eq!(
            deep.outer,
            [Axis {
                extent: 4,
                stride: 3
            }]
        );
        assert!(
            patch(&data, &[1], &[3], &[0], &[3])
                .placed(103)
                .unwrap()
                .is_none()
        );
        let scalar = patch(&data, &[], &[], &[], &[])
            .placed(101)
            .unwrap()
            .unwrap();
        assert_eq!((scalar.at, scalar.run, scalar.len), (100, 1, 1));
    }

    #[test]
    fn memory_is_gathered_from_any_byte_on() {
        let data: Vec<u8> = (0..60).collect();
        // A transposed box of 3 by 4 by 2 elements in memory of 2 by 5 by 6.
        let strides = [1, 6, 30];
        let memory = patch(&data, &strides, &[0; 3], &[3, 4, 2], &[3, 4, 2]);
        let memory = memory.placed(124).unwrap().unwrap().memory;
        let mut all = Vec::new();
        for i in 0..3 {
            for j in 0..4 {
                all.extend([0, 1].map(|k| (i + 6 * j + 30 * k) as u8));
            }
        }
        for begin in 0..24 {
            for end in begin..=24 {
                let mut dst = vec![0; end - begin];
                memory.gather(begin as u64, &mut dst);
                assert_eq!(dst, all[begin..end], "{begin}..{end}");
            }
        }
    }

    #[test]
    fn wrong_numbers_are_refused() {
        let data = [0; 8];
        for wrong in [
            patch(&data, &[4], &[0, 0], &[2, 4], &[2, 4]),
            patch(&data, &[4, 1], &[1, 0], &[2, 4], &[2, 4]),
            patch(&data, &[4, 1], &[0, u64::MAX], &[2, 4], &[2, 4]),
            patch(&data, &[5, 1], &[0, 0], &[2, 4], &[2, 4]),
            patch(&data, &[u64::MAX, 1], &[0, 0], &[2, 4], &[2, 4]),
            patch(&data, &[4, 1], &[0, 0], &[2, 4], &[u64::MAX, 4]),
            patch(&data, &[4, 1], &[0, 0], &[2, 4], &[200, 4]),
        ] {
            assert_eq!(wrong.placed(108).unwrap_err().code(), "PATCH", "{wrong:?}");
        }
    }
}
