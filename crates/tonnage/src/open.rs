//! Opening: from a path to a catalog, reading headers only (spec chapters 2 and 8).
//!
//! What a path stands for:
//! * a file: that file;
//! * an index (`*.json`): the files that it names, beneath its folder;
//! * a folder with one index: that index, and nothing else decides;
//! * a folder without: its only `.safetensors` file, or the complete numbered set `x-00001-of-0000N`;
//! * a folder without any of these: its only `.gguf` file, or the complete numbered set.
//!
//! Names that start with a dot are never looked at: they belong to saves that are not finished.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonnage_foreign::gguf::{Gguf, is_gguf};
use tonnage_format::{
    self as format, Header, Index, ReadOptions, Reason, Step, probe, shard_file_name, shard_number,
};
use tonnage_storage::beneath::{self, Links, Refusal};
use tonnage_storage::{self as storage, FileSource, Source};

use crate::error::{Error, Result};

/// How to open a checkpoint. The default is the strict profile that takes null for absent metadata
/// (spec 10.1), with the default budgets.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The reader's profile and budgets.
    pub read: ReadOptions,
    /// Follow symbolic links that lead out of the checkpoint's folder. Without it only the layout of the
    /// Hugging Face cache is trusted.
    pub allow_symlinks: bool,
}

impl OpenOptions {
    fn links(&self) -> Links {
        if self.allow_symlinks {
            Links::Follow
        } else {
            Links::Within
        }
    }
}

/// What was recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One file.
    Single,
    /// An index and the files that it names.
    Indexed,
    /// Several files without an index.
    FileSet,
    /// Bytes, not files.
    Bytes,
}

/// What a path stands for, before any `.safetensors` file is opened.
#[derive(Debug)]
pub(crate) enum Found {
    File(PathBuf),
    Index { root: PathBuf, path: PathBuf },
    Set { root: PathBuf, names: Vec<String> },
}

/// Looks at the path, and in a folder at its names.
pub(crate) fn find(path: &Path) -> Result<Found> {
    let meta = std::fs::metadata(path).map_err(|e| storage::Error::at("open", path, e))?;
    if meta.is_dir() {
        return find_in(path);
    }
    if path.extension().is_some_and(|e| e == "json") {
        let root = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        return Ok(Found::Index {
            root,
            path: path.to_owned(),
        });
    }
    Ok(Found::File(path.to_owned()))
}

fn find_in(root: &Path) -> Result<Found> {
    let (mut files, indexes) = names_in(root)?;
    if let [index] = &indexes[..] {
        return Ok(Found::Index {
            root: root.to_owned(),
            path: root.join(index),
        });
    }
    if !indexes.is_empty() {
        return Err(ambiguous(root, "index files", &indexes));
    }
    if files.is_empty() {
        return crate::gguf::find_in(root);
    }
    files.sort_unstable();
    if files.len() > 1 || shard_number(&files[0]).is_some() {
        complete_set(root, &files)?;
    }
    Ok(Found::Set {
        root: root.to_owned(),
        names: files,
    })
}

/// The `.safetensors` files and the indexes of a folder, without hidden ones.
pub(crate) fn names_in(root: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let failed = |e| Error::from(storage::Error::at("list", root, e));
    let (mut files, mut indexes) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(root).map_err(failed)? {
        let Ok(name) = entry.map_err(failed)?.file_name().into_string() else {
            continue;
        };
        if name.starts_with('.') {
            continue;
        }
        if name.ends_with(".safetensors") {
            files.push(name);
        } else if name.ends_with(".safetensors.index.json") {
            indexes.push(name);
        }
    }
    indexes.sort_unstable();
    Ok((files, indexes))
}

pub(crate) fn ambiguous(root: &Path, what: &str, names: &[String]) -> Error {
    let shown: Vec<String> = names
        .iter()
        .take(8)
        .map(|name| format!("{name:?}"))
        .collect();
    let more = if names.len() > 8 { " …" } else { "" };
    let text = format!(
        "the folder has {} {what}; open one of them: {}{more}",
        names.len(),
        shown.join(", ")
    );
    Error::usage("AMBIGUOUS", text).in_file(root.display().to_string())
}

/// Several files without an index are a checkpoint if their names say so: one stem, one count, all there.
fn complete_set(root: &Path, files: &[String]) -> Result<()> {
    let numbers: Vec<(&str, usize, usize)> =
        files.iter().filter_map(|name| shard_number(name)).collect();
    let Some(&(stem, _, n)) = numbers.first() else {
        return Err(ambiguous(root, "files", files));
    };
    let one_set =
        numbers.len() == files.len() && numbers.iter().all(|&(s, _, m)| (s, m) == (stem, n));
    if !one_set {
        return Err(ambiguous(
            root,
            "files that are not one numbered set",
            files,
        ));
    }
    let missing = (1..=n).find(|&i| !numbers.iter().any(|&(_, j, _)| i == j));
    let bad = match missing {
        Some(i) => format::Error::new(Reason::IndexShardMissing)
            .found(format_args!("{} of {n} files", files.len()))
            .needed(shard_file_name(stem, i, n)),
        None if files.len() != n => format::Error::new(Reason::IndexShardMissing)
            .found(format_args!("{} files numbered 1 to {n}", files.len()))
            .needed("each number once"),
        None => return Ok(()),
    };
    Err(Error::from(bad).in_file(root.display().to_string()))
}

/// Opens a file that an index or a listing names.
pub(crate) fn open_beneath(
    root: &Path,
    name: &str,
    options: &OpenOptions,
) -> Result<Arc<dyn Source>> {
    let label = root.join(name).display().to_string();
    let wrong = |reason: Reason| {
        Error::from(format::Error::new(reason).found(format_args!("{name:?}"))).in_file(&label)
    };
    match beneath::open(root, name, options.links()) {
        Ok(file) => Ok(Arc::new(FileSource::from_file(file, label.clone())?)),
        Err(Refusal::Escapes) => Err(wrong(Reason::IndexEscapes)),
        Err(Refusal::NotRegular) => Err(wrong(Reason::IndexNotRegular)),
        Err(Refusal::Missing) => Err(wrong(Reason::IndexFileMissing)),
        Err(Refusal::Io(error)) => Err(error.into()),
    }
}

/// Reads and parses an index file.
pub(crate) fn read_index(
    root: &Path,
    path: &Path,
    options: &OpenOptions,
) -> Result<(Index, Vec<u8>)> {
    let label = path.display().to_string();
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let file = match beneath::open(root, name, options.links()) {
        Ok(file) => file,
        Err(Refusal::Escapes) => return Err(Error::from(Reason::IndexEscapes).in_file(label)),
        Err(Refusal::NotRegular) => return Err(Error::from(Reason::IndexNotRegular).in_file(label)),
        Err(Refusal::Missing) => {
            return Err(storage::Error::at("open", path, io::ErrorKind::NotFound).into());
        }
        Err(Refusal::Io(error)) => return Err(error.into()),
    };
    let text = read_text(file, &label, options.read.limits.index_bytes)?;
    let index = Index::parse(&text, &options.read).map_err(|e| Error::from(e).in_file(label))?;
    Ok((index, text))
}

fn read_text(file: File, label: &str, limit: u64) -> Result<Vec<u8>> {
    let source = FileSource::from_file(file, label)?;
    if source.len() > limit {
        let over = format::Error::new(Reason::LimitIndex)
            .found(source.len())
            .needed(format_args!("at most {limit}"));
        return Err(Error::from(over).in_file(label));
    }
    let mut text = vec![0; source.len() as usize];
    source.read_exact_at(0, &mut text)?;
    Ok(text)
}

/// First read of a file: most headers fit, and a page more costs nothing.
const FIRST_READ: u64 = 64 << 10;

/// The header at the start of a source.
#[allow(
    clippy::large_enum_variant,
    reason = "the large one is the usual one, and none is kept"
)]
pub(crate) enum AnyHeader {
    Safetensors(Header<Vec<u8>>),
    Gguf(Box<Gguf>),
}

/// Reads and parses the header at the start of a source: one read, a few if it is large. What a file is called
/// decides before what it begins with: a `.safetensors` file is nothing else.
pub(crate) fn read_any_header(source: &dyn Source, options: &ReadOptions) -> Result<AnyHeader> {
    let bytes = first_read(source)?;
    if is_gguf(&bytes) && !source.label().ends_with(".safetensors") {
        let gguf = crate::gguf::read_header(source, bytes)?;
        return Ok(AnyHeader::Gguf(Box::new(gguf)));
    }
    read_rest(source, bytes, options).map(AnyHeader::Safetensors)
}

/// Reads and parses the header at the start of a `.safetensors` file: one read, two if it is large.
pub(crate) fn read_header(source: &dyn Source, options: &ReadOptions) -> Result<Header<Vec<u8>>> {
    read_rest(source, first_read(source)?, options)
}

fn first_read(source: &dyn Source) -> Result<Vec<u8>> {
    let mut bytes = vec![0; FIRST_READ.min(source.len()) as usize];
    source.read_exact_at(0, &mut bytes)?;
    Ok(bytes)
}

fn read_rest(
    source: &dyn Source,
    mut bytes: Vec<u8>,
    options: &ReadOptions,
) -> Result<Header<Vec<u8>>> {
    let label = source.label();
    let in_file = |e: format::Error| Error::from(e).in_file(label);
    loop {
        let want = match probe(&bytes, Some(source.len()), options).map_err(in_file)? {
            Step::Need { offset, len } => offset.saturating_add(len).min(source.len()),
            Step::Done(end) => {
                bytes.truncate(end as usize);
                return Header::parse(bytes, Some(source.len()), options).map_err(in_file);
            }
        };
        if want <= bytes.len() as u64 {
            return Err(in_file(format::Error::new(Reason::HeaderPastEnd)));
        }
        let have = bytes.len();
        // `probe` has checked that the file is that long, so the memory is justified.
        bytes.resize(want as usize, 0);
        source.read_exact_at(have as u64, &mut bytes[have..])?;
    }
}
