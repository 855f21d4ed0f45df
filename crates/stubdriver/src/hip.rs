//! HIP's entry points: a device is current on each thread, and needs no context.
//!
//! Invariants: 1. Each function has the C signature of `hip_runtime_api.h`, and its pointers are what that
//! header's documentation demands; they are only used through `raw`.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::access::Rows;
use crate::copy::{self, Request, Side};
use crate::cuda::{ERRORS, attribute, exports, index, line, plain, rows};
use crate::end;
use crate::raw::{self, give};
use crate::stream;
use crate::world::{Code, INVALID_VALUE, lock};

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The device that is current. HIP starts by itself.
fn current() -> Result<usize, Code> {
    lock().init()?;
    Ok(CURRENT.get())
}

fn sides(direction: c_int) -> Result<(Side, Side), Code> {
    Ok(match direction {
        0 => (Side::Host, Side::Host),
        1 => (Side::Device, Side::Host),
        2 => (Side::Host, Side::Device),
        3 => (Side::Device, Side::Device),
        4 => (Side::Either, Side::Either),
        _ => return Err(INVALID_VALUE),
    })
}

fn text(code: Code) -> *const c_char {
    let found = ERRORS.iter().find(|(of, ..)| *of == code);
    found.map_or(c"unknown error".as_ptr(), |(.., text)| text.as_ptr())
}

/// What an error is called.
#[unsafe(no_mangle)]
pub extern "C" fn hipGetErrorName(code: Code) -> *const c_char {
    match code {
        0 => c"hipSuccess",
        1 => c"hipErrorInvalidValue",
        2 => c"hipErrorOutOfMemory",
        3 => c"hipErrorNotInitialized",
        100 => c"hipErrorNoDevice",
        101 => c"hipErrorInvalidDevice",
        201 => c"hipErrorInvalidContext",
        400 => c"hipErrorInvalidHandle",
        600 => c"hipErrorNotReady",
        709 => c"hipErrorContextIsDestroyed",
        712 => c"hipErrorHostMemoryAlreadyRegistered",
        719 => c"hipErrorLaunchFailure",
        801 => c"hipErrorNotSupported",
        _ => c"hipErrorUnknown",
    }
    .as_ptr()
}

/// What it means.
#[unsafe(no_mangle)]
pub extern "C" fn hipGetErrorString(code: Code) -> *const c_char {
    text(code)
}

exports! {
    fn hipInit(flags: c_uint) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        lock().init()
    }

    fn hipDriverGetVersion(version: *mut c_int) {
        give(version, 70_000_000)
    }

    fn hipRuntimeGetVersion(version: *mut c_int) {
        give(version, 70_000_000)
    }

    fn hipGetDeviceCount(count: *mut c_int) {
        current()?;
        give(count, lock().devices.len() as c_int)
    }

    fn hipDeviceGet(device: *mut c_int, ordinal: c_int) {
        current()?;
        give(device, index(ordinal)? as c_int)
    }

    fn hipDeviceGetName(name: *mut c_char, len: c_int, device: c_int) {
        current()?;
        let text = format!("Stub device {}", index(device)?);
        raw::give_text(name, usize::try_from(len).map_err(|_| INVALID_VALUE)?, &text)
    }

    fn hipDeviceTotalMem(bytes: *mut usize, device: c_int) {
        current()?;
        let index = index(device)?;
        let total = lock().device(index)?.arena.total;
        give(bytes, total)
    }

    fn hipDeviceGetAttribute(value: *mut c_int, which: c_int, device: c_int) {
        current()?;
        // HIP has its own numbers; it says 0 of all that a stub does not have.
        let _ = attribute(1, index(device)?)?;
        if which < 0 { Err(INVALID_VALUE) } else { give(value, 0) }
    }

    fn hipGetDevice(device: *mut c_int) {
        give(device, current()? as c_int)
    }

    fn hipSetDevice(device: c_int) {
        current()?;
        CURRENT.set(index(device)?);
        Ok(())
    }

    fn hipDeviceSynchronize() {
        let device = current()?;
        stream::sync_device(lock(), device)
    }

    fn hipMemGetInfo(free: *mut usize, total: *mut usize) {
        let device = current()?;
        let mut world = lock();
        world.use_device(device)?;
        let arena = &world.device(device)?.arena;
        give(free, arena.total - arena.used)?;
        give(total, arena.total)
    }

    fn hipMalloc(address: *mut u64, len: usize) {
        let device = current()?;
        let found = lock().allocate(device, len)?;
        give(address, found as u64)
    }

    fn hipFree(address: u64) {
        let device = current()?;
        end::free(lock(), device, address as usize)
    }

    fn hipHostMalloc(start: *mut usize, len: usize, flags: c_uint) {
        let _ = flags;
        let device = current()?;
        let found = lock().pin(device, len)?;
        give(start, found)
    }

    fn hipHostFree(start: usize) {
        let device = current()?;
        end::unpin(lock(), device, start, true)
    }

    fn hipHostRegister(start: usize, len: usize, flags: c_uint) {
        let _ = flags;
        let device = current()?;
        lock().register(device, start, len)
    }

    fn hipHostUnregister(start: usize) {
        let device = current()?;
        end::unpin(lock(), device, start, false)
    }

    fn hipMemcpyHtoD(to: u64, from: usize, len: usize) {
        plain(current()?, (Side::Device, to as usize), (Side::Host, from), len, None)
    }

    fn hipMemcpyDtoH(to: usize, from: u64, len: usize) {
        plain(current()?, (Side::Host, to), (Side::Device, from as usize), len, None)
    }

    fn hipMemcpyHtoDAsync(to: u64, from: usize, len: usize, stream: usize) {
        plain(current()?, (Side::Device, to as usize), (Side::Host, from), len, Some(stream))
    }

    fn hipMemcpyDtoHAsync(to: usize, from: u64, len: usize, stream: usize) {
        plain(current()?, (Side::Host, to), (Side::Device, from as usize), len, Some(stream))
    }

    fn hipMemcpyDtoDAsync(to: u64, from: u64, len: usize, stream: usize) {
        let (to, from) = ((Side::Device, to as usize), (Side::Device, from as usize));
        plain(current()?, to, from, len, Some(stream))
    }

    fn hipMemcpy(to: usize, from: usize, len: usize, direction: c_int) {
        let (to_side, from_side) = sides(direction)?;
        plain(current()?, (to_side, to), (from_side, from), len, None)
    }

    fn hipMemcpyAsync(to: usize, from: usize, len: usize, direction: c_int, stream: usize) {
        let (to_side, from_side) = sides(direction)?;
        plain(current()?, (to_side, to), (from_side, from), len, Some(stream))
    }

    fn hipMemcpyPeerAsync(
        to: u64,
        to_device: c_int,
        from: u64,
        from_device: c_int,
        len: usize,
        stream: usize
    ) {
        let device = current()?;
        for device in [to_device, from_device] {
            index(device)?;
        }
        let (to, from) = ((Side::Device, to as usize), (Side::Device, from as usize));
        plain(device, to, from, len, Some(stream))
    }

    fn hipMemcpy2DAsync(
        to: usize,
        to_pitch: usize,
        from: usize,
        from_pitch: usize,
        width: usize,
        height: usize,
        direction: c_int,
        stream: usize
    ) {
        let (to_side, from_side) = sides(direction)?;
        let part = |start, pitch| -> Result<Rows, Code> { rows(start, pitch, width, height) };
        copy::ask(Request {
            device: current()?,
            stream,
            to: (to_side, part(to, to_pitch)?),
            from: (from_side, part(from, from_pitch)?),
            sync: false,
        })
    }

    fn hipMemsetAsync(to: u64, value: c_int, len: usize, stream: usize) {
        copy::set(current()?, stream, line(to as usize, len), value as u8, false)
    }

    fn hipStreamCreateWithFlags(stream: *mut u64, flags: c_uint) {
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        let device = current()?;
        let id = lock().open_stream(device, flags == 1)?;
        give(stream, id)
    }

    fn hipStreamQuery(stream: usize) {
        let device = current()?;
        lock().query_stream(device, stream)
    }

    fn hipStreamSynchronize(stream: usize) {
        let device = current()?;
        stream::sync_stream(lock(), device, stream)
    }

    fn hipStreamWaitEvent(stream: usize, event: u64, flags: c_uint) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        let device = current()?;
        lock().wait_event(device, stream, event)
    }

    fn hipStreamDestroy(stream: usize) {
        let device = current()?;
        lock().close_stream(device, stream)
    }

    fn hipEventCreateWithFlags(event: *mut u64, flags: c_uint) {
        let device = current()?;
        let id = lock().open_event(device, flags & 2 == 0)?;
        give(event, id)
    }

    fn hipEventRecord(event: u64, stream: usize) {
        let device = current()?;
        lock().record(device, event, stream)
    }

    fn hipEventQuery(event: u64) {
        let device = current()?;
        lock().query_event(device, event)
    }

    fn hipEventSynchronize(event: u64) {
        let device = current()?;
        stream::sync_event(lock(), device, event)
    }

    fn hipEventDestroy(event: u64) {
        lock().close_event(event)
    }

    fn hipGetProcAddress(
        symbol: *const c_char,
        function: *mut *const c_void,
        version: c_int,
        flags: u64,
        status: *mut c_int
    ) {
        let _ = (version, flags);
        let found = address(&raw::text(symbol)?);
        give(function, found.unwrap_or(std::ptr::null()))?;
        if !status.is_null() {
            give(status, c_int::from(found.is_none()))?;
        }
        found.map(drop).ok_or(INVALID_VALUE)
    }
}
