//! What is called of cuFile's library: one name a line, each call checked.
//!
//! Invariants:
//! 1. Each function pointer has the C signature that `cufile.h` declares for the name it was looked up by.
//! 2. The library is never closed: its functions and threads live as long as the process.
//! 3. Out-parameters and descriptions are locals of the right layout that live through the call.
//! 4. A handle is of this table, given back once after its last use; its descriptor is open until then.
//! 5. Memory that a read writes to is device memory that stays allocated through the call, and all of the range
//!    lies within it: [`super::GdsFile::read`] sees to that.
#![allow(unsafe_code)]

use std::ffi::{OsStr, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::Library;

/// `CUfileError_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Status {
    error: c_int,
    cuda: c_int,
}

/// `CUfileDescr_t`; the union's larger member is a pointer.
#[repr(C)]
#[derive(Debug)]
struct Description {
    kind: c_int,
    file: File64,
    operations: *const c_void,
}

/// The union: a descriptor in its lower half.
#[repr(C, align(8))]
#[derive(Debug)]
struct File64 {
    fd: c_int,
    rest: c_int,
}

type Handle = *mut c_void;

/// cuFile's functions.
#[derive(Debug)]
pub(super) struct Table {
    open: unsafe extern "C" fn() -> Status,
    close: unsafe extern "C" fn() -> Status,
    /// Since CUDA 12.9.
    set: unsafe extern "C" fn(c_int, bool) -> Status,
    register: unsafe extern "C" fn(*mut Handle, *mut Description) -> Status,
    deregister: unsafe extern "C" fn(Handle),
    take: unsafe extern "C" fn(*const c_void, usize, c_int) -> Status,
    give_back: unsafe extern "C" fn(*const c_void) -> Status,
    read: unsafe extern "C" fn(Handle, *mut c_void, usize, i64, i64) -> isize,
}

/// A file that cuFile has.
#[derive(Debug)]
pub(super) struct Registered(usize);

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
const DESCRIPTOR: c_int = 1;
/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`.
const ALLOW_COMPAT_MODE: c_int = 1;
/// `CU_FILE_DRIVER_ALREADY_OPEN`.
const ALREADY_OPEN: c_int = 5026;
/// `CU_FILE_CUDA_DRIVER_ERROR`: the other number says which.
const CUDA_ERROR: c_int = 5011;

const NAMES: &[&str] = &["libcufile.so.0", "libcufile.so"];

/// The tables of this process: a library is opened once.
static OPEN: Mutex<Vec<(Option<PathBuf>, &'static Table)>> = Mutex::new(Vec::new());

impl Table {
    /// Opens the library under its usual names, or at a path.
    pub fn load(path: Option<&Path>) -> Result<&'static Table, String> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = open.iter().find(|(at, _)| at.as_deref() == path) {
            return Ok(table);
        }
        let library = match path {
            Some(path) => library(path.as_os_str()),
            None => (NAMES.iter())
                .map(|name| library(OsStr::new(name)))
                .reduce(|first, next| first.or_else(|said| next.map_err(|_| said)))
                .unwrap_or_else(|| Err("it has no name here".to_owned())),
        };
        let text =
            "cuFile's library is not there (it comes with CUDA's toolkit and as nvidia-cufile)";
        let library = library.map_err(|said| format!("{text}: {said}"))?;
        // Invariant 2.
        let of: &'static Library = Box::leak(Box::new(library));
        let table = Table {
            open: get(of, "cuFileDriverOpen")?,
            close: get(of, "cuFileDriverClose_v2")?,
            set: get(of, "cuFileSetParameterBool")?,
            register: get(of, "cuFileHandleRegister")?,
            deregister: get(of, "cuFileHandleDeregister")?,
            take: get(of, "cuFileBufRegister")?,
            give_back: get(of, "cuFileBufDeregister")?,
            read: get(of, "cuFileRead")?,
        };
        let table: &'static Table = Box::leak(Box::new(table));
        open.push((path.map(Path::to_owned), table));
        Ok(table)
    }

    /// Starts it, without the mode in which it reads through host memory: the ring does that better. On a machine
    /// without NVIDIA's driver, version 1.20 gives an error then, and never returns otherwise.
    pub fn start(&self) -> Result<(), String> {
        // SAFETY: invariant 1.
        let status = unsafe { (self.set)(ALLOW_COMPAT_MODE, false) };
        // Somebody in this process uses it already: its mode is theirs.
        if status.error != ALREADY_OPEN {
            check(status)?;
        }
        // SAFETY: invariant 1.
        let status = unsafe { (self.open)() };
        match status.error {
            ALREADY_OPEN => Ok(()),
            _ => check(status),
        }
    }

    /// Ends it, where nobody else can use it.
    pub fn end(&self) -> Result<(), String> {
        // SAFETY: invariant 1.
        check(unsafe { (self.close)() })
    }

    /// Takes a file that is open for direct reads, and stays open until it is given back.
    pub fn register(&self, file: &File) -> Result<Registered, String> {
        let mut handle = std::ptr::null_mut();
        let mut description = Description {
            kind: DESCRIPTOR,
            file: File64 {
                fd: file.as_raw_fd(),
                rest: 0,
            },
            operations: std::ptr::null(),
        };
        // SAFETY: invariants 1 and 3.
        check(unsafe { (self.register)(&mut handle, &mut description) })?;
        Ok(Registered(handle.expose_provenance()))
    }

    /// Gives a file back.
    pub fn deregister(&self, file: &Registered) {
        // SAFETY: invariants 1 and 4.
        unsafe { (self.deregister)(std::ptr::with_exposed_provenance_mut(file.0)) };
    }

    /// Takes device memory, so that reads go straight there.
    pub fn take(&self, address: u64, len: usize) -> Result<(), String> {
        let start = std::ptr::with_exposed_provenance(address as usize);
        // SAFETY: invariant 1; an address that is none is refused by the library.
        check(unsafe { (self.take)(start, len, 0) })
    }

    /// Gives it back, before it is freed.
    pub fn give_back(&self, address: u64) {
        let start = std::ptr::with_exposed_provenance(address as usize);
        // SAFETY: invariant 1. Nothing can be done where it is refused.
        let _ = unsafe { (self.give_back)(start) };
    }

    /// Reads into `base + at ..`, which are `len` bytes of the current device's memory. How many there were.
    pub fn read(
        &self,
        file: &Registered,
        (base, at): (u64, u64),
        offset: u64,
        len: usize,
    ) -> Result<usize, (i64, String)> {
        let invalid = |_| (22, "an offset past 2^63".to_owned());
        let (offset, at) = (
            i64::try_from(offset).map_err(invalid)?,
            i64::try_from(at).map_err(invalid)?,
        );
        let handle = std::ptr::with_exposed_provenance_mut(file.0);
        let base = std::ptr::with_exposed_provenance_mut(base as usize);
        // SAFETY: invariants 1, 4 and 5.
        let got = unsafe { (self.read)(handle, base, len, offset, at) };
        match got {
            -1 => {
                let error = io::Error::last_os_error();
                let code = error.raw_os_error().unwrap_or(-1);
                Err((code.into(), error.to_string()))
            }
            got => usize::try_from(got).map_err(|_| {
                let code = c_int::try_from(got.unsigned_abs()).unwrap_or(c_int::MAX);
                (code.into(), name(code).to_owned())
            }),
        }
    }
}

fn library(name: &OsStr) -> Result<Library, String> {
    // SAFETY: cuFile's library, whose initialisers may run in any process.
    unsafe { Library::new(name) }.map_err(|error| error.to_string())
}

fn get<T: Copy>(library: &'static Library, name: &str) -> Result<T, String> {
    // SAFETY: `T` is the signature of this name (invariant 1), at each place that calls this.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found
        .map(|symbol| *symbol)
        .map_err(|_| format!("cuFile's library is too old: it lacks {name}"))
}

fn check(status: Status) -> Result<(), String> {
    match status.error {
        0 => Ok(()),
        CUDA_ERROR => Err(format!("CUDA's driver failed with error {}", status.cuda)),
        code => Err(format!("{} ({code})", name(code))),
    }
}

/// What the header says of those that can be met here.
fn name(code: c_int) -> &'static str {
    match code {
        5001 => "nvidia-fs is not loaded",
        5004 | 5005 => "nvidia-fs is of another version",
        5007 => "GPUDirect Storage is not supported on this machine",
        5008 => "GPUDirect Storage is not supported for this file",
        5009 => "GPUDirect Storage is not supported on this GPU",
        5010 | 5033 | 5048 => "nvidia-fs failed",
        5012..=5014 => "that is no device memory",
        5015 | 5047 => "another CUDA context",
        5016 | 5017 | 5036 => "device memory could not be pinned",
        5020 => "the file is not open for direct reads",
        5022 => "an argument is not valid",
        5025 => "no permission for nvidia-fs or the file",
        5034 => "GPUDirect Storage is switched off for this file by cufile.json",
        5043 => "it has no memory",
        5044 => "the read failed",
        _ => "it failed",
    }
}
