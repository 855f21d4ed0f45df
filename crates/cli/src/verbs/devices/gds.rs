//! GPUDirect Storage: whether `gds=True` would work here, and what to do where it would not.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde_json::{Value, json};
use tonnage::device::gds::{self, Settings, Way};

use crate::exit::{Failure, OK};

/// What was found.
pub struct Seen(Result<Way, String>);

fn told(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Looks at the kernel; where that has what it takes, cuFile is started in a process of its own.
pub fn look() -> Seen {
    let usual = Settings::default();
    let program = std::env::current_exe().map(OsString::from);
    let settings = Settings {
        library: told("TONNAGE_CUFILE_LIBRARY").map(PathBuf::from),
        root: told("TONNAGE_GDS_ROOT").map_or(usual.root.clone(), PathBuf::from),
        log: Some(told("CUFILE_LOGFILE_PATH").map_or_else(|| "/dev/null".into(), PathBuf::from)),
        child: program.map_or_else(
            |_| Vec::new(),
            |program| vec![program, "devices".into(), "--try-cufile".into()],
        ),
        ..usual
    };
    Seen(gds::probe(&settings).map_err(|error| error.cause().to_string()))
}

/// What the process that [`look`] starts does.
pub fn attempt() -> Result<u8, Failure> {
    let library = told("TONNAGE_CUFILE_LIBRARY").map(PathBuf::from);
    match gds::attempt(library.as_deref()) {
        Ok(()) => Ok(OK),
        Err(error) => Err(Failure::Usage(error.cause().to_string())),
    }
}

impl Seen {
    /// As a value.
    pub fn json(&self) -> Value {
        json!({"works": self.0.is_ok(), "says": self.to_string()})
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok(Way::NvidiaFs) => f.write_str("works, by nvidia-fs; load(gds=True) asks for it"),
            Ok(Way::PeerToPeer) => f.write_str(
                "works, by the kernel's peer-to-peer transfers; load(gds=True) asks for it",
            ),
            Err(why) => f.write_str(why),
        }
    }
}
