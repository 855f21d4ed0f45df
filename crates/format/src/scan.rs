//! One pass over a header's JSON into a compact table (spec chapters 3 and 4).
//!
//! A tensor costs 32 bytes, its dimensions eight each and its place in the name index eight; names
//! and metadata stay in the header's own bytes. Only strings with escapes are copied, into one pool.

use alloc::string::String;
use alloc::vec::Vec;

use crate::dtype::Dtype;
use crate::error::{Error, Reason};
use crate::forever::METADATA_KEY;
use crate::json::{Cursor, SkipRules, Str, skip_value};
use crate::keys::KeyStack;
use crate::limits::{Limits, Quirks, ReadOptions};
use crate::names::NameIndex;
use crate::room::grow;

/// Where a string lies: in the header's JSON, or (the high bit of `len`) decoded in the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    start: u32,
    len: u32,
}

const POOLED: u32 = 1 << 31;
const UNKNOWN: u8 = u8::MAX;
/// Characters of the longest dtype name, `F8_E4M3FNUZ`, and its quote.
const LONGEST_DTYPE: usize = 12;
/// Entries whose length tells how many more there may be.
const SAMPLE: usize = 16;
/// Bytes of `"":{"dtype":"U8","shape":[],"data_offsets":[0,0]}`, and a comma.
const SHORTEST_ENTRY: usize = 50;
/// Bytes of `"":""`, and a comma.
const SHORTEST_PAIR: usize = 6;

/// A tensor's row. A header has at most 10^8 bytes, so 32 bits reach every place in it.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub name: Span,
    dims: u32,
    rank: u16,
    dtype: u8,
    pub begin: u64,
    pub end: u64,
}

/// What one pass found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub entries: Vec<Entry>,
    dims: Vec<u64>,
    /// Names of dtypes that the table does not know, by the entry that has them, ascending.
    unknown: Vec<(u32, Span)>,
    pub metadata: Option<Vec<(Span, Span)>>,
    /// Whether metadata is null, which a quirk takes for absent.
    pub metadata_null: bool,
    pool: String,
    pub names: NameIndex,
    /// First and one past the last byte of the object, within the header.
    pub object: (usize, usize),
}

/// The fields of an entry while it is read.
#[derive(Default)]
struct Fields {
    dtype: Option<Str>,
    shape: Option<(u32, u16)>,
    offsets: Option<(u64, u64)>,
}

impl Table {
    /// The string of a span. `json` is the header that was scanned; should its owner have changed
    /// it since (a mapped file can), the string is empty rather than wrong.
    pub fn text<'a>(&'a self, json: &'a [u8], span: Span) -> &'a str {
        let start = span.start as usize;
        let range = start..start + (span.len & !POOLED) as usize;
        if span.len & POOLED != 0 {
            return self.pool.get(range).unwrap_or("");
        }
        json.get(range)
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .unwrap_or("")
    }

    /// The bytes of a span's string: what comparing needs.
    pub fn bytes<'a>(&'a self, json: &'a [u8], span: Span) -> &'a [u8] {
        text_of(&self.pool, json, span)
    }

    pub fn shape(&self, entry: &Entry) -> &[u64] {
        let start = entry.dims as usize;
        self.dims
            .get(start..start + entry.rank as usize)
            .unwrap_or(&[])
    }

    pub fn dtype(&self, entry: &Entry) -> Option<Dtype> {
        Dtype::ALL.get(entry.dtype as usize).copied()
    }

    /// The name of an unknown dtype of the entry at `position`.
    pub fn unknown_dtype<'a>(&'a self, json: &'a [u8], position: usize) -> &'a str {
        match self
            .unknown
            .binary_search_by_key(&(position as u32), |&(at, _)| at)
        {
            Ok(at) => self
                .unknown
                .get(at)
                .map_or("", |&(_, span)| self.text(json, span)),
            Err(_) => "",
        }
    }

    /// Drops the entries at `positions` (ascending), which later ones of the same name replace.
    pub fn drop_entries(&mut self, json: &[u8], positions: &[u32]) {
        let mut kept = NameIndex::default();
        let mut entries = Vec::with_capacity(self.entries.len() - positions.len());
        let mut unknown = Vec::new();
        for (i, entry) in self.entries.iter().enumerate() {
            if positions.binary_search(&(i as u32)).is_ok() {
                continue;
            }
            let position = entries.len() as u32;
            if let Ok(at) = self
                .unknown
                .binary_search_by_key(&(i as u32), |&(at, _)| at)
            {
                unknown.extend(self.unknown.get(at).map(|&(_, span)| (position, span)));
            }
            let more = self.entries.len() - i;
            kept.push(self.bytes(json, entry.name), position, more);
            entries.push(entry.clone());
        }
        (self.entries, self.unknown) = (entries, unknown);
        let by_name = |i: u32| {
            self.entries
                .get(i as usize)
                .map_or(&[][..], |e| self.bytes(json, e.name))
        };
        let _: Result<(), core::convert::Infallible> = kept.finish(by_name, |_, _| Ok(()));
        self.names = kept;
    }
}

/// The bytes of a span's string, in the pool of decoded strings or in the header.
#[inline]
fn text_of<'a>(pool: &'a str, json: &'a [u8], span: Span) -> &'a [u8] {
    let start = span.start as usize;
    let range = start..start + (span.len & !POOLED) as usize;
    let from = if span.len & POOLED != 0 {
        pool.as_bytes()
    } else {
        json
    };
    from.get(range).unwrap_or(&[])
}

/// A plain integer of at most 18 digits, and what follows it. No such integer is out of range.
#[inline]
fn plain_integer(text: &[u8]) -> Option<(u64, &[u8])> {
    let mut value: u64 = 0;
    let mut digits = 0;
    while let Some(&digit @ b'0'..=b'9') = text.get(digits) {
        value = value.wrapping_mul(10).wrapping_add((digit - b'0') as u64);
        digits += 1;
    }
    let leading_zero = digits > 1 && text.first() == Some(&b'0');
    if digits == 0 || digits > 18 || leading_zero {
        return None;
    }
    Some((value, text.get(digits..)?))
}

/// Scans a header's JSON.
pub(crate) fn scan(json: &[u8], options: &ReadOptions) -> Result<Table, Error> {
    let scanner = Scanner {
        cursor: Cursor::new(json),
        options,
        table: Table::default(),
        keys: KeyStack::default(),
        metadata_seen: false,
        null_metadata: None,
    };
    scanner.header()
}

struct Scanner<'a> {
    cursor: Cursor<'a>,
    options: &'a ReadOptions,
    table: Table,
    keys: KeyStack,
    /// Apart from the table's metadata, since the reference's profile takes `null` for absent.
    metadata_seen: bool,
    /// Where metadata is null, if it is.
    null_metadata: Option<usize>,
}

impl<'a> Scanner<'a> {
    fn header(mut self) -> Result<Table, Error> {
        if self.cursor.text.starts_with(b"\xEF\xBB\xBF") {
            return Err(self
                .cursor
                .error(Reason::ByteOrderMark)
                .needed("`{` as the first character"));
        }
        self.cursor.whitespace();
        self.table.object.0 = self.cursor.pos;
        if !self.cursor.take(b'{') {
            return Err(self.no_object());
        }
        if !self.cursor.take(b'}') {
            loop {
                self.member()?;
                if !self.cursor.take(b',') {
                    break;
                }
            }
            self.cursor.expect(b'}')?;
        }
        self.table.object.1 = self.cursor.pos;
        self.cursor.whitespace();
        if self.cursor.peek().is_some() {
            return Err(self
                .cursor
                .misplaced(Reason::Framing, "spaces up to the header's end"));
        }
        Ok(self.table)
    }

    /// Why no `{` opens the header: another JSON value, or something that is none.
    fn no_object(&mut self) -> Error {
        let json = matches!(
            self.cursor.peek(),
            Some(b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n')
        );
        match (json, self.cursor.peek()) {
            (true, _) => self.cursor.misplaced(Reason::NotAnObject, "`{`"),
            (_, None) => self.cursor.syntax("`{`"),
            _ => self.cursor.misplaced(Reason::Framing, "`{`"),
        }
    }

    fn member(&mut self) -> Result<(), Error> {
        let key = self.cursor.string()?;
        self.cursor.expect(b':')?;
        let name = self.span(key)?;
        if self.table.bytes(self.cursor.text, name) == METADATA_KEY.as_bytes() {
            return self.metadata(key);
        }
        let count = self.table.entries.len() as u64 + 1;
        Limits::check(count, self.options.limits.tensors, Reason::LimitTensors)?;
        self.entry(name).map_err(|error| match error.tensor_name() {
            Some(_) => error,
            None => error.tensor(self.table.text(self.cursor.text, name)),
        })
    }

    fn metadata(&mut self, key: Str) -> Result<(), Error> {
        if core::mem::replace(&mut self.metadata_seen, true) {
            if let Some(null) = self.null_metadata {
                // The file is refused anyway: for what stands first in it, as without the quirk.
                self.cursor.pos = null;
                return Err(self
                    .cursor
                    .misplaced(Reason::MetadataNotObject, "an object of strings"));
            }
            self.cursor.pos = key.start;
            return Err(self
                .cursor
                .error(Reason::DuplicateMetadata)
                .needed("`__metadata__` once"));
        }
        let mut found = Vec::new();
        if !self.cursor.take(b'{') {
            let start = self.cursor.pos;
            if self.options.quirks.has(Quirks::METADATA_NULL) && self.cursor.take_exact(b"null") {
                self.null_metadata = Some(start);
                self.table.metadata_null = true;
                return Ok(());
            }
            return Err(self
                .cursor
                .misplaced(Reason::MetadataNotObject, "an object of strings"));
        }
        if !self.cursor.take(b'}') {
            loop {
                let key = self.cursor.string()?;
                let key = self.span(key)?;
                self.cursor.expect(b':')?;
                self.cursor.whitespace();
                if self.cursor.peek() != Some(b'"') {
                    return Err(self.cursor.misplaced(Reason::MetadataValue, "a string"));
                }
                let value = self.cursor.string()?;
                let value = self.span(value)?;
                let limit = self.options.limits.metadata_entries;
                Limits::check(found.len() as u64 + 1, limit, Reason::LimitMetadata)?;
                let rest = self.cursor.text.len() - self.cursor.pos;
                grow(&mut found, 1 + rest / SHORTEST_PAIR);
                found.push((key, value));
                if !self.cursor.take(b',') {
                    break;
                }
            }
            self.cursor.expect(b'}')?;
        }
        self.table.metadata = Some(self.unique_metadata(found)?);
        Ok(())
    }

    /// Metadata without keys that repeat: refused, or in the reference's profile the last kept.
    fn unique_metadata(&self, mut found: Vec<(Span, Span)>) -> Result<Vec<(Span, Span)>, Error> {
        let json = self.cursor.text;
        let mut index = NameIndex::default();
        index.reserve(found.len());
        for (i, &(key, _)) in found.iter().enumerate() {
            index.push(self.table.bytes(json, key), i as u32, found.len() - i);
        }
        let key_of = |i: u32| {
            found
                .get(i as usize)
                .map_or(&[][..], |&(key, _)| self.table.bytes(json, key))
        };
        let mut replaced = Vec::new();
        index.finish(key_of, |earlier, _| {
            replaced.push(earlier);
            if self
                .options
                .quirks
                .has(Quirks::DUPLICATE_METADATA_KEY_LAST_WINS)
            {
                return Ok(());
            }
            let key = found
                .get(earlier as usize)
                .map_or("", |&(key, _)| self.table.text(json, key));
            Err(Error::new(Reason::DuplicateMetadataKey)
                .found(format_args!("key {key:?} again"))
                .needed("each key once"))
        })?;
        replaced.sort_unstable();
        let mut position = 0;
        found.retain(|_| {
            position += 1;
            replaced.binary_search(&(position - 1)).is_err()
        });
        Ok(found)
    }

    fn entry(&mut self, name: Span) -> Result<(), Error> {
        let start = self.cursor.pos;
        let dims = self.table.dims.len();
        let entry = match self.canonical(name) {
            Some(entry) => entry,
            None => {
                self.cursor.pos = start;
                self.table.dims.truncate(dims);
                self.any_entry(name)?
            }
        };
        let position = self.table.entries.len() as u32;
        let text = text_of(&self.table.pool, self.cursor.text, name);
        let rest = self.cursor.text.len() - self.cursor.pos;
        self.table.names.push(text, position, rest / SHORTEST_ENTRY);
        grow(&mut self.table.entries, 1 + rest / SHORTEST_ENTRY);
        self.table.entries.push(entry);
        if self.table.entries.len() == SAMPLE {
            self.reserve();
        }
        Ok(())
    }

    /// Makes room for as many entries as the header can hold if all are like the first ones. Growing
    /// step by step would copy the tables of a large header several times.
    fn reserve(&mut self) {
        let taken = (self.cursor.pos - self.table.object.0) / SAMPLE;
        let rest = self.cursor.text.len() - self.cursor.pos;
        let more = rest / taken.max(SHORTEST_ENTRY);
        self.table.entries.reserve_exact(more);
        self.table.names.reserve(more);
        let rank = self.table.dims.len().div_ceil(SAMPLE);
        self.table.dims.reserve(more * rank.min(2));
    }

    /// An entry spelt as canonical writers spell it, without a space: all but the rarest. Says `None`
    /// for anything else, errors included, and leaves it to [`Scanner::any_entry`] to judge.
    #[inline]
    fn canonical(&mut self, name: Span) -> Option<Entry> {
        // More extents than this take the other path, which counts them against the budgets.
        const RANK: usize = 16;
        let rest = self.cursor.text.get(self.cursor.pos..)?;
        let rest = rest.strip_prefix(b"{\"dtype\":\"")?;
        let quote = rest
            .iter()
            .take(LONGEST_DTYPE)
            .position(|&byte| byte == b'"')?;
        let dtype = Dtype::from_bytes(rest.get(..quote)?)?;
        let mut rest = rest.get(quote..)?.strip_prefix(b"\",\"shape\":[")?;
        let start = self.table.dims.len();
        if let Some(after) = rest.strip_prefix(b"]") {
            rest = after;
        } else {
            loop {
                let (extent, after) = plain_integer(rest)?;
                self.push_extent(extent);
                let (&delimiter, after) = after.split_first()?;
                rest = after;
                match delimiter {
                    b']' => break,
                    b',' if self.table.dims.len() - start < RANK => {}
                    _ => return None,
                }
            }
        }
        let rank = self.table.dims.len() - start;
        let limits = &self.options.limits;
        if self.table.dims.len() as u64 > limits.dims || rank as u64 > limits.rank {
            return None;
        }
        let (begin, rest) = plain_integer(rest.strip_prefix(b",\"data_offsets\":[")?)?;
        let (end, rest) = plain_integer(rest.strip_prefix(b",")?)?;
        let rest = rest.strip_prefix(b"]}")?;
        self.cursor.pos = self.cursor.text.len() - rest.len();
        Some(Entry {
            name,
            dims: start as u32,
            rank: rank as u16,
            dtype: dtype as u8,
            begin,
            end,
        })
    }

    /// An entry in any spelling.
    fn any_entry(&mut self, name: Span) -> Result<Entry, Error> {
        let mut fields = Fields::default();
        if self.cursor.take(b'{') {
            self.entry_object(&mut fields)?;
        } else if self.options.quirks.has(Quirks::ENTRY_AS_ARRAY) && self.cursor.take(b'[') {
            self.entry_array(&mut fields)?;
        } else {
            return Err(self.cursor.misplaced(Reason::EntryNotObject, "an object"));
        }
        let missing = |field| Error::new(Reason::MissingField).needed(format_args!("`{field}`"));
        let dtype = fields.dtype.ok_or_else(|| missing("dtype"))?;
        let (dims, rank) = fields.shape.ok_or_else(|| missing("shape"))?;
        let (begin, end) = fields.offsets.ok_or_else(|| missing("data_offsets"))?;
        let position = self.table.entries.len() as u32;
        let dtype = self.dtype(dtype, position)?;
        Ok(Entry {
            name,
            dims,
            rank,
            dtype,
            begin,
            end,
        })
    }

    fn entry_object(&mut self, fields: &mut Fields) -> Result<(), Error> {
        let mark = self.keys.mark();
        if self.cursor.take(b'}') {
            return Ok(());
        }
        loop {
            let key = self.cursor.string()?;
            self.cursor.expect(b':')?;
            self.field(key, fields)?;
            if !self.cursor.take(b',') {
                break;
            }
        }
        self.cursor.expect(b'}')?;
        if let Some(start) = self.keys.close(mark, &self.cursor) {
            return Err(self.repeated_field(start));
        }
        Ok(())
    }

    fn repeated_field(&mut self, start: usize) -> Error {
        self.cursor.pos = start.saturating_sub(1);
        self.cursor
            .misplaced(Reason::DuplicateField, "each key once")
    }

    fn field(&mut self, key: Str, fields: &mut Fields) -> Result<(), Error> {
        let mut decoded = String::new();
        let name = if key.escaped {
            self.cursor.decode(key, &mut decoded)?;
            decoded.as_bytes()
        } else {
            self.cursor.raw(key)
        };
        let repeated = match name {
            b"dtype" => {
                let dtype = self.dtype_string()?;
                fields.dtype.replace(dtype).is_some()
            }
            b"shape" => {
                let shape = self.shape()?;
                fields.shape.replace(shape).is_some()
            }
            b"data_offsets" => {
                let offsets = self.offsets()?;
                fields.offsets.replace(offsets).is_some()
            }
            _ => return self.unknown_field(key),
        };
        if repeated {
            Err(self.repeated_field(key.start))
        } else {
            Ok(())
        }
    }

    /// A key that this version does not know: skipped, the valve for extensions (spec 4.6).
    fn unknown_field(&mut self, key: Str) -> Result<(), Error> {
        let repeats = self.options.quirks.has(Quirks::UNKNOWN_FIELD_REPEATS);
        if !repeats {
            self.keys.push(key, &self.cursor)?;
        }
        let finite = self.options.quirks.has(Quirks::NUMBER_RANGE_IN_SKIPPED);
        let rules = SkipRules {
            depth: self.options.depth(),
            repeats,
            finite,
        };
        skip_value(&mut self.cursor, 2, &rules, &mut self.keys)
    }

    /// The reference's array form: dtype, shape and offsets in this order, nothing else.
    fn entry_array(&mut self, fields: &mut Fields) -> Result<(), Error> {
        fields.dtype = Some(self.dtype_string()?);
        self.cursor.expect(b',')?;
        fields.shape = Some(self.shape()?);
        self.cursor.expect(b',')?;
        fields.offsets = Some(self.offsets()?);
        self.cursor.expect(b']')
    }

    fn dtype_string(&mut self) -> Result<Str, Error> {
        self.cursor.whitespace();
        if self.cursor.peek() == Some(b'"') {
            return self.cursor.string();
        }
        if self.options.quirks.has(Quirks::DTYPE_AS_ENUM_MAP) && self.cursor.take(b'{') {
            let name = self.cursor.string()?;
            self.cursor.expect(b':')?;
            self.cursor.whitespace();
            // The unit that a plain variant carries; the reference takes nothing else for it.
            if !self.cursor.take_exact(b"null") {
                return Err(self.cursor.misplaced(Reason::DtypeNotString, "null"));
            }
            self.cursor.expect(b'}')?;
            return Ok(name);
        }
        Err(self.cursor.misplaced(Reason::DtypeNotString, "a string"))
    }

    /// The dtype's place in the table; an unknown name is kept, for a reader that only inspects.
    fn dtype(&mut self, name: Str, position: u32) -> Result<u8, Error> {
        let span = self.span(name)?;
        let text = self.table.text(self.cursor.text, span);
        if let Some(dtype) = Dtype::from_name(text) {
            return Ok(dtype as u8);
        }
        if self.options.quirks.has(Quirks::UNKNOWN_DTYPE_REFUSED) {
            return Err(Error::unsupported_dtype(text));
        }
        self.table.unknown.push((position, span));
        Ok(UNKNOWN)
    }

    fn shape(&mut self) -> Result<(u32, u16), Error> {
        self.cursor.whitespace();
        if !self.cursor.take(b'[') {
            return Err(self
                .cursor
                .misplaced(Reason::ShapeNotArray, "an array of integers"));
        }
        let start = self.table.dims.len();
        let max = self.options.max_integer();
        if !self.cursor.take(b']') {
            loop {
                let extent = self.cursor.integer(max)?;
                let limits = &self.options.limits;
                let (all, rank) = (self.table.dims.len() + 1, self.table.dims.len() + 1 - start);
                Limits::check(all as u64, limits.dims, Reason::LimitDims)?;
                Limits::check(
                    rank as u64,
                    limits.rank.min(u16::MAX as u64),
                    Reason::LimitRank,
                )?;
                self.push_extent(extent);
                if !self.cursor.take(b',') {
                    break;
                }
            }
            self.cursor.expect(b']')?;
        }
        Ok((start as u32, (self.table.dims.len() - start) as u16))
    }

    /// Adds an extent, which the text spells with a digit and a delimiter at least.
    #[inline]
    fn push_extent(&mut self, extent: u64) {
        let rest = (self.cursor.text.len() - self.cursor.pos) / 2;
        let allowed = self
            .options
            .limits
            .dims
            .saturating_sub(self.table.dims.len() as u64);
        let most = usize::try_from(allowed).map_or(rest, |allowed| rest.min(allowed));
        grow(&mut self.table.dims, most + 1);
        self.table.dims.push(extent);
    }

    fn offsets(&mut self) -> Result<(u64, u64), Error> {
        let max = self.options.max_integer();
        self.cursor.whitespace();
        let start = self.cursor.pos;
        let wrong = |cursor: &mut Cursor<'_>| {
            cursor.pos = start;
            cursor.misplaced(
                Reason::OffsetsForm,
                "an array of two integers, [begin, end]",
            )
        };
        if !self.cursor.take(b'[') || self.cursor.take(b']') {
            return Err(wrong(&mut self.cursor));
        }
        let begin = self.cursor.integer(max)?;
        if !self.cursor.take(b',') {
            return Err(wrong(&mut self.cursor));
        }
        let end = self.cursor.integer(max)?;
        if !self.cursor.take(b']') {
            return Err(wrong(&mut self.cursor));
        }
        Ok((begin, end))
    }

    /// Where a string's text can be had later: in place, or decoded into the pool.
    #[inline]
    fn span(&mut self, string: Str) -> Result<Span, Error> {
        if !string.escaped {
            let len = (string.end - string.start) as u32;
            return Ok(Span {
                start: string.start as u32,
                len,
            });
        }
        let start = self.table.pool.len();
        self.cursor.decode(string, &mut self.table.pool)?;
        let len = (self.table.pool.len() - start) as u32;
        Ok(Span {
            start: start as u32,
            len: len | POOLED,
        })
    }
}
