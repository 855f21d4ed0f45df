//! Where the bits of a code are: a *bit-strided layout*.
//!
//! A logical coordinate on each axis is split into mixed-radix digits, lowest first; each digit moves the address by its
//! own stride, in bits, so that the address of an element is
//! `base + Σ digit × stride`. A code may be spread over up to four *planes*, each with some of its bits; and where
//! codes are a stream of bits that runs over words which do not lie side by side, the coordinate of one axis is a
//! position in that stream ([`Stream`]). That covers GPTQ, AWQ, Marlin, compressed-tensors, MLX, bitsandbytes, HQQ, quanto, MX and
//! NVFP4 codes, and the swizzled scales of NVFP4.
//!
//! A layout comes from a file, so it is checked before it is used: few digits and planes, products in checked
//! arithmetic, and all addresses proven to lie in the part's bits ([`Layout::check`]).

use crate::error::Error;

/// One digit of a coordinate: how many values it takes, and by how many bits each of them moves the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digit {
    /// Values that the digit takes, at least 1.
    pub extent: u64,
    /// Bits that the address moves by when the digit grows by one.
    pub stride: i64,
}

/// Shorthand for a [`Digit`].
pub const fn digit(extent: u64, stride: i64) -> Digit {
    Digit { extent, stride }
}

/// Codes that follow each other bit by bit in words, where the words are `stride` bits apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The axis along which codes follow each other; it has no digits.
    pub axis: usize,
    /// Bits of the stream from one coordinate to the next.
    pub step: u64,
    /// Bits of a word.
    pub word: u64,
    /// Bits in memory from a word to the next.
    pub stride: i64,
}

/// Some bits of every code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plane {
    /// How many bits, 1 to 32.
    pub bits: u32,
    /// The place of the lowest of them in the code.
    pub shift: u32,
    /// The address of the element at the origin.
    pub base: u64,
    /// For each axis its digits, lowest first.
    pub axes: Vec<Vec<Digit>>,
    /// The axis that is a stream, if there is one.
    pub stream: Option<Stream>,
}

/// The layout of the codes of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The logical shape, slowest axis first.
    pub shape: Vec<u64>,
    /// Where the bits of a code are; their shifts and bits don't overlap.
    pub planes: Vec<Plane>,
}

/// Most axes of a layout.
pub const MAX_AXES: usize = 4;
/// Most digits of an axis. Marlin needs 7.
pub const MAX_DIGITS: usize = 12;
/// Most planes of a code. GPTQ's 7-bit planar packing needs 3.
pub const MAX_PLANES: usize = 4;

impl Plane {
    /// A plane of `bits` bits at `axes`, whole codes from address 0 on.
    pub fn new(bits: u32, axes: Vec<Vec<Digit>>) -> Self {
        Plane {
            bits,
            shift: 0,
            base: 0,
            axes,
            stream: None,
        }
    }
}

impl Layout {
    /// A layout of one plane.
    pub fn of(shape: &[u64], plane: Plane) -> Self {
        Layout {
            shape: shape.to_vec(),
            planes: vec![plane],
        }
    }

    /// Elements of `bits` bits side by side, row-major, each row starting `pad` bits after a multiple of itself.
    ///
    /// # Errors
    /// The shape's product does not fit.
    pub fn dense(shape: &[u64], bits: u32, pad: u64) -> Result<Self, Error> {
        let mut axes = vec![Vec::new(); shape.len()];
        let mut stride = u64::from(bits);
        for (at, (axis, &len)) in axes.iter_mut().zip(shape).rev().enumerate() {
            axis.push(digit(len.max(1), signed(stride)?));
            stride = stride.checked_mul(len.max(1)).ok_or_else(too_large)?;
            if at == 0 && pad > 1 {
                stride = stride.checked_next_multiple_of(pad).ok_or_else(too_large)?;
            }
        }
        Ok(Layout::of(shape, Plane::new(bits, axes)))
    }

    /// Proves that every address lies within `part_bits` bits, and that the layout keeps to the caps.
    ///
    /// # Errors
    /// Says which of it does not hold.
    pub fn check(&self, part_bits: u64) -> Result<(), Error> {
        if self.shape.is_empty() || self.shape.len() > MAX_AXES {
            return Err(Error::layout(format!(
                "{} axes, 1 to {MAX_AXES} are known",
                self.shape.len()
            )));
        }
        if self.planes.is_empty() || self.planes.len() > MAX_PLANES {
            return Err(Error::layout(format!(
                "{} planes, 1 to {MAX_PLANES} are known",
                self.planes.len()
            )));
        }
        let mut used = 0_u32;
        for plane in &self.planes {
            let bits = mask(plane.bits, plane.shift)
                .ok_or_else(|| Error::layout("a code of more than 32 bits".to_owned()))?;
            if used & bits != 0 {
                return Err(Error::layout("two planes with the same bits".to_owned()));
            }
            used |= bits;
            if !self.is_empty() {
                plane.check(&self.shape, part_bits)?;
            }
        }
        Ok(())
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// The widest code, in bits.
    pub fn bits(&self) -> u32 {
        self.planes
            .iter()
            .map(|p| p.bits + p.shift)
            .max()
            .unwrap_or(0)
    }

    /// A reader of codes from bytes.
    ///
    /// # Errors
    /// What [`Layout::check`] finds.
    pub fn reader<'a>(&'a self, bytes: &'a [u8]) -> Result<Reader<'a>, Error> {
        self.check((bytes.len() as u64).saturating_mul(8))?;
        Ok(Reader {
            layout: self,
            bytes,
            last: self
                .planes
                .iter()
                .map(|plane| plane.offsets(self.shape.len() - 1, self.shape[self.shape.len() - 1]))
                .collect(),
        })
    }

    /// A writer of whole rows into a part of so many bytes.
    ///
    /// # Errors
    /// What [`Layout::check`] finds.
    pub fn writer(&self, bytes: usize) -> Result<Writer<'_>, Error> {
        self.check((bytes as u64).saturating_mul(8))?;
        let columns = self.shape.last().copied().unwrap_or(0);
        let last = |plane: &Plane| plane.offsets(self.shape.len() - 1, columns);
        Ok(Writer {
            layout: self,
            last: self.planes.iter().map(last).collect(),
        })
    }

    /// Writes the code at `index`: the inverse of [`Reader::get`]. The bytes must pass [`Layout::check`].
    pub fn put(&self, bytes: &mut [u8], index: &[u64], code: u32) {
        for plane in &self.planes {
            put_plane(plane, bytes, index, code);
        }
    }
}

/// Writes codes row by row; made by [`Layout::writer`], which has proven the addresses.
#[derive(Debug)]
pub struct Writer<'a> {
    layout: &'a Layout,
    last: Vec<Vec<i64>>,
}

impl Writer<'_> {
    /// Writes the codes of the row that `lead` names, from its first column on: the inverse of [`Reader::row`].
    pub fn row(&self, bytes: &mut [u8], lead: &[u64], codes: impl Iterator<Item = u32> + Clone) {
        let mut index = lead.to_vec();
        index.push(0);
        for (plane, last) in self.layout.planes.iter().zip(&self.last) {
            if let Some(coordinate) = index.last_mut() {
                *coordinate = 0;
            }
            if plane.stream.is_some() {
                for (code, column) in codes.clone().zip(0_u64..) {
                    if let Some(coordinate) = index.last_mut() {
                        *coordinate = column;
                    }
                    put_plane(plane, bytes, &index, code);
                }
                continue;
            }
            let row = plane.address(&index, 0) as i64;
            for (code, offset) in codes.clone().zip(last) {
                let value = (code >> plane.shift) & low(plane.bits);
                put_bits(bytes, row.wrapping_add(*offset) as u64, plane.bits, value);
            }
        }
    }
}

/// Reads codes; made by [`Layout::reader`], which has proven the addresses.
#[derive(Debug)]
pub struct Reader<'a> {
    layout: &'a Layout,
    bytes: &'a [u8],
    /// For each plane what each coordinate of the last axis adds to the address; none where that axis is a stream.
    last: Vec<Vec<i64>>,
}

impl Reader<'_> {
    /// The code at an index; 0 where the index lies outside.
    pub fn get(&self, index: &[u64]) -> u32 {
        let planes = &self.layout.planes;
        planes.iter().fold(0, |code, plane| {
            code | (read_plane(plane, self.bytes, index) << plane.shift)
        })
    }

    /// The codes of columns `first ..` of the row that `lead` names, with all coordinates but the last.
    pub fn row(&self, lead: &[u64], first: u64, codes: &mut [u32]) {
        codes.fill(0);
        let mut index = lead.to_vec();
        index.push(0);
        for (plane, last) in self.layout.planes.iter().zip(&self.last) {
            if last.is_empty() || plane.stream.is_some() {
                for (code, column) in codes.iter_mut().zip(first..) {
                    if let Some(coordinate) = index.last_mut() {
                        *coordinate = column;
                    }
                    *code |= read_plane(plane, self.bytes, &index) << plane.shift;
                }
                continue;
            }
            if let Some(coordinate) = index.last_mut() {
                *coordinate = 0;
            }
            let row = plane.address(&index, 0) as i64;
            let start = usize::try_from(first).unwrap_or(usize::MAX);
            let offsets = last.get(start..).unwrap_or(&[]);
            for (code, offset) in codes.iter_mut().zip(offsets) {
                let at = row.wrapping_add(*offset) as u64;
                *code |= read_bits(self.bytes, at, plane.bits) << plane.shift;
            }
        }
    }
}

impl Plane {
    fn check(&self, shape: &[u64], part_bits: u64) -> Result<(), Error> {
        if self.axes.len() != shape.len() {
            return Err(Error::layout("a plane with other axes".to_owned()));
        }
        // No two elements share a bit, so a small part can't claim to hold many.
        let elements = shape
            .iter()
            .try_fold(1_u128, |n, &len| n.checked_mul(u128::from(len)));
        if elements.and_then(|n| n.checked_mul(u128::from(self.bits))) > Some(u128::from(part_bits))
            || elements.is_none()
        {
            return Err(Error::layout(format!(
                "{shape:?} codes of {} bits in a part of {part_bits} bits",
                self.bits
            )));
        }
        let (mut least, mut most) = (i128::from(self.base), i128::from(self.base));
        for (axis, (digits, &len)) in self.axes.iter().zip(shape).enumerate() {
            if digits.len() > MAX_DIGITS {
                return Err(Error::layout(format!("{} digits", digits.len())));
            }
            if let Some(stream) = self.stream.filter(|s| s.axis == axis) {
                if !digits.is_empty() || !(1..=64).contains(&stream.word) || stream.step == 0 {
                    return Err(Error::layout("a stream that is none".to_owned()));
                }
                let end = u128::from(len - 1) * u128::from(stream.step) + u128::from(self.bits);
                let words =
                    i128::try_from((end - 1) / u128::from(stream.word)).map_err(|_| too_large())?;
                let reach = words
                    .checked_mul(i128::from(stream.stride))
                    .ok_or_else(too_large)?;
                least += reach.min(0);
                most += reach.max(0) + i128::from(stream.word) - i128::from(self.bits);
                continue;
            }
            let mut holds = 1_u64;
            for digit in digits {
                if digit.extent == 0 {
                    return Err(Error::layout("a digit with no value".to_owned()));
                }
                holds = holds.checked_mul(digit.extent).ok_or_else(too_large)?;
                let reach = i128::from(digit.extent - 1) * i128::from(digit.stride);
                least += reach.min(0);
                most += reach.max(0);
            }
            if holds < len {
                return Err(Error::layout(format!(
                    "axis {axis} has {len} coordinates, its digits {holds}"
                )));
            }
        }
        if least < 0 || most + i128::from(self.bits) > i128::from(part_bits) {
            return Err(Error::layout(format!(
                "addresses from {least} to {} in a part of {part_bits} bits",
                most + i128::from(self.bits)
            )));
        }
        Ok(())
    }

    /// What each coordinate of an axis adds to the address. Empty for a stream.
    fn offsets(&self, axis: usize, len: u64) -> Vec<i64> {
        if self.stream.is_some_and(|stream| stream.axis == axis) {
            return Vec::new();
        }
        let Some(digits) = self.axes.get(axis) else {
            return Vec::new();
        };
        (0..len).map(|at| along(digits, at)).collect()
    }

    /// The address of bit `bit` of the code at an index that the layout holds.
    pub(crate) fn address(&self, index: &[u64], bit: u32) -> u64 {
        let mut at = self.base as i64;
        for (axis, (digits, &coordinate)) in self.axes.iter().zip(index).enumerate() {
            at = at.wrapping_add(match self.stream.filter(|s| s.axis == axis) {
                Some(stream) => {
                    let place = coordinate
                        .wrapping_mul(stream.step)
                        .wrapping_add(u64::from(bit));
                    let word = (place / stream.word) as i64;
                    word.wrapping_mul(stream.stride)
                        .wrapping_add((place % stream.word) as i64)
                }
                None => along(digits, coordinate),
            });
        }
        match self.stream {
            Some(_) => at as u64,
            None => at.wrapping_add(i64::from(bit)) as u64,
        }
    }

    /// The address of the first bit of the code at an index that the layout holds.
    pub(crate) fn at(&self, index: &[u64]) -> u64 {
        self.address(index, 0)
    }

    /// How many bits from `bit` on lie side by side.
    pub(crate) fn run(&self, index: &[u64], bit: u32) -> u32 {
        match self.stream {
            None => self.bits - bit,
            Some(stream) => {
                let coordinate = index.get(stream.axis).copied().unwrap_or(0);
                let place = coordinate
                    .wrapping_mul(stream.step)
                    .wrapping_add(u64::from(bit));
                ((stream.word - place % stream.word) as u32).min(self.bits - bit)
            }
        }
    }
}

/// What a coordinate adds to the address.
pub(crate) fn along(digits: &[Digit], mut coordinate: u64) -> i64 {
    let mut at = 0_i64;
    for digit in digits {
        let value = coordinate % digit.extent;
        coordinate /= digit.extent;
        at = at.wrapping_add((value as i64).wrapping_mul(digit.stride));
    }
    at
}

fn read_plane(plane: &Plane, bytes: &[u8], index: &[u64]) -> u32 {
    let (mut value, mut bit) = (0, 0);
    while bit < plane.bits {
        let take = plane.run(index, bit);
        value |= read_bits(bytes, plane.address(index, bit), take) << bit;
        bit += take;
    }
    value
}

fn put_plane(plane: &Plane, bytes: &mut [u8], index: &[u64], code: u32) {
    let value = (code >> plane.shift) & low(plane.bits);
    let mut bit = 0;
    while bit < plane.bits {
        // Up to the end of the word, where codes straddle words.
        let take = plane.run(index, bit);
        put_bits(bytes, plane.address(index, bit), take, value >> bit);
        bit += take;
    }
}

/// Writes the lowest bits of a value at any bit address; what would lie behind the end is left out.
fn put_bits(bytes: &mut [u8], at: u64, bits: u32, value: u32) {
    let first = usize::try_from(at / 8).unwrap_or(usize::MAX);
    let (mut shift, mut value) = (at % 8, u64::from(value & low(bits)));
    let mut left = u64::from(bits);
    for byte in bytes.iter_mut().skip(first) {
        if left == 0 {
            return;
        }
        let take = left.min(8 - shift);
        let field = (((1_u16 << take) - 1) << shift) as u8;
        *byte = (*byte & !field) | ((value << shift) as u8 & field);
        (value, left, shift) = (value >> take, left - take, 0);
    }
}

/// Up to 32 bits at any bit address, lowest first; what lies behind the end is 0.
pub(crate) fn read_bits(bytes: &[u8], at: u64, bits: u32) -> u32 {
    let first = usize::try_from(at / 8).unwrap_or(usize::MAX);
    let wide = match bytes.get(first..).and_then(<[u8]>::first_chunk::<8>) {
        Some(eight) => u64::from_le_bytes(*eight),
        None => bytes
            .iter()
            .skip(first)
            .take(8)
            .rev()
            .fold(0, |wide, byte| wide << 8 | u64::from(*byte)),
    };
    (wide >> (at % 8)) as u32 & low(bits)
}

/// The lowest bits set.
pub(crate) fn low(bits: u32) -> u32 {
    if bits >= 32 {
        u32::MAX
    } else {
        (1 << bits) - 1
    }
}

fn mask(bits: u32, shift: u32) -> Option<u32> {
    let top = bits.checked_add(shift)?;
    (bits >= 1 && top <= 32).then(|| low(top) & !low(shift))
}

fn signed(value: u64) -> Result<i64, Error> {
    i64::try_from(value).map_err(|_| too_large())
}

fn too_large() -> Error {
    Error::layout("numbers that don't fit".to_owned())
}

#[cfg(test)]
mod tests;
