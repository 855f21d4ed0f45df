//! The exceptions of the package, and how Rust errors become them.
//!
//! `SafetensorError` is the reference's class: callers catch it and match on its text, so each message
//! starts with the reference's words and goes on with ours. Its attributes are for machines: `code` (such
//! as `"HOLE"`), `clause` (of the specification), `tensor`, `file`. Where Python programmers expect a
//! builtin as well, the class raised is both: a wrong argument is also a `ValueError`, an index out of
//! range also an `IndexError`, a failed save also the `OSError` that fits its `errno`.

use std::io::ErrorKind;

use pyo3::exceptions::{
    PyException, PyFileExistsError, PyFileNotFoundError, PyIndexError, PyIsADirectoryError,
    PyNotADirectoryError, PyOSError, PyPermissionError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use tonnage::{format, storage};

/// The classes, in the order of [`Kind`].
static CLASSES: PyOnceLock<Vec<Py<PyType>>> = PyOnceLock::new();

/// Which class an error is raised as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `SafetensorError` alone.
    Plain,
    /// Also a `ValueError`.
    Value,
    /// Also an `IndexError`.
    Index,
    /// Also an `OSError`.
    Os,
    /// Also a `FileNotFoundError`.
    NotFound,
    /// Also a `PermissionError`.
    Permission,
    /// Also an `IsADirectoryError`.
    IsADirectory,
    /// Also a `NotADirectoryError`.
    NotADirectory,
    /// Also a `FileExistsError`.
    Exists,
}

fn make_classes(py: Python<'_>) -> PyResult<Vec<Py<PyType>>> {
    let fields = PyDict::new(py);
    for field in ["code", "clause", "tensor", "file"] {
        fields.set_item(field, py.None())?;
    }
    fields.set_item("__module__", "tonnage")?;
    let doc = "Anything that is wrong with a file or a request. `code` is stable, e.g. \"HOLE\".";
    fields.set_item("__doc__", doc)?;
    let bases = PyTuple::new(py, [py.get_type::<PyException>()])?;
    let metaclass = py.get_type::<PyType>();
    let base = metaclass.call1(("SafetensorError", bases, fields))?;
    let base: Bound<'_, PyType> = base.cast_into()?;
    let builtins: [(&str, Bound<'_, PyType>); 8] = [
        ("SafetensorValueError", py.get_type::<PyValueError>()),
        ("SafetensorIndexError", py.get_type::<PyIndexError>()),
        ("SafetensorOSError", py.get_type::<PyOSError>()),
        (
            "SafetensorFileNotFoundError",
            py.get_type::<PyFileNotFoundError>(),
        ),
        (
            "SafetensorPermissionError",
            py.get_type::<PyPermissionError>(),
        ),
        (
            "SafetensorIsADirectoryError",
            py.get_type::<PyIsADirectoryError>(),
        ),
        (
            "SafetensorNotADirectoryError",
            py.get_type::<PyNotADirectoryError>(),
        ),
        (
            "SafetensorFileExistsError",
            py.get_type::<PyFileExistsError>(),
        ),
    ];
    let mut classes = vec![base.clone().unbind()];
    for (name, builtin) in builtins {
        let fields = PyDict::new(py);
        fields.set_item("__module__", "tonnage._native")?;
        fields.set_item(
            "__doc__",
            "A `SafetensorError` that is also the builtin of its name.",
        )?;
        let bases = PyTuple::new(py, [base.clone(), builtin])?;
        let class = metaclass.call1((name, bases, fields))?;
        classes.push(class.cast_into::<PyType>()?.unbind());
    }
    Ok(classes)
}

fn class(py: Python<'_>, kind: Kind) -> PyResult<Bound<'_, PyType>> {
    let classes = CLASSES.get_or_try_init(py, || make_classes(py))?;
    let at = (kind as usize).min(classes.len() - 1);
    Ok(classes[at].bind(py).clone())
}

/// Adds the classes to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    for class in CLASSES.get_or_try_init(py, || make_classes(py))? {
        let class = class.bind(py);
        module.add(
            class.getattr("__name__")?.extract::<String>()?.as_str(),
            class,
        )?;
    }
    Ok(())
}

/// What an exception carries besides its text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fields<'a> {
    /// Stable code.
    pub code: &'a str,
    /// Clause of the specification; empty where none governs.
    pub clause: &'a str,
    /// The tensor concerned.
    pub tensor: Option<&'a str>,
    /// The file concerned.
    pub file: Option<&'a str>,
    /// The system's error number.
    pub errno: Option<i32>,
}

/// An exception of this class, with its text and fields.
pub fn raise(kind: Kind, text: &str, fields: Fields<'_>) -> PyErr {
    Python::attach(|py| {
        let class = match class(py, kind) {
            Ok(class) => class,
            Err(error) => return error,
        };
        let error = PyErr::from_type(class, (text.to_owned(),));
        let value = error.value(py);
        let clause = Some(fields.clause).filter(|clause| !clause.is_empty());
        // A fresh exception takes attributes; if it does not, its text is what matters.
        let _ = value.setattr("code", fields.code);
        let _ = value.setattr("clause", clause);
        let _ = value.setattr("tensor", fields.tensor);
        let _ = value.setattr("file", fields.file);
        if let Some(errno) = fields.errno {
            let _ = value.setattr("errno", errno);
        }
        error
    })
}

/// A request that cannot be met: `SafetensorError` with a code.
pub fn usage(code: &str, text: &str) -> PyErr {
    raise(
        Kind::Plain,
        text,
        Fields {
            code,
            ..Fields::default()
        },
    )
}

/// An argument that makes no sense: also a `ValueError`.
pub fn argument(code: &str, text: &str) -> PyErr {
    raise(
        Kind::Value,
        text,
        Fields {
            code,
            ..Fields::default()
        },
    )
}

/// A refusal of the format. The text starts as the reference's would: `context`, its words, then ours.
pub fn format(context: &str, error: &format::Error, file: Option<&str>) -> PyErr {
    let place = file.map(|file| format!(", in {file}")).unwrap_or_default();
    let text = format!("{context}: {}: {error}{place}", error.reference_text());
    let (code, clause, tensor) = (error.code(), error.clause(), error.tensor_name());
    raise(
        Kind::Plain,
        &text,
        Fields {
            code,
            clause,
            tensor,
            file,
            errno: None,
        },
    )
}

/// A file that could not be opened: the builtin that fits, with the reference's words for a missing file.
pub fn open(error: &storage::Error) -> PyErr {
    let file = error.label();
    let wrapped = match error.kind() {
        ErrorKind::NotFound => {
            PyFileNotFoundError::new_err(format!("No such file or directory: {file}"))
        }
        ErrorKind::PermissionDenied => {
            PyPermissionError::new_err(format!("Permission denied: {file}"))
        }
        ErrorKind::IsADirectory => PyIsADirectoryError::new_err(format!("Is a directory: {file}")),
        ErrorKind::NotADirectory => {
            PyNotADirectoryError::new_err(format!("Not a directory: {file}"))
        }
        _ => PyOSError::new_err(format!("{}: {file}", error.io())),
    };
    if let Some(errno) = error.raw_os_error() {
        Python::attach(|py| {
            // As above: the text says it all.
            let _ = wrapped.value(py).setattr("errno", errno);
        });
    }
    wrapped
}

/// A failed read or write: `SafetensorError` that is also the `OSError` that fits.
pub fn io(context: &str, error: &storage::Error, tensor: Option<&str>) -> PyErr {
    let kind = match error.kind() {
        ErrorKind::NotFound => Kind::NotFound,
        ErrorKind::PermissionDenied => Kind::Permission,
        ErrorKind::IsADirectory => Kind::IsADirectory,
        ErrorKind::NotADirectory => Kind::NotADirectory,
        ErrorKind::AlreadyExists => Kind::Exists,
        _ => Kind::Os,
    };
    let text = format!("{context}: I/O error: {error}");
    let (file, errno) = (Some(error.label()), error.raw_os_error());
    raise(
        kind,
        &text,
        Fields {
            code: "IO",
            clause: "",
            tensor,
            file,
            errno,
        },
    )
}
