//! Headers as a tree, and the tree as text: every dtype, ranks from 0 to 70, empty tensors, sub-byte
//! sizes, unknown fields, metadata, any order of keys, any whitespace, any escape.
//!
//! What comes out of [`header`] is valid; `mutate.rs` breaks it at the level of the grammar, so that
//! most broken headers are one step away from a good one.

use tonnage_format::Dtype;

use super::Random;

/// A JSON value that keeps repeated keys and the text of numbers.
#[derive(Clone, Debug)]
pub enum Json {
    /// Written as it is: numbers, literals and, in broken headers, anything.
    Raw(String),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    pub fn text(text: &str) -> Json {
        Json::Text(text.to_owned())
    }

    pub fn number(number: u64) -> Json {
        Json::Raw(number.to_string())
    }

    fn numbers(numbers: &[u64]) -> Json {
        Json::List(numbers.iter().map(|&n| Json::number(n)).collect())
    }
}

/// A generated header: its tree, and how many bytes of data follow it.
pub struct Sample {
    pub tree: Json,
    pub data_len: u64,
}

const NAMES: &[&str] = &[
    "a",
    "b",
    "w",
    "weight",
    "model.layers.0.self_attn.q_proj.weight",
    "x.y",
    "é",
    "日本",
    "😀",
    "",
    "a\0b",
    "a\"b",
    "a\\b",
    "tab\there",
    "\u{7f}",
    "\u{2028}",
    "dtype",
    "shape",
    "__proto__",
    "12345678",
    "123456789abcdef",
    "e\u{301}",
    "\u{10ffff}",
    "__metadata",
    "__metadata___",
];

/// A name; mostly a fresh one, so that names repeat seldom unless asked to.
pub fn name(r: &mut Random) -> String {
    match r.below(8) {
        0 => r.pick(NAMES).to_owned(),
        1 => format!("{}{}", r.pick(NAMES), r.below(4)),
        _ => format!("{}.{}", r.pick(&["m", "layer", "wte"]), r.below(1 << 16)),
    }
}

/// A shape whose elements fill whole bytes, of at most a few hundred elements.
fn shape(r: &mut Random, dtype: Dtype) -> Vec<u64> {
    let rank = match r.below(40) {
        0 => 5 + r.below(66),
        1..=4 => 0,
        _ => 1 + r.below(4),
    };
    let mut shape: Vec<u64> = (0..rank)
        .map(|_| match r.below(if rank > 5 { 30 } else { 10 }) {
            0 => 0,
            1 | 2 if rank <= 5 => 2 + r.below(7) as u64,
            3 if rank <= 5 => 1,
            _ if rank > 4 => 1,
            _ => 1 + r.below(4) as u64,
        })
        .collect();
    // Huge extents beside a zero are valid where their product fits.
    if shape.contains(&0) && r.one_in(4) {
        let at = r.below(shape.len());
        shape[at] = r.pick(&[0, 1 << 31, 1 << 40, (1 << 53) + 1]);
    }
    let unit: u64 = match dtype.bitsize() {
        4 => 2,
        6 => 4,
        _ => 1,
    };
    let full = |shape: &[u64]| {
        dtype
            .bits_of(shape)
            .is_some_and(|bits| bits.is_multiple_of(8))
    };
    if !full(&shape) {
        match shape.last_mut() {
            Some(last) => *last = last.saturating_mul(unit),
            None => shape.push(unit),
        }
    }
    if full(&shape) { shape } else { vec![unit] }
}

/// A valid header.
pub fn header(r: &mut Random) -> Sample {
    let count = match r.below(20) {
        0 | 1 => 0,
        2 => 5 + r.below(12),
        _ => 1 + r.below(4),
    };
    let mut end = 0;
    let mut members = Vec::new();
    for _ in 0..count {
        let dtype = r.pick(Dtype::ALL);
        let shape = shape(r, dtype);
        let size = dtype.bytes_of(&shape).unwrap_or(0);
        let name = name(r);
        if members.iter().any(|(known, _)| *known == name) {
            continue;
        }
        let code = if r.one_in(40) {
            "F128".to_owned()
        } else {
            dtype.name().to_owned()
        };
        members.push((name, entry(r, code, &shape, end, end + size)));
        end += size;
    }
    if r.one_in(4) {
        r.shuffle(&mut members);
    }
    if r.one_in(3) {
        let at = if r.one_in(3) {
            r.below(members.len() + 1)
        } else {
            0
        };
        members.insert(at, ("__metadata__".to_owned(), metadata(r)));
    }
    Sample {
        tree: Json::Object(members),
        data_len: end,
    }
}

fn entry(r: &mut Random, dtype: String, shape: &[u64], begin: u64, end: u64) -> Json {
    let mut fields = vec![
        ("dtype".to_owned(), Json::Text(dtype)),
        ("shape".to_owned(), Json::numbers(shape)),
        ("data_offsets".to_owned(), Json::numbers(&[begin, end])),
    ];
    if r.one_in(12) {
        for _ in 0..1 + r.below(3) {
            let key = r.pick(&[
                "nntr_dtype",
                "checksum",
                "",
                "Dtype",
                "dtype ",
                "strides",
                "é",
            ]);
            if fields.iter().all(|(known, _)| known != key) {
                fields.push((key.to_owned(), value(r, 3)));
            }
        }
    }
    if r.one_in(4) {
        r.shuffle(&mut fields);
    }
    Json::Object(fields)
}

fn metadata(r: &mut Random) -> Json {
    let mut pairs: Vec<(String, Json)> = Vec::new();
    for _ in 0..r.below(4) {
        let key = if r.one_in(2) {
            "format".to_owned()
        } else {
            name(r)
        };
        if pairs.iter().all(|(known, _)| *known != key) {
            pairs.push((key, Json::Text(name(r))));
        }
    }
    Json::Object(pairs)
}

/// Any JSON value of at most `depth` levels, valid by itself.
pub fn value(r: &mut Random, depth: usize) -> Json {
    const SCALARS: &[&str] = &[
        "null",
        "true",
        "false",
        "0",
        "-0",
        "1",
        "-1",
        "2.0",
        "1e2",
        "1E+2",
        "0.5e-3",
        "1e999",
        "-1e999",
        "1e-999",
        "0e999",
        "1.7976931348623157e308",
        "1.7976931348623159e308",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "123456789012345678901234567890",
    ];
    match r.below(if depth == 0 { 4 } else { 8 }) {
        0..=2 => Json::Raw(r.pick(SCALARS).to_owned()),
        3 => Json::Text(name(r)),
        4 | 5 => Json::List((0..r.below(4)).map(|_| value(r, depth - 1)).collect()),
        _ => {
            let mut pairs: Vec<(String, Json)> = Vec::new();
            for _ in 0..r.below(4) {
                let key = name(r);
                if pairs.iter().all(|(known, _)| *known != key) {
                    pairs.push((key, value(r, depth - 1)));
                }
            }
            Json::Object(pairs)
        }
    }
}

/// How a tree becomes text.
pub struct Style {
    /// Whitespace between tokens: never, or once in so many places.
    space: Option<usize>,
    /// Escapes where none are needed: never, or one character in so many.
    escape: Option<usize>,
}

impl Style {
    pub fn random(r: &mut Random) -> Style {
        Style {
            space: r.pick(&[None, None, Some(1), Some(3), Some(10)]),
            escape: r.pick(&[None, None, None, Some(1), Some(6)]),
        }
    }
}

/// Writes a header's text: the object, padded as writers pad.
pub fn print(r: &mut Random, tree: &Json) -> Vec<u8> {
    let style = Style::random(r);
    let mut out = Vec::with_capacity(512);
    write(r, &style, tree, &mut out);
    match r.below(4) {
        0 => out.resize(out.len().next_multiple_of(8), b' '),
        1 => {
            for _ in 0..r.below(9) {
                out.push(r.pick(b" \n\t\r"));
            }
        }
        _ => {}
    }
    out
}

fn space(r: &mut Random, style: &Style, out: &mut Vec<u8>) {
    if style.space.is_some_and(|n| r.one_in(n)) {
        for _ in 0..1 + r.below(2) {
            out.push(r.pick(b" \n\t\r"));
        }
    }
}

fn write(r: &mut Random, style: &Style, json: &Json, out: &mut Vec<u8>) {
    space(r, style, out);
    match json {
        Json::Raw(raw) => out.extend_from_slice(raw.as_bytes()),
        Json::Text(text) => write_text(r, style, text, out),
        Json::List(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write(r, style, item, out);
            }
            space(r, style, out);
            out.push(b']');
        }
        Json::Object(members) => {
            out.push(b'{');
            for (i, (key, member)) in members.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                space(r, style, out);
                write_text(r, style, key, out);
                space(r, style, out);
                out.push(b':');
                write(r, style, member, out);
            }
            space(r, style, out);
            out.push(b'}');
        }
    }
    space(r, style, out);
}

fn write_text(r: &mut Random, style: &Style, text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for c in text.chars() {
        let wanted = style.escape.is_some_and(|n| r.one_in(n));
        let short = match c {
            '"' => Some(b'"'),
            '\\' => Some(b'\\'),
            '/' if wanted => Some(b'/'),
            '\u{8}' => Some(b'b'),
            '\u{c}' => Some(b'f'),
            '\n' => Some(b'n'),
            '\r' => Some(b'r'),
            '\t' => Some(b't'),
            _ => None,
        };
        match short {
            Some(letter) if !wanted || r.one_in(2) => out.extend_from_slice(&[b'\\', letter]),
            None if !wanted && c >= ' ' => {
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let escape = if r.one_in(2) {
                        format!("\\u{unit:04x}")
                    } else {
                        format!("\\u{unit:04X}")
                    };
                    out.extend_from_slice(escape.as_bytes());
                }
            }
        }
    }
    out.push(b'"');
}
