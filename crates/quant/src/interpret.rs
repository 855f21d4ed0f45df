//! The interpreter: any [`Descriptor`] over its parts' bytes, row by row.
//!
//! This is what a scheme *means*. It reads each code through its layout and joins it with scale and zero as the
//! descriptor's rule says, rounding where the rule rounds. Fast paths give its bits.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::descriptor::{
    Bias, Descriptor, Element, Field, Float, Number, Op, Role, Rule, Scale, Zero,
};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Reader, low, read_bits};
use crate::numbers;

/// The bytes of a tensor's parts.
pub type Bytes<'a> = BTreeMap<Role, &'a [u8]>;

/// Values of rows `rows` of a descriptor, into `out`: rows are all axes of [`Descriptor::shape`] but the last. Values are
/// rounded to the descriptor's dtype, so that the conversion to it loses nothing.
///
/// # Errors
/// A part is missing or too short, a row is not there, `out` has another length, or a group index points outside.
pub fn interpret(
    descriptor: &Descriptor,
    parts: &Bytes<'_>,
    rows: Range<u64>,
    out: &mut [f32],
) -> Result<(), Error> {
    let machine = Machine::new(descriptor, parts)?;
    let columns = machine.columns;
    let wanted = rows
        .end
        .checked_sub(rows.start)
        .and_then(|n| n.checked_mul(columns as u64));
    if rows.end > machine.rows || wanted != Some(out.len() as u64) {
        return Err(Error::new(
            Reason::Usage,
            format!(
                "rows {} to {} of {}, {columns} columns, into {} values",
                rows.start,
                rows.end,
                machine.rows,
                out.len()
            ),
        ));
    }
    if columns == 0 {
        return Ok(());
    }
    let mut work = Work {
        codes: vec![0; columns],
        scale: vec![0.0; columns],
        zero: vec![0.0; columns],
    };
    for (row, values) in rows.zip(out.chunks_exact_mut(columns)) {
        machine.row(row, &mut work, values)?;
    }
    Ok(())
}

/// Rounds to a dtype and back.
pub fn round_to(dtype: Float, value: f32) -> f32 {
    match dtype {
        Float::F32 => value,
        Float::F16 => numbers::f16_to_f32(numbers::f32_to_f16(value)),
        Float::Bf16 => numbers::bf16_to_f32(numbers::f32_to_bf16(value)),
    }
}

struct Work {
    codes: Vec<u32>,
    scale: Vec<f32>,
    zero: Vec<f32>,
}

struct Machine<'a> {
    descriptor: &'a Descriptor,
    rows: u64,
    columns: usize,
    codes: Reader<'a>,
    table: Option<Vec<f32>>,
    scales: Vec<ScaleReader<'a>>,
    zero: Option<FieldReader<'a>>,
    groups: Option<Vec<u64>>,
}

struct FieldReader<'a> {
    field: &'a Field,
    reader: Reader<'a>,
    bytes: &'a [u8],
    bits: u32,
}

struct ScaleReader<'a> {
    scale: &'a Scale,
    field: FieldReader<'a>,
    table: Option<Vec<f32>>,
    times: Option<FieldReader<'a>>,
}

impl<'a> Machine<'a> {
    fn new(descriptor: &'a Descriptor, parts: &'a Bytes<'_>) -> Result<Self, Error> {
        let count = |shape: &[u64]| shape.iter().try_fold(1_u64, |n, &len| n.checked_mul(len));
        let Some((&last, lead)) = descriptor.shape.split_last() else {
            return Err(Error::layout("a tensor without axes".to_owned()));
        };
        let (Some(rows), Some(all)) = (count(lead), count(&descriptor.shape)) else {
            return Err(Error::layout(
                "a shape whose product does not fit".to_owned(),
            ));
        };
        if count(&descriptor.view) != Some(all) || descriptor.codes.1.shape != descriptor.shape {
            return Err(Error::layout("shapes of different sizes".to_owned()));
        }
        let (role, layout) = &descriptor.codes;
        let codes = layout.reader(part(parts, *role)?)?;
        let groups = match descriptor.group_index {
            Some(role) => Some(group_index(part(parts, role)?, last)?),
            None => None,
        };
        // With an index, fields know groups on the last axis where they else know columns.
        let mut reach = descriptor.shape.clone();
        if let (Some(groups), Some(last)) = (&groups, reach.last_mut()) {
            *last = groups.iter().max().map_or(0, |most| most.saturating_add(1));
        }
        let field = |field: &'a Field| FieldReader::new(field, &reach, parts);
        Ok(Machine {
            descriptor,
            rows,
            columns: usize::try_from(last).unwrap_or(usize::MAX),
            codes,
            table: match &descriptor.element {
                Element::Known(values) => Some(values.to_vec()),
                Element::Table(role) => Some(table(part(parts, *role)?)),
                Element::Number(_) => None,
            },
            scales: descriptor
                .scales
                .iter()
                .map(|scale| {
                    Ok(ScaleReader {
                        scale,
                        field: field(&scale.field)?,
                        table: match scale.table {
                            Some(role) => Some(table(part(parts, role)?)),
                            None => None,
                        },
                        times: scale.times.as_ref().map(field).transpose()?,
                    })
                })
                .collect::<Result<_, Error>>()?,
            zero: match &descriptor.zero {
                Some(Zero::Field(zero)) => Some(field(zero)?),
                _ => None,
            },
            groups,
        })
    }

    fn row(&self, row: u64, work: &mut Work, values: &mut [f32]) -> Result<(), Error> {
        let lead = split(row, &self.descriptor.shape);
        self.codes.row(&lead, 0, &mut work.codes);
        let bits = self.descriptor.codes.1.bits();
        let elements = self.table.as_deref();
        for (value, &code) in values.iter_mut().zip(&work.codes) {
            *value = match (&self.descriptor.element, elements) {
                (Element::Number(number), _) => read(*number, code, bits),
                (_, Some(table)) => table.get(code as usize).copied().unwrap_or(f32::NAN),
                (_, None) => f32::NAN,
            };
        }
        self.blocks(&lead, &mut work.scale, |index| self.scale(index))?;
        match (&self.descriptor.zero, &self.zero) {
            (Some(Zero::Constant(zero)), _) => work.zero.fill(*zero),
            (_, Some(zero)) => self.blocks(&lead, &mut work.zero, |index| zero.get(index))?,
            _ => work.zero.fill(0.0),
        }
        for ((value, &scale), &zero) in values.iter_mut().zip(&work.scale).zip(&work.zero) {
            *value = self.join(*value, scale, zero);
        }
        Ok(())
    }

    /// A number for each column.
    fn blocks(
        &self,
        lead: &[u64],
        out: &mut [f32],
        number: impl Fn(&[u64]) -> f32,
    ) -> Result<(), Error> {
        let mut index = lead.to_vec();
        index.push(0);
        for (column, out) in (0_u64..).zip(out) {
            if let Some(last) = index.last_mut() {
                *last = match &self.groups {
                    Some(groups) => groups
                        .get(column as usize)
                        .copied()
                        .ok_or_else(|| Error::layout("a column without a group".to_owned()))?,
                    None => column,
                };
            }
            *out = number(&index);
        }
        Ok(())
    }

    fn scale(&self, index: &[u64]) -> f32 {
        let mut whole = None;
        for reader in &self.scales {
            let one = reader.get(index);
            whole = Some(match (whole, reader.scale.op) {
                // Whether the first is divided by is asked when it is joined with the value.
                (None, _) => one,
                (Some(whole), Op::Multiply) => whole * one,
                (Some(whole), Op::Divide) => whole / one,
            });
        }
        whole.unwrap_or(1.0)
    }

    fn join(&self, value: f32, scale: f32, zero: f32) -> f32 {
        let round = |value| round_to(self.descriptor.dtype, value);
        let divides = self
            .descriptor
            .scales
            .first()
            .is_some_and(|s| s.op == Op::Divide);
        let scaled = |value: f32| {
            if divides {
                value / scale
            } else {
                value * scale
            }
        };
        match self.descriptor.rule {
            Rule::Product => round(scaled(value - zero)),
            Rule::RoundedDifference => round(scaled(round(value - zero))),
            Rule::ProductThenAdd => round(round(scaled(value)) + zero),
            Rule::ProductThenSubtract => round(round(scaled(value)) - zero),
            // A scale of zero makes all values zero, whatever its zero point was.
            Rule::RecoveredZero if scale == 0.0 => 0.0,
            Rule::RecoveredZero => round(scaled(value - (-zero / scale).round_ties_even())),
            Rule::ProductTimes(factor) => round(scaled(value - zero) * factor),
        }
    }
}

impl<'a> FieldReader<'a> {
    /// For coordinates below `reach` on each axis.
    fn new(field: &'a Field, reach: &[u64], parts: &'a Bytes<'_>) -> Result<Self, Error> {
        let axes = reach.len();
        let shape = &field.layout.shape;
        if [field.block.len(), field.phase.len(), shape.len()] != [axes; 3] {
            return Err(Error::layout("blocks with other axes".to_owned()));
        }
        let blocks = field.block.iter().zip(&field.phase);
        for ((&len, (&block, &phase)), &there) in reach.iter().zip(blocks).zip(shape) {
            let needed = match block {
                _ if len == 0 => continue,
                0 => Some(1),
                _ if phase >= block => None,
                _ => len.checked_add(phase).map(|end| end.div_ceil(block)),
            };
            if needed.is_none_or(|needed| needed > there) {
                return Err(Error::new(
                    Reason::Size,
                    format!(
                        "{len} elements in blocks of {block} need {needed:?} of them, there are {there}"
                    ),
                ));
            }
        }
        let bytes = part(parts, field.role)?;
        Ok(FieldReader {
            field,
            reader: field.layout.reader(bytes)?,
            bytes,
            bits: field.layout.bits(),
        })
    }

    fn get(&self, index: &[u64]) -> f32 {
        read(self.field.number, self.code(index), self.bits)
    }

    fn code(&self, index: &[u64]) -> u32 {
        let Field {
            block,
            phase,
            layout,
            bias,
            ..
        } = self.field;
        let mut at = [0_u64; crate::layout::MAX_AXES];
        let blocks = block.iter().zip(phase);
        for (at, (&index, (&block, &phase))) in at.iter_mut().zip(index.iter().zip(blocks)) {
            *at = (index + phase).checked_div(block).unwrap_or(0);
        }
        let at = &at[..index.len().min(crate::layout::MAX_AXES)];
        let code = self.reader.get(at);
        match bias {
            Bias::None => code,
            Bias::Open => code + 1,
            Bias::Field => code.wrapping_add(1) & low(self.bits),
            Bias::Word => wordwise(self.bytes, layout, at, self.bits).unwrap_or(code),
        }
    }
}

impl ScaleReader<'_> {
    fn get(&self, index: &[u64]) -> f32 {
        let code = self.field.code(index);
        let mut value = match &self.table {
            Some(table) => table.get(code as usize).copied().unwrap_or(f32::NAN),
            None => read(self.field.field.number, code, self.field.bits),
        };
        if let Some(times) = &self.times {
            value *= times.get(index);
        }
        if self.scale.plus != 0.0 {
            value += self.scale.plus;
        }
        value
    }
}

/// The codes of a field by block, row-major, after its bias: `blocks` of them on each axis.
pub(crate) fn field_codes(
    field: &Field,
    blocks: &[u64],
    parts: &Bytes<'_>,
) -> Result<Vec<u32>, Error> {
    let first = |at: &[u64]| -> Vec<u64> {
        let sizes = at.iter().zip(&field.block);
        sizes.map(|(at, size)| at.saturating_mul(*size)).collect()
    };
    let reach: Vec<u64> = first(blocks)
        .iter()
        .zip(&field.block)
        // The last block may be cut short; its first element is there.
        .map(|(end, size)| match size {
            0 => 1,
            _ => end.saturating_sub(size - 1),
        })
        .collect();
    if field.phase.iter().any(|phase| *phase != 0) {
        return Err(Error::new(
            Reason::Unsupported,
            "a shard that begins within a block",
        ));
    }
    let reader = FieldReader::new(field, &reach, parts)?;
    let rows = blocks
        .split_last()
        .map_or(0, |(_, lead)| lead.iter().product());
    let columns = blocks.last().copied().unwrap_or(0);
    let mut codes = Vec::new();
    for row in 0..rows {
        let mut at = split(row, blocks);
        at.push(0);
        for column in 0..columns {
            if let Some(last) = at.last_mut() {
                *last = column;
            }
            codes.push(reader.code(&first(&at)));
        }
    }
    Ok(codes)
}

/// The number that a code of so many bits stands for.
pub(crate) fn number_of(number: Number, code: u32, bits: u32) -> f32 {
    read(number, code, bits)
}

/// A code after one was added to each code of its word at once.
fn wordwise(bytes: &[u8], layout: &Layout, at: &[u64], bits: u32) -> Option<u32> {
    let address = layout.planes.first()?.at(at);
    let word = read_bits(bytes, address / 32 * 32, 32);
    let ones = (0..32 / bits).fold(0_u32, |ones, k| ones | 1 << (k * bits));
    Some(word.wrapping_add(ones) >> (address % 32) & low(bits))
}

/// The leading coordinates of a row.
pub(crate) fn split(mut row: u64, shape: &[u64]) -> Vec<u64> {
    let mut lead: Vec<u64> = shape
        .iter()
        .rev()
        .skip(1)
        .map(|&len| {
            let at = row % len.max(1);
            row /= len.max(1);
            at
        })
        .collect();
    lead.reverse();
    lead
}

fn read(number: Number, code: u32, bits: u32) -> f32 {
    match number {
        Number::F32 => f32::from_bits(code),
        Number::F16 => numbers::f16_to_f32(code as u16),
        Number::Bf16 => numbers::bf16_to_f32(code as u16),
        Number::E8m0 => numbers::e8m0_to_f32(code as u8),
        Number::E4m3 => numbers::e4m3fn_to_f32(code as u8),
        Number::E4m3Fnuz => numbers::e4m3fnuz_to_f32(code as u8),
        Number::E5m2 => numbers::e5m2_to_f32(code as u8),
        Number::E5m2Fnuz => numbers::e5m2fnuz_to_f32(code as u8),
        Number::E2m3 => numbers::e2m3_to_f32(code as u8),
        Number::E3m2 => numbers::e3m2_to_f32(code as u8),
        Number::E2m1 => numbers::e2m1_to_f32(code as u8),
        Number::Unsigned { offset } => (i64::from(code).wrapping_sub(offset)) as f32,
        Number::Signed => {
            let spare = 32_u32.saturating_sub(bits).min(31);
            (((code << spare) as i32) >> spare) as f32
        }
    }
}

fn part<'a>(parts: &'a Bytes<'_>, role: Role) -> Result<&'a [u8], Error> {
    parts
        .get(&role)
        .copied()
        .ok_or_else(|| Error::new(Reason::Missing, format!("the part {role:?} is missing")))
}

pub(crate) fn table(bytes: &[u8]) -> Vec<f32> {
    let (entries, _) = bytes.as_chunks::<4>();
    entries
        .iter()
        .take(256)
        .map(|four| f32::from_le_bytes(*four))
        .collect()
}

/// The group of each column, from 32-bit integers.
pub(crate) fn group_index(bytes: &[u8], columns: u64) -> Result<Vec<u64>, Error> {
    let (entries, _) = bytes.as_chunks::<4>();
    if entries.len() as u64 != columns {
        return Err(Error::new(
            Reason::Size,
            format!("{} group indices for {columns} columns", entries.len()),
        ));
    }
    entries
        .iter()
        .map(|four| {
            u64::try_from(i32::from_le_bytes(*four))
                .map_err(|_| Error::new(Reason::Size, "a negative group index"))
        })
        .collect()
}
