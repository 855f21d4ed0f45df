//! Blocks dealt to threads: the part that reads, writes and copies share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::control::{Error, Options, Progress, Report};

/// Runs `work` on every block, which takes `size` bytes, with a state of its own for each thread.
///
/// # Errors
/// The first error of `work`, or that the run was cancelled.
pub fn for_each_block<B: Send, S>(
    blocks: Vec<B>,
    options: &Options<'_>,
    strategy: &'static str,
    size: impl Fn(&B) -> u64 + Sync,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, B) -> Result<(), Error> + Sync,
) -> Result<Report, Error> {
    let start = Instant::now();
    let total = blocks.iter().map(&size).sum();
    let threads = options.threads(blocks.len());
    let run = Run {
        queue: Mutex::new(blocks.into_iter()),
        failed: AtomicBool::new(false),
        failure: Mutex::new(None),
        done: AtomicU64::new(0),
        total,
        options,
    };
    let worker = || {
        let mut state = state();
        while let Some(block) = run.next() {
            let bytes = size(&block);
            match work(&mut state, block) {
                Ok(()) => run.advance(bytes),
                Err(error) => run.fail(error),
            }
        }
    };
    if threads == 1 {
        worker();
    } else {
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(worker);
            }
            worker();
        });
    }
    match run
        .failure
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None => Ok(Report {
            seconds: start.elapsed().as_secs_f64(),
            bytes: total,
            threads,
            strategy,
            ..Report::default()
        }),
    }
}

struct Run<'a, B> {
    queue: Mutex<std::vec::IntoIter<B>>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    done: AtomicU64,
    total: u64,
    options: &'a Options<'a>,
}

impl<B> Run<'_, B> {
    fn next(&self) -> Option<B> {
        if self.failed.load(Ordering::Relaxed) {
            return None;
        }
        let block = self
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next()?;
        if self
            .options
            .cancel
            .is_some_and(|cancel| cancel.is_cancelled())
        {
            self.fail(Error::Cancelled);
            return None;
        }
        Some(block)
    }

    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(progress) = self.options.progress {
            progress(Progress {
                done,
                total: self.total,
            });
        }
    }

    fn fail(&self, error: Error) {
        self.failed.store(true, Ordering::Relaxed);
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    }
}
