//! Codes of a layout, a run of columns at a time: the ways that have less to do than a digit by digit address.

use crate::error::Error;
use crate::layout::{Layout, Plane, Stream, along, low, read_bits};

/// Some of a part's bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window<'a> {
    /// The first byte's place in the part.
    pub start: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl Window<'_> {
    /// Up to 32 bits at a bit address of the part; what is not in the window is 0.
    pub(super) fn bits(&self, at: u64, bits: u32) -> u32 {
        match at.checked_sub(self.start.saturating_mul(8)) {
            Some(at) => read_bits(self.bytes, at, bits),
            None => 0,
        }
    }
}

/// How the columns of a plane lie.
#[derive(Debug)]
enum Way {
    /// So many bits from each to the next.
    Step(i64),
    /// Two in a byte, the first in its high half.
    Pairs,
    /// A stream of bits in words of 32.
    Words(Stream),
    /// What each column adds to the address.
    Table(Vec<i64>),
    /// Digit by digit.
    Digits,
}

/// Columns for which a table of addresses is kept.
const TABLE: u64 = 1 << 16;

/// A layout, and how its planes are read.
#[derive(Debug)]
pub(super) struct Codes {
    pub layout: Layout,
    ways: Vec<Way>,
    part: u64,
}

impl Codes {
    /// A layout over a part of so many bytes.
    pub fn new(layout: &Layout, part: u64) -> Result<Self, Error> {
        layout.check(part.saturating_mul(8))?;
        let columns = layout.shape.last().copied().unwrap_or(0);
        Ok(Codes {
            ways: layout.planes.iter().map(|p| way(p, columns)).collect(),
            layout: layout.clone(),
            part,
        })
    }

    /// The codes of columns `first ..` of a row.
    pub fn row(&self, window: Window<'_>, lead: &[u64], first: u64, codes: &mut [u32]) {
        let mut index = [0; crate::layout::MAX_AXES];
        let axes = self.layout.shape.len().min(index.len());
        let index = &mut index[..axes];
        for (at, lead) in index.iter_mut().zip(lead) {
            *at = *lead;
        }
        codes.fill(0);
        for (plane, way) in self.layout.planes.iter().zip(&self.ways) {
            if let Some(last) = index.last_mut() {
                *last = 0;
            }
            let row = plane.at(index);
            match way {
                Way::Step(step) => stepwise(plane, *step, window, row, first, codes),
                Way::Pairs => pairs(plane, window, row, first, codes),
                Way::Words(stream) => words(plane, *stream, window, row, first, codes),
                Way::Table(table) => {
                    let first = usize::try_from(first).unwrap_or(usize::MAX);
                    let offsets = table.get(first..).unwrap_or_default();
                    for (code, offset) in codes.iter_mut().zip(offsets) {
                        let at = (row as i64).wrapping_add(*offset) as u64;
                        *code |= window.bits(at, plane.bits) << plane.shift;
                    }
                }
                Way::Digits => digits(plane, window, index, first, codes),
            }
        }
    }

    /// The bytes of the part that hold these rows, from the least to the greatest; whole words.
    pub fn span<'a>(
        &self,
        rows: impl Iterator<Item = &'a [u64]>,
        columns: std::ops::Range<u64>,
    ) -> std::ops::Range<u64> {
        let reaches: Vec<(i64, i64)> = (self.layout.planes.iter().zip(&self.ways))
            .map(|(plane, way)| reach(plane, way, &self.layout, &columns))
            .collect();
        let (mut least, mut most) = (i64::MAX, 0_i64);
        let mut index = Vec::new();
        for lead in rows {
            index.clear();
            index.extend_from_slice(lead);
            index.push(0);
            for (plane, (low, high)) in self.layout.planes.iter().zip(&reaches) {
                let at = plane.at(&index) as i64;
                least = least.min(at.saturating_add(*low));
                most = most.max(at.saturating_add(*high).saturating_add(32));
            }
        }
        let first = (least.max(0) as u64) / 32 * 4;
        let end = (most.max(0) as u64)
            .div_ceil(32)
            .saturating_mul(4)
            .min(self.part);
        first.min(end)..end
    }
}

/// The least and the greatest of what these columns add to the address of a row.
fn reach(plane: &Plane, way: &Way, layout: &Layout, columns: &std::ops::Range<u64>) -> (i64, i64) {
    let last = columns.end.saturating_sub(1) as i64;
    let both = |a: i64, b: i64| (a.min(b), a.max(b));
    match way {
        Way::Step(step) => both(
            (columns.start as i64).saturating_mul(*step),
            last.saturating_mul(*step),
        ),
        Way::Pairs => (
            (columns.start / 2 * 8) as i64 - 4,
            (last / 2).saturating_mul(8),
        ),
        Way::Words(stream) => {
            let word = |column: i64| column.saturating_mul(stream.step as i64) / 32;
            let (a, b) = both(
                word(columns.start as i64).saturating_mul(stream.stride),
                word(last).saturating_add(1).saturating_mul(stream.stride),
            );
            (a, b.saturating_add(32))
        }
        Way::Table(table) => table.iter().fold((i64::MAX, i64::MIN), |(a, b), offset| {
            (a.min(*offset), b.max(*offset))
        }),
        Way::Digits => {
            let axis = layout.shape.len().saturating_sub(1);
            let digits = plane.axes.get(axis).map_or(&[][..], |digits| &digits[..]);
            let mut ends = digits.iter().fold((0_i64, 0_i64), |(a, b), digit| {
                let end = (digit.extent as i64)
                    .saturating_sub(1)
                    .saturating_mul(digit.stride);
                (a.saturating_add(end.min(0)), b.saturating_add(end.max(0)))
            });
            if let Some(stream) = plane.stream {
                // A code may run over into the next word; along this axis there are many.
                let words = match stream.axis == axis {
                    true => (layout.shape[axis].saturating_mul(stream.step) / stream.word) as i64,
                    false => 0,
                };
                let end = words.saturating_add(1).saturating_mul(stream.stride);
                ends = (ends.0.min(end), ends.1.max(end).saturating_add(64));
            }
            ends
        }
    }
}

fn way(plane: &Plane, columns: u64) -> Way {
    let axis = plane.axes.len().saturating_sub(1);
    if let Some(stream) = plane.stream {
        return match (stream.axis == axis, stream.word) {
            (true, 32) => Way::Words(stream),
            _ => Way::Digits,
        };
    }
    let digits: Vec<_> = plane.axes.get(axis).into_iter().flatten().collect();
    // A digit of one value moves nothing.
    let moving: Vec<_> = digits.iter().filter(|digit| digit.extent > 1).collect();
    let follows = moving
        .windows(2)
        .all(|two| two[0].stride.checked_mul(two[0].extent as i64) == Some(two[1].stride));
    match moving.as_slice() {
        [] => Way::Step(0),
        [first, ..] if follows => Way::Step(first.stride),
        [two, bytes]
            if (plane.bits, two.extent, two.stride, bytes.stride) == (4, 2, -4, 8)
                && plane.base % 8 == 4 =>
        {
            Way::Pairs
        }
        _ if columns <= TABLE => Way::Table(
            (0..columns)
                .map(|at| along(&plane.axes[axis], at))
                .collect(),
        ),
        _ => Way::Digits,
    }
}

fn stepwise(plane: &Plane, step: i64, window: Window<'_>, row: u64, first: u64, codes: &mut [u32]) {
    let start = (row as i64).wrapping_add((first as i64).wrapping_mul(step)) as u64;
    let mask = low(plane.bits);
    let local = start.checked_sub(window.start.saturating_mul(8));
    let bytes = local.and_then(|at| window.bytes.get(usize::try_from(at / 8).ok()?..));
    let shift = (start % 8) as u32;
    match (plane.bits, step, bytes) {
        // Within a byte each, as many bytes apart as they are columns.
        (bits, 8, Some(bytes)) if bits + shift <= 8 => {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code |= ((u32::from(*byte) >> shift) & mask) << plane.shift;
            }
        }
        (4, 4, Some(bytes)) if shift.is_multiple_of(4) => nibbles(plane, shift, bytes, codes),
        (16, 16, Some(bytes)) if shift == 0 => {
            for (code, two) in codes.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *code |= u32::from(u16::from_le_bytes(*two)) << plane.shift;
            }
        }
        (32, 32, Some(bytes)) if shift == 0 => {
            for (code, four) in codes.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *code |= u32::from_le_bytes(*four);
            }
        }
        (bits, _, _) => {
            let mut at = start;
            for code in codes {
                *code |= window.bits(at, bits) << plane.shift;
                at = at.wrapping_add_signed(step);
            }
        }
    }
}

/// Two to a byte, the low half first.
fn nibbles(plane: &Plane, shift: u32, mut bytes: &[u8], mut codes: &mut [u32]) {
    if shift == 4 {
        let (Some((byte, rest)), Some((code, after))) =
            (bytes.split_first(), codes.split_first_mut())
        else {
            return;
        };
        *code |= u32::from(byte >> 4) << plane.shift;
        (bytes, codes) = (rest, after);
    }
    let (two, one) = codes.as_chunks_mut::<2>();
    for ([even, odd], byte) in two.iter_mut().zip(bytes) {
        *even |= u32::from(byte & 15) << plane.shift;
        *odd |= u32::from(byte >> 4) << plane.shift;
    }
    if let ([code], Some(byte)) = (one, bytes.get(two.len())) {
        *code |= u32::from(byte & 15) << plane.shift;
    }
}

/// Two to a byte, the high half first.
fn pairs(plane: &Plane, window: Window<'_>, row: u64, first: u64, codes: &mut [u32]) {
    for (code, column) in codes.iter_mut().zip(first..) {
        let high = row.wrapping_add(column / 2 * 8);
        let at = high.wrapping_sub(column % 2 * 4);
        *code |= window.bits(at, 4) << plane.shift;
    }
}

/// A stream that runs over words which may lie anywhere: two of them hold a code.
fn words(
    plane: &Plane,
    stream: Stream,
    window: Window<'_>,
    row: u64,
    first: u64,
    codes: &mut [u32],
) {
    let word = |no: u64| {
        let at = (row as i64).wrapping_add((no as i64).wrapping_mul(stream.stride));
        u64::from(window.bits(at as u64, 32))
    };
    let (mut no, mut two) = (u64::MAX, 0);
    for (code, column) in codes.iter_mut().zip(first..) {
        let place = column.wrapping_mul(stream.step);
        if place / 32 != no {
            no = place / 32;
            two = word(no) | word(no + 1) << 32;
        }
        *code |= ((two >> (place % 32)) as u32 & low(plane.bits)) << plane.shift;
    }
}

fn digits(plane: &Plane, window: Window<'_>, index: &mut [u64], first: u64, codes: &mut [u32]) {
    for (code, column) in codes.iter_mut().zip(first..) {
        if let Some(last) = index.last_mut() {
            *last = column;
        }
        let mut bit = 0;
        while bit < plane.bits {
            let take = plane.run(index, bit);
            let at = plane.address(index, bit);
            *code |= window.bits(at, take) << (bit + plane.shift);
            bit += take;
        }
    }
}
