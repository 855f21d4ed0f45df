//! A framework's table of C functions, by which its allocator and its streams are used without Python.
//!
//! Invariants:
//! 1. A table and its functions are valid for good, and have the declared signatures: its version says so.
//! 2. Structures that are passed live until the call returns; what an allocator makes is ours to delete.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::ptr::{self, NonNull};

use super::{BYTES, Owned, RawDevice, RawTensor, VERSION, Version, Versioned};
use crate::{Cause, DeviceId, Error, Stream};

/// The stable part of a framework's table: `DLPackExchangeAPIHeader`.
#[repr(C)]
#[derive(Debug)]
pub struct ExchangeHeader {
    /// Of the table.
    pub version: Version,
    /// The table of an older version, or null.
    pub prev: *mut ExchangeHeader,
}

/// Tells an allocator's caller what went wrong: its context, the error's kind, its message.
pub type SetError = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char);

/// Allocates like the prototype.
pub type Allocate =
    unsafe extern "C" fn(*mut RawTensor, *mut *mut Versioned, *mut c_void, SetError) -> c_int;

/// A framework's table: `DLPackExchangeAPI`.
#[repr(C)]
#[derive(Debug)]
pub struct ExchangeTable {
    /// Its version.
    pub header: ExchangeHeader,
    /// Allocates with the framework's allocator.
    pub managed_tensor_allocator: Option<Allocate>,
    /// A Python object's tensor; its work may still run.
    pub managed_tensor_from_py_object_no_sync:
        Option<unsafe extern "C" fn(*mut c_void, *mut *mut Versioned) -> c_int>,
    /// A Python object of a tensor.
    pub managed_tensor_to_py_object_no_sync:
        Option<unsafe extern "C" fn(*mut Versioned, *mut *mut c_void) -> c_int>,
    /// A Python object's tensor, borrowed.
    pub dltensor_from_py_object_no_sync:
        Option<unsafe extern "C" fn(*mut c_void, *mut RawTensor) -> c_int>,
    /// The stream that the framework gives work to now, on this thread.
    pub current_work_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

/// A framework's functions.
#[derive(Clone, Copy)]
pub struct Exchange(&'static ExchangeTable);

impl Exchange {
    /// The table at this address, or the first of the older ones that it names whose version is known here.
    ///
    /// # Safety
    /// It is null, or a table of the protocol's that lives as long as the process.
    pub unsafe fn from_raw(table: *const c_void) -> Option<Exchange> {
        let mut header = table.cast::<ExchangeHeader>();
        // A chain is as long as there were versions.
        for _ in 0..16 {
            if header.is_null() {
                return None;
            }
            // SAFETY: a header, which is the same in every version (invariant 1).
            let found = unsafe { &*header };
            if found.version.major == VERSION.major {
                // SAFETY: a table of this version begins with its header (invariant 1).
                return Some(Exchange(unsafe { &*header.cast::<ExchangeTable>() }));
            }
            header = found.prev;
        }
        None
    }

    /// Memory of this many bytes, from the framework's allocator.
    ///
    /// # Errors
    /// [`Cause::OutOfMemory`] where the framework says so; [`Cause::Driver`] with what it says.
    pub fn allocate(&self, device: DeviceId, len: u64) -> Result<Owned<Versioned>, Error> {
        const DOING: &str = "allocate with the framework";
        let unable = || Error::unsupported(device, "the framework's allocator");
        let allocate = self.0.managed_tensor_allocator.ok_or_else(unable)?;
        let (extent, index) = (i64::try_from(len), i32::try_from(device.index));
        let (Ok(mut extent), Ok(index)) = (extent, index) else {
            return Err(Error::new(device, DOING, full(len)));
        };
        let mut stride = 1;
        let mut prototype = RawTensor {
            data: ptr::null_mut(),
            device: RawDevice {
                kind: device.kind.dlpack(),
                index,
            },
            ndim: 1,
            dtype: BYTES,
            shape: &raw mut extent,
            strides: &raw mut stride,
            byte_offset: 0,
        };
        let mut said = Said::default();
        let (context, mut made) = ((&raw mut said).cast(), ptr::null_mut());
        // SAFETY: invariants 1 and 2.
        let code = unsafe { allocate(&raw mut prototype, &raw mut made, context, set_error) };
        let Some(made) = NonNull::new(made).filter(|_| code == 0) else {
            return Err(Error::new(device, DOING, said.cause(code, len)));
        };
        // SAFETY: it was made for us, and frameworks' deleters lock what they need.
        let made = unsafe { Owned::from_raw(made) };
        let right =
            made.get().tensor.device == prototype.device && (made.address() != 0 || len == 0);
        match right {
            true => Ok(made),
            false => {
                let text = "the framework allocated on another device".to_owned();
                Err(Error::new(device, DOING, Cause::Invalid(text)))
            }
        }
    }

    /// The stream that the framework gives its work to, on this thread.
    ///
    /// # Errors
    /// [`Cause::Unsupported`] for devices without streams; [`Cause::Driver`] with the framework's code.
    pub fn current_stream(&self, device: DeviceId) -> Result<Stream, Error> {
        let unable = || Error::unsupported(device, "the framework's streams");
        let ask = self.0.current_work_stream.ok_or_else(unable)?;
        let index = i32::try_from(device.index).map_err(|_| unable())?;
        let mut stream = ptr::null_mut();
        // SAFETY: invariants 1 and 2.
        match unsafe { ask(device.kind.dlpack(), index, &raw mut stream) } {
            // SAFETY: the framework's own stream of this device; frameworks keep their streams for good.
            0 => Ok(unsafe { Stream::from_raw(stream.addr() as u64) }),
            code => {
                let cause = Said::default().cause(code, 0);
                Err(Error::new(device, "ask for the framework's stream", cause))
            }
        }
    }

    /// The tensor of a Python object of the framework. None with a Python exception set.
    ///
    /// # Safety
    /// The object is the framework's, and the thread is attached to Python.
    pub unsafe fn tensor_of(&self, object: NonNull<c_void>) -> Option<Owned<Versioned>> {
        let take = self.0.managed_tensor_from_py_object_no_sync?;
        let mut made = ptr::null_mut();
        // SAFETY: invariant 1, and the caller's promise.
        let code = unsafe { take(object.as_ptr(), &raw mut made) };
        let made = NonNull::new(made).filter(|_| code == 0)?;
        // SAFETY: it was made for us, and frameworks' deleters lock what they need.
        Some(unsafe { Owned::from_raw(made) })
    }

    /// A new reference to a Python object of the framework, with this tensor. None with a Python exception
    /// set; the tensor is gone then.
    ///
    /// # Safety
    /// The thread is attached to Python.
    pub unsafe fn object_of(&self, tensor: Owned<Versioned>) -> Option<NonNull<c_void>> {
        let give = self.0.managed_tensor_to_py_object_no_sync?;
        let (raw, mut object) = (tensor.into_raw(), ptr::null_mut());
        // SAFETY: invariant 1, and the caller's promise.
        let code = unsafe { give(raw.as_ptr(), &raw mut object) };
        if code != 0 {
            // SAFETY: only a call that succeeds takes it over.
            drop(unsafe { Owned::from_raw(raw) });
        }
        NonNull::new(object).filter(|_| code == 0)
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.0.header.version;
        write!(f, "Exchange({}.{})", version.major, version.minor)
    }
}

fn full(needed: u64) -> Cause {
    Cause::OutOfMemory { needed, free: None }
}

/// What an allocator said of its failure.
#[derive(Default)]
struct Said {
    kind: String,
    message: String,
}

impl Said {
    fn cause(self, code: c_int, len: u64) -> Cause {
        let memory = self.kind == "MemoryError" || self.kind.contains("OutOfMemory");
        // Torch calls every failure of its allocator a MemoryError; only some are.
        if memory && (self.message.is_empty() || self.message.contains("out of memory")) {
            return full(len);
        }
        let text = match (self.kind.is_empty(), self.message.is_empty()) {
            (true, true) => "nothing more".to_owned(),
            (false, true) => self.kind,
            (true, false) => self.message,
            (false, false) => format!("{}: {}", self.kind, self.message),
        };
        Cause::Driver {
            code: code.into(),
            text,
        }
    }
}

unsafe extern "C" fn set_error(said: *mut c_void, kind: *const c_char, message: *const c_char) {
    let text = |text: *const c_char| match text.is_null() {
        true => String::new(),
        // SAFETY: the protocol gives texts that end with a zero.
        false => unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned(),
    };
    let (kind, message) = (text(kind), text(message));
    // SAFETY: the context is what `allocate` passed, which waits for the call to return.
    if let Some(said) = unsafe { said.cast::<Said>().as_mut() } {
        *said = Said { kind, message };
    }
}

#[cfg(test)]
mod tests {
    use super::super::Tensor;
    use super::*;
    use crate::{Device, HostDevice, Kind};

    /// A framework whose allocator is the host's, and has 1000 bytes.
    unsafe extern "C" fn allocate(
        prototype: *mut RawTensor,
        made: *mut *mut Versioned,
        context: *mut c_void,
        set_error: SetError,
    ) -> c_int {
        // SAFETY: the caller's, for the time of the call.
        let prototype = unsafe { &*prototype };
        assert_eq!((prototype.ndim, prototype.dtype), (1, BYTES));
        // SAFETY: one extent.
        let len = unsafe { *prototype.shape } as u64;
        let refusal = match len {
            13 => Some((c"ValueError", c"13 is no length")),
            1001.. => Some((c"MemoryError", c"out of memory: 1000 bytes at most")),
            _ => None,
        };
        if let Some((kind, message)) = refusal {
            // SAFETY: as the protocol wants it.
            unsafe { set_error(context, kind.as_ptr(), message.as_ptr()) };
            return -1;
        }
        let memory = HostDevice::default().allocate(len).unwrap();
        let tensor = Tensor::new(memory, 0, BYTES, &[len]).unwrap();
        // SAFETY: the caller's.
        unsafe { *made = tensor.versioned().into_raw().as_ptr() };
        0
    }

    unsafe extern "C" fn stream(kind: i32, index: i32, stream: *mut *mut c_void) -> c_int {
        // SAFETY: the caller's.
        unsafe { *stream = ptr::without_provenance_mut(77) };
        if (kind, index) == (2, 3) { 0 } else { -1 }
    }

    fn table(major: u32, prev: *mut ExchangeHeader) -> *mut ExchangeTable {
        let version = Version { major, minor: 3 };
        Box::into_raw(Box::new(ExchangeTable {
            header: ExchangeHeader { version, prev },
            managed_tensor_allocator: Some(allocate),
            managed_tensor_from_py_object_no_sync: None,
            managed_tensor_to_py_object_no_sync: None,
            dltensor_from_py_object_no_sync: None,
            current_work_stream: Some(stream),
        }))
    }

    fn exchange(table: *mut ExchangeTable) -> Option<Exchange> {
        // SAFETY: tables of this test are never freed.
        unsafe { Exchange::from_raw(table.cast()) }
    }

    #[test]
    fn a_table_of_a_version_that_is_known_is_found() {
        let ours = table(1, ptr::null_mut());
        assert!(exchange(ours).is_some() && exchange(ptr::null_mut()).is_none());
        assert!(exchange(table(2, ptr::null_mut())).is_none());
        let newer = table(3, table(2, ours.cast()).cast());
        assert_eq!(format!("{:?}", exchange(newer).unwrap()), "Exchange(1.3)");
    }

    #[test]
    fn a_frameworks_allocator_gives_memory_or_its_reason() {
        let exchange = exchange(table(1, ptr::null_mut())).unwrap();
        let made = exchange.allocate(DeviceId::HOST, 1000).unwrap();
        assert_ne!(made.address(), 0);
        drop(made);
        let full = exchange.allocate(DeviceId::HOST, 1001).unwrap_err();
        assert_eq!(full.cause(), &super::full(1001));
        let refused = exchange.allocate(DeviceId::HOST, 13).unwrap_err();
        assert!(
            refused.to_string().contains("ValueError: 13 is no length"),
            "{refused}"
        );
        // It makes memory of the host, whatever it is asked for.
        let elsewhere = exchange
            .allocate(DeviceId::new(Kind::Cuda, 0), 10)
            .unwrap_err();
        assert!(
            matches!(elsewhere.cause(), Cause::Invalid(_)),
            "{elsewhere}"
        );
    }

    #[test]
    fn a_frameworks_stream_is_asked_for_by_device() {
        let exchange = exchange(table(1, ptr::null_mut())).unwrap();
        let third = exchange
            .current_stream(DeviceId::new(Kind::Cuda, 3))
            .unwrap();
        assert_eq!(third.raw(), 77);
        assert!(exchange.current_stream(DeviceId::HOST).is_err());
    }
}
