//! One error type for the grammar: why something was refused, where, and which clause says so.
//!
//! A [`Reason`] is one row of the table below: a stable code for machines, the spec clause, the
//! class (who must act), and a phrase. An [`Error`] adds the tensor, what was found, what was
//! needed and the byte where it was seen. Layers above add the file's name.

use alloc::borrow::ToOwned;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;

/// Who must act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The bytes break the specification: whoever made the file.
    Malformed,
    /// A budget of [`crate::Limits`] is exceeded: whoever set it.
    Limit,
    /// Well-formed, but this version does not know its meaning.
    Unsupported,
    /// The caller asked for something that cannot be.
    Usage,
}

macro_rules! reasons {
    ($($id:ident $code:literal $clause:literal $class:ident $phrase:literal;)*) => {
        /// Why something was refused. Codes and clauses never change their meaning (spec 12.5).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason { $(#[doc = $phrase] $id,)* }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Reason] = &[$(Reason::$id,)*];

            /// The stable code, such as `"HOLE"`.
            pub fn code(self) -> &'static str {
                match self { $(Reason::$id => $code,)* }
            }

            /// The clause of the specification, such as `"6.4"`; empty for usage errors that no
            /// clause governs.
            pub fn clause(self) -> &'static str {
                match self { $(Reason::$id => $clause,)* }
            }

            /// Who must act.
            pub fn class(self) -> Class {
                match self { $(Reason::$id => Class::$class,)* }
            }

            /// The reason as a phrase.
            pub fn phrase(self) -> &'static str {
                match self { $(Reason::$id => $phrase,)* }
            }
        }
    };
}

reasons! {
    FileTooSmall "FILE_TOO_SMALL" "2.1" Malformed "the file is too small to hold the 8-byte header length";
    HeaderTooShort "HEADER_TOO_SHORT" "2.2" Malformed "the header is too short to be a JSON object";
    HeaderTooLarge "HEADER_TOO_LARGE" "2.3" Malformed "the header is longer than the format allows";
    HeaderPastEnd "HEADER_PAST_END" "2.4" Malformed "the header reaches past the end of the file";
    InvalidUtf8 "INVALID_UTF8" "3.1" Malformed "the header is not valid UTF-8";
    ByteOrderMark "BYTE_ORDER_MARK" "3.2" Malformed "the header begins with a byte order mark";
    Framing "FRAMING" "3.3" Malformed "only JSON whitespace may stand around the header's object";
    NotAnObject "NOT_AN_OBJECT" "3.4" Malformed "the header is not a JSON object";
    JsonSyntax "JSON_SYNTAX" "3.5" Malformed "the header is not valid JSON";
    ControlCharacter "CONTROL_CHARACTER" "3.6" Malformed "a raw control character stands inside a JSON string";
    InvalidEscape "INVALID_ESCAPE" "3.7" Malformed "a JSON string holds an invalid escape";
    LoneSurrogate "LONE_SURROGATE" "3.8" Malformed "a JSON string holds half of a surrogate pair";
    NumberForm "NUMBER_FORM" "3.9" Malformed "a size or offset is not a plain decimal integer";
    IntegerRange "INTEGER_RANGE" "3.10" Malformed "a size or offset is out of range";
    NestingTooDeep "NESTING_TOO_DEEP" "3.11" Malformed "values are nested too deeply";
    DuplicateTensor "DUPLICATE_TENSOR" "3.12" Malformed "two tensors have the same name";
    DuplicateField "DUPLICATE_FIELD" "3.13" Malformed "a tensor's entry has the same key twice";
    DuplicateMetadata "DUPLICATE_METADATA" "3.14" Malformed "the header has `__metadata__` twice";
    DuplicateMetadataKey "DUPLICATE_METADATA_KEY" "3.15" Malformed "`__metadata__` has the same key twice";
    EntryNotObject "ENTRY_NOT_OBJECT" "4.1" Malformed "a tensor's entry is not an object";
    MissingField "MISSING_FIELD" "4.2" Malformed "a tensor's entry lacks a field";
    DtypeNotString "DTYPE_NOT_STRING" "4.3" Malformed "a tensor's dtype is not a string";
    ShapeNotArray "SHAPE_NOT_ARRAY" "4.4" Malformed "a tensor's shape is not an array of integers";
    OffsetsForm "OFFSETS_FORM" "4.5" Malformed "a tensor's data_offsets are not an array of two integers";
    UnsupportedDtype "UNSUPPORTED_DTYPE" "5.2" Unsupported "the dtype is not known";
    PartialByte "PARTIAL_BYTE" "5.4" Malformed "the elements do not fill whole bytes";
    OffsetsReversed "OFFSETS_REVERSED" "6.1" Malformed "a tensor ends before it begins";
    SizeOverflow "SIZE_OVERFLOW" "6.2" Malformed "the size of a tensor overflows";
    SizeMismatch "SIZE_MISMATCH" "6.3" Malformed "a tensor's byte range does not fit its dtype and shape";
    Hole "HOLE" "6.4" Malformed "bytes of the data section belong to no tensor";
    Overlap "OVERLAP" "6.5" Malformed "two tensors claim the same bytes";
    EmptyInside "EMPTY_INSIDE" "6.6" Malformed "an empty tensor lies inside another tensor";
    DataTruncated "DATA_TRUNCATED" "6.7" Malformed "the data section is shorter than its tensors";
    TrailingData "TRAILING_DATA" "6.8" Malformed "the data section is longer than its tensors";
    MetadataNotObject "METADATA_NOT_OBJECT" "7.1" Malformed "`__metadata__` is not an object";
    MetadataValue "METADATA_VALUE" "7.2" Malformed "a value of `__metadata__` is not a string";
    IndexForm "INDEX_FORM" "8.1" Malformed "the index is not an object with a `weight_map` object";
    IndexValue "INDEX_VALUE" "8.2" Malformed "a value of `weight_map` is not a string";
    IndexDuplicate "INDEX_DUPLICATE" "8.3" Malformed "the index has the same key twice";
    IndexPath "INDEX_PATH" "8.4" Malformed "a file named by the index is not a plain relative path";
    IndexExtension "INDEX_EXTENSION" "8.5" Malformed "a file named by the index is not a `.safetensors` file";
    IndexEscapes "INDEX_ESCAPES" "8.6" Malformed "a file named by the index leads out of its folder";
    IndexNotRegular "INDEX_NOT_REGULAR" "8.7" Malformed "a file named by the index is not a regular file";
    IndexFileMissing "INDEX_FILE_MISSING" "8.8" Malformed "a file named by the index is missing";
    IndexTensorMissing "INDEX_TENSOR_MISSING" "8.9" Malformed "a file lacks a tensor that the index places in it";
    IndexTensorTwice "INDEX_TENSOR_TWICE" "8.10" Malformed "two files of one checkpoint hold the same tensor";
    IndexShardMissing "INDEX_SHARD_MISSING" "8.11" Malformed "the numbered files of a checkpoint are not complete";
    WriteDuplicate "WRITE_DUPLICATE" "9.1" Usage "two tensors to be written have the same name";
    WriteReservedName "WRITE_RESERVED_NAME" "9.2" Usage "a tensor may not be named `__metadata__`";
    WriteTooLarge "WRITE_TOO_LARGE" "9.3" Usage "the header to be written is longer than the format allows";
    WritePartialByte "WRITE_PARTIAL_BYTE" "9.4" Usage "the elements to be written do not fill whole bytes";
    WriteSize "WRITE_SIZE" "9.5" Usage "the data to be written does not fit its dtype and shape";
    LimitHeader "LIMIT_HEADER" "10.2" Limit "the header is longer than the reader's budget";
    LimitTensors "LIMIT_TENSORS" "10.3" Limit "the file has more tensors than the reader's budget";
    LimitRank "LIMIT_RANK" "10.4" Limit "a tensor has more dimensions than the reader's budget";
    LimitDims "LIMIT_DIMS" "10.5" Limit "the file has more dimensions in all than the reader's budget";
    LimitMetadata "LIMIT_METADATA" "10.6" Limit "the file has more metadata entries than the reader's budget";
    LimitIndex "LIMIT_INDEX" "10.7" Limit "the index is longer than the reader's budget";
    LimitShards "LIMIT_SHARDS" "10.8" Limit "the checkpoint has more files than the reader's budget";
    ChecksumForm "CHECKSUM_FORM" "13.4" Malformed "the checksums do not have the form that they should have";
    ChecksumStale "CHECKSUM_STALE" "13.5" Malformed "the checksums are those of other data";
    ChecksumMismatch "CHECKSUM_MISMATCH" "13.6" Malformed "the data is not what its checksum says";
    NoChecksums "NO_CHECKSUMS" "13.8" Usage "there are no checksums to verify by";
    UnknownTensor "UNKNOWN_TENSOR" "" Usage "no tensor has this name";
    Slice "SLICE" "" Usage "the slice does not fit the tensor";
    Cast "CAST" "" Usage "the values cannot be cast";
}

/// A refusal: its [`Reason`], and what was seen. Displays as one sentence.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    reason: Reason,
    tensor: Option<String>,
    found: String,
    needed: String,
    at: Option<u64>,
}

/// Longest piece of a name or a value that a message repeats: a hostile header holds megabytes.
const EXCERPT: usize = 120;

impl Error {
    /// An error of this reason with nothing said yet.
    pub fn new(reason: Reason) -> Self {
        let (found, needed) = (String::new(), String::new());
        Error(Box::new(Inner {
            reason,
            tensor: None,
            found,
            needed,
            at: None,
        }))
    }

    /// Names the tensor.
    #[must_use]
    pub fn tensor(mut self, name: &str) -> Self {
        self.0.tensor = Some(name.to_owned());
        self
    }

    /// Says what was found.
    #[must_use]
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = excerpt(&found.to_string());
        self
    }

    /// Says what was needed.
    #[must_use]
    pub fn needed(mut self, needed: impl fmt::Display) -> Self {
        self.0.needed = excerpt(&needed.to_string());
        self
    }

    /// Says at which byte of the file.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.at = Some(offset);
        self
    }

    pub(crate) fn unsupported_dtype(name: &str) -> Self {
        Error::new(Reason::UnsupportedDtype)
            .found(format_args!("dtype {:?}", excerpt(name)))
            .needed("a dtype of the specification's table")
    }

    pub(crate) fn over(reason: Reason, found: u64, limit: u64) -> Self {
        Error::new(reason)
            .found(found)
            .needed(format_args!("at most {limit}"))
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// The reason's stable code.
    pub fn code(&self) -> &'static str {
        self.0.reason.code()
    }

    /// The reason's clause of the specification.
    pub fn clause(&self) -> &'static str {
        self.0.reason.clause()
    }

    /// Who must act.
    pub fn class(&self) -> Class {
        self.0.reason.class()
    }

    /// The tensor's name, where one is concerned.
    pub fn tensor_name(&self) -> Option<&str> {
        self.0.tensor.as_deref()
    }

    /// What was found.
    pub fn found_text(&self) -> &str {
        &self.0.found
    }

    /// What was needed.
    pub fn needed_text(&self) -> &str {
        &self.0.needed
    }

    /// The byte of the file at which it was seen.
    pub fn offset(&self) -> Option<u64> {
        self.0.at
    }

    /// What the reference implementation says of the same failure: callers match on these texts.
    pub fn reference_text(&self) -> String {
        use Reason::*;
        let name = self.0.tensor.as_deref().unwrap_or("");
        match self.0.reason {
            FileTooSmall => "header too small".to_owned(),
            HeaderTooLarge | LimitHeader | WriteTooLarge => "header too large".to_owned(),
            HeaderPastEnd => "invalid header length".to_owned(),
            InvalidUtf8 => format!("invalid UTF-8 in header: {}", self.0.found),
            PartialByte | WritePartialByte => {
                "The slice is slicing for subbytes dtypes, and the slice \
                does not end up at a byte boundary, this is invalid."
                    .to_owned()
            }
            OffsetsReversed | Hole | Overlap | EmptyInside => {
                format!("invalid offset for tensor `{name}`")
            }
            SizeOverflow => {
                "overflow computing buffer size from shape and/or element type".to_owned()
            }
            SizeMismatch => "invalid shape, data type, or offset for tensor".to_owned(),
            DataTruncated | TrailingData => {
                "incomplete metadata, file not fully covered".to_owned()
            }
            UnknownTensor => format!("tensor `{name}` not found"),
            UnsupportedDtype => {
                format!("invalid JSON in header: unknown variant: {}", self.0.found)
            }
            other if other.class() == Class::Malformed => {
                format!("invalid JSON in header: {}", other.phrase())
            }
            other => other.phrase().to_owned(),
        }
    }
}

/// `text`, cut in the middle of nothing: at most [`EXCERPT`] characters, then an ellipsis.
pub(crate) fn excerpt(text: &str) -> String {
    match text.char_indices().nth(EXCERPT) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or(text)),
        None => text.to_owned(),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            reason,
            tensor,
            found,
            needed,
            at,
        } = &*self.0;
        if let Some(name) = tensor {
            // `{:?}` escapes control and bidi characters, so a name cannot forge a message.
            write!(f, "tensor {:?}: ", excerpt(name))?;
        }
        f.write_str(reason.phrase())?;
        match (found.is_empty(), needed.is_empty()) {
            (false, false) => write!(f, ": found {found}, needed {needed}")?,
            (false, true) => write!(f, ": found {found}")?,
            (true, false) => write!(f, ": needed {needed}")?,
            (true, true) => {}
        }
        if let Some(at) = at {
            write!(f, ", at byte {at}")?;
        }
        if !reason.clause().is_empty() {
            write!(f, " (spec {})", reason.clause())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.code())
    }
}

impl core::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_sentence_with_every_part() {
        let error = Error::new(Reason::Hole)
            .tensor("a\u{202e}b")
            .found("byte 8")
            .needed("byte 4")
            .at(99);
        assert_eq!(
            error.to_string(),
            "tensor \"a\\u{202e}b\": bytes of the data section belong to no tensor: \
             found byte 8, needed byte 4, at byte 99 (spec 6.4)"
        );
        assert_eq!(
            (error.code(), error.clause(), error.class()),
            ("HOLE", "6.4", Class::Malformed)
        );
        assert_eq!(
            error.reference_text(),
            "invalid offset for tensor `a\u{202e}b`"
        );
        assert_eq!(
            (error.found_text(), error.needed_text()),
            ("byte 8", "byte 4")
        );
        assert_eq!(
            (error.tensor_name(), error.offset()),
            (Some("a\u{202e}b"), Some(99))
        );
    }

    #[test]
    fn codes_are_unique_and_long_values_are_cut() {
        for (i, a) in Reason::ALL.iter().enumerate() {
            assert!(!a.phrase().is_empty());
            assert!(
                Reason::ALL[i + 1..].iter().all(|b| a.code() != b.code()),
                "{}",
                a.code()
            );
        }
        let error = Error::new(Reason::JsonSyntax).found("é".repeat(1 << 16));
        assert!(error.to_string().len() < 500);
    }
}
