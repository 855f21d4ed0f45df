//! The writer (spec chapter 9): from names, dtypes and shapes to the bytes of a header and the
//! place of every tensor. Equal input gives equal bytes, and with the default options the bytes are
//! those of the reference implementation.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use crate::dtype::Dtype;
use crate::error::{Error, Reason};
use crate::forever::{HEADER_ALIGN, MAX_HEADER_LEN, METADATA_KEY, PAD, PAGE_ALIGN, PREFIX_LEN};
use crate::json::{is_plain, plain_prefix};
use crate::order;

/// A tensor to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorSpec<'a> {
    /// Its name; any string but `__metadata__`.
    pub name: &'a str,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its extents in elements.
    pub shape: &'a [u64],
}

/// In which order tensors lie in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The canonical order (spec 9.6), the reference's: dtype descending, then name ascending.
    #[default]
    Canonical,
    /// As they were given.
    Given,
}

/// Where the data section starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Align {
    /// On a multiple of 8, as the reference does (spec 9.8).
    #[default]
    Eight,
    /// On a multiple of 4096, for direct I/O and page-aligned maps (spec 9.9).
    Page,
}

/// How to lay a file out. The default gives the reference's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// The order of the tensors.
    pub order: Order,
    /// Where the data section starts.
    pub align: Align,
    /// Spaces to leave after the header's object, so that metadata can grow in place later.
    pub reserve: u64,
}

/// A file laid out: its first bytes, and where each tensor goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Prefix, JSON and padding.
    pub header: Vec<u8>,
    /// The order of the file, as positions in the list that was given.
    pub order: Vec<usize>,
    /// For each tensor as given: first byte and one past the last, in the data section.
    pub ranges: Vec<(u64, u64)>,
    /// Bytes of the whole file.
    pub file_len: u64,
}

impl Layout {
    /// First byte of the data section.
    pub fn data_start(&self) -> u64 {
        self.header.len() as u64
    }
}

/// Tensors that are looked at together before they are written.
const BLOCK: usize = 64;

/// Lays out a file. `metadata` is written sorted by key; `Some(&[])` writes an empty object.
///
/// ```
/// use tonnage_format::{Dtype, TensorSpec, WriteOptions, layout};
///
/// let w = TensorSpec { name: "w", dtype: Dtype::F32, shape: &[2] };
/// let layout = layout(&[w], None, &WriteOptions::default())?;
/// assert_eq!(&layout.header[8..], br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  "#);
/// assert_eq!(layout.ranges, [(0, 8)]);
/// # Ok::<(), tonnage_format::Error>(())
/// ```
///
/// # Errors
/// Names that repeat or are reserved, sizes that overflow or do not fill bytes, metadata keys that
/// repeat, and a header beyond the format's cap: spec 9.1 to 9.5.
pub fn layout(
    tensors: &[TensorSpec<'_>],
    metadata: Option<&[(&str, &str)]>,
    options: &WriteOptions,
) -> Result<Layout, Error> {
    let by_name = check_names(tensors)?;
    let order = match options.order {
        Order::Canonical => canonical(tensors, &by_name),
        Order::Given => (0..tensors.len()).collect(),
    };
    drop(by_name);
    let mut ranges = alloc::vec![(0, 0); tensors.len()];
    let mut end = 0_u64;
    // One tensor's JSON without its name takes about 60 bytes.
    let names: usize = tensors.iter().map(|tensor| tensor.name.len()).sum();
    let mut header = Vec::with_capacity(names + tensors.len() * 72 + 64);
    header.extend_from_slice(&[0; PREFIX_LEN as usize]);
    header.push(b'{');
    if let Some(metadata) = metadata {
        write_metadata(&mut header, metadata)?;
    }
    let mut block = Vec::with_capacity(BLOCK);
    let mut end_digits = Digits::new(0);
    for positions in order.chunks(BLOCK) {
        // Tensors lie in memory in another order than in the file. Short loops, each over a whole block,
        // let the waits for memory overlap: a fifth of the time where 100,000 tensors are written.
        block.clear();
        let tensors = positions.iter().filter_map(|&at| tensors.get(at));
        block.extend(tensors.map(|tensor| (*tensor, false, 0)));
        for (tensor, plain, _) in &mut block {
            *plain = is_plain(tensor.name.as_bytes());
        }
        for (tensor, _, bytes) in &mut block {
            *bytes = byte_len(tensor)?;
        }
        for (&at, (tensor, plain, bytes)) in positions.iter().zip(&block) {
            let begin = end;
            end = begin
                .checked_add(*bytes)
                .ok_or_else(|| write_size(tensor))?;
            if let Some(range) = ranges.get_mut(at) {
                *range = (begin, end);
            }
            // Where one tensor ends the next begins: each number is spelt once.
            let offsets = (end_digits, Digits::new(end));
            end_digits = offsets.1;
            write_tensor(&mut header, tensor, *plain, offsets);
        }
    }
    header.push(b'}');
    pad(&mut header, options)?;
    let file_len = end.checked_add(header.len() as u64);
    let file_len =
        file_len.ok_or_else(|| Error::new(Reason::WriteSize).found("more than 2^64 bytes"))?;
    Ok(Layout {
        header,
        order,
        ranges,
        file_len,
    })
}

/// Bytes of a tensor to be written, with the writer's own reasons.
fn byte_len(tensor: &TensorSpec<'_>) -> Result<u64, Error> {
    tensor
        .dtype
        .bytes_of(tensor.shape)
        .map_err(|error| match error.reason() {
            Reason::PartialByte => Error::new(Reason::WritePartialByte)
                .tensor(tensor.name)
                .found(error.found_text())
                .needed(error.needed_text()),
            _ => write_size(tensor),
        })
}

fn write_size(tensor: &TensorSpec<'_>) -> Error {
    Error::new(Reason::WriteSize)
        .tensor(tensor.name)
        .found(format_args!("shape {:?} of {}", tensor.shape, tensor.dtype))
        .needed("a file below 2^64 bytes")
}

/// Checks that each name is allowed and stands once; gives the tensors in the order of their names.
fn check_names(tensors: &[TensorSpec<'_>]) -> Result<Vec<u32>, Error> {
    if u32::try_from(tensors.len()).is_err() {
        let (found, most) = (tensors.len() as u64, u32::MAX as u64);
        return Err(Error::over(Reason::WriteTooLarge, found, most));
    }
    if tensors.iter().any(|tensor| tensor.name == METADATA_KEY) {
        return Err(Error::new(Reason::WriteReservedName)
            .tensor(METADATA_KEY)
            .needed("another name"));
    }
    let name_of = |at: u32| tensors.get(at as usize).map_or("", |tensor| tensor.name);
    let names = tensors.iter().map(|tensor| tensor.name.as_bytes());
    order::by_name(names, |at| name_of(at).as_bytes()).map_err(|at| {
        Error::new(Reason::WriteDuplicate)
            .tensor(name_of(at))
            .needed("each name once")
    })
}

/// The canonical order (spec 9.6): dtypes descending, and within each the order of the names.
fn canonical(tensors: &[TensorSpec<'_>], by_name: &[u32]) -> Vec<usize> {
    let dtypes: Vec<Dtype> = tensors.iter().map(|tensor| tensor.dtype).collect();
    let mut starts = [0; Dtype::ALL.len()];
    for &dtype in &dtypes {
        if let Some(count) = starts.get_mut(dtype as usize) {
            *count += 1;
        }
    }
    let mut start = 0;
    for count in starts.iter_mut().rev() {
        start += core::mem::replace(count, start);
    }
    let mut order = alloc::vec![0; tensors.len()];
    for &at in by_name {
        let dtype = dtypes.get(at as usize).copied().unwrap_or(Dtype::BOOL);
        if let Some(next) = starts.get_mut(dtype as usize) {
            if let Some(place) = order.get_mut(*next) {
                *place = at as usize;
            }
            *next += 1;
        }
    }
    order
}

fn write_metadata(out: &mut Vec<u8>, metadata: &[(&str, &str)]) -> Result<(), Error> {
    let mut sorted: Vec<&(&str, &str)> = metadata.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(b.0));
    if let Some([(key, _), _]) = sorted
        .windows(2)
        .find(|pair| matches!(pair, [a, b] if a.0 == b.0))
    {
        return Err(
            Error::new(Reason::WriteDuplicate).found(format_args!("metadata key {key:?} twice"))
        );
    }
    write_string(out, METADATA_KEY);
    out.extend_from_slice(b":{");
    for (i, (key, value)) in sorted.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write_string(out, key);
        out.push(b':');
        write_string(out, value);
    }
    out.push(b'}');
    Ok(())
}

fn write_tensor(
    out: &mut Vec<u8>,
    tensor: &TensorSpec<'_>,
    plain: bool,
    (begin, end): (Digits, Digits),
) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    if plain {
        out.push(b'"');
        out.extend_from_slice(tensor.name.as_bytes());
        out.extend_from_slice(b"\":{\"dtype\":\"");
    } else {
        write_string(out, tensor.name);
        out.extend_from_slice(b":{\"dtype\":\"");
    }
    out.extend_from_slice(tensor.dtype.name().as_bytes());
    out.extend_from_slice(b"\",\"shape\":[");
    for (i, &extent) in tensor.shape.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        match extent {
            0..10 => out.push(b'0' + extent as u8),
            _ => Digits::new(extent).write(out),
        }
    }
    out.extend_from_slice(b"],\"data_offsets\":[");
    begin.write(out);
    out.push(b',');
    end.write(out);
    out.extend_from_slice(b"]}");
}

/// A number in decimal, packed into registers: its first digit in the lowest byte. Digits stored one by
/// one and copied together would have to wait for each other.
#[derive(Clone, Copy)]
struct Digits {
    packed: u128,
    len: usize,
    /// What stands before the 16 digits that fit.
    above: u64,
}

impl Digits {
    const MOST: usize = 16;
    const ABOVE: u64 = 10_000_000_000_000_000;

    #[inline]
    fn new(value: u64) -> Self {
        let (above, mut rest) = (value / Self::ABOVE, value % Self::ABOVE);
        let (mut packed, mut len) = (0, 0);
        loop {
            packed = packed << 8 | (b'0' as u64 + rest % 10) as u128;
            rest /= 10;
            len += 1;
            if rest == 0 && (above == 0 || len == Self::MOST) {
                return Digits { packed, len, above };
            }
        }
    }

    #[inline]
    fn write(self, out: &mut Vec<u8>) {
        if self.above > 0 {
            Digits::new(self.above).write(out);
        }
        // A copy of one size, and what is too much of it cut off, is faster than a copy of any size.
        out.extend_from_slice(&self.packed.to_le_bytes());
        out.truncate(out.len() - (Self::MOST - self.len));
    }
}

/// Writes a JSON string with the escapes of spec 9.7: the two that JSON demands, the short forms,
/// `\u00xx` for other controls; everything else as it is.
pub(crate) fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut rest = text.as_bytes();
    loop {
        let (plain, tail) = rest.split_at(plain_prefix(rest));
        out.extend_from_slice(plain);
        let Some((&byte, tail)) = tail.split_first() else {
            break;
        };
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0C => out.extend_from_slice(b"\\f"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            control => {
                let mut escape = String::with_capacity(6);
                let _ = write!(escape, "\\u{control:04x}");
                out.extend_from_slice(escape.as_bytes());
            }
        }
        rest = tail;
    }
    out.push(b'"');
}

/// Pads with spaces to the alignment, and writes the length into the prefix.
fn pad(header: &mut Vec<u8>, options: &WriteOptions) -> Result<(), Error> {
    let align = match options.align {
        Align::Eight => HEADER_ALIGN,
        Align::Page => PAGE_ALIGN,
    };
    let wanted = (header.len() as u64)
        .checked_add(options.reserve)
        .and_then(|len| len.checked_next_multiple_of(align))
        .filter(|&len| len - PREFIX_LEN <= MAX_HEADER_LEN);
    let Some(len) = wanted else {
        let found = (header.len() as u64 - PREFIX_LEN).saturating_add(options.reserve);
        return Err(Error::over(Reason::WriteTooLarge, found, MAX_HEADER_LEN));
    };
    header.resize(len as usize, PAD);
    if let Some(prefix) = header.first_chunk_mut() {
        *prefix = (len - PREFIX_LEN).to_le_bytes();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Header, ReadOptions};

    fn spec<'a>(name: &'a str, dtype: Dtype, shape: &'a [u64]) -> TensorSpec<'a> {
        TensorSpec { name, dtype, shape }
    }

    #[test]
    fn canonical_order_is_dtype_descending_then_name() {
        let tensors = [
            spec("b", Dtype::BOOL, &[1]),
            spec("z", Dtype::F32, &[1]),
            spec("a", Dtype::F32, &[2]),
            spec("i", Dtype::I64, &[1]),
        ];
        let layout = layout(
            &tensors,
            Some(&[("b", "2"), ("a", "1")]),
            &WriteOptions::default(),
        )
        .unwrap();
        assert_eq!(layout.order, [3, 2, 1, 0]);
        assert_eq!(layout.ranges, [(20, 21), (16, 20), (8, 16), (0, 8)]);
        let text = core::str::from_utf8(&layout.header[8..]).unwrap();
        assert!(
            text.starts_with(r#"{"__metadata__":{"a":"1","b":"2"},"i":{"#),
            "{text}"
        );
        assert_eq!(layout.header.len() % 8, 0);
        assert_eq!(layout.file_len, layout.data_start() + 21);
        let header =
            Header::parse(layout.header, Some(layout.file_len), &ReadOptions::strict()).unwrap();
        assert_eq!(header.get("a").unwrap().shape, [2]);
        assert!(header.lints().is_empty());
    }

    #[test]
    fn pages_reserve_and_the_given_order() {
        let tensors = [spec("a", Dtype::U8, &[3]), spec("b", Dtype::F64, &[1])];
        let options = WriteOptions {
            order: Order::Given,
            align: Align::Page,
            reserve: 5000,
        };
        let layout = layout(&tensors, Some(&[]), &options).unwrap();
        assert_eq!(layout.header.len(), 8192);
        assert_eq!(layout.ranges, [(0, 3), (3, 11)]);
        let header = Header::parse(&layout.header[..], None, &ReadOptions::strict()).unwrap();
        assert!(header.padding() >= 5000);
        assert!(header.metadata().unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let reason = |tensors: &[TensorSpec<'_>], metadata: Option<&[(&str, &str)]>, reserve| {
            let options = WriteOptions {
                reserve,
                ..WriteOptions::default()
            };
            layout(tensors, metadata, &options).unwrap_err().reason()
        };
        let a = spec("a", Dtype::U8, &[1]);
        assert_eq!(reason(&[a, a], None, 0), Reason::WriteDuplicate);
        assert_eq!(
            reason(&[spec(METADATA_KEY, Dtype::U8, &[1])], None, 0),
            Reason::WriteReservedName
        );
        assert_eq!(
            reason(&[spec("f", Dtype::F4, &[3])], None, 0),
            Reason::WritePartialByte
        );
        assert_eq!(
            reason(&[spec("h", Dtype::U8, &[1 << 63, 2])], None, 0),
            Reason::WriteSize
        );
        let huge = spec("h", Dtype::U8, &[1 << 60]);
        let huge2 = spec("i", Dtype::U8, &[u64::MAX / 8]);
        assert_eq!(
            layout(&[huge, huge2], None, &WriteOptions::default())
                .unwrap()
                .ranges
                .len(),
            2
        );
        assert_eq!(
            reason(&[], Some(&[("k", "1"), ("k", "2")]), 0),
            Reason::WriteDuplicate
        );
        assert_eq!(reason(&[a], None, MAX_HEADER_LEN), Reason::WriteTooLarge);
        assert_eq!(reason(&[a], None, u64::MAX), Reason::WriteTooLarge);
    }

    #[test]
    fn strings_are_escaped_as_serde_json_escapes_them() {
        let every: String = (0..0x250_u32)
            .filter_map(char::from_u32)
            .chain("😀\u{2028}".chars())
            .collect();
        let mut out = Vec::new();
        write_string(&mut out, &every);
        assert_eq!(out, serde_json::to_vec(&every).unwrap());
        let ends = [
            0,
            1,
            9,
            10,
            Digits::ABOVE - 1,
            Digits::ABOVE,
            10 * Digits::ABOVE + 7,
        ];
        for value in ends.into_iter().chain([1_000_000, u64::MAX]) {
            let mut digits = b"[".to_vec();
            Digits::new(value).write(&mut digits);
            assert_eq!(digits, alloc::format!("[{value}").as_bytes());
        }
    }
}
