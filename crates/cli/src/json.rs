//! JSON on standard output: valid for programs, and safe if it lands on a terminal.
//!
//! `serde_json` leaves everything above U+001F as it is; here the characters that could act on a
//! terminal are written as `\uXXXX`, which says the same to every parser.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Writes a value, indented, with a line feed after it.
///
/// # Errors
/// What writing said.
pub fn write(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    let mut serializer = Serializer::with_formatter(&mut *out, Safe(PrettyFormatter::new()));
    value.serialize(&mut serializer)?;
    out.write_all(b"\n")
}

/// Writes a value on one line, for standard error.
///
/// # Errors
/// What writing said.
pub fn write_line(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    let compact = Safe(serde_json::ser::CompactFormatter);
    let mut serializer = Serializer::with_formatter(&mut *out, compact);
    value.serialize(&mut serializer)?;
    out.write_all(b"\n")
}

struct Safe<F>(F);

macro_rules! forward {
    ($($name:ident($($arg:ident: $ty:ty),*);)*) => {
        $(fn $name<W: ?Sized + Write>(&mut self, out: &mut W $(, $arg: $ty)*) -> io::Result<()> {
            self.0.$name(out $(, $arg)*)
        })*
    };
}

impl<F: Formatter> Formatter for Safe<F> {
    forward! {
        begin_array();
        end_array();
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        end_object_key();
        begin_object_value();
        end_object_value();
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|&(_, c)| acts_on_terminals(c)) {
            let (plain, tail) = rest.split_at(at);
            out.write_all(plain.as_bytes())?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
            rest = tail.get(c.len_utf8()..).unwrap_or("");
        }
        out.write_all(rest.as_bytes())
    }
}

fn acts_on_terminals(c: char) -> bool {
    !c.is_ascii_graphic() && c != ' ' && c.escape_debug().len() > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_escaped_and_parses_back() {
        let hostile = "a\u{1b}[2J\u{7f}\u{9b}31m\u{202e}\u{e0041}\"\\ ü 重み\n";
        let mut out = Vec::new();
        write(&mut out, &vec![hostile]).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains(r"\u009b31m\u202e\udb40\udc41") && text.contains("ü 重み"),
            "{text}"
        );
        assert!(!text.contains('\u{7f}') && !text.contains('\u{1b}'));
        let back: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, [hostile]);
        let mut line = Vec::new();
        write_line(&mut line, &vec![hostile, "b"]).unwrap();
        assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
    }
}
