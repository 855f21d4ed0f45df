//! The metadata value that holds a file's checksums (spec chapter 13): its text, not the sums themselves.
//!
//! ```text
//! crc64-nvme;8388608;16777220;AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
//! ─algorithm ─chunk── ─data── ─one u64 a chunk, little-endian, base64
//! ```
//!
//! Its length follows from the length of the data, so a writer can leave room for it before it knows a sum.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use crate::error::{Error, Reason};
use crate::forever::{CHECKSUM_ALGORITHM, CHECKSUM_CHUNK, MAX_INTEGER};

/// A file's checksums, as its metadata has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksums {
    /// Bytes of the data section that they are of.
    pub data_len: u64,
    /// The sum of each chunk of [`CHECKSUM_CHUNK`] bytes.
    pub sums: Vec<u64>,
}

impl Checksums {
    /// As many zeros as data of this length has chunks: a value of the right length to leave room by.
    ///
    /// # Errors
    /// `WRITE_TOO_LARGE` where the value would be longer than a header may be.
    pub fn zeros(data_len: u64) -> Result<Self, Error> {
        // Eight bytes a chunk become more than ten characters.
        const MOST: u64 = crate::forever::MAX_HEADER_LEN / 10;
        let chunks = data_len.div_ceil(CHECKSUM_CHUNK);
        if chunks > MOST {
            return Err(Error::over(Reason::WriteTooLarge, chunks, MOST));
        }
        Ok(Checksums {
            data_len,
            sums: alloc::vec![0; chunks as usize],
        })
    }

    /// The value.
    pub fn to_text(&self) -> String {
        let mut text = String::with_capacity(self.sums.len() * 11 + 48);
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{CHECKSUM_ALGORITHM};{CHECKSUM_CHUNK};{};",
            self.data_len
        );
        encode(&self.sums, &mut text);
        text
    }

    /// Reads a value. `None` for another algorithm or size of chunks, which this version does not know
    /// (spec 13.4).
    ///
    /// # Errors
    /// `CHECKSUM_FORM`.
    pub fn parse(text: &str) -> Result<Option<Self>, Error> {
        let mut fields = text.splitn(4, ';');
        let known = fields.next() == Some(CHECKSUM_ALGORITHM)
            && fields.next().and_then(number) == Some(CHECKSUM_CHUNK);
        if !known {
            return Ok(None);
        }
        let wrong = |needed: &str| Error::new(Reason::ChecksumForm).needed(needed);
        let data_len = fields.next().and_then(number);
        let data_len = data_len.ok_or_else(|| wrong("the length of the data in decimal"))?;
        let sums = fields.next().and_then(decode);
        let sums = sums.ok_or_else(|| wrong("base64 of eight bytes a sum"))?;
        let chunks = data_len.div_ceil(CHECKSUM_CHUNK);
        if sums.len() as u64 != chunks {
            let found = sums.len();
            return Err(Error::new(Reason::ChecksumForm)
                .found(format_args!("{found} sums"))
                .needed(format_args!("{chunks} for {data_len} bytes of data")));
        }
        Ok(Some(Checksums { data_len, sums }))
    }

    /// The sums of a file whose data section has this length.
    ///
    /// # Errors
    /// `CHECKSUM_STALE`, if they are those of other data.
    pub fn of_data(self, data_len: u64) -> Result<Vec<u64>, Error> {
        if self.data_len == data_len {
            return Ok(self.sums);
        }
        Err(Error::new(Reason::ChecksumStale)
            .found(format_args!("checksums of {} bytes of data", self.data_len))
            .needed(format_args!("{data_len} bytes")))
    }
}

/// A number in the form of spec 3.9.
fn number(text: &str) -> Option<u64> {
    let plain = text == "0" || text.bytes().next().is_some_and(|first| first != b'0');
    let digits = plain && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|&number| digits && number <= MAX_INTEGER)
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 of RFC 4648, chapter 4, with its padding.
fn encode(sums: &[u64], out: &mut String) {
    let bytes: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
    for three in bytes.chunks(3) {
        let byte = |at: usize| three.get(at).copied().unwrap_or(0) as usize;
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let letter = ALPHABET.get(bits >> (18 - 6 * place) & 63);
            let padded = place > three.len();
            out.push(letter.filter(|_| !padded).copied().unwrap_or(b'=') as char);
        }
    }
}

fn decode(text: &str) -> Option<Vec<u64>> {
    let letters = text.trim_end_matches('=');
    let bytes = letters.len() / 4 * 3 + [0, 0, 1, 2].get(letters.len() % 4)?;
    // One way to write each value: whole sums, padding to a multiple of four, unused bits zero.
    if !bytes.is_multiple_of(8) || text.len() != bytes.div_ceil(3) * 4 {
        return None;
    }
    let (mut sums, mut bits, mut held) = (Vec::with_capacity(bytes / 8), 0_u32, 0_u32);
    let (mut sum, mut shift) = (0_u64, 0_u32);
    for letter in letters.bytes() {
        bits = bits << 6 | value(letter)?;
        held += 6;
        if held >= 8 {
            held -= 8;
            sum |= u64::from(bits >> held & 0xFF) << shift;
            bits &= (1 << held) - 1;
            shift += 8;
            if shift == 64 {
                sums.push(sum);
                (sum, shift) = (0, 0);
            }
        }
    }
    (bits == 0).then_some(sums)
}

fn value(letter: u8) -> Option<u32> {
    Some(u32::from(match letter {
        b'A'..=b'Z' => letter - b'A',
        b'a'..=b'z' => letter - b'a' + 26,
        b'0'..=b'9' => letter - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn sums(data_len: u64, sums: &[u64]) -> Checksums {
        Checksums {
            data_len,
            sums: sums.to_vec(),
        }
    }

    #[test]
    fn the_text_is_what_it_will_always_be() {
        for (value, text) in [
            (sums(0, &[]), "crc64-nvme;8388608;0;"),
            (
                sums(4, &[0xAE8B_1486_0A79_9888]),
                "crc64-nvme;8388608;4;iJh5CoYUi64=",
            ),
            (
                sums(8_388_609, &[1, u64::MAX]),
                "crc64-nvme;8388608;8388609;AQAAAAAAAAD//////////w==",
            ),
            (
                sums(3 << 23, &[1, 2, 3]),
                "crc64-nvme;8388608;25165824;AQAAAAAAAAACAAAAAAAAAAMAAAAAAAAA",
            ),
        ] {
            assert_eq!(value.to_text(), text);
            assert_eq!(Checksums::parse(text), Ok(Some(value.clone())));
            let zeros = Checksums::zeros(value.data_len).unwrap();
            assert_eq!(zeros.to_text().len(), text.len());
        }
    }

    #[test]
    fn other_kinds_are_unknown_and_broken_ones_are_refused() {
        for unknown in [
            "",
            "sha256;8388608;4;AAAA",
            "crc64-nvme",
            "crc64-nvme;4096;4;AAAA",
            "crc64-nvme;08388608;4;x",
        ] {
            assert_eq!(Checksums::parse(unknown), Ok(None), "{unknown}");
        }
        for broken in [
            "",
            "4",
            "4;",
            "-4;iJh5CoYUi64=",
            "04;iJh5CoYUi64=",
            "9223372036854775808;iJh5CoYUi64=",
            "4;iJh5CoYUi64",
            "4;iJh5CoYUi64==",
            "4;iJh5CoYUi65=",
            "4;iJh5CoYU i64=",
            "4;iJh5CoYUi64=;",
            "4;iJh5CoYUi6-=",
            "0;iJh5CoYUi64=",
            "8388609;iJh5CoYUi64=",
            "4;AQAAAAAAAAD//////////w==",
        ] {
            let text = std::format!("crc64-nvme;8388608;{broken}");
            let error = Checksums::parse(&text).unwrap_err();
            assert_eq!(error.reason(), Reason::ChecksumForm, "{text}");
        }
    }

    #[test]
    fn sums_of_other_data_are_stale() {
        assert_eq!(sums(4, &[7]).of_data(4), Ok(alloc::vec![7]));
        let error = sums(4, &[7]).of_data(5).unwrap_err();
        assert_eq!(error.code(), "CHECKSUM_STALE");
        assert!(error.to_string().contains("4 bytes"), "{error}");
        let error = Checksums::zeros(u64::MAX).unwrap_err();
        assert_eq!(error.reason(), Reason::WriteTooLarge);
    }
}
