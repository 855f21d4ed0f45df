//! One pass over a header: where its entries lie, every number of it checked against what the file has.
//!
//! The same pass serves [`super::probe`], which has only the first bytes of a file and learns how many are
//! missing, and [`super::Gguf::parse`], which has all of them.

use super::error::{Error, Reason};
use super::limits::Limits;
use super::types::{self, GgmlType};
use super::value::{ByteOrder, ValueType};

/// The first bytes of every file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// Where the data begins is a multiple of this, unless `general.alignment` says otherwise.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// Most dimensions of a tensor. ggml has four; more leave room for what other writers do.
pub(crate) const MAX_RANK: u32 = 8;
/// Key whose value is the alignment.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";

/// Bytes that a metadata entry and a tensor's entry take at least.
const LEAST_ENTRY: u64 = 8 + 1 + 4 + 1;
const LEAST_TENSOR: u64 = 8 + 4 + 4 + 8;

/// Bytes of the header from one to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub start: usize,
    pub end: usize,
}

/// A metadata entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub key: Span,
    pub ty: ValueType,
    pub value: Span,
}

/// A tensor's entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor {
    pub name: Span,
    pub ty: GgmlType,
    /// Where its extents end in [`Scan::dims`]; they begin where those of the one before end.
    pub dims_end: u32,
    /// Where its data begins, counted from the start of the data.
    pub offset: u64,
    pub len: u64,
}

/// What a header says.
#[derive(Clone, Debug)]
pub(crate) struct Scan {
    pub order: ByteOrder,
    pub version: u32,
    pub alignment: u64,
    pub entries: Vec<Entry>,
    pub tensors: Vec<Tensor>,
    /// Extents of all tensors, row-major: the last is that of a row.
    pub dims: Vec<u64>,
    /// Bytes of the header, without the padding behind it.
    pub end: usize,
}

/// Why a scan ended early.
pub(crate) enum Stop {
    /// The header goes on: it has at least this many bytes.
    More(u64),
    Refused(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Refused(error)
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    order: ByteOrder,
    file_len: u64,
    limits: &'a Limits,
}

impl<'a> Cursor<'a> {
    /// Bytes of the file behind the cursor.
    fn left(&self) -> u64 {
        self.file_len.saturating_sub(self.at as u64)
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], Stop> {
        if len > self.left() {
            let short = Error::new(Reason::Truncated).at(self.at as u64);
            let short = short.found(format_args!("{} bytes to the end of the file", self.left()));
            return Err(short.needed(len).into());
        }
        // Within the file's length, so this does not overflow.
        let end = self.at as u64 + len;
        if end > self.limits.header_bytes {
            return Err(Error::over(Reason::LimitHeader, end, self.limits.header_bytes).into());
        }
        let taken = usize::try_from(end)
            .ok()
            .and_then(|end| self.bytes.get(self.at..end));
        match taken {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(Stop::More(end)),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let taken = self.take(N as u64)?;
        // `take` gave that many.
        Ok(taken.try_into().unwrap_or([0; N]))
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        let bytes = self.array()?;
        Ok(match self.order {
            ByteOrder::Little => u32::from_le_bytes(bytes),
            ByteOrder::Big => u32::from_be_bytes(bytes),
        })
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        let bytes = self.array()?;
        Ok(match self.order {
            ByteOrder::Little => u64::from_le_bytes(bytes),
            ByteOrder::Big => u64::from_be_bytes(bytes),
        })
    }

    /// A name: its length, and UTF-8.
    fn name(&mut self, reason: Reason, least: u64) -> Result<Span, Stop> {
        let at = self.at as u64;
        let len = self.u64()?;
        let most = self.limits.name_bytes;
        if len < least || len > most {
            let wrong = Error::new(reason).at(at).found(format_args!("{len} bytes"));
            return Err(wrong.needed(format_args!("{least} to {most}")).into());
        }
        let start = self.at;
        let text = self.take(len)?;
        if let Err(error) = std::str::from_utf8(text) {
            let at = start as u64 + error.valid_up_to() as u64;
            return Err(Error::new(reason)
                .found(error)
                .needed("UTF-8")
                .at(at)
                .into());
        }
        let end = self.at;
        Ok(Span { start, end })
    }

    /// Goes past a value, and says where it lies.
    fn value(&mut self, ty: ValueType, depth: u32) -> Result<Span, Stop> {
        let start = self.at;
        match ty {
            ValueType::Bool => self.bools(1)?,
            ValueType::String => {
                let len = self.u64()?;
                self.take(len)?;
            }
            ValueType::Array => self.values(depth)?,
            plain => drop(self.take(plain.least())?),
        }
        let end = self.at;
        Ok(Span { start, end })
    }

    fn bools(&mut self, len: u64) -> Result<(), Stop> {
        let at = self.at;
        let taken = self.take(len)?;
        match taken.iter().position(|&byte| byte > 1) {
            None => Ok(()),
            Some(bad) => {
                let found = taken.get(bad).copied().unwrap_or(0);
                let wrong = Error::new(Reason::Bool).at((at + bad) as u64);
                Err(wrong.found(found).needed("0 or 1").into())
            }
        }
    }

    fn values(&mut self, depth: u32) -> Result<(), Stop> {
        if depth >= self.limits.depth {
            let deep = Error::over(Reason::Nesting, depth as u64 + 1, self.limits.depth.into());
            return Err(deep.at(self.at as u64).into());
        }
        let at = self.at as u64;
        let ty = self.value_type()?;
        let len = self.u64()?;
        let least = len.checked_mul(ty.least());
        if least.is_none_or(|least| least > self.left()) {
            let wrong = Error::new(Reason::Truncated).at(at);
            let wrong = wrong.found(format_args!("an array of {len} values"));
            let room = format!("at most {} bytes of them", self.left());
            return Err(wrong.needed(room).into());
        }
        match (ty, ty.size()) {
            (ValueType::Bool, _) => self.bools(len),
            (_, Some(size)) => self.take(len.saturating_mul(size)).map(drop),
            (_, None) => {
                for _ in 0..len {
                    self.value(ty, depth + 1)?;
                }
                Ok(())
            }
        }
    }

    fn value_type(&mut self) -> Result<ValueType, Stop> {
        let at = self.at as u64;
        let id = self.u32()?;
        ValueType::from_id(id).ok_or_else(|| {
            let wrong = Error::new(Reason::ValueType).found(id).at(at);
            wrong.needed("0 to 12").into()
        })
    }

    /// A count of entries that take at least `least` bytes each.
    fn count(&mut self, what: &str, least: u64, limit: u64, over: Reason) -> Result<u64, Stop> {
        let at = self.at as u64;
        let count = self.u64()?;
        if count
            .checked_mul(least)
            .is_none_or(|bytes| bytes > self.left())
        {
            let wrong = Error::new(Reason::Count).at(at);
            let wrong = wrong.found(format_args!("{count} {what}"));
            let room = format!(
                "at most {} in a file of {} bytes",
                self.left() / least,
                self.file_len
            );
            return Err(wrong.needed(room).into());
        }
        if count > limit {
            return Err(Error::over(over, count, limit).at(at).into());
        }
        Ok(count)
    }

    fn text(&self, span: Span) -> &'a str {
        let bytes = self.bytes.get(span.start..span.end).unwrap_or(&[]);
        std::str::from_utf8(bytes).unwrap_or("")
    }
}

/// Scans the header at the start of `bytes`, which may end before it does.
pub(crate) fn scan(bytes: &[u8], file_len: u64, limits: &Limits) -> Result<Scan, Stop> {
    let mut cursor = Cursor {
        bytes,
        at: 0,
        order: ByteOrder::Little,
        file_len,
        limits,
    };
    let (order, version) = opening(&mut cursor)?;
    cursor.order = order;
    let (tensors, least) = (cursor.at, LEAST_TENSOR);
    let tensor_count = cursor.count("tensors", least, limits.tensors, Reason::LimitTensors)?;
    debug_assert_eq!(tensors, 8);
    let entry_count = cursor.count(
        "metadata entries",
        LEAST_ENTRY,
        limits.keys,
        Reason::LimitKeys,
    )?;
    let mut scan = Scan {
        order,
        version,
        alignment: DEFAULT_ALIGNMENT,
        entries: Vec::new(),
        tensors: Vec::new(),
        dims: Vec::new(),
        end: 0,
    };
    for _ in 0..entry_count {
        let entry = entry(&mut cursor, &mut scan.alignment)?;
        scan.entries.push(entry);
    }
    for _ in 0..tensor_count {
        let tensor = tensor(&mut cursor, &mut scan.dims, scan.alignment)?;
        scan.tensors.push(tensor);
    }
    scan.end = cursor.at;
    Ok(scan)
}

/// The magic and the version, which tells the byte order: a small number has its zeros at one end.
fn opening(cursor: &mut Cursor<'_>) -> Result<(ByteOrder, u32), Stop> {
    let magic: [u8; 4] = cursor.array()?;
    if magic != MAGIC {
        let wrong = Error::new(Reason::Magic).at(0);
        return Err(wrong.found(format_args!("{magic:02x?}")).into());
    }
    let bytes: [u8; 4] = cursor.array()?;
    let (little, big) = (u32::from_le_bytes(bytes), u32::from_be_bytes(bytes));
    let (order, version) = if little & 0xffff == 0 {
        (ByteOrder::Big, big)
    } else {
        (ByteOrder::Little, little)
    };
    // Version 2 has one byte order only, and yet files of it exist in both.
    if !(2..=3).contains(&version) {
        let wrong = Error::new(Reason::Version).at(4);
        return Err(wrong.found(version).needed("2 or 3").into());
    }
    Ok((order, version))
}

fn entry(cursor: &mut Cursor<'_>, alignment: &mut u64) -> Result<Entry, Stop> {
    let key = cursor.name(Reason::Key, 1)?;
    let named = |stop: Stop| match stop {
        Stop::Refused(error) => Stop::Refused(error.key(cursor_text(cursor.bytes, key))),
        more => more,
    };
    let mut inner = Cursor { ..*cursor };
    let ty = inner.value_type().map_err(named)?;
    let value = inner.value(ty, 0).map_err(named)?;
    cursor.at = inner.at;
    if cursor.text(key) == ALIGNMENT_KEY {
        let bytes = cursor.bytes.get(value.start..value.end).unwrap_or(&[]);
        let mut number = Cursor {
            bytes,
            at: 0,
            file_len: 4,
            ..*cursor
        };
        let given = if ty == ValueType::U32 {
            number.u32()?
        } else {
            0
        };
        if !given.is_power_of_two() || given % 8 != 0 {
            let wrong = Error::new(Reason::Alignment).at(value.start as u64);
            let found = if ty == ValueType::U32 {
                given.to_string()
            } else {
                format!("{ty:?}")
            };
            return Err(wrong.found(found).needed("a U32 such as 32").into());
        }
        *alignment = given.into();
    }
    Ok(Entry { key, ty, value })
}

fn cursor_text(bytes: &[u8], span: Span) -> &str {
    let bytes = bytes.get(span.start..span.end).unwrap_or(&[]);
    std::str::from_utf8(bytes).unwrap_or("")
}

fn tensor(cursor: &mut Cursor<'_>, dims: &mut Vec<u64>, alignment: u64) -> Result<Tensor, Stop> {
    let name = cursor.name(Reason::Name, 0)?;
    let text = cursor.text(name);
    let refuse = |reason: Reason| Error::new(reason).tensor(text);
    let at = cursor.at as u64;
    let rank = cursor.u32()?;
    if rank > MAX_RANK {
        return Err(refuse(Reason::Rank)
            .found(rank)
            .needed(format_args!("at most {MAX_RANK}"))
            .at(at)
            .into());
    }
    let first = dims.len();
    for _ in 0..rank {
        let extent = cursor.u64()?;
        dims.push(extent);
    }
    let at = cursor.at as u64;
    let id = cursor.u32()?;
    let Some(ty) = types::from_id(id) else {
        return Err(refuse(Reason::Type)
            .found(id)
            .needed("a type of ggml’s table")
            .at(at)
            .into());
    };
    let at = cursor.at as u64;
    let offset = cursor.u64()?;
    if offset % alignment != 0 {
        let wrong = refuse(Reason::Offset).found(offset).at(at);
        return Err(wrong
            .needed(format_args!("a multiple of {alignment}"))
            .into());
    }
    // The file has the extent of a row first.
    let shape = dims.get_mut(first..).unwrap_or(&mut []);
    shape.reverse();
    let len = types::byte_len(ty, shape).map_err(|reason| {
        let wrong = refuse(reason).found(format_args!("{} {shape:?}", ty.name()));
        let block = format!("rows of a multiple of {} elements", ty.elements());
        if reason == Reason::Row {
            wrong.needed(block)
        } else {
            wrong
        }
    })?;
    // At most `MAX_RANK` for each of a limited number of tensors.
    let dims_end = u32::try_from(dims.len())
        .map_err(|_| Error::over(Reason::LimitTensors, u64::MAX, cursor.limits.tensors))?;
    Ok(Tensor {
        name,
        ty,
        dims_end,
        offset,
        len,
    })
}
