//! Positional bytes from somewhere and to somewhere.
//!
//! A [`Source`] is a label, a length and `read_exact_at`; [`FileSource`], [`MmapSource`] and
//! [`MemorySource`] are sources, and all of them pass one contract suite (`tests/contract.rs`). A
//! [`Sink`] is the same the other way. What this crate promises:
//!
//! * **A read is whole or an error.** A file that someone truncates behind an open source gives
//!   `UnexpectedEof` with the file's name, never a signal: also [`MmapSource`] reads by `pread` and
//!   touches its map only where [`Source::bytes`] is asked for.
//! * **A file is replaced whole or not at all.** [`AtomicFile`] writes beside its target and renames;
//!   whatever goes wrong before, the old file is as it was and nothing is left behind.
//! * **Several processes can fill one file**, each its own ranges ([`SharedFile`]), before its maker gives it
//!   its name.
//! * **Several processes of a machine can share memory** ([`window::Window`]), turn by turn, without waiting for
//!   one that has died.
//! * **An error keeps what the system said** ([`Error::kind`], [`Error::raw_os_error`]) and names the
//!   file. A missing permission is `PermissionDenied`, not `NotFound`.
//! * **What the page cache has is known and left alone**: [`Source::residency`] says how much of a range is
//!   in it, [`Source::direct`] reads past it, [`Source::forget`] drops what a read brought in.
//! * **A name from a stranger's file leads nowhere else**: [`beneath::open`] opens regular files beneath
//!   a folder, and a symbolic link out of it is refused.
//!
//! ```
//! use tonnage_storage::{AtomicFile, AtomicOptions, FileSource, Sink, Source};
//! # fn main() -> Result<(), tonnage_storage::Error> {
//! # let folder = tempfile::tempdir().unwrap();
//! let path = folder.path().join("weights.bin");
//! let file = AtomicFile::create(&path, &AtomicOptions::default())?;
//! file.write_all_at(0, b"forty-two")?;
//! file.commit()?;
//!
//! let source = FileSource::open(&path)?;
//! let mut word = [0; 3];
//! source.read_exact_at(6, &mut word)?;
//! assert_eq!((&word, source.len()), (b"two", 9));
//! # Ok(())
//! # }
//! ```
//!
//! It leaves out what the bytes mean: no dtypes, headers or tensors here.

mod ahead;
mod atomic;
pub mod beneath;
mod direct;
mod direct_write;
mod error;
mod file;
mod kind;
mod memory;
mod mmap;
pub mod pages;
mod residency;
mod shared;
mod sink;
mod source;
pub mod temp;
pub mod uring;
pub mod window;

pub use ahead::ReadAhead;
pub use atomic::{AtomicFile, AtomicOptions, Durability, Staged, lock_folder, sync_dir, try_lock};
pub use direct::{DirectAlign, DirectRead};
pub use error::Error;
pub use file::FileSource;
pub use kind::StorageKind;
pub use memory::MemorySource;
pub use mmap::{MmapSource, PrivateMap};
pub use residency::Residency;
pub use shared::{SharedFile, is_coherent};
pub use sink::{DirectWrite, MemorySink, Sink};
pub use source::Source;
