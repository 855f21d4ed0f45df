//! What can be wrong with blocks, or with a wish for them.

use std::fmt;

use super::GgmlType;

/// Why blocks could not be read or made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GgmlError {
    /// No tensor type has this number.
    UnknownId {
        /// The number in the file.
        id: u32,
    },
    /// A row is not a whole number of blocks, or its bytes overflow.
    Elements {
        /// The type of the row.
        ty: GgmlType,
        /// The elements asked for.
        elements: u64,
    },
    /// The bytes or the elements are not what the other one asks for.
    Length {
        /// The type of the blocks.
        ty: GgmlType,
        /// The bytes given.
        bytes: usize,
        /// The elements given.
        elements: usize,
    },
    /// This type is not turned into floats here: integers, and what no file holds.
    NotDequantised {
        /// The type asked for.
        ty: GgmlType,
    },
    /// This type is not made here: integers, what no file holds, and the grids of IQ1 to IQ3.
    NotQuantised {
        /// The type asked for.
        ty: GgmlType,
    },
    /// A value to quantise is infinite or NaN.
    NotFinite {
        /// Its place among the values.
        index: usize,
    },
    /// A block's values are so large that its binary16 scale would be infinite.
    TooLarge {
        /// The block's place.
        block: usize,
    },
}

impl fmt::Display for GgmlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            GgmlError::UnknownId { id } => write!(f, "{id} is the number of no ggml tensor type"),
            GgmlError::Elements { ty, elements } => write!(
                f,
                "a row of {elements} elements cannot be {ty}, whose blocks hold {}",
                ty.elements()
            ),
            GgmlError::Length {
                ty,
                bytes,
                elements,
            } => write!(
                f,
                "{bytes} bytes and {elements} elements do not go together as {ty}: a block is {} bytes and {} elements",
                ty.bytes(),
                ty.elements()
            ),
            GgmlError::NotDequantised { ty } => write!(f, "{ty} is not dequantised"),
            GgmlError::NotQuantised { ty } => write!(f, "nothing is quantised to {ty}"),
            GgmlError::NotFinite { index } => {
                write!(
                    f,
                    "element {index} is not finite, and blocks hold only finite numbers"
                )
            }
            GgmlError::TooLarge { block } => {
                write!(
                    f,
                    "the values of block {block} are too large for its scale, a binary16"
                )
            }
        }
    }
}

impl std::error::Error for GgmlError {}
