//! Memory of a device as Python holds it, and streams of others by address.
//!
//! Invariants:
//! 1. An address that is adopted is memory of that device, `nbytes` long, for as long as the Python object
//!    `owner` lives: the package's Python half takes both from a framework's own tensor.
//! 2. A stream's handle comes from the framework that has it current, and lives as long as its device is in
//!    use there: frameworks keep their streams in pools for good.
//! 3. The memory of the host that a [`Region`] holds has a fixed address and length while it lives; every
//!    view that Python takes holds a reference to the object. Rust writes to a part of it only before the
//!    Python half shows that part to anybody.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use tonnage::device::{Device, DeviceId, Memory, Stream};

use super::open;
use crate::paved::failure::raise;

/// A framework's stream.
pub fn stream(handle: u64) -> Stream {
    // SAFETY: invariant 2.
    unsafe { Stream::from_raw(handle) }
}

/// A framework's object that keeps memory. Let go of at once, on whatever thread the last user of the memory is:
/// PyO3 alone would put it off to our next call where a framework's deleter runs, which it doesn't know of.
struct Owner(Option<Py<PyAny>>);

impl Drop for Owner {
    fn drop(&mut self) {
        let owner = self.0.take();
        // Not when Python is ending: then nobody misses the memory.
        Python::try_attach(|_| drop(owner));
    }
}

/// A stretch of a device's memory: the driver's, or a framework's that stays alive with it.
///
/// The host's can be had as a buffer.
#[pyclass(frozen, name = "_Region", module = "tonnage._native")]
#[derive(Debug)]
pub struct Region {
    pub device: Arc<dyn Device>,
    pub memory: Memory,
    /// The stream in whose order a framework uses it.
    pub after: Option<Stream>,
}

#[pymethods]
impl Region {
    /// Memory of our own.
    #[staticmethod]
    fn allocate(py: Python<'_>, device: &str, nbytes: u64) -> PyResult<Self> {
        let device = open::device(py, device)?;
        let memory = py
            .detach(|| device.allocate(nbytes))
            .map_err(|error| raise(&error.into()))?;
        Ok(Region {
            device,
            memory,
            after: None,
        })
    }

    /// Memory that a framework allocated, which `owner` keeps, and uses in the order of a stream.
    #[staticmethod]
    #[pyo3(signature = (device, address, nbytes, owner, stream = None))]
    fn adopt(
        py: Python<'_>,
        device: &str,
        address: u64,
        nbytes: u64,
        owner: Py<PyAny>,
        stream: Option<u64>,
    ) -> PyResult<Self> {
        let device = open::device(py, device)?;
        // SAFETY: invariant 1; order is kept by `Transfer::after`, and only what has landed is handed out.
        let memory = unsafe { device.adopt(address, nbytes, Box::new(Owner(Some(owner)))) };
        let memory = memory.map_err(|error| raise(&error.into()))?;
        Ok(Region {
            device,
            memory,
            after: stream.map(self::stream),
        })
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.memory.len())?)
    }

    /// Its address on the device.
    #[getter]
    fn address(&self) -> u64 {
        self.memory.address()
    }

    /// The device's name.
    #[getter]
    fn device(&self) -> String {
        self.memory.device().to_string()
    }

    fn __repr__(&self) -> String {
        format!(
            "<tonnage memory: {} bytes on {}>",
            self.memory.len(),
            self.memory.device()
        )
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let memory = &slf.get().memory;
        if memory.device() != DeviceId::HOST {
            let text = format!("the host can't see memory of {}", memory.device());
            return Err(PyBufferError::new_err(text));
        }
        let refused = |_| PyBufferError::new_err("the memory is too long for a buffer");
        let len = ffi::Py_ssize_t::try_from(memory.len()).map_err(refused)?;
        let start = usize::try_from(memory.address())?;
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: Python gave a valid view; the memory outlives it (invariant 3).
        let code = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, len, 0, flags) };
        if code == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}
