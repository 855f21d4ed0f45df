//! Saving: the bytes of a file from specs, and the plain `deserialize`.
//!
//! Equal input gives equal bytes, and the bytes are the reference's. A file is replaced whole or not at
//! all. Tensors that are not in host memory are fetched one at a time, so that host memory holds one of
//! them and not the model.

use std::collections::HashMap;
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList, PyTuple};
use tonnage::engine::{self, Write};
use tonnage::format::{
    self, Header, Layout, ReadOptions, TensorSpec as Spec, WriteOptions, layout,
};
use tonnage::storage::{self, AtomicFile, AtomicOptions, Durability, Sink};

use tonnage::format::forever::CHECKSUMS_KEY;
use tonnage::{DeviceData, checksums};

use super::spec::TensorSpec;
use crate::buffer::Foreign;
use crate::device::data_of;
use crate::device::tensor::downloads;
use crate::error;
use crate::paved::failure;

const CONTEXT: &str = "Error while serializing";

type Specs = HashMap<String, Py<TensorSpec>>;
type Metadata = Option<HashMap<String, String>>;

/// A file about to be written.
struct Plan<'a> {
    names: Vec<&'a str>,
    specs: Vec<&'a TensorSpec>,
    layout: Layout,
    /// Gives the specs of tensors that have no address yet.
    fetch: Option<&'a Py<PyAny>>,
}

impl<'a> Plan<'a> {
    fn new(specs: &'a Specs, metadata: &Metadata, fetch: Option<&'a Py<PyAny>>) -> PyResult<Self> {
        let (names, specs): (Vec<&str>, Vec<&TensorSpec>) = specs
            .iter()
            .map(|(name, spec)| (name.as_str(), spec.get()))
            .unzip();
        let rows: Vec<Spec<'_>> = names
            .iter()
            .zip(&specs)
            .map(|(name, spec)| Spec {
                name,
                dtype: spec.dtype,
                shape: &spec.shape,
            })
            .collect();
        let pairs: Option<Vec<(&str, &str)>> = metadata.as_ref().map(|pairs| {
            // Checksums in it are those of another file's data (spec 13.11).
            pairs
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .filter(|(key, _)| *key != CHECKSUMS_KEY)
                .collect()
        });
        let layout = layout(&rows, pairs.as_deref(), &WriteOptions::default())
            .map_err(|e| error::format(CONTEXT, &e, None))?;
        let plan = Plan {
            names,
            specs,
            layout,
            fetch,
        };
        for at in 0..plan.specs.len() {
            plan.check_len(at, plan.specs[at])?;
        }
        Ok(plan)
    }

    fn check_len(&self, at: usize, spec: &TensorSpec) -> PyResult<()> {
        let (begin, end) = self.layout.ranges[at];
        if spec.byte_len() as u64 == end - begin {
            return Ok(());
        }
        let error = format::Error::new(format::Reason::WriteSize)
            .tensor(self.names[at])
            .found(format_args!("{} bytes", spec.byte_len()))
            .needed(format_args!(
                "{} for {} of shape {:?}",
                end - begin,
                spec.dtype,
                spec.shape
            ));
        Err(error::format(CONTEXT, &error, None))
    }

    /// Writes header and tensors in the order of the file. The GIL is held only to fetch.
    fn write(&self, py: Python<'_>, mut out: Out<'_>) -> PyResult<()> {
        let start = self.layout.data_start();
        let mut pieces = vec![Write {
            offset: 0,
            data: &self.layout.header,
        }];
        let data: Vec<Option<Foreign>> = self.specs.iter().map(|spec| spec.data()).collect();
        for &at in &self.layout.order {
            let offset = start + self.layout.ranges[at].0;
            if let Some(bytes) = &data[at] {
                let data = bytes.as_slice();
                pieces.push(Write { offset, data });
                continue;
            }
            // What lies before goes first: a tensor that was fetched is let go before the next.
            py.detach(|| out.put(&pieces))?;
            pieces.clear();
            let (bytes, owner) = self.fetch(py, at)?;
            if let Some(data) = data_of(&owner) {
                let (begin, end) = self.layout.ranges[at];
                py.detach(|| out.put_device(offset, end - begin, &data))?;
                continue;
            }
            let bytes = bytes.ok_or_else(|| self.missing(at))?;
            let data = bytes.as_slice();
            py.detach(|| out.put(&[Write { offset, data }]))?;
            drop(owner);
        }
        py.detach(|| out.put(&pieces))
    }

    /// The bytes of a tensor that has no address yet, and what keeps them alive or stands for them.
    fn fetch<'py>(
        &self,
        py: Python<'py>,
        at: usize,
    ) -> PyResult<(Option<Foreign>, Bound<'py, PyAny>)> {
        let fetch = self.fetch.ok_or_else(|| self.missing(at))?;
        let fetched = fetch.bind(py).call1((self.names[at],))?;
        let (spec, owner): (Py<TensorSpec>, Bound<'py, PyAny>) =
            fetched.cast::<PyTuple>()?.extract()?;
        let spec = spec.bind(py).get();
        self.check_len(at, spec)?;
        Ok((spec.data(), owner))
    }

    fn missing(&self, at: usize) -> PyErr {
        let error = format::Error::new(format::Reason::WriteSize).tensor(self.names[at]);
        error::format(CONTEXT, &error.found("no address").needed("data"), None)
    }
}

/// Where a file's bytes go.
enum Out<'a> {
    File(&'a AtomicFile),
    Memory(&'a mut [u8]),
}

impl Out<'_> {
    /// Writes bytes of a device, block by block.
    fn put_device(&mut self, offset: u64, len: u64, data: &DeviceData<'_>) -> PyResult<()> {
        let downloads = downloads(data);
        match self {
            Out::File(file) => {
                let from = downloads.from(data.memory, data.offset);
                let put = [engine::Put::fill(offset, len, &from)];
                let written = engine::put(*file, &put, None, &engine::Options::default());
                written.map(|_| ()).map_err(failed)
            }
            Out::Memory(bytes) => {
                // The layout's ranges lie within the file that the memory was made for.
                let (start, len) = (offset as usize, len as usize);
                let dst = &mut bytes[start..start + len];
                downloads
                    .read(data.memory, data.offset, dst)
                    .map_err(failed)
            }
        }
    }

    fn put(&mut self, pieces: &[Write<'_>]) -> PyResult<()> {
        match self {
            Out::File(file) => {
                let written = engine::write(*file, pieces, &engine::Options::default());
                written.map(|_| ()).map_err(failed)
            }
            Out::Memory(bytes) => {
                for piece in pieces {
                    // The layout's ranges lie within the file that the memory was made for.
                    let start = piece.offset as usize;
                    bytes[start..start + piece.data.len()].copy_from_slice(piece.data);
                }
                Ok(())
            }
        }
    }
}

fn failed(error: engine::Error) -> PyErr {
    match error {
        engine::Error::Storage { error, .. } => unwritable(&error),
        engine::Error::Device(failed) => error::usage("DEVICE", &failed.to_string()),
        other => error::usage("CANCELLED", &other.to_string()),
    }
}

fn unwritable(error: &storage::Error) -> PyErr {
    error::io(CONTEXT, error, None)
}

fn to_bytes<'py>(py: Python<'py>, plan: &Plan<'_>) -> PyResult<Bound<'py, PyBytes>> {
    let len = usize::try_from(plan.layout.file_len)
        .map_err(|_| pyo3::exceptions::PyMemoryError::new_err("the file does not fit in memory"))?;
    PyBytes::new_with(py, len, |bytes| plan.write(py, Out::Memory(bytes)))
}

fn to_file(py: Python<'_>, plan: &Plan<'_>, filename: &PathBuf, fsync: bool) -> PyResult<()> {
    let durability = if fsync {
        Durability::Full
    } else {
        Durability::None
    };
    let options = AtomicOptions {
        durability,
        ..AtomicOptions::default()
    };
    let file = py
        .detach(|| {
            let file = AtomicFile::create(filename, &options)?;
            file.reserve(plan.layout.file_len)?;
            Ok(file)
        })
        .map_err(|e: storage::Error| unwritable(&e))?;
    plan.write(py, Out::File(&file))?;
    // A sidecar must not lie beside content that it is not of (spec 13.15).
    py.detach(|| checksums::remove_sidecar(file.target()))
        .map_err(|e| failure::raise(&e))?;
    py.detach(|| file.commit()).map_err(|e| unwritable(&e))
}

/// The bytes of a safetensors file.
///
/// `tensor_dict` maps names to `TensorSpec`; each spec's memory must stay valid until this returns.
#[pyfunction]
#[pyo3(signature = (tensor_dict, metadata = None))]
pub fn serialize<'py>(
    py: Python<'py>,
    tensor_dict: Specs,
    metadata: Metadata,
) -> PyResult<Bound<'py, PyBytes>> {
    to_bytes(py, &Plan::new(&tensor_dict, &metadata, None)?)
}

/// Writes a safetensors file, replacing what was there whole or not at all.
///
/// With `fsync=True` the file survives a power cut once this has returned.
#[pyfunction]
#[pyo3(signature = (tensor_dict, filename, metadata = None, *, fsync = true))]
pub fn serialize_file(
    py: Python<'_>,
    tensor_dict: Specs,
    filename: PathBuf,
    metadata: Metadata,
    fsync: bool,
) -> PyResult<()> {
    to_file(
        py,
        &Plan::new(&tensor_dict, &metadata, None)?,
        &filename,
        fsync,
    )
}

/// What the modules' `save` and `save_file` are made of: `serialize` or, with a `filename`,
/// `serialize_file`, where specs may lack an address. `fetch(name)` gives such a tensor's spec and an
/// object that keeps its memory; it is called in the file's order, one at a time.
#[pyfunction]
#[pyo3(name = "_write_tensors", signature = (tensor_dict, fetch, filename, metadata, fsync))]
pub fn write_tensors<'py>(
    py: Python<'py>,
    tensor_dict: Specs,
    fetch: Py<PyAny>,
    filename: Option<PathBuf>,
    metadata: Metadata,
    fsync: bool,
) -> PyResult<Option<Bound<'py, PyBytes>>> {
    let plan = Plan::new(&tensor_dict, &metadata, Some(&fetch))?;
    match filename {
        Some(filename) => to_file(py, &plan, &filename, fsync).map(|()| None),
        None => to_bytes(py, &plan).map(Some),
    }
}

/// The tensors of a file's content as `(name, {"shape", "dtype", "data"})`, in the order of the file.
#[pyfunction]
#[pyo3(signature = (bytes))]
pub fn deserialize<'py>(bytes: &Bound<'py, PyBytes>) -> PyResult<Bound<'py, PyList>> {
    let py = bytes.py();
    let content = bytes.as_bytes();
    let refused = |e: format::Error| error::format("Error while deserializing", &e, None);
    let header = Header::parse(content, Some(content.len() as u64), &ReadOptions::default())
        .map_err(refused)?;
    let items = PyList::empty(py);
    for info in header.iter_by_offset() {
        let dtype = info
            .dtype
            .known()
            .map_err(|e| refused(e.tensor(info.name)))?;
        let (start, end) = (
            header.data_start() + info.begin,
            header.data_start() + info.end,
        );
        // The header was checked against the content's length.
        let data = content
            .get(start as usize..end as usize)
            .unwrap_or_default();
        let entry = PyDict::new(py);
        entry.set_item("shape", info.shape.to_vec())?;
        entry.set_item("dtype", dtype.name())?;
        entry.set_item("data", PyByteArray::new(py, data))?;
        items.append((info.name, entry))?;
    }
    Ok(items)
}
