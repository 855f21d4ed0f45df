//! A checkpoint: one or more files behind one table of tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tonnage_engine as engine;
use tonnage_format::{self as format, Catalog, CatalogBuilder, Header, Index, Reason};
use tonnage_storage::{FileSource, MemorySource, MmapSource, PrivateMap, Source};

use crate::error::{Error, Result};
use crate::load::Report;
use crate::names::near;
use crate::open::{Found, Layout, OpenOptions, find, open_beneath, read_header, read_index};
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
    notes: Vec<Note>,
    layout: Layout,
    root: Option<PathBuf>,
    index_path: Option<PathBuf>,
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

struct Opened {
    source: Arc<dyn Source>,
    header: Header<Vec<u8>>,
}

impl Checkpoint {
    /// Opens a file, a folder, or an index file.
    ///
    /// # Errors
    /// What the system said; what is wrong with a header (spec chapters 2 to 7) or an index (8), with the
    /// file's name; `AMBIGUOUS` where a folder holds more than one checkpoint.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// Opens with options.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        match find(path.as_ref())? {
            Found::File(path) => {
                let source: Arc<dyn Source> = Arc::new(FileSource::open(&path)?);
                let mut checkpoint = Self::assemble(vec![source], Layout::Single, options)?;
                checkpoint.root = path.parent().map(Path::to_owned);
                Ok(checkpoint)
            }
            Found::Index { root, path } => Self::open_index(&root, &path, options),
            Found::Set { root, names } => {
                let open = |name: &String| open_beneath(&root, name, options);
                let sources = names.iter().map(open).collect::<Result<Vec<_>>>()?;
                let layout = if sources.len() == 1 {
                    Layout::Single
                } else {
                    Layout::FileSet
                };
                let mut checkpoint = Self::assemble(sources, layout, options)?;
                checkpoint.root = Some(root);
                Ok(checkpoint)
            }
        }
    }

    /// Opens a list of files as one checkpoint. No tensor may be in two of them.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and `INDEX_TENSOR_TWICE`.
    pub fn open_files<P: AsRef<Path>>(paths: &[P], options: &OpenOptions) -> Result<Self> {
        let open = |path: &P| Ok(Arc::new(FileSource::open(path)?) as Arc<dyn Source>);
        let sources = paths.iter().map(open).collect::<Result<Vec<_>>>()?;
        let layout = if sources.len() == 1 {
            Layout::Single
        } else {
            Layout::FileSet
        };
        Self::assemble(sources, layout, options)
    }

    /// Opens bytes that are in memory; messages call them `label`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(
        bytes: impl Into<Arc<[u8]>>,
        label: &str,
        options: &OpenOptions,
    ) -> Result<Self> {
        Self::from_sources(vec![Arc::new(MemorySource::new(bytes, label))], options)
    }

    /// Opens whatever can be read as one checkpoint, one file from each source.
    ///
    /// # Errors
    /// As [`Checkpoint::open_files`].
    pub fn from_sources(sources: Vec<Arc<dyn Source>>, options: &OpenOptions) -> Result<Self> {
        let layout = match &sources[..] {
            [only] if only.file().is_none() => Layout::Bytes,
            [_] => Layout::Single,
            _ => Layout::FileSet,
        };
        Self::assemble(sources, layout, options)
    }

    fn assemble(
        sources: Vec<Arc<dyn Source>>,
        layout: Layout,
        options: &OpenOptions,
    ) -> Result<Self> {
        check_count(sources.len(), options)?;
        let mut builder = CatalogBuilder::new();
        let mut opened = Vec::with_capacity(sources.len());
        for source in sources {
            let header = read_header(&*source, &options.read)?;
            let at = builder.add_source(source.label(), source.len());
            let in_file = |e| Error::from(e).in_file(source.label());
            builder.add_header(&header, at).map_err(in_file)?;
            opened.push(Opened { source, header });
        }
        let catalog = builder.finish()?;
        Ok(Self::of(catalog, opened, layout))
    }

    /// Opens what an index names. A save may replace index and files meanwhile: if the index has changed
    /// when something does not fit, that is looked at anew.
    fn open_index(root: &Path, path: &Path, options: &OpenOptions) -> Result<Self> {
        const ATTEMPTS: usize = 5;
        let mut attempt = 1;
        loop {
            let (index, text) = read_index(root, path, options)?;
            let error = match Self::indexed(root, path, &index, options) {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(error) => error,
            };
            let changed = match read_index(root, path, options) {
                Ok((_, now)) => now != text,
                // The save may just have become a single file, which has no index.
                Err(_) if !path.exists() => return Self::open_with(root, options),
                Err(_) => true,
            };
            if !changed || attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
        }
    }

    fn indexed(root: &Path, path: &Path, index: &Index, options: &OpenOptions) -> Result<Self> {
        let label = path.display().to_string();
        let mut builder = CatalogBuilder::new();
        let mut opened = Vec::with_capacity(index.files().len());
        let mut extra = 0;
        for name in index.files() {
            let source = open_beneath(root, name, options)?;
            let header = read_header(&*source, &options.read)?;
            let at = builder.add_source(source.label(), source.len());
            for info in header.iter_by_offset() {
                if index.get(info.name) != Some(name) {
                    extra += 1;
                    continue;
                }
                let (offset, len) = (header.data_start() + info.begin, info.byte_len());
                let row = format::Row {
                    name: info.name,
                    dtype: info.dtype,
                    shape: info.shape,
                    source: at,
                    offset,
                    len,
                };
                builder
                    .add(row)
                    .map_err(|e| Error::from(e).in_file(source.label()))?;
            }
            opened.push(Opened { source, header });
        }
        let catalog = builder
            .finish()
            .map_err(|e| Error::from(e).in_file(&label))?;
        if catalog.len() < index.len() {
            return Err(lacking(root, index, &catalog));
        }
        let mut checkpoint = Self::of(catalog, opened, Layout::Indexed);
        if extra > 0 {
            let text = format!("the files hold {extra} more tensors than the index places in them");
            checkpoint.notes.push(Note {
                code: "INDEX_EXTRA_TENSORS",
                text,
                file: Some(label.clone()),
            });
        }
        let total = checkpoint.total_bytes();
        if let Some(said) = index.total_size.filter(|&said| said != total) {
            let text = format!("the index says {said} bytes in all, the tensors take {total}");
            checkpoint.notes.push(Note {
                code: "INDEX_TOTAL_SIZE",
                text,
                file: Some(label),
            });
        }
        checkpoint.root = Some(root.to_owned());
        checkpoint.index_path = Some(path.to_owned());
        Ok(checkpoint)
    }

    fn of(catalog: Catalog, opened: Vec<Opened>, layout: Layout) -> Self {
        let files: Vec<CheckpointFile> = opened.iter().map(describe).collect();
        let (metadata, notes) = merge_metadata(&files);
        let sources: Vec<Arc<dyn Source>> = opened.into_iter().map(|file| file.source).collect();
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

    fn mapped(&self, file: usize) -> Result<&[u8]> {
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
        Ok(engine::read(reads, options)?)
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

fn check_count(files: usize, options: &OpenOptions) -> Result<()> {
    let limit = options.read.limits.shards;
    if files as u64 > limit {
        let over = format::Error::new(Reason::LimitShards)
            .found(files)
            .needed(format_args!("at most {limit}"));
        return Err(over.into());
    }
    Ok(())
}

fn describe(file: &Opened) -> CheckpointFile {
    let Opened { source, header } = file;
    let pairs = |metadata: format::Metadata<'_>| {
        metadata
            .iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    };
    CheckpointFile {
        label: source.label().to_owned(),
        len: source.len(),
        data_start: header.data_start(),
        header_padding: header.padding(),
        tensors: header.len(),
        data_bytes: header.data_len(),
        metadata: header.metadata().map(pairs),
    }
}

fn merge_metadata(files: &[CheckpointFile]) -> (BTreeMap<String, String>, Vec<Note>) {
    let (mut merged, mut notes) = (BTreeMap::<String, String>::new(), Vec::new());
    for file in files {
        for (key, value) in file.metadata.iter().flatten() {
            match merged.get(key) {
                None => drop(merged.insert(key.clone(), value.clone())),
                Some(first) if first != value => {
                    let text = format!(
                        "metadata {key:?} differs from that of an earlier file, which counts"
                    );
                    notes.push(Note {
                        code: "METADATA_DIFFERS",
                        text,
                        file: Some(file.label.clone()),
                    });
                }
                Some(_) => {}
            }
        }
    }
    (merged, notes)
}

fn lacking(root: &Path, index: &Index, catalog: &Catalog) -> Error {
    let missing: Vec<(&str, &str)> = index
        .iter()
        .filter(|(name, _)| catalog.position(name).is_none())
        .collect();
    let (name, file) = missing.first().copied().unwrap_or(("", ""));
    let lacking = format::Error::new(Reason::IndexTensorMissing)
        .tensor(name)
        .found(format_args!(
            "{} of {} tensors missing",
            missing.len(),
            index.len()
        ))
        .needed(format_args!("it in {file:?}"));
    Error::from(lacking).in_file(root.join(file).display().to_string())
}
