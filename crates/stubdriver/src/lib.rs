//! A driver without a device, for tests: CUDA's and HIP's entry points over memory that the host can't
//! touch, with copies that run late, and checks that no real driver makes.
//!
//! What is like a real card:
//!
//! * Device memory is out of the host's reach: its addresses are mapped without permissions.
//! * Copies from and to page-locked memory run later, on the stream's own thread, and read their source only
//!   then; copies from and to other memory are over when the call returns. Streams wait for each other only
//!   by events, and as the default stream demands.
//! * Calls need a current context (CUDA); a failed copy breaks the device for good, which the next call tells.
//!
//! What it sees that a real card does not tell:
//!
//! * A **race**: a copy whose order against an earlier one on the same bytes nothing establishes. Found by
//!   vector clocks when the copy is issued, so in every run, not in the unlucky one.
//! * A **source that changed** between the call and the copy: a staging buffer reused too early.
//! * Memory **freed while copies on it may run**, freed twice, used after it was freed, or left at the end.
//!
//! Each is a *violation*: a line on stderr and in the journal, a count for tests ([`find`]), and an exit
//! code of [`EXIT`] for a process that ends with one. [`settings`] lists what can be set, faults among them.
//!
//! cuFile's functions are there as well, for reads of files into the same memory (`cufile`).
//!
//! It computes nothing: there are no kernels, modules or graphs.

#[cfg(target_os = "linux")]
mod access;
#[cfg(target_os = "linux")]
mod control;
#[cfg(target_os = "linux")]
mod copy;
#[cfg(target_os = "linux")]
mod cuda;
#[cfg(target_os = "linux")]
mod cufile;
#[cfg(target_os = "linux")]
mod end;
#[cfg(target_os = "linux")]
mod hip;
#[cfg(target_os = "linux")]
mod journal;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod raw;
#[cfg(target_os = "linux")]
mod stream;
#[cfg(target_os = "linux")]
mod world;

#[cfg(target_os = "linux")]
pub mod find;
pub mod settings;

/// A process that broke a rule ends with this code.
pub const EXIT: i32 = 86;
