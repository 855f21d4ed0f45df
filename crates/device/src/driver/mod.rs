//! NVIDIA's and AMD's devices, through their drivers' own libraries, opened at run time.
//!
//! The two drivers offer the same operations under other names. `table` is the list of those names; it is
//! the only place where they differ. Everything above it — devices, memory, queues — is written once.

mod call;
mod device;
mod part;
mod queue;
mod remedy;
mod table;

pub(crate) use device::CudaMemory;
pub use device::{Driver, DriverDevice};
