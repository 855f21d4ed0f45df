//! The native side of the paved path: an open checkpoint, saving, verifying.
//!
//! * [`handle`]: an open checkpoint; [`source`]: what it was opened from.
//! * [`read`]: bulk reads into Python's memory; [`run`]: Ctrl-C and progress around any long work.
//! * [`save`]: saving and the streaming writer; [`verify`]: everything that is wrong.
//! * [`gguf`]: what GGUF headers say; conversions between containers. [`packed`]: tensors quantised and converted;
//!   [`quantization`]: what was recognised.
//! * [`failure`]: the façade's errors as exceptions.
//!
//! The Python half (`tonnage._checkpoint` and its neighbours) makes tensors of what comes from here. All
//! names of this module start with an underscore: they are the package's own.

pub mod failure;
mod gguf;
pub mod handle;
mod packed;
mod quantization;
pub mod read;
pub mod run;
pub(crate) mod save;
mod source;
mod verify;

use pyo3::prelude::*;
use pyo3::wrap_pyfunction;
use tonnage::Dtype;

/// Adds the classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<handle::Handle>()?;
    module.add_class::<run::CancelFlag>()?;
    module.add_class::<save::NativeWriter>()?;
    module.add_class::<packed::PyPacked>()?;
    module.add_class::<quantization::PyQuantMap>()?;
    module.add_function(wrap_pyfunction!(save::save, module)?)?;
    module.add_function(wrap_pyfunction!(verify::verify, module)?)?;
    for function in [
        wrap_pyfunction!(gguf::headers, module)?,
        wrap_pyfunction!(gguf::metadata, module)?,
        wrap_pyfunction!(gguf::tensors, module)?,
        wrap_pyfunction!(gguf::name, module)?,
        wrap_pyfunction!(gguf::change, module)?,
        wrap_pyfunction!(gguf::rope_rows, module)?,
        wrap_pyfunction!(gguf::convert_to, module)?,
        wrap_pyfunction!(packed::quantize, module)?,
        wrap_pyfunction!(packed::schemes, module)?,
        wrap_pyfunction!(packed::quantize_checkpoint, module)?,
        wrap_pyfunction!(packed::export_gguf, module)?,
    ] {
        module.add_function(function)?;
    }
    module.add_function(wrap_pyfunction!(parse_size, module)?)?;
    module.add_function(wrap_pyfunction!(matches, module)?)?;
    module.add_function(wrap_pyfunction!(castable, module)?)
}

/// Whether floats of one dtype can be cast to another; both are names of a header.
#[pyfunction]
#[pyo3(name = "_castable")]
fn castable(from: &str, to: &str) -> bool {
    match (Dtype::from_name(from), Dtype::from_name(to)) {
        (Some(from), Some(to)) => tonnage::cast::castable(from, to),
        _ => false,
    }
}

/// Whether a name matches a pattern of `*`, `?` and `[…]`.
#[pyfunction]
#[pyo3(name = "_matches")]
fn matches(pattern: &str, name: &str) -> bool {
    tonnage::names::matches(pattern, name)
}

/// Bytes of a size such as `"5GB"` or `"256MiB"`.
#[pyfunction]
#[pyo3(name = "_parse_size")]
fn parse_size(text: &str) -> PyResult<u64> {
    tonnage::parse_size(text).map_err(|e| failure::raise(&e))
}
