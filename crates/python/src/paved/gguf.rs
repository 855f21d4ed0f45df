//! What GGUF headers say, as Python's own values; conversions between containers.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};
use tonnage::Save;
use tonnage::gguf::{ByteOrder, Gguf, GgufFiles, Text, Value, convert, names};

use super::failure::usage;
use super::handle::Handle;
use super::run::{Request, run};
use super::save::{Sums, Written, copy_settings, told, written};

/// Version, byte order, alignment, tensors.
type HeaderRow = (u32, &'static str, u64, usize);
/// Name, type, logical shape, position of the file, first byte, bytes.
type TensorRow = (String, &'static str, Vec<u64>, usize, u64, u64);

fn files(handle: &Handle) -> PyResult<GgufFiles<'_>> {
    let none = || usage("GGUF", "this checkpoint is not of GGUF files");
    handle.checkpoint.gguf().ok_or_else(none)
}

/// A row for each GGUF file; none where the checkpoint is of other files.
#[pyfunction]
#[pyo3(name = "_gguf_headers")]
pub fn headers(handle: &Handle) -> Vec<HeaderRow> {
    let files = handle
        .checkpoint
        .gguf()
        .map_or(&[][..], |files| files.files());
    let row = |gguf: &Gguf| {
        let order = match gguf.byte_order() {
            ByteOrder::Little => "little",
            ByteOrder::Big => "big",
        };
        (gguf.version(), order, gguf.alignment(), gguf.len())
    };
    files.iter().map(row).collect()
}

/// The metadata of one file, in its order.
#[pyfunction]
#[pyo3(name = "_gguf_metadata")]
pub fn metadata<'py>(
    py: Python<'py>,
    handle: &Handle,
    file: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    if let Some(gguf) = files(handle)?.files().get(file) {
        for (key, value) in gguf.metadata() {
            dict.set_item(key, object(py, value)?)?;
        }
    }
    Ok(dict)
}

/// A value as Python's; a string that is not UTF-8 as `bytes`.
fn object<'py>(py: Python<'py>, value: Value<'_>) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::U8(v) => v.into_pyobject(py)?.into_any(),
        Value::I8(v) => v.into_pyobject(py)?.into_any(),
        Value::U16(v) => v.into_pyobject(py)?.into_any(),
        Value::I16(v) => v.into_pyobject(py)?.into_any(),
        Value::U32(v) => v.into_pyobject(py)?.into_any(),
        Value::I32(v) => v.into_pyobject(py)?.into_any(),
        Value::U64(v) => v.into_pyobject(py)?.into_any(),
        Value::I64(v) => v.into_pyobject(py)?.into_any(),
        Value::F32(v) => f64::from(v).into_pyobject(py)?.into_any(),
        Value::F64(v) => v.into_pyobject(py)?.into_any(),
        Value::Bool(v) => v.into_pyobject(py)?.to_owned().into_any(),
        Value::String(text) => self::text(py, text),
        Value::Array(array) => {
            let list = PyList::empty(py);
            for value in array.iter() {
                list.append(object(py, value)?)?;
            }
            list.into_any()
        }
    })
}

fn text<'py>(py: Python<'py>, text: Text<'_>) -> Bound<'py, PyAny> {
    match text.as_str() {
        Some(text) => PyString::new(py, text).into_any(),
        None => PyBytes::new(py, text.0).into_any(),
    }
}

/// A row for each tensor, in the order of the headers.
#[pyfunction]
#[pyo3(name = "_gguf_tensors")]
pub fn tensors(handle: &Handle) -> PyResult<Vec<TensorRow>> {
    let rows = files(handle)?.tensors().map(|(file, tensor)| {
        let (name, ty) = (tensor.name.to_owned(), tensor.ty.name());
        let shape = tensor.logical_shape.to_vec();
        (name, ty, shape, file, tensor.offset, tensor.len)
    });
    Ok(rows.collect())
}

/// The name of a tensor of this architecture in Hugging Face's checkpoints, or the other way round; `None`
/// where it has none there, or the architecture is not known.
#[pyfunction]
#[pyo3(name = "_gguf_name")]
pub fn name(architecture: &str, name: &str, to_hf: bool) -> Option<String> {
    let names = names::Names::of_architecture(architecture)?;
    if to_hf {
        names.to_hf(name)
    } else {
        names.to_gguf(name)
    }
}

/// What became of a tensor's values on the way to GGUF: `"rope_rows"` with the key of the number of heads,
/// `"plus_one"`, or `None`.
#[pyfunction]
#[pyo3(name = "_gguf_change")]
pub fn change(architecture: &str, name: &str) -> Option<(&'static str, Option<&'static str>)> {
    match names::Names::of_architecture(architecture)?.change(name) {
        names::Change::RopeRows { heads } => Some(("rope_rows", Some(heads))),
        names::Change::PlusOne => Some(("plus_one", None)),
        names::Change::None => None,
    }
}

/// Which row of GGUF's tensor is each row of Hugging Face's.
#[pyfunction]
#[pyo3(name = "_gguf_rope_rows")]
pub fn rope_rows(rows: u64, heads: u64) -> PyResult<Vec<u64>> {
    let order = (0..rows).map(|row| names::rope_row(row, rows, heads));
    let order: Option<Vec<u64>> = order.collect();
    order.ok_or_else(|| {
        usage(
            "ROPE_ROWS",
            &format!("{rows} rows are not {heads} heads of pairs"),
        )
    })
}

/// Writes a checkpoint in the container that the target's name asks for.
#[pyfunction]
#[pyo3(name = "_convert")]
#[allow(
    clippy::too_many_arguments,
    reason = "called by one function, which has names for them"
)]
pub fn convert_to(
    py: Python<'_>,
    handle: &Handle,
    target: PathBuf,
    metadata: Option<std::collections::BTreeMap<String, String>>,
    max_shard_size: Option<u64>,
    fsync: bool,
    threads: Option<usize>,
    progress: Option<Bound<'_, PyAny>>,
    checksums: Option<Sums>,
) -> PyResult<Written> {
    let save = Save {
        threads,
        ..copy_settings(metadata, max_shard_size, fsync, checksums)
    };
    let request = Request {
        total: handle.checkpoint.total_bytes(),
        threads,
        progress: progress.as_ref(),
        cancel: None,
        python: handle.runs_python(),
        slow: true,
    };
    let saved = run(py, request, |options| {
        convert(&handle.checkpoint, &target, &told(save, options))
    })?;
    Ok(written(saved))
}
