//! Verifying: everything that is wrong or odd about a checkpoint, file by file, without stopping at the
//! first (spec chapters 2 to 8).
//!
//! A header can only be read up to its first fault, so one file gives at most one error of its own; the
//! other files are still looked at, and so is how they fit together.

mod together;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use tonnage_engine::checksum::{BadChunk, Checker, chunks_of};
use tonnage_engine::{self as engine, Cancel, Options};
use tonnage_foreign::gguf::Gguf;
use tonnage_format::forever::CHECKSUMS_KEY;
use tonnage_format::{Checksums, Header, Reason};
use tonnage_storage::{FileSource, Source, temp};

use crate::checksums::{bad_chunks, compare_sidecar, named};
use crate::error::{Error, Result};
use crate::open::{Found, OpenOptions, find, names_in, open_beneath, read_header};
use crate::publish::SUFFIX;
use together::{indexed, set};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is wrong; it is worth knowing.
    Note,
    /// Readers may differ over it, or be slow.
    Warning,
    /// The checkpoint, or a part of it, cannot be read.
    Error,
}

/// Something found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// A stable code: a reason or lint of the specification, `IO`, or one of `verify`'s own.
    pub code: &'static str,
    /// The clause of the specification, if one says so.
    pub clause: Option<&'static str>,
    /// The file concerned.
    pub file: Option<String>,
    /// The tensor concerned.
    pub tensor: Option<String>,
    /// A sentence.
    pub text: String,
}

/// A file that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileVerdict {
    /// Its path.
    pub label: String,
    /// Whether its header could be read.
    pub readable: bool,
    /// Tensors in it.
    pub tensors: usize,
    /// Bytes of it.
    pub bytes: u64,
    /// Chunks that were compared with their checksums; 0 where there are none.
    pub chunks: u64,
    /// Whether all of it was compared with the hash beside it.
    pub hashed: bool,
}

/// What to verify.
#[derive(Clone, Debug, Default)]
pub struct Verify<'a> {
    /// How files are opened.
    pub open: OpenOptions,
    /// Look at headers only: no data is read, and no checksum compared.
    pub headers_only: bool,
    /// As [`Options::threads`].
    pub threads: Option<usize>,
    /// As [`Options::cancel`].
    pub cancel: Option<&'a Cancel>,
}

impl Verify<'_> {
    fn options(&self) -> Options<'_> {
        Options {
            threads: self.threads,
            cancel: self.cancel,
            ..Options::default()
        }
    }
}

/// What verifying found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// The files that were looked at.
    pub files: Vec<FileVerdict>,
    /// What was found, in the order of the files.
    pub findings: Vec<Finding>,
}

impl Verification {
    /// Whether nothing found is an error.
    pub fn ok(&self) -> bool {
        self.worst() < Some(Severity::Error)
    }

    /// The worst finding's severity.
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }

    /// Tensors in all readable files.
    pub fn tensors(&self) -> usize {
        self.files.iter().map(|file| file.tensors).sum()
    }

    fn error(&mut self, error: &Error) {
        self.findings.push(Finding {
            severity: Severity::Error,
            code: error.code(),
            clause: error.clause(),
            file: error.file().map(str::to_owned),
            tensor: error.tensor().map(str::to_owned),
            text: error.to_string(),
        });
    }

    fn say(
        &mut self,
        severity: Severity,
        code: &'static str,
        file: &str,
        tensor: Option<&str>,
        text: String,
    ) {
        let (file, tensor) = (Some(file.to_owned()), tensor.map(str::to_owned));
        self.findings.push(Finding {
            severity,
            code,
            clause: None,
            file,
            tensor,
            text,
        });
    }
}

type File = (String, Header<Vec<u8>>);

/// Looks at every file of a checkpoint: its header, its layout, how the files fit together, and whether
/// their data is what the checksums say that they have (spec chapter 13).
///
/// # Errors
/// Only where there is nothing to look at: the path does not exist, or a folder cannot be listed. Whatever
/// is wrong with the files is a [`Finding`].
pub fn verify(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Verification> {
    let open = options.clone();
    verify_with(
        path,
        &Verify {
            open,
            ..Verify::default()
        },
    )
}

/// The same, with more to be said about it.
///
/// # Errors
/// As [`verify`]; `CANCELLED`.
pub fn verify_with(path: impl AsRef<Path>, options: &Verify<'_>) -> Result<Verification> {
    let path = path.as_ref();
    let mut verification = Verification::default();
    match find(path) {
        Ok(Found::File(path)) => {
            let source = FileSource::open(&path).map(|source| Arc::new(source) as Arc<dyn Source>);
            look(
                &mut verification,
                source.map_err(Error::from),
                &path,
                options,
            );
        }
        Ok(Found::Set { root, names }) => set(&mut verification, &root, &names, options),
        Ok(Found::Index { root, path }) => indexed(&mut verification, &root, &path, options),
        Err(error) => {
            let (files, indexes) = if path.is_dir() {
                names_in(path)?
            } else {
                Default::default()
            };
            if files.is_empty() && indexes.is_empty() {
                return Err(error);
            }
            verification.error(&error);
            for index in &indexes {
                indexed(&mut verification, path, &path.join(index), options);
            }
            if indexes.is_empty() {
                files
                    .iter()
                    .for_each(|name| drop(look_beneath(&mut verification, path, name, options)));
            }
        }
    }
    if path.is_dir() {
        leftovers(&mut verification, path);
    }
    if options.cancel.is_some_and(Cancel::is_cancelled) {
        return Err(engine::Error::Cancelled.into());
    }
    Ok(verification)
}

fn look_beneath(
    verification: &mut Verification,
    root: &Path,
    name: &str,
    options: &Verify<'_>,
) -> Option<File> {
    let source = open_beneath(root, name, &options.open);
    look(verification, source, &root.join(name), options)
}

fn look(
    verification: &mut Verification,
    source: Result<Arc<dyn Source>>,
    path: &Path,
    options: &Verify<'_>,
) -> Option<File> {
    let label = &path.display().to_string();
    let bytes = source.as_ref().map_or(0, |source| source.len());
    let opened = source.as_ref().ok().map(Arc::clone);
    if let Some(source) = &opened
        && let Some(gguf) = crate::gguf::look(source, &options.open)
    {
        look_gguf(verification, path, &**source, gguf, options);
        return None;
    }
    let header = source.and_then(|source| read_header(&*source, &options.open.read));
    let tensors = header.as_ref().map_or(0, Header::len);
    let verdict = FileVerdict {
        label: label.to_owned(),
        readable: header.is_ok(),
        tensors,
        bytes,
        chunks: 0,
        hashed: false,
    };
    verification.files.push(verdict);
    match header {
        Ok(header) => {
            lints(verification, label, &header);
            if let Some(source) = opened.filter(|_| !options.headers_only) {
                let result = chunks(verification, label, &*source, &header, options)
                    .and_then(|()| sidecar(verification, path, &*source, options));
                if let Err(error) = result {
                    verification.error(&error.in_file(label.clone()));
                }
            }
            Some((label.to_owned(), header))
        }
        Err(error) => {
            verification.error(&error);
            None
        }
    }
}

/// A GGUF file: its header, and the hash beside it. It has no checksums of its own.
fn look_gguf(
    verification: &mut Verification,
    path: &Path,
    source: &dyn Source,
    gguf: Result<Gguf>,
    options: &Verify<'_>,
) {
    let label = path.display().to_string();
    verification.files.push(FileVerdict {
        label: label.clone(),
        readable: gguf.is_ok(),
        tensors: gguf.as_ref().map_or(0, Gguf::len),
        bytes: source.len(),
        chunks: 0,
        hashed: false,
    });
    let hashed = gguf.and_then(|_| match options.headers_only {
        true => Ok(()),
        false => sidecar(verification, path, source, options),
    });
    if let Err(error) = hashed {
        verification.error(&error.in_file(label));
    }
}

/// Compares the data with the checksums that the metadata has.
fn chunks(
    verification: &mut Verification,
    label: &str,
    source: &dyn Source,
    header: &Header<Vec<u8>>,
    options: &Verify<'_>,
) -> Result<()> {
    let metadata = header.metadata();
    let text = metadata.and_then(|pairs| pairs.iter().find(|(key, _)| *key == CHECKSUMS_KEY));
    let Some((_, text)) = text else {
        return Ok(());
    };
    let Some(sums) = Checksums::parse(text)? else {
        let text = "checksums of a kind that this version does not know".to_owned();
        verification.say(Severity::Note, "CHECKSUM_UNKNOWN", label, None, text);
        return Ok(());
    };
    let sums = sums.of_data(header.data_len())?;
    let checker = Checker::new(header.data_start(), header.data_len(), sums);
    let checker = checker.ok_or_else(|| Error::from(Reason::ChecksumForm))?;
    for bad in bad_chunks(source, &checker, &options.options())? {
        verification.error(&corrupt(label, header, &bad));
    }
    if let Some(file) = verification.files.last_mut() {
        file.chunks = chunks_of(header.data_len());
    }
    Ok(())
}

fn corrupt(label: &str, header: &Header<Vec<u8>>, bad: &BadChunk) -> Error {
    let start = header.data_start();
    let end = bad.offset.saturating_add(bad.len);
    let inside = header.iter_by_offset().filter(|info| {
        let (first, last) = (
            start.saturating_add(info.begin),
            start.saturating_add(info.end),
        );
        first < end && last > bad.offset
    });
    named(bad, inside.map(|info| info.name)).in_file(label)
}

/// Compares the whole file with the hash beside it, if there is one.
fn sidecar(
    verification: &mut Verification,
    path: &Path,
    source: &dyn Source,
    options: &Verify<'_>,
) -> Result<()> {
    if !compare_sidecar(path, source, &options.options())? {
        return Ok(());
    }
    if let Some(file) = verification.files.last_mut() {
        file.hashed = true;
    }
    Ok(())
}

fn lints(verification: &mut Verification, label: &str, header: &Header<Vec<u8>>) {
    /// Lints of one kind told one by one; beyond that only their number.
    const TOLD: usize = 20;
    let mut told: HashMap<&'static str, usize> = HashMap::new();
    for lint in header.lints() {
        let count = told.entry(lint.code()).or_default();
        *count += 1;
        if *count <= TOLD {
            verification.say(
                Severity::Warning,
                lint.code(),
                label,
                None,
                lint.to_string(),
            );
        }
    }
    let mut more: Vec<(&'static str, usize)> = told
        .into_iter()
        .filter(|&(_, count)| count > TOLD)
        .collect();
    more.sort_unstable();
    for (code, count) in more {
        verification.say(
            Severity::Warning,
            code,
            label,
            None,
            format!("{} more of this kind", count - TOLD),
        );
    }
}

/// What a killed save left behind.
fn leftovers(verification: &mut Verification, folder: &Path) {
    let used: Vec<String> = verification
        .files
        .iter()
        .map(|file| file.label.clone())
        .collect();
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    for name in names {
        let label = folder.join(&name).display().to_string();
        let ours = temp::target_of(&name, "tmp").or_else(|| temp::target_of(&name, SUFFIX));
        if ours.is_some_and(|target| target.contains(".safetensors")) && !used.contains(&label) {
            let text =
                "a save that is under way, or was cut off, left this; a later save removes it"
                    .to_owned();
            verification.say(Severity::Note, "LEFTOVER", &label, None, text);
        }
    }
}
