//! Plans that place quantised tensors as what they mean, and ranks' pieces of them as numbers.

use pyo3::prelude::*;
use tonnage::Dtype;
use tonnage::engine::Options;
use tonnage::plan::{self, Fallback, PlanLoad, QuantMap, QuantPlan, QuantShard, Rules};
use tonnage::quant::Policy;

use super::load::{Done, done, strategy_of};
use super::{NativePlan, named};
use crate::buffer::Target;
use crate::paved::failure::{raise, usage};
use crate::paved::handle::Handle;
use crate::paved::read::to_native;
use crate::paved::run::{CancelFlag, Request, run};

/// Logical name, dtype of the values, shape, the whole tensor's first index here, names of the parts.
type ShardRow = (String, &'static str, Vec<u64>, Vec<u64>, Vec<String>);

/// What is known of a checkpoint's quantised tensors: what the caller says, or what the checkpoint does.
fn map_of(handle: &Handle, said: Option<&str>) -> tonnage::Result<QuantMap> {
    match said {
        Some(said) => handle.checkpoint.described(said),
        None => handle.checkpoint.quantization(Policy::Lenient),
    }
}

/// Plans all tensors by rules, with quantised ones as what they mean. `fallback` is `"lossless"` or `"aligned"`.
pub(super) fn rules(
    handle: &Handle,
    of: &str,
    rules: &str,
    said: Option<&str>,
    fallback: &str,
) -> tonnage::Result<QuantPlan> {
    let of = plan::Request::from_json(of)?;
    let fallback = match fallback {
        "aligned" => Fallback::Refuse,
        _ => Fallback::Lossless,
    };
    let map = map_of(handle, said)?;
    handle
        .checkpoint
        .plan_quantized(&map, &of, &Rules::from_json(rules)?, fallback)
}

impl NativePlan {
    /// The pieces that a rank has.
    fn pieces(&self, rank: u32) -> impl Iterator<Item = &QuantShard> {
        self.shards
            .iter()
            .filter(move |shard| shard.ranks.contains(&rank))
    }
}

/// The pieces of quantised tensors that a rank has.
#[pyfunction]
#[pyo3(name = "_plan_pieces")]
pub fn pieces(this: &NativePlan, rank: u32) -> Vec<ShardRow> {
    let row = |shard: &QuantShard| {
        let parts = shard.parts.iter().map(|(_, name)| name.clone());
        (
            shard.name.clone(),
            shard.cut.dtype.name(),
            shard.cut.shape.clone(),
            shard.start.clone(),
            parts.collect(),
        )
    };
    this.pieces(rank).map(row).collect()
}

/// Reads the parts of a rank's piece, its position among the rank's, and writes its values as `dtype` into a buffer.
#[pyfunction]
#[pyo3(name = "_plan_dequantize", signature = (this, handle, rank, piece, buffer, dtype, staging, threads = None,
       cancel = None, verify = false, strategy = "auto", profile = None))]
#[allow(
    clippy::too_many_arguments,
    reason = "called by a function that has names for them"
)]
pub fn dequantize(
    this: &NativePlan,
    py: Python<'_>,
    handle: &Handle,
    rank: u32,
    piece: usize,
    buffer: Bound<'_, PyAny>,
    dtype: &str,
    staging: u64,
    threads: Option<usize>,
    cancel: Option<&CancelFlag>,
    verify: bool,
    strategy: &str,
    profile: Option<&str>,
) -> PyResult<Done> {
    let (strategy, profile) = (strategy_of(strategy)?, named(profile)?);
    let to = Dtype::from_name(dtype).ok_or_else(|| usage("DTYPE", dtype))?;
    let unknown = || usage("PLAN_MESH", &format!("the rank has no piece {piece}"));
    let shard = this.pieces(rank).nth(piece).ok_or_else(unknown)?;
    let bound = py.detach(|| handle.checkpoint.with_plan(&this.plan));
    let bound = bound.map_err(|e| raise(&e))?;
    let mut target = Target::any(&buffer)?;
    let request = Request {
        total: target.as_mut_slice().len() as u64,
        threads,
        progress: None,
        cancel: cancel.map(|flag| flag.0.clone()),
        python: handle.runs_python(),
        slow: false,
    };
    let load = PlanLoad {
        staging: Some(staging),
        profile,
        verify,
        ..PlanLoad::default()
    };
    run(py, request, |options| {
        let options = Options {
            strategy,
            ..*options
        };
        let memory = target.as_mut_slice();
        let ran = bound.dequantize(rank, shard, to, memory, &load, &options)?;
        to_native(to, memory);
        Ok(done(&ran))
    })
}
