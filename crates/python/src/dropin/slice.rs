//! `PySafeSlice`: a tensor that is read when it is indexed, and only where.

use std::sync::Arc;

use pyo3::prelude::*;
use tonnage::format::slice::runs;

use super::file::Opened;
use super::index::{Bounds, Index, Refusal};

/// A tensor of an open file. Indexing it reads the bytes that the index takes.
///
/// Any combination of `int`, `slice` with a positive step and `...` works, for every framework and
/// backend. Where the framework's own indexing reaches past a dimension's end (torch, paddle), so does
/// this; the others refuse it.
#[pyclass(frozen, module = "tonnage._native")]
pub struct PySafeSlice {
    opened: Arc<Opened>,
    position: usize,
}

impl PySafeSlice {
    /// The tensor at a position of an open file.
    pub fn new(opened: Arc<Opened>, position: usize) -> Self {
        PySafeSlice { opened, position }
    }
}

#[pymethods]
impl PySafeSlice {
    /// The whole tensor's shape.
    fn get_shape(&self) -> PyResult<Vec<u64>> {
        Ok(self.opened.info(self.position)?.shape.to_vec())
    }

    /// The tensor's dtype as the header names it.
    fn get_dtype(&self) -> PyResult<String> {
        Ok(self.opened.info(self.position)?.dtype.name().to_owned())
    }

    fn __getitem__<'py>(&self, key: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = key.py();
        let opened = &*self.opened;
        let info = opened.info(self.position)?;
        let dtype = opened.dtype(py, &info)?;
        let whole_bytes = dtype.bitsize() >= 8;
        let indexes = opened.adapter.indexes;
        let bounds = if indexes {
            Bounds::Clamp
        } else {
            Bounds::Check
        };
        let index = match Index::parse(key, info.shape, bounds) {
            Ok(index) => index,
            Err(Refusal::Foreign(_)) if indexes && whole_bytes => {
                return opened.tensor(py, &info)?.get_item(key);
            }
            Err(Refusal::Foreign(error) | Refusal::Error(error)) => return Err(error),
        };
        if whole_bytes && opened.views(dtype) {
            // A view of a view reads nothing: pages come in when they are touched.
            return opened.tensor(py, &info)?.get_item(key);
        }
        let taken = runs(dtype, info.shape, &index.ranges)
            .map_err(|reason| index.refuse(info.shape, &reason, info.name))?;
        opened.slice(py, &info, &index.ranges, taken, &index.shape(info.shape))
    }
}
