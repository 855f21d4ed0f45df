//! An open checkpoint, as the Python half sees it: rows by position, files, notes, and reads.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use tonnage::engine::UnknownStrategy;
use tonnage::storage::{PrivateMap, Source};
use tonnage::{Checkpoint, Error, OpenOptions, TensorRef};

use super::failure::{self, usage};
use super::read::{Done, Job, read};
use super::run::{CancelFlag, Request, run};
use super::source::{Described, make};
use crate::buffer::Buffer;

/// Name, dtype, shape, bytes, position and label of the file, first byte.
type Row<'py> = (
    &'py str,
    &'py str,
    Bound<'py, PyTuple>,
    u64,
    usize,
    &'py str,
    u64,
);
/// Label, bytes, start of the data, padding of the header, tensors.
type FileRow = (String, u64, u64, u64, usize);

/// An open checkpoint.
#[pyclass(frozen, name = "_Handle", module = "tonnage._native")]
pub struct Handle {
    pub checkpoint: Checkpoint,
    /// Reading runs Python code, which may be slow.
    runs_python: bool,
    /// The `bytes` objects that it was opened from, by file.
    given: Vec<Option<Py<PyBytes>>>,
    maps: Mutex<Vec<Option<Py<Buffer>>>>,
}

fn options(allow_symlinks: bool) -> OpenOptions {
    OpenOptions {
        allow_symlinks,
        ..OpenOptions::default()
    }
}

impl Handle {
    /// A checkpoint that was opened from files.
    pub fn new(checkpoint: Checkpoint) -> Self {
        let files = checkpoint.files().len();
        Handle {
            checkpoint,
            runs_python: false,
            given: (0..files).map(|_| None).collect(),
            maps: Mutex::new((0..files).map(|_| None).collect()),
        }
    }

    /// A checkpoint made over this one, which reads what this one reads.
    pub fn over(&self, checkpoint: Checkpoint) -> Self {
        Handle {
            runs_python: self.runs_python,
            ..Self::new(checkpoint)
        }
    }

    /// Whether reading runs Python code, which may be slow.
    pub fn runs_python(&self) -> bool {
        self.runs_python
    }

    fn at(&self, index: usize) -> PyResult<TensorRef<'_>> {
        let unknown = || usage("UNKNOWN_TENSOR", &format!("no tensor has position {index}"));
        self.checkpoint.at(index).ok_or_else(unknown)
    }
}

#[pymethods]
impl Handle {
    /// Opens a file, a folder or an index file.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf, allow_symlinks: bool) -> PyResult<Self> {
        let opened = py.detach(|| Checkpoint::open_with(path, &options(allow_symlinks)));
        opened.map(Self::new).map_err(|e| failure::raise(&e))
    }

    /// Opens a list of files as one checkpoint.
    #[staticmethod]
    fn open_files(py: Python<'_>, paths: Vec<PathBuf>, allow_symlinks: bool) -> PyResult<Self> {
        let opened = py.detach(|| Checkpoint::open_files(&paths, &options(allow_symlinks)));
        opened.map(Self::new).map_err(|e| failure::raise(&e))
    }

    /// Opens sources given as `(kind, object, label)`.
    #[staticmethod]
    fn open_sources(py: Python<'_>, sources: Vec<Described<'_>>) -> PyResult<Self> {
        let given: Vec<Option<Py<PyBytes>>> = sources
            .iter()
            .map(|(_, object, _)| {
                object
                    .cast::<PyBytes>()
                    .ok()
                    .map(|bytes| bytes.clone().unbind())
            })
            .collect();
        let mut made: Vec<Arc<dyn Source>> = Vec::with_capacity(sources.len());
        let mut runs_python = false;
        for described in sources {
            let (source, is_object) = make(described)?;
            made.push(source);
            runs_python |= is_object;
        }
        let opened = py.detach(|| Checkpoint::from_sources(made, &OpenOptions::default()));
        let handle = opened.map(Self::new).map_err(|e| failure::raise(&e))?;
        Ok(Handle {
            given,
            runs_python,
            ..handle
        })
    }

    fn __len__(&self) -> usize {
        self.checkpoint.len()
    }

    /// Position of the tensor of this name, or an error with near names.
    fn find(&self, py: Python<'_>, name: &str) -> PyResult<usize> {
        if let Some(tensor) = self.checkpoint.get(name) {
            return Ok(tensor.index());
        }
        let found = py.detach(|| self.checkpoint.tensor(name).map(|tensor| tensor.index()));
        found.map_err(|e| failure::raise(&e))
    }

    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool {
        self.checkpoint.get(name).is_some()
    }

    /// Names near this one.
    fn near(&self, name: &str) -> Vec<String> {
        tonnage::names::near(name, self.checkpoint.names())
    }

    /// All names, in the order of the files.
    fn names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.checkpoint.names())
    }

    /// Positions of the tensors that names and patterns select, ascending, and those that select nothing.
    fn select(&self, wanted: Vec<String>) -> (Vec<usize>, Vec<String>) {
        if wanted.is_empty() {
            return Default::default();
        }
        self.checkpoint.select(&wanted)
    }

    /// The row of the tensor at a position.
    fn row<'py>(slf: &'py Bound<'py, Self>, index: usize) -> PyResult<Row<'py>> {
        let tensor = slf.get().at(index)?;
        let shape = PyTuple::new(slf.py(), tensor.shape())?;
        let (name, dtype, label) = (tensor.name(), tensor.dtype_name(), tensor.file_label());
        Ok((
            name,
            dtype,
            shape,
            tensor.byte_len(),
            tensor.file(),
            label,
            tensor.offset(),
        ))
    }

    /// Bytes of the tensors at these positions, and the dtypes that they have once floats are cast to `wanted`.
    fn totals(
        &self,
        positions: Vec<usize>,
        wanted: Option<&str>,
    ) -> PyResult<(u64, Vec<&'static str>)> {
        crate::device::totals(&self.checkpoint, &positions, wanted)
    }

    /// A row for each file.
    fn files(&self) -> Vec<FileRow> {
        let files = self.checkpoint.files().iter();
        files
            .map(|f| {
                (
                    f.label.clone(),
                    f.len,
                    f.data_start,
                    f.header_padding,
                    f.tensors,
                )
            })
            .collect()
    }

    /// The merged metadata.
    fn metadata(&self) -> std::collections::BTreeMap<String, String> {
        self.checkpoint.metadata().clone()
    }

    /// Code, text and file of each note.
    fn notes(&self) -> Vec<(&'static str, String, Option<String>)> {
        let notes = self.checkpoint.notes().iter();
        notes
            .map(|note| (note.code, note.text.clone(), note.file.clone()))
            .collect()
    }

    /// Bytes of all tensors.
    #[getter]
    fn total_bytes(&self) -> u64 {
        self.checkpoint.total_bytes()
    }

    /// Elements of all tensors.
    #[getter]
    fn parameters(&self) -> u64 {
        self.checkpoint.parameters()
    }

    /// What was recognised: `"file"`, `"index"`, `"files"` or `"bytes"`.
    #[getter]
    fn layout(&self) -> &'static str {
        match self.checkpoint.layout() {
            tonnage::Layout::Single => "file",
            tonnage::Layout::Indexed => "index",
            tonnage::Layout::FileSet => "files",
            tonnage::Layout::Bytes => "bytes",
        }
    }

    /// Reads tensors and slices into the buffers of the jobs.
    #[pyo3(signature = (jobs, threads = None, progress = None, cancel = None, verify = false,
           strategy = "auto"))]
    #[allow(
        clippy::too_many_arguments,
        reason = "called by functions that have names for them"
    )]
    fn read(
        &self,
        py: Python<'_>,
        jobs: Vec<Job<'_>>,
        threads: Option<usize>,
        progress: Option<Bound<'_, PyAny>>,
        cancel: Option<&CancelFlag>,
        verify: bool,
        strategy: &str,
    ) -> PyResult<Done> {
        let strategy = strategy
            .parse()
            .map_err(|e: UnknownStrategy| usage("STRATEGY", &e.to_string()))?;
        let request = Request {
            total: 0,
            threads,
            progress: progress.as_ref(),
            cancel: cancel.map(|flag| flag.0.clone()),
            python: self.runs_python,
            slow: false,
        };
        read(py, &self.checkpoint, jobs, request, strategy, verify)
    }

    /// The bytes of the tensor at a position.
    fn raw<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyBytes>> {
        let tensor = self.at(index)?;
        let len = usize::try_from(tensor.byte_len())?;
        PyBytes::new_with(py, len, |bytes| {
            let request = Request {
                total: len as u64,
                threads: None,
                progress: None,
                cancel: None,
                python: self.runs_python,
                slow: false,
            };
            run(py, request, |options| {
                self.checkpoint.read_many(vec![(index, bytes)], options)
            })?;
            Ok(())
        })
    }

    /// The whole content of a file as a buffer, where it lies in memory or can be mapped; writing to it
    /// changes no file.
    fn memory<'py>(&self, py: Python<'py>, file: usize) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(source) = self.checkpoint.source(file) else {
            return Ok(None);
        };
        // What is turned round while it is read lies nowhere as it is.
        if source.bytes().is_none() && source.file().is_none() {
            return Ok(None);
        }
        if let Some(bytes) = self.given.get(file).and_then(Option::as_ref) {
            return Ok(Some(bytes.bind(py).clone().into_any()));
        }
        let held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = held.get(file).and_then(Option::as_ref) {
            return Ok(Some(buffer.bind(py).clone().into_any()));
        }
        drop(held);
        let Some(opened) = source.file() else {
            return Ok(None);
        };
        let raise = |e: Error| failure::raise(&e);
        let map = PrivateMap::from_file(opened, source.label()).map_err(|e| raise(e.into()))?;
        if (map.len() as u64) < source.len() {
            let text = format!("{} became shorter since it was opened", source.label());
            return Err(usage("DATA_TRUNCATED", &text));
        }
        let buffer = Bound::new(py, Buffer::map(map))?;
        let mut held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = held.get_mut(file) {
            // A thread that was faster keeps its map to itself.
            *slot = Some(buffer.clone().unbind());
        }
        Ok(Some(buffer.into_any()))
    }
}
