//! Which tensors share memory, and where they begin there.

use pyo3::prelude::*;
use tonnage::arena::{Place, Rules, place};
use tonnage::device::Info;

use super::open;
use crate::paved::failure::raise;

/// The error of a tensor that no region of a device holds.
pub fn too_large(name: &str, len: u64, info: &Info) -> PyErr {
    raise(&tonnage::arena::too_large(name, len, info))
}

/// Bytes of each region; for each tensor its region, its first byte there, and unused bytes behind it.
type Arranged = (Vec<u64>, Vec<(usize, u64, u64)>);

/// Refuses a tensor that no allocation of a device holds.
#[pyfunction]
#[pyo3(name = "_check_size")]
pub fn check_size(py: Python<'_>, name: &str, len: u64, device: &str) -> PyResult<()> {
    let device = open::device(py, device)?;
    let info = device.info();
    if len > info.max_region {
        return Err(too_large(name, len, info));
    }
    Ok(())
}

/// Places tensors of these lengths in regions of a device's memory.
#[pyfunction]
#[pyo3(name = "_arrange")]
pub fn arrange(py: Python<'_>, lens: Vec<u64>, device: &str) -> PyResult<Arranged> {
    let device = open::device(py, device)?;
    let info = device.info();
    let placed = place(lens.iter().copied(), Rules::of(info))
        .map_err(|position| too_large("", lens.get(position).copied().unwrap_or(0), info))?;
    let row = |place: Place| (place.region, place.offset, place.slack);
    Ok((placed.regions, placed.places.into_iter().map(row).collect()))
}
