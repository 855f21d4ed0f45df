//! GGUF, versions 2 and 3, in either byte order (docs/gguf.md).
//!
//! ```text
//! ┌──────┬─────────┬─────────┬─────────┬──────────────┬─────────────────┬─────┬──────────────────────┐
//! │ GGUF │ version │ tensors │ entries │ key type value … │ name dims type offset … │ pad │ data, each aligned   │
//! └──────┴─────────┴─────────┴─────────┴──────────────┴─────────────────┴─────┴──────────────────────┘
//! ```
//!
//! Nothing here reads a file: [`probe`] says how many bytes of its start are needed, and [`Gguf::parse`] makes
//! of them a table of metadata and tensors. Neither copies a value; both check every number against the real
//! length of the file before anything is asked for.
//!
//! ```
//! use tonnage_foreign::gguf::{Gguf, Limits, OwnedValue, TensorSpec, WriteOptions, layout};
//! use tonnage_quant::ggml::GgmlType;
//!
//! let ty = GgmlType::F32;
//! let kv = [("general.architecture".to_owned(), OwnedValue::String("llama".into()))];
//! let plan = layout(&kv, &[TensorSpec { name: "w", ty, shape: &[2, 3] }], &WriteOptions::default())?;
//! let gguf = Gguf::parse(plan.header, plan.file_len, &Limits::default())?;
//! assert_eq!(gguf.get("w").unwrap().logical_shape, [2, 3]);
//! assert_eq!(gguf.value("general.architecture").unwrap().as_str(), Some("llama"));
//! # Ok::<(), tonnage_foreign::gguf::Error>(())
//! ```

mod carry;
mod error;
mod header;
mod limits;
mod map;
pub mod names;
mod owned;
mod scan;
mod split;
mod swapped;
mod types;
mod value;
mod write;

pub use carry::{
    Carried, HEADER, LENGTHS, PADDING, carried_files, carried_lengths, gaps, is_carried, numbered,
    restored,
};
pub use error::{Error, Reason};
pub use header::{Gguf, GgufTensor, is_gguf, probe};
pub use limits::Limits;
pub use map::quant_map;
pub use owned::OwnedValue;
pub use split::{Split, check_split, split_name};
pub use swapped::Swapped;
pub use types::{GgmlType, dtype_of};
pub use value::{Array, ByteOrder, Text, Value, ValueType, Values};
pub use write::{Layout, TensorSpec, WriteOptions, layout};
