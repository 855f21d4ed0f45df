//! `tonnage._native`: the native half of the Python package. Translation only — handles, exceptions, text.
//!
//! * `error`: every exception the package raises, and how Rust errors become them.
//! * `buffer`: memory that Python sees, with `unsafe`.
//! * `dropin`: the reference package's native surface (`safe_open`, `serialize`, …).
//! * `device`: memory on devices and transfers to it; its file `memory` has `unsafe`.
//! * `paved`: the native side of `tonnage.open`, `save`, `Writer` and `verify`.
//! * `plan`: plans of parallel loads, and their loads.
//! * `sharded`: files that several processes fill together.
//!
//! What a tensor is in each framework lives in Python (`tonnage._adapters`), since that is where the
//! frameworks live; the native side hands an adapter a buffer, a dtype and a shape.

mod buffer;
mod device;
mod dropin;
mod error;
mod paved;
mod plan;
mod sharded;

use pyo3::prelude::*;

/// The native half of the `tonnage` package.
#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    error::register(module)?;
    module.add_class::<buffer::Buffer>()?;
    dropin::register(module)?;
    paved::register(module)?;
    device::register(module)?;
    plan::register(module)?;
    sharded::register(module)?;
    // What is public is said in Python; a list of every name here would say otherwise.
    module.delattr("__all__")
}
