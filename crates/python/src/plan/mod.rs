//! Plans of parallel loads: made, proven, told of, and carried out for one rank.
//!
//! What a rank's tensors are in a framework, and who agrees with whom, lives in Python (`tonnage._plan`).

mod load;
mod quant;
mod reshard;
mod together;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::wrap_pyfunction;
use tonnage::plan::{self, IoProfile, Plan, Proof, QuantPlan, QuantShard, Request};

use crate::paved::failure::{raise, usage};
use crate::paved::handle::Handle;

/// Adds the class and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<NativePlan>()?;
    module.add_function(wrap_pyfunction!(plan_request, module)?)?;
    module.add_function(wrap_pyfunction!(plan_rules, module)?)?;
    module.add_function(wrap_pyfunction!(reshard::reshard, module)?)?;
    module.add_class::<together::NativeTogether>()?;
    module.add_function(wrap_pyfunction!(together::profile, module)?)?;
    module.add_function(wrap_pyfunction!(together::chosen, module)?)?;
    module.add_function(wrap_pyfunction!(load::bytes, module)?)?;
    module.add_function(wrap_pyfunction!(load::explain, module)?)?;
    module.add_function(wrap_pyfunction!(load::html, module)?)?;
    module.add_function(wrap_pyfunction!(load::fits, module)?)?;
    module.add_function(wrap_pyfunction!(load::read, module)?)?;
    module.add_function(wrap_pyfunction!(quant::pieces, module)?)?;
    module.add_function(wrap_pyfunction!(quant::dequantize, module)?)?;
    module.add_function(wrap_pyfunction!(load::submit, module)?)
}

/// A plan that was proven.
#[pyclass(frozen, name = "_Plan", module = "tonnage._native")]
pub struct NativePlan {
    pub plan: Plan,
    proof: Proof,
    /// What its tensors are pieces of, where they are quantised. A plan from JSON does not know.
    shards: Vec<QuantShard>,
}

fn failed(error: plan::PlanError) -> PyErr {
    raise(&error.into())
}

fn named(profile: Option<&str>) -> PyResult<Option<IoProfile>> {
    let Some(name) = profile else { return Ok(None) };
    let unknown = || {
        let names: Vec<&str> = IoProfile::ALL.iter().map(|one| one.name).collect();
        usage(
            "PROFILE",
            &format!("{name:?} names no profile: {}", names.join(", ")),
        )
    };
    IoProfile::named(name).map(Some).ok_or_else(unknown)
}

/// Plans what a request, as JSON, says of a checkpoint.
#[pyfunction]
#[pyo3(name = "_plan_request")]
fn plan_request(py: Python<'_>, handle: &Handle, request: &str) -> PyResult<NativePlan> {
    let made = py.detach(|| {
        let request = Request::from_json(request)?;
        handle.checkpoint.plan_request(&request)
    });
    NativePlan::proven(py, made.map_err(|e| raise(&e))?, Vec::new())
}

/// Plans all tensors of a checkpoint by rules, as JSON. `of` is a request without targets: the mesh, and what may
/// stay unread or be read several times. Quantised tensors are placed as what they mean: `said` describes them, where the
/// checkpoint does not; `fallback` is what may be done where their scales don't allow a cut.
#[pyfunction]
#[pyo3(name = "_plan_rules", signature = (handle, of, rules, said = None, fallback = "lossless"))]
fn plan_rules(
    py: Python<'_>,
    handle: &Handle,
    of: &str,
    rules: &str,
    said: Option<&str>,
    fallback: &str,
) -> PyResult<NativePlan> {
    let made = py.detach(|| quant::rules(handle, of, rules, said, fallback));
    let QuantPlan { plan, shards } = made.map_err(|e| raise(&e))?;
    NativePlan::proven(py, plan, shards)
}

/// What of a target, what of the local tensor, which extents.
type Region = (Vec<u64>, Vec<u64>, Vec<u64>);
/// Name, target, dtype, dtype that it is cast to, shape, the target's shape, boxes, bytes, block phase, and
/// placements by axis as JSON.
type LocalRow = (
    String,
    String,
    &'static str,
    Option<&'static str>,
    Vec<u64>,
    Vec<u64>,
    Vec<Region>,
    u64,
    Vec<u64>,
    String,
);

impl NativePlan {
    /// With its proof, which is what `build` has just found as well.
    fn proven(py: Python<'_>, plan: Plan, shards: Vec<QuantShard>) -> PyResult<Self> {
        let proof = py.detach(|| plan.verify()).map_err(failed)?;
        Ok(NativePlan {
            plan,
            proof,
            shards,
        })
    }
}

#[pymethods]
impl NativePlan {
    /// A plan from its JSON; everything is checked again.
    #[staticmethod]
    fn from_json(py: Python<'_>, text: &str) -> PyResult<Self> {
        let plan = py.detach(|| Plan::from_json(text)).map_err(failed)?;
        Self::proven(py, plan, Vec::new())
    }

    fn to_json(&self, py: Python<'_>) -> String {
        py.detach(|| self.plan.to_json())
    }

    /// Checks everything again, and gives what was checked.
    fn verify<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let proof = py.detach(|| self.plan.verify()).map_err(failed)?;
        told(py, &proof)
    }

    /// What was checked when it was made.
    fn proof<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        told(py, &self.proof)
    }

    /// The digest, in hexadecimal.
    fn digest(&self, py: Python<'_>) -> String {
        let digest = py.detach(|| self.plan.digest());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Axes with their sizes.
    fn mesh(&self) -> Vec<(String, u32)> {
        self.plan.mesh().axes().to_vec()
    }

    /// Other factorisations of the ranks.
    fn alt(&self) -> Vec<Vec<(String, u32)>> {
        self.plan.mesh().alt().to_vec()
    }

    /// Label and length of each file.
    fn files(&self) -> Vec<(String, u64)> {
        let files = self.plan.files().iter();
        files.map(|file| (file.label.clone(), file.len)).collect()
    }

    /// Names of all targets.
    fn targets(&self) -> Vec<String> {
        let targets = self.plan.targets().iter();
        targets.map(|target| target.name.to_string()).collect()
    }

    /// A row for each tensor of a rank.
    fn locals(&self, rank: u32) -> PyResult<Vec<LocalRow>> {
        let locals = self.plan.rank(rank).map_err(failed)?;
        let mut rows = Vec::with_capacity(locals.len());
        for local in &locals {
            let Some(target) = self.plan.targets().get(local.target as usize) else {
                continue;
            };
            let boxes = local
                .boxes
                .iter()
                .map(|one| (one.global.to_vec(), one.local.to_vec(), one.size.to_vec()));
            rows.push((
                local.name.to_string(),
                target.name.to_string(),
                local.dtype.name(),
                local.cast.map(|dtype| dtype.name()),
                local.shape.to_vec(),
                target.shape.to_vec(),
                boxes.collect(),
                local.bytes(),
                local.block_phase.to_vec(),
                plan::place_json(&target.place),
            ));
        }
        Ok(rows)
    }

    /// Names of the tensors of the checkpoint that a rank reads of.
    fn sources(&self, rank: u32) -> PyResult<Vec<String>> {
        let locals = self.plan.rank(rank).map_err(failed)?;
        let nests = locals.iter().flat_map(|local| &local.nests);
        let read: std::collections::BTreeSet<u32> = nests.map(|nest| nest.source).collect();
        let sources = read
            .iter()
            .filter_map(|&at| self.plan.sources().get(at as usize));
        Ok(sources.map(|source| source.name.to_string()).collect())
    }

    fn __repr__(&self) -> String {
        let (targets, ranks) = (self.plan.targets().len(), self.plan.mesh().size());
        format!("<tonnage plan: {targets} tensors, {ranks} ranks>")
    }
}

fn told<'py>(py: Python<'py>, proof: &Proof) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("sources", proof.sources)?;
    dict.set_item("targets", proof.targets)?;
    dict.set_item("layouts", proof.layouts)?;
    dict.set_item("nests", proof.nests)?;
    dict.set_item("points", proof.points)?;
    let names = |names: &[std::sync::Arc<str>]| -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    };
    dict.set_item("unread", names(&proof.unread))?;
    dict.set_item("repeated", names(&proof.repeated))?;
    Ok(dict)
}
