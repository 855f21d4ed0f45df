//! The layout rules (spec chapter 6): tensors, in the order of their bytes, tile the data section.

use alloc::vec::Vec;

use crate::error::{Error, Reason};
use crate::limits::{Quirks, ReadOptions};
use crate::scan::{Entry, Table};

/// Checks each tensor's size and that no byte is claimed twice or by none. Gives the order of the
/// tensors by offset, where it differs from the header's, and the end of the last one.
pub(crate) fn check(
    table: &Table,
    json: &[u8],
    options: &ReadOptions,
) -> Result<(Option<Vec<u32>>, u64), Error> {
    let entries = &table.entries;
    let order = order(entries);
    let mut end = 0;
    for i in 0..entries.len() {
        let at = order
            .as_ref()
            .and_then(|order| order.get(i))
            .map_or(i, |&at| at as usize);
        let Some(entry) = entries.get(at) else {
            continue;
        };
        size(table, entry, options)
            .and_then(|()| place(entry, end))
            .map_err(|error| error.tensor(table.text(json, entry.name)))?;
        end = entry.end;
    }
    Ok((order, end))
}

/// The order by (begin, end), or `None` if the entries stand in it already: canonical files do.
fn order(entries: &[Entry]) -> Option<Vec<u32>> {
    let key = |entry: &Entry| (entry.begin, entry.end);
    if entries.is_sorted_by_key(key) {
        return None;
    }
    let mut order: Vec<u32> = (0..entries.len() as u32).collect();
    order.sort_by_key(|&at| entries.get(at as usize).map(key));
    Some(order)
}

fn size(table: &Table, entry: &Entry, options: &ReadOptions) -> Result<(), Error> {
    if entry.end < entry.begin {
        return Err(Error::new(Reason::OffsetsReversed)
            .found(format_args!("[{}, {}]", entry.begin, entry.end))
            .needed("begin at most end"));
    }
    // The size of an unknown dtype is what its offsets say (spec 5.2).
    let Some(dtype) = table.dtype(entry) else {
        return Ok(());
    };
    let shape = table.shape(entry);
    let bytes = if options.quirks.has(Quirks::ORDERED_ZERO_OVERFLOW) && shape.contains(&0) {
        ordered_product(shape).ok_or_else(|| Error::new(Reason::SizeOverflow))?
    } else {
        dtype.bytes_of(shape)?
    };
    if bytes != entry.end - entry.begin {
        return Err(Error::new(Reason::SizeMismatch)
            .found(format_args!("{} bytes", entry.end - entry.begin))
            .needed(format_args!("{bytes} for shape {shape:?} of {dtype}")));
    }
    Ok(())
}

/// The reference's product of a shape that holds a zero: left to right, so what stands before the
/// zero can overflow and what stands after cannot.
fn ordered_product(shape: &[u64]) -> Option<u64> {
    shape
        .iter()
        .try_fold(1_u64, |product, &extent| product.checked_mul(extent))
}

/// Checks that a tensor begins where the one before it ended.
fn place(entry: &Entry, end: u64) -> Result<(), Error> {
    let reason = match entry.begin.cmp(&end) {
        core::cmp::Ordering::Equal => return Ok(()),
        core::cmp::Ordering::Greater => Reason::Hole,
        core::cmp::Ordering::Less if entry.begin == entry.end => Reason::EmptyInside,
        core::cmp::Ordering::Less => Reason::Overlap,
    };
    Err(Error::new(reason)
        .found(format_args!("begin {}", entry.begin))
        .needed(format_args!("begin {end}, where the bytes before it end")))
}

/// Checks that the data section ends with the last tensor.
pub(crate) fn check_end(
    table: &Table,
    json: &[u8],
    order: &Option<Vec<u32>>,
    end: u64,
    data_len: u64,
) -> Result<(), Error> {
    if end == data_len {
        return Ok(());
    }
    let reason = if end > data_len {
        Reason::DataTruncated
    } else {
        Reason::TrailingData
    };
    let error = Error::new(reason)
        .found(format_args!("{data_len} bytes"))
        .needed(format_args!("{end}, where the last tensor ends"));
    let last = match order {
        Some(order) => order.last().and_then(|&at| table.entries.get(at as usize)),
        None => table.entries.last(),
    };
    Err(match last {
        Some(entry) if reason == Reason::DataTruncated => {
            error.tensor(table.text(json, entry.name))
        }
        _ => error,
    })
}
