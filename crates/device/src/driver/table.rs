//! What is called of a driver's library: one name a line, CUDA's and HIP's.
//!
//! Nothing is linked. CUDA's header renames many functions by macros (`cuMemAlloc` is `cuMemAlloc_v2`); a
//! library that is opened at run time has the renamed ones, so those stand here.
//!
//! Invariants:
//! 1. Each function pointer has the C signature that the driver's header declares for the name it was
//!    looked up by; handles (contexts, streams, events) are pointers there and `usize` here, which are
//!    passed alike.
//! 2. The library is never closed: its functions and threads live as long as the process.
#![allow(unsafe_code)]

use std::ffi::{OsStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::Library;

use super::remedy;
use crate::{Cause, DeviceId, Error, Kind};

/// A driver's result: 0 is success.
pub type Code = c_int;
/// A context, stream or event.
pub type Handle = usize;

type Fn1<A> = unsafe extern "C" fn(A) -> Code;
type Fn2<A, B> = unsafe extern "C" fn(A, B) -> Code;
type Fn3<A, B, C> = unsafe extern "C" fn(A, B, C) -> Code;
type Fn4<A, B, C, D> = unsafe extern "C" fn(A, B, C, D) -> Code;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Copy2d {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: c_uint,
    pub src_host: usize,
    pub src_device: u64,
    pub src_array: usize,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: c_uint,
    pub dst_host: usize,
    pub dst_device: u64,
    pub dst_array: usize,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// How rows are copied: the one operation whose arguments differ.
#[derive(Debug)]
pub enum Rows {
    Cuda(Fn2<*const Copy2d, Handle>),
    /// Destination, its pitch, source, its pitch, bytes of a row, rows, direction, stream.
    Hip(unsafe extern "C" fn(usize, usize, usize, usize, usize, usize, c_int, Handle) -> Code),
}

/// What is current on a thread: a context, or a device's number.
#[derive(Debug)]
pub enum Current {
    Cuda {
        retain: Fn2<*mut Handle, c_int>,
        release: Fn1<c_int>,
        get: Fn1<*mut Handle>,
        set: Fn1<Handle>,
    },
    Hip {
        get: Fn1<*mut c_int>,
        set: Fn1<c_int>,
    },
}

/// What an error is called.
#[derive(Debug)]
pub enum Names {
    Cuda {
        name: Fn2<c_int, *mut *const c_char>,
        text: Fn2<c_int, *mut *const c_char>,
    },
    Hip {
        name: unsafe extern "C" fn(c_int) -> *const c_char,
        text: unsafe extern "C" fn(c_int) -> *const c_char,
    },
}

/// A driver's functions.
#[derive(Debug)]
pub struct Table {
    pub kind: Kind,
    pub init: Fn1<c_uint>,
    pub version: Fn1<*mut c_int>,
    pub count: Fn1<*mut c_int>,
    pub device: Fn2<*mut c_int, c_int>,
    pub device_name: Fn3<*mut c_char, c_int, c_int>,
    pub total: Fn2<*mut usize, c_int>,
    pub attribute: Fn3<*mut c_int, c_int, c_int>,
    pub current: Current,
    pub memory_info: Fn2<*mut usize, *mut usize>,
    pub allocate: Fn2<*mut u64, usize>,
    pub free: Fn1<u64>,
    /// What an address is of; drivers of today have it.
    pub pointer: Option<Fn3<*mut c_void, c_int, u64>>,
    pub host_allocate: Fn3<*mut *mut c_void, usize, c_uint>,
    pub host_free: Fn1<*mut c_void>,
    pub to_device: Fn4<u64, *const c_void, usize, Handle>,
    pub to_host: Fn4<*mut c_void, u64, usize, Handle>,
    pub rows: Rows,
    pub stream_create: Fn2<*mut Handle, c_uint>,
    pub stream_wait: Fn3<Handle, Handle, c_uint>,
    pub stream_sync: Fn1<Handle>,
    pub stream_destroy: Fn1<Handle>,
    pub event_create: Fn2<*mut Handle, c_uint>,
    pub event_record: Fn2<Handle, Handle>,
    pub event_query: Fn1<Handle>,
    pub event_sync: Fn1<Handle>,
    pub event_destroy: Fn1<Handle>,
    pub names: Names,
}

/// What CUDA's library is called on this system, in the order of trying.
const CUDA: &[&str] = if cfg!(windows) {
    &["nvcuda.dll"]
} else if cfg!(target_vendor = "apple") {
    &["libcuda.dylib", "/usr/local/cuda/lib/libcuda.dylib"]
} else {
    &["libcuda.so.1", "libcuda.so"]
};
/// What HIP's is.
const HIP: &[&str] = if cfg!(windows) {
    &["amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll"]
} else if cfg!(target_vendor = "apple") {
    &["libamdhip64.dylib"]
} else {
    &[
        "libamdhip64.so",
        "libamdhip64.so.7",
        "libamdhip64.so.6",
        "libamdhip64.so.5",
        "/opt/rocm/lib/libamdhip64.so",
    ]
};

/// The tables of this process: a library is opened once.
static OPEN: Mutex<Vec<(Kind, Option<PathBuf>, &'static Table)>> = Mutex::new(Vec::new());

impl Table {
    /// Opens the driver of a kind under its usual names, or at a path.
    ///
    /// # Errors
    /// [`Cause::Missing`] with what was looked for; [`Cause::Unsupported`] for a kind without such a driver.
    pub fn open(kind: Kind, path: Option<&Path>) -> Result<&'static Table, Error> {
        let id = DeviceId::new(kind, 0);
        let names = match kind {
            // Addresses are 64 bits wide in the table.
            Kind::Cuda | Kind::Rocm if usize::BITS != 64 => &[],
            Kind::Cuda => CUDA,
            Kind::Rocm => HIP,
            _ => return Err(Error::unsupported(id, "a driver of this kind")),
        };
        let missing = |text: String| {
            let text = format!("{text}: {}", remedy::install(kind));
            Error::new(id, "open the driver", Cause::Missing(text))
        };
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = open
            .iter()
            .find(|(of, at, _)| *of == kind && at.as_deref() == path);
        if let Some((.., table)) = known {
            return Ok(table);
        }
        let library = match path {
            Some(path) => load(path.as_os_str()),
            None => first(names),
        };
        // Invariant 2.
        let library: &'static Library = Box::leak(Box::new(library.map_err(&missing)?));
        let table = match kind {
            Kind::Cuda => cuda(library),
            _ => hip(library),
        };
        let table: &'static Table = Box::leak(Box::new(table.map_err(missing)?));
        open.push((kind, path.map(Path::to_owned), table));
        Ok(table)
    }
}

/// The first library of these names that opens; or what was said of the first.
fn first(names: &[&str]) -> Result<Library, String> {
    let mut said = None;
    for name in names {
        match load(OsStr::new(name)) {
            Ok(library) => return Ok(library),
            Err(text) => said = said.or(Some(text)),
        }
    }
    Err(said.unwrap_or_else(|| "there are drivers for 64-bit systems only".to_owned()))
}

fn load(name: &OsStr) -> Result<Library, String> {
    // SAFETY: a driver's library, whose initialisers may run in any process.
    unsafe { Library::new(name) }.map_err(|error| {
        // The system's own sentence names the library, mostly.
        let (name, text) = (name.to_string_lossy(), error.to_string());
        match text.contains(&*name) {
            true => text,
            false => format!("{name}: {text}"),
        }
    })
}

/// The function of this name.
fn get<T: Copy>(library: &'static Library, name: &str) -> Result<T, String> {
    // SAFETY: `T` is the signature of this name (invariant 1), at each place that calls this.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found
        .map(|symbol| *symbol)
        .map_err(|_| format!("the driver is too old: it lacks {name}"))
}

fn cuda(of: &'static Library) -> Result<Table, String> {
    Ok(Table {
        kind: Kind::Cuda,
        init: get(of, "cuInit")?,
        version: get(of, "cuDriverGetVersion")?,
        count: get(of, "cuDeviceGetCount")?,
        device: get(of, "cuDeviceGet")?,
        device_name: get(of, "cuDeviceGetName")?,
        total: get(of, "cuDeviceTotalMem_v2")?,
        attribute: get(of, "cuDeviceGetAttribute")?,
        current: Current::Cuda {
            retain: get(of, "cuDevicePrimaryCtxRetain")?,
            release: get(of, "cuDevicePrimaryCtxRelease_v2")?,
            get: get(of, "cuCtxGetCurrent")?,
            set: get(of, "cuCtxSetCurrent")?,
        },
        memory_info: get(of, "cuMemGetInfo_v2")?,
        allocate: get(of, "cuMemAlloc_v2")?,
        free: get(of, "cuMemFree_v2")?,
        pointer: get(of, "cuPointerGetAttribute").ok(),
        host_allocate: get(of, "cuMemHostAlloc")?,
        host_free: get(of, "cuMemFreeHost")?,
        to_device: get(of, "cuMemcpyHtoDAsync_v2")?,
        to_host: get(of, "cuMemcpyDtoHAsync_v2")?,
        rows: Rows::Cuda(get(of, "cuMemcpy2DAsync_v2")?),
        stream_create: get(of, "cuStreamCreate")?,
        stream_wait: get(of, "cuStreamWaitEvent")?,
        stream_sync: get(of, "cuStreamSynchronize")?,
        stream_destroy: get(of, "cuStreamDestroy_v2")?,
        event_create: get(of, "cuEventCreate")?,
        event_record: get(of, "cuEventRecord")?,
        event_query: get(of, "cuEventQuery")?,
        event_sync: get(of, "cuEventSynchronize")?,
        event_destroy: get(of, "cuEventDestroy_v2")?,
        names: Names::Cuda {
            name: get(of, "cuGetErrorName")?,
            text: get(of, "cuGetErrorString")?,
        },
    })
}

fn hip(of: &'static Library) -> Result<Table, String> {
    Ok(Table {
        kind: Kind::Rocm,
        init: get(of, "hipInit")?,
        version: get(of, "hipDriverGetVersion")?,
        count: get(of, "hipGetDeviceCount")?,
        device: get(of, "hipDeviceGet")?,
        device_name: get(of, "hipDeviceGetName")?,
        total: get(of, "hipDeviceTotalMem")?,
        attribute: get(of, "hipDeviceGetAttribute")?,
        current: Current::Hip {
            get: get(of, "hipGetDevice")?,
            set: get(of, "hipSetDevice")?,
        },
        memory_info: get(of, "hipMemGetInfo")?,
        allocate: get(of, "hipMalloc")?,
        free: get(of, "hipFree")?,
        pointer: get(of, "hipPointerGetAttribute").ok(),
        host_allocate: get(of, "hipHostMalloc")?,
        host_free: get(of, "hipHostFree")?,
        to_device: get(of, "hipMemcpyHtoDAsync")?,
        to_host: get(of, "hipMemcpyDtoHAsync")?,
        rows: Rows::Hip(get(of, "hipMemcpy2DAsync")?),
        stream_create: get(of, "hipStreamCreateWithFlags")?,
        stream_wait: get(of, "hipStreamWaitEvent")?,
        stream_sync: get(of, "hipStreamSynchronize")?,
        stream_destroy: get(of, "hipStreamDestroy")?,
        event_create: get(of, "hipEventCreateWithFlags")?,
        event_record: get(of, "hipEventRecord")?,
        event_query: get(of, "hipEventQuery")?,
        event_sync: get(of, "hipEventSynchronize")?,
        event_destroy: get(of, "hipEventDestroy")?,
        names: Names::Hip {
            name: get(of, "hipGetErrorName")?,
            text: get(of, "hipGetErrorString")?,
        },
    })
}
