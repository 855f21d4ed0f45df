//! A quantised tensor taken out of its layout: one byte a code, a scale and a zero point for each block.
//!
//! Between two schemes everything goes through this form. It keeps codes, scales and zero points as they are, so what
//! comes out of it by the other scheme's layout has lost nothing.

pub(crate) mod ggml;

use crate::descriptor::{Descriptor, Element, Field, Float, Number, Op, Rule, Zero};
use crate::error::{Error, Reason};
use crate::interpret::{Bytes, field_codes, number_of, split};
use crate::map::Meaning;
use crate::numbers::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::packed::{Packed, rows_of, too_large};

/// A number for each block of a tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Blocks {
    /// How a code is read.
    pub(crate) number: Number,
    /// Elements of a block on each axis; 0 is the whole axis.
    pub(crate) block: Vec<u64>,
    /// Blocks on each axis.
    pub(crate) shape: Vec<u64>,
    /// Their bits.
    pub(crate) codes: Vec<u32>,
}

/// What is taken off codes, or added to values.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Zeros {
    /// Nothing: codes are floats.
    None,
    /// The same code is zero everywhere.
    Same(i64),
    /// The code that is zero, for each block of the scales.
    Each(Vec<i64>),
    /// A number that is added to the product of code and scale, for each block of the scales.
    Bias(Blocks),
}

/// A tensor out of its layout.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Loose {
    /// The layout's shape.
    pub(crate) shape: Vec<u64>,
    /// How a code is read; for integers as it is, and [`Zeros`] say the rest.
    pub(crate) element: Number,
    /// Bits of a code.
    pub(crate) bits: u32,
    /// The codes, row-major.
    pub(crate) codes: Vec<u8>,
    /// The scales.
    pub(crate) scale: Blocks,
    /// The scale of the scales.
    pub(crate) global: Option<(u32, Op)>,
    /// The zero points.
    pub(crate) zero: Zeros,
    /// The group of each column, where groups don't follow each other.
    pub(crate) group_index: Option<Vec<u32>>,
    /// The dtype of the values.
    pub(crate) dtype: Float,
}

/// A code as it is.
pub(crate) const INTEGER: Number = Number::Unsigned { offset: 0 };

impl Blocks {
    /// Blocks over a shape.
    pub(crate) fn over(shape: &[u64], block: &[u64], number: Number) -> Self {
        Blocks {
            number,
            block: block.to_vec(),
            shape: counts(shape, block),
            codes: Vec::new(),
        }
    }

    /// Bits of a code of this number.
    pub(crate) fn width(&self) -> u32 {
        width(self.number)
    }

    /// The number of a block.
    pub(crate) fn get(&self, at: usize) -> f32 {
        let code = self.codes.get(at).copied().unwrap_or(0);
        number_of(self.number, code, self.width())
    }

    /// The same numbers as another kind, and how many of them are not the same there.
    pub(crate) fn cast(&self, number: Number) -> Option<(Blocks, u64)> {
        if number == self.number {
            return Some((self.clone(), 0));
        }
        let mut lost = 0;
        let mut codes = Vec::with_capacity(self.codes.len());
        for at in 0..self.codes.len() {
            let value = self.get(at);
            let code = match number {
                Number::F32 => value.to_bits(),
                Number::F16 => u32::from(f32_to_f16(value)),
                Number::Bf16 => u32::from(f32_to_bf16(value)),
                Number::E8m0 => u32::from(crate::numbers::f32_to_e8m0(value)),
                _ => return None,
            };
            let back = number_of(number, code, width(number));
            lost += u64::from(back != value && !(back.is_nan() && value.is_nan()));
            codes.push(code);
        }
        let made = Blocks {
            number,
            codes,
            ..self.clone()
        };
        Some((made, lost))
    }

    /// The same numbers in other blocks over `shape`, and how many blocks can't have one number there.
    pub(crate) fn reblock(&self, shape: &[u64], block: &[u64]) -> (Blocks, u64) {
        let mut made = Blocks::over(shape, block, self.number);
        let mut lost = 0;
        let total: u64 = made.shape.iter().product();
        for at in 0..total {
            let index = unravel(at, &made.shape);
            let first: Vec<u64> = index.iter().zip(block).map(|(i, b)| i * b).collect();
            let place = self.place(&first);
            let code = self.codes.get(place).copied().unwrap_or(0);
            made.codes.push(code);
            // Every old block that the new one meets must hold the same.
            let span = first.iter().zip(block).zip(shape);
            let ends: Vec<u64> = span
                .map(|((f, b), len)| if *b == 0 { *len } else { (f + b).min(*len) })
                .collect();
            lost += u64::from(!self.all_in(&first, &ends, |other| other == code));
        }
        (made, lost)
    }

    /// The place of the block of an element.
    pub(crate) fn place(&self, element: &[u64]) -> usize {
        let blocks = element.iter().zip(&self.block).zip(&self.shape);
        blocks.fold(0_usize, |at, ((e, b), n)| {
            at * (*n as usize) + e.checked_div(*b).unwrap_or(0) as usize
        })
    }

    fn all_in(&self, first: &[u64], ends: &[u64], holds: impl Fn(u32) -> bool) -> bool {
        let mut at = first.to_vec();
        loop {
            if !holds(self.codes.get(self.place(&at)).copied().unwrap_or(0)) {
                return false;
            }
            // The next old block, last axis fastest.
            let mut axis = at.len();
            loop {
                let Some(before) = axis.checked_sub(1) else {
                    return true;
                };
                axis = before;
                let size = self.block[axis];
                let next = match size {
                    0 => ends[axis],
                    _ => (at[axis] / size + 1) * size,
                };
                if next < ends[axis] {
                    at[axis] = next;
                    break;
                }
                at[axis] = first[axis];
            }
        }
    }
}

impl Loose {
    /// Whether codes are integers.
    pub(crate) fn is_integer(&self) -> bool {
        self.element == INTEGER
    }

    /// The columns of a group; all of them where there is one.
    pub(crate) fn group(&self) -> u64 {
        let columns = self.shape.last().copied().unwrap_or(0);
        match self.scale.block.last() {
            None | Some(0) => columns,
            Some(size) => *size,
        }
    }

    /// The zero point of a group, where it is a code.
    pub(crate) fn zero_at(&self, at: usize) -> Option<i64> {
        match &self.zero {
            Zeros::Same(zero) => Some(*zero),
            Zeros::Each(zeros) => zeros.get(at).copied(),
            Zeros::None | Zeros::Bias(_) => None,
        }
    }

    /// The tensor of a packed one.
    ///
    /// # Errors
    /// The parts don't fit, or the scheme's values are not codes times scales.
    pub(crate) fn of(packed: &Packed) -> Result<Loose, Error> {
        let named = |error: Error| error.of(&packed.tensor.name);
        match &packed.tensor.meaning {
            Meaning::Ggml(ty) => ggml::loosen(packed, *ty).map_err(named),
            Meaning::Preset(..) => {
                let meaning = packed.tensor.describe()?;
                described(&meaning, &packed.view()).map_err(named)
            }
            Meaning::Opaque(_) => Err(named(Error::new(
                Reason::Unsupported,
                format!("{} is carried as it is", packed.tensor.preset()),
            ))),
        }
    }

    /// Integers with a row of groups for each row of the tensor, whatever the blocks were.
    fn by_rows(mut self) -> Self {
        let group = self.scale.block.last().copied().unwrap_or(0);
        let mut block = vec![1; self.shape.len()];
        if let Some(last) = block.last_mut() {
            *last = group;
        }
        if block == self.scale.block || self.group_index.is_some() {
            return self;
        }
        let old = self.scale.clone();
        self.scale = old.reblock(&self.shape, &block).0;
        if let Zeros::Each(zeros) = &self.zero {
            // Zero points move with the scales: their places are codes of the same blocks.
            let places = Blocks {
                codes: (0..zeros.len() as u32).collect(),
                ..old
            };
            let moved = places.reblock(&self.shape, &block).0.codes;
            let moved = moved
                .iter()
                .filter_map(|at| zeros.get(*at as usize).copied());
            self.zero = Zeros::Each(moved.collect());
        }
        self
    }
}

/// Blocks on each axis.
pub(crate) fn counts(shape: &[u64], block: &[u64]) -> Vec<u64> {
    let axes = shape.iter().zip(block);
    axes.map(|(len, size)| match size {
        0 => 1,
        _ => len.div_ceil(*size),
    })
    .collect()
}

pub(crate) fn unravel(mut at: u64, shape: &[u64]) -> Vec<u64> {
    let mut index: Vec<u64> = shape
        .iter()
        .rev()
        .map(|len| {
            let i = at % (*len).max(1);
            at /= (*len).max(1);
            i
        })
        .collect();
    index.reverse();
    index
}

/// The bits of a number.
pub(crate) fn width(number: Number) -> u32 {
    match number {
        Number::F32 => 32,
        Number::F16 | Number::Bf16 => 16,
        Number::E2m1 => 4,
        Number::E2m3 | Number::E3m2 => 6,
        _ => 8,
    }
}

fn described(meaning: &Descriptor, parts: &Bytes<'_>) -> Result<Loose, Error> {
    let other = |what: &str| {
        Error::new(
            Reason::Unsupported,
            format!("{what}: not codes times scales"),
        )
    };
    let Element::Number(number) = meaning.element else {
        return Err(other("a table of values"));
    };
    let bits = meaning.codes.1.bits();
    if bits > 8 {
        return Err(other("wide codes"));
    }
    let shape = &meaning.shape;
    let mut codes = codes_of(meaning, parts)?;
    let (element, base) = match number {
        Number::Unsigned { offset } => (INTEGER, offset),
        Number::Signed => {
            codes.iter_mut().for_each(|code| *code ^= 1 << (bits - 1));
            (INTEGER, 1 << (bits - 1))
        }
        float => (float, 0),
    };
    let Some((scale, more)) = meaning.scales.split_first() else {
        return Err(other("no scale"));
    };
    if scale.table.is_some() || scale.times.is_some() || scale.op != Op::Multiply {
        return Err(other("a nested scale"));
    }
    if matches!(meaning.rule, Rule::ProductTimes(_)) {
        return Err(other("a product with a factor, which rounds once more"));
    }
    if scale.field.phase.iter().any(|&at| at > 0) {
        return Err(other("a first block that was begun elsewhere"));
    }
    let group_index = meaning
        .group_index
        .map(|role| index_of(parts.get(&role).copied().unwrap_or(&[])));
    // Where an index says the group of each column, blocks are counted by the part.
    let index = group_index.clone();
    let grid = |field: &Field| {
        let mut counted = counts(shape, &field.block);
        if let (Some(index), Some(last)) = (&index, counted.last_mut()) {
            let most = index.iter().max().map_or(0, |most| u64::from(*most) + 1);
            *last = field.layout.shape.last().copied().unwrap_or(0).max(most);
        }
        counted
    };
    let blocks = |field: &Field| -> Result<Blocks, Error> {
        let shape = grid(field);
        Ok(Blocks {
            number: field.number,
            block: field.block.clone(),
            codes: field_codes(field, &shape, parts)?,
            shape,
        })
    };
    let mut made = Loose {
        shape: shape.clone(),
        element,
        bits,
        codes,
        scale: blocks(&scale.field)?,
        global: match more {
            [] => None,
            [one] if one.table.is_none() && one.times.is_none() => {
                let read = blocks(&one.field)?;
                match read.codes[..] {
                    [_] => Some((read.get(0).to_bits(), one.op)),
                    _ => return Err(other("scales of scales")),
                }
            }
            _ => return Err(other("three scales")),
        },
        zero: Zeros::None,
        group_index,
        dtype: meaning.dtype,
    };
    if element == INTEGER {
        made.zero = zeros(meaning, &made, base, blocks)?;
    } else if meaning.rule != Rule::Product || meaning.zero.is_some() {
        return Err(other("floats with a zero point"));
    }
    made.settle_index();
    Ok(if element == INTEGER {
        made.by_rows()
    } else {
        made
    })
}

fn codes_of(meaning: &Descriptor, parts: &Bytes<'_>) -> Result<Vec<u8>, Error> {
    let (role, layout) = &meaning.codes;
    let missing = || Error::new(Reason::Missing, format!("the part {role:?} is missing"));
    let reader = layout.reader(parts.get(role).ok_or_else(missing)?)?;
    let (rows, columns) = rows_of(&meaning.shape)?;
    let columns = usize::try_from(columns).map_err(|_| too_large())?;
    // The reader has proven that the part holds so many codes.
    let mut codes = Vec::with_capacity(rows as usize * columns);
    let mut row = vec![0; columns];
    for at in 0..rows {
        reader.row(&split(at, &meaning.shape), 0, &mut row);
        codes.extend(row.iter().map(|code| *code as u8));
    }
    Ok(codes)
}

/// The zero points of integers, as codes that the integers' own offset is counted in.
fn zeros(
    meaning: &Descriptor,
    made: &Loose,
    base: i64,
    blocks: impl Fn(&Field) -> Result<Blocks, Error>,
) -> Result<Zeros, Error> {
    let field = match &meaning.zero {
        None => return Ok(Zeros::Same(base)),
        Some(Zero::Constant(zero)) if meaning.rule == Rule::Product && zero.fract() == 0.0 => {
            return Ok(Zeros::Same(base + *zero as i64));
        }
        Some(Zero::Field(field)) => blocks(field)?,
        Some(Zero::Constant(_)) => {
            return Err(Error::new(
                Reason::Unsupported,
                "a zero point between codes",
            ));
        }
    };
    let at = 0..field.codes.len();
    match meaning.rule {
        Rule::Product => Ok(Zeros::Each(
            at.map(|at| base + field_integer(&field, at)).collect(),
        )),
        Rule::RecoveredZero => {
            let one = |at| match made.scale.get(at) {
                0.0 => base,
                scale => base + (-field.get(at) / scale).round_ties_even() as i64,
            };
            Ok(Zeros::Each(at.map(one).collect()))
        }
        Rule::ProductThenAdd if base == 0 => Ok(Zeros::Bias(field)),
        other => Err(Error::new(
            Reason::Unsupported,
            format!("{other:?}: not codes times scales"),
        )),
    }
}

fn field_integer(field: &Blocks, at: usize) -> i64 {
    let code = field.codes.get(at).copied().unwrap_or(0);
    match field.number {
        // One that was added without a wrap makes a code wider than its field.
        Number::Unsigned { offset } => i64::from(code) - offset,
        number => number_of(number, code, 8) as i64,
    }
}

fn index_of(bytes: &[u8]) -> Vec<u32> {
    let entries = bytes.as_chunks::<4>().0.iter();
    entries.map(|four| u32::from_le_bytes(*four)).collect()
}

impl Loose {
    /// An index that says what would hold without it is none.
    fn settle_index(&mut self) {
        let Some(index) = &self.group_index else {
            return;
        };
        let groups = self.scale.shape.last().copied().unwrap_or(0);
        let columns = index.len() as u64;
        let size = columns.div_ceil(groups.max(1)).max(1);
        let plain = index.iter().zip(0_u64..);
        if groups == columns.div_ceil(size)
            && plain
                .into_iter()
                .all(|(group, at)| u64::from(*group) == at / size)
        {
            let size = if groups == 1 { 0 } else { size };
            self.group_index = None;
            if let Some(last) = self.scale.block.last_mut() {
                *last = size;
            }
        }
    }
}

/// A number as bits of another kind, if it has any.
pub(crate) fn narrowest(number: Number, value: f32) -> u32 {
    match number {
        Number::F16 => u32::from(f32_to_f16(value)),
        Number::Bf16 => u32::from(f32_to_bf16(value)),
        _ => value.to_bits(),
    }
}

/// The value of bits of such a number.
pub(crate) fn widened(number: Number, code: u32) -> f32 {
    match number {
        Number::F16 => f16_to_f32(code as u16),
        Number::Bf16 => bf16_to_f32(code as u16),
        other => number_of(other, code, width(other)),
    }
}
