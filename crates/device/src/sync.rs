//! What the pool of staging memory is built on: a lock, a thread, a clock. A model test has others of the same names
//! (`tests/pool_model.rs`), with which it tries every order of the pool's steps.

use std::io;
use std::time::Duration;

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
pub(crate) use std::time::Instant;

/// Waits.
pub(crate) fn sleep(time: Duration) {
    std::thread::sleep(time);
}

/// Starts a thread that nobody waits for.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(work).map(drop)
}
