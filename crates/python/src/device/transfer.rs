//! The engine at work: jobs go in, tags of tensors come out as their bytes land.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use tonnage::checksums::Watch;
use tonnage::device::DeviceId;
use tonnage::device::gds::Use;
use tonnage::engine::{
    self, Cancel, DeviceReport, Failed, Options, Piece, Pipeline, PipelineOptions, Progress,
    Strategy,
};

use super::bulk::{Bulk, Targets};
use super::pieces::{Job, pieces};
use super::{memory, open};
use crate::paved::failure::{raise, raise_about, usage};
use crate::paved::handle::Handle;

/// How long a wait for the engine is before signals are looked at and a callback is told. Ctrl-C has 100 ms: a
/// nap, a read that was begun (25 ms), and the copies under way.
const NAP: Duration = Duration::from_millis(20);

/// Seconds, bytes, threads, strategy, why that one, peak of staging memory in bytes.
type Done = (f64, u64, usize, &'static str, String, u64);

/// A transfer from a checkpoint to devices, under way.
#[pyclass(frozen, name = "_Transfer", module = "tonnage._native")]
pub struct Transfer {
    /// `None` once it is closed.
    pipeline: Mutex<Option<Arc<Pipeline>>>,
    cancel: Cancel,
    done: Arc<AtomicU64>,
    total: u64,
    /// Names of the tensors under way, for messages.
    names: Mutex<Names>,
    /// Compares what is read with checksums, if that was asked for.
    watch: Option<(Watch, Py<Handle>)>,
}

/// Names by tag.
#[derive(Default)]
struct Names {
    each: HashMap<u64, String>,
    /// Those of a bulk, by position: a checkpoint and positions in it.
    bulk: Option<(Py<Handle>, Arc<Vec<usize>>)>,
}

impl Names {
    fn of(&self, tag: u64) -> Option<String> {
        let in_bulk = || {
            let (handle, positions) = self.bulk.as_ref()?;
            let position = *positions.get(usize::try_from(tag).ok()?)?;
            Some(handle.get().checkpoint.at(position)?.name().to_owned())
        };
        self.each.get(&tag).cloned().or_else(in_bulk)
    }
}

fn failed(failed: Failed, names: &Names) -> PyErr {
    let tensor = failed.tag().and_then(|tag| names.of(tag));
    let file = failed.label().map(str::to_owned);
    let text = match &tensor {
        Some(name) => format!("tensor {name:?}: {failed}"),
        None => failed.to_string(),
    };
    let error = failed.into_error().into();
    raise_about(&error, text, tensor.as_deref(), file.as_deref())
}

impl Transfer {
    fn get(&self) -> PyResult<Arc<Pipeline>> {
        let pipeline = self
            .pipeline
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        pipeline.ok_or_else(|| usage("CLOSED", "the transfer was closed"))
    }

    /// Waits a nap for tags at most, then looks at signals and tells how far it is.
    fn look(
        &self,
        py: Python<'_>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Vec<u64>>> {
        let pipeline = self.get()?;
        let landed = py
            .detach(|| pipeline.landed_within(NAP))
            .map_err(|e| self.failed(e))?;
        if let Err(signal) = py.check_signals() {
            self.cancel.cancel();
            return Err(signal);
        }
        if let Some(progress) = progress {
            let done = self.done.load(Ordering::Relaxed).min(self.total);
            progress.call1((done, self.total))?;
        }
        Ok(landed.map(|landed| landed.tags))
    }

    /// Takes pieces in, with the names of their tags' tensors.
    pub fn give(
        &self,
        py: Python<'_>,
        pieces: Vec<Piece>,
        names: impl IntoIterator<Item = (u64, String)>,
    ) -> PyResult<()> {
        let pipeline = self.get()?;
        self.names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .each
            .extend(names);
        py.detach(|| pipeline.submit(pieces))
            .map_err(|e| self.failed(e))
    }

    fn failed(&self, error: Failed) -> PyErr {
        if let (Some((watch, handle)), engine::Error::Corrupt { .. }) = (&self.watch, error.error())
        {
            let error = error.into_error().into();
            return raise(&watch.named(&handle.get().checkpoint, error));
        }
        failed(
            error,
            &self.names.lock().unwrap_or_else(PoisonError::into_inner),
        )
    }
}

#[pymethods]
impl Transfer {
    /// A transfer to these devices, with so many bytes of staging memory; `total` bytes are to come. With
    /// `verify`, a checkpoint and positions of tensors in it, their files' checksums are compared. With `gds`, the
    /// program that tries cuFile in a process of its own, whole pages go straight from files to CUDA devices.
    #[new]
    #[pyo3(signature = (devices, staging, threads, strategy, total, verify = None, gds = None))]
    #[allow(
        clippy::too_many_arguments,
        reason = "called by a function that has names for them"
    )]
    fn new(
        py: Python<'_>,
        devices: Vec<String>,
        staging: u64,
        threads: Option<usize>,
        strategy: &str,
        total: u64,
        verify: Option<(Py<Handle>, Vec<usize>)>,
        gds: Option<Vec<OsString>>,
    ) -> PyResult<Self> {
        let watch = match verify {
            Some((handle, positions)) => {
                let checkpoint = &handle.get().checkpoint;
                let files = positions.iter().filter_map(|&at| checkpoint.at(at));
                let watch = checkpoint.watch(files.map(|tensor| tensor.file()));
                Some((watch.map_err(|e| raise(&e))?, handle))
            }
            None => None,
        };
        let opened = devices
            .iter()
            .map(|name| open::device(py, name))
            .collect::<PyResult<Vec<_>>>()?;
        let strategy: Strategy = strategy
            .parse()
            .map_err(|e: tonnage::engine::UnknownStrategy| usage("STRATEGY", &e.to_string()))?;
        let (cancel, done) = (Cancel::new(), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&done);
        let options = PipelineOptions {
            staging,
            threads,
            strategy,
            cancel: cancel.clone(),
            progress: Some(Arc::new(move |progress: Progress| {
                count.fetch_max(progress.done, Ordering::Relaxed);
            })),
            total: Some(total),
            check: watch.as_ref().map(|(watch, _)| watch.check()),
            ..PipelineOptions::default()
        };
        let started = py.detach(|| {
            let gds = gds.map_or(Use::Off, |child| Use::wanted(&open::gds_settings(child)));
            Pipeline::start(opened, PipelineOptions { gds, ..options })
        });
        let pipeline = started.map_err(|e| failed(e, &Names::default()))?;
        Ok(Transfer {
            pipeline: Mutex::new(Some(Arc::new(pipeline))),
            cancel,
            done,
            total,
            names: Mutex::default(),
            watch,
        })
    }

    /// Gives jobs, which are brought in this order. Returns at once.
    fn submit(&self, py: Python<'_>, handle: &Handle, jobs: Vec<Job<'_>>) -> PyResult<()> {
        let mut all = Vec::with_capacity(jobs.len());
        let mut named = Vec::with_capacity(jobs.len());
        for job in &jobs {
            pieces(&handle.checkpoint, job, &mut all)?;
            let name = handle.checkpoint.at(job.0).map(|tensor| tensor.name());
            named.push((job.1, name.unwrap_or_default().to_owned()));
        }
        self.give(py, all, named)
    }

    /// Gives whole tensors of a checkpoint, by position, each for the device of this number; in this order.
    /// `wanted` is the dtype that floats are cast to. `allocate` is called with a device's number, bytes, and the
    /// position of the tensor that is alone there, if one is; it gives a region, what keeps it, and whether that
    /// is the tensor.
    #[allow(
        clippy::too_many_arguments,
        reason = "called by a function that has names for them"
    )]
    fn submit_all(
        &self,
        py: Python<'_>,
        handle: Py<Handle>,
        positions: Vec<usize>,
        goes: Option<Vec<usize>>,
        wanted: Option<&str>,
        devices: Vec<String>,
        allocate: Bound<'_, PyAny>,
    ) -> PyResult<Bulk> {
        let count = positions.len();
        let bulk = Bulk::new(handle, positions, goes, wanted)?;
        let names = self.names.lock();
        names.unwrap_or_else(PoisonError::into_inner).bulk = Some(bulk.whose(py));
        let targets = Targets {
            names: &devices,
            allocate: &allocate,
        };
        bulk.check_sizes(py, &devices)?;
        let mut done = 0;
        while done < count {
            let mut pieces = Vec::new();
            done = bulk.portion(py, done, &targets, &mut pieces)?;
            self.give(py, pieces, [])?;
        }
        Ok(bulk)
    }

    /// What is submitted from now on is written after what this stream of a device has been given so far.
    fn after(&self, device: &str, stream: u64) -> PyResult<()> {
        let id: DeviceId = device
            .parse()
            .map_err(|_| usage("DEVICE", &format!("{device:?} names no device")))?;
        self.get()?.after(id, memory::stream(stream));
        Ok(())
    }

    /// Waits for the next tags that have landed; `None` where nothing is under way. Signals are looked at
    /// meanwhile, and `progress` is called with `(done, total)` in bytes.
    #[pyo3(signature = (progress = None))]
    fn landed(
        &self,
        py: Python<'_>,
        progress: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Option<Vec<u64>>> {
        loop {
            match self.look(py, progress.as_ref())? {
                Some(tags) if tags.is_empty() => {}
                tags => return Ok(tags),
            }
        }
    }

    /// Waits a moment for whatever is under way; `False` where nothing is any more. As `landed`, but tags that
    /// have landed are forgotten.
    #[pyo3(signature = (progress = None))]
    fn wait(&self, py: Python<'_>, progress: Option<Bound<'_, PyAny>>) -> PyResult<bool> {
        Ok(self.look(py, progress.as_ref())?.is_some())
    }

    /// Compares the rest of the chunks of which a byte was read, once everything has landed.
    fn rest(&self, py: Python<'_>) -> PyResult<()> {
        let Some((watch, handle)) = &self.watch else {
            return Ok(());
        };
        let checkpoint = &handle.get().checkpoint;
        let options = Options {
            cancel: Some(&self.cancel),
            ..Options::default()
        };
        py.detach(|| watch.rest(&options))
            .map_err(|e| raise(&watch.named(checkpoint, e)))
    }

    /// Bytes read from storage so far, with what lies between the rows of strided parts.
    fn bytes_read(&self) -> PyResult<u64> {
        Ok(self.get()?.progress_report().bytes_read)
    }

    /// What was done so far.
    fn report(&self) -> PyResult<Done> {
        let DeviceReport {
            seconds,
            bytes,
            threads,
            strategy,
            reason,
            peak_staging,
            ..
        } = self.get()?.progress_report();
        Ok((seconds, bytes, threads, strategy, reason, peak_staging))
    }

    /// Ends it soon: whoever waits in `landed` hears of it.
    fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Ends it; when this returns, nothing is under way. More than once does nothing.
    fn close(&self, py: Python<'_>) {
        let taken = self
            .pipeline
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.cancel.cancel();
        py.detach(|| drop(taken));
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.cancel.cancel();
        let taken = self
            .pipeline
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if taken.is_some() {
            // Its threads are joined: not with the GIL held.
            Python::attach(|py| py.detach(|| drop(taken)));
        }
    }
}
