//! One error for the whole façade: who must act, and everything that is known.

use std::fmt;
use std::ops::Range;

use tonnage_device::Cause as DeviceCause;
use tonnage_engine as engine;
use tonnage_foreign::gguf;
use tonnage_format as format;
use tonnage_format::{Class, Reason};
use tonnage_storage as storage;

/// Who must act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The system, the disk, the network: see [`Error::io`].
    Io,
    /// Whoever made the file: it breaks the specification.
    Format,
    /// Whoever set a budget that the file exceeds.
    Limit,
    /// Nobody yet: this version does not know it.
    Unsupported,
    /// The caller.
    Usage,
    /// A device or its driver.
    Device,
    /// The caller, who ended it.
    Cancelled,
}

/// A failure. Displays as one sentence that names the file, the tensor, what was found, what was needed
/// and the clause of the specification.
pub struct Error(Box<Inner>);

struct Inner {
    cause: Cause,
    file: Option<String>,
    /// A tensor, and bytes of its file, where the cause does not know them.
    about: Option<(String, Option<Range<u64>>)>,
    suggestions: Vec<String>,
}

enum Cause {
    Format(format::Error),
    Storage(storage::Error),
    Device(tonnage_device::Error),
    Plan(tonnage_plan::Error),
    Gguf(gguf::Error),
    Cancelled,
    Usage { code: &'static str, text: String },
}

/// What the façade returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn new(cause: Cause) -> Self {
        Error(Box::new(Inner {
            cause,
            file: None,
            about: None,
            suggestions: Vec::new(),
        }))
    }

    pub(crate) fn usage(code: &'static str, text: impl Into<String>) -> Self {
        Error::new(Cause::Usage {
            code,
            text: text.into(),
        })
    }

    pub(crate) fn in_file(mut self, label: impl Into<String>) -> Self {
        self.0.file.get_or_insert(label.into());
        self
    }

    /// Says which tensor it was, and which bytes of its file.
    pub(crate) fn about(mut self, tensor: &str, range: Option<Range<u64>>) -> Self {
        self.0.about.get_or_insert((tensor.to_owned(), range));
        self
    }

    pub(crate) fn suggest(mut self, names: Vec<String>) -> Self {
        self.0.suggestions = names;
        self
    }

    /// Who must act.
    pub fn kind(&self) -> ErrorKind {
        match &self.0.cause {
            Cause::Storage(_) => ErrorKind::Io,
            Cause::Device(error) if *error.cause() == DeviceCause::Cancelled => {
                ErrorKind::Cancelled
            }
            Cause::Device(error) if matches!(error.cause(), DeviceCause::Unsupported(_)) => {
                ErrorKind::Unsupported
            }
            Cause::Device(_) => ErrorKind::Device,
            Cause::Cancelled => ErrorKind::Cancelled,
            Cause::Usage { .. } => ErrorKind::Usage,
            Cause::Plan(error) => match error.reason() {
                tonnage_plan::Reason::Limit => ErrorKind::Limit,
                tonnage_plan::Reason::Dtype => ErrorKind::Unsupported,
                _ => ErrorKind::Usage,
            },
            Cause::Format(error) => kind_of(error.class()),
            Cause::Gguf(error) => kind_of(error.reason().class()),
        }
    }

    /// A stable code for machines: a reason of the specification such as `HOLE`, or `IO`, `CANCELLED`,
    /// `AMBIGUOUS`, `BUFFER_SIZE`, `WRITER`, `SIZE`, `SELECT`; of devices `DEVICE`, `DEVICE_MEMORY`, `NO_DEVICE`,
    /// `DEVICE_UNSUPPORTED`; of plans those that begin with `PLAN_`, of GGUF files with `GGUF_`.
    pub fn code(&self) -> &'static str {
        match &self.0.cause {
            Cause::Format(error) => error.code(),
            Cause::Storage(_) => "IO",
            Cause::Device(error) => match error.cause() {
                DeviceCause::OutOfMemory { .. } => "DEVICE_MEMORY",
                DeviceCause::Missing(_) => "NO_DEVICE",
                DeviceCause::Cancelled => "CANCELLED",
                DeviceCause::Unsupported(_) => "DEVICE_UNSUPPORTED",
                DeviceCause::Driver { .. } | DeviceCause::Invalid(_) => "DEVICE",
            },
            Cause::Plan(error) => error.code(),
            Cause::Gguf(error) => error.reason().code(),
            Cause::Cancelled => "CANCELLED",
            Cause::Usage { code, .. } => code,
        }
    }

    /// The clause of the specification, where one says so; of docs/gguf.md, such as `G5.3`, for GGUF files.
    pub fn clause(&self) -> Option<&'static str> {
        let clause = match &self.0.cause {
            Cause::Format(error) => error.clause(),
            Cause::Gguf(error) => error.reason().clause(),
            _ => "",
        };
        Some(clause).filter(|clause| !clause.is_empty())
    }

    /// The file concerned: a path, or what the source is called.
    pub fn file(&self) -> Option<&str> {
        match &self.0.cause {
            Cause::Storage(error) => Some(error.label()),
            _ => self.0.file.as_deref(),
        }
    }

    /// The tensor concerned.
    pub fn tensor(&self) -> Option<&str> {
        let told = self.0.about.as_ref().map(|(tensor, _)| tensor.as_str());
        let known = match &self.0.cause {
            Cause::Plan(error) => error.tensor_name(),
            Cause::Gguf(error) => error.tensor_name(),
            _ => self.format().and_then(format::Error::tensor_name),
        };
        known.or(told)
    }

    /// The bytes of the file that were being read.
    pub fn range(&self) -> Option<Range<u64>> {
        self.0.about.as_ref()?.1.clone()
    }

    /// What was found; empty where that says nothing.
    pub fn found(&self) -> &str {
        match &self.0.cause {
            Cause::Plan(error) => error.found_text(),
            Cause::Gguf(error) => error.found_text(),
            _ => self.format().map_or("", format::Error::found_text),
        }
    }

    /// What was needed; empty where that says nothing.
    pub fn needed(&self) -> &str {
        match &self.0.cause {
            Cause::Plan(error) => error.needed_text(),
            Cause::Gguf(error) => error.needed_text(),
            _ => self.format().map_or("", format::Error::needed_text),
        }
    }

    /// What the system said, with its kind and number.
    pub fn io(&self) -> Option<&std::io::Error> {
        match &self.0.cause {
            Cause::Storage(error) => Some(error.io()),
            _ => None,
        }
    }

    /// The specification's reason.
    pub fn format(&self) -> Option<&format::Error> {
        match &self.0.cause {
            Cause::Format(error) => Some(error),
            _ => None,
        }
    }

    /// Names that were perhaps meant, the nearest first.
    pub fn suggestions(&self) -> &[String] {
        &self.0.suggestions
    }
}

fn kind_of(class: Class) -> ErrorKind {
    match class {
        Class::Malformed => ErrorKind::Format,
        Class::Limit => ErrorKind::Limit,
        Class::Unsupported => ErrorKind::Unsupported,
        Class::Usage => ErrorKind::Usage,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            cause,
            file,
            about,
            suggestions,
        } = &*self.0;
        if let (Some(file), false) = (file, matches!(cause, Cause::Storage(_))) {
            write!(f, "{}: ", file.escape_debug())?;
        }
        match cause {
            Cause::Format(error) => error.fmt(f)?,
            Cause::Storage(error) => error.fmt(f)?,
            Cause::Device(error) => error.fmt(f)?,
            Cause::Plan(error) => error.fmt(f)?,
            Cause::Gguf(error) => error.fmt(f)?,
            Cause::Cancelled => f.write_str("cancelled")?,
            Cause::Usage { text, .. } => f.write_str(text)?,
        }
        match (about, cause) {
            (None, _) | (_, Cause::Cancelled) => {}
            (Some((tensor, None)), _) => write!(f, " (tensor {tensor:?})")?,
            (Some((tensor, Some(range))), _) => {
                let Range { start, end } = range;
                write!(f, " (tensor {tensor:?}, bytes {start} to {end})")?;
            }
        }
        match suggestions.split_first() {
            None => Ok(()),
            Some((first, rest)) => {
                write!(f, "; did you mean {first:?}")?;
                rest.iter().try_for_each(|name| write!(f, " or {name:?}"))?;
                f.write_str("?")
            }
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.code())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.cause {
            Cause::Format(error) => Some(error),
            Cause::Storage(error) => Some(error),
            Cause::Device(error) => Some(error),
            Cause::Plan(error) => Some(error),
            Cause::Gguf(error) => Some(error),
            Cause::Cancelled | Cause::Usage { .. } => None,
        }
    }
}

impl From<format::Error> for Error {
    fn from(error: format::Error) -> Self {
        Error::new(Cause::Format(error))
    }
}

impl From<Reason> for Error {
    fn from(reason: Reason) -> Self {
        format::Error::new(reason).into()
    }
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        Error::new(Cause::Storage(error))
    }
}

impl From<tonnage_device::Error> for Error {
    fn from(error: tonnage_device::Error) -> Self {
        Error::new(Cause::Device(error))
    }
}

impl From<gguf::Error> for Error {
    fn from(error: gguf::Error) -> Self {
        Error::new(Cause::Gguf(error))
    }
}

impl From<tonnage_plan::Error> for Error {
    fn from(error: tonnage_plan::Error) -> Self {
        Error::new(Cause::Plan(error))
    }
}

impl From<engine::Error> for Error {
    fn from(error: engine::Error) -> Self {
        match error {
            engine::Error::Storage { error, .. } => error.into(),
            engine::Error::Device(error) => error.into(),
            engine::Error::Corrupt { label, bad } => Error::from(mismatch(&bad)).in_file(label),
            engine::Error::Cancelled => Error::new(Cause::Cancelled),
        }
    }
}

/// A chunk that is not what its checksum says.
pub(crate) fn mismatch(bad: &engine::checksum::BadChunk) -> format::Error {
    format::Error::new(Reason::ChecksumMismatch)
        .found(format_args!("{:016x} for {}", bad.found, place_of(bad)))
        .needed(format_args!("{:016x}", bad.needed))
}

/// Where a chunk lies, in words.
fn place_of(bad: &engine::checksum::BadChunk) -> String {
    let end = bad.offset.saturating_add(bad.len);
    format!("chunk {} (bytes {} to {end})", bad.chunk, bad.offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn an_error_names_all_it_knows_and_keeps_its_source() {
        let hole = format::Error::new(Reason::Hole)
            .tensor("w")
            .found("byte 8")
            .needed("byte 4");
        let error = Error::from(hole).in_file("a.safetensors").in_file("other");
        assert_eq!(
            (error.kind(), error.code(), error.clause()),
            (ErrorKind::Format, "HOLE", Some("6.4"))
        );
        assert_eq!(
            (error.file(), error.tensor()),
            (Some("a.safetensors"), Some("w"))
        );
        assert_eq!((error.found(), error.needed()), ("byte 8", "byte 4"));
        assert!(
            error
                .to_string()
                .starts_with("a.safetensors: tensor \"w\": "),
            "{error}"
        );
        assert!(error.source().is_some() && error.format().is_some() && error.io().is_none());

        let denied = std::io::Error::from_raw_os_error(13);
        let error = Error::from(storage::Error::new("open", "b", denied));
        assert_eq!(
            (error.kind(), error.code(), error.file()),
            (ErrorKind::Io, "IO", Some("b"))
        );
        assert_eq!(error.io().unwrap().raw_os_error(), Some(13));
        assert_eq!(
            format!("{error:?}"),
            "IO: cannot open b: Permission denied (os error 13)"
        );

        let error = Error::from(engine::Error::Cancelled);
        assert_eq!(
            (error.kind(), error.code(), error.to_string().as_str()),
            (ErrorKind::Cancelled, "CANCELLED", "cancelled")
        );
        let error = Error::usage("AMBIGUOUS", "two choices").suggest(vec!["a".into(), "b".into()]);
        assert_eq!(
            error.to_string(),
            "two choices; did you mean \"a\" or \"b\"?"
        );
        assert_eq!(
            (
                error.kind(),
                error.suggestions().len(),
                error.source().is_none()
            ),
            (ErrorKind::Usage, 2, true)
        );
        assert_eq!(Error::from(Reason::LimitRank).kind(), ErrorKind::Limit);
        assert_eq!(
            Error::from(Reason::UnsupportedDtype).kind(),
            ErrorKind::Unsupported
        );
    }
}
