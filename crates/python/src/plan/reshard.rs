//! Files of ranks from a checkpoint or from other ranks' files, for Python (`tonnage.reshard`).

use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use tonnage::OpenOptions;
use tonnage::plan::{self, ModelConfig, Origin, Plan, PlanLoad, Request, Rules};

use super::NativePlan;
use crate::paved::failure::usage;
use crate::paved::run::{self, run};
use crate::paved::save::{Sums, copy_settings, told};

fn plan_of(origin: &Origin, source: &Path, of: &str, rules: Option<&str>) -> tonnage::Result<Plan> {
    let of = Request::from_json(of)?;
    let mesh = of.mesh()?;
    let made = match rules {
        Some(rules) => Rules::from_json(rules)?.request(origin.table(), &mesh)?,
        None => plan::auto(origin.table(), &mesh, ModelConfig::beside(source)),
    };
    origin.plan_request(&Request {
        unread: of.unread,
        repeated: of.repeated,
        ..made
    })
}

/// Files, in order of ranks; ranks; tensors; bytes of all ranks' tensors; seconds.
type Resharded = (Vec<PathBuf>, u32, usize, u64, f64);

/// Writes what every rank has: of a plan that is there, or of a mesh. `of` is then a request without targets, as for
/// `_plan_rules`; without `rules`, tensors are placed by their names. `watch` is given the bytes that will be written,
/// and gives what hears of them, or nothing.
#[pyfunction]
#[pyo3(name = "_reshard")]
#[allow(
    clippy::too_many_arguments,
    reason = "called by one function, which has names for them"
)]
pub fn reshard(
    py: Python<'_>,
    source: PathBuf,
    target: PathBuf,
    ready: Option<Py<NativePlan>>,
    of: String,
    rules: Option<String>,
    max_shard_size: Option<u64>,
    fsync: bool,
    checksums: Option<Sums>,
    threads: Option<usize>,
    allow_symlinks: bool,
    watch: Bound<'_, PyAny>,
) -> PyResult<Resharded> {
    let save = copy_settings(None, max_shard_size, fsync, checksums);
    let request = |total, progress| run::Request {
        total,
        threads,
        progress,
        cancel: None,
        python: false,
        slow: true,
    };
    let begin = std::time::Instant::now();
    let (origin, made, total) = run(py, request(0, None), |_| {
        let open = OpenOptions {
            allow_symlinks,
            ..OpenOptions::default()
        };
        let origin = Origin::open(&source, &open)?;
        let made = match &ready {
            Some(_) => None,
            None => Some(plan_of(&origin, &source, &of, rules.as_deref())?),
        };
        let plan = made.as_ref().or(ready.as_ref().map(|one| &one.get().plan));
        let total = plan.map_or(Ok(0), plan::reshard_bytes)?;
        Ok((origin, made, total))
    })?;
    let progress = Some(watch.call1((total,))?).filter(|one| !one.is_none());
    let plan = made.as_ref().or(ready.as_ref().map(|one| &one.get().plan));
    let plan = plan.ok_or_else(|| usage("PLAN_FORM", "there is no plan"))?;
    run(py, request(total, progress.as_ref()), |options| {
        let load = PlanLoad {
            threads: options.threads,
            cancel: options.cancel,
            ..PlanLoad::default()
        };
        let saved = plan::reshard(&origin, plan, &target, &load, &told(save, options))?;
        let bytes = saved.iter().map(|one| one.total_size).sum();
        let files = saved.into_iter().flat_map(|one| one.files).collect();
        let tensors = plan.targets().len();
        let seconds = begin.elapsed().as_secs_f64();
        Ok((files, plan.mesh().size(), tensors, bytes, seconds))
    })
}
