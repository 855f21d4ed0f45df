//! Text for people: names that cannot harm a terminal, sizes, counts, values.
//!
//! Names, metadata and paths come from strangers. Whatever could move the cursor, change the
//! direction of writing or hide itself is shown as `\u{…}`, so that what is read is what is there.

use std::borrow::Cow;
use std::fmt::Write;

/// Longest piece of a name that a line repeats; `--json` has all of it.
const LONGEST: usize = 300;

/// Whether a character stands for itself on every terminal.
fn is_plain(c: char) -> bool {
    // Debug's escapes are those of everything that Unicode calls control, format (direction marks,
    // zero-width), private, unassigned or separating, but for the space.
    let mut escaped = c.escape_debug();
    escaped.len() == 1 && escaped.next() == Some(c) || matches!(c, '\'' | '"' | '\\')
}

/// A name as it is, or quoted and escaped where that would not be safe or not be clear.
pub fn name(text: &str) -> Cow<'_, str> {
    let clear = !text.is_empty()
        && !text.starts_with([' ', '"'])
        && !text.ends_with(' ')
        && !text.contains('\\')
        && text.chars().all(is_plain);
    let short = match text.char_indices().nth(LONGEST) {
        Some((cut, _)) => text.get(..cut).unwrap_or(text),
        None => text,
    };
    match (clear, short.len() == text.len()) {
        (true, true) => Cow::Borrowed(text),
        (true, false) => Cow::Owned(format!("{short}…")),
        (false, true) => Cow::Owned(format!("{text:?}")),
        (false, false) => Cow::Owned(format!("{short:?}…")),
    }
}

/// A value, whole: as it is, or quoted and escaped where that would not be safe.
pub fn whole(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(format!("{text:?}"))
    }
}

/// A sentence that may hold such text: one line, with what could do harm escaped.
pub fn line(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_plain(c) {
            safe.push(c);
        } else {
            safe.extend(c.escape_debug());
        }
    }
    Cow::Owned(safe)
}

/// Bytes in binary units: `86.6 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    scaled(bytes, 1024.0, &UNITS).unwrap_or_else(|| format!("{bytes} B"))
}

/// A count in decimal steps: `22.7 M`. Below ten thousand, all of it.
pub fn count(n: u64) -> String {
    const UNITS: [&str; 6] = ["K", "M", "B", "T", "Q", "Qi"];
    if n < 10_000 {
        return grouped(n);
    }
    scaled(n, 1000.0, &UNITS).unwrap_or_else(|| grouped(n))
}

fn scaled(n: u64, step: f64, units: &[&str]) -> Option<String> {
    let mut value = n as f64;
    let mut unit = None;
    for name in units {
        // What would be rounded to a whole step belongs to the next unit.
        let limit = if unit.is_some() { step - 0.05 } else { step };
        if value < limit {
            break;
        }
        value /= step;
        unit = Some(name);
    }
    unit.map(|unit| format!("{value:.1} {unit}"))
}

/// An integer with its thousands apart: `22,713,216`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A shape: `[30522, 384]`; `[]` is a scalar. Hostile ranks are cut.
pub fn shape(extents: &[u64]) -> String {
    const MOST: usize = 16;
    let mut text = String::from("[");
    for (i, extent) in extents.iter().take(MOST).enumerate() {
        let comma = if i > 0 { ", " } else { "" };
        let _ = write!(text, "{comma}{extent}");
    }
    if extents.len() > MOST {
        let _ = write!(text, ", … {} more", extents.len() - MOST);
    }
    text.push(']');
    text
}

/// A value to five significant digits, without a tail of zeros; `-` where there is none.
pub fn value(value: Option<f64>) -> String {
    let Some(value) = value else {
        return "-".to_owned();
    };
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let power = value.abs().log10().floor() as i32;
    if !(-4..6).contains(&power) {
        return format!("{value:.4e}");
    }
    let text = format!("{value:.*}", (4 - power).max(0) as usize);
    if !text.contains('.') {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `1 tensor`, `2 tensors`.
pub fn plural(n: u64, what: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{} {what}{s}", grouped(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_harm_or_confuse_are_quoted() {
        for plain in [
            "model.layers.0.weight",
            "lm head",
            "größe",
            "重み",
            "it's",
            "a\"b",
        ] {
            assert_eq!(name(plain), plain);
        }
        assert_eq!(name(""), "\"\"");
        assert_eq!(name(" a"), "\" a\"");
        assert_eq!(name("a\u{1b}[2Jb"), "\"a\\u{1b}[2Jb\"");
        assert_eq!(name("a\u{202e}b"), "\"a\\u{202e}b\"");
        assert_eq!(name("a\nb\u{9b}\u{200b}"), "\"a\\nb\\u{9b}\\u{200b}\"");
        assert_eq!(name("a\\n"), "\"a\\\\n\"");
        assert!(name(&"x".repeat(1 << 20)).len() < 400);
        assert!(name(&"\u{7}".repeat(1 << 20)).len() < 4000);
    }

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(
            line("cannot open \"a\": it's no file"),
            "cannot open \"a\": it's no file"
        );
        assert_eq!(
            line("a\nb\u{1b}]0;x\u{7}\u{2066}"),
            "a\\nb\\u{1b}]0;x\\u{7}\\u{2066}"
        );
    }

    #[test]
    fn sizes_are_binary_and_counts_decimal() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1.0 KiB");
        assert_eq!(size(90_852_864), "86.6 MiB");
        assert_eq!(size((1 << 20) - 1), "1.0 MiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
        assert_eq!(count(9_999), "9,999");
        assert_eq!(count(22_713_216), "22.7 M");
        assert_eq!(count(999_999), "1.0 M");
        assert_eq!(count(8_030_261_248), "8.0 B");
        assert_eq!(count(u64::MAX), "18.4 Qi");
    }

    #[test]
    fn values_are_short() {
        assert_eq!(value(None), "-");
        assert_eq!(value(Some(0.0)), "0");
        assert_eq!(value(Some(1.0)), "1");
        assert_eq!(value(Some(-0.0123456)), "-0.012346");
        assert_eq!(value(Some(12345.678)), "12346");
        assert_eq!(value(Some(0.00005)), "5.0000e-5");
        assert_eq!(value(Some(1e30)), "1.0000e30");
        assert_eq!(value(Some(100.0)), "100");
    }

    #[test]
    fn shapes_of_hostile_rank_are_cut() {
        assert_eq!(shape(&[]), "[]");
        assert_eq!(shape(&[30522, 384]), "[30522, 384]");
        assert!(shape(&[1; 1000]).ends_with(", … 984 more]"));
        assert_eq!(plural(1, "tensor"), "1 tensor");
        assert_eq!(plural(2000, "tensor"), "2,000 tensors");
    }
}
