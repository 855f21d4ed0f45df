//! The façade.

pub use tonnage_engine as engine;
pub use tonnage_format as format;
pub use tonnage_storage as storage;

pub mod cast;
pub mod compat;
pub mod diff;
pub mod stats;
pub mod values;
