//! `safe_open` and its kin: Python's view of an open file.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::args::{Backend, Device, Framework};
use super::file::Opened;
use super::slice::PySafeSlice;
use crate::error;

/// A file that is open until it is closed. Slices taken from it stay usable.
struct Handle(Mutex<Option<Arc<Opened>>>);

impl Handle {
    fn new(opened: Opened) -> Self {
        Handle(Mutex::new(Some(Arc::new(opened))))
    }

    fn get(&self) -> PyResult<Arc<Opened>> {
        // Nothing of Python's happens under the lock: it could hand the GIL to a thread that waits here.
        let opened = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        opened.ok_or_else(|| error::usage("CLOSED", "File is closed"))
    }

    fn close(&self) {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Dropped here and not under the lock: it may drop Python objects.
        drop(last);
    }

    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let opened = self.get()?;
        let Some(metadata) = opened.header.metadata() else {
            return Ok(None);
        };
        let dict = PyDict::new(py);
        for (key, value) in metadata.iter() {
            dict.set_item(key, value)?;
        }
        Ok(Some(dict))
    }

    fn keys(&self) -> PyResult<Vec<String>> {
        Ok(self
            .get()?
            .header
            .iter_by_name()
            .map(|info| info.name.to_owned())
            .collect())
    }

    fn offset_keys(&self) -> PyResult<Vec<String>> {
        Ok(self
            .get()?
            .header
            .iter_by_offset()
            .map(|info| info.name.to_owned())
            .collect())
    }

    fn get_tensor<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let opened = self.get()?;
        let info = opened.info(opened.position(name)?)?;
        opened.tensor(py, &info)
    }

    fn get_slice(&self, name: &str) -> PyResult<PySafeSlice> {
        let opened = self.get()?;
        let position = opened.position(name)?;
        Ok(PySafeSlice::new(opened, position))
    }

    fn get_tensor_meta(&self, name: &str) -> PyResult<TensorMeta> {
        let opened = self.get()?;
        let info = opened.info(opened.position(name)?)?;
        Ok(TensorMeta {
            dtype: info.dtype.name().to_owned(),
            shape: info.shape.to_vec(),
            data_offsets: (info.begin, info.end),
        })
    }
}

/// What a header says of one tensor.
#[pyclass(frozen, get_all, module = "tonnage._native")]
#[derive(Debug)]
pub struct TensorMeta {
    /// The dtype's name in the header.
    dtype: String,
    /// The extents in elements.
    shape: Vec<u64>,
    /// First byte and one past the last, counted from the start of the data section.
    data_offsets: (u64, u64),
}

#[pymethods]
impl TensorMeta {
    fn __repr__(&self) -> String {
        let TensorMeta {
            dtype,
            shape,
            data_offsets,
        } = self;
        format!("TensorMeta(dtype='{dtype}', shape={shape:?}, data_offsets={data_offsets:?})")
    }
}

/// A safetensors file, opened lazily: tensors are read when asked for.
///
/// `framework` is one of `pt`, `np`, `tf`, `jax`, `mlx`, `paddle` or a longer name of these; `device` is a
/// name such as `"cpu"`, `"cuda:0"` or `"meta"`, or an accelerator's number. With `backend="mmap"` torch
/// tensors on the CPU view the file's private map; with `backend="pread"` every tensor is read.
#[pyclass(frozen, subclass, name = "safe_open", module = "builtins")]
pub struct SafeOpen(Handle);

#[pymethods]
impl SafeOpen {
    #[new]
    #[pyo3(signature = (filename, framework, device = Some(Device::Cpu), *, backend = Backend::Mmap),
           text_signature = "(filename, framework, device='cpu', *, backend='mmap')")]
    fn new(
        py: Python<'_>,
        filename: PathBuf,
        framework: Framework,
        device: Option<Device>,
        backend: Backend,
    ) -> PyResult<Self> {
        let device = device.unwrap_or(Device::Cpu);
        Ok(SafeOpen(Handle::new(Opened::path(
            py, &filename, framework, &device, backend,
        )?)))
    }

    /// The header's `__metadata__`, or `None`.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.0.metadata(py)
    }

    /// The tensors' names, sorted.
    fn keys(&self) -> PyResult<Vec<String>> {
        self.0.keys()
    }

    /// The tensors' names in the order of their bytes.
    fn offset_keys(&self) -> PyResult<Vec<String>> {
        self.0.offset_keys()
    }

    /// A whole tensor.
    fn get_tensor<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.0.get_tensor(py, name)
    }

    /// Every tensor by name, in the order of their bytes.
    fn get_tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.0.get()?.tensors(py)
    }

    /// A tensor to be sliced: `f.get_slice("w")[:, ::8]` reads what it takes.
    fn get_slice(&self, name: &str) -> PyResult<PySafeSlice> {
        self.0.get_slice(name)
    }

    /// Dtype, shape and byte range of a tensor, without its bytes.
    fn get_tensor_meta(&self, name: &str) -> PyResult<TensorMeta> {
        self.0.get_tensor_meta(name)
    }

    /// Starts to load tensors in the background, and gives the `PrefetchLoader` that hands each out once.
    ///
    /// `plan` maps names to what is loaded of each: `None` for all, a slice of rows, or a tuple of slices and
    /// lists, one a dimension; without a plan, everything is. `device` is the handle's by default. The loader
    /// outlives the handle.
    #[pyo3(signature = (plan = None, *, device = None, threads = 8))]
    fn prefetch<'py>(
        &self,
        py: Python<'py>,
        plan: Option<Bound<'py, PyAny>>,
        device: Option<Device>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.0.get()?.prefetch(py, plan, device, threads)
    }

    /// The same with the reference's limits: for PyTorch and CUDA only.
    #[pyo3(signature = (plan = None, *, device = None, threads = 8))]
    fn _prefetch_as_reference<'py>(
        &self,
        py: Python<'py>,
        plan: Option<Bound<'py, PyAny>>,
        device: Option<Device>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let opened = self.0.get()?;
        opened.check_as_reference(device.as_ref())?;
        opened.prefetch(py, plan, device, threads)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        _type: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.0.close();
    }
}

/// The same over an open Python file: what its `name` leads to is opened.
#[pyclass(frozen, name = "_safe_open_handle", module = "tonnage._native")]
pub struct SafeOpenHandle(Handle);

#[pymethods]
impl SafeOpenHandle {
    #[new]
    #[pyo3(signature = (f, framework, device = Some(Device::Cpu), *, backend = Backend::Mmap),
           text_signature = "(f, framework, device='cpu', *, backend='mmap')")]
    fn new(
        f: &Bound<'_, PyAny>,
        framework: Framework,
        device: Option<Device>,
        backend: Backend,
    ) -> PyResult<Self> {
        f.getattr("fileno")?;
        let filename: PathBuf = f.getattr("name")?.extract()?;
        let device = device.unwrap_or(Device::Cpu);
        let opened = Opened::path(f.py(), &filename, framework, &device, backend)?;
        Ok(SafeOpenHandle(Handle::new(opened)))
    }

    /// The header's `__metadata__`, or `None`.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.0.metadata(py)
    }

    /// The tensors' names, sorted.
    fn keys(&self) -> PyResult<Vec<String>> {
        self.0.keys()
    }

    /// The tensors' names in the order of their bytes.
    fn offset_keys(&self) -> PyResult<Vec<String>> {
        self.0.offset_keys()
    }

    /// A whole tensor.
    fn get_tensor<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.0.get_tensor(py, name)
    }

    /// Every tensor by name, in the order of their bytes.
    fn get_tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.0.get()?.tensors(py)
    }

    /// A tensor to be sliced.
    fn get_slice(&self, name: &str) -> PyResult<PySafeSlice> {
        self.0.get_slice(name)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        _type: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.0.close();
    }
}

/// Every tensor of a file's content, for a framework and a device. What the modules' `load` is made of.
#[pyfunction]
#[pyo3(name = "_load_bytes", signature = (data, framework, device = Device::Cpu),
       text_signature = "(data, framework, device='cpu')")]
pub fn load_bytes<'py>(
    py: Python<'py>,
    data: &Bound<'py, PyBytes>,
    framework: Framework,
    device: Device,
) -> PyResult<Bound<'py, PyDict>> {
    Opened::bytes(data, framework, &device)?.tensors(py)
}
