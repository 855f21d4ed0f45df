//! Which bytes a slice of a tensor covers: geometry alone, in bits, for any rank and dtype.
//!
//! A slice is one [`Range`] a dimension. Its elements, in row-major order, are runs of neighbouring
//! bytes; [`runs`] gives the longest such runs without storing them.

use alloc::vec::Vec;

use crate::dtype::Dtype;
use crate::error::{Error, Reason};

/// What is taken of one dimension: `start`, `start + step`, … below `stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First index.
    pub start: u64,
    /// One past the last index that may be taken.
    pub stop: u64,
    /// Distance between indices, at least 1.
    pub step: u64,
}

impl Range {
    /// All of a dimension.
    pub fn full(extent: u64) -> Self {
        Range {
            start: 0,
            stop: extent,
            step: 1,
        }
    }

    /// How many indices it takes.
    pub fn len(&self) -> u64 {
        if self.step == 0 {
            0
        } else {
            self.stop.saturating_sub(self.start).div_ceil(self.step)
        }
    }

    /// Whether it takes none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The runs of bytes that a slice covers, in the order of the result. Iterates over
/// `(offset, length)`, offsets counted from the tensor's first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    /// Bits of a run.
    run: u64,
    /// For each outer dimension: count, stride in bits, position now.
    outer: Vec<(u64, u64, u64)>,
    offset: u64,
    done: bool,
    total: u64,
}

impl Runs {
    /// Bytes of the whole slice.
    pub fn byte_len(&self) -> u64 {
        self.total
    }

    /// How many runs there are; saturates.
    pub fn count_runs(&self) -> u64 {
        if self.total == 0 {
            return 0;
        }
        self.outer.iter().fold(1, |product: u64, &(count, ..)| {
            product.saturating_mul(count)
        })
    }
}

impl Iterator for Runs {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.done {
            return None;
        }
        let item = (self.offset / 8, self.run / 8);
        self.done = true;
        for (count, stride, position) in self.outer.iter_mut().rev() {
            if *position + 1 < *count {
                *position += 1;
                self.offset += *stride;
                self.done = false;
                break;
            }
            self.offset -= *stride * *position;
            *position = 0;
        }
        Some(item)
    }
}

/// The runs of the slice `ranges` of a tensor. Dimensions without a range are taken whole.
///
/// # Errors
/// [`Reason::Slice`] for more ranges than dimensions, a step of zero, a range past its dimension;
/// [`Reason::PartialByte`] where a run of a sub-byte dtype does not begin and end on a byte;
/// [`Reason::SizeOverflow`] for a tensor whose size overflows.
pub fn runs(dtype: Dtype, shape: &[u64], ranges: &[Range]) -> Result<Runs, Error> {
    check(shape, ranges)?;
    let overflow =
        || Error::new(Reason::SizeOverflow).found(format_args!("shape {shape:?} of {dtype}"));
    dtype.bits_of(shape).ok_or_else(overflow)?;
    let range_of =
        |axis: usize, extent: u64| ranges.get(axis).copied().unwrap_or(Range::full(extent));
    if shape
        .iter()
        .enumerate()
        .any(|(axis, &extent)| range_of(axis, extent).is_empty())
    {
        return Ok(Runs {
            run: 0,
            outer: Vec::new(),
            offset: 0,
            done: true,
            total: 0,
        });
    }
    // From here no extent is zero, so every partial product is at most the tensor's size.
    let mut stride = dtype.bitsize() as u64;
    let (mut run, mut offset, mut total) = (stride, 0, stride);
    let mut contiguous = true;
    let mut outer = Vec::new();
    for (axis, &extent) in shape.iter().enumerate().rev() {
        let range = range_of(axis, extent);
        offset += range.start * stride;
        total *= range.len();
        if contiguous && (range.step == 1 || range.len() == 1) {
            run *= range.len();
            // A dimension that is not taken whole ends the run for those outside it.
            contiguous = range.len() == extent;
        } else if range.len() > 1 {
            contiguous = false;
            outer.push((range.len(), stride * range.step, 0));
        } else {
            contiguous = false;
        }
        stride *= extent;
    }
    outer.reverse();
    let aligned =
        offset % 8 == 0 && run % 8 == 0 && outer.iter().all(|&(_, stride, _)| stride % 8 == 0);
    if !aligned {
        return Err(Error::new(Reason::PartialByte)
            .found(format_args!(
                "a slice of {dtype} that begins or ends inside a byte"
            ))
            .needed("runs of whole bytes"));
    }
    Ok(Runs {
        run,
        outer,
        offset,
        done: false,
        total: total / 8,
    })
}

fn check(shape: &[u64], ranges: &[Range]) -> Result<(), Error> {
    if ranges.len() > shape.len() {
        return Err(Error::new(Reason::Slice)
            .found(format_args!("{} indices", ranges.len()))
            .needed(format_args!("at most {}, one a dimension", shape.len())));
    }
    for (axis, (range, &extent)) in ranges.iter().zip(shape).enumerate() {
        if range.step == 0 || (!range.is_empty() && (range.start >= extent || range.stop > extent))
        {
            return Err(Error::new(Reason::Slice)
                .found(format_args!(
                    "{}..{} step {} in dimension {axis}",
                    range.start, range.stop, range.step
                ))
                .needed(format_args!("a step of at least 1, within 0..{extent}")));
        }
    }
    Ok(())
}

/// The shape of a slice that keeps every dimension.
pub fn shape_of(shape: &[u64], ranges: &[Range]) -> Vec<u64> {
    let taken = |(axis, &extent)| ranges.get(axis).map_or(extent, Range::len);
    shape.iter().enumerate().map(taken).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, stop: u64, step: u64) -> Range {
        Range { start, stop, step }
    }

    /// The slow and obvious way: every index in turn.
    fn naive(shape: &[u64], ranges: &[Range]) -> Vec<u64> {
        let mut offsets = alloc::vec![0];
        for (axis, &extent) in shape.iter().enumerate() {
            let range = ranges.get(axis).copied().unwrap_or(Range::full(extent));
            let mut next = Vec::new();
            for offset in offsets {
                for k in 0..range.len() {
                    next.push(offset * extent + range.start + k * range.step);
                }
            }
            offsets = next;
        }
        offsets
    }

    proptest! {
        #[test]
        fn runs_are_the_elements_in_order(
            dims in prop::collection::vec((0_u64..5, 0_u64..5, 0_u64..6, 1_u64..4), 0..5),
            given in 0_usize..6,
        ) {
            let shape: Vec<u64> = dims.iter().map(|d| d.0).collect();
            let ranges: Vec<Range> = dims.iter().take(given)
                .map(|&(extent, a, b, step)| range(a.min(extent), b.min(extent), step)).collect();
            let expected = naive(&shape, &ranges);
            let found = runs(Dtype::U16, &shape, &ranges).unwrap();
            prop_assert_eq!(found.byte_len(), expected.len() as u64 * 2);
            prop_assert_eq!(found.clone().count() as u64, found.count_runs());
            let bytes: Vec<u64> = found.flat_map(|(at, len)| (at..at + len).step_by(2).map(|b| b / 2)).collect();
            prop_assert_eq!(bytes, expected);
            let kept: u64 = shape_of(&shape, &ranges).iter().product();
            prop_assert_eq!(kept, naive(&shape, &ranges).len() as u64);
        }
    }

    #[test]
    fn whole_tensors_and_rows_are_one_run() {
        let all = |shape: &[u64], ranges: &[Range]| {
            runs(Dtype::F32, shape, ranges).unwrap().collect::<Vec<_>>()
        };
        assert_eq!(all(&[4, 8, 2], &[]), [(0, 256)]);
        assert_eq!(all(&[4, 8, 2], &[range(1, 3, 1)]), [(64, 128)]);
        assert_eq!(
            all(&[4, 8, 2], &[range(1, 2, 1), range(2, 4, 1)]),
            [(80, 16)]
        );
        assert_eq!(all(&[], &[]), [(0, 4)]);
        assert_eq!(all(&[3], &[range(2, 1, 1)]), []);
    }

    #[test]
    fn sub_byte_slices_end_on_bytes_or_are_refused() {
        let f4 = |ranges: &[Range]| {
            runs(Dtype::F4, &[4, 6], ranges).map(|runs| runs.collect::<Vec<_>>())
        };
        assert_eq!(f4(&[range(1, 3, 1)]).unwrap(), [(3, 6)]);
        assert_eq!(
            f4(&[range(0, 2, 1), range(2, 4, 1)]).unwrap(),
            [(1, 1), (4, 1)]
        );
        assert_eq!(
            f4(&[range(0, 2, 1), range(1, 3, 1)]).unwrap_err().reason(),
            Reason::PartialByte
        );
        assert_eq!(
            f4(&[range(0, 2, 1), range(0, 6, 2)]).unwrap_err().reason(),
            Reason::PartialByte
        );
    }

    #[test]
    fn slices_that_do_not_fit_are_refused() {
        let reason = |ranges: &[Range]| runs(Dtype::U8, &[4, 4], ranges).unwrap_err().reason();
        assert_eq!(reason(&[range(0, 1, 1); 3]), Reason::Slice);
        assert_eq!(reason(&[range(0, 5, 1)]), Reason::Slice);
        assert_eq!(reason(&[range(0, 4, 0)]), Reason::Slice);
        let overflow = runs(Dtype::U8, &[1 << 63, 4], &[]).unwrap_err();
        assert_eq!(overflow.reason(), Reason::SizeOverflow);
    }
}
