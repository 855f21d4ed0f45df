//! Tensors on a device for whoever speaks DLPack: capsules of the protocol's C structures.
//!
//! Invariants:
//! 1. The structures have the layout of `dlpack.h`, version 1.1.
//! 2. A managed tensor and all that its pointers lead to are one [`Held`], boxed and leaked into its
//!    `manager_ctx`. The deleter makes it a box again; the protocol calls it once.
//! 3. A capsule that nobody took is still called by its first name when it is freed: then its destructor
//!    calls the deleter. Whoever takes the tensor renames the capsule.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;
use tonnage::device::{Kind, Memory};

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";

#[repr(C)]
struct DlDevice {
    kind: i32,
    index: i32,
}

#[repr(C)]
struct DlDtype {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlDtype,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Legacy {
    tensor: DlTensor,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Legacy)>,
}

#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: DlTensor,
}

/// All that a managed tensor needs, in one place.
struct Held<T> {
    managed: T,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _memory: Memory,
}

/// A tensor to be shown: its memory, the first byte there, its dtype in DLPack's terms, its extents.
pub struct Shown {
    pub memory: Memory,
    pub offset: u64,
    pub dtype: (u8, u8, u16),
    pub shape: Vec<i64>,
}

impl Shown {
    /// Row-major strides in elements.
    fn strides(&self) -> Vec<i64> {
        let mut step = 1_i64;
        let mut strides: Vec<i64> = self
            .shape
            .iter()
            .rev()
            .map(|extent| {
                let stride = step;
                step = step.saturating_mul((*extent).max(1));
                stride
            })
            .collect();
        strides.reverse();
        strides
    }

    /// The tensor; pointers to its extents follow once these have their place.
    fn tensor(&self) -> DlTensor {
        let id = self.memory.device();
        let address = self.memory.address();
        // Handles of memory without addresses stay as they are, and the offset says where.
        let (data, byte_offset) = match id.kind {
            Kind::Vulkan | Kind::Metal => (address, self.offset),
            _ => (address.wrapping_add(self.offset), 0),
        };
        let (code, bits, lanes) = self.dtype;
        DlTensor {
            data: ptr::with_exposed_provenance_mut(data as usize),
            device: DlDevice {
                kind: id.kind.dlpack(),
                index: id.index as i32,
            },
            ndim: self.shape.len() as i32,
            dtype: DlDtype { code, bits, lanes },
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset,
        }
    }

    fn hold<T>(self, managed: T) -> Box<Held<T>> {
        let strides = self.strides();
        Box::new(Held {
            managed,
            shape: self.shape,
            strides,
            _memory: self.memory,
        })
    }
}

unsafe extern "C" fn delete_legacy(managed: *mut Legacy) {
    // SAFETY: the protocol gives the pointer that this deleter came with (invariant 2).
    let context = unsafe { (*managed).manager_ctx };
    // SAFETY: a leaked box of this type, given back once (invariant 2).
    drop(unsafe { Box::from_raw(context.cast::<Held<Legacy>>()) });
}

unsafe extern "C" fn delete_versioned(managed: *mut Versioned) {
    // SAFETY: the protocol gives the pointer that this deleter came with (invariant 2).
    let context = unsafe { (*managed).manager_ctx };
    // SAFETY: a leaked box of this type, given back once (invariant 2).
    drop(unsafe { Box::from_raw(context.cast::<Held<Versioned>>()) });
}

unsafe extern "C" fn free_legacy(capsule: *mut ffi::PyObject) {
    // SAFETY: Python gives the capsule that is freed.
    if unsafe { ffi::PyCapsule_IsValid(capsule, LEGACY.as_ptr()) } == 1 {
        // SAFETY: valid under this name, so this is what the capsule was made with (invariant 3).
        let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, LEGACY.as_ptr()) };
        // SAFETY: nobody took it (invariant 3).
        unsafe { delete_legacy(managed.cast()) }
    }
}

unsafe extern "C" fn free_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: Python gives the capsule that is freed.
    if unsafe { ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) } == 1 {
        // SAFETY: valid under this name, so this is what the capsule was made with (invariant 3).
        let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()) };
        // SAFETY: nobody took it (invariant 3).
        unsafe { delete_versioned(managed.cast()) }
    }
}

fn capsule<'py>(
    py: Python<'py>,
    managed: *mut c_void,
    name: &CStr,
    free: ffi::PyCapsule_Destructor,
) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: the pointer is not null and the name is static.
    let made = unsafe { ffi::PyCapsule_New(managed, name.as_ptr(), Some(free)) };
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, made) }
}

/// The capsule of a tensor: of the protocol's version 1 where the consumer knows it.
pub fn export<'py>(py: Python<'py>, shown: Shown, versioned: bool) -> PyResult<Bound<'py, PyAny>> {
    let tensor = shown.tensor();
    if versioned {
        let managed = Versioned {
            major: 1,
            minor: 1,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete_versioned),
            flags: 0,
            tensor,
        };
        let held = Box::leak(shown.hold(managed));
        held.managed.tensor.shape = held.shape.as_mut_ptr();
        held.managed.tensor.strides = held.strides.as_mut_ptr();
        let whole = ptr::from_mut(held);
        // SAFETY: just leaked; nobody else has it.
        let managed = unsafe { &raw mut (*whole).managed };
        // SAFETY: as above.
        unsafe { (*managed).manager_ctx = whole.cast() };
        return capsule(py, managed.cast(), VERSIONED, free_versioned);
    }
    let managed = Legacy {
        tensor,
        manager_ctx: ptr::null_mut(),
        deleter: Some(delete_legacy),
    };
    let held = Box::leak(shown.hold(managed));
    held.managed.tensor.shape = held.shape.as_mut_ptr();
    held.managed.tensor.strides = held.strides.as_mut_ptr();
    let whole = ptr::from_mut(held);
    // SAFETY: just leaked; nobody else has it.
    let managed = unsafe { &raw mut (*whole).managed };
    // SAFETY: as above.
    unsafe { (*managed).manager_ctx = whole.cast() };
    capsule(py, managed.cast(), LEGACY, free_legacy)
}
