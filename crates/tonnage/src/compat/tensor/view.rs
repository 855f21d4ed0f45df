//! A tensor to be written, and a tensor that was read: dtype, shape and bytes.

use std::borrow::Cow;

use super::{Dtype, SafeTensorError};
use crate::compat::slice::{InvalidSlice, SliceIterator, TensorIndexer};
use crate::format::Reason;

/// What a tensor must offer to be written. Implement it for your own tensors: bytes that lie in this
/// process can be borrowed, bytes that lie elsewhere are fetched when they are asked for.
///
/// ```
/// use std::borrow::Cow;
/// use tonnage::compat::{Dtype, View, serialize};
///
/// struct Ones(Vec<usize>);
///
/// impl View for Ones {
///     fn dtype(&self) -> Dtype {
///         Dtype::U8
///     }
///     fn shape(&self) -> &[usize] {
///         &self.0
///     }
///     fn data(&self) -> Cow<'_, [u8]> {
///         vec![1; self.data_len()].into()
///     }
///     fn data_len(&self) -> usize {
///         self.0.iter().product()
///     }
/// }
///
/// let file = serialize([("ones", Ones(vec![2, 3]))], None)?;
/// assert!(file.ends_with(&[1; 6]));
/// # Ok::<(), tonnage::compat::SafeTensorError>(())
/// ```
pub trait View {
    /// The type of the elements.
    fn dtype(&self) -> Dtype;
    /// The extents, in elements.
    fn shape(&self) -> &[usize];
    /// The bytes, little-endian, row-major.
    fn data(&self) -> Cow<'_, [u8]>;
    /// How many bytes [`View::data`] will give; asked for before any of them is.
    fn data_len(&self) -> usize;
}

/// A tensor whose bytes are borrowed from the file.
#[derive(Debug, PartialEq, Eq, Clone)]
pub struct TensorView<'data> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: &'data [u8],
}

impl<'data> TensorView<'data> {
    /// A tensor over `data`.
    ///
    /// # Errors
    /// [`SafeTensorError::InvalidTensorView`] where `data` has another length than dtype and shape say,
    /// [`SafeTensorError::MisalignedSlice`] where those don't fill whole bytes, and
    /// [`SafeTensorError::ValidationOverflow`] where their size overflows.
    pub fn new(
        dtype: Dtype,
        shape: Vec<usize>,
        data: &'data [u8],
    ) -> Result<Self, SafeTensorError> {
        if byte_len(dtype, &shape)? != data.len() as u64 {
            return Err(SafeTensorError::InvalidTensorView(dtype, shape, data.len()));
        }
        Ok(TensorView { dtype, shape, data })
    }

    /// A tensor whose size a header has vouched for.
    pub(super) fn checked(dtype: Dtype, shape: Vec<usize>, data: &'data [u8]) -> Self {
        TensorView { dtype, shape, data }
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The extents, in elements.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes.
    pub fn data(&self) -> &'data [u8] {
        self.data
    }

    /// The pieces of the bytes that make up a slice.
    ///
    /// # Errors
    /// Indices that don't fit the shape: [`InvalidSlice`].
    pub fn sliced_data(
        &'data self,
        slices: &[TensorIndexer],
    ) -> Result<SliceIterator<'data>, InvalidSlice> {
        SliceIterator::new(self, slices)
    }
}

/// Bytes of a tensor of this dtype and shape.
pub(super) fn byte_len(dtype: Dtype, shape: &[usize]) -> Result<u64, SafeTensorError> {
    // Shapes are short: the copy stays on the stack for all but exotic ranks.
    let mut few = [0_u64; 8];
    let many: Vec<u64>;
    let extents = match few.get_mut(..shape.len()) {
        Some(few) => {
            for (to, &from) in few.iter_mut().zip(shape) {
                *to = from as u64;
            }
            &*few
        }
        None => {
            many = shape.iter().map(|&extent| extent as u64).collect();
            &many
        }
    };
    dtype
        .bytes_of(extents)
        .map_err(|error| match error.reason() {
            Reason::PartialByte => SafeTensorError::MisalignedSlice,
            _ => SafeTensorError::ValidationOverflow,
        })
}

impl View for TensorView<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

impl View for &TensorView<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}
