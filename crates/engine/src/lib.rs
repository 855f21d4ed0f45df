//! Runs reads, writes and copies: the plain host path.
//!
//! Work comes as jobs: bytes of a source that belong in a buffer ([`read()`]), bytes of a buffer that belong
//! in a sink ([`write()`]), bytes of a source that belong in a sink ([`copy()`]), or bytes from anywhere that
//! belong in a sink ([`put()`]), with checksums on the way ([`checksum`]). The engine sorts them by
//! file and offset, joins small neighbours, cuts large ones into blocks, and deals the blocks to a few
//! threads. What it promises:
//!
//! * **Its own memory is bounded** by threads × block, whatever the amount of data; reads go straight
//!   into the caller's buffers and large writes straight out of them.
//! * **The first failure ends the run**: no block starts after it, and [`Error`] says which.
//! * **It stops when told**: a [`Cancel`] is looked at before each block.
//! * **It reports**: bytes, seconds, threads ([`Report`]), and progress while it runs ([`Progress`]).
//!
//! ```
//! use tonnage_engine::{Options, Read, read};
//! use tonnage_storage::MemorySource;
//!
//! let source = MemorySource::new(*b"0123456789", "<bytes>");
//! let (mut head, mut tail) = ([0; 3], [0; 2]);
//! let report = read(
//!     vec![
//!         Read { source: &source, offset: 8, dst: &mut tail },
//!         Read { source: &source, offset: 0, dst: &mut head },
//!     ],
//!     &Options::default(),
//! )?;
//! assert_eq!((&head, &tail, report.bytes), (b"012", b"89", 5));
//! # Ok::<(), tonnage_engine::Error>(())
//! ```
//!
//! Memory of devices is reached through a [`Pipeline`]: a fixed ring of staging slots, with reading and copying
//! overlapped; see [`mod@pipeline`].

pub mod checksum;
mod choose;
mod control;
mod copy;
mod direct;
pub mod hash;
mod host;
mod passing;
pub mod pipeline;
mod put;
mod queue;
mod read;
mod strategy;
mod write;

pub use choose::settle;
pub use control::{Cancel, Check, Error, OnProgress, Options, Progress, Report};
pub use copy::{Copy, copy};
pub use host::HostBuffer;
pub use pipeline::{
    Cast, DeviceReport, Downloads, Failed, FromDevice, Landed, Piece, Pipeline, PipelineOptions,
    SharedProgress,
};
pub use put::{Fill, Origin, Put, put};
pub use queue::for_each_block;
pub use read::{Read, read};
pub use strategy::{Strategy, UnknownStrategy};
pub use write::{Write, write};
