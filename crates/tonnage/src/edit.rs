//! Editing a file's header: metadata and names, while the tensors' bytes stay as they are.
//!
//! Checksums of the data (spec 13.10) stay right, a hash of the whole file does not: its sidecar is removed.
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

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions as FileOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tonnage_engine::{self as engine, Copy, Options};
use tonnage_format::{
    self as format, Header, Order, ReadOptions, Reason, TensorSpec, WriteOptions, layout,
};
use tonnage_storage::{
    self as storage, AtomicFile, AtomicOptions, Durability, FileSource, Sink, Source, temp::Temp,
};

use crate::checksums::remove_sidecar;
use crate::error::{Error, Result};
use crate::open::read_header;

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
}

/// Edits the header of one file.
///
/// # Errors
/// Everything that opening the file refuses; new names that repeat or are reserved (`WRITE_DUPLICATE`,
/// `WRITE_RESERVED_NAME`); `NO_ROOM` where [`Edit::in_place`] was asked for and the header does not fit;
/// `CHANGED` where another process replaced the file meanwhile;
/// what the system said. Whatever is returned, the file is whole: the old one or the new one.
pub fn edit(path: &Path, edit: &Edit<'_>) -> Result<Edited> {
    let source = FileSource::open(path)?;
    let header = read_header(&source, &edit.read)?;
    let change = Change::of(&header, edit).map_err(|e| Error::from(e).in_file(source.label()))?;
    let old = header.bytes();
    let done = |way, written| {
        Ok(Edited {
            way,
            written,
            renamed: change.renamed,
            deleted: change.deleted,
        })
    };
    let Some(new) = fitted(&change.header, old.len()) else {
        if edit.in_place {
            let text = format!(
                "the new header takes {} bytes, and there is room for {}",
                trimmed(&change.header).len(),
                old.len()
            );
            return Err(Error::usage("NO_ROOM", text).in_file(source.label()));
        }
        remove_sidecar(path)?;
        let written = replace_longer(path, &source, &header, &change.header, edit)?;
        return done(Way::Replaced, written);
    };
    let Some((first, last)) = difference(old, &new) else {
        return done(Way::Unchanged, 0);
    };
    // A hash of the whole file is not that of the file to come (spec 13.15).
    remove_sidecar(path)?;
    if first / SECTOR == last / SECTOR {
        let written = overwrite(path, &source, first, &new[first..=last], edit.durability)?;
        return done(Way::Sector, written);
    }
    if edit.in_place {
        let kept = keep_beside(path, old, edit.durability)?;
        return match overwrite(path, &source, 0, &new, edit.durability) {
            Ok(written) => done(Way::InPlace, written),
            Err(error) => {
                // What cannot be put back stays beside the file, under the name that the error gives.
                if overwrite(path, &source, 0, old, edit.durability).is_err() {
                    let at = kept.keep();
                    let text = format!("{error}; the old header is kept in {}", at.display());
                    return Err(Error::usage("TORN_HEADER", text).in_file(source.label()));
                }
                Err(error)
            }
        };
    }
    let written = replace_same_length(path, &source, &new, edit)?;
    done(Way::Replaced, written)
}

/// The header to come.
struct Change {
    header: Vec<u8>,
    renamed: usize,
    deleted: usize,
}

impl Change {
    fn of(header: &Header<Vec<u8>>, edit: &Edit<'_>) -> Result<Change, format::Error> {
        let mut metadata: Option<BTreeMap<&str, &str>> =
            header.metadata().map(|old| old.iter().collect());
        let mut deleted = 0;
        for key in edit.delete {
            deleted += metadata
                .as_mut()
                .is_some_and(|pairs| pairs.remove(key.as_str()).is_some())
                as usize;
        }
        for (key, value) in edit.set {
            metadata.get_or_insert_default().insert(key, value);
        }
        if deleted > 0 && metadata.as_ref().is_some_and(BTreeMap::is_empty) {
            metadata = None;
        }
        let mut renamed = 0;
        let mut names: Vec<Cow<'_, str>> = Vec::with_capacity(header.len());
        for info in header.iter_by_offset() {
            let new = edit
                .rename
                .and_then(|rename| rename(info.name))
                .filter(|new| new != info.name);
            renamed += new.is_some() as usize;
            names.push(new.map_or(Cow::Borrowed(info.name), Cow::Owned));
        }
        let mut specs = Vec::with_capacity(header.len());
        for (info, name) in header.iter_by_offset().zip(&names) {
            let dtype = info.dtype.known().map_err(|e| e.tensor(info.name))?;
            specs.push(TensorSpec {
                name,
                dtype,
                shape: info.shape,
            });
        }
        let pairs: Option<Vec<(&str, &str)>> = metadata.map(|pairs| pairs.into_iter().collect());
        // The order of the bytes is kept, and the reader has made sure that they leave no gap, so every
        // tensor stays where it is.
        let options = WriteOptions {
            order: Order::Given,
            reserve: 0,
            ..WriteOptions::default()
        };
        let header = layout(&specs, pairs.as_deref(), &options)?.header;
        Ok(Change {
            header,
            renamed,
            deleted,
        })
    }
}

/// A header without its padding.
fn trimmed(header: &[u8]) -> &[u8] {
    let len = header
        .iter()
        .rposition(|&byte| byte != format::forever::PAD)
        .map_or(0, |at| at + 1);
    &header[..len]
}

/// The header padded to exactly `len` bytes, if it fits.
fn fitted(header: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut new = trimmed(header).to_vec();
    if new.len() > len {
        return None;
    }
    new.resize(len, format::forever::PAD);
    set_length(&mut new);
    Some(new)
}

/// Writes the prefix: the length of what follows it.
fn set_length(header: &mut [u8]) {
    let len = header.len() as u64 - format::forever::PREFIX_LEN;
    if let Some(prefix) = header.first_chunk_mut() {
        *prefix = len.to_le_bytes();
    }
}

/// First and last byte that differ.
fn difference(old: &[u8], new: &[u8]) -> Option<(usize, usize)> {
    let first = old.iter().zip(new).position(|(a, b)| a != b)?;
    let last = old.iter().zip(new).rposition(|(a, b)| a != b)?;
    Some((first, last))
}

/// Overwrites bytes of the file that `source` has open, and of no other: if `path` has come to mean
/// another file, the header that was edited is not that file's.
fn overwrite(
    path: &Path,
    source: &FileSource,
    offset: usize,
    bytes: &[u8],
    durability: Durability,
) -> Result<u64> {
    let failed = |e: io::Error| Error::from(storage::Error::at("write", path, e));
    let file = FileOptions::new().write(true).open(path).map_err(failed)?;
    let id = |file: &File| {
        file.metadata()
            .map(|meta| (meta.dev(), meta.ino(), meta.len()))
    };
    let now = id(&file).map_err(failed)?;
    let then = source.file().map(id).transpose().map_err(failed)?;
    if then != Some(now) || source.len() != now.2 {
        let text = "the file was replaced while it was edited; nothing was changed";
        return Err(Error::usage("CHANGED", text).in_file(source.label()));
    }
    file.write_all_at(bytes, offset as u64).map_err(failed)?;
    if durability.syncs_files() {
        file.sync_all().map_err(failed)?;
    }
    Ok(bytes.len() as u64)
}

/// A copy of the old header in a hidden file, on the disk before the file itself is touched.
fn keep_beside(path: &Path, header: &[u8], durability: Durability) -> Result<Temp> {
    let kept = Temp::beside(path, "header")?;
    let failed = |e| Error::from(storage::Error::at("write", kept.path(), e));
    kept.file().write_all_at(header, 0).map_err(failed)?;
    if durability.syncs_files() {
        kept.file().sync_all().map_err(failed)?;
        storage::sync_dir(folder_of(path))?;
    }
    Ok(kept)
}

fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn create(path: &Path, edit: &Edit<'_>) -> Result<AtomicFile> {
    let options = AtomicOptions {
        durability: edit.durability,
        ..AtomicOptions::default()
    };
    Ok(AtomicFile::create(path, &options)?)
}

/// Replaces the file by one with a header of the same length.
fn replace_same_length(
    path: &Path,
    source: &FileSource,
    new: &[u8],
    edit: &Edit<'_>,
) -> Result<u64> {
    let target = create(path, edit)?;
    let Some(from) = source.file() else {
        return Err(Error::from(Reason::DataTruncated));
    };
    copy_file(from, &target, source, edit)?;
    target.write_all_at(0, new)?;
    target.commit()?;
    Ok(source.len())
}

/// Copies a whole file, by the system's own means: where the file system can, blocks are shared.
fn copy_file(from: &File, target: &AtomicFile, source: &FileSource, edit: &Edit<'_>) -> Result<()> {
    /// Bytes a call, between two looks at the cancellation.
    const PART: u64 = 64 << 20;
    let failed = |e| Error::from(storage::Error::new("copy", source.label(), e));
    let mut from = from.try_clone().map_err(failed)?;
    io::Seek::rewind(&mut from).map_err(failed)?;
    let mut done = 0;
    while done < source.len() {
        if edit
            .options
            .cancel
            .is_some_and(engine::Cancel::is_cancelled)
        {
            return Err(engine::Error::Cancelled.into());
        }
        let part = PART.min(source.len() - done);
        let copied = io::copy(&mut (&mut from).take(part), &mut target.file()).map_err(failed)?;
        if copied == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        done += copied;
        if let Some(progress) = edit.options.progress {
            progress(engine::Progress {
                done,
                total: source.len(),
            });
        }
    }
    Ok(())
}

/// Replaces the file by one with a longer header.
fn replace_longer(
    path: &Path,
    source: &FileSource,
    header: &Header<Vec<u8>>,
    new: &[u8],
    edit: &Edit<'_>,
) -> Result<u64> {
    let mut new = new.to_vec();
    // A data section that starts on a page goes on doing so.
    let on_page = header
        .data_start()
        .is_multiple_of(format::forever::PAGE_ALIGN);
    let align = if on_page {
        format::forever::PAGE_ALIGN
    } else {
        format::forever::HEADER_ALIGN
    };
    let padded = (new.len() as u64)
        .checked_add(edit.reserve)
        .and_then(|len| len.checked_next_multiple_of(align));
    let padded = padded
        .filter(|&len| len <= format::forever::MAX_HEADER_LEN)
        .ok_or(Reason::WriteTooLarge)?;
    new.resize(padded as usize, format::forever::PAD);
    set_length(&mut new);
    let len = padded
        .checked_add(header.data_len())
        .ok_or(Reason::WriteSize)?;
    let target = create(path, edit)?;
    target.reserve(len)?;
    target.write_all_at(0, &new)?;
    let data = Copy {
        source,
        from: header.data_start(),
        to: padded,
        len: header.data_len(),
    };
    engine::copy(&target, &[data], &edit.options)?;
    target.commit()?;
    Ok(len)
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
mod tests {
    use super::*;
    use crate::{Checkpoint, ErrorKind};
    use tonnage_format::Dtype;

    /// A file with `n` tensors, room for `reserve` bytes, and distinct values.
    fn file(folder: &Path, n: usize, reserve: u64) -> PathBuf {
        let names: Vec<String> = (0..n).map(|i| format!("t{i:03}")).collect();
        let specs: Vec<TensorSpec<'_>> = names
            .iter()
            .map(|name| TensorSpec {
                name,
                dtype: Dtype::U8,
                shape: &[3],
            })
            .collect();
        let options = WriteOptions {
            reserve,
            ..WriteOptions::default()
        };
        let mut bytes = layout(&specs, Some(&[("format", "pt")]), &options)
            .unwrap()
            .header;
        bytes.extend((0..3 * n).map(|i| i as u8));
        let path = folder.join("m.safetensors");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn set(key: &str, value: &str) -> [(String, String); 1] {
        [(key.to_owned(), value.to_owned())]
    }

    fn whole(path: &Path, n: usize) -> Checkpoint {
        let checkpoint = Checkpoint::open(path).unwrap();
        let values: Vec<u8> = checkpoint
            .iter()
            .flat_map(|tensor| tensor.read().unwrap())
            .collect();
        assert_eq!(values, (0..3 * n).map(|i| i as u8).collect::<Vec<_>>());
        let names = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(names, 1, "nothing else is left");
        checkpoint
    }

    #[test]
    fn a_change_within_one_sector_moves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), 1, 100);
        let inode =
            |path: &Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
        let before = inode(&path);
        let done = edit(
            &path,
            &Edit {
                set: &set("k", "value"),
                ..Edit::default()
            },
        )
        .unwrap();
        assert_eq!((done.way, done.renamed, done.deleted), (Way::Sector, 0, 0));
        assert!(done.written < SECTOR as u64);
        assert_eq!(inode(&path), before);
        assert_eq!(whole(&path, 1).metadata()["k"], "value");
        let again = edit(
            &path,
            &Edit {
                set: &set("k", "value"),
                ..Edit::default()
            },
        )
        .unwrap();
        assert_eq!((again.way, again.written), (Way::Unchanged, 0));
        let delete = ["k".to_owned(), "absent".to_owned(), "format".to_owned()];
        let done = edit(
            &path,
            &Edit {
                delete: &delete,
                ..Edit::default()
            },
        )
        .unwrap();
        assert_eq!((done.way, done.deleted), (Way::Sector, 2));
        assert!(whole(&path, 1).metadata().is_empty());
    }

    #[test]
    fn a_longer_change_replaces_the_file_unless_asked_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), 100, 200);
        let len = std::fs::metadata(&path).unwrap().len();
        let done = edit(
            &path,
            &Edit {
                set: &set("k", "v"),
                ..Edit::default()
            },
        )
        .unwrap();
        assert_eq!((done.way, done.written), (Way::Replaced, len));
        assert_eq!(whole(&path, 100).metadata()["k"], "v");
        let in_place = Edit {
            set: &set("k", "longer"),
            in_place: true,
            ..Edit::default()
        };
        assert_eq!(edit(&path, &in_place).unwrap().way, Way::InPlace);
        assert_eq!(whole(&path, 100).metadata()["k"], "longer");
        assert!(left_behind(&path).unwrap().is_empty());
        let long = set("k", &"x".repeat(10_000));
        let error = edit(
            &path,
            &Edit {
                set: &long,
                in_place: true,
                ..Edit::default()
            },
        )
        .unwrap_err();
        assert_eq!((error.code(), error.kind()), ("NO_ROOM", ErrorKind::Usage));
        let done = edit(
            &path,
            &Edit {
                set: &long,
                reserve: 4096,
                ..Edit::default()
            },
        )
        .unwrap();
        assert_eq!(done.way, Way::Replaced);
        let checkpoint = whole(&path, 100);
        assert!(checkpoint.files()[0].header_padding >= 4096);
        assert_eq!(checkpoint.files()[0].data_start % 8, 0);
    }

    #[test]
    fn names_change_and_bytes_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), 20, 0);
        let shout = |name: &str| name.strip_prefix("t00").map(|rest| format!("T{rest}"));
        let done = edit(
            &path,
            &Edit {
                rename: Some(&shout),
                ..Edit::default()
            },
        )
        .unwrap();
        assert_eq!(done.renamed, 10);
        let checkpoint = whole(&path, 20);
        assert!(checkpoint.get("T7").is_some() && checkpoint.get("t007").is_none());
        assert!(checkpoint.get("t010").is_some());
        for (rename, code) in [
            (
                &(|_: &str| Some("same".to_owned())) as Renamer<'_>,
                "WRITE_DUPLICATE",
            ),
            (
                &|name: &str| (name == "T1").then(|| "__metadata__".to_owned()),
                "WRITE_RESERVED_NAME",
            ),
        ] {
            let error = edit(
                &path,
                &Edit {
                    rename: Some(rename),
                    ..Edit::default()
                },
            )
            .unwrap_err();
            assert_eq!(error.code(), code);
        }
        whole(&path, 20);
    }

    #[test]
    fn a_cancelled_edit_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), 100, 0);
        let old = std::fs::read(&path).unwrap();
        let cancel = engine::Cancel::new();
        cancel.cancel();
        let options = Options {
            cancel: Some(&cancel),
            ..Options::default()
        };
        for value in ["x", &"x".repeat(5000)] {
            let error = edit(
                &path,
                &Edit {
                    set: &set("format", value),
                    options,
                    ..Edit::default()
                },
            )
            .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled);
            assert_eq!(std::fs::read(&path).unwrap(), old);
        }
        whole(&path, 100);
        let source = FileSource::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, &old).unwrap();
        let error = overwrite(&path, &source, 8, b"x", Durability::None).unwrap_err();
        assert_eq!(error.code(), "CHANGED");
        assert_eq!(std::fs::read(&path).unwrap(), old);
        let absent = folder.path().join("absent.safetensors");
        assert_eq!(
            edit(&absent, &Edit::default()).unwrap_err().kind(),
            ErrorKind::Io
        );
        std::fs::write(&absent, b"short").unwrap();
        assert_eq!(
            edit(&absent, &Edit::default()).unwrap_err().code(),
            "FILE_TOO_SMALL"
        );
    }
}
