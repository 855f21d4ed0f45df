//! What a quantised tensor is refused for.

use std::fmt;

/// Why something can't be read, cut, or converted. `tensor` is filled in by whoever knows its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The kind, by which callers decide.
    pub reason: Reason,
    /// The tensor's name; empty where it is not known here.
    pub tensor: String,
    /// What was found and what was needed, in one sentence.
    pub text: String,
}

/// The kind of an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The parts' sizes, dtypes or shapes do not fit the scheme (lint Q001).
    Size,
    /// A part that the scheme needs is not there (lint Q002).
    Missing,
    /// A parameter of the scheme is missing or has a value that it can't have.
    Parameter,
    /// A layout that reaches outside of its part or beyond the caps.
    Layout,
    /// A scheme, version or operation that is not known here.
    Unsupported,
    /// Several readings are possible.
    Ambiguous,
    /// It would lose something, and that was not asked for.
    Lossy,
    /// A cut where the parts can't be cut; the message says which multiples can be.
    Granularity,
    /// The caller's own mistake: a row that is not there, a destination of another length.
    Usage,
}

impl Error {
    pub(crate) fn new(reason: Reason, text: impl Into<String>) -> Self {
        Error {
            reason,
            tensor: String::new(),
            text: text.into(),
        }
    }

    pub(crate) fn layout(text: String) -> Self {
        Error::new(Reason::Layout, text)
    }

    /// The same error, of a tensor.
    #[must_use]
    pub fn of(mut self, tensor: &str) -> Self {
        if self.tensor.is_empty() {
            tensor.clone_into(&mut self.tensor);
        }
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.tensor.is_empty() {
            write!(f, "tensor {:?}: ", self.tensor)?;
        }
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}
