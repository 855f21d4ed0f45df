//! Memory at the boundary to Python: the only `unsafe` of this crate.
//!
//! Invariants:
//! 1. A [`Buffer`]'s memory has a fixed address and length from its creation until the object is freed;
//!    every view that Python takes holds a reference to the object.
//! 2. Once a [`Buffer`] exists, Rust code makes no reference to its bytes; Python code may write to them.
//! 3. [`Owned`] holds one allocation of `layout`, zeroed when made, so that every byte is initialised; no
//!    allocation is made for a length of zero.
//! 4. A [`Foreign`] range was stated by the caller to be readable, and to stay so, until the call that took
//!    it returns. The documentation of `TensorSpec` says so to Python callers; the package's own callers hold
//!    a reference to the owner.
//! 5. A writable Python buffer pins its memory while the `PyBuffer` lives.
//! 6. A file descriptor that a Python object names is open while that object is; the caller holds it.
//! 7. A [`Lent`] range is the memory of a contiguous tensor that an adapter of this package has just made,
//!    at least that long; whoever holds the `Lent` holds the tensor, and shows it to nobody until it is filled.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::c_int;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyMemoryError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tonnage::storage::PrivateMap;

/// Alignment of owned memory: enough for every dtype, and what `calloc` gives by itself. Beyond that the
/// allocator would clear the memory by hand, on one thread, before it is read into.
const ALIGN: usize = 16;

/// Zeroed memory of this process.
#[derive(Debug)]
pub struct Owned {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is plain bytes with one owner; access follows Rust's borrow rules (invariant 3).
unsafe impl Send for Owned {}
// SAFETY: as above; a shared reference only reads.
unsafe impl Sync for Owned {}

impl Owned {
    /// Zeroed memory of this length, or `MemoryError`.
    pub fn new(len: usize) -> PyResult<Self> {
        let refused = || PyMemoryError::new_err(format!("cannot allocate {len} bytes"));
        let layout = Layout::from_size_align(len, ALIGN).map_err(|_| refused())?;
        if len == 0 {
            let start = NonNull::<[u8; ALIGN]>::dangling().cast();
            return Ok(Owned { start, layout });
        }
        // SAFETY: the layout's size is not zero (invariant 3).
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        Ok(Owned { start, layout })
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: invariant 3; `&mut self` is the only way to the bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.layout.size() != 0 {
            // SAFETY: made by `alloc_zeroed` with this layout, freed once (invariant 3).
            unsafe { dealloc(self.start.as_ptr(), self.layout) }
        }
    }
}

#[derive(Debug)]
enum Memory {
    Owned(Owned),
    Map(PrivateMap),
}

/// Writable memory behind one or more tensors: a file's private map, or memory of its own.
///
/// Supports the buffer protocol. Writing to a mapped buffer changes this process's copy, never the file.
#[pyclass(frozen, module = "tonnage._native")]
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
}

impl Buffer {
    /// Hands a file's map to Python.
    pub fn map(map: PrivateMap) -> Self {
        Buffer {
            memory: Memory::Map(map),
        }
    }

    /// Hands filled memory to Python.
    pub fn owned(owned: Owned) -> Self {
        Buffer {
            memory: Memory::Owned(owned),
        }
    }

    fn parts(&self) -> (*mut u8, usize) {
        match &self.memory {
            Memory::Owned(owned) => (owned.start.as_ptr(), owned.layout.size()),
            Memory::Map(map) => (map.as_mut_ptr(), map.len()),
        }
    }
}

#[pymethods]
impl Buffer {
    fn __len__(&self) -> usize {
        self.parts().1
    }

    /// Whether the memory is a file's private map.
    #[getter]
    fn mapped(&self) -> bool {
        matches!(self.memory, Memory::Map(_))
    }

    fn __repr__(&self) -> String {
        let kind = if self.mapped() { "mapped" } else { "owned" };
        format!("<tonnage buffer: {} bytes, {kind}>", self.__len__())
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let (start, len) = slf.get().parts();
        let len = ffi::Py_ssize_t::try_from(len)
            .map_err(|_| PyBufferError::new_err("the buffer is too long"))?;
        let (object, start) = (slf.as_ptr(), start.cast());
        // SAFETY: Python gave a valid view; the memory outlives it (invariant 1).
        let code = unsafe { ffi::PyBuffer_FillInfo(view, object, start, len, 0, flags) };
        if code == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

/// Bytes that someone else owns, given by address.
#[derive(Clone, Copy, Debug)]
pub struct Foreign {
    address: usize,
    len: usize,
}

impl Foreign {
    /// `len` bytes from `address`. `None` for a null address with a length.
    pub fn new(address: u64, len: usize) -> Option<Self> {
        let address = usize::try_from(address).ok()?;
        (len == 0 || address != 0).then_some(Foreign { address, len })
    }

    /// The bytes, for as long as invariant 4 holds.
    pub fn as_slice(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        let start = std::ptr::with_exposed_provenance::<u8>(self.address);
        // SAFETY: not null, and invariant 4.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

/// The memory of a fresh tensor, lent to be filled.
#[derive(Debug)]
pub struct Lent {
    address: NonZeroUsize,
    len: usize,
}

impl Lent {
    /// `len` bytes from `address`, for as long as invariant 7 holds. `None` for a null address.
    pub fn new(address: usize, len: usize) -> Option<Self> {
        let address = NonZeroUsize::new(address)?;
        Some(Lent { address, len })
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let start = std::ptr::with_exposed_provenance_mut::<u8>(self.address.get());
        // SAFETY: not null, and invariant 7; `&mut self` is the only way to the bytes.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

/// A writable buffer of another package, held while Rust fills it.
pub struct Target(PyBuffer<u8>);

impl Target {
    /// Takes hold of `object`'s memory, which must be writable, contiguous and of this length.
    pub fn new(object: &Bound<'_, PyAny>, len: usize) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)?;
        if buffer.readonly() || !buffer.is_c_contiguous() || buffer.len_bytes() != len {
            let text = format!("a writable, contiguous buffer of {len} bytes is needed");
            return Err(PyBufferError::new_err(text));
        }
        Ok(Target(buffer))
    }

    /// Takes hold of `object`'s memory, which must be writable and contiguous, whatever its length.
    pub fn any(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)?;
        let len = buffer.len_bytes();
        drop(buffer);
        Self::new(object, len)
    }

    /// Where the bytes are: first address and one past the last.
    pub fn span(&self) -> (usize, usize) {
        let start = self.0.buf_ptr().addr();
        (start, start + self.0.len_bytes())
    }

    /// The bytes. Nobody else may use them meanwhile.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let (start, len) = (self.0.buf_ptr().cast::<u8>(), self.0.len_bytes());
        if len == 0 {
            return &mut [];
        }
        // SAFETY: invariant 5; writable, contiguous and as long as checked on creation.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// The bytes of a Python `bytes` object, held for Rust: they never change and never move.
pub struct PinnedBytes {
    _owner: Py<PyBytes>,
    bytes: Foreign,
}

impl PinnedBytes {
    /// Holds the object.
    pub fn new(object: &Bound<'_, PyBytes>) -> Self {
        let bytes = object.as_bytes();
        let bytes = Foreign {
            address: bytes.as_ptr().expose_provenance(),
            len: bytes.len(),
        };
        PinnedBytes {
            _owner: object.clone().unbind(),
            bytes,
        }
    }
}

impl AsRef<[u8]> for PinnedBytes {
    fn as_ref(&self) -> &[u8] {
        // Invariant 4: `bytes` are immutable, and the owner is held.
        self.bytes.as_slice()
    }
}

/// A file of our own for a descriptor that a Python file object holds: it stays open when that is closed.
#[cfg(unix)]
pub fn duplicate(descriptor: i32) -> std::io::Result<std::fs::File> {
    use std::os::fd::BorrowedFd;
    if descriptor < 0 {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: not -1, and open while the caller holds the object (invariant 6).
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    Ok(borrowed.try_clone_to_owned()?.into())
}
