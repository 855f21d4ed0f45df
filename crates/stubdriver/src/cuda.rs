//! CUDA's entry points.
//!
//! Invariants: 1. Each function has the C signature of `cuda.h`, and its pointers are what that header's
//! documentation demands; they are only used through `raw`.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::access::Rows;
use crate::copy::{self, Request, Side};
use crate::end;
use crate::raw::{self, HostFn, give, take};
use crate::stream;
use crate::world::{
    Code, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, NOT_FOUND, World, lock,
};

thread_local! {
    static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// What `cuDriverGetVersion` says.
pub const VERSION: c_int = 13000;
const CONTEXT: usize = 0x100_0000;
const PER_EPOCH: usize = 0x1000;

fn context(world: &World, device: usize) -> usize {
    CONTEXT + world.epoch as usize * PER_EPOCH + device
}

/// The device of a context, if it is a live one.
fn device_of(world: &World, context: usize) -> Result<usize, Code> {
    let at = context.wrapping_sub(CONTEXT);
    let index = at % PER_EPOCH;
    let live = at / PER_EPOCH == world.epoch as usize && world.device(index)?.retained > 0;
    if live {
        Ok(index)
    } else {
        Err(INVALID_CONTEXT)
    }
}

fn top() -> usize {
    STACK.with(|stack| stack.borrow().last().copied().unwrap_or(0))
}

/// The device whose context is current.
pub fn current() -> Result<usize, Code> {
    let world = lock();
    world.device(0)?;
    match top() {
        0 => Err(INVALID_CONTEXT),
        context => device_of(&world, context),
    }
}

pub fn index(device: c_int) -> Result<usize, Code> {
    let index = usize::try_from(device).map_err(|_| INVALID_DEVICE)?;
    lock().device(index).map(|_| index)
}

pub fn line(start: usize, len: usize) -> Rows {
    Rows {
        start,
        width: len,
        pitch: 0,
        rows: 1,
    }
}

/// Copies consecutive bytes.
pub fn plain(
    device: usize,
    (to_side, to): (Side, usize),
    (from_side, from): (Side, usize),
    len: usize,
    stream: Option<usize>,
) -> Result<(), Code> {
    copy::ask(Request {
        device,
        stream: stream.unwrap_or(0),
        to: (to_side, line(to, len)),
        from: (from_side, line(from, len)),
        sync: stream.is_none(),
    })
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Copy2d {
    src: Part2d,
    dst: Part2d,
    width: usize,
    height: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Part2d {
    x: usize,
    y: usize,
    kind: c_uint,
    host: usize,
    device: u64,
    array: usize,
    pitch: usize,
}

impl Part2d {
    fn rows(&self, width: usize, height: usize) -> Result<(Side, Rows), Code> {
        let (side, base) = match self.kind {
            1 => (Side::Host, self.host),
            2 => (Side::Device, self.device as usize),
            4 => (Side::Either, self.device as usize),
            _ => return Err(INVALID_VALUE),
        };
        let skipped = self
            .y
            .checked_mul(self.pitch)
            .and_then(|y| y.checked_add(self.x));
        let start = skipped.and_then(|skipped| base.checked_add(skipped));
        rows(start.ok_or(INVALID_VALUE)?, self.pitch, width, height).map(|rows| (side, rows))
    }
}

/// Rows that do not overlap.
pub fn rows(start: usize, pitch: usize, width: usize, height: usize) -> Result<Rows, Code> {
    if height > 1 && pitch < width {
        return Err(INVALID_VALUE);
    }
    Ok(Rows {
        start,
        width,
        pitch,
        rows: height,
    })
}

fn copy_2d(what: *const Copy2d, stream: Option<usize>) -> Result<(), Code> {
    let what = take(what)?;
    copy::ask(Request {
        device: current()?,
        stream: stream.unwrap_or(0),
        to: what.dst.rows(what.width, what.height)?,
        from: what.src.rows(what.width, what.height)?,
        sync: stream.is_none(),
    })
}

pub fn attribute(which: c_int, device: usize) -> Result<c_int, Code> {
    Ok(match which {
        // Copy engines, unified addresses, and a version of kernels that nobody can run.
        40 => 2,
        41 => 1,
        75 => 8,
        // PCI bus.
        33 => device as c_int + 1,
        // Host memory can be registered.
        99 => 1,
        1..=199 => 0,
        _ => return Err(INVALID_VALUE),
    })
}

pub const ERRORS: &[(Code, &std::ffi::CStr, &std::ffi::CStr)] = &[
    (0, c"SUCCESS", c"no error"),
    (1, c"ERROR_INVALID_VALUE", c"invalid argument"),
    (2, c"ERROR_OUT_OF_MEMORY", c"out of memory"),
    (3, c"ERROR_NOT_INITIALIZED", c"initialization error"),
    (100, c"ERROR_NO_DEVICE", c"no device is detected"),
    (101, c"ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (201, c"ERROR_INVALID_CONTEXT", c"invalid device context"),
    (400, c"ERROR_INVALID_HANDLE", c"invalid resource handle"),
    (500, c"ERROR_NOT_FOUND", c"named symbol not found"),
    (600, c"ERROR_NOT_READY", c"device not ready"),
    (709, c"ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed"),
    (
        712,
        c"ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        c"memory is registered already",
    ),
    (719, c"ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    (801, c"ERROR_NOT_SUPPORTED", c"operation not supported"),
];

/// A name, as the header has it: `CUDA_ERROR_…`.
const NAMES: &[(Code, &std::ffi::CStr)] = &[
    (0, c"CUDA_SUCCESS"),
    (1, c"CUDA_ERROR_INVALID_VALUE"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY"),
    (3, c"CUDA_ERROR_NOT_INITIALIZED"),
    (100, c"CUDA_ERROR_NO_DEVICE"),
    (101, c"CUDA_ERROR_INVALID_DEVICE"),
    (201, c"CUDA_ERROR_INVALID_CONTEXT"),
    (400, c"CUDA_ERROR_INVALID_HANDLE"),
    (500, c"CUDA_ERROR_NOT_FOUND"),
    (600, c"CUDA_ERROR_NOT_READY"),
    (709, c"CUDA_ERROR_CONTEXT_IS_DESTROYED"),
    (712, c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"),
    (719, c"CUDA_ERROR_LAUNCH_FAILED"),
    (801, c"CUDA_ERROR_NOT_SUPPORTED"),
];

/// Exports functions, and finds them by their names.
macro_rules! exports {
    ($( fn $name:ident($($arg:ident: $kind:ty),*) $body:block )*) => {
        $(
            #[unsafe(no_mangle)]
            pub extern "C" fn $name($($arg: $kind),*) -> Code {
                let call = || -> Result<(), Code> { $body };
                call().err().unwrap_or(0)
            }
        )*

        /// The function of this name.
        fn address(name: &str) -> Option<*const c_void> {
            $(
                if name == stringify!($name) {
                    let function: extern "C" fn($($kind),*) -> Code = $name;
                    return Some(function as *const c_void);
                }
            )*
            None
        }
    };
}
pub(crate) use exports;

exports! {
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        lock().init()
    }

    fn cuDriverGetVersion(version: *mut c_int) {
        give(version, VERSION)
    }

    fn cuGetProcAddress_v2(
        symbol: *const c_char,
        function: *mut *const c_void,
        version: c_int,
        flags: u64,
        status: *mut c_int
    ) {
        let _ = (version, flags);
        let name = raw::text(symbol)?;
        // The newest of its versions, as the header's macros would have it.
        let found = ["_v2", ""]
            .iter()
            .find_map(|version| address(&format!("{name}{version}")));
        give(function, found.unwrap_or(std::ptr::null()))?;
        if !status.is_null() {
            give(status, c_int::from(found.is_none()))?;
        }
        found.map(drop).ok_or(NOT_FOUND)
    }

    fn cuGetErrorName(code: Code, name: *mut *const c_char) {
        let found = NAMES.iter().find(|(of, _)| *of == code);
        give(name, found.map_or(std::ptr::null(), |(_, name)| name.as_ptr()))?;
        found.map(drop).ok_or(INVALID_VALUE)
    }

    fn cuGetErrorString(code: Code, text: *mut *const c_char) {
        let found = ERRORS.iter().find(|(of, ..)| *of == code);
        give(text, found.map_or(std::ptr::null(), |(.., text)| text.as_ptr()))?;
        found.map(drop).ok_or(INVALID_VALUE)
    }

    fn cuDeviceGetCount(count: *mut c_int) {
        let world = lock();
        if !world.ready {
            return Err(crate::world::NOT_INITIALIZED);
        }
        give(count, world.devices.len() as c_int)
    }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        give(device, index(ordinal)? as c_int)
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) {
        let text = format!("Stub device {}", index(device)?);
        raw::give_text(name, usize::try_from(len).map_err(|_| INVALID_VALUE)?, &text)
    }

    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        let mut bytes = *b"stub driver dev ";
        bytes[15] = index(device)? as u8;
        give(uuid, bytes)
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) {
        let index = index(device)?;
        let total = lock().device(index)?.arena.total;
        give(bytes, total)
    }

    fn cuDeviceGetAttribute(value: *mut c_int, which: c_int, device: c_int) {
        give(value, attribute(which, index(device)?)?)
    }

    fn cuDeviceGetPCIBusId(text: *mut c_char, len: c_int, device: c_int) {
        let id = format!("0000:{:02x}:00.0", index(device)? + 1);
        raw::give_text(text, usize::try_from(len).map_err(|_| INVALID_VALUE)?, &id)
    }

    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        give(can, c_int::from(index(device)? != index(peer)?))
    }

    fn cuDevicePrimaryCtxRetain(to: *mut usize, device: c_int) {
        let index = index(device)?;
        let mut world = lock();
        world.device_mut(index)?.retained += 1;
        world
            .journal
            .line("retain", format_args!("\"device\":{index}"));
        give(to, context(&world, index))
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        let index = index(device)?;
        let mut world = lock();
        let of = world.device_mut(index)?;
        if of.retained == 0 {
            world.violation(&format!("the context of device {index} is released too often"));
            return Err(INVALID_CONTEXT);
        }
        of.retained -= 1;
        // A context that was lost has nothing left that could be freed.
        let last = of.retained == 0 && of.broken.is_none();
        let left = of.arena.blocks.len();
        if last && left > 0 {
            world.violation(&format!(
                "the context of device {index} is released, and {left} allocations of it live"
            ));
        }
        world
            .journal
            .line("release", format_args!("\"device\":{index}"));
        Ok(())
    }

    fn cuCtxGetCurrent(to: *mut usize) {
        lock().device(0)?;
        give(to, top())
    }

    fn cuCtxSetCurrent(context: usize) {
        let mut world = lock();
        world.device(0)?;
        if context != 0 {
            let index = device_of(&world, context)?;
            if world.device(index)?.broken == Some(crate::world::CONTEXT_DESTROYED) {
                return Err(crate::world::CONTEXT_DESTROYED);
            }
        }
        world
            .journal
            .line("current", format_args!("\"context\":{context}"));
        STACK.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: usize) {
        let mut world = lock();
        device_of(&world, context)?;
        world
            .journal
            .line("push", format_args!("\"context\":{context}"));
        STACK.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }

    fn cuCtxPopCurrent_v2(to: *mut usize) {
        let popped = STACK.with_borrow_mut(Vec::pop).ok_or(INVALID_CONTEXT)?;
        lock()
            .journal
            .line("pop", format_args!("\"context\":{popped}"));
        if to.is_null() { Ok(()) } else { give(to, popped) }
    }

    fn cuCtxGetDevice(device: *mut c_int) {
        give(device, current()? as c_int)
    }

    fn cuCtxSynchronize() {
        let device = current()?;
        stream::sync_device(lock(), device)
    }

    fn cuCtxEnablePeerAccess(peer: usize, flags: c_uint) {
        let _ = flags;
        let own = current()?;
        let other = device_of(&lock(), peer)?;
        if own == other { Err(INVALID_DEVICE) } else { Ok(()) }
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let device = current()?;
        let mut world = lock();
        world.use_device(device)?;
        let arena = &world.device(device)?.arena;
        give(free, arena.total - arena.used)?;
        give(total, arena.total)
    }

    fn cuMemAlloc_v2(address: *mut u64, len: usize) {
        let device = current()?;
        let found = lock().allocate(device, len)?;
        give(address, found as u64)
    }

    fn cuMemFree_v2(address: u64) {
        let device = current()?;
        end::free(lock(), device, address as usize)
    }

    fn cuMemHostAlloc(start: *mut usize, len: usize, flags: c_uint) {
        if flags > 7 {
            return Err(INVALID_VALUE);
        }
        let device = current()?;
        let found = lock().pin(device, len)?;
        give(start, found)
    }

    fn cuMemAllocHost_v2(start: *mut usize, len: usize) {
        let device = current()?;
        let found = lock().pin(device, len)?;
        give(start, found)
    }

    fn cuMemFreeHost(start: usize) {
        let device = current()?;
        end::unpin(lock(), device, start, true)
    }

    fn cuMemHostRegister_v2(start: usize, len: usize, flags: c_uint) {
        let _ = flags;
        let device = current()?;
        lock().register(device, start, len)
    }

    fn cuMemHostUnregister(start: usize) {
        let device = current()?;
        end::unpin(lock(), device, start, false)
    }

    fn cuPointerGetAttribute(to: *mut c_void, which: c_int, address: u64) {
        let device = current()?;
        let world = lock();
        let at = address as usize;
        let found = world
            .devices
            .iter()
            .position(|d| d.arena.contains(at) && d.arena.find(at, 0).is_some());
        let host = world
            .pinned
            .range(..=at)
            .next_back()
            .filter(|(start, pinned)| at < *start + pinned.block.len);
        let (of, kind) = match (found, host) {
            (Some(of), _) => (of, 2),
            (None, Some((_, pinned))) => (pinned.device, 1),
            (None, None) => return Err(INVALID_VALUE),
        };
        let _ = device;
        match which {
            1 => give(to.cast::<usize>(), context(&world, of)),
            2 => give(to.cast::<c_uint>(), kind),
            3 if kind == 2 => give(to.cast::<u64>(), address),
            4 if kind == 1 => give(to.cast::<u64>(), address),
            8 => give(to.cast::<u8>(), 0),
            9 => give(to.cast::<c_int>(), of as c_int),
            _ => Err(INVALID_VALUE),
        }
    }

    fn cuMemcpyHtoD_v2(to: u64, from: usize, len: usize) {
        plain(current()?, (Side::Device, to as usize), (Side::Host, from), len, None)
    }

    fn cuMemcpyDtoH_v2(to: usize, from: u64, len: usize) {
        plain(current()?, (Side::Host, to), (Side::Device, from as usize), len, None)
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) {
        let (to, from) = ((Side::Device, to as usize), (Side::Device, from as usize));
        plain(current()?, to, from, len, None)
    }

    fn cuMemcpy(to: u64, from: u64, len: usize) {
        let (to, from) = ((Side::Either, to as usize), (Side::Either, from as usize));
        plain(current()?, to, from, len, None)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, len: usize, stream: usize) {
        plain(current()?, (Side::Device, to as usize), (Side::Host, from), len, Some(stream))
    }

    fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, len: usize, stream: usize) {
        plain(current()?, (Side::Host, to), (Side::Device, from as usize), len, Some(stream))
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: usize) {
        let (to, from) = ((Side::Device, to as usize), (Side::Device, from as usize));
        plain(current()?, to, from, len, Some(stream))
    }

    fn cuMemcpyAsync(to: u64, from: u64, len: usize, stream: usize) {
        let (to, from) = ((Side::Either, to as usize), (Side::Either, from as usize));
        plain(current()?, to, from, len, Some(stream))
    }

    fn cuMemcpyPeerAsync(
        to: u64,
        to_context: usize,
        from: u64,
        from_context: usize,
        len: usize,
        stream: usize
    ) {
        for context in [to_context, from_context] {
            device_of(&lock(), context)?;
        }
        let (to, from) = ((Side::Device, to as usize), (Side::Device, from as usize));
        plain(current()?, to, from, len, Some(stream))
    }

    fn cuMemcpy2D_v2(what: *const Copy2d) {
        copy_2d(what, None)
    }

    fn cuMemcpy2DAsync_v2(what: *const Copy2d, stream: usize) {
        copy_2d(what, Some(stream))
    }

    fn cuMemsetD8_v2(to: u64, value: u8, len: usize) {
        copy::set(current()?, 0, line(to as usize, len), value, true)
    }

    fn cuMemsetD8Async(to: u64, value: u8, len: usize, stream: usize) {
        copy::set(current()?, stream, line(to as usize, len), value, false)
    }

    fn cuStreamCreate(stream: *mut u64, flags: c_uint) {
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        let device = current()?;
        let id = lock().open_stream(device, flags == 1)?;
        give(stream, id)
    }

    fn cuStreamCreateWithPriority(stream: *mut u64, flags: c_uint, priority: c_int) {
        let _ = priority;
        let device = current()?;
        let id = lock().open_stream(device, flags & 1 == 1)?;
        give(stream, id)
    }

    fn cuStreamGetCtx(stream: usize, to: *mut usize) {
        let device = current()?;
        let world = lock();
        let id = world.stream_of(device, stream)?;
        let of = world.streams.get(&id).ok_or(INVALID_HANDLE)?.device;
        give(to, context(&world, of))
    }

    fn cuStreamQuery(stream: usize) {
        let device = current()?;
        lock().query_stream(device, stream)
    }

    fn cuStreamSynchronize(stream: usize) {
        let device = current()?;
        stream::sync_stream(lock(), device, stream)
    }

    fn cuStreamWaitEvent(stream: usize, event: u64, flags: c_uint) {
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        let device = current()?;
        lock().wait_event(device, stream, event)
    }

    fn cuStreamDestroy_v2(stream: usize) {
        let device = current()?;
        lock().close_stream(device, stream)
    }

    fn cuLaunchHostFunc(stream: usize, function: Option<HostFn>, argument: usize) {
        let device = current()?;
        stream::call_later(lock(), device, stream, function, argument)
    }

    fn cuEventCreate(event: *mut u64, flags: c_uint) {
        if flags > 7 {
            return Err(INVALID_VALUE);
        }
        let device = current()?;
        let id = lock().open_event(device, flags & 2 == 0)?;
        give(event, id)
    }

    fn cuEventRecord(event: u64, stream: usize) {
        let device = current()?;
        lock().record(device, event, stream)
    }

    fn cuEventQuery(event: u64) {
        let device = current()?;
        lock().query_event(device, event)
    }

    fn cuEventSynchronize(event: u64) {
        let device = current()?;
        stream::sync_event(lock(), device, event)
    }

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, first: u64, last: u64) {
        lock().both_happened(first, last)?;
        give(milliseconds, 0.001)
    }

    fn cuEventDestroy_v2(event: u64) {
        current()?;
        lock().close_event(event)
    }
}
