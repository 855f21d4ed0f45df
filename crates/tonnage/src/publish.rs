//! From staged files to a checkpoint of several files, so that the old or the new one is whole at any
//! moment.
//!
//! The index is the commit record. Files of a new checkpoint often have the names of the old one's
//! (`model-00001-of-00003.safetensors`), so they cannot take their names before it, and not after it
//! either. Therefore, with the folder locked against other saves:
//!
//! 1. Every new file lies complete, synced, under a hidden name (`.model-….<pid>.<random>.safetensors`).
//!    Whatever happens until now, the old checkpoint is what is there; hidden files are nobody's.
//! 2. An index that maps the tensors to the hidden names replaces the index. **This rename is the
//!    commit**: before it the old checkpoint is whole, after it the new one, for every reader that
//!    follows an index.
//! 3. The old checkpoint's files are removed, and each new file gets its final name as a second name
//!    (a hard link; a copy where the file system has none).
//! 4. An index with the final names replaces the index; a checkpoint of one file loses its index instead,
//!    unless its name is to be numbered.
//! 5. The hidden names are removed, and sidecars with hashes, if they are asked for, are written. Old ones
//!    go before step 2: none ever lies beside a file that it is not of.
//!
//! Between the steps the folder is synced, if durability asks for it, so a power cut finds the same
//! states as a kill. A save that was cut off after step 2 leaves an index with hidden names: that is a
//! valid checkpoint, and the next save into the folder tidies it.
//!
//! Removed are files of the same stem only: `stem.safetensors`, `stem-NNNNN-of-NNNNN.safetensors`, and
//! hidden files of this pattern.

use std::io;
use std::path::{Path, PathBuf};

use tonnage_engine as engine;
use tonnage_format::{Index, IndexBuilder, ReadOptions, shard_file_name, shard_number};
use tonnage_storage::{
    self as storage, AtomicFile, AtomicOptions, Durability, FileSource, Sink, Source, Staged, temp,
};

use crate::checksums::{remove_sidecar, write_sidecar};
use crate::error::Result;

/// Suffix of hidden files: an index may name only `.safetensors` files.
pub(crate) const SUFFIX: &str = "safetensors";

/// A staged file and the tensors in it, with their sizes.
#[derive(Debug)]
pub(crate) struct Part {
    pub staged: Staged,
    pub tensors: Vec<(String, u64)>,
    /// Its BLAKE3 hash, if it is to have a sidecar.
    pub hash: Option<[u8; 32]>,
}

/// What a folder has of a stem.
struct Old {
    index: PathBuf,
    has_index: bool,
    /// Files with visible names.
    files: Vec<String>,
    /// Hidden files that the index names.
    hidden: Vec<String>,
}

impl Old {
    fn of(folder: &Path, stem: &str) -> Old {
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        let has_index = index.symlink_metadata().is_ok();
        let text = std::fs::read(&index).unwrap_or_default();
        let named = Index::parse(&text, &ReadOptions::default());
        let named = named
            .map(|index| index.files().to_vec())
            .unwrap_or_default();
        let hidden = named
            .into_iter()
            .filter(|name| is_hidden_of(name, stem))
            .collect();
        let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let files = names.filter(|name| is_file_of(name, stem)).collect();
        Old {
            index,
            has_index,
            files,
            hidden,
        }
    }
}

fn is_file_of(name: &str, stem: &str) -> bool {
    name == shard_file_name(stem, 1, 1) || shard_number(name).is_some_and(|(of, ..)| of == stem)
}

fn is_hidden_of(name: &str, stem: &str) -> bool {
    temp::target_of(name, SUFFIX).is_some_and(|target| is_file_of(target, stem))
}

/// Whether a single file can simply take its name: nothing of several files is there.
pub(crate) fn is_simple(folder: &Path, stem: &str) -> bool {
    let old = Old::of(folder, stem);
    !old.has_index
        && old
            .files
            .iter()
            .all(|name| *name == shard_file_name(stem, 1, 1))
}

/// Removes hidden files that a killed save left behind long ago, unless the index names them.
pub(crate) fn sweep(folder: &Path, stem: &str) {
    // Another save lets go of its files when the index names them: the index must not change in between.
    let Ok(_lock) = storage::lock_folder(folder) else {
        return;
    };
    let index = folder.join(format!("{stem}.safetensors.index.json"));
    let keep = match std::fs::read(&index) {
        Ok(text) => match Index::parse(&text, &ReadOptions::default()) {
            Ok(index) => index.files().to_vec(),
            // An index that cannot be read may name anything.
            Err(_) => return,
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(_) => return,
    };
    temp::sweep(folder, SUFFIX, |target, name| {
        is_file_of(target, stem) && !keep.iter().any(|kept| kept == name)
    });
}

/// Starts a hidden file that will be part of a checkpoint.
pub(crate) fn hidden_file(folder: &Path, stem: &str, durability: Durability) -> Result<AtomicFile> {
    let options = AtomicOptions {
        durability,
        suffix: SUFFIX.to_owned(),
        replace_link: true,
    };
    Ok(AtomicFile::create(
        folder.join(shard_file_name(stem, 1, 1)),
        &options,
    )?)
}

/// Makes the parts the folder's checkpoint of this stem. Gives the final paths, and the index's if there
/// is more than one file, or if a single one is to be `numbered` as several are.
pub(crate) fn publish(
    folder: &Path,
    stem: &str,
    mut parts: Vec<Part>,
    numbered: bool,
    durability: Durability,
) -> Result<(Vec<PathBuf>, Option<PathBuf>)> {
    let n = parts.len();
    let finals: Vec<String> = match n {
        1 if numbered => vec![format!("{stem}-00001-of-00001.{SUFFIX}")],
        _ => (1..=n).map(|i| shard_file_name(stem, i, n)).collect(),
    };
    let _lock = storage::lock_folder(folder)?;
    let old = Old::of(folder, stem);
    for (part, name) in parts.iter_mut().zip(&finals) {
        part.staged.retarget(&folder.join(name))?;
    }
    let hidden: Vec<String> = parts
        .iter()
        .map(|part| file_name(part.staged.path()))
        .collect();
    let sync = || {
        if durability.syncs_folders() {
            storage::sync_dir(folder)
        } else {
            Ok(())
        }
    };

    let hashes: Vec<Option<[u8; 32]>> = parts.iter().map(|part| part.hash).collect();
    for name in old.files.iter().chain(&finals) {
        remove_sidecar(&folder.join(name))?;
    }

    // 1, 2
    sync()?;
    write_index(&old.index, &index_text(&parts, &hidden)?, durability)?;
    let parts: Vec<PathBuf> = parts.into_iter().map(|part| part.staged.keep()).collect();
    // 3
    for name in old
        .files
        .iter()
        .chain(&old.hidden)
        .filter(|name| !hidden.contains(name))
    {
        remove(&folder.join(name))?;
    }
    for (part, name) in parts.iter().zip(&finals) {
        second_name(part, &folder.join(name), durability)?;
    }
    sync()?;
    // 4
    let index = match n {
        1 if !numbered => {
            remove(&old.index)?;
            None
        }
        _ => {
            write_index(
                &old.index,
                &renamed(&old.index, &hidden, &finals)?,
                durability,
            )?;
            Some(old.index)
        }
    };
    sync()?;
    // 5
    parts.iter().try_for_each(|part| remove(part))?;
    for (name, hash) in finals.iter().zip(&hashes) {
        if let Some(hash) = hash {
            write_sidecar(&folder.join(name), hash, durability)?;
        }
    }
    sync()?;
    Ok((finals.iter().map(|name| folder.join(name)).collect(), index))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn index_text(parts: &[Part], names: &[String]) -> Result<String> {
    let mut builder = IndexBuilder::new();
    for (part, file) in parts.iter().zip(names) {
        for (name, bytes) in &part.tensors {
            builder.add(name, file, *bytes);
        }
    }
    Ok(builder.finish()?)
}

/// The index that was just written, with the final names in place of the hidden ones.
fn renamed(path: &Path, hidden: &[String], finals: &[String]) -> Result<String> {
    let text = std::fs::read(path).map_err(|e| storage::Error::at("read", path, e))?;
    let index = Index::parse(&text, &ReadOptions::default())?;
    let mut builder = IndexBuilder::new();
    let mut total = index.total_size.unwrap_or(0);
    for (name, file) in index.iter() {
        let at = hidden.iter().position(|name| name == file);
        let file = at
            .and_then(|at| finals.get(at))
            .map_or(file, String::as_str);
        // The sum is all that the sizes are for.
        builder.add(name, file, std::mem::take(&mut total));
    }
    Ok(builder.finish()?)
}

fn write_index(path: &Path, text: &str, durability: Durability) -> Result<()> {
    let file = AtomicFile::create(
        path,
        &AtomicOptions {
            durability,
            replace_link: true,
            ..Default::default()
        },
    )?;
    file.write_all_at(0, text.as_bytes())?;
    Ok(file.commit()?)
}

pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(storage::Error::at("remove", path, e).into())
        }
        _ => Ok(()),
    }
}

/// Gives a file a second name; where the file system has no hard links, a copy.
pub(crate) fn second_name(path: &Path, name: &Path, durability: Durability) -> Result<()> {
    if std::fs::hard_link(path, name).is_ok() {
        return Ok(());
    }
    let source = FileSource::open(path)?;
    let file = AtomicFile::create(
        name,
        &AtomicOptions {
            durability,
            replace_link: true,
            ..Default::default()
        },
    )?;
    file.reserve(source.len())?;
    let all = engine::Copy {
        source: &source,
        from: 0,
        to: 0,
        len: source.len(),
    };
    engine::copy(&file, &[all], &engine::Options::default())?;
    Ok(file.commit()?)
}
