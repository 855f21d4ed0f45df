//! From a path to a [`Checkpoint`]: headers read, and how files and index fit together checked (spec
//! chapter 8).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use tonnage_format::{self as format, Catalog, CatalogBuilder, Header, Index, Reason};
use tonnage_storage::{FileSource, MemorySource, Source};

use crate::checkpoint::{Checkpoint, CheckpointFile, Note};
use crate::error::{Error, Result};
use crate::open::{
    AnyHeader, Found, Layout, OpenOptions, find, open_beneath, read_any_header, read_header,
    read_index,
};

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
                let mut checkpoint = match crate::gguf::others_of(&path, &source, options)? {
                    Some(all) => Self::assemble(all, Layout::FileSet, options)?,
                    None => Self::assemble(vec![source], Layout::Single, options)?,
                };
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
        let mut foreign = Vec::new();
        for source in sources {
            let header = match read_any_header(&*source, &options.read)? {
                AnyHeader::Safetensors(header) => header,
                AnyHeader::Gguf(gguf) => {
                    foreign.push((source, *gguf));
                    continue;
                }
            };
            let at = builder.add_source(source.label(), source.len());
            let in_file = |e| Error::from(e).in_file(source.label());
            builder.add_header(&header, at).map_err(in_file)?;
            opened.push(Opened { source, header });
        }
        if let Some((source, _)) = foreign.first() {
            if let Some(other) = opened.first() {
                let text = format!(
                    "{} is GGUF and {} is not: they are no one checkpoint",
                    source.label(),
                    other.source.label()
                );
                return Err(Error::usage("MIXED", text));
            }
            return crate::gguf::assemble(foreign, layout);
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
        let sources = opened.into_iter().map(|file| file.source).collect();
        Checkpoint::with(catalog, sources, files, metadata, notes, layout)
    }
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
            if files.len() > 1 && key == format::forever::CHECKSUMS_KEY {
                // Each file has checksums of its own (spec 13.12).
                continue;
            }
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
