//! What was recognised of a checkpoint's quantised tensors, and the same checkpoint with numbers in their place.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tonnage::quant::{self, Confidence, Policy, Provenance, QTensor, QuantMap};

use super::failure::{self, usage};
use super::handle::Handle;
use super::packed::{PyPacked, params_of};

/// Field, value, who says so, how sure that is.
type EvidenceRow = (String, String, String, &'static str);
/// Preset, dtype of the values, logical shape, parts as role and name, extras, evidence.
type TensorRow = (
    String,
    &'static str,
    Vec<u64>,
    Vec<(String, String)>,
    Vec<String>,
    Vec<EvidenceRow>,
);

/// The quantised tensors of a checkpoint.
#[pyclass(frozen, name = "_QuantMap", module = "tonnage._native")]
pub struct PyQuantMap {
    map: QuantMap,
}

impl PyQuantMap {
    fn find(&self, name: &str) -> PyResult<&QTensor> {
        let unknown = || {
            let text = format!("no quantised tensor is called {name:?}");
            usage("UNKNOWN_TENSOR", &text)
        };
        self.map.get(name).ok_or_else(unknown)
    }
}

#[pymethods]
impl PyQuantMap {
    /// Recognises a checkpoint's quantised tensors.
    #[staticmethod]
    fn of(py: Python<'_>, handle: &Handle, strict: bool) -> PyResult<Self> {
        let policy = match strict {
            true => Policy::Strict,
            false => Policy::Lenient,
        };
        let map = py.detach(|| handle.checkpoint.quantization(policy));
        map.map(|map| PyQuantMap { map })
            .map_err(|e| failure::raise(&e))
    }

    /// The logical names.
    fn names(&self) -> Vec<&str> {
        self.map.tensors().map(|one| one.name.as_str()).collect()
    }

    /// What is known of a tensor.
    fn tensor(&self, name: &str) -> PyResult<TensorRow> {
        let tensor = self.find(name)?;
        let role = |(role, part): (&quant::Role, &quant::Part)| {
            (role.name().to_owned(), part.name.clone())
        };
        let evidence = tensor.evidence.iter().map(|one| {
            let from = match &one.provenance {
                Provenance::Map => "quant.map".to_owned(),
                Provenance::Own(what) | Provenance::Config(what) => what.clone(),
                Provenance::Shapes => "names, dtypes and shapes".to_owned(),
                Provenance::Values => "values".to_owned(),
                _ => "default".to_owned(),
            };
            let sure = match one.confidence {
                Confidence::Guess => "guess",
                Confidence::Likely => "likely",
                Confidence::Certain => "certain",
            };
            (one.field.clone(), one.value.clone(), from, sure)
        });
        Ok((
            tensor.preset(),
            tensor.dtype.name(),
            tensor.shape.clone(),
            tensor.parts.iter().map(role).collect(),
            tensor.extras.iter().map(|part| part.name.clone()).collect(),
            evidence.collect(),
        ))
    }

    /// The parameters of a tensor's scheme.
    fn params<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        params_of(py, &self.find(name)?.meaning)
    }

    /// Fields with several readings: tensor, field, readings, why.
    fn ambiguities(&self) -> Vec<(String, String, Vec<String>, String)> {
        let row = |one: &quant::Ambiguity| {
            let (tensor, field) = (one.tensor.clone(), one.field.clone());
            (tensor, field, one.readings.clone(), one.why.clone())
        };
        self.map.ambiguities.iter().map(row).collect()
    }

    /// Tensors that look like a scheme's and do not fit it: name and why.
    fn refused(&self) -> Vec<(String, String)> {
        let refused = self.map.refused.iter();
        refused
            .map(|one| (one.tensor.clone(), one.text.clone()))
            .collect()
    }

    /// What was seen and not followed.
    fn warnings(&self) -> Vec<String> {
        self.map.warnings.clone()
    }

    /// The value of the metadata key `quant.map`.
    fn to_json(&self, py: Python<'_>, handle: &Handle) -> PyResult<String> {
        let text = py.detach(|| handle.checkpoint.quant_map(&self.map));
        text.map_err(|e| failure::raise(&e))
    }

    /// The checkpoint with every quantised tensor as one of numbers.
    fn numbers(&self, py: Python<'_>, handle: &Handle) -> PyResult<Handle> {
        let made = py.detach(|| handle.checkpoint.dequantized(&self.map, None));
        made.map(|made| handle.over(made))
            .map_err(|e| failure::raise(&e))
    }

    /// A tensor with its bytes.
    fn packed(&self, py: Python<'_>, handle: &Handle, name: &str) -> PyResult<PyPacked> {
        let tensor = self.find(name)?;
        let packed = py.detach(|| quant::read(&handle.checkpoint, tensor));
        packed.map(PyPacked::new).map_err(|e| failure::raise(&e))
    }
}
