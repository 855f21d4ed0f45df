//! Editing a file's header: metadata and names, while the tensors' bytes stay as they are.
//!
//! Checksums of the data (spec 13.10) stay right, and where data is copied the copy is compared with them. A hash of
//! the whole file does not stay right: its sidecar is compared with the old file and renewed for the new one, which
//! takes two passes over the file, or removed ([`Edit::drop_sidecar`]).
//!
//! A header that is overwritten where it stands can tear: a crash between two sectors leaves half of
//! the old one and half of the new one, and the whole file is lost with it. So an edit takes the first
//! of these ways that is possible ([`Way`]):
//!
//! 1. **One sector.** The new header fits into the room of the old one (spec 9.8: headers end in
//!    padding) and differs from it only within one aligned block of [`SECTOR`] bytes: these bytes are
//!    written in one call. A disk writes a sector whole or not at all.
//! 2. **In place**, only where the caller asks for it ([`Edit::in_place`]). The header is overwritten
//!    however long it is. A copy of the old one lies beside the file until the new one has reached the
//!    disk, and is put back if writing fails.
//! 3. **Replaced.** A copy with the new header takes the file's place, as every save does. Where the new
//!    header fits, data keeps its offset and the system copies it, on file systems that share blocks
//!    without moving any of it.

mod change;
mod put;
mod verify;

use std::path::{Path, PathBuf};

use tonnage_engine::Options;
use tonnage_format::{Header, ReadOptions};
use tonnage_storage::{self as storage, Durability, FileSource, Source};

use crate::checkpoint::Note;
use crate::error::{Error, Result};
use crate::open::read_header;
use change::{Change, difference, fitted, padded, trimmed};
use put::{folder_of, keep_beside, overwrite, replace_longer, replace_same_length};
use verify::{Verify, Watched, remove_sidecars, renewed};

/// Bytes that a disk writes whole or not at all. Disks with larger sectors keep this promise too.
pub const SECTOR: usize = 512;

/// A new name for a tensor, if it is to have one.
pub type Renamer<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What to change, and how.
#[derive(Clone, Copy, Default)]
pub struct Edit<'a> {
    /// Metadata to set, keys and values; they replace what is there.
    pub set: &'a [(String, String)],
    /// Metadata keys to delete; keys that are not there are left out of the count of the result.
    pub delete: &'a [String],
    /// New names.
    pub rename: Option<Renamer<'a>>,
    /// Overwrite the header where it stands, whatever its length; fail where it does not fit.
    pub in_place: bool,
    /// Room to leave for later edits where the file is replaced and its header grows.
    pub reserve: u64,
    /// Remove a sidecar rather than renew it: then no more of the file is read than the edit needs.
    pub drop_sidecar: bool,
    /// What the edit survives.
    pub durability: Durability,
    /// How to read the file.
    pub read: ReadOptions,
    /// Progress and cancellation of a copy.
    pub options: Options<'a>,
}

/// How the file was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Not at all: it says that already.
    Unchanged,
    /// Some bytes of one sector were overwritten.
    Sector,
    /// The header was overwritten.
    InPlace,
    /// The file was replaced by a copy.
    Replaced,
}

impl Way {
    /// A stable word for it.
    pub fn name(self) -> &'static str {
        match self {
            Way::Unchanged => "unchanged",
            Way::Sector => "sector",
            Way::InPlace => "in_place",
            Way::Replaced => "replaced",
        }
    }
}

/// What an edit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edited {
    /// How.
    pub way: Way,
    /// Bytes that this process wrote or had copied.
    pub written: u64,
    /// Tensors that have a new name.
    pub renamed: usize,
    /// Metadata keys that were there and are gone.
    pub deleted: usize,
    /// What became of a sidecar that was no hash of the file.
    pub notes: Vec<Note>,
}

/// Edits the header of one file.
///
/// A copy of the data is compared with the checksums that the file has, and so is the whole file with the hash
/// beside it, which is renewed.
///
/// # Errors
/// Everything that opening the file refuses; new names that repeat or are reserved (`WRITE_DUPLICATE`,
/// `WRITE_RESERVED_NAME`); `NO_ROOM` where [`Edit::in_place`] was asked for and the header does not fit;
/// `CHANGED` where another process replaced the file meanwhile; `CHECKSUM_MISMATCH` for a damaged file;
/// what the system said. Whatever is returned, the file is whole: the old one or the new one.
pub fn edit(path: &Path, edit: &Edit<'_>) -> Result<Edited> {
    let source = FileSource::open(path)?;
    let header = read_header(&source, &edit.read)?;
    let in_file = |e| Error::from(e).in_file(source.label());
    let change = Change::of(&header, edit).map_err(in_file)?;
    let mut done = Edited {
        way: Way::Unchanged,
        written: 0,
        renamed: change.renamed,
        deleted: change.deleted,
        notes: Vec::new(),
    };
    let old = header.bytes();
    let new = match fitted(&change.header, old.len()) {
        Some(new) if new == *old => return Ok(done),
        Some(new) => new,
        None if edit.in_place => return Err(no_room(&change, old).in_file(source.label())),
        None => padded(&header, &change.header, edit.reserve).map_err(in_file)?,
    };
    let start = header.data_start();
    let renewed = renewed(path, &source, start, &new, edit)?;
    (done.way, done.written) = put(path, &source, &header, &new, edit)?;
    renewed.write(edit.durability)?;
    done.notes = renewed.notes;
    Ok(done)
}

fn no_room(change: &Change, old: &[u8]) -> Error {
    let (needed, room) = (trimmed(&change.header).len(), old.len());
    let text = format!("the new header takes {needed} bytes, and there is room for {room}");
    Error::usage("NO_ROOM", text)
}

/// Gives the file its new header, by the first way that is possible.
fn put(
    path: &Path,
    source: &FileSource,
    header: &Header<Vec<u8>>,
    new: &[u8],
    edit: &Edit<'_>,
) -> Result<(Way, u64)> {
    let old = header.bytes();
    let watched = Watched::of(header, source, edit);
    let verify = Verify(watched.as_ref());
    if new.len() != old.len() {
        let written = replace_longer(path, source, header, new, edit, verify)?;
        return Ok((Way::Replaced, written));
    }
    let (first, last) = difference(old, new).unwrap_or_default();
    if first / SECTOR == last / SECTOR {
        remove_sidecars(path)?;
        let written = overwrite(path, source, first, &new[first..=last], edit.durability)?;
        return Ok((Way::Sector, written));
    }
    if !edit.in_place {
        let written = replace_same_length(path, source, new, edit, verify)?;
        return Ok((Way::Replaced, written));
    }
    let kept = keep_beside(path, old, edit.durability)?;
    remove_sidecars(path)?;
    match overwrite(path, source, 0, new, edit.durability) {
        Ok(written) => Ok((Way::InPlace, written)),
        Err(error) => {
            // What cannot be put back stays beside the file, under the name that the error gives.
            if overwrite(path, source, 0, old, edit.durability).is_err() {
                let at = kept.keep();
                let text = format!("{error}; the old header is kept in {}", at.display());
                return Err(Error::usage("TORN_HEADER", text).in_file(source.label()));
            }
            Err(error)
        }
    }
}

/// Where a copy of an old header may have been left by a process that was killed while it edited
/// `path` in place: hidden files of the pattern that [`Way::InPlace`] uses.
///
/// # Errors
/// What the system said when the folder was listed.
pub fn left_behind(path: &Path) -> Result<Vec<PathBuf>> {
    let folder = folder_of(path);
    let failed = |e| Error::from(storage::Error::at("list", folder, e));
    let wanted = path.file_name().and_then(|name| name.to_str());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let target = name
            .to_str()
            .and_then(|name| storage::temp::target_of(name, "header"));
        if target.is_some() && target == wanted {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
