//! How a run ends: exit codes by kind, and one line that says what and where.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done; equal; nothing found |
//! | 1 | `verify` found errors, `diff` found differences, a key or tensor asked for is not there |
//! | 2 | the command line, or what it asks for, makes no sense |
//! | 3 | a file breaks the specification |
//! | 4 | a budget (size, count, depth) is exceeded |
//! | 5 | well-formed, but not supported: a dtype of tomorrow |
//! | 6 | the system refused: missing file, permission, full disk |
//! | 130 | interrupted (Ctrl-C); nothing half-done is left |

use std::io::{self, Write};

use serde_json::json;
use tonnage::ErrorKind;

use crate::{json, text};

/// Done, equal, nothing found.
pub const OK: u8 = 0;
/// Something was found, or differs, or is not there.
pub const FOUND: u8 = 1;
const USAGE: u8 = 2;
const MALFORMED: u8 = 3;
const LIMIT: u8 = 4;
const UNSUPPORTED: u8 = 5;
/// The system refused.
pub const IO: u8 = 6;
const CANCELLED: u8 = 130;

/// Why a run ends without its result.
#[derive(Debug)]
pub enum Failure {
    /// The library said so.
    Library(tonnage::Error),
    /// What was asked makes no sense.
    Usage(String),
    /// What was asked for is not there.
    Absent(String),
    /// Standard output could not be written.
    Output(io::Error),
    /// Ctrl-C.
    Cancelled,
}

impl From<tonnage::Error> for Failure {
    fn from(error: tonnage::Error) -> Self {
        Failure::Library(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Output(error)
    }
}

impl Failure {
    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Library(error) => match error.kind() {
                ErrorKind::Format => MALFORMED,
                ErrorKind::Limit => LIMIT,
                ErrorKind::Unsupported => UNSUPPORTED,
                ErrorKind::Usage => USAGE,
                ErrorKind::Cancelled => CANCELLED,
                _ => IO,
            },
            Failure::Usage(_) => USAGE,
            Failure::Absent(_) => FOUND,
            Failure::Output(_) => IO,
            Failure::Cancelled => CANCELLED,
        }
    }

    fn code(&self) -> &str {
        match self {
            Failure::Library(error) => error.code(),
            Failure::Usage(_) => "USAGE",
            Failure::Absent(_) => "ABSENT",
            Failure::Output(_) => "IO",
            Failure::Cancelled => "CANCELLED",
        }
    }

    /// The sentence.
    pub fn message(&self) -> String {
        match self {
            Failure::Library(error) => error.to_string(),
            Failure::Usage(message) | Failure::Absent(message) => message.clone(),
            Failure::Output(error) => format!("cannot write to standard output: {error}"),
            Failure::Cancelled => "interrupted".to_owned(),
        }
    }

    /// Writes the line to standard error: text, or one JSON object.
    pub fn tell(&self, as_json: bool) {
        let mut err = io::stderr().lock();
        // Nobody is left to be told that standard error is closed.
        let _ = if as_json {
            json::write_line(&mut err, &self.to_json())
        } else {
            writeln!(
                err,
                "error[{}]: {}",
                self.code(),
                text::line(&self.message())
            )
        };
    }

    fn to_json(&self) -> serde_json::Value {
        let library = match self {
            Failure::Library(error) => Some(error),
            _ => None,
        };
        json!({ "error": {
            "code": self.code(),
            "exit_code": self.exit_code(),
            "message": self.message(),
            "clause": library.and_then(|error| error.clause()),
            "file": library.and_then(|error| error.file()),
            "tensor": library.and_then(|error| error.tensor()),
            "found": library.map(|error| error.found()).filter(|text| !text.is_empty()),
            "needed": library.map(|error| error.needed()).filter(|text| !text.is_empty()),
        }})
    }
}
