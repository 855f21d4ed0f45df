//! Long work without the GIL: Ctrl-C ends it, and a Python callback hears how far it is.
//!
//! The work runs on a thread of its own, while the calling thread waits in short naps: between them it asks
//! Python for signals and tells the callback. So the callback and the signal handlers run where Python
//! programmers expect them, on the thread that called, and no worker ever waits for the GIL.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pyo3::prelude::*;
use tonnage::engine::{Cancel, Options, Progress};

use super::failure;

/// How long a nap is: Ctrl-C is answered, and a bar moves, this often.
const NAP: Duration = Duration::from_millis(50);
/// Bytes of a block where reading runs Python code: work can be cancelled between blocks only, and such
/// code may be as slow as the network behind it.
const SLOW_BLOCK: usize = 128 << 10;
/// Work of fewer bytes is over before a nap would be: it runs on the calling thread.
const SMALL: u64 = 4 << 20;

/// Ends work from another thread.
#[pyclass(frozen, name = "_Cancel", module = "tonnage._native")]
#[derive(Default)]
pub struct CancelFlag(pub Cancel);

#[pymethods]
impl CancelFlag {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Ends the work: no further block is started.
    fn cancel(&self) {
        self.0.cancel();
    }
}

/// What a piece of work is told.
pub struct Request<'a> {
    /// Bytes to be moved, about.
    pub total: u64,
    /// Threads at work.
    pub threads: Option<usize>,
    /// Called with `(done, total)` in bytes.
    pub progress: Option<&'a Bound<'a, PyAny>>,
    /// Ends the work from outside.
    pub cancel: Option<Cancel>,
    /// Whether the work runs Python code to read, which may be slow.
    pub python: bool,
    /// Whether the work never counts as small: it waits for a disk to have written.
    pub slow: bool,
}

/// Runs work that takes engine options.
pub fn run<T: Send>(
    py: Python<'_>,
    request: Request<'_>,
    work: impl FnOnce(&Options<'_>) -> tonnage::Result<T> + Send,
) -> PyResult<T> {
    let (cancel, total) = (request.cancel.unwrap_or_default(), request.total);
    let done = AtomicU64::new(0);
    let count = |progress: Progress| {
        done.fetch_max(progress.done, Ordering::Relaxed);
    };
    let options = Options {
        threads: request.threads,
        block: request.python.then_some(SLOW_BLOCK),
        progress: request
            .progress
            .is_some()
            .then_some(&count as &(dyn Fn(Progress) + Sync)),
        cancel: Some(&cancel),
        ..Options::default()
    };
    let progress = request.progress.map(|callback| callback.clone().unbind());
    let tell = |py: Python<'_>, done: u64| -> PyResult<()> {
        match &progress {
            Some(callback) => callback.call1(py, (done.min(total), total)).map(drop),
            None => Ok(()),
        }
    };
    let small = total < SMALL && !request.slow && !request.python;
    let result = if small {
        py.detach(|| work(&options)).map_err(|e| failure::raise(&e))
    } else {
        tell(py, 0)?;
        py.detach(|| {
            watch(
                || work(&options),
                &cancel,
                |py| {
                    py.check_signals()?;
                    tell(py, done.load(Ordering::Relaxed))
                },
            )
        })
    };
    let value = result?;
    tell(py, total)?;
    Ok(value)
}

/// Runs `work` on another thread and calls `look` after each nap; the first error of `look` cancels the work
/// and is what comes back.
fn watch<T: Send>(
    work: impl FnOnce() -> tonnage::Result<T> + Send,
    cancel: &Cancel,
    look: impl Fn(Python<'_>) -> PyResult<()> + Send,
) -> PyResult<T> {
    std::thread::scope(|scope| {
        let (finished, over) = channel();
        let worker = scope.spawn(move || {
            let result = work();
            // Nobody listens only if the watcher panicked, which ends it all anyway.
            let _ = finished.send(());
            result
        });
        let mut stopped = None;
        while let Err(RecvTimeoutError::Timeout) = over.recv_timeout(NAP) {
            if stopped.is_some() {
                continue;
            }
            if let Err(error) = Python::attach(&look) {
                cancel.cancel();
                stopped = Some(error);
            }
        }
        let result = match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        match stopped {
            Some(error) => Err(error),
            None => result.map_err(|e| failure::raise(&e)),
        }
    })
}
