//! Index files and the names of numbered files (spec chapter 8).
//!
//! An index says in which file of a checkpoint each tensor lies. It comes from strangers, so a file
//! name in it is a plain relative path or the index is refused: nothing is decoded, resolved or
//! normalised on the way to the file system.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::error::{Error, Reason};
use crate::forever::EXTENSION;
use crate::json::{Cursor, SkipRules, Str, skip_value};
use crate::keys::KeyStack;
use crate::limits::{Limits, ReadOptions};
use crate::names::NameIndex;
use crate::writer::write_string;

/// A parsed index.
#[derive(Clone, Debug, Default)]
pub struct Index {
    /// `metadata.total_size`, where it is a plain integer. Advisory (spec 8.12).
    pub total_size: Option<u64>,
    names: Vec<String>,
    /// For each name, the position of its file.
    places: Vec<u32>,
    files: Vec<String>,
    by_name: NameIndex,
    /// Places of the files while the index is read: a hostile one has as many files as tensors.
    by_file: BTreeMap<String, u32>,
    metadata: Option<String>,
}

impl Index {
    /// Parses an index.
    ///
    /// # Errors
    /// A text that is not JSON (chapter 3), not an index (8.1, 8.2), has a key twice (8.3), or names
    /// a file that is not a plain relative `.safetensors` path (8.4, 8.5); the budgets 10.7, 10.8.
    pub fn parse(text: &[u8], options: &ReadOptions) -> Result<Index, Error> {
        Limits::check(
            text.len() as u64,
            // Places in the text are 32 bits wide.
            options.limits.index_bytes.min(u32::MAX as u64),
            Reason::LimitIndex,
        )?;
        if let Err(error) = core::str::from_utf8(text) {
            let at = error.valid_up_to() as u64;
            return Err(Error::new(Reason::InvalidUtf8).found(error).at(at));
        }
        let mut parser = Parser {
            cursor: Cursor::of_file(text),
            options,
            keys: KeyStack::default(),
        };
        parser.document()
    }

    /// How many tensors the index places.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether the index places no tensor.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The files, each once, in the order in which the index first names them.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// The file of a tensor.
    pub fn get(&self, name: &str) -> Option<&str> {
        let name_of = |i: u32| {
            self.names
                .get(i as usize)
                .map_or(&[][..], |name| name.as_bytes())
        };
        let at = self.by_name.find(name.as_bytes(), name_of)?;
        self.file(at as usize)
    }

    fn file(&self, position: usize) -> Option<&str> {
        let &place = self.places.get(position)?;
        self.files.get(place as usize).map(String::as_str)
    }

    /// Tensors and their files in the order of the index.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> + '_ {
        let file = |i: usize| self.file(i).unwrap_or("");
        self.names
            .iter()
            .enumerate()
            .map(move |(i, name)| (name.as_str(), file(i)))
    }

    /// The index's `metadata` as it stands in the text, for a rewrite that keeps it.
    pub fn metadata_json(&self) -> Option<&str> {
        self.metadata.as_deref()
    }

    fn add(&mut self, name: String, file: String, limits: &Limits) -> Result<(), Error> {
        let place = match self.by_file.get(&file) {
            Some(&place) => place,
            None => {
                check_shard_path(&file)?;
                let place = self.files.len() as u32;
                Limits::check(u64::from(place) + 1, limits.shards, Reason::LimitShards)?;
                self.files.push(file.clone());
                self.by_file.insert(file, place);
                place
            }
        };
        self.names.push(name);
        self.places.push(place);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Error> {
        let mut index = NameIndex::default();
        for (i, name) in self.names.iter().enumerate() {
            index.push(name.as_bytes(), i as u32, self.names.len() - i);
        }
        let name_of = |i: u32| {
            self.names
                .get(i as usize)
                .map_or(&[][..], |name| name.as_bytes())
        };
        index.finish(name_of, |earlier, _| {
            let name = self.names.get(earlier as usize).map_or("", String::as_str);
            Err(Error::new(Reason::IndexDuplicate)
                .tensor(name)
                .needed("each tensor once"))
        })?;
        self.by_name = index;
        self.by_file = BTreeMap::new();
        Ok(())
    }
}

/// Checks that a file name of an index is a relative path of plain components with the extension of
/// the format (spec 8.4, 8.5).
///
/// # Errors
/// [`Reason::IndexPath`], [`Reason::IndexExtension`].
pub fn check_shard_path(path: &str) -> Result<(), Error> {
    let wrong = |needed: &str| {
        Error::new(Reason::IndexPath)
            .found(format_args!("{path:?}"))
            .needed(needed)
    };
    if path
        .chars()
        .any(|c| c.is_control() || matches!(c, '\\' | ':' | '?' | '#' | '%'))
    {
        return Err(wrong(
            "a path without control characters and without \\ : ? # %",
        ));
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(wrong(
            "a relative path of plain names, such as \"part/model-00001-of-00002.safetensors\"",
        ));
    }
    match path.rsplit_once('.') {
        Some((stem, EXTENSION)) if !stem.is_empty() && !stem.ends_with('/') => Ok(()),
        _ => Err(Error::new(Reason::IndexExtension)
            .found(format_args!("{path:?}"))
            .needed(format_args!("a name that ends with .{EXTENSION}"))),
    }
}

/// The name of file `i` (from 1) of `n`: `model-00001-of-00003.safetensors`, or `model.safetensors`
/// where one file holds everything (spec 8.13).
pub fn shard_file_name(stem: &str, i: usize, n: usize) -> String {
    match n {
        0 | 1 => format!("{stem}.{EXTENSION}"),
        _ => format!("{stem}-{i:05}-of-{n:05}.{EXTENSION}"),
    }
}

/// The stem, number and count that a numbered file's name carries, if it does.
pub fn shard_number(file: &str) -> Option<(&str, usize, usize)> {
    let stem = file.strip_suffix(EXTENSION)?.strip_suffix('.')?;
    let (rest, n) = stem.rsplit_once("-of-")?;
    let (stem, i) = rest.rsplit_once('-')?;
    let number = |digits: &str| match digits.len() {
        5.. if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    };
    Some((stem, number(i)?, number(n)?))
}

struct Parser<'a> {
    cursor: Cursor<'a>,
    options: &'a ReadOptions,
    keys: KeyStack,
}

impl Parser<'_> {
    fn document(&mut self) -> Result<Index, Error> {
        let mut index = Index::default();
        let mut found = false;
        if self.cursor.text.starts_with(b"\xEF\xBB\xBF") {
            return Err(self
                .cursor
                .error(Reason::ByteOrderMark)
                .needed("`{` as the first character"));
        }
        if !self.cursor.take(b'{') {
            return Err(self.cursor.misplaced(Reason::IndexForm, "an object"));
        }
        let mark = self.keys.mark();
        if !self.cursor.take(b'}') {
            loop {
                let key = self.key()?;
                let name = self.text(key)?;
                match name.as_str() {
                    "weight_map" => {
                        self.weight_map(&mut index)?;
                        found = true;
                    }
                    "metadata" => self.metadata(&mut index)?,
                    _ => self.skip()?,
                }
                if !self.cursor.take(b',') {
                    break;
                }
            }
            self.cursor.expect(b'}')?;
        }
        self.no_repeat(mark)?;
        self.cursor.whitespace();
        if self.cursor.peek().is_some() {
            return Err(self
                .cursor
                .misplaced(Reason::Framing, "the end of the index"));
        }
        if !found {
            return Err(Error::new(Reason::IndexForm).needed("a `weight_map` object"));
        }
        index.finish()?;
        Ok(index)
    }

    fn key(&mut self) -> Result<Str, Error> {
        let key = self.cursor.string()?;
        self.keys.push(key, &self.cursor)?;
        self.cursor.expect(b':')?;
        Ok(key)
    }

    fn no_repeat(&mut self, mark: usize) -> Result<(), Error> {
        match self.keys.close(mark, &self.cursor) {
            None => Ok(()),
            Some(start) => {
                self.cursor.pos = start;
                Err(self
                    .cursor
                    .misplaced(Reason::IndexDuplicate, "each key once"))
            }
        }
    }

    fn text(&self, string: Str) -> Result<String, Error> {
        let mut out = String::with_capacity(string.end - string.start);
        self.cursor.decode(string, &mut out)?;
        Ok(out)
    }

    fn weight_map(&mut self, index: &mut Index) -> Result<(), Error> {
        if !self.cursor.take(b'{') {
            return Err(self
                .cursor
                .misplaced(Reason::IndexForm, "an object of file names"));
        }
        if self.cursor.take(b'}') {
            return Ok(());
        }
        loop {
            let name = self.cursor.string()?;
            let name = self.text(name)?;
            self.cursor.expect(b':')?;
            self.cursor.whitespace();
            if self.cursor.peek() != Some(b'"') {
                return Err(self
                    .cursor
                    .misplaced(Reason::IndexValue, "a file name")
                    .tensor(&name));
            }
            let file = self.cursor.string()?;
            let file = self.text(file)?;
            let limits = self.options.limits;
            index
                .add(name.clone(), file, &limits)
                .map_err(|error| error.tensor(&name))?;
            Limits::check(
                index.names.len() as u64,
                limits.tensors,
                Reason::LimitTensors,
            )?;
            if !self.cursor.take(b',') {
                break;
            }
        }
        self.cursor.expect(b'}')
    }

    /// Keeps the metadata's text, and looks in it for a total size.
    fn metadata(&mut self, index: &mut Index) -> Result<(), Error> {
        self.cursor.whitespace();
        let start = self.cursor.pos;
        self.skip()?;
        let text = self.cursor.text.get(start..self.cursor.pos).unwrap_or(&[]);
        index.metadata = core::str::from_utf8(text).ok().map(ToString::to_string);
        index.total_size = self.total_size(text)?;
        Ok(())
    }

    /// The total size, from metadata whose grammar is known to hold.
    fn total_size(&mut self, metadata: &[u8]) -> Result<Option<u64>, Error> {
        let mut inner = Parser {
            cursor: Cursor::of_file(metadata),
            options: self.options,
            keys: KeyStack::default(),
        };
        if !inner.cursor.take(b'{') || inner.cursor.take(b'}') {
            return Ok(None);
        }
        loop {
            let key = inner.key()?;
            if inner.text(key)? == "total_size" {
                // Some writers put a float here; then there is no exact size to compare with.
                return Ok(inner.cursor.integer(u64::MAX).ok());
            }
            inner.skip()?;
            if !inner.cursor.take(b',') {
                return Ok(None);
            }
        }
    }

    fn skip(&mut self) -> Result<(), Error> {
        let rules = SkipRules {
            depth: self.options.depth(),
            repeats: false,
            finite: false,
        };
        skip_value(&mut self.cursor, 1, &rules, &mut self.keys).map_err(|error| {
            match error.reason() {
                Reason::DuplicateField => Error::new(Reason::IndexDuplicate)
                    .found(error.found_text())
                    .needed("each key once"),
                _ => error,
            }
        })
    }
}

/// Collects an index and writes it as the Hub's own tools do: two spaces of indent, keys sorted, a
/// newline at the end (spec 8.14).
#[derive(Clone, Debug, Default)]
pub struct IndexBuilder {
    places: Vec<(String, String)>,
    metadata: Vec<(String, String)>,
    total_size: u64,
}

impl IndexBuilder {
    /// An index without tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Places a tensor of `bytes` bytes in a file.
    pub fn add(&mut self, name: &str, file: &str, bytes: u64) {
        self.places.push((name.to_string(), file.to_string()));
        self.total_size = self.total_size.saturating_add(bytes);
    }

    /// Adds a string to the index's `metadata`, beside `total_size`.
    pub fn metadata(&mut self, key: &str, value: &str) {
        self.metadata.push((key.to_string(), value.to_string()));
    }

    /// The text of the index.
    ///
    /// # Errors
    /// A tensor or a metadata key that was added twice, or a file name that no reader would accept.
    pub fn finish(mut self) -> Result<String, Error> {
        if self.metadata.iter().any(|(key, _)| key == "total_size") {
            // The size is counted here; a second one would make an index that no reader takes.
            return Err(Error::new(Reason::WriteDuplicate)
                .found("metadata key \"total_size\" twice")
                .needed("each key once"));
        }
        self.places.sort();
        self.metadata.sort();
        for pairs in [&self.places, &self.metadata] {
            if let Some([a, _]) = pairs
                .windows(2)
                .find(|pair| matches!(pair, [a, b] if a.0 == b.0))
            {
                return Err(Error::new(Reason::WriteDuplicate)
                    .tensor(&a.0)
                    .needed("each name once"));
            }
        }
        let mut out = Vec::from(&b"{\n  \"metadata\": {"[..]);
        let size = self.total_size.to_string();
        let before = self
            .metadata
            .partition_point(|(key, _)| key.as_str() < "total_size");
        for (i, (key, value)) in self.metadata.iter().enumerate() {
            if i == before {
                push_raw(&mut out, "total_size", &size);
            }
            push_member(&mut out, key, value);
        }
        if before == self.metadata.len() {
            push_raw(&mut out, "total_size", &size);
        }
        out.extend_from_slice(b"\n  },\n  \"weight_map\": {");
        for (name, file) in &self.places {
            check_shard_path(file)?;
            push_member(&mut out, name, file);
        }
        out.extend_from_slice(if self.places.is_empty() {
            b"}\n}\n"
        } else {
            b"\n  }\n}\n"
        });
        String::from_utf8(out).map_err(|_| Error::new(Reason::InvalidUtf8))
    }
}

fn push_key(out: &mut Vec<u8>, key: &str) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    out.extend_from_slice(b"\n    ");
    write_string(out, key);
    out.extend_from_slice(b": ");
}

fn push_member(out: &mut Vec<u8>, key: &str, value: &str) {
    push_key(out, key);
    write_string(out, value);
}

fn push_raw(out: &mut Vec<u8>, key: &str, value: &str) {
    push_key(out, key);
    out.extend_from_slice(value.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Index, Error> {
        Index::parse(text.as_bytes(), &ReadOptions::strict())
    }

    /// Quadratic work would take minutes here.
    #[test]
    fn an_index_of_many_files_takes_linear_work() {
        let mut text = String::from("{\"weight_map\":{");
        for i in 0..200_000 {
            let comma = if i > 0 { "," } else { "" };
            text += &format!("{comma}\"t{i}\":\"f{}.safetensors\"", i % 50_000);
        }
        text += "}}";
        let index = Index::parse(text.as_bytes(), &ReadOptions::strict()).unwrap();
        assert_eq!((index.len(), index.files().len()), (200_000, 50_000));
        assert_eq!(index.get("t199999"), Some("f49999.safetensors"));
    }

    #[test]
    fn an_index_says_where_each_tensor_is() {
        let text = r#" {"metadata":{"x":[1,{"y":2}],"total_size":12},"weight_map":
            {"a":"m-1.safetensors","b\u0062":"sub/m-2.safetensors","c":"m-1.safetensors"},"more":null} "#;
        let index = parse(text).unwrap();
        assert_eq!(
            (index.len(), index.is_empty(), index.total_size),
            (3, false, Some(12))
        );
        assert_eq!(index.files(), ["m-1.safetensors", "sub/m-2.safetensors"]);
        assert_eq!(index.get("bb"), Some("sub/m-2.safetensors"));
        assert_eq!(index.get("d"), None);
        assert_eq!(index.iter().last(), Some(("c", "m-1.safetensors")));
        assert_eq!(
            index.metadata_json(),
            Some(r#"{"x":[1,{"y":2}],"total_size":12}"#)
        );
        assert_eq!(
            parse(r#"{"metadata":{"total_size":1.5},"weight_map":{}}"#)
                .unwrap()
                .total_size,
            None
        );
    }

    #[test]
    fn a_bad_index_is_refused_by_name() {
        for (text, reason) in [
            ("[]", Reason::IndexForm),
            ("{}", Reason::IndexForm),
            (r#"{"weight_map":[]}"#, Reason::IndexForm),
            (r#"{"weight_map":{"a":1}}"#, Reason::IndexValue),
            (
                r#"{"weight_map":{"a":"x.safetensors","\u0061":"x.safetensors"}}"#,
                Reason::IndexDuplicate,
            ),
            (
                r#"{"weight_map":{},"weight_map":{}}"#,
                Reason::IndexDuplicate,
            ),
            (
                r#"{"weight_map":{},"m":{"a":1,"a":2}}"#,
                Reason::IndexDuplicate,
            ),
            (r#"{"weight_map":{}} x"#, Reason::Framing),
            (r#"{"weight_map":{"a":"x.bin"}}"#, Reason::IndexExtension),
            (
                r#"{"weight_map":{"a":".safetensors"}}"#,
                Reason::IndexExtension,
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().reason(), reason, "{text}");
        }
        assert_eq!(
            Index::parse(b"{\xff", &ReadOptions::strict())
                .unwrap_err()
                .reason(),
            Reason::InvalidUtf8
        );
        let mut options = ReadOptions::strict();
        options.limits.shards = 1;
        let two = br#"{"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}"#;
        assert_eq!(
            Index::parse(two, &options).unwrap_err().reason(),
            Reason::LimitShards
        );
        options.limits.index_bytes = 10;
        assert_eq!(
            Index::parse(two, &options).unwrap_err().reason(),
            Reason::LimitIndex
        );
    }

    #[test]
    fn paths_that_lead_anywhere_else_are_refused() {
        for path in [
            "../x.safetensors",
            "/x.safetensors",
            "a//x.safetensors",
            "a/../x.safetensors",
            "./x.safetensors",
            "a\\x.safetensors",
            "C:x.safetensors",
            "x.safetensors?",
            "%2e%2e/x.safetensors",
            "x\0.safetensors",
            "",
        ] {
            assert_eq!(
                check_shard_path(path).unwrap_err().reason(),
                Reason::IndexPath,
                "{path:?}"
            );
        }
        check_shard_path("ünïcode/model-00001-of-00002.safetensors").unwrap();
    }

    #[test]
    fn shard_names_go_both_ways() {
        assert_eq!(shard_file_name("model", 1, 1), "model.safetensors");
        let name = shard_file_name("model", 2, 12);
        assert_eq!(name, "model-00002-of-00012.safetensors");
        assert_eq!(shard_number(&name), Some(("model", 2, 12)));
        assert_eq!(shard_number("model.safetensors"), None);
        assert_eq!(shard_number("model-1-of-2.safetensors"), None);
    }

    #[test]
    fn a_built_index_reads_as_pretty_sorted_json() {
        let mut builder = IndexBuilder::new();
        builder.add("b", "m-1.safetensors", 8);
        builder.add("a\n", "m-1.safetensors", 4);
        builder.metadata("format", "pt");
        builder.metadata("z", "1");
        let text = builder.clone().finish().unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(text, serde_json::to_string_pretty(&value).unwrap() + "\n");
        let index = parse(&text).unwrap();
        assert_eq!(
            (index.total_size, index.get("a\n")),
            (Some(12), Some("m-1.safetensors"))
        );
        builder.add("b", "m-2.safetensors", 8);
        assert_eq!(
            builder.finish().unwrap_err().reason(),
            Reason::WriteDuplicate
        );
        let mut outside = IndexBuilder::new();
        outside.add("a", "../m.safetensors", 0);
        assert_eq!(outside.finish().unwrap_err().reason(), Reason::IndexPath);
        let mut sized = IndexBuilder::new();
        sized.metadata("total_size", "7");
        assert_eq!(sized.finish().unwrap_err().reason(), Reason::WriteDuplicate);
        let empty = IndexBuilder::new().finish().unwrap();
        assert!(parse(&empty).unwrap().is_empty());
    }
}
