//! The native side of checkpoints that several processes write together: the plan, the coordinator's files,
//! and each rank's patches. What the processes tell each other goes through Python, which has their group.

mod files;
mod plan;

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::wrap_pyfunction;
use tonnage::storage;

use crate::paved::failure;

/// Adds the classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<plan::NativeSavePlan>()?;
    module.add_class::<files::NativeFiles>()?;
    module.add_class::<files::NativeSharedFile>()?;
    module.add_function(wrap_pyfunction!(files::sum_part, module)?)?;
    module.add_function(wrap_pyfunction!(files::write_record, module)?)?;
    module.add_function(wrap_pyfunction!(incoherent, module)?)
}

/// The name of the folder's file system, if several machines must not write to neighbouring bytes there.
#[pyfunction]
#[pyo3(name = "_incoherent")]
fn incoherent(py: Python<'_>, folder: PathBuf) -> PyResult<Option<&'static str>> {
    let found = py.detach(|| storage::is_coherent(&folder));
    match found {
        Ok(coherent) => Ok(coherent.err()),
        Err(error) => Err(failure::raise(&error.into())),
    }
}
