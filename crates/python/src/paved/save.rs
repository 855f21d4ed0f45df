//! Saving: all at once out of the tensors' own memory, or tensor by tensor.
//!
//! Where every tensor's bytes are at hand they are written by several threads straight out of the caller's
//! memory. Where some must be fetched — another device, gaps between elements, another checkpoint — tensors
//! are written one at a time, so that the host holds one of them and not the model.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tonnage::engine::Options;
use tonnage::format::TensorSpec as Spec;
use tonnage::{DeviceData, Durability, OnProgressOf, Save, Saved, TensorData, Writer};

use super::failure::{self, usage};
use super::run::{Request, run};
use crate::buffer::Foreign;
use crate::device::data_of;
use crate::dropin::spec::TensorSpec;

/// Names and specs, in the order in which they fill the files.
type Specs = Vec<(String, Py<TensorSpec>)>;
type Pairs = std::collections::BTreeMap<String, String>;
/// Files, index, bytes of all tensors, seconds.
pub(crate) type Written = (Vec<PathBuf>, Option<PathBuf>, u64, f64);

/// Bytes that are written before signals are looked at again.
const CHUNK: usize = 64 << 20;

pub(crate) fn written(saved: Saved) -> Written {
    (
        saved.files,
        saved.index,
        saved.total_size,
        saved.report.seconds,
    )
}

/// Whether checksums go into the metadata, and hashes beside the files.
pub(crate) type Sums = (bool, bool);

/// How a copy is saved: with the checksums that its source has, or with these; with none, what is read is not
/// compared with those that it has.
pub(crate) fn copy_settings(
    metadata: Option<Pairs>,
    max_shard_size: Option<u64>,
    fsync: bool,
    checksums: Option<Sums>,
) -> Save<'static> {
    Save {
        keep: checksums != Some((false, false)),
        ..settings(
            metadata,
            max_shard_size,
            fsync,
            checksums.unwrap_or_default(),
        )
    }
}

pub(crate) fn settings(
    metadata: Option<Pairs>,
    max_shard_size: Option<u64>,
    fsync: bool,
    (checksums, sidecar): Sums,
) -> Save<'static> {
    Save {
        metadata: metadata.into_iter().flatten().collect(),
        max_shard_size,
        checksums,
        sidecar,
        durability: if fsync {
            Durability::Full
        } else {
            Durability::None
        },
        ..Save::default()
    }
}

/// Saves tensors. `fetch(name)` gives `(spec, owner)` for those without an address; where `owner` is
/// `bytes`, or memory on a device, it is the data.
#[pyfunction]
#[pyo3(name = "_save")]
#[allow(
    clippy::too_many_arguments,
    reason = "called by one function, which has names for them"
)]
pub fn save(
    py: Python<'_>,
    tensors: Specs,
    fetch: Bound<'_, PyAny>,
    path: PathBuf,
    metadata: Option<Pairs>,
    max_shard_size: Option<u64>,
    fsync: bool,
    threads: Option<usize>,
    progress: Option<Bound<'_, PyAny>>,
    checksums: Sums,
) -> PyResult<Written> {
    let save = Save {
        threads,
        ..settings(metadata, max_shard_size, fsync, checksums)
    };
    let total = tensors
        .iter()
        .map(|(_, spec)| spec.get().byte_len() as u64)
        .sum();
    let mut data = Vec::with_capacity(tensors.len());
    for (name, spec) in &tensors {
        let spec = spec.get();
        let Some(bytes) = spec.data() else {
            return one_by_one(py, &tensors, &fetch, path, save, total, progress.as_ref());
        };
        data.push((name.as_str(), spec, bytes));
    }
    let request = Request {
        total,
        threads,
        progress: progress.as_ref(),
        cancel: None,
        python: false,
        slow: true,
    };
    let saved = run(py, request, |options| {
        let data: Vec<TensorData<'_>> = data
            .iter()
            .map(|(name, spec, bytes)| {
                let (dtype, shape) = (spec.dtype, spec.shape.as_slice());
                TensorData {
                    name,
                    dtype,
                    shape,
                    data: bytes.as_slice(),
                }
            })
            .collect();
        tonnage::save(&data, &path, &told(save, options))
    })?;
    Ok(written(saved))
}

/// The settings of a save that is watched.
pub(crate) fn told<'a>(save: Save<'a>, options: &Options<'a>) -> Save<'a> {
    Save {
        progress: options.progress.map(OnProgressOf),
        cancel: options.cancel,
        ..save
    }
}

fn one_by_one(
    py: Python<'_>,
    tensors: &Specs,
    fetch: &Bound<'_, PyAny>,
    path: PathBuf,
    save: Save<'_>,
    total: u64,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Written> {
    let specs: Vec<Spec<'_>> = tensors
        .iter()
        .map(|(name, spec)| {
            let spec = spec.get();
            Spec {
                name,
                dtype: spec.dtype,
                shape: &spec.shape,
            }
        })
        .collect();
    let declared = py.detach(|| Writer::declared(path, &specs, &save));
    let mut writer = declared.map_err(|e| failure::raise(&e))?;
    let mut done = 0;
    for (name, spec) in tensors {
        let spec = spec.get();
        match spec.data() {
            Some(bytes) => write(py, &mut writer, name, spec, bytes)?,
            None => write_fetched(py, &mut writer, name, fetch)?,
        }
        done += spec.byte_len() as u64;
        if let Some(progress) = progress {
            progress.call1((done, total))?;
        }
    }
    let saved = py
        .detach(|| writer.finish())
        .map_err(|e| failure::raise(&e))?;
    Ok(written(saved))
}

fn write_fetched(
    py: Python<'_>,
    writer: &mut Writer<'_>,
    name: &str,
    fetch: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (spec, owner): (Py<TensorSpec>, Bound<'_, PyAny>) = fetch.call1((name,))?.extract()?;
    let spec = spec.get();
    if let Some(data) = data_of(&owner) {
        return write_device(py, writer, name, spec, &data);
    }
    match owner.cast::<PyBytes>() {
        Ok(bytes) => {
            let bytes = bytes.as_bytes();
            write_slice(py, writer, name, spec, bytes)
        }
        Err(_) => {
            let bytes = spec
                .data()
                .ok_or_else(|| usage("WRITE_SIZE", "a tensor has no data"))?;
            write(py, writer, name, spec, bytes)
        }
    }
    // `owner` kept the memory until here.
}

/// Writes a tensor from a device, block by block.
fn write_device(
    py: Python<'_>,
    writer: &mut Writer<'_>,
    name: &str,
    spec: &TensorSpec,
    data: &DeviceData<'_>,
) -> PyResult<()> {
    py.check_signals()?;
    py.detach(|| writer.add_device(name, spec.dtype, &spec.shape, data))
        .map_err(|e| failure::raise(&e))
}

fn write(
    py: Python<'_>,
    writer: &mut Writer<'_>,
    name: &str,
    spec: &TensorSpec,
    bytes: Foreign,
) -> PyResult<()> {
    write_slice(py, writer, name, spec, bytes.as_slice())
}

fn write_slice(
    py: Python<'_>,
    writer: &mut Writer<'_>,
    name: &str,
    spec: &TensorSpec,
    bytes: &[u8],
) -> PyResult<()> {
    let raise = |e: tonnage::Error| failure::raise(&e);
    py.detach(|| writer.begin(name, spec.dtype, &spec.shape))
        .map_err(raise)?;
    for chunk in bytes.chunks(CHUNK) {
        py.check_signals()?;
        py.detach(|| writer.write(chunk)).map_err(raise)?;
    }
    py.detach(|| writer.end()).map_err(raise)
}

/// Writes a checkpoint tensor by tensor, in the order in which they come.
#[pyclass(frozen, name = "_Writer", module = "tonnage._native")]
pub struct NativeWriter {
    /// `None` once it is finished or given up.
    writer: Mutex<Option<Writer<'static>>>,
}

impl NativeWriter {
    fn closed() -> PyErr {
        usage("WRITER", "the writer was closed")
    }

    fn take(&self) -> Option<Writer<'static>> {
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

#[pymethods]
impl NativeWriter {
    #[new]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        metadata: Option<Pairs>,
        max_shard_size: Option<u64>,
        fsync: bool,
        checksums: Sums,
    ) -> PyResult<Self> {
        let save = settings(metadata, max_shard_size, fsync, checksums);
        let made = py.detach(|| Writer::create(path, &save));
        Ok(NativeWriter {
            writer: Mutex::new(Some(made.map_err(|e| failure::raise(&e))?)),
        })
    }

    /// Writes one tensor; `data`, if it is `bytes` or memory on a device, in place of the memory that `spec`
    /// names.
    #[pyo3(signature = (name, spec, data = None))]
    fn add(
        &self,
        py: Python<'_>,
        name: &str,
        spec: &TensorSpec,
        data: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        // Taken out while it is used: a second thread finds it closed instead of waiting with the GIL.
        let mut writer = self.take().ok_or_else(Self::closed)?;
        if let Some(data) = data.as_ref().and_then(data_of) {
            write_device(py, &mut writer, name, spec, &data)?;
            *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
            return Ok(());
        }
        match data.as_ref().and_then(|data| data.cast::<PyBytes>().ok()) {
            Some(bytes) => write_slice(py, &mut writer, name, spec, bytes.as_bytes())?,
            None => {
                let bytes = spec
                    .data()
                    .ok_or_else(|| usage("WRITE_SIZE", "the tensor has no data"))?;
                write(py, &mut writer, name, spec, bytes)?;
            }
        }
        *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        Ok(())
    }

    /// Makes the checkpoint appear.
    fn finish(&self, py: Python<'_>) -> PyResult<Written> {
        let writer = self.take().ok_or_else(Self::closed)?;
        let saved = py
            .detach(|| writer.finish())
            .map_err(|e| failure::raise(&e))?;
        Ok(written(saved))
    }

    /// Leaves nothing behind.
    fn abort(&self, py: Python<'_>) {
        let writer = self.take();
        py.detach(|| drop(writer));
    }
}
