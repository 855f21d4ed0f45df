//! Why a pipeline ended, and what it was about then.

use std::fmt;
use std::ops::Range;

use super::block::Block;
use super::piece::Piece;
use crate::control::Error;

/// Why a pipeline ended early: the first error of any thread, and what that thread was about.
#[derive(Debug)]
pub struct Failed(Box<Inner>);

#[derive(Debug)]
struct Inner {
    error: Error,
    place: Option<Place>,
}

impl Failed {
    pub(super) fn of(error: Error) -> Self {
        Failed(Box::new(Inner { error, place: None }))
    }

    pub(super) fn at(error: Error, place: Place) -> Self {
        let place = Some(place);
        Failed(Box::new(Inner { error, place }))
    }

    /// What went wrong.
    pub fn error(&self) -> &Error {
        &self.0.error
    }

    /// What the bytes belong to; the first of them, if a block has bytes of several.
    pub fn tag(&self) -> Option<u64> {
        self.0.place.as_ref()?.tag
    }

    /// The source's label.
    pub fn label(&self) -> Option<&str> {
        Some(&self.0.place.as_ref()?.source)
    }

    /// The bytes of the source.
    pub fn range(&self) -> Option<Range<u64>> {
        Some(self.0.place.as_ref()?.range.clone())
    }

    /// What went wrong, without the place.
    pub fn into_error(self) -> Error {
        self.0.error
    }
}

/// What a block is about, kept while its copy runs.
#[derive(Clone, Debug)]
pub(super) struct Place {
    tag: Option<u64>,
    source: String,
    range: Range<u64>,
}

impl Place {
    pub fn of(block: &Block) -> Self {
        Place {
            tag: block.parts.first().map(|part| part.tag),
            source: block.source.label().to_owned(),
            range: block.offset()..block.end(),
        }
    }

    pub fn of_piece(piece: &Piece) -> Self {
        Place {
            tag: Some(piece.tag),
            source: piece.source.label().to_owned(),
            range: piece.offset..piece.offset.saturating_add(piece.byte_len()),
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { error, place } = &*self.0;
        error.fmt(f)?;
        match (place, error) {
            (None, _) | (_, Error::Cancelled) => Ok(()),
            // A storage error names the file itself.
            (Some(Place { range, .. }), Error::Storage { .. }) => {
                write!(f, " (bytes {} to {})", range.start, range.end)
            }
            (Some(Place { range, source, .. }), _) => {
                write!(f, " (bytes {} to {} of {source})", range.start, range.end)
            }
        }
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0.error)
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.into_error()
    }
}
