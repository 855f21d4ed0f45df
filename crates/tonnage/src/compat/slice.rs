//! Parts of tensors, as the pieces of bytes that hold them.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::{
    Bound, Range, RangeBounds, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive,
};

use super::tensor::{Dtype, TensorView};
use crate::format::slice::{Range as Indices, Runs, runs};

/// The reference's words for a slice that is not made of whole bytes.
pub(super) const MISALIGNED: &str = "The slice is slicing for subbytes dtypes, and the slice does not end \
    up at a byte boundary, this is invalid.";

/// Why a slice cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InvalidSlice {
    /// More indices than the tensor has dimensions.
    TooManySlices,
    /// An index past the end of its dimension, or a range that ends before it starts.
    SliceOutOfRange {
        /// Which dimension.
        dim_index: usize,
        /// The index asked for.
        asked: usize,
        /// The dimension's extent.
        dim_size: usize,
    },
    /// A piece of a sub-byte dtype that does not begin and end on a byte; also a shape whose size overflows.
    MisalignedSlice,
}

impl fmt::Display for InvalidSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InvalidSlice::TooManySlices => {
                f.write_str("more slicing indexes than dimensions in tensor")
            }
            InvalidSlice::SliceOutOfRange {
                dim_index,
                asked,
                dim_size,
            } => write!(
                f,
                "index {asked} out of bounds for tensor dimension #{dim_index} of size {dim_size}"
            ),
            InvalidSlice::MisalignedSlice => f.write_str(MISALIGNED),
        }
    }
}

impl std::error::Error for InvalidSlice {}

/// What is taken of one dimension.
#[derive(Debug, Clone)]
pub enum TensorIndexer {
    /// One index; the dimension goes away.
    Select(usize),
    /// `start:stop:step`.
    Narrow(Bound<usize>, Bound<usize>, NonZeroUsize),
}

impl TensorIndexer {
    /// First index, one past the last, and the step.
    fn resolve(&self, extent: usize) -> (usize, usize, usize) {
        match self {
            TensorIndexer::Select(index) => (*index, index.saturating_add(1), 1),
            TensorIndexer::Narrow(left, right, step) => {
                let start = match left {
                    Bound::Unbounded => 0,
                    Bound::Included(start) => *start,
                    Bound::Excluded(before) => before.saturating_add(1),
                };
                let stop = match right {
                    Bound::Unbounded => extent,
                    Bound::Included(last) => last.saturating_add(1),
                    Bound::Excluded(stop) => *stop,
                };
                (start, stop, step.get())
            }
        }
    }
}

/// As Python writes slices; a bound is shown as given, whether it is included or not.
impl fmt::Display for TensorIndexer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = |bound: &Bound<usize>| match bound {
            Bound::Unbounded => String::new(),
            Bound::Included(index) | Bound::Excluded(index) => index.to_string(),
        };
        match self {
            TensorIndexer::Select(index) => write!(f, "{index}"),
            TensorIndexer::Narrow(left, right, step) => {
                write!(f, "{}:{}", bound(left), bound(right))?;
                match step.get() {
                    1 => Ok(()),
                    step => write!(f, ":{step}"),
                }
            }
        }
    }
}

impl From<usize> for TensorIndexer {
    fn from(index: usize) -> Self {
        TensorIndexer::Select(index)
    }
}

fn narrow(range: impl RangeBounds<usize>) -> TensorIndexer {
    let (start, end) = (range.start_bound().cloned(), range.end_bound().cloned());
    TensorIndexer::Narrow(start, end, NonZeroUsize::MIN)
}

macro_rules! from_ranges {
    ($($range:ty),*) => {
        $(impl From<$range> for TensorIndexer {
            fn from(range: $range) -> Self {
                narrow(range)
            }
        })*
    };
}

from_ranges!(
    Range<usize>,
    RangeFrom<usize>,
    RangeFull,
    RangeInclusive<usize>,
    RangeTo<usize>,
    RangeToInclusive<usize>
);

/// Slicing with an index, a range, or a tuple of up to three of them.
///
/// ```
/// use tonnage::compat::{Dtype, slice::IndexOp, tensor::TensorView};
///
/// let view = TensorView::new(Dtype::U8, vec![2, 3], &[1, 2, 3, 4, 5, 6])?;
/// let slice = view.slice((.., 1..)).unwrap();
/// assert_eq!(slice.newshape(), [2, 2]);
/// assert_eq!(slice.collect::<Vec<_>>(), [[2, 3], [5, 6]]);
/// # Ok::<(), tonnage::compat::SafeTensorError>(())
/// ```
pub trait IndexOp<'data, T> {
    /// The pieces of bytes that make up the slice.
    ///
    /// # Errors
    /// Indices that don't fit the shape.
    fn slice(&'data self, index: T) -> Result<SliceIterator<'data>, InvalidSlice>;
}

impl<'data, A: Into<TensorIndexer>> IndexOp<'data, A> for TensorView<'data> {
    fn slice(&'data self, index: A) -> Result<SliceIterator<'data>, InvalidSlice> {
        self.sliced_data(&[index.into()])
    }
}

macro_rules! index_by_tuple {
    ($($index:ident)*) => {
        impl<'data, $($index: Into<TensorIndexer>),*> IndexOp<'data, ($($index,)*)> for TensorView<'data> {
            #[allow(non_snake_case)]
            fn slice(&'data self, ($($index,)*): ($($index,)*)) -> Result<SliceIterator<'data>, InvalidSlice> {
                self.sliced_data(&[$($index.into()),*])
            }
        }
    };
}

index_by_tuple!(A);
index_by_tuple!(A B);
index_by_tuple!(A B C);

/// The pieces of bytes that make up a slice, in the order of its elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceIterator<'data> {
    data: &'data [u8],
    runs: Runs,
    remaining: usize,
    newshape: Vec<usize>,
}

impl<'data> SliceIterator<'data> {
    pub(super) fn new(
        view: &TensorView<'data>,
        slices: &[TensorIndexer],
    ) -> Result<Self, InvalidSlice> {
        let (runs, newshape) = resolve(view.dtype(), view.shape(), slices)?;
        Ok(SliceIterator {
            data: view.data(),
            remaining: runs.byte_len() as usize,
            runs,
            newshape,
        })
    }

    /// Bytes still to come.
    pub fn remaining_byte_len(&self) -> usize {
        self.remaining
    }

    /// The shape of the slice.
    pub fn newshape(&self) -> Vec<usize> {
        self.newshape.clone()
    }
}

impl<'data> Iterator for SliceIterator<'data> {
    type Item = &'data [u8];

    fn next(&mut self) -> Option<&'data [u8]> {
        let (offset, length) = self.runs.next()?;
        self.remaining -= length as usize;
        let offset = offset as usize;
        self.data.get(offset..offset + length as usize)
    }
}

/// Byte ranges within a tensor: first byte and one past the last, in the order of the slice's elements.
pub type SliceByteRanges = Vec<(usize, usize)>;

/// The shape of a slice.
pub type SlicedShape = Vec<usize>;

/// Which bytes of a tensor a slice covers, and its shape; needs no data.
///
/// ```
/// use tonnage::compat::{Dtype, slice::slice_byte_ranges};
///
/// let (ranges, shape) = slice_byte_ranges(Dtype::F16, &[4, 8], &[(1..3).into(), (2..4).into()])?;
/// assert_eq!(ranges, [(20, 24), (36, 40)]);
/// assert_eq!(shape, [2, 2]);
/// # Ok::<(), tonnage::compat::slice::InvalidSlice>(())
/// ```
///
/// # Errors
/// Indices that don't fit the shape.
pub fn slice_byte_ranges(
    dtype: Dtype,
    shape: &[usize],
    slices: &[TensorIndexer],
) -> Result<(SliceByteRanges, SlicedShape), InvalidSlice> {
    let (runs, newshape) = resolve(dtype, shape, slices)?;
    let ranges = runs.map(|(offset, length)| (offset as usize, (offset + length) as usize));
    Ok((ranges.collect(), newshape))
}

fn resolve(
    dtype: Dtype,
    shape: &[usize],
    slices: &[TensorIndexer],
) -> Result<(Runs, Vec<usize>), InvalidSlice> {
    if slices.len() > shape.len() {
        return Err(InvalidSlice::TooManySlices);
    }
    let mut taken = Vec::with_capacity(slices.len());
    // From the last dimension to the first, so that of two wrong ones the reference's is named.
    for (axis, (slice, &extent)) in slices.iter().zip(shape).enumerate().rev() {
        taken.push(check(axis, slice, extent)?);
    }
    taken.reverse();
    let extents: Vec<u64> = shape.iter().map(|&extent| extent as u64).collect();
    let runs = runs(dtype, &extents, &taken).map_err(|_| InvalidSlice::MisalignedSlice)?;
    let kept = |(axis, &extent): (usize, &usize)| match (slices.get(axis), taken.get(axis)) {
        (Some(TensorIndexer::Select(_)), _) => None,
        (_, Some(indices)) => Some(indices.len() as usize),
        _ => Some(extent),
    };
    Ok((runs, shape.iter().enumerate().filter_map(kept).collect()))
}

/// A slice of one dimension within its bounds. A range may be empty, also at the dimension's end, as a range
/// of a Rust slice may.
fn check(axis: usize, slice: &TensorIndexer, extent: usize) -> Result<Indices, InvalidSlice> {
    let (start, stop, step) = slice.resolve(extent);
    let asked = if stop > extent && start < extent {
        stop - 1
    } else {
        start
    };
    if start > stop || stop > extent {
        return Err(InvalidSlice::SliceOutOfRange {
            dim_index: axis,
            asked,
            dim_size: extent,
        });
    }
    Ok(Indices {
        start: start as u64,
        stop: stop as u64,
        step: step as u64,
    })
}
