//! The table of sources: what bytes exist.
//!
//! A [`Source`] is one contiguous range of a file. A tensor that lies in several parts, as in a
//! checkpoint that training ranks wrote each for themselves, is a view over several sources, declared
//! with [`Table::add_parts`]; nothing else knows of parts.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::Arc;

use tonnage_format::{Catalog, Dtype, TensorDtype};

use crate::error::{Error, Reason, Result};
use crate::view::{Dims, View, elements};

/// A file, or another place that bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// What messages call it.
    pub label: String,
    /// Its length in bytes.
    pub len: u64,
}

/// A contiguous range of a file that holds a tensor, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The tensor's name. Parts of a tensor share it.
    pub name: Arc<str>,
    /// The dtype of its elements.
    pub dtype: Dtype,
    /// Its extents.
    pub shape: Dims,
    /// Position of its file.
    pub file: u32,
    /// Its first byte in the file.
    pub offset: u64,
}

impl Source {
    /// How many elements it has.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// How many bits it takes.
    pub fn bits(&self) -> u64 {
        self.elements() * self.dtype.bitsize() as u64
    }
}

/// A part of a tensor: a source, or a box in one, and the index at which it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Position of the source.
    pub source: u32,
    /// Its first index in the tensor, one number a dimension.
    pub at: Dims,
    /// The box of the source that it is, by its first index and extents; all of it by default. What a
    /// rank wrote may hold several boxes, or end in zeros.
    pub of: Option<(Dims, Dims)>,
}

impl Part {
    /// All of a source.
    pub fn whole(source: u32, at: &[u64]) -> Part {
        let at = at.into();
        Part {
            source,
            at,
            of: None,
        }
    }
}

/// A tensor that lies in several parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Its name.
    pub name: Arc<str>,
    /// The dtype of its elements.
    pub dtype: Dtype,
    /// Its extents.
    pub shape: Dims,
    /// Its parts.
    pub parts: Vec<Part>,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Source(u32),
    Parts(u32),
    Unknown(String),
}

/// What bytes exist: files, sources in them, and names.
#[derive(Clone, Debug, Default)]
pub struct Table {
    files: Vec<File>,
    sources: Vec<Source>,
    parts: Vec<Parts>,
    entries: Vec<(Arc<str>, Entry)>,
    by_name: HashMap<Arc<str>, u32>,
}

impl PartialEq for Table {
    fn eq(&self, other: &Table) -> bool {
        self.files == other.files
            && self.sources == other.sources
            && self.parts == other.parts
            && self.entries == other.entries
    }
}

impl Table {
    /// A table without rows.
    pub fn new() -> Table {
        Table::default()
    }

    /// The rows of a catalog. One of a dtype that the table of dtypes lacks has a name, and an error
    /// for whoever asks for it.
    ///
    /// # Errors
    /// As [`Table::add`].
    pub fn from_catalog(catalog: &Catalog) -> Result<Table> {
        let mut table = Table::new();
        table.entries.reserve(catalog.len());
        table.sources.reserve(catalog.len());
        table.by_name.reserve(catalog.len());
        for source in catalog.sources() {
            table.add_file(&source.label, source.len);
        }
        for row in catalog.iter() {
            match row.dtype {
                TensorDtype::Known(dtype) => {
                    table.add(row.name, dtype, row.shape, row.source as u32, row.offset)?;
                }
                TensorDtype::Unknown(dtype) => {
                    table.enter(row.name.into(), Entry::Unknown(dtype.to_owned()))?;
                }
            }
        }
        Ok(table)
    }

    /// Adds a file and gives its position.
    pub fn add_file(&mut self, label: &str, len: u64) -> u32 {
        self.files.push(File {
            label: label.to_owned(),
            len,
        });
        (self.files.len() - 1) as u32
    }

    /// Adds a tensor that lies in one piece, and gives the position of its source.
    ///
    /// # Errors
    /// [`Reason::Bounds`] for bytes outside of the file, [`Reason::Granularity`] for a size that is
    /// no whole number of bytes, [`Reason::Form`] for a name twice, [`Reason::Limit`].
    pub fn add(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        file: u32,
        offset: u64,
    ) -> Result<u32> {
        let name: Arc<str> = name.into();
        let position = self.add_range(name.clone(), dtype, shape, file, offset)?;
        self.enter(name, Entry::Source(position))?;
        Ok(position)
    }

    /// Adds a range that no name stands for by itself: a part for [`Table::add_parts`].
    ///
    /// # Errors
    /// As [`Table::add`], but for names.
    pub fn add_range(
        &mut self,
        name: Arc<str>,
        dtype: Dtype,
        shape: &[u64],
        file: u32,
        offset: u64,
    ) -> Result<u32> {
        let bits =
            elements(dtype, shape).map_err(|error| error.tensor(&name))? * dtype.bitsize() as u64;
        if !bits.is_multiple_of(8) {
            return Err(Error::new(Reason::Granularity)
                .tensor(&name)
                .found(format_args!("{bits} bits for shape {shape:?} of {dtype}"))
                .needed("a whole number of bytes"));
        }
        let len = self.files.get(file as usize).map(|file| file.len);
        let end = offset.checked_add(bits / 8);
        // Positions are counted in bits too.
        if end.is_none() || len < end || end > Some(u64::MAX / 8) {
            return Err(Error::new(Reason::Bounds)
                .tensor(&name)
                .range(format_args!("{} bytes from byte {offset}", bits / 8))
                .found(format_args!("a file of {} bytes", len.unwrap_or(0)))
                .needed("bytes of the file"));
        }
        if self.sources.len() >= u32::MAX as usize - 1 {
            return Err(Error::new(Reason::Limit).found("more than 2^32 sources"));
        }
        self.sources.push(Source {
            name,
            dtype,
            shape: shape.into(),
            file,
            offset,
        });
        Ok((self.sources.len() - 1) as u32)
    }

    /// Adds a tensor that lies in several parts. They must tile it; a plan that uses it proves so.
    ///
    /// # Errors
    /// [`Reason::View`] for parts that reach past the shape or have another dtype.
    pub fn add_parts(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        parts: Vec<Part>,
    ) -> Result<()> {
        let parts = Parts {
            name: name.into(),
            dtype,
            shape: shape.into(),
            parts,
        };
        self.mosaic(&parts).map_err(|error| error.tensor(name))?;
        let position = self.parts.len() as u32;
        self.enter(parts.name.clone(), Entry::Parts(position))?;
        self.parts.push(parts);
        Ok(())
    }

    fn enter(&mut self, name: Arc<str>, entry: Entry) -> Result<()> {
        let position = self.entries.len() as u32;
        match self.by_name.entry(name.clone()) {
            Slot::Occupied(_) => Err(Error::new(Reason::Form)
                .tensor(&name)
                .found("two tensors of this name")
                .needed("each name once")),
            Slot::Vacant(slot) => {
                slot.insert(position);
                self.entries.push((name, entry));
                Ok(())
            }
        }
    }

    /// The files.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// The sources.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// The tensors that lie in several parts.
    pub fn parts(&self) -> &[Parts] {
        &self.parts
    }

    /// The names, in the order in which they were added.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &Arc<str>> + '_ {
        self.entries.iter().map(|(name, _)| name)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        let position = *self.by_name.get(name)?;
        self.entries.get(position as usize).map(|(_, entry)| entry)
    }

    /// Whether a name stands for this very source.
    pub(crate) fn stands_for(&self, name: &str, source: u32) -> bool {
        self.entry(name) == Some(&Entry::Source(source))
    }

    /// The parts that a tensor lies in.
    pub(crate) fn pieces(&self, name: &str) -> Vec<Part> {
        match self.entry(name) {
            Some(Entry::Source(at)) => {
                let rank = self.shape(name).map_or(0, <[u64]>::len);
                vec![Part::whole(*at, &Dims::from_elem(0, rank))]
            }
            Some(Entry::Parts(at)) => {
                let parts = self.parts.get(*at as usize);
                let parts = parts.into_iter().flat_map(|one| &one.parts);
                parts.cloned().collect()
            }
            _ => Vec::new(),
        }
    }

    /// The names of tensors of dtypes that are not known.
    pub(crate) fn unknown(&self) -> impl Iterator<Item = &Arc<str>> + '_ {
        let unknown = |entry: &Entry| matches!(entry, Entry::Unknown(_));
        let entries = self.entries.iter().filter(move |one| unknown(&one.1));
        entries.map(|(name, _)| name)
    }

    /// The extents of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        match self.entry(name)? {
            Entry::Source(at) => Some(&self.sources.get(*at as usize)?.shape),
            Entry::Parts(at) => Some(&self.parts.get(*at as usize)?.shape),
            Entry::Unknown(_) => None,
        }
    }

    /// The view of a tensor by its name.
    ///
    /// # Errors
    /// [`Reason::UnknownTensor`], [`Reason::Dtype`] for one of a dtype that is not known.
    pub fn view(&self, name: &str) -> Result<View> {
        match self.entry(name) {
            Some(Entry::Source(at)) => match self.sources.get(*at as usize) {
                Some(source) => View::source(*at, source.dtype, &source.shape),
                None => Err(Error::new(Reason::UnknownTensor).tensor(name)),
            },
            Some(Entry::Parts(at)) => match self.parts.get(*at as usize) {
                Some(parts) => self.mosaic(parts),
                None => Err(Error::new(Reason::UnknownTensor).tensor(name)),
            },
            Some(Entry::Unknown(dtype)) => Err(Error::new(Reason::Dtype)
                .tensor(name)
                .found(format_args!("dtype {dtype:?}"))
                .needed("a dtype of the specification's table")),
            None => Err(Error::new(Reason::UnknownTensor)
                .tensor(name)
                .found(format_args!("{} other tensors", self.entries.len()))),
        }
    }

    fn mosaic(&self, parts: &Parts) -> Result<View> {
        let pieces: Result<Vec<(View, Dims)>> = parts
            .parts
            .iter()
            .map(|part| {
                let source = self.sources.get(part.source as usize).ok_or_else(|| {
                    Error::new(Reason::Form).found(format_args!("source {}", part.source))
                })?;
                let view = View::source(part.source, source.dtype, &source.shape)?;
                let view = match &part.of {
                    Some((start, size)) => view.crop(start, size)?,
                    None => view,
                };
                Ok((view, part.at.clone()))
            })
            .collect();
        View::mosaic(parts.dtype, &parts.shape, &pieces?)
    }
}
