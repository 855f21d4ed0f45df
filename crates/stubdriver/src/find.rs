//! The Rust side for tests: where the library is, and what it knows.
//!
//! A crate that has `tonnage-stubdriver` among its dev-dependencies has the library beside its test
//! programs, built with them; nothing has to be run first.
//!
//! ```no_run
//! // A driver of its own for this test: tests of a process take turns.
//! let stub = tonnage_stubdriver::find::Stub::begin("MEM_MIB=64\nDELAY_US=200");
//! // let driver = Driver::open_at(Kind::Cuda, stub.path())?; …
//! drop(stub); // Fails the test if a rule was broken or something was not given back.
//! ```
//!
//! Invariants:
//! 1. The library's functions have the signatures that `control` declares, since both are built from one
//!    crate; out-parameters are locals that live through the call.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libloading::Library;

pub use crate::end::Live;

/// Where the library is: beside the test program that runs.
///
/// # Panics
/// It is not there: `tonnage-stubdriver` is no dev-dependency of this test.
pub fn path() -> PathBuf {
    let program = std::env::current_exe().expect("this program's path");
    let folders = program.ancestors().skip(1).take(2);
    let found = folders
        .flat_map(|folder| [folder.to_owned(), folder.join("deps")])
        .map(|folder| folder.join("libtonnage_stubdriver.so"))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no libtonnage_stubdriver.so near {}", program.display()))
}

/// A folder, made in `home`, where the library has the drivers' usual names, for `LD_LIBRARY_PATH`.
///
/// # Panics
/// The folder can't be made.
pub fn folder(home: &Path) -> PathBuf {
    let folder = home.join("stub-driver");
    fs::create_dir_all(&folder).expect("a folder");
    for name in [
        "libcuda.so.1",
        "libcuda.so",
        "libamdhip64.so",
        "libcufile.so.0",
    ] {
        let link = folder.join(name);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(path(), link).expect("a link");
    }
    folder
}

static TURN: Mutex<()> = Mutex::new(());

/// The driver for one test. The others of this process wait.
pub struct Stub {
    path: PathBuf,
    library: Library,
    _turn: MutexGuard<'static, ()>,
}

impl std::fmt::Debug for Stub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stub").field("path", &self.path).finish()
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Copies that were asked for.
    pub copies: u64,
    /// The most that were under way at a time.
    pub max_in_flight: u64,
    /// Those under way now.
    pub in_flight: u64,
    /// Device allocations that were asked for.
    pub allocations: u64,
}

impl Stub {
    /// A fresh driver with these [settings](crate::settings), `KEY=value` a line.
    ///
    /// # Panics
    /// The library can't be opened, or a setting has no sense.
    pub fn begin(settings: &str) -> Stub {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let path = path();
        // SAFETY: our own library; nothing happens when it is opened.
        let library = unsafe { Library::new(&path) }.expect("the stub driver");
        let stub = Stub {
            path,
            library,
            _turn: turn,
        };
        stub.again(settings);
        stub
    }

    /// Starts anew, with other settings.
    ///
    /// # Panics
    /// A setting has no sense.
    pub fn again(&self, settings: &str) {
        let settings = CString::new(settings).expect("no null byte");
        let reset = self.function::<extern "C" fn(*const c_char) -> c_int>("stub_reset");
        assert_eq!(reset(settings.as_ptr()), 0, "settings: {settings:?}");
    }

    /// Where the library is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One of the driver's functions, e.g. to call it in the wrong order. `T` is its signature.
    ///
    /// # Panics
    /// There is no such function.
    pub fn function<T: Copy>(&self, name: &str) -> T {
        // SAFETY: invariant 1, for our own names; a test says the driver's signatures itself.
        let found = unsafe { self.library.get::<T>(name.as_bytes()) };
        *found.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// What has not been given back.
    pub fn live(&self) -> Live {
        let mut live = Live::default();
        self.function::<extern "C" fn(*mut Live) -> u64>("stub_live_objects")(&mut live);
        live
    }

    /// Rules that were broken.
    pub fn violations(&self) -> u64 {
        self.function::<extern "C" fn() -> u64>("stub_violations")()
    }

    /// Rules that were broken, which are forgotten: the test planted them.
    pub fn pardon(&self) -> u64 {
        self.function::<extern "C" fn() -> u64>("stub_pardon")()
    }

    /// What was counted.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        type Get = extern "C" fn(*mut u64, *mut u64, *mut u64, *mut u64);
        let get = self.function::<Get>("stub_counts");
        let Counts {
            copies,
            max_in_flight,
            in_flight,
            allocations,
        } = &mut counts;
        get(copies, max_in_flight, in_flight, allocations);
        counts
    }

    /// Holds all copies back that have not begun, or lets them run.
    pub fn hold(&self, hold: bool) {
        self.function::<extern "C" fn(c_int)>("stub_hold")(hold.into());
    }

    /// What device memory holds, whatever runs.
    ///
    /// # Panics
    /// That is no device memory.
    pub fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let peek = self.function::<extern "C" fn(u64, *mut u8, usize) -> c_int>("stub_peek");
        assert_eq!(peek(address, bytes.as_mut_ptr(), len), 0, "{address}");
        bytes
    }

    /// A line of the test's own in the journal.
    ///
    /// # Panics
    /// The text has a null byte.
    pub fn mark(&self, what: &str) {
        let what = CString::new(what).expect("no null byte");
        self.function::<extern "C" fn(*const c_char)>("stub_mark")(what.as_ptr());
    }

    /// Writes the journal out, to where the settings said.
    pub fn flush(&self) {
        self.function::<extern "C" fn()>("stub_journal_flush")();
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.hold(false);
        if !std::thread::panicking() {
            let (live, broken) = (self.live(), self.violations());
            assert_eq!(live, Live::default(), "not given back");
            assert_eq!(broken, 0, "rules were broken; stderr says which");
        }
        // The end of the process is not to complain once more.
        let reset = self.function::<extern "C" fn(*const c_char) -> c_int>("stub_reset");
        reset(std::ptr::null());
    }
}
