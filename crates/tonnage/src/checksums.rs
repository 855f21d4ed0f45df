//! Checksums of files (spec chapter 13): those of chunks, which stand in the metadata, and the hash of a whole
//! file, which lies beside it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tonnage_engine::checksum::{BadChunk, CHUNK, Checker, Sums, verify_chunks};
use tonnage_engine::{self as engine, Check, Options};
use tonnage_format::forever::{CHECKSUM_CHUNK, CHECKSUMS_KEY, SIDECAR_SUFFIX};
use tonnage_format::{self as format, Checksums, Reason};
use tonnage_storage::{
    self as storage, AtomicFile, AtomicOptions, Durability, FileSource, Sink, Source,
};

use crate::checkpoint::{Checkpoint, CheckpointFile, Note};
use crate::error::{Error, Result, mismatch};

// One number in two rooms that do not know each other.
const _: () = assert!(CHUNK == CHECKSUM_CHUNK);

impl CheckpointFile {
    /// The file's checksums; `None` if it has none, or of a kind that this version does not know.
    ///
    /// # Errors
    /// `CHECKSUM_FORM`, `CHECKSUM_STALE`.
    pub fn checksums(&self) -> Result<Option<Vec<u64>>> {
        let pairs = self.metadata.iter().flatten();
        let mut values = pairs.filter(|(key, _)| key == CHECKSUMS_KEY);
        let Some((_, text)) = values.next() else {
            return Ok(None);
        };
        let in_file = |e: format::Error| Error::from(e).in_file(&self.label);
        match Checksums::parse(text).map_err(in_file)? {
            None => Ok(None),
            Some(found) => Ok(Some(found.of_data(self.data_bytes).map_err(in_file)?)),
        }
    }

    /// What compares the file's data with its checksums.
    ///
    /// # Errors
    /// As [`CheckpointFile::checksums`]; `NO_CHECKSUMS`.
    pub fn checker(&self) -> Result<Checker> {
        let none = || Error::from(Reason::NoChecksums).in_file(&self.label);
        let sums = self.checksums()?.ok_or_else(none)?;
        // The number of sums was checked against the length.
        Checker::new(self.data_start, self.data_bytes, sums).ok_or_else(none)
    }
}

impl Checkpoint {
    /// The error for a chunk that is not what its checksum says, with the tensors that lie in it.
    pub fn corrupt(&self, file: usize, bad: &BadChunk) -> Error {
        let end = bad.offset.saturating_add(bad.len);
        let inside = |tensor: &crate::TensorRef<'_>| {
            let last = tensor.offset().saturating_add(tensor.byte_len());
            tensor.file() == file && tensor.offset() < end && last > bad.offset
        };
        let names = self.iter().filter(inside).map(|tensor| tensor.name());
        let label = self.files().get(file).map(|file| file.label.clone());
        named(bad, names).in_file(label.unwrap_or_default())
    }
}

/// The error for a chunk in which these tensors have bytes.
pub(crate) fn named<'a>(bad: &BadChunk, mut names: impl Iterator<Item = &'a str>) -> Error {
    let mut error = mismatch(bad);
    if let Some(first) = names.next() {
        error = error.tensor(first);
    }
    let more: Vec<&str> = names.collect();
    if !more.is_empty() {
        let found = format!("{}{}", error.found_text(), beside(&more));
        error = error.found(found);
    }
    error.into()
}

/// The other tensors of a chunk, or how many they are.
fn beside(more: &[&str]) -> String {
    /// Names that a sentence can hold.
    const TOLD: usize = 4;
    match more.len() {
        n if n <= TOLD => format!("; it holds bytes of {more:?} too"),
        n => format!("; it holds bytes of {n} more tensors"),
    }
}

impl Checkpoint {
    /// Does some reading and compares what is read with the checksums of these files, given by position:
    /// every chunk of which a byte is read, whole. `work` has to pass its options on to what reads, and to
    /// read each byte once.
    ///
    /// # Errors
    /// Those of `work`; `NO_CHECKSUMS`, `CHECKSUM_FORM`, `CHECKSUM_STALE` before it; `CHECKSUM_MISMATCH` with the
    /// tensors that lie in the chunk.
    pub fn verified<T>(
        &self,
        files: impl IntoIterator<Item = usize>,
        options: &Options<'_>,
        work: impl FnOnce(&Options<'_>) -> Result<T>,
    ) -> Result<T> {
        let verifying = Verifying::new(self, files)?;
        let options = Options {
            check: Some(&verifying),
            ..*options
        };
        let done = work(&options).map_err(|e| verifying.named(self, e))?;
        verifying
            .rest(&options)
            .map_err(|e| verifying.named(self, e))?;
        Ok(done)
    }
}

/// Compares what others read with the checksums of files: see [`Checkpoint::watch`].
#[derive(Clone)]
pub struct Watch(Arc<Verifying>);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// As [`Checkpoint::verified`], for reading that goes on elsewhere, such as a pipeline's: it is given
    /// [`Watch::check`], its error goes through [`Watch::named`], and [`Watch::rest`] follows it.
    ///
    /// # Errors
    /// `NO_CHECKSUMS`, `CHECKSUM_FORM`, `CHECKSUM_STALE`.
    pub fn watch(&self, files: impl IntoIterator<Item = usize>) -> Result<Watch> {
        Verifying::new(self, files).map(|verifying| Watch(Arc::new(verifying)))
    }
}

impl Watch {
    /// What looks at the bytes that are read.
    pub fn check(&self) -> Arc<dyn Check + Send + Sync> {
        Arc::clone(&self.0) as _
    }

    /// Reads and compares the rest of the chunks of which a byte was read.
    ///
    /// # Errors
    /// What the system said; `CHECKSUM_MISMATCH`, still to be [named](Watch::named).
    pub fn rest(&self, options: &Options<'_>) -> Result<()> {
        self.0.rest(options)
    }

    /// The error, with the tensors where it is about a chunk.
    pub fn named(&self, checkpoint: &Checkpoint, error: Error) -> Error {
        self.0.named(checkpoint, error)
    }
}

/// What a file says of its bytes, found right as far as that was to be found out beforehand.
#[derive(Debug, Default)]
pub(crate) struct Carried {
    /// Whether it has checksums that this version knows.
    pub checksums: bool,
    /// Whether its hash lies beside it; the whole file was compared with that.
    pub sidecar: bool,
    /// What cannot be kept.
    pub notes: Vec<Note>,
}

impl Carried {
    /// Of a file that is to be copied.
    ///
    /// # Errors
    /// `CHECKSUM_FORM`, `CHECKSUM_STALE`: copying would make good what nobody knows to be good; `CHECKSUM_MISMATCH`
    /// for a file that is not what the hash beside it says; what the system said.
    pub fn of(
        file: &CheckpointFile,
        source: &dyn Source,
        options: &Options<'_>,
    ) -> Result<Carried> {
        let mut carried = Carried {
            checksums: file.checksums()?.is_some(),
            ..Carried::default()
        };
        let mut keys = file.metadata.iter().flatten();
        if !carried.checksums && keys.any(|(key, _)| key == CHECKSUMS_KEY) {
            carried.notes.push(Note {
                code: "CHECKSUM_UNKNOWN",
                text: "its checksums are of a kind that this version does not know; the copy has none of them".into(),
                file: Some(file.label.clone()),
            });
        }
        if source.file().is_some() {
            match known_sidecar(Path::new(&file.label), source, options)? {
                Beside::Right => carried.sidecar = true,
                Beside::Unknown(note) => carried.notes.push(note),
                Beside::Nothing => {}
            }
        }
        Ok(carried)
    }
}

/// What lies beside a file.
pub(crate) enum Beside {
    /// No sidecar.
    Nothing,
    /// The hash of what the file has.
    Right,
    /// Something that is no hash of this file, so there is nothing to renew.
    Unknown(Note),
}

/// Compares a file with its sidecar, if there is one that is legible.
///
/// # Errors
/// `CHECKSUM_MISMATCH`; what the system said.
pub(crate) fn known_sidecar(
    path: &Path,
    source: &dyn Source,
    options: &Options<'_>,
) -> Result<Beside> {
    match compare_sidecar(path, source, options) {
        Ok(true) => Ok(Beside::Right),
        Ok(false) => Ok(Beside::Nothing),
        Err(error) if error.code() == Reason::ChecksumForm.code() => Ok(Beside::Unknown(Note {
            code: "SIDECAR_UNKNOWN",
            text: format!("what lay beside it was no hash of it and was not renewed: {error}"),
            file: Some(path.display().to_string()),
        })),
        Err(error) => Err(error.in_file(path.display().to_string())),
    }
}

/// Verifies what is read: for each file its checker.
pub(crate) struct Verifying {
    /// By the address of the source, as sources are told apart.
    files: HashMap<usize, Verified>,
    /// The first chunk that was wrong.
    bad: Mutex<Option<(usize, BadChunk)>>,
}

struct Verified {
    /// Position of the file in its checkpoint.
    file: usize,
    source: Arc<dyn Source>,
    checker: Checker,
}

impl Verifying {
    pub fn new(checkpoint: &Checkpoint, files: impl IntoIterator<Item = usize>) -> Result<Self> {
        let mut by_source = HashMap::new();
        for file in files {
            let (Some(source), Some(known)) =
                (checkpoint.source(file), checkpoint.files().get(file))
            else {
                continue;
            };
            if let Entry::Vacant(place) = by_source.entry(address(&**source)) {
                place.insert(Verified {
                    file,
                    source: Arc::clone(source),
                    checker: known.checker()?,
                });
            }
        }
        Ok(Verifying {
            files: by_source,
            bad: Mutex::new(None),
        })
    }

    /// Reads and compares what no tensor that was read covers: the rest of the chunks at the seams.
    pub fn rest(&self, options: &Options<'_>) -> Result<()> {
        let quiet = Options {
            progress: None,
            ..*options
        };
        let size = |range: &Range<u64>| range.end.saturating_sub(range.start);
        for Verified {
            source, checker, ..
        } in self.files.values()
        {
            let read = |buffer: &mut Vec<u8>, range: Range<u64>| {
                // A part of one chunk, so it fits.
                buffer.resize(size(&range) as usize, 0);
                let offset = range.start;
                let read = source.read_exact_at(offset, buffer);
                read.map_err(|error| engine::Error::Storage { error, offset })?;
                self.check(&**source, offset, &mut [&buffer[..]].into_iter())
            };
            engine::for_each_block(checker.missing(), &quiet, "verify", size, Vec::new, read)?;
        }
        Ok(())
    }

    /// The error, with the tensors where it is about a chunk.
    pub fn named(&self, checkpoint: &Checkpoint, error: Error) -> Error {
        let bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        match *bad {
            Some((file, bad)) if error.code() == Reason::ChecksumMismatch.code() => {
                checkpoint.corrupt(file, &bad)
            }
            _ => error,
        }
    }
}

impl Check for Verifying {
    fn check(
        &self,
        source: &dyn Source,
        offset: u64,
        parts: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<(), engine::Error> {
        let Some(Verified { file, checker, .. }) = self.files.get(&address(source)) else {
            return Ok(());
        };
        checker.feed(offset, parts).map_err(|bad| {
            let mut first = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert((*file, bad));
            let label = source.label().to_owned();
            engine::Error::Corrupt { label, bad }
        })
    }
}

fn address(source: &dyn Source) -> usize {
    std::ptr::from_ref(source).cast::<()>().addr()
}

/// Every chunk of a file that is not what its checksum says, in their order.
///
/// # Errors
/// What the system said; that it was cancelled.
pub fn bad_chunks(
    source: &dyn Source,
    checker: &Checker,
    options: &Options<'_>,
) -> Result<Vec<BadChunk>> {
    Ok(verify_chunks(source, checker, options)?)
}

/// The checksums of a file's data, as its metadata should have them.
///
/// # Errors
/// What the system said; that it was cancelled; `WRITE_TOO_LARGE`.
pub fn checksums_of(
    source: &dyn Source,
    data_start: u64,
    data_len: u64,
    options: &Options<'_>,
) -> Result<Checksums> {
    let zeros = Checksums::zeros(data_len)?;
    let sums = engine::checksum::sum_chunks(source, data_start, data_len, options)?;
    Ok(Checksums { sums, ..zeros })
}

/// What `Sums` found, as checksums of the data.
pub(crate) fn finished(sums: &Sums, data_len: u64) -> Result<Checksums> {
    let unfinished = || Error::usage("WRITER", "bytes of the data were never written");
    let sums = sums.finish_at(data_len).ok_or_else(unfinished)?;
    Ok(Checksums { data_len, sums })
}

/// Where a file's sidecar lies.
pub fn sidecar_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SIDECAR_SUFFIX);
    PathBuf::from(name)
}

/// The BLAKE3 hash that a file's sidecar gives; `None` if it has no sidecar.
///
/// # Errors
/// `CHECKSUM_FORM`; what the system said.
pub fn read_sidecar(path: &Path) -> Result<Option<[u8; 32]>> {
    /// Longer than any name with its hash.
    const MOST: u64 = 8192;
    let at = sidecar_of(path);
    let wrong = || {
        let form = format::Error::new(Reason::ChecksumForm);
        let needed = form.needed("the hash, two spaces, and the file's name on one line");
        Error::from(needed).in_file(at.display().to_string())
    };
    let text = match std::fs::metadata(&at) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(meta) if meta.len() > MOST || !meta.is_file() => return Err(wrong()),
        _ => std::fs::read_to_string(&at),
    };
    let text = match text {
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => return Err(wrong()),
        text => text.map_err(|e| storage::Error::at("read", &at, e))?,
    };
    let name = path.file_name().and_then(|name| name.to_str());
    let hash = text.split_once("  ").filter(|(_, rest)| {
        rest.strip_suffix('\n')
            .is_some_and(|named| Some(named) == name)
    });
    let hash = hash.and_then(|(hash, _)| unhex(hash)).ok_or_else(wrong)?;
    Ok(Some(hash))
}

/// Compares a whole file with the hash beside it; `false` if it has none.
///
/// # Errors
/// `CHECKSUM_FORM`, `CHECKSUM_MISMATCH`; what the system said.
pub(crate) fn compare_sidecar(
    path: &Path,
    source: &dyn Source,
    options: &Options<'_>,
) -> Result<bool> {
    let Some(needed) = read_sidecar(path)? else {
        return Ok(false);
    };
    let found = engine::hash::blake3_of(source, options)?;
    if found == needed {
        return Ok(true);
    }
    let wrong = format::Error::new(Reason::ChecksumMismatch);
    let wrong = wrong.found(format_args!("BLAKE3 {}", hex(&found)));
    Err(wrong.needed(hex(&needed)).into())
}

/// Puts a sidecar beside a file.
///
/// # Errors
/// What the system said; `WRITER` where the file's name is not UTF-8.
pub fn write_sidecar(path: &Path, hash: &[u8; 32], durability: Durability) -> Result<()> {
    let name = path.file_name().and_then(|name| name.to_str());
    let unnamed = || {
        let text = format!("a sidecar needs a name in UTF-8: {}", path.display());
        Error::usage("WRITER", text)
    };
    let name = name
        .filter(|name| !name.contains('\n'))
        .ok_or_else(unnamed)?;
    let options = AtomicOptions {
        durability,
        replace_link: true,
        ..AtomicOptions::default()
    };
    let file = AtomicFile::create(sidecar_of(path), &options)?;
    file.write_all_at(0, format!("{}  {name}\n", hex(hash)).as_bytes())?;
    Ok(file.commit()?)
}

/// Removes a sidecar whose file is about to change (spec 13.15). Without one, this does nothing.
///
/// # Errors
/// What the system said.
pub fn remove_sidecar(path: &Path) -> Result<()> {
    let at = sidecar_of(path);
    match std::fs::remove_file(&at) {
        Err(e) if !is_absent(&e) => Err(storage::Error::at("remove", &at, e).into()),
        _ => Ok(()),
    }
}

/// Whether there was nothing of the name, not even room for one.
fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidFilename
    )
}

/// The hash of a file that is complete and not yet named.
pub(crate) fn hash_of(file: &AtomicFile, options: &Options<'_>) -> Result<[u8; 32]> {
    let clone = file.file().try_clone();
    let clone = clone.map_err(|e| storage::Error::new("read", file.label(), e))?;
    let source = FileSource::from_file(clone, file.label())?;
    Ok(engine::hash::blake3_of(&source, options)?)
}

/// A hash in hexadecimal.
pub fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let lower = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 64 || !text.bytes().all(lower) {
        return None;
    }
    let mut hash = [0; 32];
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(hash)
}
