//! cuFile's entry points (GPUDirect Storage): reads of files straight into this driver's device memory.
//!
//! A read is in no stream's order, as the real one: it gets a stream of its own, so that a write that nothing
//! orders against other work on the same bytes is seen as a race. What is asked with an offset or a length that a
//! disk does not read directly is refused here; the real library would go around by memory of the host.
//!
//! Invariants: 1. Each function has the C signature of `cufile.h`, and its pointers are what that header's
//! documentation demands; they are only used through `raw`.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};

use crate::copy::Side;
use crate::cuda::{current, plain};
use crate::raw::{self, give, take};
use crate::settings::GdsOpen;
use crate::world::{Code, World, lock};

/// Offsets, lengths: what a disk reads directly.
const UNIT: usize = 512;

/// `CUfileError_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Status {
    error: c_int,
    cuda: Code,
}

const NOT_INITIALIZED: c_int = 5001;
const IO_NOT_SUPPORTED: c_int = 5008;
const DIO_NOT_SET: c_int = 5020;
const INVALID_VALUE: c_int = 5022;
const ALREADY_REGISTERED: c_int = 5023;
const NOT_REGISTERED: c_int = 5024;
const ALREADY_OPEN: c_int = 5026;
const PINNING_FAILED: c_int = 5036;

/// What cuFile knows.
#[derive(Debug, Default)]
pub struct Gds {
    open: bool,
    /// Files by handle.
    pub files: BTreeMap<u64, c_int>,
    /// Registered memory: its start, and its length.
    pub buffers: BTreeMap<usize, usize>,
    asked_files: u64,
    asked_buffers: u64,
    reads: u64,
}

/// `CUfileDescr_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Description {
    kind: c_int,
    fd: u64,
    operations: *const c_void,
}

fn status(call: impl FnOnce(&mut World) -> Result<(), c_int>) -> Status {
    Status {
        error: call(&mut lock()).err().unwrap_or(0),
        cuda: 0,
    }
}

/// Starts it, or does what the settings say.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverOpen() -> Status {
    let ready = lock().init();
    if let Err(cuda) = ready {
        return Status { error: 5011, cuda };
    }
    let how = lock().settings.gds_open;
    match how {
        GdsOpen::Works => {}
        GdsOpen::Fails => return status(|_| Err(NOT_INITIALIZED)),
        GdsOpen::Aborts => std::process::abort(),
        GdsOpen::Hangs => loop {
            std::thread::park();
        },
    }
    status(|world| {
        if std::mem::replace(&mut world.gds.open, true) {
            return Err(ALREADY_OPEN);
        }
        world.journal.line("gds_open", format_args!("\"ok\":true"));
        Ok(())
    })
}

/// Ends it.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverClose_v2() -> Status {
    status(|world| {
        let open = std::mem::take(&mut world.gds.open);
        if open { Ok(()) } else { Err(NOT_INITIALIZED) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileGetVersion(version: *mut c_int) -> Status {
    status(|_| give(version, 1200).map_err(|_| INVALID_VALUE))
}

/// Any parameter, before it is started.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileSetParameterBool(parameter: c_int, value: bool) -> Status {
    status(|world| {
        let (what, open) = (
            format_args!("\"parameter\":{parameter},\"value\":{value}"),
            world.gds.open,
        );
        world.journal.line("gds_set", what);
        if open { Err(ALREADY_OPEN) } else { Ok(()) }
    })
}

/// Takes a file that is open for direct reads.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileHandleRegister(handle: *mut u64, what: *const Description) -> Status {
    status(|world| {
        let what = take(what).map_err(|_| INVALID_VALUE)?;
        // The lower half of the union.
        let fd = what.fd as u32 as c_int;
        world.gds.asked_files += 1;
        if !world.gds.open {
            return Err(NOT_INITIALIZED);
        }
        if world.gds.asked_files == world.settings.fail_gds_file {
            return Err(IO_NOT_SUPPORTED);
        }
        if what.kind != 1 || !what.operations.is_null() {
            return Err(INVALID_VALUE);
        }
        if !raw::is_direct(fd) {
            return Err(DIO_NOT_SET);
        }
        let id = world.id();
        world.gds.files.insert(id, fd);
        world
            .journal
            .line("gds_file", format_args!("\"handle\":{id}"));
        give(handle, id).map_err(|_| INVALID_VALUE)
    })
}

/// Gives it back; the file stays open.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileHandleDeregister(handle: u64) {
    let mut world = lock();
    if world.gds.files.remove(&handle).is_none() {
        world.violation(&format!(
            "{handle} is no file of cuFile's, and is given back"
        ));
    }
}

/// Takes device memory, which must not be freed before it is given back.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufRegister(start: usize, len: usize, flags: c_int) -> Status {
    status(|world| {
        world.gds.asked_buffers += 1;
        if !world.gds.open {
            return Err(NOT_INITIALIZED);
        }
        if world.gds.asked_buffers == world.settings.fail_gds_buffer {
            return Err(PINNING_FAILED);
        }
        let found = |device: &crate::world::Device| device.arena.find(start, len).is_some();
        if flags != 0 || len == 0 || !world.devices.iter().any(found) {
            return Err(INVALID_VALUE);
        }
        if world.gds.buffers.contains_key(&start) {
            return Err(ALREADY_REGISTERED);
        }
        world.gds.buffers.insert(start, len);
        let what = format_args!("\"address\":{start},\"bytes\":{len}");
        world.journal.line("gds_buffer", what);
        Ok(())
    })
}

/// Gives it back.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufDeregister(start: usize) -> Status {
    status(|world| {
        let known = world.gds.buffers.remove(&start);
        if known.is_none() {
            world.violation(&format!(
                "{start} is not registered with cuFile, and is given back"
            ));
        }
        known.map(drop).ok_or(NOT_REGISTERED)
    })
}

/// Reads; the bytes are there when it returns. How many, -1 with `errno`, or a code of cuFile's below.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileRead(handle: u64, base: usize, len: usize, offset: i64, at: i64) -> isize {
    read(handle, base, len, offset, at).unwrap_or_else(|code| -(code as isize))
}

fn read(handle: u64, base: usize, len: usize, offset: i64, at: i64) -> Result<isize, c_int> {
    let (fd, mut wanted) = {
        let mut world = lock();
        world.gds.reads += 1;
        let number = world.gds.reads;
        let what = format_args!("\"offset\":{offset},\"bytes\":{len},\"base\":{base},\"at\":{at}");
        world.journal.line("gds_read", what);
        let Some(fd) = world.gds.files.get(&handle).copied() else {
            world.violation(&format!("{handle} is no file of cuFile's, and is read"));
            return Err(5027);
        };
        if number == world.settings.fail_gds_read {
            return Err(5044);
        }
        let short = number == world.settings.short_gds_read;
        (fd, if short { len / 2 / UNIT * UNIT } else { len })
    };
    let start = usize::try_from(offset).map_err(|_| INVALID_VALUE)?;
    if !start.is_multiple_of(UNIT) || !len.is_multiple_of(UNIT) {
        return Err(INVALID_VALUE);
    }
    let at = usize::try_from(at).map_err(|_| INVALID_VALUE)?;
    let to = base.checked_add(at).ok_or(INVALID_VALUE)?;
    let device = current().map_err(|_| 5047)?;
    if wanted == 0 {
        wanted = UNIT;
    }
    let between = raw::map(None, wanted, true).map_err(|_| 5043)?;
    let got = raw::read(fd, between, wanted, offset);
    let copied = match usize::try_from(got) {
        Ok(got) if got > 0 => copy(device, to, between, got),
        _ => Ok(()),
    };
    raw::unmap(between, wanted);
    copied.map_err(|_| 5011)?;
    Ok(got)
}

/// A copy on a stream that waits for nobody and that nobody waits for.
fn copy(device: usize, to: usize, from: usize, len: usize) -> Result<(), Code> {
    let stream = lock().open_stream(device, true)? as usize;
    let copied = plain(
        device,
        (Side::Device, to),
        (Side::Host, from),
        len,
        Some(stream),
    );
    lock().close_stream(device, stream)?;
    copied
}
