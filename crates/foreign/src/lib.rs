//! Other containers of tensors, read into a catalog: name, dtype, shape, file, offset, length.
//!
//! This crate promises that reading runs no code of a file, never panics, and asks for no memory that the
//! file's real length does not justify.
//!
//! [`gguf`] has the one container that it knows: its grammar, what its header says, how it is written, and
//! what its tensors are called elsewhere. A tensor of blocks becomes a row of bytes, `U8 [.., rows, bytes a
//! row]`, verbatim; what the bytes mean is said by its type ([`gguf::GgufTensor::ty`]) and is the business of
//! `tonnage-quant`.

#![forbid(unsafe_code)]

pub mod gguf;
