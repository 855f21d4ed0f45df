//! The JSON that a header is made of (spec chapter 3): a cursor over bytes, with no allocation.
//!
//! Strings come back as spans of the text, integers as `u64`, and everything else is skipped. The
//! cursor works on text that was checked to be UTF-8 before; it is iterative where the input can
//! nest, so depth costs no stack.

use alloc::string::String;
use alloc::vec::Vec;

use crate::error::{Error, Reason, excerpt};
use crate::forever::PREFIX_LEN;
use crate::keys::KeyStack;

/// A string of the text: where it lies between its quotes, and whether it holds escapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Str {
    pub start: usize,
    pub end: usize,
    pub escaped: bool,
}

/// A position in the text, and what is read from there.
pub(crate) struct Cursor<'a> {
    pub text: &'a [u8],
    pub pos: usize,
    /// Byte of the file at which the text begins, for messages.
    base: u64,
}

const ONES: u64 = u64::MAX / 255;
const HIGHS: u64 = ONES << 7;

/// Marks (in the high bit of each byte) bytes of `word` that end a run of plain string bytes: a
/// quote, a backslash or a control character. Marks above the lowest one may be false, since the
/// subtractions borrow upwards, so only the lowest counts.
fn string_stops(word: u64) -> u64 {
    let zero = |x: u64| x.wrapping_sub(ONES) & !x;
    let quote = zero(word ^ (ONES.wrapping_mul(b'"' as u64)));
    let escape = zero(word ^ (ONES.wrapping_mul(b'\\' as u64)));
    let control = word.wrapping_sub(ONES.wrapping_mul(0x20)) & !word;
    (quote | escape | control) & HIGHS
}

/// How many bytes at the start of `text` stand for themselves in a JSON string: up to a quote, a
/// backslash or a control character.
#[inline]
pub(crate) fn plain_prefix(text: &[u8]) -> usize {
    let mut rest = text;
    while let Some((word, after)) = rest.split_first_chunk() {
        let stops = string_stops(u64::from_le_bytes(*word));
        if stops != 0 {
            return text.len() - rest.len() + (stops.trailing_zeros() / 8) as usize;
        }
        rest = after;
    }
    let stop = rest
        .iter()
        .position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\');
    text.len() - rest.len() + stop.unwrap_or(rest.len())
}

/// Whether every byte of `text` stands for itself in a JSON string. Looks at all of them without a branch.
#[inline]
pub(crate) fn is_plain(text: &[u8]) -> bool {
    let Some(last) = text.last_chunk() else {
        return plain_prefix(text) == text.len();
    };
    let (words, _) = text.as_chunks();
    // The last word may overlap the one before it.
    let stops = |word: &[u8; 8]| string_stops(u64::from_le_bytes(*word));
    words
        .iter()
        .fold(stops(last), |all, word| all | stops(word))
        == 0
}

impl<'a> Cursor<'a> {
    pub fn new(text: &'a [u8]) -> Self {
        Cursor {
            text,
            pos: 0,
            base: PREFIX_LEN,
        }
    }

    /// A cursor over a text that is a whole file of its own.
    pub fn of_file(text: &'a [u8]) -> Self {
        Cursor {
            text,
            pos: 0,
            base: 0,
        }
    }

    /// The next byte, not consumed.
    #[inline]
    pub fn peek(&self) -> Option<u8> {
        self.text.get(self.pos).copied()
    }

    /// Skips JSON whitespace.
    #[inline]
    pub fn whitespace(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.pos += 1;
        }
    }

    /// Consumes `byte` if it comes next after whitespace.
    #[inline]
    pub fn take(&mut self, byte: u8) -> bool {
        if self.peek() == Some(byte) {
            self.pos += 1;
            return true;
        }
        self.whitespace();
        let found = self.peek() == Some(byte);
        self.pos += found as usize;
        found
    }

    /// Consumes `text` if it comes next exactly, with no whitespace before it.
    #[inline]
    pub fn take_exact(&mut self, text: &[u8]) -> bool {
        let found = self
            .text
            .get(self.pos..)
            .is_some_and(|rest| rest.starts_with(text));
        self.pos += if found { text.len() } else { 0 };
        found
    }

    /// Consumes `byte` or says what stands in its place.
    #[inline]
    pub fn expect(&mut self, byte: u8) -> Result<(), Error> {
        if self.take(byte) {
            Ok(())
        } else {
            Err(self.syntax(format_args!("`{}`", byte as char)))
        }
    }

    #[cold]
    pub fn error(&self, reason: Reason) -> Error {
        Error::new(reason).at(self.base.saturating_add(self.pos as u64))
    }

    /// A syntax error here: names what stands there.
    #[cold]
    pub fn syntax(&self, needed: impl core::fmt::Display) -> Error {
        self.misplaced(Reason::JsonSyntax, needed)
    }

    /// An error of `reason` here that shows the text that stands there.
    #[cold]
    pub fn misplaced(&self, reason: Reason, needed: impl core::fmt::Display) -> Error {
        let error = self.error(reason).needed(needed);
        let rest = self.text.get(self.pos..).unwrap_or(&[]);
        if rest.is_empty() {
            return error.found("the end of the header");
        }
        let shown = String::from_utf8_lossy(rest.get(..40.min(rest.len())).unwrap_or(rest));
        let shown: String = excerpt(&shown).chars().take(24).collect();
        error.found(format_args!("{shown:?}"))
    }

    /// Reads a string, its opening quote included.
    #[inline]
    pub fn string(&mut self) -> Result<Str, Error> {
        self.expect(b'"')?;
        self.string_body()
    }

    /// Reads a string whose opening quote is consumed.
    #[inline]
    pub fn string_body(&mut self) -> Result<Str, Error> {
        let start = self.pos;
        let mut escaped = false;
        loop {
            self.skip_plain();
            match self.peek() {
                Some(b'"') => {
                    let end = self.pos;
                    self.pos += 1;
                    return Ok(Str {
                        start,
                        end,
                        escaped,
                    });
                }
                Some(b'\\') => {
                    escaped = true;
                    self.escape()?;
                }
                Some(_) => {
                    return Err(
                        self.misplaced(Reason::ControlCharacter, "an escape such as \\u0000")
                    );
                }
                None => return Err(self.syntax("the closing quote of a string")),
            }
        }
    }

    /// Moves to the next byte that is not a plain part of a string.
    #[inline]
    fn skip_plain(&mut self) {
        self.pos += plain_prefix(self.text.get(self.pos..).unwrap_or(&[]));
    }

    /// Reads one escape, and for a surrogate both halves; gives the character.
    fn escape(&mut self) -> Result<char, Error> {
        let start = self.pos;
        self.pos += 1;
        let plain = match self.peek() {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                self.pos += 1;
                return self.unicode_escape(start);
            }
            _ => return Err(self.bad_escape(start)),
        };
        self.pos += 1;
        Ok(plain)
    }

    fn unicode_escape(&mut self, start: usize) -> Result<char, Error> {
        let lone = |cursor: &mut Self| {
            cursor.pos = start;
            cursor.misplaced(Reason::LoneSurrogate, "both halves of a surrogate pair")
        };
        let high = self.hex4(start)?;
        if !(0xD800..0xE000).contains(&high) {
            return char::from_u32(high).ok_or_else(|| lone(self));
        }
        if high >= 0xDC00 || !self.take_exact(b"\\u") {
            return Err(lone(self));
        }
        let low = self.hex4(start)?;
        if !(0xDC00..0xE000).contains(&low) {
            return Err(lone(self));
        }
        let code = 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
        char::from_u32(code).ok_or_else(|| lone(self))
    }

    fn hex4(&mut self, start: usize) -> Result<u32, Error> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|byte| (byte as char).to_digit(16));
            code = code << 4 | digit.ok_or_else(|| self.bad_escape(start))?;
            self.pos += 1;
        }
        Ok(code)
    }

    #[cold]
    fn bad_escape(&mut self, start: usize) -> Error {
        self.pos = start;
        self.misplaced(
            Reason::InvalidEscape,
            "one of \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX",
        )
    }

    /// The bytes of a string between its quotes, escapes as written.
    #[inline]
    pub fn raw(&self, string: Str) -> &'a [u8] {
        self.text.get(string.start..string.end).unwrap_or(&[])
    }

    /// Appends a string to `out` with its escapes resolved.
    pub fn decode(&self, string: Str, out: &mut String) -> Result<(), Error> {
        let text = self.text.get(..string.end).unwrap_or(&[]);
        let mut inner = Cursor {
            text,
            pos: string.start,
            base: self.base,
        };
        while inner.pos < string.end {
            let from = inner.pos;
            inner.skip_plain();
            let plain = text.get(from..inner.pos).unwrap_or(&[]);
            out.push_str(
                core::str::from_utf8(plain).map_err(|_| inner.error(Reason::InvalidUtf8))?,
            );
            if inner.pos < string.end {
                out.push(inner.escape()?);
            }
        }
        Ok(())
    }

    /// The characters of a string that starts at `start` and was read before, escapes resolved.
    pub fn characters(&self, start: usize) -> impl Iterator<Item = char> {
        let mut inner = Cursor {
            text: self.text,
            pos: start,
            base: self.base,
        };
        core::iter::from_fn(move || match inner.peek()? {
            b'"' => None,
            b'\\' => inner.escape().ok(),
            lead => {
                let width = match lead {
                    0..0x80 => 1,
                    0x80..0xE0 => 2,
                    0xE0..0xF0 => 3,
                    _ => 4,
                };
                let bytes = inner.text.get(inner.pos..inner.pos + width)?;
                inner.pos += width;
                core::str::from_utf8(bytes).ok()?.chars().next()
            }
        })
    }

    /// Reads an integer: `0` or digits without a leading zero, at most `max` (spec 3.9, 3.10).
    #[inline]
    pub fn integer(&mut self, max: u64) -> Result<u64, Error> {
        self.whitespace();
        let start = self.pos;
        let mut value: u64 = 0;
        let mut overflow = false;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            let next = value
                .checked_mul(10)
                .and_then(|v| v.checked_add((digit - b'0') as u64));
            overflow |= next.is_none();
            value = next.unwrap_or(value);
            self.pos += 1;
        }
        let digits = self.pos - start;
        let follows = matches!(self.peek(), Some(b'.' | b'e' | b'E' | b'-' | b'+'));
        let leading_zero = digits > 1 && self.text.get(start) == Some(&b'0');
        if digits == 0 || follows || leading_zero {
            self.pos = start;
            return Err(self.misplaced(Reason::NumberForm, "a plain decimal integer"));
        }
        if overflow || value > max {
            self.pos = start;
            return Err(self.misplaced(Reason::IntegerRange, format_args!("at most {max}")));
        }
        Ok(value)
    }

    /// Skips a number of any form, and says whether its magnitude stays within a finite double.
    fn skip_number(&mut self) -> Result<bool, Error> {
        let start = self.pos;
        self.pos += (self.peek() == Some(b'-')) as usize;
        let whole = self.digits();
        let leading_zero = whole > 1 && self.text.get(self.pos - whole) == Some(&b'0');
        if whole == 0 || leading_zero {
            self.pos = start;
            return Err(self.syntax("a JSON value"));
        }
        if self.take_exact(b".") && self.digits() == 0 {
            return Err(self.syntax("a digit after the point"));
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.pos += 1;
            self.pos += matches!(self.peek(), Some(b'+' | b'-')) as usize;
            if self.digits() == 0 {
                return Err(self.syntax("a digit in the exponent"));
            }
        }
        let text = self.text.get(start..self.pos).unwrap_or(&[]);
        let value = core::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse::<f64>().ok());
        Ok(value.is_some_and(f64::is_finite))
    }

    fn digits(&mut self) -> usize {
        let start = self.pos;
        while let Some(b'0'..=b'9') = self.peek() {
            self.pos += 1;
        }
        self.pos - start
    }
}

/// What a skipped value has to keep to.
pub(crate) struct SkipRules {
    /// Deepest nesting, containers around the value counted.
    pub depth: u32,
    /// Whether a key may stand twice in one object.
    pub repeats: bool,
    /// Whether numbers must fit a finite double.
    pub finite: bool,
}

/// Skips one value of any kind (spec 4.6), `depth` containers deep already.
pub(crate) fn skip_value(
    cursor: &mut Cursor<'_>,
    depth: u32,
    rules: &SkipRules,
    keys: &mut KeyStack,
) -> Result<(), Error> {
    // One element a container that is open: where its keys begin, or None for an array.
    let mut open: Vec<Option<usize>> = Vec::new();
    loop {
        cursor.whitespace();
        match cursor.peek() {
            Some(bracket @ (b'{' | b'[')) => {
                if depth as usize + open.len() >= rules.depth as usize {
                    let needed = format_args!("at most {} levels", rules.depth);
                    return Err(cursor.misplaced(Reason::NestingTooDeep, needed));
                }
                cursor.pos += 1;
                let object = bracket == b'{';
                if cursor.take(if object { b'}' } else { b']' }) {
                    // Empty: closed at once.
                } else {
                    open.push(object.then(|| keys.mark()));
                    if object {
                        skip_key(cursor, rules, keys)?;
                    }
                    continue;
                }
            }
            Some(b'"') => {
                cursor.string()?;
            }
            Some(b'-' | b'0'..=b'9') => {
                let start = cursor.pos;
                if !cursor.skip_number()? && rules.finite {
                    cursor.pos = start;
                    return Err(
                        cursor.misplaced(Reason::IntegerRange, "a number that fits a double")
                    );
                }
            }
            _ if cursor.take_exact(b"null") => {}
            _ if cursor.take_exact(b"true") || cursor.take_exact(b"false") => {}
            _ => return Err(cursor.syntax("a JSON value")),
        }
        if !close_containers(cursor, rules, keys, &mut open)? {
            return Ok(());
        }
    }
}

/// After a value: goes on to the next value of the innermost open container, closing those that
/// end here. False when none is left open.
fn close_containers(
    cursor: &mut Cursor<'_>,
    rules: &SkipRules,
    keys: &mut KeyStack,
    open: &mut Vec<Option<usize>>,
) -> Result<bool, Error> {
    while let Some(&innermost) = open.last() {
        if cursor.take(b',') {
            if innermost.is_some() {
                skip_key(cursor, rules, keys)?;
            }
            return Ok(true);
        }
        match innermost {
            Some(mark) => {
                cursor.expect(b'}')?;
                if let Some(start) = keys.close(mark, cursor) {
                    cursor.pos = start;
                    return Err(cursor.misplaced(Reason::DuplicateField, "each key once"));
                }
            }
            None => cursor.expect(b']')?,
        }
        open.pop();
    }
    Ok(false)
}

fn skip_key(cursor: &mut Cursor<'_>, rules: &SkipRules, keys: &mut KeyStack) -> Result<(), Error> {
    let key = cursor.string()?;
    if !rules.repeats {
        keys.push(key, cursor)?;
    }
    cursor.expect(b':')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(json: &str) -> Result<String, Error> {
        let mut cursor = Cursor::new(json.as_bytes());
        let string = cursor.string()?;
        let mut out = String::new();
        cursor.decode(string, &mut out)?;
        Ok(out)
    }

    fn skip(json: &str, depth: u32) -> Result<(), Error> {
        let mut cursor = Cursor::new(json.as_bytes());
        let rules = SkipRules {
            depth,
            repeats: false,
            finite: true,
        };
        skip_value(&mut cursor, 0, &rules, &mut KeyStack::default())
    }

    #[test]
    fn strings_decode_as_serde_json_does() {
        for json in [
            r#""""#,
            r#""plain, longer than eight bytes""#,
            r#""\u0041\n\"\\\/\b\f\r\t é \uD83D\uDE00 tail that is long""#,
        ] {
            assert_eq!(
                decoded(json).unwrap(),
                serde_json::from_str::<String>(json).unwrap()
            );
        }
    }

    #[test]
    fn plain_bytes_are_told_from_others_at_every_place() {
        for len in 0..40 {
            let plain = "é😀 plain, longer than a word or four words in all".as_bytes();
            let mut text = plain.get(..len).unwrap().to_vec();
            assert!(is_plain(&text) && plain_prefix(&text) == len);
            for at in 0..len {
                for special in [0, 0x1F, b'"', b'\\'] {
                    let kept = core::mem::replace(&mut text[at], special);
                    assert!(!is_plain(&text) && plain_prefix(&text) == at);
                    text[at] = kept;
                }
            }
        }
    }

    #[test]
    fn bad_strings_are_named() {
        for (json, reason) in [
            ("\"abc", Reason::JsonSyntax),
            ("\"a\u{1}\"", Reason::ControlCharacter),
            (r#""\x""#, Reason::InvalidEscape),
            (r#""\u12g4""#, Reason::InvalidEscape),
            (r#""\uD800""#, Reason::LoneSurrogate),
            (r#""\uDC00""#, Reason::LoneSurrogate),
            (r#""\uD800\u0041""#, Reason::LoneSurrogate),
        ] {
            assert_eq!(decoded(json).unwrap_err().reason(), reason, "{json}");
        }
    }

    #[test]
    fn integers_have_one_form() {
        let read = |json: &str| Cursor::new(json.as_bytes()).integer(u64::MAX);
        assert_eq!(read("0").unwrap(), 0);
        assert_eq!(read("18446744073709551615").unwrap(), u64::MAX);
        for json in ["-1", "+1", "01", "1.0", "1e2", "", "x", "-0"] {
            assert_eq!(
                read(json).unwrap_err().reason(),
                Reason::NumberForm,
                "{json}"
            );
        }
        assert_eq!(
            read("18446744073709551616").unwrap_err().reason(),
            Reason::IntegerRange
        );
        assert_eq!(
            Cursor::new(b"8").integer(7).unwrap_err().reason(),
            Reason::IntegerRange
        );
    }

    #[test]
    fn skipping_keeps_the_grammar_and_the_depth() {
        for json in [
            "{}",
            "[]",
            "[1,2.5e-3,-0,true,null]",
            r#"{"a":[{"b":{}}],"c":"d"}"#,
        ] {
            skip(json, 32).unwrap();
        }
        for json in [
            "",
            "{,}",
            "[1,]",
            "{\"a\" 1}",
            "01",
            "1.",
            "1e",
            "nul",
            "-",
            "[1 2]",
        ] {
            assert_eq!(
                skip(json, 32).unwrap_err().reason(),
                Reason::JsonSyntax,
                "{json}"
            );
        }
        let nested = |levels| "[".repeat(levels) + &"]".repeat(levels);
        skip(&nested(3), 3).unwrap();
        assert_eq!(
            skip(&nested(4), 3).unwrap_err().reason(),
            Reason::NestingTooDeep
        );
        assert_eq!(skip("1e999", 3).unwrap_err().reason(), Reason::IntegerRange);
        let twice = r#"{"a":1,"\u0061":2}"#;
        assert_eq!(skip(twice, 3).unwrap_err().reason(), Reason::DuplicateField);
        assert_eq!(
            skip(r#"{"a":1,"a":2}"#, 3).unwrap_err().reason(),
            Reason::DuplicateField
        );
    }
}
