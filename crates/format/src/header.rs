//! A header as a value: how many bytes it takes, and what it says (spec chapters 2 to 7).
//!
//! Nothing here reads: [`probe`] says which bytes are needed next, whatever they come from, and
//! [`Header::parse`] turns them into a table that borrows or owns them.

use alloc::vec::Vec;

use crate::dtype::Dtype;
use crate::error::{Error, Reason};
use crate::forever::{MAX_HEADER_LEN, MIN_HEADER_LEN, PAD, PREFIX_LEN};
use crate::limits::{Limits, Quirks, ReadOptions};
use crate::lint::Lint;
use crate::scan::{Entry, Table, scan};
use crate::tiling;

/// What a sans-I/O function wants: more bytes, or nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<T> {
    /// `len` bytes from `offset` of the file are needed to go on.
    Need {
        /// First byte needed.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The answer.
    Done(T),
}

/// Looks at the first bytes of a file, as many as there are, and says which are missing for the
/// header to be parsed. `Done(end)` means that the header ends at byte `end` and `prefix` covers it.
///
/// `file_len`, where it is known, is checked before anybody asks for memory.
///
/// # Errors
/// A length that cannot be: spec 2.1 to 2.4, 10.2.
pub fn probe(
    prefix: &[u8],
    file_len: Option<u64>,
    options: &ReadOptions,
) -> Result<Step<u64>, Error> {
    let have = prefix.len() as u64;
    if file_len.is_some_and(|len| len < PREFIX_LEN) {
        return Err(too_small(file_len.unwrap_or(0)));
    }
    let Some((length, _)) = prefix.split_first_chunk() else {
        return Ok(Step::Need {
            offset: have,
            len: PREFIX_LEN - have,
        });
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_LEN {
        return Err(Error::over(Reason::HeaderTooLarge, length, MAX_HEADER_LEN).at(0));
    }
    Limits::check(length, options.limits.header_bytes, Reason::LimitHeader)?;
    let end = PREFIX_LEN + length;
    if let Some(len) = file_len.filter(|&len| len < end) {
        return Err(Error::new(Reason::HeaderPastEnd)
            .found(format_args!(
                "a header of {length} bytes in a file of {len}"
            ))
            .needed(format_args!("at least {end} bytes"))
            .at(0));
    }
    if length < MIN_HEADER_LEN {
        return Err(Error::new(Reason::HeaderTooShort)
            .found(format_args!("{length} bytes"))
            .needed(format_args!("at least {MIN_HEADER_LEN}"))
            .at(0));
    }
    if have < end {
        return Ok(Step::Need {
            offset: have,
            len: end - have,
        });
    }
    Ok(Step::Done(end))
}

fn too_small(len: u64) -> Error {
    Error::new(Reason::FileTooSmall)
        .found(format_args!("{len} bytes"))
        .needed("at least 8")
}

/// A dtype as a header names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorDtype<'a> {
    /// A dtype of the table.
    Known(Dtype),
    /// A name that this version does not know (spec 5.2): the tensor can be listed, not read.
    Unknown(&'a str),
}

impl<'a> TensorDtype<'a> {
    /// The dtype, if it is known.
    ///
    /// # Errors
    /// [`Reason::UnsupportedDtype`] for a name that is not in the table.
    pub fn known(self) -> Result<Dtype, Error> {
        match self {
            TensorDtype::Known(dtype) => Ok(dtype),
            TensorDtype::Unknown(name) => Err(Error::unsupported_dtype(name)),
        }
    }

    /// The name as in the header.
    pub fn name(self) -> &'a str {
        match self {
            TensorDtype::Known(dtype) => dtype.name(),
            TensorDtype::Unknown(name) => name,
        }
    }
}

/// One tensor of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its dtype.
    pub dtype: TensorDtype<'a>,
    /// Its extents in elements (for `F4`, elements, not bytes).
    pub shape: &'a [u64],
    /// First byte, counted from the start of the data section.
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
}

impl TensorInfo<'_> {
    /// Bytes the tensor takes.
    pub fn byte_len(&self) -> u64 {
        self.end - self.begin
    }
}

/// A parsed header over `B`, bytes from the start of a file that cover at least the header.
///
/// ```
/// use tonnage_format::{Header, ReadOptions};
///
/// let json = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
/// let mut file = (json.len() as u64).to_le_bytes().to_vec();
/// file.extend_from_slice(json);
/// file.extend_from_slice(&[0; 8]);
/// let header = Header::parse(&file[..], Some(file.len() as u64), &ReadOptions::strict())?;
/// assert_eq!(header.get("w").unwrap().shape, [2]);
/// # Ok::<(), tonnage_format::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Header<B: AsRef<[u8]> = Vec<u8>> {
    bytes: B,
    table: Table,
    /// Entries in the order of their bytes, where that is not the order of the header.
    by_offset: Option<Vec<u32>>,
    end: u64,
    data_len: u64,
}

impl<B: AsRef<[u8]>> Header<B> {
    /// Parses the header at the start of `bytes` and checks that its tensors tile the data section.
    ///
    /// `file_len` is the length of the whole file; `None` where it cannot be known, and then the
    /// data section is taken to end where its last tensor ends.
    ///
    /// # Errors
    /// Everything that chapters 2 to 7 of the specification refuse, and the budgets of chapter 10.
    pub fn parse(bytes: B, file_len: Option<u64>, options: &ReadOptions) -> Result<Self, Error> {
        let file = bytes.as_ref();
        let end = match probe(file, file_len, options)? {
            Step::Done(end) => end,
            Step::Need { .. } if file.len() < 8 => return Err(too_small(file.len() as u64)),
            Step::Need { offset, len } => {
                return Err(Error::new(Reason::HeaderPastEnd)
                    .found(format_args!("{offset} bytes"))
                    .needed(format_args!("{len} more")));
            }
        };
        let json = json_of(file, end);
        if let Err(error) = core::str::from_utf8(json) {
            let at = PREFIX_LEN + error.valid_up_to() as u64;
            return Err(Error::new(Reason::InvalidUtf8).found(error).at(at));
        }
        let mut table = scan(json, options)?;
        unique_names(&mut table, json, options)?;
        let (by_offset, data_end) = tiling::check(&table, json, options)?;
        let data_len = file_len.map_or(data_end, |len| len - end);
        tiling::check_end(&table, json, &by_offset, data_end, data_len)?;
        Ok(Header {
            bytes,
            table,
            by_offset,
            end,
            data_len,
        })
    }

    fn json(&self) -> &[u8] {
        json_of(self.bytes.as_ref(), self.end)
    }

    /// The bytes that the header was parsed from.
    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// Gives the bytes back.
    pub fn into_bytes(self) -> B {
        self.bytes
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.table.entries.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.table.entries.is_empty()
    }

    /// First byte of the data section: 8 + N.
    pub fn data_start(&self) -> u64 {
        self.end
    }

    /// Bytes of the data section.
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Whitespace after the header's object: room for a longer header without moving data.
    pub fn padding(&self) -> u64 {
        (self.json().len() - self.table.object.1) as u64
    }

    /// Position of the tensor of this name, in the order of the header.
    pub fn position(&self, name: &str) -> Option<usize> {
        let json = self.json();
        let name_of = |i: u32| self.name_bytes(json, i);
        self.table
            .names
            .find(name.as_bytes(), name_of)
            .map(|i| i as usize)
    }

    fn name_bytes<'a>(&'a self, json: &'a [u8], position: u32) -> &'a [u8] {
        let entry = self.table.entries.get(position as usize);
        entry.map_or(&[], |entry| self.table.bytes(json, entry.name))
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.position(name)
            .and_then(|position| self.tensor(position))
    }

    /// The tensor of this name, or an error that says it is not there.
    ///
    /// # Errors
    /// [`Reason::UnknownTensor`].
    pub fn require(&self, name: &str) -> Result<TensorInfo<'_>, Error> {
        self.get(name)
            .ok_or_else(|| Error::new(Reason::UnknownTensor).tensor(name))
    }

    /// The tensor at a position, in the order of the header.
    pub fn tensor(&self, position: usize) -> Option<TensorInfo<'_>> {
        let entry = self.table.entries.get(position)?;
        Some(self.info(entry, position))
    }

    fn info<'a>(&'a self, entry: &'a Entry, position: usize) -> TensorInfo<'a> {
        let json = self.json();
        let dtype = match self.table.dtype(entry) {
            Some(dtype) => TensorDtype::Known(dtype),
            None => TensorDtype::Unknown(self.table.unknown_dtype(json, position)),
        };
        TensorInfo {
            name: self.table.text(json, entry.name),
            dtype,
            shape: self.table.shape(entry),
            begin: entry.begin,
            end: entry.end,
        }
    }

    /// The tensors in the order of the header.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> + '_ {
        self.table
            .entries
            .iter()
            .enumerate()
            .map(|(i, entry)| self.info(entry, i))
    }

    /// Positions in the order of the tensors' bytes, empty tensors before their neighbour.
    pub fn positions_by_offset(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        (0..self.len()).map(|i| match &self.by_offset {
            Some(order) => order.get(i).map_or(i, |&at| at as usize),
            None => i,
        })
    }

    /// The tensors in the order of their bytes.
    pub fn iter_by_offset(&self) -> impl Iterator<Item = TensorInfo<'_>> + '_ {
        self.positions_by_offset()
            .filter_map(|position| self.tensor(position))
    }

    /// The tensors sorted by name (bytes of UTF-8). Sorts anew at each call.
    pub fn iter_by_name(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> + '_ {
        let mut all: Vec<TensorInfo<'_>> = self.iter().collect();
        all.sort_unstable_by(|a, b| a.name.cmp(b.name));
        all.into_iter()
    }

    /// The header's `__metadata__`, if it has one.
    pub fn metadata(&self) -> Option<Metadata<'_>> {
        let pairs = self.table.metadata.as_deref()?;
        Some(Metadata {
            table: &self.table,
            json: self.json(),
            pairs,
        })
    }

    /// What is allowed but worth a word (spec chapter 10, "lints").
    pub fn lints(&self) -> Vec<Lint> {
        let tail = self.json().get(self.table.object.1..).unwrap_or(&[]);
        let mut found = Vec::new();
        if self.table.object.0 != 0 {
            found.push(Lint::LeadingWhitespace);
        }
        if tail.iter().any(|&byte| byte != PAD) {
            found.push(Lint::PaddingNotSpaces);
        }
        if self.table.metadata_null {
            found.push(Lint::MetadataNull);
        }
        crate::lint::header(self.end, &mut found);
        for tensor in self.iter() {
            crate::lint::tensor(&tensor, &mut found);
        }
        found
    }
}

fn json_of(file: &[u8], end: u64) -> &[u8] {
    file.get(PREFIX_LEN as usize..end as usize).unwrap_or(&[])
}

fn unique_names(table: &mut Table, json: &[u8], options: &ReadOptions) -> Result<(), Error> {
    let mut names = core::mem::take(&mut table.names);
    let mut replaced = Vec::new();
    let name_of = |i: u32| match table.entries.get(i as usize) {
        Some(entry) => table.bytes(json, entry.name),
        None => &[],
    };
    names.finish(name_of, |earlier, _| {
        replaced.push(earlier);
        if options.quirks.has(Quirks::DUPLICATE_TENSOR_LAST_WINS) {
            return Ok(());
        }
        let name = core::str::from_utf8(name_of(earlier)).unwrap_or("");
        Err(Error::new(Reason::DuplicateTensor)
            .tensor(name)
            .found("the name again")
            .needed("each name once"))
    })?;
    table.names = names;
    if !replaced.is_empty() {
        replaced.sort_unstable();
        table.drop_entries(json, &replaced);
    }
    Ok(())
}

/// The `__metadata__` of a header: strings by strings, in the order of the header.
#[derive(Clone, Copy, Debug)]
pub struct Metadata<'a> {
    table: &'a Table,
    json: &'a [u8],
    pairs: &'a [(crate::scan::Span, crate::scan::Span)],
}

impl<'a> Metadata<'a> {
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.iter().find(|&(k, _)| k == key).map(|(_, value)| value)
    }

    /// Keys and values in the order of the header.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'a str, &'a str)> + use<'a> {
        let Metadata { table, json, pairs } = *self;
        pairs
            .iter()
            .map(move |&(key, value)| (table.text(json, key), table.text(json, value)))
    }
}
