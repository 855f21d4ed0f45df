//! Other containers of tensors, read into a catalog: name, dtype, shape, file, offset, length.
//!
//! This crate promises that reading runs no code of a file, never panics, and asks for no memory that the
//! file's real length does not justify.
