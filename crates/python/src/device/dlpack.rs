//! Python's capsules around DLPack's structures, which the room for devices makes, and tensors that a framework
//! makes of them without a capsule.
//!
//! Invariants:
//! 1. A capsule's pointer is a managed tensor that [`Owned::into_raw`] gave up: whoever takes the tensor
//!    renames the capsule and calls the deleter.
//! 2. A capsule that nobody took is still called by its first name when it is freed: then the tensor is
//!    ours again.
//! 3. A framework's table is the protocol's, and lives as long as the process: the capsule of this name on a
//!    class of tensors holds nothing else.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::ptr::NonNull;

use pyo3::ffi;
use pyo3::prelude::*;
use tonnage::device::dlpack::{Exchange, Legacy, Managed, Owned, Tensor, Versioned};

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const EXCHANGE: &CStr = c"dlpack_exchange_api";

/// Deletes the tensor of a capsule that nobody took.
fn free<T: Managed>(capsule: *mut ffi::PyObject, name: &CStr) {
    // SAFETY: Python gives the capsule that is freed.
    if unsafe { ffi::PyCapsule_IsValid(capsule, name.as_ptr()) } == 1 {
        // SAFETY: valid under this name, so this is what the capsule was made with (invariant 2).
        let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, name.as_ptr()) };
        if let Some(managed) = NonNull::new(managed.cast::<T>()) {
            // SAFETY: nobody took it (invariant 2), and our deleter runs on any thread.
            drop(unsafe { Owned::from_raw(managed) });
        }
    }
}

unsafe extern "C" fn free_legacy(capsule: *mut ffi::PyObject) {
    free::<Legacy>(capsule, LEGACY);
}

unsafe extern "C" fn free_versioned(capsule: *mut ffi::PyObject) {
    free::<Versioned>(capsule, VERSIONED);
}

fn capsule<'py, T: Managed>(
    py: Python<'py>,
    tensor: Owned<T>,
    name: &CStr,
    free: ffi::PyCapsule_Destructor,
) -> PyResult<Bound<'py, PyAny>> {
    let managed = tensor.into_raw();
    // SAFETY: the pointer is not null and the name is static.
    let made = unsafe { ffi::PyCapsule_New(managed.as_ptr().cast(), name.as_ptr(), Some(free)) };
    if made.is_null() {
        // SAFETY: no capsule has it (invariant 1), so it is still ours.
        drop(unsafe { Owned::from_raw(managed) });
    }
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, made) }
}

/// The capsule of a tensor: of the protocol's version 1 where the consumer knows it.
pub fn export<'py>(
    py: Python<'py>,
    tensor: Tensor,
    versioned: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if versioned {
        capsule(py, tensor.versioned(), VERSIONED, free_versioned)
    } else {
        capsule(py, tensor.legacy(), LEGACY, free_legacy)
    }
}

/// A framework's table of C functions; `None` where its version is not known here.
pub fn exchange(capsule: &Bound<'_, PyAny>) -> PyResult<Option<Exchange>> {
    // SAFETY: an object of Python's; what is no such capsule gives null and an exception.
    let table = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), EXCHANGE.as_ptr()) };
    if table.is_null() {
        return Err(PyErr::fetch(capsule.py()));
    }
    // SAFETY: invariant 3.
    Ok(unsafe { Exchange::from_raw(table) })
}

/// The framework's own object of a tensor; `None` where it makes none of this dtype or device.
pub fn object<'py>(py: Python<'py>, table: &Exchange, tensor: Tensor) -> Option<Bound<'py, PyAny>> {
    // SAFETY: attached to Python, as `py` shows.
    match unsafe { table.object_of(tensor.versioned()) } {
        // SAFETY: a new reference to an object of Python's.
        Some(object) => Some(unsafe { Bound::from_owned_ptr(py, object.as_ptr().cast()) }),
        None => {
            drop(PyErr::take(py));
            None
        }
    }
}
