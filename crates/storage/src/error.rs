//! One error: what was being done, to which file, and what the system said.

use std::fmt;
use std::io;
use std::path::Path;

/// A failed operation on a source, a sink or a path. Displays as
/// `cannot open /models/a.safetensors: Permission denied (os error 13)`.
#[derive(Debug)]
pub struct Error {
    doing: &'static str,
    label: String,
    io: io::Error,
}

impl Error {
    /// The error of doing this (a verb: "open", "read") to what bears this label.
    pub fn new(doing: &'static str, label: impl Into<String>, io: impl Into<io::Error>) -> Self {
        Error {
            doing,
            label: label.into(),
            io: io.into(),
        }
    }

    /// The same for a path.
    pub fn at(doing: &'static str, path: &Path, io: impl Into<io::Error>) -> Self {
        Error::new(doing, path.display().to_string(), io)
    }

    pub(crate) fn eof(label: &str, offset: u64, wanted: usize, len: u64) -> Self {
        let text = format!("{wanted} bytes at {offset} were asked of {len}");
        Error::new(
            "read",
            label,
            io::Error::new(io::ErrorKind::UnexpectedEof, text),
        )
    }

    /// What was being done: "open", "read", "write", "replace" …
    pub fn doing(&self) -> &'static str {
        self.doing
    }

    /// The path, or whatever names the source.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The system's kind of error, unchanged.
    pub fn kind(&self) -> io::ErrorKind {
        self.io.kind()
    }

    /// The system's error number, where it came from the system.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.io.raw_os_error()
    }

    /// What the system said.
    pub fn io(&self) -> &io::Error {
        &self.io
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}: {}", self.doing, self.label, self.io)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.io)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::new(error.kind(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_and_where_and_keeps_the_number() {
        let error = Error::at("open", Path::new("/a"), io::Error::from_raw_os_error(13));
        assert_eq!(
            error.to_string(),
            "cannot open /a: Permission denied (os error 13)"
        );
        assert_eq!(
            (error.kind(), error.raw_os_error()),
            (io::ErrorKind::PermissionDenied, Some(13))
        );
        assert_eq!((error.doing(), error.label()), ("open", "/a"));
        assert_eq!(
            io::Error::from(error).kind(),
            io::ErrorKind::PermissionDenied
        );
    }
}
