//! Checksums of checkpoints whose tensors are copied: what is read is compared with them, and what is written has
//! some again (spec 13.11).

use std::collections::BTreeSet;

use tonnage_engine::{self as engine, Check, Options};
use tonnage_storage::Source;

use super::{Content, Item, Save};
use crate::checkpoint::{Checkpoint, Note};
use crate::checksums::{Carried, Verifying};
use crate::error::{Error, Result};
use crate::tensor::TensorRef;

/// What is kept of the checksums of what is copied.
#[derive(Default)]
pub(crate) struct Kept<'a> {
    checksums: bool,
    sidecar: bool,
    /// What cannot be kept.
    pub notes: Vec<Note>,
    watched: Vec<(&'a Checkpoint, Verifying)>,
}

impl<'a> Kept<'a> {
    /// Of the files that these items are copied from; of none unless [`Save::keep`] says so.
    ///
    /// # Errors
    /// As [`Carried::of`].
    pub fn of_items(items: &[Item<'a>], save: &Save<'_>) -> Result<Self> {
        let options = Options {
            threads: save.threads,
            cancel: save.cancel,
            ..Options::default()
        };
        let stored = items.iter().filter_map(|item| match item.content {
            Content::Stored(tensor) if save.keep => Some(tensor),
            _ => None,
        });
        Self::of_tensors(stored, &options)
    }

    /// Of the files that these tensors lie in.
    ///
    /// # Errors
    /// As [`Carried::of`].
    pub fn of_tensors(
        tensors: impl IntoIterator<Item = TensorRef<'a>>,
        options: &Options<'_>,
    ) -> Result<Self> {
        let mut from: Vec<(&'a Checkpoint, BTreeSet<usize>)> = Vec::new();
        for tensor in tensors {
            let checkpoint = tensor.checkpoint;
            match from
                .iter_mut()
                .find(|(known, _)| std::ptr::eq(*known, checkpoint))
            {
                Some((_, files)) => drop(files.insert(tensor.file())),
                None => from.push((checkpoint, BTreeSet::from([tensor.file()]))),
            }
        }
        let mut kept = Kept::default();
        for (checkpoint, files) in from {
            let mut summed = Vec::new();
            for position in files {
                let file = checkpoint.files().get(position);
                let (Some(file), Some(source)) = (file, checkpoint.source(position)) else {
                    continue;
                };
                let carried = Carried::of(file, &**source, options)?;
                summed.extend(carried.checksums.then_some(position));
                kept.add(carried);
            }
            if !summed.is_empty() {
                let verifying = Verifying::new(checkpoint, summed)?;
                kept.watched.push((checkpoint, verifying));
            }
        }
        Ok(kept)
    }

    /// Takes in what one more file carries.
    pub fn add(&mut self, carried: Carried) {
        self.checksums |= carried.checksums;
        self.sidecar |= carried.sidecar;
        self.notes.extend(carried.notes);
    }

    /// Whether a file had checksums of its data.
    pub fn checksums(&self) -> bool {
        self.checksums
    }

    /// Whether a hash lay beside a file.
    pub fn sidecar(&self) -> bool {
        self.sidecar
    }

    /// How to save, so that what is written has the same kinds.
    pub fn save<'s>(&self, save: &Save<'s>) -> Save<'s> {
        Save {
            checksums: save.checksums || self.checksums,
            sidecar: save.sidecar || self.sidecar,
            ..save.clone()
        }
    }

    /// What looks at the bytes that are read.
    pub fn check(&self) -> Option<&dyn Check> {
        (!self.watched.is_empty()).then_some(self as _)
    }

    /// Compares the rest of the chunks of which bytes were read.
    ///
    /// # Errors
    /// `CHECKSUM_MISMATCH`, still to be [named](Kept::named); what the system said.
    pub fn rest(&self, options: &Options<'_>) -> Result<()> {
        let mut all = self.watched.iter();
        all.try_for_each(|(_, verifying)| verifying.rest(options))
    }

    /// The error, with the tensors where it is about a chunk.
    pub fn named(&self, error: Error) -> Error {
        let all = self.watched.iter();
        all.fold(error, |error, (checkpoint, verifying)| {
            verifying.named(checkpoint, error)
        })
    }
}

impl Check for Kept<'_> {
    fn check(
        &self,
        source: &dyn Source,
        offset: u64,
        parts: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<(), engine::Error> {
        // A source belongs to one checkpoint, and the others take nothing from `parts`.
        let mut all = self.watched.iter();
        all.try_for_each(|(_, verifying)| verifying.check(source, offset, parts))
    }
}
