//! Writing GGUF files: replaced whole or not at all, as every save.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonnage_engine::{self as engine, Options, Put};
use tonnage_foreign::gguf::{
    ByteOrder, GgmlType, Gguf, Limits, OwnedValue, Reason, Swapped, TensorSpec, WriteOptions,
    layout,
};
use tonnage_storage::{AtomicFile, AtomicOptions, Durability, MemorySource, Sink, Source, Staged};

use crate::checkpoint::Note;
use crate::checksums::hash_of;
use crate::error::{Error, Result};
use crate::load::OnProgressOf;
use crate::save::{Kept, Saved, commit_one};
use crate::tensor::TensorRef;

/// How a GGUF file is saved.
#[derive(Clone, Debug, Default)]
pub struct GgufSave<'a> {
    /// Version and byte order. Tensors are given little-endian whatever it says.
    pub write: WriteOptions,
    /// What the save survives.
    pub durability: Durability,
    /// As [`Options::threads`].
    pub threads: Option<usize>,
    /// As [`Options::progress`].
    pub progress: Option<OnProgressOf<'a>>,
    /// As [`Options::cancel`].
    pub cancel: Option<&'a engine::Cancel>,
    /// Put the BLAKE3 hash of the file beside it (spec 13.14).
    pub sidecar: bool,
    /// As [`Save::keep`](crate::Save::keep): stored tensors are compared with the checksums of their files, and the
    /// hash is put beside the file if one lay beside one of those. GGUF has no place for checksums of chunks.
    pub keep: bool,
}

impl GgufSave<'_> {
    pub(crate) fn options(&self) -> Options<'_> {
        Options {
            threads: self.threads,
            cancel: self.cancel,
            progress: self
                .progress
                .as_ref()
                .map(|OnProgressOf(progress)| *progress),
            ..Options::default()
        }
    }
}

/// A tensor to be saved.
#[derive(Clone, Copy, Debug)]
pub struct GgufItem<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type.
    pub ty: GgmlType,
    /// Its extents in elements, row-major.
    pub shape: &'a [u64],
    /// Its bytes.
    pub content: GgufContent<'a>,
}

/// Where a tensor's bytes come from.
#[derive(Clone, Copy, Debug)]
pub enum GgufContent<'a> {
    /// Memory.
    Bytes(&'a [u8]),
    /// A tensor of a checkpoint that has the bytes as they are; read block by block while it is written.
    Stored(TensorRef<'a>),
}

/// Saves a GGUF file: metadata and tensors in the order in which they are given. The alignment is what
/// `general.alignment` says, or 32.
///
/// # Errors
/// What cannot be written (docs/gguf.md, chapters 2 to 5 and 10); what the system said; `CANCELLED`. Whatever
/// the error, what was there before is still there, whole.
pub fn save_gguf(
    kv: &[(String, OwnedValue)],
    items: &[GgufItem<'_>],
    path: impl AsRef<Path>,
    save: &GgufSave<'_>,
) -> Result<Saved> {
    let path = path.as_ref();
    let specs: Vec<TensorSpec<'_>> = items
        .iter()
        .map(
            |&GgufItem {
                 name, ty, shape, ..
             }| TensorSpec { name, ty, shape },
        )
        .collect();
    let label = path.display().to_string();
    let in_file = |e: tonnage_foreign::gguf::Error| Error::from(e).in_file(label.clone());
    let plan = layout(kv, &specs, &save.write).map_err(in_file)?;
    for (item, &(_, len)) in items.iter().zip(&plan.places) {
        let found = match item.content {
            GgufContent::Bytes(bytes) => bytes.len() as u64,
            GgufContent::Stored(tensor) => tensor.byte_len(),
        };
        if found != len {
            let wrong = tonnage_foreign::gguf::Error::new(Reason::WriteSize).tensor(item.name);
            return Err(in_file(
                wrong.found(format_args!("{found} bytes")).needed(len),
            ));
        }
    }
    // What was laid out is read as any file is: where each tensor goes, and what is turned round.
    let header = Gguf::parse(plan.header, plan.file_len, &Limits::default()).map_err(in_file)?;
    let parts = items.iter().map(|item| item.content).collect();
    let start = std::time::Instant::now();
    let (staged, report) = write_file(path, &header, parts, &[], save)?;
    let notes = staged.notes.clone();
    staged.commit()?;
    Ok(Saved {
        files: vec![path.to_owned()],
        index: None,
        notes,
        total_size: plan
            .places
            .iter()
            .fold(0, |sum: u64, &(_, len)| sum.saturating_add(len)),
        report: engine::Report {
            seconds: start.elapsed().as_secs_f64(),
            ..report
        },
    })
}

/// Writes a file of this header, without giving it its name yet: its tensors, in the order of the header, and
/// what lies between them, as `(offset, bytes)`; the rest is zero.
pub(crate) fn write_file(
    path: &Path,
    header: &Gguf,
    tensors: Vec<GgufContent<'_>>,
    between: &[(u64, Vec<u8>)],
    save: &GgufSave<'_>,
) -> Result<(Written, engine::Report)> {
    let options = AtomicOptions {
        durability: save.durability,
        ..AtomicOptions::default()
    };
    let file = AtomicFile::create(path, &options)?;
    file.reserve(header.file_len())?;
    file.set_len(header.file_len())?;
    let turned = turned(header, &tensors)?;
    let mut puts = vec![Put::bytes(0, header.bytes())];
    puts.extend(
        between
            .iter()
            .map(|(offset, bytes)| Put::bytes(*offset, bytes)),
    );
    for (position, (tensor, content)) in header.tensors().zip(&tensors).enumerate() {
        let (offset, len) = (tensor.offset, tensor.len);
        let swapped = turned.get(position).and_then(Option::as_ref);
        puts.push(match (content, swapped) {
            (GgufContent::Bytes(_), Some(swapped)) => Put::source(offset, swapped, 0, len),
            (GgufContent::Stored(stored), Some(swapped)) => {
                Put::source(offset, swapped, stored.offset(), len)
            }
            (GgufContent::Bytes(bytes), None) => Put::bytes(offset, bytes),
            (GgufContent::Stored(stored), None) => {
                Put::source(offset, stored.source()?, stored.offset(), len)
            }
        });
    }
    let stored = tensors.iter().filter_map(|content| match content {
        GgufContent::Stored(tensor) if save.keep => Some(*tensor),
        _ => None,
    });
    let quiet = Options {
        progress: None,
        ..save.options()
    };
    let kept = Kept::of_tensors(stored, &quiet)?;
    let options = Options {
        check: kept.check(),
        ..save.options()
    };
    let copied = engine::put(&file, &puts, None, &options).map_err(Error::from);
    let report = copied.map_err(|error| kept.named(error))?;
    kept.rest(&quiet).map_err(|error| kept.named(error))?;
    drop(puts);
    let hash = (save.sidecar || kept.sidecar()).then(|| hash_of(&file, &quiet));
    let hash = hash.transpose()?;
    let lost = kept.checksums().then(|| Note {
        code: "CHECKSUM_LEFT_OUT",
        text: "GGUF has no place for the checksums of chunks; what was read was compared with them"
            .into(),
        file: Some(path.display().to_string()),
    });
    let written = Written {
        staged: file.stage()?,
        path: path.to_owned(),
        hash,
        durability: save.durability,
        notes: kept.notes.into_iter().chain(lost).collect(),
    };
    Ok((written, report))
}

/// A complete file that has no name yet.
#[derive(Debug)]
pub(crate) struct Written {
    staged: Staged,
    path: PathBuf,
    hash: Option<[u8; 32]>,
    durability: Durability,
    /// What became of checksums that could not be kept.
    pub notes: Vec<Note>,
}

impl Written {
    /// Gives it its name, and its sidecar after it.
    ///
    /// # Errors
    /// What the system said.
    pub fn commit(self) -> Result<()> {
        commit_one(self.staged, &self.path, self.hash, self.durability)
    }
}

/// Sources that turn tensors round, where the file is big-endian: what turns a number round turns it back.
fn turned(header: &Gguf, tensors: &[GgufContent<'_>]) -> Result<Vec<Option<Swapped>>> {
    if header.byte_order() == ByteOrder::Little {
        return Ok(Vec::new());
    }
    let one = |(position, content): (usize, &GgufContent<'_>)| {
        let (source, offset): (Arc<dyn Source>, u64) = match content {
            GgufContent::Bytes(bytes) => (Arc::new(MemorySource::new(*bytes, "<bytes>")), 0),
            GgufContent::Stored(stored) => (stored.shared_source()?, stored.offset()),
        };
        let place = |at| (at == position).then_some(offset);
        Ok(Swapped::at(header, &source, place))
    };
    tensors.iter().enumerate().map(one).collect()
}

/// The path of file `position` of `count` that go to `path`.
pub(crate) fn numbered_path(path: &Path, position: usize, count: usize) -> Result<PathBuf> {
    if count == 1 {
        return Ok(path.to_owned());
    }
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let stem =
        stem.ok_or_else(|| Error::usage("WRITER", format!("{} is no file name", path.display())))?;
    Ok(path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", position + 1)))
}
