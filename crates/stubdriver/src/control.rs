//! What tests call beside the driver's own functions. See `find` for the Rust side of it.
//!
//! Invariants: 1. Each function has the C signature that [`crate::find`] looks it up with; pointers are
//! null or valid for their length.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};

use crate::access::Rows;
use crate::end::Live;
use crate::raw;
use crate::settings::Settings;
use crate::world::{Counts, changed, lock, wait};

/// Forgets everything and starts anew: with the environment's settings, and these on top. 0, or what was
/// wrong is on stderr.
#[unsafe(no_mangle)]
pub extern "C" fn stub_reset(text: *const c_char) -> c_int {
    let text = raw::text(text).unwrap_or_default();
    let settings = Settings::from_environment().and_then(|mut settings| {
        settings.read(&text)?;
        Ok(settings)
    });
    let mut world = lock();
    world.hold = false;
    changed();
    while !world.is_idle() {
        world = wait(world);
    }
    world.forget();
    match settings.and_then(|settings| world.begin(settings)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("stub driver: {error}");
            1
        }
    }
}

/// What has not been given back: how much in all, and each kind.
#[unsafe(no_mangle)]
pub extern "C" fn stub_live_objects(live: *mut Live) -> u64 {
    let found = lock().live();
    let _ = raw::give(live, found);
    found.total()
}

/// Rules that were broken.
#[unsafe(no_mangle)]
pub extern "C" fn stub_violations() -> u64 {
    lock().counts.violations
}

/// Forgets those: a test planted them.
#[unsafe(no_mangle)]
pub extern "C" fn stub_pardon() -> u64 {
    std::mem::take(&mut lock().counts.violations)
}

/// Copies asked for, the most at a time that were under way, those under way now, allocations.
#[unsafe(no_mangle)]
pub extern "C" fn stub_counts(copies: *mut u64, most: *mut u64, now: *mut u64, allocs: *mut u64) {
    let Counts {
        copies: asked,
        max_in_flight,
        in_flight,
        allocations,
        ..
    } = lock().counts;
    let _ = raw::give(copies, asked);
    let _ = raw::give(most, max_in_flight);
    let _ = raw::give(now, in_flight);
    let _ = raw::give(allocs, allocations);
}

/// The most copies that were under way at a time.
#[unsafe(no_mangle)]
pub extern "C" fn stub_max_in_flight() -> u64 {
    lock().counts.max_in_flight
}

/// Holds all copies back that have not begun, or lets them run.
#[unsafe(no_mangle)]
pub extern "C" fn stub_hold(hold: c_int) {
    lock().hold = hold != 0;
    changed();
}

/// What device memory holds, whatever runs. 0, or 1 if that is no memory.
#[unsafe(no_mangle)]
pub extern "C" fn stub_peek(address: u64, to: *mut u8, len: usize) -> c_int {
    let world = lock();
    let Ok(start) = usize::try_from(address) else {
        return 1;
    };
    let bytes = Rows {
        start,
        width: len,
        pitch: 0,
        rows: 1,
    };
    for device in &world.devices {
        if device.arena.contains(start) && device.arena.find(start, len).is_some() {
            raw::copy(to.expose_provenance(), device.arena.inner(bytes).start, len);
            return 0;
        }
    }
    1
}

/// A line of the test's own in the journal.
#[unsafe(no_mangle)]
pub extern "C" fn stub_mark(text: *const c_char) {
    let text = raw::text(text).unwrap_or_default();
    let mut world = lock();
    let now = world.counts.in_flight;
    let text = text.replace(['"', '\\', '\n'], " ");
    world.journal.line(
        "mark",
        format_args!("\"what\":\"{text}\",\"in_flight\":{now}"),
    );
}

/// Writes the journal out.
#[unsafe(no_mangle)]
pub extern "C" fn stub_journal_flush() {
    lock().journal.flush();
}
