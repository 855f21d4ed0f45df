//! GGUF files as checkpoints (docs/gguf.md): opened, looked into, written, carried through safetensors.
//!
//! A GGUF checkpoint is one like any other; blocks are rows of bytes. What the bytes mean, and the metadata
//! with their types, are here: [`Checkpoint::gguf`].

mod convert;
mod export;
mod open;
mod verify;
mod write;

pub use tonnage_foreign::gguf::{
    Array, ByteOrder, GgmlType, Gguf, GgufTensor, Layout, OwnedValue, TensorSpec, Text, Value,
    ValueType, Values, WriteOptions, is_carried, layout, names,
};

use crate::checkpoint::Checkpoint;

pub use convert::{Convert, Converted, convert};
pub use export::{Export, Exported, export};
pub use write::{GgufContent, GgufItem, GgufSave, save_gguf};

pub(crate) use open::{assemble, find_in, others_of, read_header};
pub(crate) use verify::look;

/// The headers of a checkpoint of GGUF files.
#[derive(Clone, Copy, Debug)]
pub struct GgufFiles<'a>(&'a [Gguf]);

impl<'a> GgufFiles<'a> {
    /// The headers, in the order of [`Checkpoint::files`].
    pub fn files(&self) -> &'a [Gguf] {
        self.0
    }

    /// The tensors in the order of the headers, each with the position of its file.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, GgufTensor<'a>)> + use<'a> {
        let files = self.0.iter().enumerate();
        files.flat_map(|(file, gguf)| gguf.tensors().map(move |tensor| (file, tensor)))
    }

    /// The tensor of this name: its type and its logical shape.
    pub fn get(&self, name: &str) -> Option<GgufTensor<'a>> {
        self.0.iter().find_map(|gguf| gguf.get(name))
    }

    /// The metadata value of a key. The first file that has it counts: of a split model that is the first.
    pub fn value(&self, key: &str) -> Option<Value<'a>> {
        self.0.iter().find_map(|gguf| gguf.value(key))
    }

    /// The names of its tensors elsewhere, if its architecture is one that is known.
    pub fn names(&self) -> Option<&'static names::Names> {
        names::Names::of_architecture(self.value("general.architecture")?.as_str()?)
    }
}

impl Checkpoint {
    /// What its headers say, if it was opened from GGUF files.
    pub fn gguf(&self) -> Option<GgufFiles<'_>> {
        (!self.gguf.is_empty()).then_some(GgufFiles(&self.gguf))
    }
}
