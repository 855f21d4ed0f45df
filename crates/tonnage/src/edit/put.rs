//! From the header to come to a file that has it.

use std::fs::{File, OpenOptions as FileOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tonnage_engine::{self as engine, Check, Copy, Options};
use tonnage_format::{Header, Reason};
use tonnage_storage::{
    self as storage, AtomicFile, AtomicOptions, Durability, FileSource, Sink, Source, temp::Temp,
};

use super::Edit;
use super::verify::{Verify, remove_sidecars};
use crate::error::{Error, Result};

/// Overwrites bytes of the file that `source` has open, and of no other: if `path` has come to mean
/// another file, the header that was edited is not that file's.
pub(super) fn overwrite(
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
pub(super) fn keep_beside(path: &Path, header: &[u8], durability: Durability) -> Result<Temp> {
    let kept = Temp::beside(path, "header")?;
    let failed = |e| Error::from(storage::Error::at("write", kept.path(), e));
    kept.file().write_all_at(header, 0).map_err(failed)?;
    if durability.syncs_files() {
        kept.file().sync_all().map_err(failed)?;
        storage::sync_dir(folder_of(path))?;
    }
    Ok(kept)
}

pub(super) fn folder_of(path: &Path) -> &Path {
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

/// Replaces the file by one with a header of the same length, once its data is what its checksums say.
pub(super) fn replace_same_length(
    path: &Path,
    source: &FileSource,
    new: &[u8],
    edit: &Edit<'_>,
    verify: Verify<'_>,
) -> Result<u64> {
    let target = create(path, edit)?;
    let Some(from) = source.file() else {
        return Err(Error::from(Reason::DataTruncated));
    };
    copy_file(from, &target, source, edit)?;
    // The system copied it, perhaps without reading a byte: the copy itself is compared.
    let clone = target.file().try_clone();
    let clone = clone.map_err(|e| Error::from(storage::Error::new("read", target.label(), e)))?;
    verify.copy(
        &FileSource::from_file(clone, source.label())?,
        &edit.options,
    )?;
    target.write_all_at(0, new)?;
    remove_sidecars(path)?;
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

/// Replaces the file by one with a longer header; its data is compared with its checksums on the way.
pub(super) fn replace_longer(
    path: &Path,
    source: &FileSource,
    header: &Header<Vec<u8>>,
    new: &[u8],
    edit: &Edit<'_>,
    verify: Verify<'_>,
) -> Result<u64> {
    let start = new.len() as u64;
    let len = start
        .checked_add(header.data_len())
        .ok_or(Reason::WriteSize)?;
    let target = create(path, edit)?;
    target.reserve(len)?;
    target.write_all_at(0, new)?;
    let data = Copy {
        source,
        from: header.data_start(),
        to: start,
        len: header.data_len(),
    };
    let options = Options {
        check: verify.0.map(|check| check as &dyn Check),
        ..edit.options
    };
    let copied = engine::copy(&target, &[data], &options);
    copied.map_err(|error| verify.named(error.into()))?;
    remove_sidecars(path)?;
    target.commit()?;
    Ok(len)
}
