//! Checksums of a file's data, chunk by chunk (spec chapter 13): computed while bytes are written, and
//! compared while they are read.
//!
//! Bytes come in blocks, from several threads and in any order; a block may begin and end anywhere. The sum
//! of a chunk is put together from those of its pieces, so no byte is looked at twice and none waits for
//! another. Summing happens on the thread that has the block in its cache, while other threads wait for the
//! disk: a core sums 3 to 6 GB/s.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crc_fast::CrcAlgorithm::Crc64Nvme;
use crc_fast::Digest;
use tonnage_storage::Source;

use crate::control::{Error, Options};
use crate::passing::Passing;
use crate::queue;

/// Bytes of a chunk; the last one of a file may have fewer.
pub const CHUNK: u64 = 8 << 20;

/// The CRC-64/NVME of some bytes.
pub fn crc(bytes: &[u8]) -> u64 {
    crc_fast::checksum(Crc64Nvme, bytes)
}

/// How many chunks that many bytes have.
pub fn chunks_of(len: u64) -> u64 {
    len.div_ceil(CHUNK)
}

fn len_of(chunk: u64, len: u64) -> u64 {
    len.saturating_sub(chunk.saturating_mul(CHUNK)).min(CHUNK)
}

/// Sums that grow as bytes come.
#[derive(Debug)]
pub struct Sums {
    start: u64,
    len: u64,
    /// For each chunk that something is known of: its pieces, ascending, no two of them neighbours.
    chunks: Mutex<HashMap<u64, Vec<Piece>>>,
}

/// Bytes of a chunk, from `begin` up to `end`, and their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    begin: u64,
    end: u64,
    crc: u64,
}

impl Piece {
    /// This piece and the one after it, as one.
    fn with(self, next: Piece) -> Piece {
        let crc = crc_fast::checksum_combine(Crc64Nvme, self.crc, next.crc, next.end - next.begin);
        Piece {
            begin: self.begin,
            end: next.end,
            crc,
        }
    }
}

impl Sums {
    /// Of the `len` bytes from `start` on.
    pub fn new(start: u64, len: u64) -> Self {
        Sums {
            start,
            len,
            chunks: Mutex::new(HashMap::new()),
        }
    }

    /// Takes the bytes from `offset` on, which may be in several parts; what lies outside is left out.
    /// Each byte counts once: pieces that overlap earlier ones are ignored.
    pub fn feed<'a>(&self, offset: u64, parts: impl IntoIterator<Item = &'a [u8]>) {
        self.add(offset, parts, |_, _| ());
    }

    /// The sums of all chunks, in their order; `None` while a byte is lacking.
    pub fn finish(&self) -> Option<Vec<u64>> {
        self.finish_at(self.len)
    }

    /// The same where the length was not known beforehand: only now is it said that `len` bytes were all.
    pub fn finish_at(&self, len: u64) -> Option<Vec<u64>> {
        let chunks = self.lock();
        let sum = |chunk| match chunks.get(&chunk).map(Vec::as_slice) {
            Some([piece]) if (piece.begin, piece.end) == (0, len_of(chunk, len)) => Some(piece.crc),
            _ => None,
        };
        (0..chunks_of(len)).map(sum).collect()
    }

    /// Where chunks lie of which something came and something lacks: the ranges that lack.
    pub fn missing(&self) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        for (&chunk, pieces) in &*self.lock() {
            let base = self.start.saturating_add(chunk * CHUNK);
            let mut at = 0;
            let ends = pieces.iter().map(|piece| (piece.begin, piece.end));
            let len = self.len_of(chunk);
            for (begin, end) in ends.chain([(len, len)]) {
                if at < begin {
                    missing.push(base + at..base + begin);
                }
                at = end;
            }
        }
        missing.sort_unstable_by_key(|range| range.start);
        missing
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Vec<Piece>>> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn len_of(&self, chunk: u64) -> u64 {
        len_of(chunk, self.len)
    }

    fn is_whole(&self, chunk: u64, piece: &Piece) -> bool {
        (piece.begin, piece.end) == (0, self.len_of(chunk))
    }

    /// Sums the parts up to the ends of chunks, and tells of each chunk that this makes whole.
    fn add<'a>(
        &self,
        offset: u64,
        parts: impl IntoIterator<Item = &'a [u8]>,
        mut whole: impl FnMut(u64, u64),
    ) {
        let mut at = offset;
        let mut digest = Digest::new(Crc64Nvme);
        // Chunk of the digest, and where in it the digest begins and ends.
        let mut open: Option<(u64, u64, u64)> = None;
        let mut close = |digest: &mut Digest, open: Option<(u64, u64, u64)>| {
            if let Some((chunk, begin, end)) = open {
                let crc = digest.finalize_reset();
                if let Some(crc) = self.insert(chunk, Piece { begin, end, crc }) {
                    whole(chunk, crc);
                }
            }
        };
        for mut part in parts {
            while !part.is_empty() {
                let Some(inside) = at.checked_sub(self.start).filter(|&at| at < self.len) else {
                    // Before the data, or behind it.
                    let skip = self.start.saturating_sub(at).min(part.len() as u64);
                    if skip == 0 {
                        break;
                    }
                    part = part.get(skip as usize..).unwrap_or_default();
                    at = at.saturating_add(skip);
                    continue;
                };
                let (chunk, begin) = (inside / CHUNK, inside % CHUNK);
                let room = self.len_of(chunk) - begin;
                let (now, rest) = part.split_at(part.len().min(room as usize));
                let from = match open {
                    Some((same, from, _)) if same == chunk => from,
                    _ => {
                        close(&mut digest, open);
                        begin
                    }
                };
                digest.update(now);
                open = Some((chunk, from, begin + now.len() as u64));
                at = at.saturating_add(now.len() as u64);
                part = rest;
            }
        }
        close(&mut digest, open);
    }

    /// Puts a piece among those of its chunk; the chunk's sum, if it is whole now.
    fn insert(&self, chunk: u64, piece: Piece) -> Option<u64> {
        let mut chunks = self.lock();
        let pieces = chunks.entry(chunk).or_default();
        let at = pieces.partition_point(|other| other.begin < piece.begin);
        let before = at.checked_sub(1).and_then(|at| pieces.get(at));
        let overlaps = before.is_some_and(|before| before.end > piece.begin)
            || pieces.get(at).is_some_and(|next| next.begin < piece.end);
        if overlaps {
            return None;
        }
        pieces.insert(at, piece);
        for at in [at + 1, at] {
            let pair = at.checked_sub(1).and_then(|left| pieces.get(left..=at));
            if let Some(&[left, right]) = pair
                && left.end == right.begin
            {
                pieces.splice(at - 1..=at, [left.with(right)]);
            }
        }
        match pieces[..] {
            [piece] if self.is_whole(chunk, &piece) => Some(piece.crc),
            _ => None,
        }
    }
}

/// Compares the sums of what is read with those that it should have.
#[derive(Debug)]
pub struct Checker {
    sums: Sums,
    expected: Vec<u64>,
}

/// A chunk whose bytes are not those that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChunk {
    /// Its number, from 0.
    pub chunk: u64,
    /// Its first byte, counted from the start of the file.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
    /// The sum that it has.
    pub found: u64,
    /// The sum that it should have.
    pub needed: u64,
}

impl fmt::Display for BadChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadChunk {
            chunk,
            offset,
            len,
            found,
            needed,
        } = self;
        let end = offset.saturating_add(*len);
        write!(
            f,
            "chunk {chunk} (bytes {offset} to {end}) has the checksum {found:016x} and should have {needed:016x}"
        )
    }
}

impl Checker {
    /// For the `len` bytes of a file from `start` on, whose chunks have these sums. `None` unless there is
    /// one for each chunk.
    pub fn new(start: u64, len: u64, expected: Vec<u64>) -> Option<Self> {
        (expected.len() as u64 == chunks_of(len)).then(|| Checker {
            sums: Sums::new(start, len),
            expected,
        })
    }

    /// Takes the bytes of the file from `offset` on, which may be in several parts, in any order and from
    /// any thread. A chunk is compared when its last byte has come.
    ///
    /// # Errors
    /// The first chunk, of those that this completes, that is wrong.
    pub fn feed<'a>(
        &self,
        offset: u64,
        parts: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(), BadChunk> {
        let mut bad = None;
        self.sums.add(offset, parts, |chunk, found| {
            if let Err(wrong) = self.check(chunk, found) {
                bad.get_or_insert(wrong);
            }
        });
        bad.map_or(Ok(()), Err)
    }

    /// Compares the sum of a whole chunk.
    ///
    /// # Errors
    /// That it is another.
    pub fn check(&self, chunk: u64, found: u64) -> Result<(), BadChunk> {
        let needed = usize::try_from(chunk)
            .ok()
            .and_then(|chunk| self.expected.get(chunk));
        match needed {
            Some(&needed) if needed != found => Err(BadChunk {
                chunk,
                offset: self.sums.start.saturating_add(chunk.saturating_mul(CHUNK)),
                len: self.sums.len_of(chunk),
                found,
                needed,
            }),
            _ => Ok(()),
        }
    }

    /// What is still to be fed, so that every chunk of which something came is compared: ranges of the
    /// file, ascending. Empty once all of them have been.
    pub fn missing(&self) -> Vec<Range<u64>> {
        self.sums.missing()
    }

    /// The chunks: number, first byte in the file, bytes.
    pub fn chunks(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        (0..self.expected.len() as u64).map(|chunk| {
            let offset = self.sums.start.saturating_add(chunk * CHUNK);
            (chunk, offset, self.sums.len_of(chunk))
        })
    }
}

/// Every chunk of a source that is not what its sum says, in their order.
///
/// # Errors
/// The first failure of the source, or that the run was cancelled.
pub fn verify_chunks(
    source: &dyn Source,
    checker: &Checker,
    options: &Options<'_>,
) -> Result<Vec<BadChunk>, Error> {
    let bad = Mutex::new(Vec::new());
    let chunks = checker.chunks().collect();
    each_chunk(source, chunks, options, |chunk, bytes| {
        if let Err(wrong) = checker.check(chunk, crc(bytes)) {
            let mut bad = bad.lock().unwrap_or_else(PoisonError::into_inner);
            bad.push(wrong);
        }
    })?;
    let mut bad = bad.into_inner().unwrap_or_else(PoisonError::into_inner);
    bad.sort_unstable_by_key(|wrong: &BadChunk| wrong.chunk);
    Ok(bad)
}

/// The sums of the `len` bytes of a source from `start` on.
///
/// # Errors
/// The first failure of the source, or that the run was cancelled.
pub fn sum_chunks(
    source: &dyn Source,
    start: u64,
    len: u64,
    options: &Options<'_>,
) -> Result<Vec<u64>, Error> {
    let sums = Mutex::new(Vec::new());
    let chunk = |chunk: u64| {
        (
            chunk,
            start.saturating_add(chunk * CHUNK),
            len_of(chunk, len),
        )
    };
    let chunks = (0..chunks_of(len)).map(chunk).collect();
    each_chunk(source, chunks, options, |chunk, bytes| {
        let sum = crc(bytes);
        let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.push((chunk, sum));
    })?;
    let mut sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
    sums.sort_unstable();
    Ok(sums.into_iter().map(|(_, sum)| sum).collect())
}

/// Reads chunks, given as number, offset and length, and hands out each. Memory: threads × chunk.
fn each_chunk(
    source: &dyn Source,
    chunks: Vec<(u64, u64, u64)>,
    options: &Options<'_>,
    look: impl Fn(u64, &[u8]) + Sync,
) -> Result<(), Error> {
    let passing = Passing::of(source);
    queue::for_each_block(
        chunks,
        options,
        "verify",
        |&(_, _, len)| len,
        Vec::new,
        |buffer: &mut Vec<u8>, (chunk, offset, len)| {
            buffer.resize(len as usize, 0);
            passing.read(offset, buffer)?;
            look(chunk, buffer);
            Ok(())
        },
    )
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[7])
            .collect()
    }

    #[test]
    fn the_sum_is_crc_64_nvme() {
        // The check value of the catalogue of CRCs, and that of nothing.
        assert_eq!((crc(b"123456789"), crc(b"")), (0xAE8B_1486_0A79_9888, 0));
    }

    /// Blocks of any size, in any order, from several threads: the sums are those of the chunks.
    #[test]
    fn pieces_in_any_order_make_the_sums_of_the_chunks() {
        const START: u64 = 1000;
        let data = content(2 * CHUNK as usize + 12_345);
        let expected: Vec<u64> = data.chunks(CHUNK as usize).map(crc).collect();
        let mut state = 1_u64;
        for round in 0..4 {
            let mut cuts = vec![0, data.len()];
            for _ in 0..if round == 0 { 0 } else { 300 } {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                cuts.push((state >> 33) as usize % data.len());
            }
            cuts.sort_unstable();
            let mut blocks: Vec<(usize, usize)> =
                cuts.windows(2).map(|pair| (pair[0], pair[1])).collect();
            // A walk that visits each once, far from in order.
            let order: Vec<usize> = (0..blocks.len()).map(|i| i * 7 % blocks.len()).collect();
            if blocks.len().is_multiple_of(7) {
                blocks.reverse();
            } else {
                blocks = order.iter().map(|&i| blocks[i]).collect();
            }
            let sums = Sums::new(START, data.len() as u64);
            std::thread::scope(|scope| {
                for half in blocks.chunks(blocks.len().div_ceil(2)) {
                    let (sums, data) = (&sums, &data);
                    scope.spawn(move || {
                        for &(begin, end) in half {
                            let (a, b) = data[begin..end].split_at((end - begin) / 3);
                            sums.feed(START + begin as u64, [a, b]);
                        }
                    });
                }
            });
            assert_eq!(sums.finish(), Some(expected.clone()), "round {round}");
            assert!(sums.missing().is_empty());
        }
    }

    #[test]
    fn what_lies_outside_is_left_out_and_what_lacks_is_named() {
        let data = content(100);
        let sums = Sums::new(10, 50);
        sums.feed(0, [&data[..20]]);
        let lacking = |sums: &Sums| -> Vec<(u64, u64)> {
            let ranges = sums.missing().into_iter();
            ranges.map(|range| (range.start, range.end)).collect()
        };
        assert_eq!((sums.finish(), lacking(&sums)), (None, vec![(20, 60)]));
        sums.feed(40, [&data[40..50]]);
        // A second look at the same bytes changes nothing, nor does one at some of them.
        sums.feed(40, [&data[40..50]]);
        sums.feed(15, [&data[15..25]]);
        assert_eq!(lacking(&sums), [(20, 40), (50, 60)]);
        sums.feed(50, [&data[50..]]);
        sums.feed(20, [&data[20..40]]);
        assert_eq!(sums.finish(), Some(vec![crc(&data[10..60])]));
        let growing = Sums::new(0, u64::MAX);
        growing.feed(0, [&data[..]]);
        assert_eq!(
            (growing.finish_at(100), growing.finish_at(99)),
            (Some(vec![crc(&data)]), None)
        );
        assert_eq!(Sums::new(5, 0).finish(), Some(vec![]));
        let beyond = Sums::new(u64::MAX, 0);
        beyond.feed(u64::MAX, [&data[..]]);
        assert_eq!(beyond.finish(), Some(vec![]));
    }

    #[test]
    fn a_wrong_chunk_is_named_when_its_last_byte_comes() {
        let mut data = content(CHUNK as usize + 100);
        let expected: Vec<u64> = data.chunks(CHUNK as usize).map(crc).collect();
        assert!(Checker::new(0, CHUNK, expected.clone()).is_none());
        data[CHUNK as usize + 50] ^= 0x10;
        let checker = Checker::new(8, data.len() as u64, expected.clone()).unwrap();
        checker.feed(8, [&data[..CHUNK as usize + 99]]).unwrap();
        let end = 8 + CHUNK + 99;
        assert_eq!(
            (checker.missing().len(), checker.missing()[0].clone()),
            (1, end..end + 1)
        );
        let bad = checker
            .feed(end, [&data[CHUNK as usize + 99..]])
            .unwrap_err();
        assert_eq!(
            (bad.chunk, bad.offset, bad.len, bad.needed),
            (1, 8 + CHUNK, 100, expected[1])
        );
        assert_eq!(bad.found, crc(&data[CHUNK as usize..]));
        assert!(bad.to_string().contains("chunk 1"), "{bad}");
        assert!(checker.missing().is_empty());
        let chunks: Vec<_> = checker.chunks().collect();
        assert_eq!(chunks, [(0, 8, CHUNK), (1, 8 + CHUNK, 100)]);
    }
}
