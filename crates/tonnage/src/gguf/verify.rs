//! Verifying GGUF files: headers and places of tensors, one file after the other, then how they fit together.

use std::sync::Arc;

use tonnage_foreign::gguf::Gguf;
use tonnage_storage::Source;

use crate::error::Result;
use crate::open::{AnyHeader, OpenOptions, read_any_header};

/// The header of a source that is GGUF; `None` where it is not, and then nothing is said about it.
pub(crate) fn look(source: &Arc<dyn Source>, options: &OpenOptions) -> Option<Result<Gguf>> {
    let mut start = [0; 4];
    let is_gguf = source.read_exact_at(0, &mut start).is_ok()
        && tonnage_foreign::gguf::is_gguf(&start)
        && !source.label().ends_with(".safetensors");
    if !is_gguf {
        return None;
    }
    match read_any_header(&**source, &options.read) {
        Ok(AnyHeader::Gguf(gguf)) => Some(Ok(*gguf)),
        Ok(AnyHeader::Safetensors(_)) => None,
        Err(error) => Some(Err(error)),
    }
}
