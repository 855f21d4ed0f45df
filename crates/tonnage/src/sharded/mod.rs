//! Checkpoints that several processes write together: files of their final size, into which each rank
//! puts the bytes that it has.
//!
//! One rank, the *coordinator*, makes the files ([`Files::create`]) beside the old ones and tells the others
//! where they lie ([`Files::places`]). Every rank, the coordinator too, writes its shards: [`write()`] takes
//! [`Patch`]es, boxes of a tensor in memory, to where their rows belong in the file. When all have written
//! and synced, the coordinator gives the files their names ([`Files::commit`]); if one has not, it drops
//! them, and the old checkpoint is as it was.
//!
//! Nothing here talks to another process: who tells whom is for the caller, as is who has which box. That the
//! boxes tile each tensor exactly is proven before, where all of them are known (`tonnage_plan::save`).

mod files;
mod patch;
mod write;

pub use files::{Files, Place, sum_part};
pub use patch::Patch;
pub use write::write;
