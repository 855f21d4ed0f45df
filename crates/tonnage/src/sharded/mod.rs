//! Checkpoints that several processes write together: files of their final size, into which each rank
//! puts the bytes that it has.
//!
//! One rank, the *coordinator*, makes the files ([`Files::create`]) beside the old ones and tells the others
//! where they lie ([`Files::places`]). Every rank, the coordinator too, writes its shards: [`write()`] takes
//! [`Patch`]es, boxes of a tensor in memory, to where their rows belong in the file. When all have written
//! and synced, the coordinator gives the files their names ([`Files::commit`]); if one has not, it drops
//! them, and the old checkpoint is as it was.
//!
//! Nothing here talks to another process: who tells whom is for the caller. Who writes what [`agree()`] says,
//! from what every rank has, and proves that it tiles every tensor and every file exactly, before anything is
//! written.

mod agree;
mod files;
mod patch;
mod write;

pub use agree::{Grouping, agree};
pub use files::{Files, Place, sum_part};
pub use patch::Patch;
pub use tonnage_plan::save::{Offer, SavePlan, Saved as SavedTensor};
pub use write::write;
