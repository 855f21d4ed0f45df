//! What quantised bytes mean: the layout of their codes, their scales and zero points, where they may be cut, and
//! the kernels that turn them into numbers and back.
//!
//! This crate promises:
//! - it does no I/O: bytes and numbers go in, values come out; `unsafe` lives in `arch` alone;
//! - it never panics on any input, asks for no memory that the input's real length does not justify, and
//!   checks all arithmetic on numbers from a file;
//! - a fast path gives the bits that the interpreter gives.

mod arch;
pub mod dequantize;
pub mod descriptor;
mod error;
pub mod ggml;
pub mod interpret;
pub mod layout;
mod loose;
pub mod map;
mod nested;
pub mod numbers;
mod pack;
pub mod packed;
pub mod quantize;
pub mod recognise;
pub mod repack;
pub mod scheme;
mod schemes;
pub mod slice;
pub mod target;

pub use error::{Error, Reason};
