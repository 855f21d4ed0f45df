//! A machine that shows what GPUDirect Storage needs, and the child process that tries it on the stub.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonnage_device::gds::{self, Settings};
use tonnage_stubdriver::find::Stub;

/// The test that is the child: every program that uses this has one of this name.
pub const CHILD: &str = "the_child_that_tries";
const INSIDE: &str = "TONNAGE_TEST_INSIDE";

/// Settings under which it works, with variables for the child: `STUB_GDS_OPEN=hangs`.
pub fn settings(stub: &Stub, root: &Path, variables: &[&str]) -> Settings {
    let folder = root.join("proc/driver/nvidia-fs");
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join("devcount"), "1\n").expect("a file");
    let program = std::env::current_exe().expect("this program");
    let mut child: Vec<OsString> = vec!["env".into(), format!("{INSIDE}=1").into()];
    child.extend(variables.iter().map(OsString::from));
    child.extend([
        program.into(),
        CHILD.into(),
        "--exact".into(),
        "--nocapture".into(),
    ]);
    Settings {
        library: Some(stub.path().to_owned()),
        log: Some(PathBuf::from("/dev/null")),
        child,
        limit: Duration::from_secs(60),
        root: root.to_owned(),
    }
}

/// What the child does; nothing in the first run of all tests.
pub fn child() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let log = std::env::var("CUFILE_LOGFILE_PATH");
    assert_eq!(log.as_deref(), Ok("/dev/null"), "a place for its log");
    if let Err(error) = gds::attempt(Some(&tonnage_stubdriver::find::path())) {
        eprintln!("{}", error.cause());
        std::process::exit(1);
    }
}
