//! The driver's functions with Rust's types: each call checked, each error with its name.
//!
//! Invariants:
//! 1. A [`Table`]'s pointers have their functions' signatures (its own invariant 1) and stay valid for good.
//! 2. Out-parameters are locals of the right type that live through the call.
//! 3. Handles come from the same table; whoever owns one destroys it once, after its last use.
//! 4. Ranges that a copy reads and writes are valid until the copy is over: [`super::queue`] sees to that.
//! 5. Texts that a driver gives are static, null-terminated strings.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;

use super::table::{Code, Copy2d, Current, Handle, Names, Rows, Table};
use crate::{Cause, DeviceId, Error};

/// Codes that CUDA and HIP share.
pub const OUT_OF_MEMORY: Code = 2;
pub const NO_DEVICE: Code = 100;
pub const INVALID_DEVICE: Code = 101;
pub const NOT_READY: Code = 600;

/// Stream and event flags that CUDA and HIP share.
const NON_BLOCKING: u32 = 1;
const BLOCKING_SYNC: u32 = 1;
const DISABLE_TIMING: u32 = 2;
/// Page-locked for every context, not only the current one.
const PORTABLE: u32 = 1;

/// Rows in one memory and in another.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub device: u64,
    pub device_pitch: usize,
    pub host: usize,
    pub host_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToDevice,
    ToHost,
}

/// What was current on a thread, if it was something else.
#[derive(Clone, Copy, Debug)]
pub struct Was(Option<Handle>);

impl Table {
    /// The error of a code.
    pub fn error(&self, id: DeviceId, doing: &'static str, code: Code) -> Error {
        let (name, text) = self.names(code);
        let text = if text.is_empty() {
            name
        } else {
            format!("{name}: {text}")
        };
        Error::new(
            id,
            doing,
            Cause::Driver {
                code: code.into(),
                text,
            },
        )
    }

    fn check(&self, id: DeviceId, doing: &'static str, code: Code) -> Result<(), Error> {
        if code == 0 {
            Ok(())
        } else {
            Err(self.error(id, doing, code))
        }
    }

    fn names(&self, code: Code) -> (String, String) {
        let get = |which: unsafe extern "C" fn(c_int, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: invariants 1 and 2.
            let found = unsafe { which(code, &mut text) };
            if found == 0 {
                read(text)
            } else {
                String::new()
            }
        };
        let give = |which: unsafe extern "C" fn(c_int) -> *const c_char| {
            // SAFETY: invariant 1.
            read(unsafe { which(code) })
        };
        match self.names {
            Names::Cuda { name, text } => (get(name), get(text)),
            Names::Hip { name, text } => (give(name), give(text)),
        }
    }

    pub fn init(&self, id: DeviceId) -> Result<(), Error> {
        // SAFETY: invariant 1.
        let code = unsafe { (self.init)(0) };
        self.check(id, "start the driver", code)
    }

    /// The driver's version, as 1000 × major + 10 × minor for CUDA.
    pub fn version(&self, id: DeviceId) -> Result<i32, Error> {
        let mut version = 0;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.version)(&mut version) };
        self.check(id, "ask for the driver's version", code)?;
        Ok(version)
    }

    pub fn count(&self, id: DeviceId) -> Result<u32, Error> {
        let mut count = 0;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.count)(&mut count) };
        if code == NO_DEVICE {
            return Ok(0);
        }
        self.check(id, "count devices", code)?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    pub fn device(&self, id: DeviceId) -> Result<c_int, Error> {
        let mut device = 0;
        let index = c_int::try_from(id.index).unwrap_or(c_int::MAX);
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.device)(&mut device, index) };
        self.check(id, "find the device", code)?;
        Ok(device)
    }

    pub fn device_name(&self, id: DeviceId, device: c_int) -> Result<String, Error> {
        let mut name = [0 as c_char; 256];
        // SAFETY: invariants 1 and 2; one byte of the array stays 0.
        let code = unsafe { (self.device_name)(name.as_mut_ptr(), 255, device) };
        self.check(id, "ask for the device's name", code)?;
        Ok(read(name.as_ptr()))
    }

    pub fn total(&self, id: DeviceId, device: c_int) -> Result<u64, Error> {
        let mut total = 0;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.total)(&mut total, device) };
        self.check(id, "ask for the device's memory", code)?;
        Ok(total as u64)
    }

    /// An attribute of a device; 0 where the driver does not know it.
    pub fn attribute(&self, device: c_int, which: c_int) -> i32 {
        let mut value = 0;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.attribute)(&mut value, which, device) };
        if code == 0 { value } else { 0 }
    }

    /// The device's primary context, which every user in the process shares. HIP has no contexts.
    pub fn retain(&self, id: DeviceId, device: c_int) -> Result<Handle, Error> {
        let Current::Cuda { retain, .. } = self.current else {
            return Ok(0);
        };
        let mut context = 0;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { retain(&mut context, device) };
        self.check(id, "use the primary context", code)?;
        Ok(context)
    }

    /// Gives back what [`Table::retain`] gave.
    pub fn release(&self, device: c_int) {
        if let Current::Cuda { release, .. } = self.current {
            // SAFETY: invariants 1 and 3. A driver that is going down already has nothing to release.
            let _ = unsafe { release(device) };
        }
    }

    /// Makes a device current on this thread, and says what was.
    pub fn enter(&self, id: DeviceId, device: c_int, context: Handle) -> Result<Was, Error> {
        const DOING: &str = "make the device current";
        match self.current {
            Current::Cuda { get, set, .. } => {
                let mut was = 0;
                // SAFETY: invariants 1 and 2.
                let code = unsafe { get(&mut was) };
                self.check(id, DOING, code)?;
                if was != context {
                    // SAFETY: invariants 1 and 3.
                    let code = unsafe { set(context) };
                    self.check(id, DOING, code)?;
                }
                Ok(Was((was != context).then_some(was)))
            }
            Current::Hip { get, set } => {
                let mut was = 0;
                // SAFETY: invariants 1 and 2.
                let code = unsafe { get(&mut was) };
                self.check(id, DOING, code)?;
                if was != device {
                    // SAFETY: invariant 1.
                    let code = unsafe { set(device) };
                    self.check(id, DOING, code)?;
                }
                Ok(Was((was != device).then_some(was as Handle)))
            }
        }
    }

    /// Makes current again what was.
    pub fn leave(&self, was: Was) {
        let Some(was) = was.0 else { return };
        // Nothing can be done where the driver refuses; the next call that needs a device says so.
        match self.current {
            Current::Cuda { set, .. } => {
                // SAFETY: invariants 1 and 3: it was current on this thread before.
                let _ = unsafe { set(was) };
            }
            Current::Hip { set, .. } => {
                // SAFETY: invariant 1.
                let _ = unsafe { set(was as c_int) };
            }
        }
    }

    /// Free and total bytes of the current device.
    pub fn memory_info(&self, id: DeviceId) -> Result<(u64, u64), Error> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.memory_info)(&mut free, &mut total) };
        self.check(id, "ask for free memory", code)?;
        Ok((free as u64, total as u64))
    }

    /// Memory of the current device, or the driver's code.
    pub fn allocate(&self, len: usize) -> Result<u64, Code> {
        let mut address = 0;
        // SAFETY: invariants 1 and 2.
        match unsafe { (self.allocate)(&mut address, len) } {
            0 => Ok(address),
            code => Err(code),
        }
    }

    /// Frees what [`Table::allocate`] gave.
    pub fn free(&self, address: u64) {
        // SAFETY: invariants 1 and 3. A lost context has freed everything already.
        let _ = unsafe { (self.free)(address) };
    }

    /// The number of the device that an address is of, if the driver knows.
    pub fn ordinal(&self, address: u64) -> Option<u32> {
        // `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`, and HIP's.
        const DEVICE_ORDINAL: c_int = 9;
        let ask = self.pointer?;
        let mut ordinal: c_int = -1;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { ask((&raw mut ordinal).cast(), DEVICE_ORDINAL, address) };
        u32::try_from(ordinal).ok().filter(|_| code == 0)
    }

    /// Page-locked memory of the host, or the driver's code.
    pub fn host_allocate(&self, len: usize) -> Result<NonNull<u8>, Code> {
        let mut start = std::ptr::null_mut();
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.host_allocate)(&mut start, len, PORTABLE) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if code == 0 => Ok(start),
            _ => Err(if code == 0 { OUT_OF_MEMORY } else { code }),
        }
    }

    /// Frees what [`Table::host_allocate`] gave.
    pub fn host_free(&self, start: NonNull<u8>) {
        // SAFETY: invariants 1 and 3.
        let _ = unsafe { (self.host_free)(start.as_ptr().cast()) };
    }

    /// Starts a copy between the host and the current device.
    pub fn copy(&self, way: Way, device: u64, host: usize, len: usize, stream: Handle) -> Code {
        let host = std::ptr::with_exposed_provenance_mut::<c_void>(host);
        match way {
            // SAFETY: invariants 1, 3 and 4.
            Way::ToDevice => unsafe { (self.to_device)(device, host, len, stream) },
            // SAFETY: invariants 1, 3 and 4.
            Way::ToHost => unsafe { (self.to_host)(host, device, len, stream) },
        }
    }

    /// Starts a copy of rows.
    pub fn copy_rows(&self, way: Way, grid: Grid, stream: Handle) -> Code {
        // CUDA's and HIP's numbers for "host" and "device", and for directions.
        const HOST: u32 = 1;
        const DEVICE: u32 = 2;
        let Grid {
            device,
            device_pitch,
            host,
            host_pitch,
            width,
            height,
        } = grid;
        match (&self.rows, way) {
            (Rows::Cuda(rows), Way::ToDevice) => {
                let copy = Copy2d {
                    src_type: HOST,
                    src_host: host,
                    src_pitch: host_pitch,
                    dst_type: DEVICE,
                    dst_device: device,
                    dst_pitch: device_pitch,
                    width,
                    height,
                    ..Copy2d::default()
                };
                // SAFETY: invariants 1, 3 and 4; the driver reads the description before it returns.
                unsafe { rows(&copy, stream) }
            }
            (Rows::Cuda(rows), Way::ToHost) => {
                let copy = Copy2d {
                    src_type: DEVICE,
                    src_device: device,
                    src_pitch: device_pitch,
                    dst_type: HOST,
                    dst_host: host,
                    dst_pitch: host_pitch,
                    width,
                    height,
                    ..Copy2d::default()
                };
                // SAFETY: as above.
                unsafe { rows(&copy, stream) }
            }
            (Rows::Hip(rows), Way::ToDevice) => {
                let device = device as usize;
                // SAFETY: invariants 1, 3 and 4.
                unsafe {
                    rows(
                        device,
                        device_pitch,
                        host,
                        host_pitch,
                        width,
                        height,
                        1,
                        stream,
                    )
                }
            }
            (Rows::Hip(rows), Way::ToHost) => {
                let device = device as usize;
                // SAFETY: invariants 1, 3 and 4.
                unsafe {
                    rows(
                        host,
                        host_pitch,
                        device,
                        device_pitch,
                        width,
                        height,
                        2,
                        stream,
                    )
                }
            }
        }
    }

    /// A stream that does not wait for the default stream, on the current device.
    pub fn stream(&self, id: DeviceId) -> Result<Handle, Error> {
        let mut stream = 0;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.stream_create)(&mut stream, NON_BLOCKING) };
        self.check(id, "open a stream", code)?;
        Ok(stream)
    }

    /// Makes a stream wait for an event.
    pub fn stream_wait(&self, stream: Handle, event: Handle) -> Code {
        // SAFETY: invariants 1 and 3.
        unsafe { (self.stream_wait)(stream, event, 0) }
    }

    /// Waits for all of a stream's work.
    pub fn stream_sync(&self, stream: Handle) -> Code {
        // SAFETY: invariants 1 and 3.
        unsafe { (self.stream_sync)(stream) }
    }

    /// Destroys what [`Table::stream`] gave.
    pub fn stream_destroy(&self, stream: Handle) {
        // SAFETY: invariants 1 and 3.
        let _ = unsafe { (self.stream_destroy)(stream) };
    }

    /// An event whose waiters sleep, on the current device.
    pub fn event(&self, id: DeviceId) -> Result<Handle, Error> {
        let mut event = 0;
        // SAFETY: invariants 1 and 2.
        let code = unsafe { (self.event_create)(&mut event, DISABLE_TIMING | BLOCKING_SYNC) };
        self.check(id, "make an event", code)?;
        Ok(event)
    }

    /// The event happens when the stream has done what it was given so far.
    pub fn event_record(&self, event: Handle, stream: Handle) -> Code {
        // SAFETY: invariants 1 and 3.
        unsafe { (self.event_record)(event, stream) }
    }

    /// 0 once the event has happened, [`NOT_READY`] before.
    pub fn event_query(&self, event: Handle) -> Code {
        // SAFETY: invariants 1 and 3.
        unsafe { (self.event_query)(event) }
    }

    /// Waits for the event.
    pub fn event_sync(&self, event: Handle) -> Code {
        // SAFETY: invariants 1 and 3.
        unsafe { (self.event_sync)(event) }
    }

    /// Destroys what [`Table::event`] gave.
    pub fn event_destroy(&self, event: Handle) {
        // SAFETY: invariants 1 and 3.
        let _ = unsafe { (self.event_destroy)(event) };
    }
}

/// A driver's text.
fn read(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and invariant 5.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}
