//! The strict profile (spec chapters 3 to 7) written again, slowly: `serde_json` says what is JSON,
//! and every rule is one plain check over the whole header. Where the scanner stops at the first
//! wrong thing, this lists all of them.

use std::collections::BTreeMap;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use tonnage_format::{Dtype, Reason};

/// A tensor as read: dtype's name, shape, begin and end.
pub type Tensor = (String, Vec<u64>, u64, u64);

/// What a header says.
#[derive(Debug, Default, PartialEq)]
pub struct Content {
    /// By name; the order in the header is not part of it.
    pub tensors: BTreeMap<String, Tensor>,
    pub metadata: Option<BTreeMap<String, String>>,
}

/// A judgement: every rule that the header breaks (none: it is valid), and what it says.
#[derive(Debug, Default)]
pub struct Judgement {
    pub broken: Vec<Reason>,
    /// Not JSON, or an object whose pieces are not: then any reason of chapters 3 to 5 may come
    /// first.
    pub not_json: bool,
    pub content: Content,
}

impl Judgement {
    pub fn accepts(&self) -> bool {
        self.broken.is_empty() && !self.not_json
    }
}

/// Members of an object in their order, repeated keys included.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keep;
        impl<'de> Visitor<'de> for Keep {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Keep)
    }
}

/// What a JSON value is, one level deep. `None`: it is not JSON inside.
enum Value<'a> {
    Object(Vec<(String, &'a RawValue)>),
    List(Vec<&'a RawValue>),
    Text(String),
    /// Its text.
    Number(&'a str),
    /// `true`, `false` or `null`.
    Word,
}

fn value(raw: &RawValue) -> Option<Value<'_>> {
    let text = raw.get();
    Some(match text.as_bytes().first()? {
        b'{' => Value::Object(serde_json::from_str::<Members<'_>>(text).ok()?.0),
        b'[' => Value::List(serde_json::from_str(text).ok()?),
        b'"' => Value::Text(serde_json::from_str(text).ok()?),
        b't' | b'f' | b'n' => Value::Word,
        _ => Value::Number(text),
    })
}

/// Judges a header's text, with `data_len` bytes of data after it.
pub fn judge(json: &[u8], data_len: u64) -> Judgement {
    let mut judge = Judge::default();
    if judge.header(json, data_len).is_none() {
        judge.out.not_json = true;
    }
    judge.out
}

#[derive(Default)]
struct Judge {
    out: Judgement,
}

impl Judge {
    fn broken(&mut self, reason: Reason) {
        self.out.broken.push(reason);
    }

    /// `None` where the text is not JSON.
    fn header(&mut self, json: &[u8], data_len: u64) -> Option<()> {
        if json.len() < 2 {
            self.broken(Reason::HeaderTooShort);
            return Some(());
        }
        let raw: &RawValue = serde_json::from_slice(json).ok()?;
        let Value::Object(members) = value(raw)? else {
            self.broken(Reason::NotAnObject);
            return Some(());
        };
        let names: Vec<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
        for (i, name) in names.iter().enumerate() {
            if names[..i].contains(name) {
                let metadata = *name == "__metadata__";
                self.broken(if metadata {
                    Reason::DuplicateMetadata
                } else {
                    Reason::DuplicateTensor
                });
            }
        }
        let mut tensors = Vec::new();
        for (name, raw) in members {
            if name == "__metadata__" {
                self.metadata(raw)?;
            } else if let Some(tensor) = self.entry(raw)? {
                tensors.push((name, tensor));
            }
        }
        if self.out.broken.is_empty() {
            self.layout(&tensors, data_len);
        }
        self.out.content.tensors = tensors.into_iter().collect();
        Some(())
    }

    fn metadata(&mut self, raw: &RawValue) -> Option<()> {
        let Value::Object(members) = value(raw)? else {
            self.broken(Reason::MetadataNotObject);
            return Some(());
        };
        let mut found = BTreeMap::new();
        for (key, raw) in members {
            match value(raw)? {
                Value::Text(text) => {
                    if found.insert(key, text).is_some() {
                        self.broken(Reason::DuplicateMetadataKey);
                    }
                }
                other => {
                    self.broken(Reason::MetadataValue);
                    self.skip(other, 2)?;
                }
            }
        }
        self.out.content.metadata = Some(found);
        Some(())
    }

    /// `Some(None)` for an entry that is not one.
    fn entry(&mut self, raw: &RawValue) -> Option<Option<Tensor>> {
        let Value::Object(members) = value(raw)? else {
            self.broken(Reason::EntryNotObject);
            return Some(None);
        };
        self.unique(&members);
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        for (key, raw) in members {
            let found = value(raw)?;
            match (key.as_str(), found) {
                ("dtype", Value::Text(name)) => dtype = Some(name),
                ("dtype", _) => self.broken(Reason::DtypeNotString),
                ("shape", Value::List(items)) => shape = Some(self.integers(&items)),
                ("shape", _) => self.broken(Reason::ShapeNotArray),
                ("data_offsets", Value::List(items)) => {
                    if items.len() != 2 {
                        self.broken(Reason::OffsetsForm);
                    }
                    offsets = Some(self.integers(&items));
                }
                ("data_offsets", _) => self.broken(Reason::OffsetsForm),
                (_, other) => self.skip(other, 2)?,
            }
        }
        let (Some(dtype), Some(shape), Some(offsets)) = (dtype, shape, offsets) else {
            self.broken(Reason::MissingField);
            return Some(None);
        };
        match (shape, offsets) {
            (Some(shape), Some(offsets)) if offsets.len() == 2 => {
                Some(Some((dtype, shape, offsets[0], offsets[1])))
            }
            _ => Some(None),
        }
    }

    fn unique(&mut self, members: &[(String, &RawValue)]) {
        for (i, (key, _)) in members.iter().enumerate() {
            if members[..i].iter().any(|(known, _)| known == key) {
                self.broken(Reason::DuplicateField);
            }
        }
    }

    fn integers(&mut self, items: &[&RawValue]) -> Option<Vec<u64>> {
        items.iter().map(|item| self.integer(item.get())).collect()
    }

    /// JSON has no leading zeros or plus signs, so an integer is what has digits only.
    fn integer(&mut self, text: &str) -> Option<u64> {
        if !text.bytes().all(|byte| byte.is_ascii_digit()) {
            self.broken(Reason::NumberForm);
            return None;
        }
        match text.parse::<u64>() {
            Ok(number) if number <= i64::MAX as u64 => Some(number),
            _ => {
                self.broken(Reason::IntegerRange);
                None
            }
        }
    }

    /// A value that readers skip: JSON, each key once, at most 32 levels deep.
    fn skip(&mut self, found: Value<'_>, around: usize) -> Option<()> {
        let inside = match found {
            Value::Object(members) => {
                self.unique(&members);
                members.into_iter().map(|(_, raw)| raw).collect()
            }
            Value::List(items) => items,
            _ => return Some(()),
        };
        if around + 1 > 32 {
            self.broken(Reason::NestingTooDeep);
            return Some(());
        }
        for raw in inside {
            self.skip(value(raw)?, around + 1)?;
        }
        Some(())
    }

    /// Chapter 6: sizes one by one, then every byte's owner, in 128 bits.
    fn layout(&mut self, tensors: &[(String, Tensor)], data_len: u64) {
        for (_, (dtype, shape, begin, end)) in tensors {
            if end < begin {
                self.broken(Reason::OffsetsReversed);
                continue;
            }
            let Some(dtype) = Dtype::ALL.iter().find(|known| known.name() == dtype) else {
                continue;
            };
            let whole = shape.iter().filter(|&&extent| extent != 0).try_fold(
                dtype.row().bits as u128,
                |bits, &extent| {
                    let bits = bits * extent as u128;
                    (bits <= u64::MAX as u128).then_some(bits)
                },
            );
            let Some(bits) = whole else {
                self.broken(Reason::SizeOverflow);
                continue;
            };
            let bits = if shape.contains(&0) { 0 } else { bits };
            if bits % 8 != 0 {
                self.broken(Reason::PartialByte);
            } else if bits / 8 != (end - begin) as u128 {
                self.broken(Reason::SizeMismatch);
            }
        }
        self.coverage(tensors, data_len);
    }

    /// No byte twice, none without an owner, empty tensors only where two owners meet.
    fn coverage(&mut self, tensors: &[(String, Tensor)], data_len: u64) {
        let ranges = || tensors.iter().map(|(_, (_, _, begin, end))| (*begin, *end));
        let full: Vec<(u64, u64)> = ranges().filter(|(begin, end)| begin < end).collect();
        for (i, a) in full.iter().enumerate() {
            if full[..i].iter().any(|b| a.0 < b.1 && b.0 < a.1) {
                self.broken(Reason::Overlap);
            }
        }
        for (at, _) in ranges().filter(|(begin, end)| begin == end) {
            if full.iter().any(|&(begin, end)| begin < at && at < end) {
                self.broken(Reason::EmptyInside);
            }
        }
        // Every tensor begins at 0 or where another one with bytes ends.
        for (begin, _) in ranges() {
            if begin != 0 && !full.iter().any(|&(_, end)| end == begin) {
                let below = full.iter().any(|&(b, e)| b < begin && begin < e);
                if !below {
                    self.broken(Reason::Hole);
                }
            }
        }
        let end = ranges().map(|(_, end)| end).max().unwrap_or(0);
        if self.out.broken.is_empty() && end > data_len {
            self.broken(Reason::DataTruncated);
        }
        if self.out.broken.is_empty() && end < data_len {
            self.broken(Reason::TrailingData);
        }
    }
}
