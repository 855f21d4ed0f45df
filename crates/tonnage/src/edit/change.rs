//! The header to come.

use std::borrow::Cow;
use std::collections::BTreeMap;

use tonnage_format::{self as format, Header, Order, Reason, TensorSpec, WriteOptions, layout};

use super::Edit;

/// The header to come.
pub(super) struct Change {
    pub header: Vec<u8>,
    pub renamed: usize,
    pub deleted: usize,
}

impl Change {
    pub fn of(header: &Header<Vec<u8>>, edit: &Edit<'_>) -> Result<Change, format::Error> {
        let mut metadata: Option<BTreeMap<&str, &str>> =
            header.metadata().map(|old| old.iter().collect());
        let mut deleted = 0;
        for key in edit.delete {
            deleted += metadata
                .as_mut()
                .is_some_and(|pairs| pairs.remove(key.as_str()).is_some())
                as usize;
        }
        for (key, value) in edit.set {
            metadata.get_or_insert_default().insert(key, value);
        }
        if deleted > 0 && metadata.as_ref().is_some_and(BTreeMap::is_empty) {
            metadata = None;
        }
        let mut renamed = 0;
        let mut names: Vec<Cow<'_, str>> = Vec::with_capacity(header.len());
        for info in header.iter_by_offset() {
            let new = edit
                .rename
                .and_then(|rename| rename(info.name))
                .filter(|new| new != info.name);
            renamed += new.is_some() as usize;
            names.push(new.map_or(Cow::Borrowed(info.name), Cow::Owned));
        }
        let mut specs = Vec::with_capacity(header.len());
        for (info, name) in header.iter_by_offset().zip(&names) {
            let dtype = info.dtype.known().map_err(|e| e.tensor(info.name))?;
            specs.push(TensorSpec {
                name,
                dtype,
                shape: info.shape,
            });
        }
        let pairs: Option<Vec<(&str, &str)>> = metadata.map(|pairs| pairs.into_iter().collect());
        // The order of the bytes is kept, and the reader has made sure that they leave no gap, so every
        // tensor stays where it is.
        let options = WriteOptions {
            order: Order::Given,
            reserve: 0,
            ..WriteOptions::default()
        };
        let header = layout(&specs, pairs.as_deref(), &options)?.header;
        Ok(Change {
            header,
            renamed,
            deleted,
        })
    }
}

/// A header without its padding.
pub(super) fn trimmed(header: &[u8]) -> &[u8] {
    let len = header
        .iter()
        .rposition(|&byte| byte != format::forever::PAD)
        .map_or(0, |at| at + 1);
    &header[..len]
}

/// The header padded to exactly `len` bytes, if it fits.
pub(super) fn fitted(header: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut new = trimmed(header).to_vec();
    if new.len() > len {
        return None;
    }
    new.resize(len, format::forever::PAD);
    set_length(&mut new);
    Some(new)
}

/// Writes the prefix: the length of what follows it.
fn set_length(header: &mut [u8]) {
    let len = header.len() as u64 - format::forever::PREFIX_LEN;
    if let Some(prefix) = header.first_chunk_mut() {
        *prefix = len.to_le_bytes();
    }
}

/// First and last byte that differ.
pub(super) fn difference(old: &[u8], new: &[u8]) -> Option<(usize, usize)> {
    let first = old.iter().zip(new).position(|(a, b)| a != b)?;
    let last = old.iter().zip(new).rposition(|(a, b)| a != b)?;
    Some((first, last))
}

/// The header with room behind it, for a file that is laid out anew.
///
/// # Errors
/// `WRITE_TOO_LARGE`.
pub(super) fn padded(
    old: &Header<Vec<u8>>,
    header: &[u8],
    reserve: u64,
) -> Result<Vec<u8>, format::Error> {
    // A data section that starts on a page goes on doing so.
    let on_page = old.data_start().is_multiple_of(format::forever::PAGE_ALIGN);
    let align = if on_page {
        format::forever::PAGE_ALIGN
    } else {
        format::forever::HEADER_ALIGN
    };
    let len = (header.len() as u64)
        .checked_add(reserve)
        .and_then(|len| len.checked_next_multiple_of(align))
        .filter(|&len| len <= format::forever::MAX_HEADER_LEN)
        .ok_or_else(|| format::Error::new(Reason::WriteTooLarge))?;
    let mut padded = header.to_vec();
    padded.resize(len as usize, format::forever::PAD);
    set_length(&mut padded);
    Ok(padded)
}
