//! The native surface of the reference Python package, version 0.8, and `get_tensor_meta` of 0.9.
//!
//! * [`args`]: the framework, device and backend arguments.
//! * [`adapter`]: the one way to make a framework's tensor.
//! * [`file`]: an open file; [`open`]: its Python classes; [`index`] and [`slice`]: slices of its tensors.
//! * [`gather`] and [`packing`]: partial reads, and dtypes smaller than a byte.
//! * [`spec`] and [`serialize`]: saving.

mod adapter;
mod args;
mod file;
mod gather;
mod index;
mod open;
pub mod packing;
mod serialize;
mod slice;
pub mod spec;

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use tonnage::format::Dtype;

/// Adds functions, classes and the dtype table to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<spec::TensorSpec>()?;
    module.add_class::<open::SafeOpen>()?;
    module.add_class::<open::SafeOpenHandle>()?;
    module.add_class::<open::TensorMeta>()?;
    module.add_class::<slice::PySafeSlice>()?;
    module.add_function(wrap_pyfunction!(serialize::serialize, module)?)?;
    module.add_function(wrap_pyfunction!(serialize::serialize_file, module)?)?;
    module.add_function(wrap_pyfunction!(serialize::write_tensors, module)?)?;
    module.add_function(wrap_pyfunction!(serialize::deserialize, module)?)?;
    module.add_function(wrap_pyfunction!(open::load_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(packing::pack, module)?)?;
    module.add_function(wrap_pyfunction!(packing::unpacked, module)?)?;
    module.add("DTYPES", dtype_table(module.py())?)
}

/// The dtype table for the Python half: `(name, bits, torch, numpy, ml_dtypes)` a row.
fn dtype_table(py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
    let rows = Dtype::ALL.iter().map(|dtype| {
        let row = dtype.row();
        (row.name, row.bits, row.torch, row.numpy, row.ml_dtypes)
    });
    PyTuple::new(py, rows)
}
