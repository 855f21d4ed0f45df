//! Folders whose files hold parts of tensors and say so in PyTorch's own words: under [`SHARDING`] in a file's metadata
//! stands at which index of the whole tensor each of its tensors begins. `save_sharded` of the Python package writes
//! them, with the whole extents, and so does PyTorch's `HuggingFaceStorageWriter`, without. Which files belong
//! together says a record beside them; where there is neither a record nor an index, all of the folder's do.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tonnage_plan::{Dims, Part};

use super::reshard::{Tensor, dims};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::open::OpenOptions;

/// The key of a file's metadata that says which parts its tensors are.
const SHARDING: &str = "DCP_SHARDING_INFO";
/// Of which version that is.
const VERSION: &str = "DCP_VERSION";
/// The record, and its version.
const RECORD: &str = "tonnage.shards.json";
const RECORD_VERSION: u64 = 1;
/// Longest record that is read.
const LONGEST: u64 = 64 << 20;

/// The files of a folder, and metadata that is of all of them.
pub(super) type Found = (Vec<Checkpoint>, Vec<(String, String)>);

/// What a folder has, if its files hold parts of tensors.
pub(super) fn find(folder: &Path, options: &OpenOptions) -> Result<Option<Found>> {
    if let Some((files, mut more)) = record(folder)? {
        let files = open(&files, options)?;
        more.extend(common(&files));
        return Ok(Some((files, more)));
    }
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(None);
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    if names
        .iter()
        .any(|name| name.ends_with(".safetensors.index.json"))
    {
        return Ok(None);
    }
    names.retain(|name| name.ends_with(".safetensors") && !name.starts_with('.'));
    names.sort();
    let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
    let files = open(&paths, options)?;
    if !files
        .iter()
        .any(|file| file.metadata().contains_key(SHARDING))
    {
        return Ok(None);
    }
    let more = common(&files);
    Ok(Some((files, more)))
}

fn open(paths: &[PathBuf], options: &OpenOptions) -> Result<Vec<Checkpoint>> {
    paths
        .iter()
        .map(|path| Checkpoint::open_with(path, options))
        .collect()
}

/// The first file's metadata, without what is of that file alone.
fn common(files: &[Checkpoint]) -> Vec<(String, String)> {
    let first = files.first().map(|file| file.metadata().clone());
    first
        .into_iter()
        .flatten()
        .filter(|(key, _)| key != SHARDING && key != VERSION)
        .collect()
}

type Record = (Vec<PathBuf>, Vec<(String, String)>);

/// What a folder's record says, if there is one.
fn record(folder: &Path) -> Result<Option<Record>> {
    let path = folder.join(RECORD);
    let failed = |error| tonnage_storage::Error::new("read", path.to_string_lossy(), error);
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        // A path that is a file has no record in it.
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(None),
        Err(error) => return Err(failed(error).into()),
    };
    let wrong = |what: &str| Error::usage("SHARDS", format!("{}: {what}", path.display()));
    let mut text = Vec::new();
    file.take(LONGEST + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > LONGEST {
        return Err(wrong("it is too long"));
    }
    let said: Value = serde_json::from_slice(&text).map_err(|error| wrong(&error.to_string()))?;
    if said.get("version").and_then(Value::as_u64) != Some(RECORD_VERSION) {
        return Err(wrong("its version is not known"));
    }
    let names = said.get("files").and_then(Value::as_array);
    let names = names.ok_or_else(|| wrong("it names no files"))?;
    let named = |name: &Value| {
        let name = name.as_str().filter(|name| is_name(name));
        name.map(|name| folder.join(name))
            .ok_or_else(|| wrong("a name in it is no file's of the folder"))
    };
    let files = names.iter().map(named).collect::<Result<_>>()?;
    let more = said.get("metadata").and_then(Value::as_object);
    let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
    let more: Option<Vec<_>> = more.into_iter().flatten().map(text).collect();
    let more = more.ok_or_else(|| wrong("its metadata is not of strings"))?;
    Ok(Some((files, more)))
}

/// Whether a record may name such a file: one of the folder itself.
fn is_name(name: &str) -> bool {
    name.starts_with("shard-")
        && name.ends_with(".safetensors")
        && !name.contains(['/', '\\', '\0'])
}

/// The tensors of one file among others: `source` makes each a source.
pub(super) fn add(
    file: &Checkpoint,
    tensors: &mut Vec<Tensor>,
    known: &mut HashMap<String, usize>,
    mut source: impl FnMut(&crate::TensorRef<'_>) -> Result<u32>,
) -> Result<()> {
    let label = file.files().first().map_or("", |file| &file.label);
    let wrong = |what: String| {
        Error::usage(
            "SHARDS",
            format!("{label}: the metadata {SHARDING:?} {what}"),
        )
    };
    let said: Value = match file.metadata().get(SHARDING) {
        Some(text) => serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?,
        None => Value::Null,
    };
    for stored in file.iter() {
        let name = stored.name();
        let unfit = || wrong(format!("says nothing right of {name:?}"));
        let size: Dims = stored.shape().into();
        let (at, whole) = match said.get(name) {
            None => (size.iter().map(|_| 0).collect(), None),
            Some(row) => {
                let at = row.get("saved_offsets").and_then(dims).ok_or_else(unfit)?;
                let whole = row
                    .get("global_shape")
                    .map(|shape| dims(shape).ok_or_else(unfit));
                (at, whole.transpose()?)
            }
        };
        if at.len() != size.len()
            || whole
                .as_ref()
                .is_some_and(|all: &Dims| all.len() != at.len())
        {
            return Err(unfit());
        }
        let reach = at.iter().zip(&size).map(|(at, size)| at.checked_add(*size));
        let reach: Dims = reach.collect::<Option<_>>().ok_or_else(unfit)?;
        let shape = whole.unwrap_or(reach);
        let dtype = stored.dtype()?;
        let part = Part {
            source: source(&stored)?,
            of: Some((at.iter().map(|_| 0).collect(), size)),
            at,
        };
        let position = *known.entry(name.to_owned()).or_insert_with(|| {
            tensors.push(Tensor {
                name: name.to_owned(),
                dtype,
                shape: shape.clone(),
                parts: Vec::new(),
            });
            tensors.len() - 1
        });
        let tensor = tensors.get_mut(position).ok_or_else(unfit)?;
        if tensor.dtype != dtype || tensor.shape.len() != shape.len() {
            return Err(wrong(format!(
                "says {name:?} is another tensor than in other files"
            )));
        }
        for (all, reach) in tensor.shape.iter_mut().zip(&shape) {
            *all = (*all).max(*reach);
        }
        // A replica: one copy is enough.
        if !tensor
            .parts
            .iter()
            .any(|other| other.at == part.at && other.of == part.of)
        {
            tensor.parts.push(part);
        }
    }
    Ok(())
}
