//! The most important structures, at the paths where the reference has them.

mod error;
mod metadata;
mod reader;
mod view;
mod writer;

pub use crate::format::Dtype;
pub use error::SafeTensorError;
pub use metadata::{Metadata, TensorInfo};
pub use reader::SafeTensors;
pub use view::{TensorView, View};
pub use writer::{serialize, serialize_to_file};
