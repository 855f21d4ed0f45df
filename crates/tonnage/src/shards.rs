//! Which tensors share a file, as the Hugging Face Hub's tools split them (spec 8.13).

use crate::error::{Error, Result};

/// Splits tensors, given by their sizes, into files of at most `max` bytes of data. A tensor larger than
/// that gets a file of its own. The order is kept, but a large tensor's file comes before the one
/// that was being filled when it was met: that is how the Hub's tools number them.
pub fn split(sizes: impl IntoIterator<Item = u64>, max: Option<u64>) -> Vec<Vec<usize>> {
    let max = max.unwrap_or(u64::MAX);
    let (mut shards, mut current, mut filled) = (Vec::new(), Vec::new(), 0_u64);
    for (i, size) in sizes.into_iter().enumerate() {
        if size > max {
            shards.push(vec![i]);
            continue;
        }
        if filled.checked_add(size).is_none_or(|sum| sum > max) {
            shards.push(std::mem::take(&mut current));
            filled = 0;
        }
        current.push(i);
        filled += size;
    }
    if !current.is_empty() || shards.is_empty() {
        shards.push(current);
    }
    shards
}

/// Reads a size such as `5GB`, `500MB`, `2GiB` or `1234`: decimal units are powers of 1000, binary ones
/// (`KiB`, `MiB`, …) of 1024, case does not matter.
///
/// # Errors
/// `SIZE` for anything else.
pub fn parse_size(text: &str) -> Result<u64> {
    let wrong = || {
        Error::usage(
            "SIZE",
            format!("{text:?} is no size; write it as 5GB, 500MB, 2GiB or 1234"),
        )
    };
    let trimmed = text.trim();
    let digits = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    let size = match number.split_once('.') {
        None => number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit)),
        Some(_) => {
            let size = number.parse::<f64>().map_err(|_| wrong())? * unit as f64;
            // Up to 2^53 a double is exact to the byte.
            (size.is_finite() && size < 9e15).then_some(size as u64)
        }
    };
    size.filter(|&size| size > 0).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_filled_in_order_and_large_tensors_stand_alone() {
        assert_eq!(split([], Some(10)), [[0_usize; 0]]);
        assert_eq!(split([4, 4, 4], None), [[0, 1, 2]]);
        assert_eq!(split([4, 6, 1], Some(10)), [vec![0, 1], vec![2]]);
        assert_eq!(
            split([3, 99, 3, 8], Some(10)),
            [vec![1], vec![0, 2], vec![3]]
        );
        assert_eq!(split([99, 99], Some(10)), [[0], [1]]);
        assert_eq!(split([u64::MAX, 1, u64::MAX - 1], None).len(), 2);
        assert_eq!(split([0, 0], Some(1)), [[0, 1]]);
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, size) in [
            ("5GB", 5_000_000_000),
            ("500mb", 500_000_000),
            ("2GiB", 2 << 30),
            ("1234", 1234),
            (" 1.5 kB ", 1500),
            ("1b", 1),
        ] {
            assert_eq!(parse_size(text).unwrap(), size);
        }
        for text in [
            "",
            "GB",
            "-1GB",
            "5 parsecs",
            "0",
            "1.2.3",
            "99999999TB",
            "1e3",
            "99999999999999999999",
            "9999999.5TB",
        ] {
            assert_eq!(parse_size(text).unwrap_err().code(), "SIZE", "{text}");
        }
    }
}
