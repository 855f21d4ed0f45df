//! Breaks a header: in its tree (types, keys, numbers, nesting, layout), or in its text.
//! Some of what comes out is still valid; the judges decide.

use super::Random;
use super::generate::{self, Json, Sample};

/// One generated case: the header's text and the length of the data section that follows.
pub struct Case {
    pub json: Vec<u8>,
    pub data_len: u64,
}

/// Case `case` of the run `seed`: about half of them are left valid.
pub fn case(seed: u64, case: u64) -> Case {
    let r = &mut Random::of_case(seed, case);
    let mut sample = generate::header(r);
    let breaks = r.pick(&[0, 0, 0, 1, 1, 1, 2]);
    let mut in_text = 0;
    for _ in 0..breaks {
        match r.below(8) {
            0 => sample.data_len = near(r, sample.data_len),
            1..=3 => layout(r, &mut sample),
            4..=6 => tree(r, &mut sample.tree),
            _ => in_text += 1,
        }
    }
    let mut json = generate::print(r, &sample.tree);
    for _ in 0..in_text {
        text(r, &mut json);
    }
    Case {
        json,
        data_len: sample.data_len,
    }
}

/// A number beside `n`.
fn near(r: &mut Random, n: u64) -> u64 {
    match r.below(6) {
        0 => n.saturating_sub(1),
        1 => n.saturating_add(8),
        2 => 0,
        3 => n / 2,
        _ => n.saturating_add(1),
    }
}

/// Extents and offsets that are at, below or above a border.
fn border(r: &mut Random) -> u64 {
    r.pick(&[
        0,
        1,
        2,
        3,
        7,
        8,
        9,
        255,
        1 << 16,
        1 << 31,
        1 << 32,
        1 << 53,
        1 << 60,
        1 << 61,
        1 << 62,
        (1 << 63) - 1,
        1 << 63,
        (1 << 63) + 1,
        u64::MAX - 1,
        u64::MAX,
    ])
}

type Fields = Vec<(String, Json)>;

/// The entries of the header that are objects.
fn entries(tree: &mut Json) -> Vec<&mut Fields> {
    let Json::Object(members) = tree else {
        return Vec::new();
    };
    let entries = members
        .iter_mut()
        .filter(|(name, _)| name != "__metadata__");
    entries
        .filter_map(|(_, entry)| match entry {
            Json::Object(fields) => Some(fields),
            _ => None,
        })
        .collect()
}

fn field<'a>(fields: &'a mut Fields, key: &str) -> Option<&'a mut Json> {
    fields
        .iter_mut()
        .find(|(known, _)| known == key)
        .map(|(_, value)| value)
}

/// Moves, swaps, overlaps and resizes: the tree stays an ordinary header.
fn layout(r: &mut Random, sample: &mut Sample) {
    let mut all = entries(&mut sample.tree);
    if all.is_empty() {
        return;
    }
    let at = r.below(all.len());
    match r.below(8) {
        6 => shift(r, all[at]),
        7 => {
            // An empty tensor somewhere, mostly inside another.
            let inside = r.below(1 + sample.data_len.min(64) as usize) as u64;
            let fields = all.swap_remove(at);
            fields.retain(|(key, _)| key == "dtype");
            fields.push(("shape".to_owned(), Json::List(vec![Json::number(0)])));
            let offsets = vec![Json::number(inside), Json::number(inside)];
            fields.push(("data_offsets".to_owned(), Json::List(offsets)));
        }
        0 => {
            // One tensor's offsets for another's: aliasing, and a hole where it was.
            let other = r.below(all.len());
            let copied = field(all[other], "data_offsets").cloned();
            if let (Some(offsets), Some(copied)) = (field(all[at], "data_offsets"), copied) {
                *offsets = copied;
            }
        }
        1 => {
            if let Some(dtype) = field(all[at], "dtype") {
                let name = r.pick(&[
                    "U8", "F4", "F6_E3M2", "F32", "f32", "F128", "C64", "BOOL", "",
                ]);
                *dtype = Json::text(name);
            }
        }
        choice => {
            let key = if choice < 4 { "data_offsets" } else { "shape" };
            let Some(Json::List(numbers)) = field(all[at], key) else {
                return;
            };
            change_number(r, numbers);
        }
    }
}

/// Moves a tensor as a whole, over its neighbour or off it.
fn shift(r: &mut Random, fields: &mut Fields) {
    let Some(Json::List(numbers)) = field(fields, "data_offsets") else {
        return;
    };
    let by = 1 + r.below(8) as u64;
    let back = r.one_in(2);
    for number in numbers {
        if let Json::Raw(raw) = number {
            let known: u64 = raw.parse().unwrap_or(0);
            let moved = if back {
                known.saturating_sub(by)
            } else {
                known.saturating_add(by)
            };
            *raw = moved.to_string();
        }
    }
}

fn change_number(r: &mut Random, numbers: &mut Vec<Json>) {
    if numbers.is_empty() || r.one_in(8) {
        numbers.push(Json::number(border(r)));
        return;
    }
    let at = r.below(numbers.len());
    if r.one_in(6) {
        numbers.reverse();
        return;
    }
    let known = match &numbers[at] {
        Json::Raw(raw) => raw.parse().unwrap_or(0),
        _ => 0,
    };
    let number = if r.one_in(2) {
        near(r, known)
    } else {
        border(r)
    };
    numbers[at] = Json::number(number);
}

/// A random node of the tree.
fn node<'a>(r: &mut Random, json: &'a mut Json) -> &'a mut Json {
    let inside = match json {
        Json::Object(members) => members.len(),
        Json::List(items) => items.len(),
        _ => 0,
    };
    if inside == 0 || r.one_in(4) {
        return json;
    }
    let at = r.below(inside);
    match json {
        Json::Object(members) => node(r, &mut members[at].1),
        Json::List(items) => node(r, &mut items[at]),
        leaf => leaf,
    }
}

/// A random object of the tree, the header's own included.
fn object<'a>(r: &mut Random, json: &'a mut Json) -> Option<&'a mut Fields> {
    match json {
        Json::Object(members) => {
            let inner: Vec<usize> = (0..members.len())
                .filter(|&i| matches!(members[i].1, Json::Object(_)))
                .collect();
            if inner.is_empty() || r.one_in(3) {
                return Some(members);
            }
            let at = inner[r.below(inner.len())];
            object(r, &mut members[at].1)
        }
        _ => None,
    }
}

/// Numbers in every form, good and bad.
const NUMBERS: &[&str] = &[
    "0",
    "00",
    "01",
    "-0",
    "-1",
    "+1",
    "1.0",
    "1.",
    ".5",
    "1e0",
    "1E0",
    "1e",
    "0x10",
    "2.5",
    "NaN",
    "Infinity",
    "1e999",
    "1_000",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999999",
    "\"0\"",
    "null",
    "1 2",
    "- 1",
    "1\u{660}",
];

/// Breaks the tree in one place.
fn tree(r: &mut Random, json: &mut Json) {
    match r.below(12) {
        0 | 1 => {
            let value = generate::value(r, 2);
            *node(r, json) = value;
        }
        2 => *node(r, json) = Json::Raw(r.pick(NUMBERS).to_owned()),
        3 | 4 => repeat_key(r, json),
        5 => {
            if let Some(members) = object(r, json).filter(|members| !members.is_empty()) {
                members.remove(r.below(members.len()));
            }
        }
        6 => unknown_field(r, json),
        7 => reference_form(r, json),
        8 => {
            if let Some(members) = object(r, json) {
                let key = r.pick(&["__metadata__", "dtype", "shape", "data_offsets", "extra"]);
                let value = if r.one_in(2) {
                    Json::Object(Vec::new())
                } else {
                    generate::value(r, 2)
                };
                let at = r.below(members.len() + 1);
                members.insert(at, (key.to_owned(), value));
            }
        }
        9 => numbers_anywhere(r, json),
        10 => {
            // Metadata of another kind.
            if let Json::Object(members) = json {
                members.retain(|(name, _)| name != "__metadata__");
                let value = match r.below(4) {
                    0 => Json::Raw("null".to_owned()),
                    1 => Json::Object(vec![("k".to_owned(), generate::value(r, 1))]),
                    2 => Json::Object(vec![
                        ("k".to_owned(), Json::text("1")),
                        ("k".to_owned(), Json::text("2")),
                    ]),
                    _ => generate::value(r, 2),
                };
                members.push(("__metadata__".to_owned(), value));
            }
        }
        _ => {
            if r.one_in(4) {
                *json = generate::value(r, 2);
            } else {
                *node(r, json) =
                    Json::Raw(r.pick(&["", ",", "'a'", "nul", "True", "/**/1"]).to_owned());
            }
        }
    }
}

/// The same key again in one object, with the same or another value, before or after.
fn repeat_key(r: &mut Random, json: &mut Json) {
    let Some(members) = object(r, json).filter(|members| !members.is_empty()) else {
        return;
    };
    let (key, mut value) = members[r.below(members.len())].clone();
    if r.one_in(3) {
        value = generate::value(r, 2);
    }
    let at = r.below(members.len() + 1);
    members.insert(at, (key, value));
}

/// A field that no version knows, with a value that may nest deeply or repeat keys.
fn unknown_field(r: &mut Random, json: &mut Json) {
    let mut all = entries(json);
    if all.is_empty() {
        return;
    }
    let at = r.below(all.len());
    let value = match r.below(4) {
        0 => {
            // The header and the entry are two levels; 30 more are the strict profile's most, and
            // 125 the reference's.
            let levels = r.pick(&[28, 29, 30, 31, 32, 124, 125, 126, 127, 300]);
            let (open, close) = r.pick(&[("[", "]"), ("{\"a\":", "}")]);
            let inner = if open == "[" { "" } else { "1" };
            Json::Raw(format!(
                "{}{inner}{}",
                open.repeat(levels),
                close.repeat(levels)
            ))
        }
        1 => Json::Object(vec![
            ("k".to_owned(), Json::number(1)),
            ("j".to_owned(), Json::number(1)),
            ("k".to_owned(), Json::number(2)),
        ]),
        _ => generate::value(r, 4),
    };
    let key = r.pick(&["x", "x", "note", ""]);
    let position = r.below(all[at].len() + 1);
    all[at].insert(position, (key.to_owned(), value));
}

/// Forms that the reference takes though its own description does not have them, and near misses.
fn reference_form(r: &mut Random, json: &mut Json) {
    if r.one_in(2) {
        let Json::Object(members) = json else { return };
        let entries = members
            .iter_mut()
            .filter(|(name, _)| name != "__metadata__");
        if let Some((_, entry)) = entries.last()
            && let Json::Object(fields) = entry
        {
            let mut parts: Vec<Json> = ["dtype", "shape", "data_offsets"]
                .into_iter()
                .filter_map(|key| field(fields, key).cloned())
                .collect();
            match r.below(6) {
                0 => parts.push(Json::number(0)),
                1 => parts.truncate(2),
                2 => r.shuffle(&mut parts),
                _ => {}
            }
            *entry = Json::List(parts);
        }
    } else {
        let mut all = entries(json);
        let Some(dtype) = all.last_mut().and_then(|fields| field(fields, "dtype")) else {
            return;
        };
        if let Json::Text(name) = dtype {
            let value = r.pick(&["null", "null", "null", "{}", "[]", "0", "\"\"", "{\"a\":1}"]);
            let mut pairs = vec![(name.clone(), Json::Raw(value.to_owned()))];
            if r.one_in(6) {
                pairs.push(("U8".to_owned(), Json::Raw("null".to_owned())));
            }
            if r.one_in(12) {
                pairs.clear();
            }
            *dtype = Json::Object(pairs);
        }
    }
}

/// A number in another form in a place where an integer is wanted.
fn numbers_anywhere(r: &mut Random, json: &mut Json) {
    let mut all = entries(json);
    if all.is_empty() {
        return;
    }
    let at = r.below(all.len());
    let key = r.pick(&["shape", "data_offsets"]);
    if let Some(Json::List(numbers)) = field(all[at], key)
        && !numbers.is_empty()
    {
        let at = r.below(numbers.len());
        numbers[at] = Json::Raw(r.pick(NUMBERS).to_owned());
    }
}

/// Breaks the text in one place.
fn text(r: &mut Random, json: &mut Vec<u8>) {
    const PIECES: &[&[u8]] = &[
        b"\"",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"0",
        b"1",
        b"-",
        b".",
        b"e",
        b" ",
        b"\t",
        b"\n",
        b"\r",
        b"\x0c",
        b"\0",
        b"\x01",
        b"\x1f",
        b"\x7f",
        b"/",
        b"//",
        b"\\u",
        b"\\uD800",
        b"\\uDC00",
        b"\\uD83D\\uDE00",
        b"\\uD800\\u0041",
        b"\\u00zz",
        b"\\x",
        b"\\'",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xc3\xa9",
        b"\xef\xbb\xbf",
        b"null",
        b"true",
        b"\"a\":1,",
        b",,",
    ];
    let at = r.below(json.len() + 1);
    match r.below(8) {
        0 => json.truncate(at),
        1 => {
            if at < json.len() {
                json.remove(at);
            }
        }
        2 => {
            if at < json.len() {
                json[at] = (r.next() >> 56) as u8;
            }
        }
        3 => {
            let piece = r.pick(&[&b"\0"[..], b"x", b"{}", b" ", b"\n", b",", b"\0\0\0\0"]);
            json.extend_from_slice(piece);
        }
        4 => {
            let piece = r.pick(&[&b"\xef\xbb\xbf"[..], b" ", b"\n\t", b"\0", b"x", b"//\n"]);
            json.splice(0..0, piece.iter().copied());
        }
        5 => {
            // A piece of the header once more, elsewhere.
            let from = r.below(json.len() + 1);
            let piece: Vec<u8> = json[from..].iter().take(1 + r.below(40)).copied().collect();
            json.splice(at..at, piece);
        }
        _ => {
            let piece = r.pick(PIECES);
            json.splice(at..at, piece.iter().copied());
        }
    }
}
