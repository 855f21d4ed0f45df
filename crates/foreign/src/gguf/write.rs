//! The bytes of a header, and the place of each tensor.

use super::error::{Error, Reason};
use super::owned::{Out, OwnedValue};
use super::scan::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_RANK};
use super::types::{GgmlType, byte_len, swaps};
use super::value::ByteOrder;

/// A tensor to be written.
#[derive(Clone, Copy, Debug)]
pub struct TensorSpec<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type.
    pub ty: GgmlType,
    /// Its extents in elements, row-major.
    pub shape: &'a [u64],
}

/// How a header is written. The alignment is what the metadata says, or 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// The version: 2 or 3.
    pub version: u32,
    /// The order of bytes in numbers. Data that is given for a big-endian file is little-endian, and is turned
    /// round by who writes it ([`super::Swapped`]).
    pub order: ByteOrder,
}

impl Default for WriteOptions {
    fn default() -> Self {
        WriteOptions {
            version: 3,
            order: ByteOrder::Little,
        }
    }
}

/// Where everything of a file goes. What nothing covers is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The header, without the padding behind it.
    pub header: Vec<u8>,
    /// First byte of the data.
    pub data_start: u64,
    /// First byte and length of each tensor, in the order in which they were given.
    pub places: Vec<(u64, u64)>,
    /// Bytes of the file.
    pub file_len: u64,
}

/// Lays out a file of these metadata entries and tensors, both in the order in which they are given.
///
/// # Errors
/// Names twice, too long or without a meaning; values that cannot be written; shapes that are no whole blocks.
pub fn layout(
    kv: &[(String, OwnedValue)],
    tensors: &[TensorSpec<'_>],
    options: &WriteOptions,
) -> Result<Layout, Error> {
    if !(2..=3).contains(&options.version) {
        let wrong = Error::new(Reason::Version).found(options.version);
        return Err(wrong.needed("2 or 3"));
    }
    let alignment = check_keys(kv)?;
    let mut out = Out {
        bytes: MAGIC.to_vec(),
        order: options.order,
    };
    out.put(options.version.to_le_bytes());
    out.put((tensors.len() as u64).to_le_bytes());
    out.put((kv.len() as u64).to_le_bytes());
    for (key, value) in kv {
        out.text(key.as_bytes());
        out.put((value.ty() as u32).to_le_bytes());
        value.write(&mut out).map_err(|error| error.key(key))?;
    }
    let mut offset: u64 = 0;
    let mut places = Vec::with_capacity(tensors.len());
    let mut names: Vec<&str> = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let len = entry(&mut out, tensor, offset, options.order)?;
        names.push(tensor.name);
        places.push((offset, len));
        let end = offset.checked_add(len);
        let end = end.and_then(|end| end.checked_next_multiple_of(alignment));
        offset = end.ok_or_else(|| Error::new(Reason::SizeOverflow).tensor(tensor.name))?;
    }
    names.sort_unstable();
    if let Some(name) = twice(&names) {
        return Err(Error::new(Reason::DuplicateTensor).tensor(name));
    }
    let data_start = (out.bytes.len() as u64).next_multiple_of(alignment);
    let over = || Error::new(Reason::SizeOverflow);
    for (place, _) in &mut places {
        *place = place.checked_add(data_start).ok_or_else(over)?;
    }
    Ok(Layout {
        header: out.bytes,
        data_start,
        places,
        file_len: data_start.checked_add(offset).ok_or_else(over)?,
    })
}

/// A name that is its neighbour's too.
fn twice<'a>(sorted: &[&'a str]) -> Option<&'a str> {
    let pairs = sorted.windows(2);
    let mut equal = pairs.filter_map(|pair| match *pair {
        [a, b] if a == b => Some(a),
        _ => None,
    });
    equal.next()
}

/// Checks the keys, and gives the alignment that they ask for.
fn check_keys(kv: &[(String, OwnedValue)]) -> Result<u64, Error> {
    let mut keys: Vec<&str> = kv.iter().map(|(key, _)| key.as_str()).collect();
    if let Some(bad) = keys
        .iter()
        .find(|key| key.is_empty() || key.len() > u16::MAX as usize)
    {
        let wrong = Error::new(Reason::Key).found(format_args!("{} bytes", bad.len()));
        return Err(wrong.needed("1 to 65535"));
    }
    keys.sort_unstable();
    if let Some(key) = twice(&keys) {
        return Err(Error::new(Reason::DuplicateKey).key(key));
    }
    match kv.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some((_, OwnedValue::U32(given))) if given.is_power_of_two() && given % 8 == 0 => {
            Ok(u64::from(*given))
        }
        Some((key, value)) => {
            let wrong = Error::new(Reason::Alignment).key(key);
            Err(wrong
                .found(format_args!("{value:?}"))
                .needed("a U32 such as 32"))
        }
    }
}

/// Writes a tensor's entry and gives its bytes.
fn entry(
    out: &mut Out,
    tensor: &TensorSpec<'_>,
    offset: u64,
    order: ByteOrder,
) -> Result<u64, Error> {
    let TensorSpec { name, ty, shape } = *tensor;
    let refuse = |reason: Reason| {
        let wrong = Error::new(reason).tensor(name);
        wrong.found(format_args!("{} {shape:?}", ty.name()))
    };
    if name.len() > u16::MAX as usize {
        return Err(refuse(Reason::Name));
    }
    if shape.len() > MAX_RANK as usize {
        return Err(refuse(Reason::Rank));
    }
    if order == ByteOrder::Big && swaps(ty).is_none() {
        return Err(refuse(Reason::BigEndianBlocks));
    }
    let len = byte_len(ty, shape).map_err(refuse)?;
    out.text(name.as_bytes());
    out.put((shape.len() as u32).to_le_bytes());
    for extent in shape.iter().rev() {
        out.put(extent.to_le_bytes());
    }
    out.put(ty.id().to_le_bytes());
    out.put(offset.to_le_bytes());
    Ok(len)
}
