//! Model-weight files: open, look, load, save, verify.
//!
//! **A checkpoint is a table of byte ranges**: name, dtype, shape, file, offset, length. A
//! [`Checkpoint`] is that table of one file or of many, with ways to get at the bytes:
//!
//! * nothing but headers is read until a tensor is asked for, and a slice reads only what it covers;
//! * a name in an index file leads nowhere outside of its folder, and a file that breaks the
//!   specification is refused with the file, the tensor, what was found, what was needed and the clause;
//! * whatever goes wrong in a save, the old checkpoint or the new one is there, whole.
//!
//! The mechanisms live below and are re-exported: [`mod@format`] (the grammar), [`storage`] (files),
//! [`engine`] (moving bytes). [`compat`] has the reference crate's API with its semantics.

pub use tonnage_device as device;
pub use tonnage_engine as engine;
pub use tonnage_format as format;
pub use tonnage_storage as storage;

pub mod arena;
mod assemble;
pub mod cast;
mod checkpoint;
pub mod checksums;
pub mod compat;
mod device_load;
mod device_plan;
pub mod diff;
pub mod edit;
mod error;
pub mod gguf;
mod load;
pub mod names;
mod open;
pub mod plan;
mod publish;
pub mod quant;
mod save;
pub mod sharded;
mod shards;
mod spool;
pub mod stats;
mod stream;
mod tensor;
pub mod values;
mod verify;
mod writer;

pub use checkpoint::{Checkpoint, CheckpointFile, Note};
pub use device_load::{Allocate, DeviceLoad, DeviceLoaded, DeviceMap, DeviceTensor};
pub use error::{Error, ErrorKind, Result};
pub use load::{ALIGN, Load, Loaded, LoadedTensor, OnProgressOf, Report};
pub use open::{Layout, OpenOptions};
pub use save::{Content, DeviceData, Item, Save, Saved, TensorData, save, save_items, to_bytes};
pub use shards::{parse_size, split};
pub use spool::{ROOM, SMALL};
pub use stream::{DeviceStream, Order, Stream};
pub use tensor::{GAP, SliceRef, TensorRef};
pub use tonnage_format::Dtype;
pub use tonnage_format::slice::Range as Slice;
pub use tonnage_storage::Durability;
pub use verify::{FileVerdict, Finding, Severity, Verification, Verify, verify, verify_with};
pub use writer::Writer;
