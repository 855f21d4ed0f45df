//! A rank's part in a load of several, for Python: through a window of shared memory, or by messages that
//! `torch.distributed` sends (`tonnage._modes`).

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use tonnage::engine::{Options, Strategy};
use tonnage::plan::choose::{Where, choose};
use tonnage::plan::{
    self, Exchange, IoProfile, Means, Meeting, PlanLoad, PlannedLoad, Raw, Together,
};

use super::load::{Done, Held, Job, check_apart, done, hold, parts, settle, strategy_of};
use super::{NativePlan, named};
use crate::buffer::Target;
use crate::paved::failure::{raise, usage};
use crate::paved::handle::Handle;
use crate::paved::run::{CancelFlag, Request, run};

/// A copy out of a message: position of the tensor, first byte of the message and of the tensor, bytes of a run;
/// extents and steps of its axes.
type CopyRow = (usize, u64, u64, u64, Vec<(u64, u64, u64)>);
/// Mode, seconds of each way, why.
type Chosen = (&'static str, f64, Option<f64>, Option<f64>, &'static str);

/// How bytes are read, as for `_plan_read`: staging, threads, strategy, profile.
type Reading = (u64, Option<usize>, String, Option<String>);

struct State {
    held: Vec<Held>,
    raw: Raw,
}

/// A rank's part in a load of several ranks.
#[pyclass(frozen, name = "_Together", module = "tonnage._native")]
pub struct NativeTogether {
    plan: Py<NativePlan>,
    handle: Py<Handle>,
    exchange: Exchange,
    member: usize,
    state: Mutex<State>,
}

/// What a rank reads by, of what Python gave.
fn reading_of(given: &Reading) -> PyResult<(PlanLoad<'static>, Strategy)> {
    let (staging, _, strategy, profile) = given;
    let load = PlanLoad {
        staging: Some(*staging),
        profile: named(profile.as_deref())?,
        ..PlanLoad::default()
    };
    Ok((load, strategy_of(strategy)?))
}

impl NativeTogether {
    /// Does a piece of work with the rank's part and its memory.
    fn work<T: Send>(
        &self,
        py: Python<'_>,
        request: Request<'_>,
        work: impl FnOnce(
            &Together<'_>,
            &PlannedLoad<'_>,
            &mut State,
            &Options<'_>,
        ) -> tonnage::Result<T>
        + Send,
    ) -> PyResult<T> {
        let (plan, handle) = (&self.plan.get().plan, &self.handle.get().checkpoint);
        run(py, request, |options| {
            let load = handle.with_plan(plan)?;
            let together = Together::new(&load, &self.exchange, self.member)?;
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            work(&together, &load, &mut state, options)
        })
    }

    fn request<'a>(&self, threads: Option<usize>) -> Request<'a> {
        Request {
            total: u64::MAX,
            threads,
            progress: None,
            cancel: None,
            python: self.handle.get().runs_python(),
            slow: true,
        }
    }
}

#[pymethods]
impl NativeTogether {
    /// The part of a member of these ranks. With `window`, through one of halves of so many bytes; else by messages
    /// within a staging budget, which `own` members send themselves too.
    #[new]
    #[pyo3(signature = (plan, handle, ranks, member, jobs, staging, window = None, own = false))]
    #[allow(
        clippy::too_many_arguments,
        reason = "called by functions that have names for them"
    )]
    fn new(
        py: Python<'_>,
        plan: Py<NativePlan>,
        handle: Py<Handle>,
        ranks: Vec<u32>,
        member: usize,
        jobs: Vec<Job<'_>>,
        staging: u64,
        window: Option<u64>,
        own: bool,
    ) -> PyResult<Self> {
        let means = match window {
            Some(half) => Means::Window { half },
            None => plan::messages(staging, own),
        };
        let this = &plan.get().plan;
        let built = py.detach(|| plan::exchange(this, &ranks, means));
        let exchange = built.map_err(|e| raise(&e))?;
        let rank = ranks.get(member).copied().unwrap_or(u32::MAX);
        let locals = this.rank(rank).map_err(|e| raise(&e.into()))?;
        let mut held = Vec::with_capacity(jobs.len());
        for job in jobs {
            held.push(hold(&locals, job)?);
        }
        check_apart(&held)?;
        let raw = Raw::default();
        let made = NativeTogether {
            plan,
            handle,
            exchange,
            member,
            state: Mutex::new(State { held, raw }),
        };
        if !own {
            made.work(py, made.request(None), |together, _, state, _| {
                state.raw = together.begin(&mut parts(&mut state.held))?;
                Ok(())
            })?;
        }
        Ok(made)
    }

    /// How many rounds there are.
    #[getter]
    fn rounds(&self) -> usize {
        self.exchange.rounds().len()
    }

    /// Bytes that each member reads.
    #[getter]
    fn read(&self) -> Vec<u64> {
        self.exchange.read().to_vec()
    }

    /// Digest of all that decides who does what, in hexadecimal.
    fn digest(&self, py: Python<'_>) -> String {
        let digest = py.detach(|| self.exchange.digest(&self.plan.get().plan));
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Loads through a window at `path`, waiting for others at most `timeout` seconds.
    #[pyo3(signature = (path, timeout, reading, progress = None, cancel = None))]
    fn shm(
        &self,
        py: Python<'_>,
        path: PathBuf,
        timeout: f64,
        reading: Reading,
        progress: Option<Bound<'_, PyAny>>,
        cancel: Option<&CancelFlag>,
    ) -> PyResult<Done> {
        let timeout = Duration::try_from_secs_f64(timeout);
        let timeout = timeout.map_err(|_| usage("TIMEOUT", "a timeout is a number of seconds"))?;
        let (load, strategy) = reading_of(&reading)?;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let total = state.held.iter().map(|job| job.bytes).sum();
        drop(state);
        let request = Request {
            total,
            progress: progress.as_ref(),
            cancel: cancel.map(|flag| flag.0.clone()),
            ..self.request(reading.1)
        };
        let done = self.work(py, request, |together, bound, state, options| {
            let meeting = Meeting {
                path: &path,
                timeout,
            };
            let options = Options {
                strategy,
                ..*options
            };
            let mut parts = parts(&mut state.held);
            let ran = bound.load_shm_into(together, &mut parts, &meeting, &load, &options)?;
            Ok(done(&ran))
        })?;
        self.settle(py);
        Ok(done)
    }

    /// Reads what nobody else needs.
    fn direct(&self, py: Python<'_>, reading: Reading) -> PyResult<Done> {
        let (load, strategy) = reading_of(&reading)?;
        self.work(
            py,
            self.request(reading.1),
            |together, _, state, options| {
                let options = Options {
                    strategy,
                    ..*options
                };
                let State { held, raw } = state;
                together
                    .direct(&mut parts(held), raw, &load, &options)
                    .map(|ran| done(&ran))
            },
        )
    }

    /// Bytes to each member and from each, broadcasts as reader and bytes, and bytes of this member's own.
    #[allow(
        clippy::type_complexity,
        reason = "a row of what Python unpacks at once"
    )]
    fn sizes(
        &self,
        py: Python<'_>,
        round: usize,
    ) -> PyResult<(Vec<u64>, Vec<u64>, Vec<(u32, u64)>, u64)> {
        self.work(py, self.request(None), |together, _, _, _| {
            let sizes = together.message_sizes(round);
            Ok((sizes.send, sizes.receive, sizes.broadcasts, sizes.own))
        })
    }

    /// Bytes that any member sends in a round, besides broadcasts: the same on all.
    fn exchanged(&self, round: usize) -> u64 {
        self.exchange.exchanged(round)
    }

    /// Reads this member's blocks of a round.
    fn read_round(
        &self,
        py: Python<'_>,
        round: usize,
        send: &Bound<'_, PyAny>,
        own: &Bound<'_, PyAny>,
        reading: Reading,
    ) -> PyResult<Done> {
        let (mut send, mut own) = (Target::any(send)?, Target::any(own)?);
        let (load, strategy) = reading_of(&reading)?;
        self.work(
            py,
            self.request(reading.1),
            |together, _, state, options| {
                let options = Options {
                    strategy,
                    ..*options
                };
                let State { held, raw } = state;
                let buffers = (send.as_mut_slice(), own.as_mut_slice());
                let ran =
                    together.read_round(round, &mut parts(held), raw, buffers, &load, &options)?;
                Ok(done(&ran))
            },
        )
    }

    /// Puts messages of a round, or its broadcast of this position, into the tensors.
    #[pyo3(signature = (round, received, position = None))]
    fn take(
        &self,
        py: Python<'_>,
        round: usize,
        received: &Bound<'_, PyAny>,
        position: Option<usize>,
    ) -> PyResult<()> {
        let mut received = Target::any(received)?;
        self.work(py, self.request(None), |together, _, state, options| {
            let State { held, raw } = state;
            let (bytes, mut parts) = (&*received.as_mut_slice(), parts(held));
            match position {
                None => together.take_messages(round, bytes, &mut parts, raw, options),
                Some(at) => together.take_broadcast((round, at), bytes, &mut parts, raw, options),
            }
        })
    }

    /// What `take` would copy: for tensors that only their framework reaches.
    #[pyo3(signature = (round, position = None))]
    fn copies(
        &self,
        py: Python<'_>,
        round: usize,
        position: Option<usize>,
    ) -> PyResult<Vec<CopyRow>> {
        self.work(py, self.request(None), |together, _, _, _| {
            let copies = together.copies(round, position).into_iter().map(|copy| {
                let one = copy.strided;
                let axes = one
                    .axes
                    .iter()
                    .map(|axis| (axis.extent, axis.src, axis.dst));
                (copy.local, one.src, one.dst, one.run, axes.collect())
            });
            Ok(copies.collect())
        })
    }

    /// Ends a load by messages: what is cast, or spread, at the end.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.work(py, self.request(None), |together, _, state, _| {
            let raw = std::mem::take(&mut state.raw);
            together.end(&mut parts(&mut state.held), raw)
        })?;
        self.settle(py);
        Ok(())
    }

    /// Gives tensors the form that Python wants: sub-byte elements spread, bytes in the machine's order.
    fn settle(&self, py: Python<'_>) {
        py.detach(|| {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            settle(&mut state.held);
        });
    }
}

/// The profile of what a rank reads, by what is known of the files.
#[pyfunction]
#[pyo3(name = "_plan_profile")]
pub fn profile(
    this: &NativePlan,
    py: Python<'_>,
    handle: &Handle,
    rank: u32,
) -> PyResult<&'static str> {
    let found = py.detach(|| handle.checkpoint.with_plan(&this.plan)?.storage(rank));
    found.map(|profile| profile.name).map_err(|e| raise(&e))
}

/// How ranks on these nodes load best, reading files of this profile.
#[pyfunction]
#[pyo3(name = "_plan_choose", signature = (this, ranks, nodes, profile, cached, shared, fabric = None))]
#[allow(
    clippy::too_many_arguments,
    reason = "called by functions that have names for them"
)]
pub fn chosen(
    this: &NativePlan,
    py: Python<'_>,
    ranks: Vec<u32>,
    nodes: Vec<u32>,
    profile: &str,
    cached: bool,
    shared: bool,
    fabric: Option<f64>,
) -> PyResult<Chosen> {
    let profile = named(Some(profile))?.unwrap_or(IoProfile::NVME);
    let place = Where {
        nodes,
        profile,
        cached,
        shared,
        fabric,
    };
    let found = py.detach(|| choose(&this.plan, &ranks, &place));
    let choice = found.map_err(|e| raise(&e.into()))?;
    Ok((
        choice.mode.name(),
        choice.direct,
        choice.shm,
        choice.collective,
        choice.reason,
    ))
}
