//! A header as an owned value, to be looked at, made, and passed through serde.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::OnceLock;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::view::byte_len;
use super::{Dtype, SafeTensorError};
use crate::format::forever::METADATA_KEY;
use crate::format::{Header, Reason};

/// What a header says of one tensor.
#[derive(Debug, Deserialize, Serialize, Clone)]
pub struct TensorInfo {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The extents, in elements.
    pub shape: Vec<usize>,
    /// First byte and one past the last, in the data section.
    pub data_offsets: (usize, usize),
}

/// What a header says. The tensors tile the data section without a gap; a value that does not hold that
/// cannot be made.
#[derive(Debug, Clone)]
pub struct Metadata {
    metadata: Option<HashMap<String, String>>,
    /// In the order of their bytes.
    tensors: Vec<TensorInfo>,
    names: Names,
    /// Places in `tensors` by name, made when the first name is looked up.
    index: OnceLock<HashMap<String, usize>>,
}

/// Many names in one allocation.
#[derive(Debug, Clone, Default)]
struct Names {
    text: String,
    /// Where each name ends, and the next begins.
    ends: Vec<usize>,
}

impl Names {
    fn push(&mut self, name: &str) {
        self.text.push_str(name);
        self.ends.push(self.text.len());
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let name = self.text.get(start..end).unwrap_or_default();
            start = end;
            name
        })
    }
}

impl Metadata {
    /// A header of these tensors, which must come in the order of their bytes.
    ///
    /// # Errors
    /// [`SafeTensorError::InvalidOffset`] for a tensor that does not begin where the one before it ends;
    /// [`SafeTensorError::TensorInvalidInfo`], [`SafeTensorError::ValidationOverflow`] and
    /// [`SafeTensorError::MisalignedSlice`] for one whose size is not that of its dtype and shape;
    /// [`SafeTensorError::JsonError`] for a name that repeats or is `__metadata__`.
    pub fn new(
        metadata: Option<HashMap<String, String>>,
        tensors: Vec<(String, TensorInfo)>,
    ) -> Result<Self, SafeTensorError> {
        let mut this = Self::with_capacity(metadata, tensors.len());
        let mut end = 0;
        for (name, info) in tensors {
            end = check(&name, &info, end)?;
            if name == METADATA_KEY {
                let why = Reason::WriteReservedName;
                return Err(SafeTensorError::name_taken(&name, why));
            }
            this.push(&name, info);
        }
        // Of names that repeat, the index has one place only.
        let index = this.index();
        let mut named = this.names.iter().enumerate();
        match named.find(|(at, name)| index.get(*name) != Some(at)) {
            Some((_, name)) => Err(SafeTensorError::name_taken(name, Reason::WriteDuplicate)),
            None => {
                drop(named);
                Ok(this)
            }
        }
    }

    /// What a header that was read says.
    pub(super) fn of_header(header: &Header<&[u8]>) -> Result<Self, SafeTensorError> {
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let pairs = header.metadata().map(|map| map.iter().map(owned).collect());
        let mut this = Self::with_capacity(pairs, header.len());
        for info in header.iter_by_offset() {
            let known = |error| SafeTensorError::from_format(&error, &[]);
            let owned = TensorInfo {
                dtype: info.dtype.known().map_err(known)?,
                shape: info.shape.iter().map(|&extent| extent as usize).collect(),
                data_offsets: (info.begin as usize, info.end as usize),
            };
            this.push(info.name, owned);
        }
        Ok(this)
    }

    fn with_capacity(metadata: Option<HashMap<String, String>>, len: usize) -> Self {
        Metadata {
            metadata,
            tensors: Vec::with_capacity(len),
            names: Names::default(),
            index: OnceLock::new(),
        }
    }

    fn push(&mut self, name: &str, info: TensorInfo) {
        self.names.push(name);
        self.tensors.push(info);
    }

    fn index(&self) -> &HashMap<String, usize> {
        let place = |(at, name): (usize, &str)| (name.to_owned(), at);
        let index = || self.names.iter().enumerate().map(place).collect();
        self.index.get_or_init(index)
    }

    /// What is said of the tensor of this name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(*self.index().get(name)?)
    }

    /// What is said of each tensor.
    pub fn tensors(&self) -> HashMap<String, &TensorInfo> {
        let names = self.names.iter().map(str::to_owned);
        names.zip(&self.tensors).collect()
    }

    /// The names in the order of the tensors' bytes.
    pub fn offset_keys(&self) -> Vec<String> {
        self.names.iter().map(str::to_owned).collect()
    }

    /// Bytes of the data section.
    pub fn data_len(&self) -> usize {
        self.tensors.last().map_or(0, |info| info.data_offsets.1)
    }

    /// The `__metadata__` of the header.
    pub fn metadata(&self) -> &Option<HashMap<String, String>> {
        &self.metadata
    }
}

/// Checks a tensor that should begin at `start`; gives its end.
fn check(name: &str, info: &TensorInfo, start: usize) -> Result<usize, SafeTensorError> {
    let (begin, end) = info.data_offsets;
    let length = end.checked_sub(begin).filter(|_| begin == start);
    let length = length.ok_or_else(|| SafeTensorError::InvalidOffset(name.to_owned()))?;
    if byte_len(info.dtype, &info.shape)? != length as u64 {
        return Err(SafeTensorError::TensorInvalidInfo);
    }
    Ok(end)
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let entries = self.tensors.len() + usize::from(self.metadata.is_some());
        let mut map = serializer.serialize_map(Some(entries))?;
        if let Some(metadata) = &self.metadata {
            let sorted: BTreeMap<&String, &String> = metadata.iter().collect();
            map.serialize_entry(METADATA_KEY, &sorted)?;
        }
        for (name, info) in self.names.iter().zip(&self.tensors) {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let mut metadata = None;
        let mut tensors = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == METADATA_KEY {
                let Strings(strings) = map.next_value()?;
                if metadata.replace(strings).is_some() {
                    return Err(A::Error::duplicate_field(METADATA_KEY));
                }
            } else {
                tensors.push((key, map.next_value::<TensorInfo>()?));
            }
        }
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        Metadata::new(metadata, tensors).map_err(A::Error::custom)
    }
}

/// `__metadata__`: each key once.
struct Strings(HashMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(StringsVisitor)
    }
}

struct StringsVisitor;

impl<'de> Visitor<'de> for StringsVisitor {
    type Value = Strings;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of strings by string")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
        let mut strings = HashMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if strings.contains_key(&key) {
                let twice = format_args!("metadata key {key:?} stands twice").to_string();
                return Err(A::Error::custom(twice));
            }
            strings.insert(key, value);
        }
        Ok(Strings(strings))
    }
}
