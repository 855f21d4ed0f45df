//! The safetensors format: its grammar, its dtypes, its layout rules and its index files.
//!
//! This crate promises:
//! - it does no I/O and has no `unsafe`: bytes and numbers go in, values come out;
//! - it never panics on any input, asks for no memory that the input's real length does not
//!   justify, and checks all arithmetic on numbers from a file;
//! - what it refuses it names: tensor, found, needed, and the clause of the specification;
//! - equal input gives equal bytes, and the default writer's bytes are the reference
//!   implementation's.
//!
//! ```
//! use tonnage_format::{Dtype, Header, ReadOptions, Step, TensorSpec, WriteOptions, layout, probe};
//!
//! // Write: the header's bytes and the place of each tensor.
//! let tensors = [TensorSpec { name: "w", dtype: Dtype::BF16, shape: &[4, 2] }];
//! let plan = layout(&tensors, Some(&[("format", "pt")]), &WriteOptions::default())?;
//!
//! // Read: ask what is needed, fetch it from anywhere, parse.
//! let options = ReadOptions::strict();
//! assert_eq!(probe(&[], Some(plan.file_len), &options)?, Step::Need { offset: 0, len: 8 });
//! let header = Header::parse(&plan.header[..], Some(plan.file_len), &options)?;
//! assert_eq!(header.get("w").unwrap().byte_len(), 16);
//! # Ok::<(), tonnage_format::Error>(())
//! ```
//!
//! What it leaves out: reading and writing files (`tonnage-storage`), what quantised bytes mean,
//! and any conversion of values. Without the default feature `std` it is `no_std + alloc`.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(feature = "std", test))]
extern crate std;

mod catalog;
mod checksums;
mod dtype;
mod error;
pub mod forever;
mod header;
mod index;
mod json;
mod keys;
mod limits;
mod lint;
mod names;
mod order;
mod room;
mod scan;
pub mod slice;
mod tiling;
mod writer;

pub use catalog::{Catalog, CatalogBuilder, Row, Source};
pub use checksums::Checksums;
pub use dtype::{Dtype, DtypeRow, Kind};
pub use error::{Class, Error, Reason};
pub use header::{Header, Metadata, Step, TensorDtype, TensorInfo, probe};
pub use index::{Index, IndexBuilder, check_shard_path, shard_file_name, shard_number};
pub use limits::{Limits, Quirks, ReadOptions};
pub use lint::Lint;
pub use writer::{Align, Layout, Order, TensorSpec, WriteOptions, layout};
