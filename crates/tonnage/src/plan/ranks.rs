//! A folder of ranks' files, which is replaced as a whole.
//!
//! The files of a save often have the names of the one before it (`rank-00000.safetensors`), and there are many of
//! them, so they cannot take their names at one moment. Therefore:
//!
//! 1. All files lie complete, synced, under their names in a hidden folder (`.rank.<pid>.<random>.ranks`) within the
//!    folder. Whatever happens until now, the old files are what is there.
//! 2. A record ([`RECORD`]) that names the hidden folder takes the place of the record, with the folder locked against
//!    other saves. **This rename is the commit**: who finds a record reads what it names.
//! 3. Each file gets a second name in the folder itself (a hard link; a copy where the file system has none), and
//!    files of ranks that are of no save any more are removed.
//! 4. The record is removed: the folder itself is what is read again.
//! 5. Hidden folders are removed: this one, and those of saves that are dead. Who is alive holds a lock ([`LOCK`]).
//!
//! A save that was cut off after step 2 leaves a record with a hidden folder, which is read as any other, and which the
//! next save into the folder tidies.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tonnage_storage::{self as storage, AtomicFile, AtomicOptions, Durability, Sink, temp};

use crate::checksums::{remove_sidecar, sidecar_of};
use crate::error::{Error, Result};
use crate::publish::{remove, second_name};

/// The file beside ranks' files that says, while they are being replaced, where they lie.
pub const RECORD: &str = "tonnage.ranks.json";
const VERSION: u64 = 1;
/// Longest record that is read.
const LONGEST: u64 = 4096;

/// First word and suffix of hidden folders.
const STEM: &str = "rank";
const SUFFIX: &str = "ranks";
/// What the writer of a hidden folder holds a lock on.
const LOCK: &str = ".lock";

/// The file name of a rank.
pub fn rank_file(rank: u32) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// The files that ranks wrote in a folder, by rank: each one file, or the index of several. None for what is no folder
/// of ranks' files.
pub(super) fn find(folder: &Path) -> Result<Vec<PathBuf>> {
    let Some(hidden) = recorded(folder)? else {
        return Ok(files_in(folder));
    };
    let found = files_in(&folder.join(&hidden));
    if found.is_empty() {
        return Err(wrong(folder, "it names a folder without ranks' files"));
    }
    Ok(found)
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| matches!(rank_of(path), Some((_, rest)) if rest.is_empty()))
        .collect();
    found.sort();
    found
}

/// The rank that a file's name speaks of, and what stands between that and the suffix: nothing for the file or
/// the index of a rank, `-00001-of-00002` for a file shard.
fn rank_of(path: &Path) -> Option<(u32, &str)> {
    let rest = path.file_name()?.to_str()?.strip_prefix("rank-")?;
    let index = rest.strip_suffix(".safetensors.index.json");
    let stem = index.or_else(|| rest.strip_suffix(".safetensors"))?;
    let (number, rest) = stem.split_at_checked(5)?;
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    number
        .parse()
        .ok()
        .filter(|_| digits)
        .map(|rank| (rank, rest))
}

fn wrong(folder: &Path, what: &str) -> Error {
    Error::usage(
        "SHARDS",
        format!("{}: {what}", folder.join(RECORD).display()),
    )
}

/// The hidden folder that a record names, if there is a record.
fn recorded(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(RECORD);
    let failed = |error| Error::from(storage::Error::at("read", &path, error));
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(failed(e)),
    };
    let mut text = Vec::new();
    file.take(LONGEST + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    let said: Option<Value> = (text.len() as u64 <= LONGEST)
        .then(|| serde_json::from_slice(&text).ok())
        .flatten();
    let said = said.ok_or_else(|| wrong(folder, "it is no record"))?;
    if said.get("version").and_then(Value::as_u64) != Some(VERSION) {
        return Err(wrong(folder, "its version is not known"));
    }
    let name = said.get("folder").and_then(Value::as_str);
    let name = name.filter(|name| is_hidden(name));
    let name = name.ok_or_else(|| wrong(folder, "it names no folder of this one"))?;
    Ok(Some(name.to_owned()))
}

fn is_hidden(name: &str) -> bool {
    !name.contains(['/', '\\', '\0']) && temp::target_of(name, SUFFIX) == Some(STEM)
}

/// Forgets the files of ranks in a folder where another checkpoint has taken their place.
pub(super) fn forget(folder: &Path) -> Result<()> {
    if !folder.is_dir() || find(folder).is_ok_and(|found| found.is_empty()) {
        return Ok(());
    }
    let _lock = storage::lock_folder(folder)?;
    // The record first: what it names is whole until it is gone.
    remove(&folder.join(RECORD))?;
    for path in all_in(folder)? {
        remove_sidecar(&path)?;
        remove(&path)?;
    }
    sweep(folder, None);
    Ok(())
}

/// All files of ranks that lie in a folder, shards and indices.
fn all_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| storage::Error::at("list", folder, e))?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| rank_of(path).is_some()).collect())
}

/// Removes hidden folders of saves that are dead, but for the one to keep. The folder is locked.
fn sweep(folder: &Path, keep: Option<&str>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let hidden = name.to_str().filter(|name| is_hidden(name));
        if hidden.is_none() || hidden == keep {
            continue;
        }
        let path = entry.path();
        let lock = path.join(LOCK);
        // One without the file of its lock was killed before it made that, or while it was removed: both are done with
        // the folder locked.
        let dead = match storage::try_lock(&lock) {
            Ok(lock) => lock.is_some(),
            Err(_) => lock.symlink_metadata().is_err(),
        };
        if dead {
            // What cannot be removed now, the next sweep tries again.
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// A hidden folder that files of ranks are written to. It is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Staging {
    folder: PathBuf,
    name: String,
    durability: Durability,
    armed: bool,
    /// Held while this lives.
    _lock: Option<File>,
}

impl Staging {
    /// Makes one in a folder, which is made if it is not there.
    pub fn create(folder: &Path, durability: Durability) -> Result<Staging> {
        fs::create_dir_all(folder).map_err(|e| storage::Error::at("create", folder, e))?;
        // Who sweeps waits until the new folder is locked.
        let _lock = storage::lock_folder(folder)?;
        sweep(folder, recorded(folder).ok().flatten().as_deref());
        // Random, as the hasher's keys are.
        let random = RandomState::new().build_hasher().finish();
        let name = format!(".{STEM}.{}.{random:016x}.{SUFFIX}", std::process::id());
        let path = folder.join(&name);
        fs::create_dir(&path).map_err(|e| storage::Error::at("create", &path, e))?;
        let mut made = Staging {
            folder: folder.to_owned(),
            name,
            durability,
            armed: true,
            _lock: None,
        };
        let lock = path.join(LOCK);
        File::create_new(&lock).map_err(|e| storage::Error::at("create", &lock, e))?;
        made._lock = storage::try_lock(&lock)?;
        Ok(made)
    }

    fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Where a rank's file is written.
    pub fn file(&self, rank: u32) -> PathBuf {
        self.path().join(rank_file(rank))
    }

    /// Makes what was written the folder's. Gives it names there.
    pub fn publish(mut self) -> Result<()> {
        let (folder, path) = (self.folder.clone(), self.path());
        let _lock = storage::lock_folder(&folder)?;
        let entries = fs::read_dir(&path).map_err(|e| storage::Error::at("list", &path, e))?;
        let names: Vec<_> = (entries.flatten().map(|entry| entry.file_name()))
            .filter(|name| name != LOCK)
            .collect();
        let old = all_in(&folder)?;
        let sync = || match self.durability.syncs_folders() {
            true => storage::sync_dir(&folder),
            false => Ok(()),
        };
        // No hash ever lies beside a file that it is not of.
        old.iter().try_for_each(|path| remove_sidecar(path))?;
        sync()?;
        self.record()?;
        self.armed = false;
        let is_new = |path: &PathBuf| {
            let mut names = names.iter();
            names.any(|name| path.file_name() == Some(name))
        };
        for path in old.iter().filter(|path| !is_new(path)) {
            remove(path)?;
        }
        // Hashes last, beside what they are of.
        let (hashes, files): (Vec<_>, Vec<_>) = names.iter().partition(|name| {
            let of = Path::new(name).file_stem().map(Path::new);
            of.is_some_and(|of| sidecar_of(of).as_os_str() == name.as_os_str())
        });
        for name in files.into_iter().chain(hashes) {
            let place = folder.join(name);
            remove(&place)?;
            second_name(&path.join(name), &place, self.durability)?;
        }
        sync()?;
        remove(&folder.join(RECORD))?;
        sync()?;
        fs::remove_dir_all(&path).map_err(|e| storage::Error::at("remove", &path, e))?;
        sweep(&folder, None);
        Ok(())
    }

    fn record(&self) -> Result<()> {
        let options = AtomicOptions {
            durability: self.durability,
            replace_link: true,
            ..AtomicOptions::default()
        };
        let file = AtomicFile::create(self.folder.join(RECORD), &options)?;
        let text = json!({"version": VERSION, "folder": self.name}).to_string();
        file.write_all_at(0, text.as_bytes())?;
        Ok(file.commit()?)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.armed {
            // Nobody is left to be told, and the next sweep tries again.
            let _ = fs::remove_dir_all(self.path());
        }
    }
}
