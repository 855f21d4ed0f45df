//! The public API of the reference crate `safetensors` 0.8, name for name, on Tonnage's reader and writer.
//!
//! A program moves over by writing `use tonnage::compat as safetensors;`, or by a crate named
//! `safetensors` that says `pub use tonnage::compat::*;` under `[patch.crates-io]`, which moves its
//! dependencies too. Types, variants, bounds and `Display` texts are the reference's.
//!
//! ```
//! use tonnage::compat::{Dtype, SafeTensors, serialize, tensor::TensorView};
//!
//! let bytes: Vec<u8> = [1.0_f32, 2.0].into_iter().flat_map(f32::to_le_bytes).collect();
//! let view = TensorView::new(Dtype::F32, vec![2], &bytes)?;
//! let file = serialize([("w", &view)], None)?;
//!
//! let tensors = SafeTensors::deserialize(&file)?;
//! assert_eq!(tensors.tensor("w")?, view);
//! # Ok::<(), tonnage::compat::SafeTensorError>(())
//! ```
//!
//! What differs, on purpose:
//! - files are judged by the specification, null metadata taken for absent (clause 10.1): a repeated name
//!   or an entry written as an array is refused. [`SafeTensors::deserialize_with`] takes the reference's verdicts;
//! - names are listed in the order of the file, not in that of a hash map;
//! - `__metadata__` is written sorted, so equal input gives equal files;
//! - [`serialize_to_file`] brings the file to the disk, keeps the mode of the file it replaces and follows
//!   symbolic links;
//! - where the reference panics, wraps around or writes a file that nobody can read (repeated names, sizes
//!   that overflow, reversed slices, a [`View`] that returns less than it promised), this is an error.
//!
//! The reference without its feature `std` takes `HashMap` from `hashbrown`; here it is always the one of
//! `std`.

pub mod slice;
pub mod tensor;

pub use tensor::{
    Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo, TensorView, View, serialize,
    serialize_to_file,
};
