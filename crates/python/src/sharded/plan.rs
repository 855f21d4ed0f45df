//! Who writes what.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use tonnage::format::WriteOptions;
use tonnage::sharded::{Grouping, SavePlan, agree};

use crate::paved::failure::{self, usage};

/// Name, dtype as a header spells it, extents.
pub type Spec = (String, String, Vec<u64>);

/// The plan of a save that several ranks do together. It is proven when it is made.
#[pyclass(frozen, name = "_SavePlan", module = "tonnage._native")]
pub struct NativeSavePlan(SavePlan);

#[pymethods]
impl NativeSavePlan {
    /// `offers` is what each rank has, as JSON. `numbers` says for each tensor in which file it is; without
    /// it a file holds `max_shard_size` bytes at most; with `own`, each rank has files of its own.
    #[new]
    fn new(
        py: Python<'_>,
        offers: Vec<Vec<u8>>,
        max_shard_size: Option<u64>,
        numbers: Option<BTreeMap<String, usize>>,
        own: bool,
    ) -> PyResult<Self> {
        let grouping = match numbers {
            _ if own => Grouping::None,
            Some(numbers) => Grouping::Given(numbers),
            None => Grouping::Size(max_shard_size),
        };
        let plan = py.detach(|| agree(&offers, &grouping, &WriteOptions::default()));
        plan.map(|(plan, _)| NativeSavePlan(plan))
            .map_err(|e| failure::raise(&e))
    }

    /// The tensors.
    #[getter]
    fn tensors(&self) -> Vec<Spec> {
        let spec = |t: &_| -> Spec {
            let tonnage::sharded::SavedTensor { name, dtype, shape } = t;
            (name.clone(), dtype.name().to_owned(), shape.clone())
        };
        self.0.tensors.iter().map(spec).collect()
    }

    /// For each file its tensors, as positions in `tensors`.
    #[getter]
    fn files(&self) -> Vec<Vec<usize>> {
        self.0
            .files
            .iter()
            .map(|file| file.tensors.clone())
            .collect()
    }

    /// Bytes of all tensors together.
    #[getter]
    fn nbytes(&self) -> u64 {
        let size = |t: &tonnage::sharded::SavedTensor| t.bytes().unwrap_or(0);
        self.0.tensors.iter().map(size).fold(0, u64::saturating_add)
    }

    /// What a rank writes: position in `tensors`, position in its offer, position of the box there.
    fn writes(&self, rank: usize) -> PyResult<Vec<(usize, usize, usize)>> {
        let writes = self.0.writes.get(rank);
        let writes = writes.ok_or_else(|| usage("PLAN_FORM", "there is no such rank"))?;
        Ok(writes
            .iter()
            .map(|w| (w.tensor, w.offered, w.piece))
            .collect())
    }

    /// 32 bytes that are equal for equal plans.
    fn digest(&self) -> [u8; 32] {
        self.0.digest()
    }
}
