//! Devices by name, and all that there are.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use tonnage::device::find::{self, Found, Settings};
use tonnage::device::{Device, DeviceId, Error, gds};

use crate::paved::failure::{raise, usage};

/// Name, its maker's name, bytes of memory, whether it shares the host's memory.
type About = (String, String, u64, bool);

/// Name of the kind, its driver, its devices, and why there is none.
type Kinds = (&'static str, Option<String>, Vec<About>, Option<String>);

/// A variable of the environment. Only edges read it; rooms below get it as a value.
fn told(variable: &str) -> Option<OsString> {
    std::env::var_os(variable).filter(|value| !value.is_empty())
}

/// What the environment says of cuFile; `child` is the program that tries it.
pub fn gds_settings(child: Vec<OsString>) -> gds::Settings {
    let usual = gds::Settings::default();
    gds::Settings {
        library: told("TONNAGE_CUFILE_LIBRARY").map(PathBuf::from),
        log: told("CUFILE_LOGFILE_PATH").map(PathBuf::from),
        root: told("TONNAGE_GDS_ROOT").map_or(usual.root, PathBuf::from),
        child,
        ..gds::Settings::default()
    }
}

/// Starts cuFile in this process and ends it: for the child process that tries it. `None`, or what was wrong.
#[pyfunction]
#[pyo3(name = "_gds_attempt")]
pub fn gds_attempt() -> Option<String> {
    let library = told("TONNAGE_CUFILE_LIBRARY").map(PathBuf::from);
    let tried = gds::attempt(library.as_deref());
    tried.err().map(|error| error.cause().to_string())
}

/// What the environment says of drivers.
fn settings() -> Settings {
    Settings {
        cuda_driver: told("TONNAGE_CUDA_DRIVER").map(PathBuf::from),
        hip_driver: told("TONNAGE_HIP_DRIVER").map(PathBuf::from),
        vulkan_force_staging: told("TONNAGE_VULKAN_FORCE_STAGING").is_some(),
        ..Settings::default()
    }
}

/// The device of a name such as `cuda:0`. Once opened it stays open: contexts take long to make.
pub fn device(py: Python<'_>, name: &str) -> PyResult<Arc<dyn Device>> {
    static KEPT: Mutex<Vec<(DeviceId, Arc<dyn Device>)>> = Mutex::new(Vec::new());
    let id = name
        .parse::<DeviceId>()
        .map_err(|unknown| usage("DEVICE", &unknown.to_string()))?;
    py.detach(|| {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, device)) = kept.iter().find(|(known, _)| *known == id) {
            return Ok(Arc::clone(device));
        }
        let device = find::open(id, &settings())?;
        kept.push((id, Arc::clone(&device)));
        Ok(device)
    })
    .map_err(|error: Error| raise(&error.into()))
}

/// Bytes of a device's memory, and how many of them are free.
#[pyfunction]
#[pyo3(name = "_device_memory")]
pub fn memory(py: Python<'_>, name: &str) -> PyResult<(u64, u64)> {
    let device = device(py, name)?;
    let free = py.detach(|| device.free_memory());
    let free = free.map_err(|error| raise(&error.into()))?;
    Ok((device.info().total_memory, free))
}

/// For each kind of device its name, its driver, and its devices; or why there is none.
#[pyfunction]
#[pyo3(name = "_devices")]
pub fn devices(py: Python<'_>) -> Vec<Kinds> {
    let found = py.detach(|| find::devices(&settings()));
    let row = |found: Found| {
        let (devices, why) = match found.devices {
            Ok(devices) => (devices, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let devices = devices
            .into_iter()
            .map(|info| {
                (
                    info.id.to_string(),
                    info.name,
                    info.total_memory,
                    info.unified,
                )
            })
            .collect();
        (found.kind.name(), found.driver, devices, why)
    };
    found.into_iter().map(row).collect()
}
