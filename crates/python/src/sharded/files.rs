//! The coordinator's files, and a rank's patches into them.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use tonnage::format::TensorSpec;
use tonnage::sharded::{self, Files, Patch, Place};
use tonnage::storage::{AtomicFile, AtomicOptions, SharedFile, Sink};
use tonnage::{Dtype, Durability, Save};

use super::plan::Spec;
use crate::buffer::Foreign;
use crate::paved::failure::{self, usage};
use crate::paved::run::{Request, run};

type Pairs = std::collections::BTreeMap<String, String>;
/// Files, index, bytes of all tensors, seconds.
type Written = (Vec<PathBuf>, Option<PathBuf>, u64, f64);
/// Address and length of the memory; the box's strides there, in bytes; its offset, its size and the whole
/// tensor's shape; bytes of an element; the tensor's first byte in the file.
type PatchArgs = (u64, usize, Vec<u64>, Vec<u64>, Vec<u64>, Vec<u64>, u64, u64);

fn durability(fsync: bool) -> Durability {
    if fsync {
        Durability::Full
    } else {
        Durability::None
    }
}

fn raise(error: tonnage::Error) -> PyErr {
    failure::raise(&error)
}

/// Files of a checkpoint under way, for ranks to write into.
#[pyclass(frozen, name = "_SharedFiles", module = "tonnage._native")]
pub struct NativeFiles {
    /// `None` once they have their names or are given up.
    files: Mutex<Option<Files>>,
    places: Vec<Place>,
}

impl NativeFiles {
    fn take(&self) -> Option<Files> {
        self.files
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn closed() -> PyErr {
        usage("WRITER", "the save is over")
    }
}

#[pymethods]
impl NativeFiles {
    /// Makes a file for each group of tensors.
    #[new]
    #[pyo3(signature = (path, groups, *, metadata, fsync, checksums, room, stem, numbered = false))]
    #[allow(
        clippy::too_many_arguments,
        reason = "the package's own call, with names"
    )]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        groups: Vec<Vec<Spec>>,
        metadata: Pairs,
        fsync: bool,
        checksums: bool,
        room: u64,
        stem: String,
        numbered: bool,
    ) -> PyResult<Self> {
        let save = Save {
            metadata: metadata.into_iter().collect(),
            durability: durability(fsync),
            checksums,
            stem,
            numbered,
            ..Save::default()
        };
        let mut specs = Vec::with_capacity(groups.len());
        for group in &groups {
            fn known((name, dtype, shape): &Spec) -> PyResult<(&str, Dtype, &[u64])> {
                let dtype = Dtype::from_name(dtype).ok_or_else(|| usage("DTYPE", dtype))?;
                Ok((name, dtype, shape))
            }
            specs.push(group.iter().map(known).collect::<PyResult<Vec<_>>>()?);
        }
        let specs: Vec<Vec<TensorSpec<'_>>> = specs
            .iter()
            .map(|group| {
                let spec = |&(name, dtype, shape)| TensorSpec { name, dtype, shape };
                group.iter().map(spec).collect()
            })
            .collect();
        let files = py
            .detach(|| Files::create(&path, &specs, room, &save))
            .map_err(raise)?;
        Ok(NativeFiles {
            places: files.places().cloned().collect(),
            files: Mutex::new(Some(files)),
        })
    }

    /// For each file: where it lies now, its length, and the first byte of its data.
    #[getter]
    fn places(&self) -> Vec<(PathBuf, u64, u64)> {
        let place = |p: &Place| (p.path.clone(), p.len, p.data_start);
        self.places.iter().map(place).collect()
    }

    /// First bytes of a file's tensors, in the order of its group.
    fn tensors(&self, file: usize) -> PyResult<Vec<u64>> {
        let place = self.places.get(file);
        place
            .map(|place| place.tensors.clone())
            .ok_or_else(|| usage("SEAL", "there is no such file"))
    }

    /// Writes a file's header anew.
    #[pyo3(signature = (file, metadata, sums = None))]
    fn seal(
        &self,
        py: Python<'_>,
        file: usize,
        metadata: Pairs,
        sums: Option<Vec<u64>>,
    ) -> PyResult<()> {
        // Taken out while it is used: a second thread finds it closed instead of waiting with the GIL.
        let mut files = self.take().ok_or_else(Self::closed)?;
        let metadata: Vec<(String, String)> = metadata.into_iter().collect();
        py.detach(|| files.seal(file, &metadata, sums))
            .map_err(raise)?;
        *self.files.lock().unwrap_or_else(PoisonError::into_inner) = Some(files);
        Ok(())
    }

    /// Makes the checkpoint appear.
    fn commit(&self, py: Python<'_>) -> PyResult<Written> {
        let files = self.take().ok_or_else(Self::closed)?;
        let saved = py.detach(|| files.commit()).map_err(raise)?;
        Ok((
            saved.files,
            saved.index,
            saved.total_size,
            saved.report.seconds,
        ))
    }

    /// Leaves nothing behind; does nothing once the checkpoint has appeared.
    fn abort(&self, py: Python<'_>) {
        let files = self.take();
        py.detach(|| drop(files));
    }
}

/// A file that another process made, to be filled.
#[pyclass(frozen, name = "_SharedFile", module = "tonnage._native")]
pub struct NativeSharedFile {
    file: SharedFile,
    len: u64,
}

#[pymethods]
impl NativeSharedFile {
    #[new]
    fn new(py: Python<'_>, path: PathBuf, len: u64, fsync: bool) -> PyResult<Self> {
        let file = py.detach(|| SharedFile::open(&path, len, durability(fsync)));
        let file = file.map_err(|e| raise(e.into()))?;
        Ok(NativeSharedFile { file, len })
    }

    /// Writes boxes of tensors. Whoever calls answers for their memory until this has returned.
    fn write(
        &self,
        py: Python<'_>,
        patches: Vec<PatchArgs>,
        threads: Option<usize>,
    ) -> PyResult<u64> {
        let mut held = Vec::with_capacity(patches.len());
        let mut total = 0_u64;
        for (address, len, strides, offset, size, shape, unit, at) in patches {
            let data = Foreign::new(address, len);
            let data = data.ok_or_else(|| usage("PATCH", "a tensor has no memory"))?;
            total = total.saturating_add(len as u64);
            held.push((data, strides, offset, size, shape, unit, at));
        }
        let request = Request {
            total,
            threads,
            progress: None,
            cancel: None,
            python: false,
            slow: true,
        };
        run(py, request, |options| {
            let patches: Vec<Patch<'_>> = (held.iter())
                .map(|(data, strides, offset, size, shape, unit, at)| Patch {
                    data: data.as_slice(),
                    strides: strides.clone(),
                    offset: offset.clone(),
                    size: size.clone(),
                    shape: shape.clone(),
                    unit: *unit,
                    at: *at,
                })
                .collect();
            Ok(sharded::write(&self.file, self.len, &patches, options)?.bytes)
        })
    }

    /// Returns when all that was written is on the disk.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.file.sync()).map_err(|e| raise(e.into()))
    }
}

/// The checksums of a file's chunks in `len` bytes of its data from `begin` on.
#[pyfunction]
#[pyo3(name = "_sum_part")]
pub fn sum_part(
    py: Python<'_>,
    path: PathBuf,
    data_start: u64,
    begin: u64,
    len: u64,
) -> PyResult<Vec<u64>> {
    let request = Request {
        total: len,
        threads: None,
        progress: None,
        cancel: None,
        python: false,
        slow: true,
    };
    run(py, request, |options| {
        sharded::sum_part(&path, data_start, begin, len, options)
    })
}

/// Replaces a small file whole or not at all.
#[pyfunction]
#[pyo3(name = "_write_record")]
pub fn write_record(py: Python<'_>, path: PathBuf, content: &[u8], fsync: bool) -> PyResult<()> {
    let options = AtomicOptions {
        durability: durability(fsync),
        replace_link: true,
        ..AtomicOptions::default()
    };
    let write = || {
        let file = AtomicFile::create(&path, &options)?;
        file.write_all_at(0, content)?;
        file.commit()
    };
    py.detach(write).map_err(|e| raise(e.into()))
}
