//! The reference's error, and which of its variants stands for which reason of the specification.

use std::fmt;
use std::io;
use std::str::Utf8Error;

use serde::de::Error as _;

use super::Dtype;
use crate::format::{Error, Reason};

/// Why reading or writing failed.
#[derive(Debug)]
pub enum SafeTensorError {
    /// The header is not UTF-8.
    InvalidHeader(Utf8Error),
    /// The header is not JSON, or not the JSON of a header.
    InvalidHeaderDeserialization(serde_json::Error),
    /// The header is longer than 100,000,000 bytes.
    HeaderTooLarge,
    /// There are not even the 8 bytes of the header's length.
    HeaderTooSmall,
    /// The header reaches past the end of the buffer.
    InvalidHeaderLength,
    /// No tensor has this name.
    TensorNotFound(String),
    /// A tensor's bytes do not fit its dtype and shape.
    TensorInvalidInfo,
    /// The tensor of this name does not begin where the one before it ends, or ends before it begins.
    InvalidOffset(String),
    /// The system refused to read or write.
    IoError(io::Error),
    /// What is to be written cannot be put into a header.
    JsonError(serde_json::Error),
    /// A buffer of this length does not hold a tensor of this dtype and shape.
    InvalidTensorView(Dtype, Vec<usize>, usize),
    /// The tensors do not cover the buffer up to its last byte.
    MetadataIncompleteBuffer,
    /// A size overflows.
    ValidationOverflow,
    /// The elements of a sub-byte dtype do not fill whole bytes.
    MisalignedSlice,
}

impl SafeTensorError {
    /// The reference's variant for a refusal of the header in `json`.
    pub(super) fn from_format(error: &Error, json: &[u8]) -> Self {
        let name = || error.tensor_name().unwrap_or_default().to_owned();
        match error.reason() {
            Reason::FileTooSmall => SafeTensorError::HeaderTooSmall,
            Reason::HeaderTooLarge | Reason::LimitHeader | Reason::WriteTooLarge => {
                SafeTensorError::HeaderTooLarge
            }
            Reason::HeaderPastEnd => SafeTensorError::InvalidHeaderLength,
            // A header of one byte is refused for its length; the reference looks at the byte.
            Reason::InvalidUtf8 | Reason::HeaderTooShort => match std::str::from_utf8(json) {
                Err(error) => SafeTensorError::InvalidHeader(error),
                Ok(_) => SafeTensorError::InvalidHeaderDeserialization(json_error(error)),
            },
            Reason::OffsetsReversed | Reason::Hole | Reason::Overlap | Reason::EmptyInside => {
                SafeTensorError::InvalidOffset(name())
            }
            // The reference reads 64 bits and then meets the overflow; here 63 are the most (spec 3.10).
            Reason::SizeOverflow | Reason::IntegerRange | Reason::WriteSize => {
                SafeTensorError::ValidationOverflow
            }
            Reason::PartialByte | Reason::WritePartialByte => SafeTensorError::MisalignedSlice,
            Reason::SizeMismatch => SafeTensorError::TensorInvalidInfo,
            Reason::DataTruncated | Reason::TrailingData => {
                SafeTensorError::MetadataIncompleteBuffer
            }
            Reason::UnknownTensor => SafeTensorError::TensorNotFound(name()),
            Reason::WriteDuplicate | Reason::WriteReservedName => {
                SafeTensorError::JsonError(json_error(error))
            }
            _ => SafeTensorError::InvalidHeaderDeserialization(json_error(error)),
        }
    }

    /// The refusal to write a name twice: the reference has no variant for what makes it panic.
    pub(super) fn name_taken(name: &str, why: Reason) -> Self {
        Self::from_format(&Error::new(why).tensor(name).needed("another name"), &[])
    }
}

fn json_error(error: &Error) -> serde_json::Error {
    serde_json::Error::custom(error)
}

impl From<io::Error> for SafeTensorError {
    fn from(error: io::Error) -> Self {
        SafeTensorError::IoError(error)
    }
}

impl From<serde_json::Error> for SafeTensorError {
    fn from(error: serde_json::Error) -> Self {
        SafeTensorError::JsonError(error)
    }
}

impl From<crate::storage::Error> for SafeTensorError {
    fn from(error: crate::storage::Error) -> Self {
        SafeTensorError::IoError(error.into())
    }
}

impl fmt::Display for SafeTensorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidHeader(error) => write!(f, "invalid UTF-8 in header: {error}"),
            Self::InvalidHeaderDeserialization(error) => {
                write!(f, "invalid JSON in header: {error}")
            }
            Self::HeaderTooLarge => f.write_str("header too large"),
            Self::HeaderTooSmall => f.write_str("header too small"),
            Self::InvalidHeaderLength => f.write_str("invalid header length"),
            Self::TensorNotFound(name) => write!(f, "tensor `{name}` not found"),
            Self::TensorInvalidInfo => {
                f.write_str("invalid shape, data type, or offset for tensor")
            }
            Self::InvalidOffset(name) => write!(f, "invalid offset for tensor `{name}`"),
            Self::IoError(error) => write!(f, "I/O error: {error}"),
            Self::JsonError(error) => write!(f, "JSON error: {error}"),
            Self::InvalidTensorView(dtype, shape, len) => {
                let extents: Vec<String> = shape.iter().map(usize::to_string).collect();
                let shape = extents.join(", ");
                write!(
                    f,
                    "tensor of type {dtype} and shape ({shape}) can't be created from {len} bytes"
                )
            }
            Self::MetadataIncompleteBuffer => {
                f.write_str("incomplete metadata, file not fully covered")
            }
            Self::ValidationOverflow => {
                f.write_str("overflow computing buffer size from shape and/or element type")
            }
            Self::MisalignedSlice => f.write_str(crate::compat::slice::MISALIGNED),
        }
    }
}

impl std::error::Error for SafeTensorError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::InvalidHeader(source) => Some(source),
            Self::InvalidHeaderDeserialization(source) | Self::JsonError(source) => Some(source),
            Self::IoError(source) => Some(source),
            _ => None,
        }
    }
}
