//! One error: which device, what was being done, and why not.

use std::fmt;

use crate::DeviceId;

/// A failure of a device or its driver. Displays as
/// `cuda:0: cannot allocate: out of memory: 2147483648 bytes needed, 1024 free`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    device: DeviceId,
    doing: &'static str,
    cause: Cause,
}

/// Why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The device, or the host for staging memory, has no room.
    OutOfMemory {
        /// Bytes asked for.
        needed: u64,
        /// Bytes free at that time, where the driver says so.
        free: Option<u64>,
    },
    /// There is no such device, or no driver for it. The text says what was looked for.
    Missing(String),
    /// The driver refused or failed.
    Driver {
        /// Its number for it.
        code: i64,
        /// Its name for it, and its sentence.
        text: String,
    },
    /// This kind of device can't do that.
    Unsupported(&'static str),
    /// A range outside of its memory, or memory of another device.
    Invalid(String),
    /// The caller ended it.
    Cancelled,
}

impl Error {
    /// The error of doing this ("allocate", "copy to") on a device.
    pub fn new(device: DeviceId, doing: &'static str, cause: Cause) -> Self {
        Error {
            device,
            doing,
            cause,
        }
    }

    pub(crate) fn unsupported(device: DeviceId, what: &'static str) -> Self {
        Error::new(device, "use", Cause::Unsupported(what))
    }

    /// The device.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Why.
    pub fn cause(&self) -> &Cause {
        &self.cause
    }

    /// Whether a device has no room.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self.cause, Cause::OutOfMemory { .. })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: cannot {}: {}", self.device, self.doing, self.cause)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::OutOfMemory {
                needed,
                free: Some(free),
            } => {
                write!(f, "out of memory: {needed} bytes needed, {free} free")
            }
            Cause::OutOfMemory { needed, free: None } => {
                write!(f, "out of memory: {needed} bytes needed")
            }
            Cause::Missing(text) | Cause::Invalid(text) => f.write_str(text),
            Cause::Driver { code, text } => write!(f, "the driver says {text} ({code})"),
            Cause::Unsupported(what) => write!(f, "{what} is not supported here"),
            Cause::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl std::error::Error for Error {}
