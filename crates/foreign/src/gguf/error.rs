//! Why a GGUF file was refused: one row a reason, with its clause of docs/gguf.md.

use std::fmt;

use tonnage_format::Class;

macro_rules! reasons {
    ($($id:ident $code:literal $clause:literal $class:ident $phrase:literal;)*) => {
        /// Why something was refused. Codes and clauses never change their meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason { $(#[doc = $phrase] $id,)* }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Reason] = &[$(Reason::$id,)*];

            /// The stable code, such as `"GGUF_OVERLAP"`.
            pub fn code(self) -> &'static str {
                match self { $(Reason::$id => $code,)* }
            }

            /// The clause of docs/gguf.md, such as `"G4.6"`.
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
    Magic "GGUF_MAGIC" "G1.1" Malformed "the file does not begin with GGUF";
    Version "GGUF_VERSION" "G1.2" Unsupported "the version of GGUF is not one that is read";
    Truncated "GGUF_TRUNCATED" "G1.4" Malformed "the header reaches past the end of the file";
    Count "GGUF_COUNT" "G1.5" Malformed "the header counts more entries than the file has room for";
    Key "GGUF_KEY" "G2.1" Malformed "a key is empty, too long or not UTF-8";
    DuplicateKey "GGUF_DUPLICATE_KEY" "G2.2" Malformed "two metadata entries have the same key";
    ValueType "GGUF_VALUE_TYPE" "G2.3" Malformed "the type of a metadata value is not known";
    Bool "GGUF_BOOL" "G2.4" Malformed "a boolean is neither 0 nor 1";
    Nesting "GGUF_NESTING" "G2.6" Limit "arrays are nested too deeply";
    Alignment "GGUF_ALIGNMENT" "G3.1" Malformed "general.alignment is not a power of two and a multiple of 8";
    Name "GGUF_NAME" "G4.1" Malformed "the name of a tensor is too long or not UTF-8";
    DuplicateTensor "GGUF_DUPLICATE_TENSOR" "G4.2" Malformed "two tensors have the same name";
    Rank "GGUF_RANK" "G4.3" Malformed "a tensor has more dimensions than GGUF knows";
    Type "GGUF_TYPE" "G4.4" Unsupported "the type of a tensor is not known";
    Row "GGUF_ROW" "G4.5" Malformed "the rows of a tensor are not whole blocks";
    SizeOverflow "GGUF_SIZE_OVERFLOW" "G4.6" Malformed "the size of a tensor overflows";
    Offset "GGUF_OFFSET" "G5.1" Malformed "the offset of a tensor is not a multiple of the alignment";
    DataTruncated "GGUF_DATA_TRUNCATED" "G5.2" Malformed "the data of a tensor reaches past the end of the file";
    Overlap "GGUF_OVERLAP" "G5.3" Malformed "two tensors claim the same bytes";
    BigEndianBlocks "GGUF_BIG_ENDIAN_BLOCKS" "G6.2" Unsupported "blocks of this type have no agreed big-endian form";
    Split "GGUF_SPLIT" "G7.1" Malformed "the files of a split model do not belong together";
    LimitHeader "GGUF_LIMIT_HEADER" "G8.1" Limit "the header is longer than the reader's budget";
    LimitKeys "GGUF_LIMIT_KEYS" "G8.2" Limit "the file has more metadata entries than the reader's budget";
    LimitTensors "GGUF_LIMIT_TENSORS" "G8.3" Limit "the file has more tensors than the reader's budget";
    Carried "GGUF_CARRIED" "G9.3" Malformed "what is carried of a GGUF file does not fit the tensors beside it";
    NoHeader "GGUF_NO_HEADER" "G9.4" Usage "no GGUF header is carried by these files";
    WriteValue "GGUF_WRITE_VALUE" "G10.1" Usage "a metadata value cannot be written";
    WriteSize "GGUF_WRITE_SIZE" "G10.2" Usage "the data to be written does not fit its type and shape";
}

/// Longest excerpt of a value that a message quotes, in characters.
const EXCERPT: usize = 120;

/// A refusal: the reason, and everything that is known of the place.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    reason: Reason,
    key: Option<String>,
    tensor: Option<String>,
    found: String,
    needed: String,
    at: Option<u64>,
}

impl Error {
    /// An error with nothing but its reason.
    pub fn new(reason: Reason) -> Self {
        Error(Box::new(Inner {
            reason,
            key: None,
            tensor: None,
            found: String::new(),
            needed: String::new(),
            at: None,
        }))
    }

    pub(crate) fn over(reason: Reason, found: u64, limit: u64) -> Self {
        Error::new(reason)
            .found(found)
            .needed(format_args!("at most {limit}"))
    }

    /// Names the tensor.
    #[must_use]
    pub fn tensor(mut self, name: &str) -> Self {
        self.0.tensor = Some(excerpt(name));
        self
    }

    /// Names the metadata key.
    #[must_use]
    pub fn key(mut self, key: &str) -> Self {
        self.0.key = Some(excerpt(key));
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

    /// Why.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// The tensor's name, where one is concerned.
    pub fn tensor_name(&self) -> Option<&str> {
        self.0.tensor.as_deref()
    }

    /// The metadata key, where one is concerned.
    pub fn key_name(&self) -> Option<&str> {
        self.0.key.as_deref()
    }

    /// What was found; empty where that says nothing.
    pub fn found_text(&self) -> &str {
        &self.0.found
    }

    /// What was needed; empty where that says nothing.
    pub fn needed_text(&self) -> &str {
        &self.0.needed
    }

    /// The byte of the file at which it was seen.
    pub fn offset(&self) -> Option<u64> {
        self.0.at
    }
}

fn excerpt(text: &str) -> String {
    match text.char_indices().nth(EXCERPT) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or(text)),
        None => text.to_owned(),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            reason,
            key,
            tensor,
            found,
            needed,
            at,
        } = &*self.0;
        // `{:?}` escapes control and bidi characters, so a name cannot forge a message.
        if let Some(name) = tensor {
            write!(f, "tensor {name:?}: ")?;
        }
        if let Some(key) = key {
            write!(f, "metadata {key:?}: ")?;
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
        write!(f, " (gguf {})", reason.clause())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.0.reason.code())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_sentence_with_every_part() {
        let error = Error::new(Reason::Overlap)
            .tensor("a\u{202e}b")
            .found("byte 8")
            .needed("byte 32")
            .at(99);
        assert_eq!(
            error.to_string(),
            "tensor \"a\\u{202e}b\": two tensors claim the same bytes: found byte 8, needed byte 32, \
             at byte 99 (gguf G5.3)"
        );
    }

    #[test]
    fn codes_are_unique_and_the_documentation_has_each_with_its_clause() {
        let text = include_str!("../../../../docs/gguf.md");
        for (i, reason) in Reason::ALL.iter().enumerate() {
            let row = format!("| {} | `{}` |", reason.clause(), reason.code());
            assert!(text.contains(&row), "docs/gguf.md lacks {row:?}");
            let twice = Reason::ALL[i + 1..]
                .iter()
                .any(|b| b.code() == reason.code());
            assert!(!twice, "{}", reason.code());
        }
        let rows = text.lines().filter(|line| line.starts_with("| G")).count();
        assert_eq!(
            rows,
            Reason::ALL.len(),
            "a row of docs/gguf.md has no reason"
        );
    }
}
