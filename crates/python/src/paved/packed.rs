//! Quantised tensors in memory, and whole checkpoints quantised or exported.

use std::path::PathBuf;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString};
use tonnage::Save;
use tonnage::gguf::{Export, GgmlType, OwnedValue, ValueType, export};
use tonnage::quant::{self, Meaning, Packed, Param, Report};

use super::failure::{self, usage};
use super::handle::Handle;
use super::run::{Request, run};
use super::save::{Sums, Written, settings, told, written};
use crate::dropin::spec::TensorSpec;

/// Name, dtype, shape, bytes.
type PartRow<'py> = (String, &'static str, Vec<u64>, Bound<'py, PyBytes>);
/// How bits were kept, elements, changed, the largest difference, notes.
type ReportRow = (&'static str, u64, u64, f32, Vec<String>);

/// A quantised tensor.
#[pyclass(frozen, name = "_Packed", module = "tonnage._native")]
pub struct PyPacked {
    packed: Packed,
}

/// The parameters of a scheme.
pub(super) fn params_of<'py>(py: Python<'py>, meaning: &Meaning) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    if let Meaning::Preset(_, params) = meaning {
        for (name, value) in &params.0 {
            match value {
                Param::Flag(value) => dict.set_item(name, value)?,
                Param::Int(value) => dict.set_item(name, value)?,
                Param::Text(value) => dict.set_item(name, value)?,
                Param::List(value) => dict.set_item(name, value)?,
            }
        }
    }
    Ok(dict)
}

impl PyPacked {
    /// Around a tensor.
    pub(super) fn new(packed: Packed) -> Self {
        PyPacked { packed }
    }
}

#[pymethods]
impl PyPacked {
    /// Its name.
    #[getter]
    fn name(&self) -> &str {
        &self.packed.tensor.name
    }

    /// The scheme with its version.
    #[getter]
    fn scheme(&self) -> String {
        self.packed.tensor.preset()
    }

    /// The logical shape.
    #[getter]
    fn shape(&self) -> Vec<u64> {
        self.packed.tensor.shape.clone()
    }

    /// The dtype of its values.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.packed.tensor.dtype.name()
    }

    /// The scheme's parameters.
    fn params<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        params_of(py, &self.packed.tensor.meaning)
    }

    /// The parts: name, dtype, shape, bytes.
    fn parts<'py>(&self, py: Python<'py>) -> Vec<PartRow<'py>> {
        let parts = self.packed.tensor.parts.iter();
        parts
            .map(|(role, part)| {
                let bytes = self.packed.bytes.get(role).map_or(&[][..], |bytes| bytes);
                let bytes = PyBytes::new(py, bytes);
                (
                    part.name.clone(),
                    part.dtype.name(),
                    part.shape.clone(),
                    bytes,
                )
            })
            .collect()
    }

    /// The values as F32, row-major.
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let values = py.detach(|| quant::values(&self.packed));
        let values = values.map_err(|e| failure::raise(&e))?;
        PyBytes::new_with(py, values.len() * 4, |bytes| {
            for (four, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(&values) {
                *four = value.to_le_bytes();
            }
            Ok(())
        })
    }

    /// As another scheme, and what that did.
    fn repack(&self, py: Python<'_>, scheme: &str, lossy: bool) -> PyResult<(PyPacked, ReportRow)> {
        let made = py.detach(|| {
            let target = quant::target(scheme)?;
            quant::repack_tensor(&self.packed, &target, lossy)
        });
        let (packed, report) = made.map_err(|e| failure::raise(&e))?;
        Ok((PyPacked { packed }, row(report)))
    }
}

fn row(report: Report) -> ReportRow {
    let Report {
        how,
        difference,
        notes,
    } = report;
    let changed = difference.changed;
    (
        how.name(),
        difference.elements,
        changed,
        difference.largest,
        notes,
    )
}

/// Quantises a tensor whose bytes are at the spec's address, or in `owner`.
#[pyfunction]
#[pyo3(name = "_quantize")]
pub fn quantize(
    py: Python<'_>,
    name: &str,
    spec: Py<TensorSpec>,
    owner: Bound<'_, PyAny>,
    scheme: &str,
) -> PyResult<PyPacked> {
    let spec = spec.get();
    let held = owner.cast::<PyBytes>().ok();
    let there = spec.data();
    let made = match (&there, held) {
        (Some(bytes), _) => py.detach(|| make(name, spec, bytes.as_slice(), scheme)),
        (None, Some(bytes)) => {
            let bytes = bytes.as_bytes();
            py.detach(|| make(name, spec, bytes, scheme))
        }
        (None, None) => return Err(usage("QUANT_VALUE", "the tensor's bytes are not at hand")),
    };
    let packed = made.map_err(|e| failure::raise(&e))?;
    Ok(PyPacked { packed })
}

fn make(name: &str, spec: &TensorSpec, bytes: &[u8], scheme: &str) -> tonnage::Result<Packed> {
    let target = quant::target(scheme)?;
    quant::quantize_tensor(name, spec.dtype, &spec.shape, bytes, &target)
}

/// Every scheme that tensors are quantised to: name, other names.
#[pyfunction]
#[pyo3(name = "_schemes")]
pub fn schemes() -> Vec<(&'static str, Vec<&'static str>)> {
    let forms = quant::FORMS.iter();
    forms
        .map(|form| (form.name, form.aliases.to_vec()))
        .collect()
}

/// Quantises a checkpoint. Each rule is a pattern and a scheme, or none to leave what matches. Gives what was written, the
/// configuration, what was made, and what was left with the reason.
#[pyfunction]
#[pyo3(name = "_quantize_checkpoint")]
#[allow(
    clippy::too_many_arguments,
    clippy::type_complexity,
    reason = "called by one function, which has names for them"
)]
pub fn quantize_checkpoint(
    py: Python<'_>,
    handle: &Handle,
    target: PathBuf,
    scheme: &str,
    select: Vec<String>,
    max_shard_size: Option<u64>,
    fsync: bool,
    progress: Option<Bound<'_, PyAny>>,
    checksums: Sums,
) -> PyResult<(Written, Option<PathBuf>, Vec<String>, Vec<(String, String)>)> {
    let save = settings(None, max_shard_size, fsync, checksums);
    let done = watched(py, handle, progress.as_ref(), |options| {
        let to = quant::target(scheme)?;
        let rules = quant::rules(&to, &select);
        quant::quantize(&handle.checkpoint, &rules, &target, &told(save, options))
    })?;
    Ok((written(done.saved), done.config, done.tensors, done.kept))
}

fn watched<T: Send>(
    py: Python<'_>,
    handle: &Handle,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(&tonnage::engine::Options<'_>) -> tonnage::Result<T> + Send,
) -> PyResult<T> {
    let request = Request {
        total: handle.checkpoint.total_bytes(),
        threads: None,
        progress,
        cancel: None,
        python: handle.runs_python(),
        slow: true,
    };
    run(py, request, work)
}

/// Writes a checkpoint as a GGUF file: types by patterns, and metadata on top. Gives what was written, names and types, notes.
#[pyfunction]
#[pyo3(name = "_export_gguf")]
#[allow(
    clippy::too_many_arguments,
    clippy::type_complexity,
    reason = "called by one function, which has names for them"
)]
pub fn export_gguf(
    py: Python<'_>,
    handle: &Handle,
    target: PathBuf,
    default: Option<String>,
    types: Vec<(String, String)>,
    kv: Bound<'_, PyDict>,
    keep_names: bool,
    fsync: bool,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<(Written, Vec<(String, &'static str)>, Vec<String>)> {
    let ty = |name: &String| {
        let none = || usage("GGUF_TYPE", &format!("{name:?} is no type of ggml"));
        GgmlType::from_name(name).ok_or_else(none)
    };
    let types = types
        .iter()
        .map(|(pattern, name)| Ok((pattern.clone(), ty(name)?)));
    let how = Export {
        types: types.collect::<PyResult<_>>()?,
        default: default.as_ref().map(ty).transpose()?,
        kv: kv
            .iter()
            .map(|(key, value)| Ok((key.extract()?, value_of(&value)?)))
            .collect::<PyResult<_>>()?,
        keep_names,
    };
    let save: Save<'_> = settings(None, None, fsync, (false, false));
    let done = watched(py, handle, progress.as_ref(), |options| {
        export(&handle.checkpoint, &target, &how, &told(save, options))
    })?;
    let tensors = done.tensors.into_iter().map(|(name, ty)| (name, ty.name()));
    Ok((written(done.saved), tensors.collect(), done.notes))
}

/// A value of GGUF's: integers take the smallest of U32, I32, U64, I64 that holds them, floats are F32.
fn value_of(value: &Bound<'_, PyAny>) -> PyResult<OwnedValue> {
    if let Ok(flag) = value.cast::<PyBool>() {
        return Ok(OwnedValue::Bool(flag.is_true()));
    }
    if value.cast::<PyInt>().is_ok() {
        if let Ok(unsigned) = value.extract::<u64>() {
            return Ok(u32::try_from(unsigned).map_or(OwnedValue::U64(unsigned), OwnedValue::U32));
        }
        let signed = value.extract::<i64>()?;
        return Ok(i32::try_from(signed).map_or(OwnedValue::I64(signed), OwnedValue::I32));
    }
    if value.cast::<PyFloat>().is_ok() {
        return Ok(OwnedValue::F32(value.extract::<f32>()?));
    }
    if let Ok(text) = value.cast::<PyString>() {
        return Ok(OwnedValue::String(text.to_str()?.as_bytes().to_vec()));
    }
    if let Ok(bytes) = value.cast::<PyBytes>() {
        return Ok(OwnedValue::String(bytes.as_bytes().to_vec()));
    }
    let list = value.cast::<PyList>().map_err(|_| {
        PyTypeError::new_err(
            "metadata is text, bytes, numbers, truth values, or lists of one of them",
        )
    })?;
    let values = list
        .iter()
        .map(|value| value_of(&value))
        .collect::<PyResult<Vec<_>>>()?;
    let ty = values.first().map_or(ValueType::I32, OwnedValue::ty);
    if values.iter().any(|value| value.ty() != ty) {
        return Err(PyTypeError::new_err(
            "the values of a list have several types",
        ));
    }
    Ok(OwnedValue::Array(ty, values))
}
