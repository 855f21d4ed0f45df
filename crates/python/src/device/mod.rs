//! Devices: opening them, memory on them, and tensors brought there while Python goes on.
//!
//! * [`open`]: devices by name, one instance a process.
//! * [`memory`]: memory of a device, allocated by us or by a framework; with `unsafe`.
//! * [`pieces`]: what of a checkpoint belongs where, as the engine takes it; [`transfer`]: the engine at work;
//!   [`bulk`]: many whole tensors at once.
//! * [`tensor`]: a tensor on a device for frameworks that have no allocator of ours, and for none.
//! * [`arrange`]: which tensors share memory; [`dlpack`]: the capsules, with `unsafe`.
//!
//! The Python half (`tonnage._device`) decides whose memory is used and makes the frameworks' tensors.

mod arrange;
mod bulk;
mod dlpack;
pub mod memory;
mod open;
mod pieces;
pub mod tensor;
pub mod transfer;

use pyo3::prelude::*;
use tonnage::DeviceData;

pub use bulk::totals;

/// The bytes on a device that an object stands for, if it does.
pub fn data_of<'a>(object: &'a Bound<'_, PyAny>) -> Option<DeviceData<'a>> {
    if let Ok(region) = object.cast::<memory::Region>() {
        let region = region.get();
        return Some(DeviceData {
            device: &region.device,
            memory: &region.memory,
            offset: 0,
            after: region.after,
        });
    }
    let tensor = object.cast::<tensor::DeviceTensor>().ok()?.get();
    Some(tensor.data())
}

/// Adds the classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<memory::Region>()?;
    module.add_class::<tensor::DeviceTensor>()?;
    module.add_class::<transfer::Transfer>()?;
    module.add_class::<bulk::Bulk>()?;
    module.add_function(wrap_pyfunction!(arrange::arrange, module)?)?;
    module.add_function(wrap_pyfunction!(arrange::check_size, module)?)?;
    module.add_function(wrap_pyfunction!(open::memory, module)?)?;
    module.add_function(wrap_pyfunction!(open::gds_attempt, module)?)?;
    module.add_function(wrap_pyfunction!(open::devices, module)?)
}
