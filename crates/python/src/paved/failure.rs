//! The façade's errors as exceptions of the package, each with all that the error knows.

use std::io::ErrorKind as Io;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use tonnage::{Error, ErrorKind};

/// The name under which `tonnage._errors` looks up the class.
fn kind_of(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::Format => "Format",
        ErrorKind::Limit => "Limit",
        ErrorKind::Unsupported => "Unsupported",
        ErrorKind::Usage => "Usage",
        ErrorKind::Device => "Device",
        ErrorKind::Cancelled => "Cancelled",
        ErrorKind::Io => match error.io().map(std::io::Error::kind) {
            Some(Io::NotFound) => "Io.NotFound",
            Some(Io::PermissionDenied) => "Io.PermissionDenied",
            Some(Io::IsADirectory) => "Io.IsADirectory",
            Some(Io::NotADirectory) => "Io.NotADirectory",
            Some(Io::AlreadyExists) => "Io.AlreadyExists",
            _ => "Io",
        },
    }
}

fn make(
    py: Python<'_>,
    error: &Error,
    text: String,
    tensor: Option<&str>,
    file: Option<&str>,
) -> PyResult<PyErr> {
    let fields = PyDict::new(py);
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    fields.set_item("code", error.code())?;
    fields.set_item("clause", error.clause())?;
    fields.set_item("file", error.file().or(file))?;
    fields.set_item("tensor", error.tensor().or(tensor))?;
    fields.set_item("found", some(error.found()))?;
    fields.set_item("needed", some(error.needed()))?;
    fields.set_item("suggestions", error.suggestions())?;
    fields.set_item("errno", error.io().and_then(std::io::Error::raw_os_error))?;
    let module = py.import(intern!(py, "tonnage._errors"))?;
    let args = (kind_of(error), text);
    let made = module
        .getattr(intern!(py, "make"))?
        .call(args, Some(&fields))?;
    Ok(PyErr::from_value(made))
}

/// The exception for an error of the façade. An error that a Python object raised while it was read
/// comes back as it was.
pub fn raise(error: &Error) -> PyErr {
    raise_about(error, error.to_string(), None, None)
}

/// The same with a text of the caller's, which knows what the error was about.
pub fn raise_about(error: &Error, text: String, tensor: Option<&str>, file: Option<&str>) -> PyErr {
    Python::attach(|py| {
        let inner = error.io().and_then(std::io::Error::get_ref);
        if let Some(raised) = inner.and_then(|inner| inner.downcast_ref::<PyErr>()) {
            return raised.clone_ref(py);
        }
        make(py, error, text, tensor, file).unwrap_or_else(|failed| failed)
    })
}

/// An exception of the package for a request that makes no sense.
pub fn usage(code: &'static str, text: &str) -> PyErr {
    Python::attach(|py| {
        let make = || -> PyResult<PyErr> {
            let module = py.import(intern!(py, "tonnage._errors"))?;
            let made = module.getattr(intern!(py, "usage"))?.call1((text, code))?;
            Ok(PyErr::from_value(made))
        };
        make().unwrap_or_else(|failed| failed)
    })
}
