//! What a header may have but had better not (spec 10.11): nothing here refuses a file.

use alloc::string::{String, ToString};
use core::fmt;

use crate::error::excerpt;
use crate::forever::HEADER_ALIGN;
use crate::header::TensorInfo;

/// Longest name that raises no lint, in bytes.
const LONG_NAME: usize = 1024;
/// Largest header that the Hub's own readers take.
const HUB_HEADER: u64 = 25_000_000;
/// Largest integer that readers built on doubles keep exactly.
const EXACT_DOUBLE: u64 = (1 << 53) - 1;

/// One remark on a file that is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lint {
    /// Whitespace before the object: writers must not (spec 3.3).
    LeadingWhitespace,
    /// Padding other than spaces (spec 9.8).
    PaddingNotSpaces,
    /// `__metadata__` is null, which the strict profile refuses (spec 7.1, 10.1).
    MetadataNull,
    /// The data section does not start on a multiple of 8 (spec 9.8).
    Unaligned(u64),
    /// The header is longer than some public readers accept (spec 9.3).
    LargeHeader(u64),
    /// A name with control or direction-changing characters, or over 1 KiB (spec 4.7).
    Name(String),
    /// A size or offset that doubles cannot hold (spec 3.10).
    LargeInteger(String),
    /// A dtype that is not in the table (spec 5.2).
    UnknownDtype(String, String),
    /// A tensor that does not start on a multiple of its element's size (spec 6.9).
    Misaligned(String),
}

impl Lint {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Lint::LeadingWhitespace => "LEADING_WHITESPACE",
            Lint::PaddingNotSpaces => "PADDING_NOT_SPACES",
            Lint::MetadataNull => "METADATA_NULL",
            Lint::Unaligned(_) => "UNALIGNED",
            Lint::LargeHeader(_) => "LARGE_HEADER",
            Lint::Name(_) => "NAME",
            Lint::LargeInteger(_) => "LARGE_INTEGER",
            Lint::UnknownDtype(..) => "UNKNOWN_DTYPE",
            Lint::Misaligned(_) => "MISALIGNED",
        }
    }
}

impl fmt::Display for Lint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lint::LeadingWhitespace => f.write_str("the header begins with whitespace"),
            Lint::PaddingNotSpaces => f.write_str("the header is padded with other than spaces"),
            Lint::MetadataNull => f.write_str("`__metadata__` is null; strict readers refuse that"),
            Lint::Unaligned(start) => {
                write!(f, "the data starts at byte {start}, no multiple of 8")
            }
            Lint::LargeHeader(len) => write!(
                f,
                "the header has {len} bytes; some readers stop at {HUB_HEADER}"
            ),
            Lint::Name(name) => write!(
                f,
                "the name {:?} is long or has control characters",
                excerpt(name)
            ),
            Lint::LargeInteger(name) => {
                write!(f, "tensor {:?} has sizes beyond 2^53-1", excerpt(name))
            }
            Lint::UnknownDtype(name, dtype) => {
                write!(
                    f,
                    "tensor {:?} has the unknown dtype {:?}",
                    excerpt(name),
                    excerpt(dtype)
                )
            }
            Lint::Misaligned(name) => {
                write!(
                    f,
                    "tensor {:?} does not start on a multiple of its element size",
                    excerpt(name)
                )
            }
        }
    }
}

pub(crate) fn header(end: u64, found: &mut alloc::vec::Vec<Lint>) {
    if !end.is_multiple_of(HEADER_ALIGN) {
        found.push(Lint::Unaligned(end));
    }
    if end > HUB_HEADER {
        found.push(Lint::LargeHeader(end));
    }
}

pub(crate) fn tensor(tensor: &TensorInfo<'_>, found: &mut alloc::vec::Vec<Lint>) {
    let name = || tensor.name.to_string();
    if tensor.name.len() > LONG_NAME || tensor.name.chars().any(suspicious) {
        found.push(Lint::Name(name()));
    }
    if tensor.end > EXACT_DOUBLE || tensor.shape.iter().any(|&extent| extent > EXACT_DOUBLE) {
        found.push(Lint::LargeInteger(name()));
    }
    match tensor.dtype.known() {
        Ok(dtype) if !tensor.begin.is_multiple_of(dtype.swap_unit() as u64) => {
            found.push(Lint::Misaligned(name()))
        }
        Ok(_) => {}
        Err(_) => found.push(Lint::UnknownDtype(name(), tensor.dtype.name().to_string())),
    }
}

/// Characters that hide what a name is: controls, direction marks, non-characters.
fn suspicious(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
        || (c as u32) & 0xFFFE == 0xFFFE
}
