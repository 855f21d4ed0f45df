//! A checkpoint: one or more files behind one table of tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tonnage_engine as engine;
use tonnage_foreign::gguf::Gguf;
use tonnage_format::{self as format, Catalog, Reason};
use tonnage_storage::{MmapSource, PrivateMap, Source};

use crate::error::{Error, Result};
use crate::load::Report;
use crate::names::near;
use crate::open::Layout;
use crate::tensor::TensorRef;

/// An opened checkpoint. Opening reads headers only; tensors are read when they are asked for.
///
/// It can be shared between threads.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) catalog: Catalog,
    sources: Vec<Arc<dyn Source>>,
    maps: Vec<OnceLock<MmapSource>>,
    private: Vec<OnceLock<Arc<PrivateMap>>>,
    files: Vec<CheckpointFile>,
    metadata: BTreeMap<String, String>,
    pub(crate) notes: Vec<Note>,
    layout: Layout,
    pub(crate) root: Option<PathBuf>,
    pub(crate) index_path: Option<PathBuf>,
    /// The headers of GGUF files, one a file; empty for other files.
    pub(crate) gguf: Vec<Gguf>,
    report: Mutex<Option<Report>>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointFile {
    /// Its path, or what the source is called.
    pub label: String,
    /// Bytes of the file.
    pub len: u64,
    /// First byte of the data section.
    pub data_start: u64,
    /// Spaces after the header's object, into which metadata can grow.
    pub header_padding: u64,
    /// Tensors that the header describes.
    pub tensors: usize,
    /// Bytes of the data section.
    pub data_bytes: u64,
    /// The header's `__metadata__`, in its order; `None` where there is none.
    pub metadata: Option<Vec<(String, String)>>,
}

/// Something worth a word that is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// A stable code.
    pub code: &'static str,
    /// What it is, in a sentence.
    pub text: String,
    /// The file concerned.
    pub file: Option<String>,
}

impl Checkpoint {
    pub(crate) fn with(
        catalog: Catalog,
        sources: Vec<Arc<dyn Source>>,
        files: Vec<CheckpointFile>,
        metadata: BTreeMap<String, String>,
        notes: Vec<Note>,
        layout: Layout,
    ) -> Self {
        Checkpoint {
            catalog,
            maps: sources.iter().map(|_| OnceLock::new()).collect(),
            private: sources.iter().map(|_| OnceLock::new()).collect(),
            sources,
            files,
            metadata,
            notes,
            layout,
            root: None,
            index_path: None,
            gguf: Vec::new(),
            report: Mutex::new(None),
        }
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.catalog.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.catalog.is_empty()
    }

    /// The tensor of this name, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorRef<'_>> {
        self.catalog
            .position(name)
            .and_then(|position| self.at(position))
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// `UNKNOWN_TENSOR`, with the nearest names.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        self.get(name).ok_or_else(|| {
            let unknown = format::Error::new(Reason::UnknownTensor).tensor(name);
            let file = self
                .root
                .as_ref()
                .map(|root| root.display().to_string())
                .filter(|_| self.files.len() > 1);
            let label = file
                .or_else(|| self.files.first().map(|file| file.label.clone()))
                .unwrap_or_default();
            let names = self.catalog.iter().map(|row| row.name);
            Error::from(unknown)
                .in_file(label)
                .suggest(near(name, names))
        })
    }

    /// The tensor at a position, in the order of [`Checkpoint::iter`].
    pub fn at(&self, position: usize) -> Option<TensorRef<'_>> {
        self.catalog.row(position).map(|row| TensorRef {
            checkpoint: self,
            position,
            row,
        })
    }

    /// The tensors in the order of their bytes, file by file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorRef<'_>> + '_ {
        self.catalog
            .iter()
            .enumerate()
            .map(|(position, row)| TensorRef {
                checkpoint: self,
                position,
                row,
            })
    }

    /// The same as [`Checkpoint::iter`].
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorRef<'_>> + '_ {
        self.iter()
    }

    /// The tensors sorted by name.
    pub fn iter_by_name(&self) -> impl Iterator<Item = TensorRef<'_>> + '_ {
        self.catalog
            .positions_by_name()
            .into_iter()
            .filter_map(|position| self.at(position))
    }

    /// The names in the order of [`Checkpoint::iter`].
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> + '_ {
        self.catalog.iter().map(|row| row.name)
    }

    /// The files.
    pub fn files(&self) -> &[CheckpointFile] {
        &self.files
    }

    /// The source of a file, by its position in [`Checkpoint::files`].
    pub fn source(&self, file: usize) -> Option<&Arc<dyn Source>> {
        self.sources.get(file)
    }

    /// The metadata of all files together. Where two files disagree the first counts, and a note says so.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// What was seen at opening that is worth a word.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// What was recognised.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The folder.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// The index file.
    pub fn index_path(&self) -> Option<&Path> {
        self.index_path.as_deref()
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.catalog.total_bytes()
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.catalog.elements()
    }

    /// The table behind it.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// A tensor's bytes where they lie: in memory, or in a map of the file. A file that is truncated while
    /// the map is read kills the process; [`Checkpoint::read`] does not have that danger.
    ///
    /// # Errors
    /// `UNKNOWN_TENSOR`; what the system said when it was asked for the map.
    pub fn view(&self, name: &str) -> Result<&[u8]> {
        let tensor = self.tensor(name)?;
        self.bytes_of(&tensor.row)
    }

    pub(crate) fn bytes_of(&self, row: &format::Row<'_>) -> Result<&[u8]> {
        let all = self.mapped(row.source)?;
        let end = row.offset.saturating_add(row.len);
        let range = usize::try_from(row.offset).unwrap_or(usize::MAX)
            ..usize::try_from(end).unwrap_or(usize::MAX);
        // The catalog checked every row against its source, so the range is there.
        all.get(range)
            .ok_or_else(|| Error::from(Reason::DataTruncated))
    }

    pub(crate) fn mapped(&self, file: usize) -> Result<&[u8]> {
        let source = &self.sources[file];
        if let Some(bytes) = source.bytes() {
            return Ok(bytes);
        }
        if self.maps[file].get().is_none() {
            let map = MmapSource::from_file(self.file_of(file)?, source.label())?;
            // Another thread may have been faster; its map is as good.
            let _ = self.maps[file].set(map);
        }
        Ok(self.maps[file]
            .get()
            .and_then(|map| map.bytes())
            .unwrap_or(&[]))
    }

    fn file_of(&self, file: usize) -> Result<File> {
        let source = &self.sources[file];
        let failed =
            |e: std::io::Error| Error::from(tonnage_storage::Error::new("map", source.label(), e));
        let file = source
            .file()
            .ok_or_else(|| failed(std::io::ErrorKind::Unsupported.into()))?;
        file.try_clone().map_err(failed)
    }

    /// A writable map of a file that keeps what is written to itself: what another language gets to see as
    /// a buffer. Made once and shared.
    ///
    /// # Errors
    /// What the system said; `Unsupported` for a source that is no file.
    pub fn private_map(&self, file: usize) -> Result<Arc<PrivateMap>> {
        if let Some(map) = self.private[file].get() {
            return Ok(Arc::clone(map));
        }
        let map = Arc::new(PrivateMap::from_file(
            &self.file_of(file)?,
            self.sources[file].label(),
        )?);
        Ok(Arc::clone(self.private[file].get_or_init(|| map)))
    }

    /// A tensor's bytes, read.
    ///
    /// # Errors
    /// `UNKNOWN_TENSOR`; what the system said.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        self.tensor(name)?.read()
    }

    /// A tensor's bytes, read into `dst`.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; `BUFFER_SIZE` if `dst` has another length.
    pub fn read_into(&self, name: &str, dst: &mut [u8]) -> Result<()> {
        self.tensor(name)?.read_into(dst)
    }

    /// Reads many tensors at once, each by position into a buffer of its length.
    ///
    /// # Errors
    /// As [`Checkpoint::read_into`]; `CANCELLED`.
    pub fn read_many(
        &self,
        jobs: Vec<(usize, &mut [u8])>,
        options: &engine::Options<'_>,
    ) -> Result<engine::Report> {
        let mut reads = Vec::with_capacity(jobs.len());
        for (position, dst) in jobs {
            let row = self
                .catalog
                .row(position)
                .ok_or_else(|| Error::from(Reason::UnknownTensor))?;
            check_buffer(row.name, row.len, dst.len())?;
            reads.push(engine::Read {
                source: &*self.sources[row.source],
                offset: row.offset,
                dst,
            });
        }
        engine::read(reads, options).map_err(|error| self.name_tensor(error))
    }

    /// The error of a run, with the tensor whose bytes could not be read.
    pub(crate) fn name_tensor(&self, error: engine::Error) -> Error {
        let found = match &error {
            engine::Error::Storage { error, offset } => self.tensor_at(error.label(), *offset),
            _ => None,
        };
        let error = Error::from(error);
        match found {
            Some((name, range)) => error.about(name, Some(range)),
            None => error,
        }
    }

    /// The tensor that has this byte of the file with this label, and its bytes.
    fn tensor_at(&self, label: &str, offset: u64) -> Option<(&str, std::ops::Range<u64>)> {
        let file = (self.sources.iter()).position(|source| source.label() == label)?;
        let bytes = |row: &format::Row<'_>| row.offset..row.offset.saturating_add(row.len);
        let mut rows = self.catalog.iter().filter(|row| row.source == file);
        rows.find(|row| bytes(row).contains(&offset))
            .map(|row| (row.name, bytes(&row)))
    }

    /// What the last [`Checkpoint::load`] did.
    pub fn report(&self) -> Option<Report> {
        self.report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_report(&self, report: Report) {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }
}

pub(crate) fn check_buffer(name: &str, needed: u64, found: usize) -> Result<()> {
    if needed == found as u64 {
        return Ok(());
    }
    Err(Error::usage(
        "BUFFER_SIZE",
        format!("tensor {name:?} takes {needed} bytes, the buffer has {found}"),
    ))
}
