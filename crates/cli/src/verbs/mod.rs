//! One file a verb.

mod bench;
mod cast;
mod checksum;
mod convert;
mod devices;
mod diff;
mod inspect;
mod merge;
mod metadata;
mod plan;
mod quantize;
mod rename;
mod reshard;
mod shard;
mod verify;
mod write;

use std::io::Write;
use std::path::Path;

use clap::CommandFactory;
use tonnage::format::ReadOptions;
use tonnage::storage::Source;
use tonnage::{Checkpoint, OpenOptions, TensorRef};

use crate::args::{Cli, Common, Verb};
use crate::exit::{Failure, OK};
use crate::terminal::Out;

/// Runs the verb, and gives the exit code.
///
/// # Errors
/// Why there is no result.
pub fn run(cli: &Cli, out: &mut Out) -> Result<u8, Failure> {
    let common = &cli.common;
    match &cli.verb {
        Verb::Inspect(args) => inspect::run(args, common, out),
        Verb::Verify(args) => verify::run(args, common, out),
        Verb::Diff(args) => diff::run(args, common, out),
        Verb::Metadata(args) => metadata::run(args, common, out),
        Verb::Rename(args) => rename::run(args, common, out),
        Verb::Cast(args) => cast::run(args, common, out),
        Verb::Convert(args) => convert::run(args, common, out),
        Verb::Quantize(args) => quantize::run(args, common, out),
        Verb::Shard(args) => shard::run(args, common, out),
        Verb::Merge(args) => merge::run(args, common, out),
        Verb::Checksum(args) => checksum::run(args, common, out),
        Verb::Plan(args) => plan::run(args, common, out),
        Verb::Reshard(args) => reshard::run(args, common, out),
        Verb::Devices(args) => devices::run(args, common, out),
        Verb::Bench(args) => bench::run(args, common, out),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "tonnage", &mut script);
            std::io::Write::write_all(out, &script)?;
            Ok(OK)
        }
    }
}

fn options(common: &Common) -> OpenOptions {
    let read = if common.compat {
        ReadOptions::compat()
    } else if common.strict {
        ReadOptions::strict()
    } else {
        ReadOptions::default()
    };
    OpenOptions {
        read,
        allow_symlinks: common.follow_links,
    }
}

fn open(path: &Path, common: &Common) -> Result<Checkpoint, Failure> {
    Ok(Checkpoint::open_with(path, &options(common))?)
}

/// A tensor's bytes, block by block.
struct Blocks<'a> {
    source: Option<&'a dyn Source>,
    at: u64,
    end: u64,
    buffer: Vec<u8>,
    block: usize,
}

impl<'a> Blocks<'a> {
    fn new(checkpoint: &'a Checkpoint, tensor: &TensorRef<'_>, block: usize) -> Self {
        let (at, len) = (tensor.offset(), tensor.byte_len());
        Blocks {
            source: checkpoint.source(tensor.file()).map(|source| &**source),
            at,
            end: at.saturating_add(len),
            buffer: Vec::new(),
            block,
        }
    }

    fn next(&mut self) -> Result<Option<&[u8]>, Failure> {
        let Some(source) = self.source.filter(|_| self.at < self.end) else {
            return Ok(None);
        };
        // At most `block`, so it fits.
        let len = (self.end - self.at).min(self.block as u64);
        self.buffer.resize(len as usize, 0);
        source
            .read_exact_at(self.at, &mut self.buffer)
            .map_err(tonnage::Error::from)?;
        self.at += len;
        Ok(Some(&self.buffer))
    }
}

/// A size such as `5GB` or `500MiB`.
fn size(text: &str) -> Result<u64, Failure> {
    Ok(tonnage::parse_size(text)?)
}

/// What became of checksums that could not be kept, as JSON.
fn notes(notes: &[tonnage::Note]) -> Vec<serde_json::Value> {
    let one = |note: &tonnage::Note| serde_json::json!({"code": note.code, "text": note.text, "file": note.file});
    notes.iter().map(one).collect()
}

/// The same, a line each.
fn tell_notes(notes: &[tonnage::Note], out: &mut Out) -> Result<(), Failure> {
    for note in notes {
        let file = note.file.as_deref().unwrap_or_default();
        let (file, text) = (crate::text::name(file), crate::text::line(&note.text));
        writeln!(out, "{file}: note[{}]: {text}", note.code)?;
    }
    Ok(())
}
