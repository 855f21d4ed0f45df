//! A rank's tensors read: into Python's memory, and through a transfer to devices.

use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use tonnage::Dtype;
use tonnage::engine::{Options, Piece, Strategy, UnknownStrategy};
use tonnage::plan::{self, IoProfile, Local, LocalMemory, PlanLoad, Ran};

use super::{NativePlan, named};
use crate::buffer::Target;
use crate::device::memory::Region;
use crate::device::transfer::Transfer;
use crate::dropin::packing::unpack;
use crate::paved::failure::{raise, usage};
use crate::paved::handle::Handle;
use crate::paved::read::to_native;
use crate::paved::run::{CancelFlag, Request, run};

/// Position of the local tensor; a writable buffer; whether sub-byte elements are spread out one a byte; what floats
/// are cast to.
pub(super) type Job<'py> = (usize, Bound<'py, PyAny>, bool, Option<String>);
/// Seconds, bytes read, threads, strategy, bytes of staging memory, why that strategy, bytes needed.
pub(super) type Done = (f64, u64, usize, &'static str, u64, &'static str, u64);
/// Position of the local tensor; its tag; the memory and the first byte there; what floats are cast to.
type DeviceJob<'py> = (usize, u64, Bound<'py, Region>, u64, Option<String>);
/// Needed, read, requests; for each tensor needed, read, runs, way.
type Bytes = (u64, u64, u64, Vec<(u64, u64, u64, &'static str)>);

pub(super) struct Held {
    pub local: usize,
    pub dtype: Dtype,
    pub stored: Dtype,
    pub spread: bool,
    pub target: Target,
    /// What is read before it is spread.
    pub packed: Vec<u8>,
    /// Bytes of the files.
    pub bytes: u64,
}

/// Memory of all tensors, as the façade takes it.
pub(super) fn parts(held: &mut [Held]) -> Vec<LocalMemory<'_>> {
    let parts = held.iter_mut().map(|job| LocalMemory {
        local: job.local,
        dtype: job.dtype,
        memory: match job.spread {
            true => &mut job.packed,
            false => job.target.as_mut_slice(),
        },
        zeroed: job.spread,
    });
    parts.collect()
}

/// Gives tensors the form that Python wants: sub-byte elements spread, bytes in the machine's order.
pub(super) fn settle(held: &mut [Held]) {
    for job in held {
        let target = job.target.as_mut_slice();
        if job.spread {
            unpack(&job.packed, job.stored.bitsize() as u32, target);
        }
        to_native(job.dtype, target);
    }
}

/// What a load did, as Python unpacks it.
pub(super) fn done(ran: &Ran) -> Done {
    let report = &ran.report;
    (
        report.seconds,
        report.bytes,
        report.threads,
        report.strategy,
        report.peak_staging,
        report.reason,
        ran.needed,
    )
}

fn dtype_of(name: Option<&str>, stored: Dtype) -> PyResult<Dtype> {
    match name {
        Some(name) => Dtype::from_name(name).ok_or_else(|| usage("DTYPE", name)),
        None => Ok(stored),
    }
}

pub(super) fn hold(locals: &[Local], job: Job<'_>) -> PyResult<Held> {
    let (at, buffer, spread, cast) = job;
    let unknown = || usage("PLAN_MESH", &format!("the rank has no tensor {at}"));
    let local = locals.get(at).ok_or_else(unknown)?;
    let dtype = dtype_of(cast.as_deref(), local.dtype)?;
    let target = Target::any(&buffer)?;
    let packed = match spread {
        // The proof justified the length: it is no more than the file has.
        true => vec![0; usize::try_from(local.bytes())?],
        false => Vec::new(),
    };
    Ok(Held {
        local: at,
        dtype,
        stored: local.dtype,
        spread,
        target,
        packed,
        bytes: local.bytes(),
    })
}

pub(super) fn check_apart(jobs: &[Held]) -> PyResult<()> {
    let mut spans: Vec<(usize, usize)> = jobs.iter().map(|job| job.target.span()).collect();
    spans.sort_unstable();
    if spans.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(PyBufferError::new_err(
            "two buffers to read into share memory",
        ));
    }
    Ok(())
}

pub(super) fn strategy_of(name: &str) -> PyResult<Strategy> {
    let parsed = name.parse();
    parsed.map_err(|e: UnknownStrategy| usage("STRATEGY", &e.to_string()))
}

/// What reading a rank's tensors comes to, by a profile's name or by what is known of the files.
#[pyfunction]
#[pyo3(name = "_plan_bytes", signature = (this, handle, rank, profile = None))]
pub fn bytes(
    this: &NativePlan,
    py: Python<'_>,
    handle: Option<&Handle>,
    rank: u32,
    profile: Option<&str>,
) -> PyResult<Bytes> {
    let profile = named(profile)?;
    let io = py.detach(|| this.io(handle, rank, profile));
    let io = io.map_err(|e| raise(&e))?;
    let tensors = io.tensors.iter();
    let tensors = tensors.map(|one| (one.needed, one.read, one.runs, one.way.name()));
    Ok((io.needed, io.read, io.requests(), tensors.collect()))
}

/// What a rank reads, as text.
#[pyfunction]
#[pyo3(name = "_plan_explain", signature = (this, handle, rank, profile = None))]
pub fn explain(
    this: &NativePlan,
    py: Python<'_>,
    handle: Option<&Handle>,
    rank: u32,
    profile: Option<&str>,
) -> PyResult<String> {
    let profile = named(profile)?;
    let told = py.detach(|| {
        let io = this.io(handle, rank, profile)?;
        plan::explain(&this.plan, rank, &io)
    });
    told.map_err(|e| raise(&e))
}

/// Who reads what, as a page.
#[pyfunction]
#[pyo3(name = "_plan_html")]
pub fn html(this: &NativePlan, py: Python<'_>, profile: &str) -> PyResult<String> {
    let profile = named(Some(profile))?.unwrap_or(IoProfile::NVME);
    py.detach(|| plan::html(&this.plan, &profile))
        .map_err(|e| raise(&e))
}

/// Refuses a checkpoint that the plan is not about.
#[pyfunction]
#[pyo3(name = "_plan_fits")]
pub fn fits(this: &NativePlan, py: Python<'_>, handle: &Handle) -> PyResult<()> {
    let bound = py.detach(|| handle.checkpoint.with_plan(&this.plan).map(drop));
    bound.map_err(|e| raise(&e))
}

/// Reads tensors of a rank into the buffers of the jobs.
#[pyfunction]
#[pyo3(name = "_plan_read", signature = (this, handle, rank, jobs, staging, threads = None, progress = None, cancel = None,
       verify = false, strategy = "auto", profile = None))]
#[allow(
    clippy::too_many_arguments,
    reason = "called by functions that have names for them"
)]
pub fn read(
    this: &NativePlan,
    py: Python<'_>,
    handle: &Handle,
    rank: u32,
    jobs: Vec<Job<'_>>,
    staging: u64,
    threads: Option<usize>,
    progress: Option<Bound<'_, PyAny>>,
    cancel: Option<&CancelFlag>,
    verify: bool,
    strategy: &str,
    profile: Option<&str>,
) -> PyResult<Done> {
    let (strategy, profile) = (strategy_of(strategy)?, named(profile)?);
    let bound = py.detach(|| handle.checkpoint.with_plan(&this.plan));
    let bound = bound.map_err(|e| raise(&e))?;
    let locals = bound.locals(rank).map_err(|e| raise(&e))?;
    let mut held = Vec::with_capacity(jobs.len());
    for job in jobs {
        held.push(hold(&locals, job)?);
    }
    check_apart(&held)?;
    let bytes = held.iter().filter_map(|job| locals.get(job.local));
    let request = Request {
        total: bytes.map(Local::bytes).sum(),
        threads,
        progress: progress.as_ref(),
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
        let ran = bound.load_into(&locals, parts(&mut held), &load, &options)?;
        settle(&mut held);
        Ok(done(&ran))
    })
}

/// Gives tensors of a rank to a transfer, which brings them in this order. Returns at once.
#[pyfunction]
#[pyo3(name = "_plan_submit")]
pub fn submit(
    this: &NativePlan,
    py: Python<'_>,
    transfer: &Transfer,
    handle: &Handle,
    rank: u32,
    jobs: Vec<DeviceJob<'_>>,
) -> PyResult<()> {
    let bound = py.detach(|| handle.checkpoint.with_plan(&this.plan));
    let bound = bound.map_err(|e| raise(&e))?;
    let locals = bound.locals(rank).map_err(|e| raise(&e))?;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut names = Vec::with_capacity(jobs.len());
    for (at, tag, region, offset, cast) in &jobs {
        let unknown = || usage("PLAN_MESH", &format!("the rank has no tensor {at}"));
        let local = locals.get(*at).ok_or_else(unknown)?;
        let to = dtype_of(cast.as_deref(), local.dtype)?;
        let memory = &region.get().memory;
        bound
            .pieces(local, to, (memory, *offset), *tag, &mut pieces)
            .map_err(|e| raise(&e))?;
        names.push((*tag, local.name.to_string()));
    }
    transfer.give(py, pieces, names)
}

impl NativePlan {
    fn io(
        &self,
        handle: Option<&Handle>,
        rank: u32,
        profile: Option<IoProfile>,
    ) -> tonnage::Result<plan::IoPlan> {
        match handle {
            Some(handle) => handle.checkpoint.with_plan(&self.plan)?.io(rank, profile),
            None => Ok(self.plan.io(rank, &profile.unwrap_or(IoProfile::NVME))?),
        }
    }
}
