//! Opening GGUF files: the header of each, the files of a split model, and one catalog of all.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tonnage_foreign::gguf::{
    self as foreign, Gguf, Limits, Swapped, check_split, probe, quant_map, split_name,
};
use tonnage_format::{CatalogBuilder, Step};
use tonnage_storage::{self as storage, Source};

use crate::checkpoint::{Checkpoint, CheckpointFile};
use crate::error::{Error, Result};
use crate::open::{Found, Layout, OpenOptions, ambiguous, open_beneath};

/// Reads on from the first bytes of a file to the end of its header, and parses it. Reads double, since a
/// header does not say how long it is.
pub(crate) fn read_header(source: &dyn Source, mut bytes: Vec<u8>) -> Result<Gguf> {
    let limits = Limits::default();
    let in_file = |e: foreign::Error| Error::from(e).in_file(source.label());
    while let Step::Need { offset, len } = probe(&bytes, source.len(), &limits).map_err(in_file)? {
        // `probe` has checked that the file is that long and the header is below its limit.
        let end = offset.saturating_add(len).min(source.len());
        let have = bytes.len();
        bytes.try_reserve_exact(end as usize - have).map_err(|_| {
            let what = format!("{end} bytes");
            storage::Error::new("reserve memory of", what, io::ErrorKind::OutOfMemory)
        })?;
        bytes.resize(end as usize, 0);
        source.read_exact_at(have as u64, bytes.get_mut(have..).unwrap_or_default())?;
    }
    Gguf::parse(bytes, source.len(), &limits).map_err(in_file)
}

/// What a folder stands for that has no `.safetensors` files: its only GGUF file, or its only split model.
pub(crate) fn find_in(root: &Path) -> Result<Found> {
    let failed = |e| Error::from(storage::Error::at("list", root, e));
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(root).map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string()
            && name.ends_with(".gguf")
            && !name.starts_with('.')
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    let root = root.to_owned();
    let Some(first) = names.first() else {
        let text = "no .safetensors file, no index and no .gguf file in this folder";
        let nothing = io::Error::new(io::ErrorKind::NotFound, text);
        return Err(storage::Error::at("open", &root, nothing).into());
    };
    let all = siblings(first).unwrap_or_else(|| vec![first.clone()]);
    if names.iter().any(|name| !all.contains(name)) {
        return Err(ambiguous(&root, "GGUF files", &names));
    }
    Ok(Found::Set { root, names: all })
}

/// The names of all files of a split model, by that of one of them.
fn siblings(name: &str) -> Option<Vec<String>> {
    /// More digits than this the names do not have.
    const MOST: u64 = 99_999;
    let (stem, _, count) = split_name(name)?;
    let names = 1..=count.min(MOST);
    Some(
        names
            .map(|no| format!("{stem}-{no:05}-of-{count:05}.gguf"))
            .collect(),
    )
}

/// The files of the model that `path` is one file of, where it says that there are others.
pub(crate) fn others_of(
    path: &Path,
    source: &Arc<dyn Source>,
    options: &OpenOptions,
) -> Result<Option<Vec<Arc<dyn Source>>>> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let Some(names) = siblings(name).filter(|names| names.len() > 1) else {
        return Ok(None);
    };
    let root = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let open = |other: &String| match other == name {
        true => Ok(Arc::clone(source)),
        false => open_beneath(root, other, options),
    };
    names.iter().map(open).collect::<Result<Vec<_>>>().map(Some)
}

/// One checkpoint of GGUF files, whose headers were read.
pub(crate) fn assemble(files: Vec<(Arc<dyn Source>, Gguf)>, layout: Layout) -> Result<Checkpoint> {
    let headers: Vec<&Gguf> = files.iter().map(|(_, gguf)| gguf).collect();
    let first = files.first().map_or("", |(source, _)| source.label());
    check_split(&headers).map_err(|e| Error::from(e).in_file(first))?;
    let map = quant_map(&headers);
    let mut builder = CatalogBuilder::new();
    let (mut described, mut sources, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for (source, gguf) in files {
        let at = builder.add_source(source.label(), source.len());
        let in_file = |e| Error::from(e).in_file(source.label());
        gguf.add_to(&mut builder, at).map_err(in_file)?;
        described.push(describe(&*source, &gguf));
        let swapped = Swapped::of(&gguf, &source);
        sources.push(swapped.map_or(source, |swapped| Arc::new(swapped) as Arc<dyn Source>));
        kept.push(gguf);
    }
    let catalog = builder.finish()?;
    let mut metadata = BTreeMap::new();
    for (key, value) in described
        .iter()
        .flat_map(|file: &CheckpointFile| file.metadata.iter().flatten())
    {
        metadata.entry(key.clone()).or_insert_with(|| value.clone());
    }
    if let Some(map) = map {
        metadata.insert("quant.map".to_owned(), map);
    }
    let mut checkpoint =
        Checkpoint::with(catalog, sources, described, metadata, Vec::new(), layout);
    checkpoint.gguf = kept;
    Ok(checkpoint)
}

fn describe(source: &dyn Source, gguf: &Gguf) -> CheckpointFile {
    let texts = gguf.metadata();
    let texts = texts.filter_map(|(key, value)| Some((key.to_owned(), value.to_text()?)));
    CheckpointFile {
        label: source.label().to_owned(),
        len: source.len(),
        data_start: gguf.data_start(),
        header_padding: 0,
        tensors: gguf.len(),
        data_bytes: source.len().saturating_sub(gguf.data_start()),
        metadata: Some(texts.collect()),
    }
}
