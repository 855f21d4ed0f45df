//! What a file says of its bytes, while its header changes: checksums of the data stay right (spec 13.10), a hash of
//! the whole file does not and is renewed (13.15).

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tonnage_engine::checksum::{BadChunk, Checker};
use tonnage_engine::{self as engine, Check, Options, hash};
use tonnage_format::forever::CHECKSUMS_KEY;
use tonnage_format::{Checksums, Header};
use tonnage_storage::{self as storage, Durability, FileSource, Source};

use super::Edit;
use crate::checkpoint::Note;
use crate::checksums::{Beside, bad_chunks, known_sidecar, named, remove_sidecar, write_sidecar};
use crate::error::{Error, Result};

/// Compares a file's data with the checksums that its header has.
pub(super) struct Watched<'a> {
    header: &'a Header<Vec<u8>>,
    label: &'a str,
    checker: Checker,
    bad: Mutex<Option<BadChunk>>,
}

impl<'a> Watched<'a> {
    /// `None` for a file without checksums that it can be compared with, and for an edit that sets or deletes them.
    pub fn of(
        header: &'a Header<Vec<u8>>,
        source: &'a FileSource,
        edit: &Edit<'_>,
    ) -> Option<Self> {
        let mut changed = edit
            .delete
            .iter()
            .chain(edit.set.iter().map(|(key, _)| key));
        if changed.any(|key| key == CHECKSUMS_KEY) {
            return None;
        }
        let mut pairs = header.metadata()?.iter();
        let (_, text) = pairs.find(|(key, _)| *key == CHECKSUMS_KEY)?;
        // Those that are not of this data are not for an edit of metadata to judge (spec 13.7).
        let sums = Checksums::parse(text)
            .ok()??
            .of_data(header.data_len())
            .ok()?;
        Some(Watched {
            header,
            label: source.label(),
            checker: Checker::new(header.data_start(), header.data_len(), sums)?,
            bad: Mutex::new(None),
        })
    }

    fn error(&self, bad: &BadChunk) -> Error {
        let end = bad.offset.saturating_add(bad.len);
        let start = self.header.data_start();
        let inside = self.header.iter_by_offset().filter(|info| {
            start.saturating_add(info.begin) < end && start.saturating_add(info.end) > bad.offset
        });
        named(bad, inside.map(|info| info.name)).in_file(self.label)
    }
}

impl Check for Watched<'_> {
    fn check(
        &self,
        _: &dyn Source,
        offset: u64,
        parts: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<(), engine::Error> {
        self.checker.feed(offset, parts).map_err(|bad| {
            let mut first = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(bad);
            let label = self.label.to_owned();
            engine::Error::Corrupt { label, bad }
        })
    }
}

/// How data that is copied is verified, if it can be.
#[derive(Clone, Copy)]
pub(super) struct Verify<'a>(pub Option<&'a Watched<'a>>);

impl Verify<'_> {
    /// Compares a copy in which the data lies where it lay.
    pub fn copy(self, copy: &FileSource, options: &Options<'_>) -> Result<()> {
        let Some(watched) = self.0 else {
            return Ok(());
        };
        match bad_chunks(copy, &watched.checker, options)?.first() {
            Some(bad) => Err(watched.error(bad)),
            None => Ok(()),
        }
    }

    /// The error, with the tensors where it is about a chunk.
    pub fn named(self, error: Error) -> Error {
        let Some(watched) = self.0 else {
            return error;
        };
        let bad = watched.bad.lock().unwrap_or_else(PoisonError::into_inner);
        match &*bad {
            Some(bad) => watched.error(bad),
            None => error,
        }
    }
}

/// The file to come: a new header, and the old data.
#[derive(Debug)]
struct Edited<'a> {
    header: &'a [u8],
    source: &'a FileSource,
    /// Where the data begins now.
    data: u64,
}

impl Source for Edited<'_> {
    fn label(&self) -> &str {
        self.source.label()
    }

    fn len(&self) -> u64 {
        let data = self.source.len().saturating_sub(self.data);
        data.saturating_add(self.header.len() as u64)
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), storage::Error> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self.header.get(begin..).unwrap_or_default();
        let (head, tail) = dst.split_at_mut(rest.len().min(dst.len()));
        head.copy_from_slice(rest.get(..head.len()).unwrap_or_default());
        if tail.is_empty() {
            return Ok(());
        }
        let behind = offset.saturating_sub(self.header.len() as u64);
        let at = self.data.saturating_add(behind);
        self.source.read_exact_at(at, tail)
    }
}

/// Sidecars to be written once the file has changed.
#[derive(Debug, Default)]
pub(super) struct Renewed {
    /// Beside which names, and the hash.
    sidecars: Vec<(PathBuf, [u8; 32])>,
    /// What is to be said of those that are not renewed.
    pub notes: Vec<Note>,
}

impl Renewed {
    /// Writes them.
    ///
    /// # Errors
    /// What the system said.
    pub fn write(&self, durability: Durability) -> Result<()> {
        let mut all = self.sidecars.iter();
        all.try_for_each(|(path, hash)| write_sidecar(path, hash, durability))
    }
}

/// The hash of the file to come, for each sidecar that is to be renewed. The old one is compared first: what is
/// damaged is not made good.
///
/// # Errors
/// `CHECKSUM_MISMATCH`; what the system said.
pub(super) fn renewed(
    path: &Path,
    source: &FileSource,
    data: u64,
    header: &[u8],
    edit: &Edit<'_>,
) -> Result<Renewed> {
    let mut renewed = Renewed::default();
    if edit.drop_sidecar {
        return Ok(renewed);
    }
    let mut right = Vec::new();
    for name in names(path) {
        match known_sidecar(&name, source, &edit.options)? {
            Beside::Nothing => {}
            Beside::Unknown(note) => renewed.notes.push(note),
            Beside::Right => right.push(name),
        }
    }
    if right.is_empty() {
        return Ok(renewed);
    }
    let edited = Edited {
        header,
        source,
        data,
    };
    let hash = hash::blake3_of(&edited, &edit.options)?;
    renewed.sidecars = right.into_iter().map(|name| (name, hash)).collect();
    Ok(renewed)
}

/// Removes sidecars whose file is about to change (spec 13.15).
///
/// # Errors
/// What the system said.
pub(super) fn remove_sidecars(path: &Path) -> Result<()> {
    names(path).iter().try_for_each(|name| remove_sidecar(name))
}

/// The name of a file, and the one that it has behind symbolic links.
fn names(path: &Path) -> Vec<PathBuf> {
    let mut names = vec![path.to_owned()];
    let is_link = path.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
    names.extend(path.canonicalize().ok().filter(|_| is_link));
    names
}
