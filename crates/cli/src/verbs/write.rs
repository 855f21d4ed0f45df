//! Writing a copy: what `cast`, `convert`, `shard`, `merge` and `rename --output` have in common.

use std::io::Write;
use std::path::Path;

use serde_json::json;
use tonnage::format::Dtype;
use tonnage::{
    Checkpoint, Content, Durability, Item, OnProgressOf, Save, Saved, TensorRef, save_items,
};

use crate::args::{Common, Sums, Target};
use crate::exit::{Failure, OK};
use crate::terminal::{Bar, Out, cancel};
use crate::{json, text};

/// Where and how a copy is written.
pub struct Copying<'a> {
    /// What is written.
    pub output: &'a Path,
    /// Bytes of a file at most.
    pub max_size: Option<u64>,
    /// Replace what is there.
    pub force: bool,
    /// Wait for the disk.
    pub sync: bool,
    /// What becomes of checksums.
    pub sums: Sums,
}

impl<'a> Copying<'a> {
    /// As the arguments say.
    pub fn to(target: &'a Target, max_size: Option<u64>) -> Self {
        let Target {
            output,
            force,
            no_sync,
            sums,
            ..
        } = target;
        Copying {
            output,
            max_size,
            force: *force,
            sync: !no_sync,
            sums: *sums,
        }
    }

    /// Writes every tensor of the checkpoint, with the name and the dtype that `change` gives it,
    /// and says what was written.
    ///
    /// # Errors
    /// A target that is there already; everything that reading and saving can say.
    pub fn run<'t>(
        &self,
        checkpoint: &'t Checkpoint,
        change: impl Fn(&TensorRef<'t>) -> Result<(&'t str, Dtype), Failure>,
        common: &Common,
        out: &mut Out,
    ) -> Result<u8, Failure> {
        let mut items = Vec::with_capacity(checkpoint.len());
        for tensor in checkpoint.iter() {
            let (name, dtype) = change(&tensor)?;
            items.push(Item {
                name,
                dtype,
                shape: tensor.shape(),
                content: Content::Stored(tensor),
            });
        }
        let metadata = checkpoint.metadata().clone().into_iter().collect();
        self.with(items.len() as u64, common, out, |save| {
            let save = Save {
                metadata,
                ..save.clone()
            };
            save_items(&items, self.output, &save)
        })
    }

    /// Writes `tensors` tensors by `write`, and says what was written.
    ///
    /// # Errors
    /// A target that is there already; what `write` says.
    pub fn with(
        &self,
        tensors: u64,
        common: &Common,
        out: &mut Out,
        write: impl FnOnce(&Save<'_>) -> tonnage::Result<Saved>,
    ) -> Result<u8, Failure> {
        self.with_notes(tensors, common, out, |save| Ok((write(save)?, Vec::new())))
    }

    /// As [`Copying::with`]; `write` also gives what is to be said of it, a sentence each.
    ///
    /// # Errors
    /// As [`Copying::with`].
    pub fn with_notes(
        &self,
        tensors: u64,
        common: &Common,
        out: &mut Out,
        write: impl FnOnce(&Save<'_>) -> tonnage::Result<(Saved, Vec<String>)>,
    ) -> Result<u8, Failure> {
        self.must_be_free()?;
        let bar = Bar::new("writing", 0);
        let progress = |progress| bar.set(progress);
        let save = Save {
            max_shard_size: self.max_size,
            durability: if self.sync {
                Durability::Full
            } else {
                Durability::None
            },
            progress: Some(OnProgressOf(&progress)),
            cancel: Some(cancel()),
            checksums: self.sums.checksums,
            keep: !self.sums.no_checksums,
            ..Save::default()
        };
        let (saved, notes) = write(&save)?;
        drop(bar);
        let output = self.output.to_string_lossy();
        if common.json {
            let files: Vec<_> = saved
                .files
                .iter()
                .map(|file| file.to_string_lossy())
                .collect();
            let told = notes
                .iter()
                .map(|text| json!({"code": "CONVERSION", "text": text, "file": null}));
            let notes: Vec<_> = told.chain(super::notes(&saved.notes)).collect();
            let report = json!({
                "schema": "tonnage.write/1", "output": output, "files": files,
                "index": saved.index.as_ref().map(|index| index.to_string_lossy()),
                "tensors": tensors, "bytes": saved.total_size, "seconds": saved.report.seconds,
                "notes": notes,
            });
            json::write(out, &report)?;
            return Ok(OK);
        }
        let index = if saved.index.is_some() {
            " and an index"
        } else {
            ""
        };
        writeln!(
            out,
            "{}: {} in {}{index}, {}, {:.2} s",
            text::name(&output),
            text::plural(tensors, "tensor"),
            text::plural(saved.files.len() as u64, "file"),
            text::size(saved.total_size),
            saved.report.seconds,
        )?;
        for note in &notes {
            writeln!(out, "  {}", text::name(note))?;
        }
        super::tell_notes(&saved.notes, out)?;
        Ok(OK)
    }

    /// Refuses to write over a checkpoint, unless it was asked for.
    ///
    /// # Errors
    /// A target that is there already.
    pub fn must_be_free(&self) -> Result<(), Failure> {
        if self.force {
            return Ok(());
        }
        let taken = match std::fs::read_dir(self.output) {
            // A folder may be there, and hold other files (a config, a tokenizer), but no checkpoint.
            Ok(entries) => entries.flatten().any(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
            }),
            Err(_) => self.output.symlink_metadata().is_ok(),
        };
        if taken {
            let text = format!(
                "{} is there already; --force replaces it",
                self.output.display()
            );
            return Err(Failure::Usage(text));
        }
        Ok(())
    }
}
