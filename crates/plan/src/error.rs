//! One error type: what was asked that cannot be, of which tensor, in which range.

use std::fmt;

/// Why a plan was refused. The codes never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The request, the rules or the plan are not of the form that they should have.
    Form,
    /// No source has this name.
    UnknownTensor,
    /// The mesh has no such axis.
    UnknownAxis,
    /// A mesh that cannot be.
    Mesh,
    /// A tensor that no rule places.
    NoRule,
    /// A view that cannot be: shapes or dtypes that don't fit.
    View,
    /// A placement that does not fit the tensor.
    Placement,
    /// A dimension that does not divide as was asked.
    Uneven,
    /// Bytes of a source that nobody reads.
    Unread,
    /// Bytes of a source that are read more often than was declared.
    Repeated,
    /// A local tensor that is not filled exactly once.
    Destination,
    /// Bytes that lie outside of their source or their file.
    Bounds,
    /// Pieces of a sub-byte dtype that do not begin and end on bytes.
    Granularity,
    /// A copy that brings other elements than the view and the placement say.
    Semantics,
    /// More work or memory than a plan may take.
    Limit,
    /// A dtype that the table of dtypes does not have.
    Dtype,
    /// Ranks that say different things of one tensor.
    Disagree,
    /// Two plans that should be one are not.
    Digest,
}

impl Reason {
    /// The stable code, such as `"PLAN_UNREAD"`.
    pub fn code(self) -> &'static str {
        match self {
            Reason::Form => "PLAN_FORM",
            Reason::UnknownTensor => "PLAN_UNKNOWN_TENSOR",
            Reason::UnknownAxis => "PLAN_UNKNOWN_AXIS",
            Reason::Mesh => "PLAN_MESH",
            Reason::NoRule => "PLAN_NO_RULE",
            Reason::View => "PLAN_VIEW",
            Reason::Placement => "PLAN_PLACEMENT",
            Reason::Uneven => "PLAN_UNEVEN",
            Reason::Unread => "PLAN_UNREAD",
            Reason::Repeated => "PLAN_REPEATED",
            Reason::Destination => "PLAN_DESTINATION",
            Reason::Bounds => "PLAN_BOUNDS",
            Reason::Granularity => "PLAN_GRANULARITY",
            Reason::Semantics => "PLAN_SEMANTICS",
            Reason::Limit => "PLAN_LIMIT",
            Reason::Dtype => "PLAN_DTYPE",
            Reason::Disagree => "PLAN_DISAGREE",
            Reason::Digest => "PLAN_DIGEST",
        }
    }

    /// The reason as a phrase.
    pub fn phrase(self) -> &'static str {
        match self {
            Reason::Form => "the text does not have the form that it should have",
            Reason::UnknownTensor => "no tensor has this name",
            Reason::UnknownAxis => "the mesh has no such axis",
            Reason::Mesh => "the mesh cannot be",
            Reason::NoRule => "no rule places the tensor",
            Reason::View => "the view does not fit its tensors",
            Reason::Placement => "the placement does not fit the tensor",
            Reason::Uneven => "the dimension does not divide as was asked",
            Reason::Unread => "bytes would be read by nobody",
            Reason::Repeated => "bytes would be read more often than was declared",
            Reason::Destination => "the copies do not fill the tensor exactly once",
            Reason::Bounds => "the copies lie outside of their source",
            Reason::Granularity => "a copy begins or ends inside a byte",
            Reason::Semantics => "the copies bring other elements than was declared",
            Reason::Limit => "the plan is larger than plans may be",
            Reason::Dtype => "the dtype is not known",
            Reason::Disagree => "ranks say different things of it",
            Reason::Digest => "the plans of two ranks differ",
        }
    }
}

/// A refusal: why, of which tensor, in which range, what was found and what was needed. Displays as
/// one sentence.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    reason: Reason,
    tensor: Option<String>,
    range: Option<String>,
    found: String,
    needed: String,
}

/// Longest piece of a name or a value that a message repeats: hostile input holds megabytes.
const EXCERPT: usize = 160;

fn excerpt(text: String) -> String {
    if text.len() <= EXCERPT {
        return text;
    }
    let mut end = EXCERPT;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", text.get(..end).unwrap_or(""))
}

impl Error {
    /// An error of this reason with nothing said yet.
    pub fn new(reason: Reason) -> Self {
        Error(Box::new(Inner {
            reason,
            tensor: None,
            range: None,
            found: String::new(),
            needed: String::new(),
        }))
    }

    /// Names the tensor, where none is named yet.
    #[must_use]
    pub fn tensor(mut self, name: &str) -> Self {
        if self.0.tensor.is_none() {
            self.0.tensor = Some(name.to_owned());
        }
        self
    }

    /// Says in which range: of elements, of a dimension, of bytes.
    #[must_use]
    pub fn range(mut self, range: impl fmt::Display) -> Self {
        self.0.range = Some(excerpt(range.to_string()));
        self
    }

    /// Says in which range, where none is said yet.
    #[must_use]
    pub(crate) fn range_or(self, range: impl fmt::Display) -> Self {
        if self.0.range.is_some() {
            return self;
        }
        self.range(range)
    }

    /// Says what was found.
    #[must_use]
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = excerpt(found.to_string());
        self
    }

    /// Says what was needed.
    #[must_use]
    pub fn needed(mut self, needed: impl fmt::Display) -> Self {
        self.0.needed = excerpt(needed.to_string());
        self
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// The reason's stable code.
    pub fn code(&self) -> &'static str {
        self.0.reason.code()
    }

    /// The tensor's name, where one is concerned.
    pub fn tensor_name(&self) -> Option<&str> {
        self.0.tensor.as_deref()
    }

    /// The range, where one is concerned.
    pub fn range_text(&self) -> Option<&str> {
        self.0.range.as_deref()
    }

    /// What was found.
    pub fn found_text(&self) -> &str {
        &self.0.found
    }

    /// What was needed.
    pub fn needed_text(&self) -> &str {
        &self.0.needed
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if let Some(tensor) = &inner.tensor {
            write!(f, "tensor {:?}: ", excerpt(tensor.clone()))?;
        }
        f.write_str(inner.reason.phrase())?;
        if let Some(range) = &inner.range {
            write!(f, ": {range}")?;
        }
        if !inner.found.is_empty() {
            write!(f, "; found {}", inner.found)?;
        }
        if !inner.needed.is_empty() {
            write!(f, "; needed {}", inner.needed)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.code())
    }
}

impl std::error::Error for Error {}

/// What functions of this crate give.
pub type Result<T, E = Error> = std::result::Result<T, E>;
