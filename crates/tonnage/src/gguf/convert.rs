//! GGUF to safetensors and back, byte for byte (docs/gguf.md, chapter 9).

use std::path::{Path, PathBuf};

use tonnage_foreign::gguf::{
    self as foreign, Gguf, HEADER, LENGTHS, PADDING, Reason, carried_files, carried_lengths, gaps,
    is_carried, numbered, restored,
};
use tonnage_format::Dtype;

use super::write::{GgufContent, GgufItem, GgufSave, numbered_path, save_gguf, write_file};
use super::{GgufFiles, OwnedValue};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::save::{Content, Item, Save, Saved, save_items};

/// How to convert.
pub type Convert<'a> = Save<'a>;
/// What a conversion made.
pub type Converted = Saved;

/// Writes a checkpoint in another container. A target that ends in `.gguf` becomes GGUF, any other
/// safetensors, as for [`crate::save_items`].
///
/// * GGUF to safetensors: tensors verbatim, blocks as rows of bytes, and what is needed to make the file again.
/// * Safetensors that carry a GGUF header to GGUF: the file that they were made of, byte for byte; split models
///   become their files again, `NAME-00001-of-0000N.gguf`.
/// * GGUF to GGUF: a copy; a split model becomes one file.
/// * Safetensors to safetensors: a copy.
///
/// Metadata in `save` comes on top of the checkpoint's. Memory does not depend on the size of the model.
///
/// # Errors
/// `GGUF_NO_HEADER` and `GGUF_CARRIED` (G9.3, G9.4); those of reading and saving.
pub fn convert(
    checkpoint: &Checkpoint,
    target: impl AsRef<Path>,
    save: &Save<'_>,
) -> Result<Saved> {
    let target = target.as_ref();
    let to_gguf = target
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    match (checkpoint.gguf(), to_gguf) {
        (Some(files), true) => copy(checkpoint, files, target, save),
        (Some(files), false) => carry(checkpoint, files, target, save),
        (None, true) => restore(checkpoint, target, save),
        (None, false) => {
            let items = checkpoint.iter().map(item).collect::<Result<Vec<_>>>()?;
            save_items(&items, target, &with_metadata(checkpoint, &[], save))
        }
    }
}

fn item(tensor: crate::TensorRef<'_>) -> Result<Item<'_>> {
    Ok(Item {
        name: tensor.name(),
        dtype: tensor.dtype()?,
        shape: tensor.shape(),
        content: Content::Stored(tensor),
    })
}

fn with_metadata<'a>(
    checkpoint: &Checkpoint,
    extra: &[(String, String)],
    save: &Save<'a>,
) -> Save<'a> {
    let mut metadata = match checkpoint.gguf() {
        // The rest comes with the header.
        Some(_) => checkpoint
            .metadata()
            .get_key_value("quant.map")
            .into_iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        None => checkpoint.metadata().clone(),
    };
    metadata.extend(extra.iter().cloned());
    metadata.extend(save.metadata.iter().cloned());
    Save {
        metadata: metadata.into_iter().collect(),
        ..save.clone()
    }
}

fn carry(
    checkpoint: &Checkpoint,
    files: GgufFiles<'_>,
    target: &Path,
    save: &Save<'_>,
) -> Result<Saved> {
    let headers: Vec<&Gguf> = files.files().iter().collect();
    let read = |file: usize, begin: u64, end: u64| -> Result<Vec<u8>> {
        let mut bytes = crate::tensor::room(end.saturating_sub(begin))?;
        if let Some(source) = checkpoint.source(file) {
            source.read_exact_at(begin, &mut bytes)?;
        }
        Ok(bytes)
    };
    let (carried, metadata) = carried_files(&headers, read)?;
    let mut items = checkpoint.iter().map(item).collect::<Result<Vec<_>>>()?;
    let shapes: Vec<[u64; 1]> = carried
        .iter()
        .map(|(_, bytes)| [bytes.len() as u64])
        .collect();
    for ((name, bytes), shape) in carried.iter().zip(&shapes) {
        items.push(Item {
            name,
            dtype: Dtype::U8,
            shape,
            content: Content::Bytes(bytes),
        });
    }
    save_items(&items, target, &with_metadata(checkpoint, &metadata, save))
}

pub(super) fn gguf_save<'a>(save: &Save<'a>) -> GgufSave<'a> {
    GgufSave {
        durability: save.durability,
        threads: save.threads,
        progress: save.progress,
        cancel: save.cancel,
        sidecar: save.sidecar,
        keep: save.keep,
        ..GgufSave::default()
    }
}

/// A copy: of one file as it is, of several as one.
fn copy(
    checkpoint: &Checkpoint,
    files: GgufFiles<'_>,
    target: &Path,
    save: &Save<'_>,
) -> Result<Saved> {
    if let [only] = files.files() {
        let read = |(begin, end): (u64, u64)| -> Result<(u64, Vec<u8>)> {
            let mut bytes = crate::tensor::room(end.saturating_sub(begin))?;
            if let Some(source) = checkpoint.source(0) {
                source.read_exact_at(begin, &mut bytes)?;
            }
            Ok((begin, bytes))
        };
        let between = gaps(only)
            .into_iter()
            .map(read)
            .collect::<Result<Vec<_>>>()?;
        let contents = only.tensors().map(|tensor| stored(checkpoint, tensor.name));
        let contents = contents.collect::<Result<Vec<_>>>()?;
        return publish(&[(target.to_owned(), only, contents, between)], save);
    }
    let first = files.files().first();
    let kv: Vec<(String, OwnedValue)> = first
        .into_iter()
        .flat_map(Gguf::metadata)
        .filter(|(key, _)| !key.starts_with("split."))
        .map(|(key, value)| (key.to_owned(), value.into()))
        .collect();
    let tensors: Vec<_> = files.tensors().map(|(_, tensor)| tensor).collect();
    let mut items = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        items.push(GgufItem {
            name: tensor.name,
            ty: tensor.ty,
            shape: tensor.logical_shape,
            content: stored(checkpoint, tensor.name)?,
        });
    }
    let mut how = gguf_save(save);
    if let Some(first) = first {
        how.write = foreign::WriteOptions {
            version: first.version(),
            order: first.byte_order(),
        };
    }
    save_gguf(&kv, &items, target, &how)
}

fn stored<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<GgufContent<'a>> {
    checkpoint.tensor(name).map(GgufContent::Stored)
}

/// A file to be written: its path, its header, its tensors in the order of the header, what lies between them.
type Part<'a> = (PathBuf, &'a Gguf, Vec<GgufContent<'a>>, Vec<(u64, Vec<u8>)>);

/// Writes all files, and only then gives them their names.
fn publish(parts: &[Part<'_>], save: &Save<'_>) -> Result<Saved> {
    let start = std::time::Instant::now();
    let how = gguf_save(save);
    let mut saved = Saved::default();
    let mut staged = Vec::with_capacity(parts.len());
    for (path, header, contents, between) in parts {
        let (file, report) = write_file(path, header, contents.clone(), between, &how)?;
        staged.push(file);
        saved.files.push(path.clone());
        let bytes = header
            .tensors()
            .fold(0, |sum: u64, tensor| sum.saturating_add(tensor.len));
        saved.total_size = saved.total_size.saturating_add(bytes);
        saved.report = report;
    }
    for mut file in staged {
        saved.notes.append(&mut file.notes);
        file.commit()?;
    }
    saved.report.bytes = saved.total_size;
    saved.report.seconds = start.elapsed().as_secs_f64();
    Ok(saved)
}

/// Makes the files again whose headers a checkpoint carries.
fn restore(checkpoint: &Checkpoint, target: &Path, save: &Save<'_>) -> Result<Saved> {
    let refuse = |reason: Reason| foreign::Error::new(reason);
    let label = || {
        checkpoint
            .files()
            .first()
            .map_or(String::new(), |file| file.label.clone())
    };
    let in_file = |e: foreign::Error| Error::from(e).in_file(label());
    let lengths = match checkpoint.metadata().get(LENGTHS) {
        Some(text) => carried_lengths(text).map_err(in_file)?,
        None => {
            let wrong = refuse(Reason::NoHeader).found("no metadata gguf.lengths");
            return Err(in_file(
                wrong.needed("files that a GGUF file was converted to"),
            ));
        }
    };
    let mut headers = Vec::with_capacity(lengths.len().min(checkpoint.len()));
    for (position, &len) in lengths.iter().enumerate() {
        let name = numbered(HEADER, position, lengths.len());
        let bytes = bytes_of(checkpoint, &name)?;
        let bytes =
            bytes.ok_or_else(|| in_file(refuse(Reason::Carried).tensor(&name).needed("it")))?;
        headers.push(restored(bytes, len).map_err(in_file)?);
    }
    check_tensors(checkpoint, &headers).map_err(in_file)?;
    let mut parts: Vec<Part<'_>> = Vec::with_capacity(headers.len());
    for (position, header) in headers.iter().enumerate() {
        let contents = header
            .tensors()
            .map(|tensor| stored(checkpoint, tensor.name));
        let contents = contents.collect::<Result<Vec<_>>>()?;
        let padding = numbered(PADDING, position, headers.len());
        let between = match bytes_of(checkpoint, &padding)? {
            None => Vec::new(),
            Some(bytes) => between(header, &bytes).ok_or_else(|| {
                let wrong = refuse(Reason::Carried).tensor(&padding);
                in_file(wrong.found(format_args!("{} bytes", bytes.len())))
            })?,
        };
        let path = numbered_path(target, position, headers.len())?;
        parts.push((path, header, contents, between));
    }
    publish(&parts, save)
}

/// The bytes of a tensor, if there is one of this name.
fn bytes_of(checkpoint: &Checkpoint, name: &str) -> Result<Option<Vec<u8>>> {
    checkpoint.get(name).map(|tensor| tensor.read()).transpose()
}

/// What was carried of the bytes between tensors, each where it belongs.
fn between(header: &Gguf, mut bytes: &[u8]) -> Option<Vec<(u64, Vec<u8>)>> {
    let mut placed = Vec::new();
    for (begin, end) in gaps(header) {
        let len = usize::try_from(end.checked_sub(begin)?).ok()?;
        let (part, rest) = bytes.split_at_checked(len)?;
        placed.push((begin, part.to_vec()));
        bytes = rest;
    }
    bytes.is_empty().then_some(placed)
}

/// Every tensor of the headers is there as it was, and no other but what is carried.
fn check_tensors(checkpoint: &Checkpoint, headers: &[Gguf]) -> Result<(), foreign::Error> {
    let refuse = |name: &str| foreign::Error::new(Reason::Carried).tensor(name);
    let mut count = 0;
    for tensor in headers.iter().flat_map(Gguf::tensors) {
        let Some(found) = checkpoint.get(tensor.name) else {
            return Err(refuse(tensor.name)
                .found("no tensor of this name")
                .needed("it"));
        };
        let (dtype, shape) = (tensor.dtype(), tensor.stored_shape());
        if found.dtype_name() != dtype.name() || found.shape() != shape {
            let there = format!("{} {:?}", found.dtype_name(), found.shape());
            return Err(refuse(tensor.name)
                .found(there)
                .needed(format_args!("{dtype:?} {shape:?}")));
        }
        count += 1;
    }
    let more = checkpoint.names().filter(|name| !is_carried(name));
    if more.count() != count {
        let known = |name: &&str| headers.iter().any(|header| header.get(name).is_some());
        let strange = checkpoint
            .names()
            .find(|name| !is_carried(name) && !known(name));
        let wrong = refuse(strange.unwrap_or_default());
        return Err(wrong.found("a tensor that the carried header does not have"));
    }
    Ok(())
}
