//! A number for each block, as a run reads it: the blocks of some columns of a row at once.

use std::collections::BTreeMap;
use std::ops::Range;

use super::codes::{Codes, Window};
use super::plan::{TILE, Work};
use crate::descriptor::{Bias, Descriptor, Field, Number, Role};
use crate::error::{Error, Reason};
use crate::interpret::number_of;
use crate::layout::{MAX_AXES, low};

/// A field, and how its part is read.
#[derive(Debug)]
pub(super) struct FieldPlan {
    pub field: Field,
    pub codes: Codes,
    bits: u32,
    lookup: Option<Vec<f32>>,
}

impl FieldPlan {
    pub fn new(field: &Field, of: &Descriptor, bytes: &BTreeMap<Role, u64>) -> Result<Self, Error> {
        let axes = of.shape.len();
        let shape = &field.layout.shape;
        if [field.block.len(), field.phase.len(), shape.len()] != [axes; 3] || axes > MAX_AXES {
            return Err(Error::layout("blocks with other axes".to_owned()));
        }
        let made = FieldPlan {
            codes: Codes::new(&field.layout, size(bytes, field.role)?)?,
            bits: field.layout.bits(),
            lookup: lookup(field.number, field.layout.bits()),
            field: field.clone(),
        };
        for (axis, &len) in of.shape.iter().enumerate() {
            if of.group_index.is_none() || axis + 1 != axes {
                made.reaches(axis, len)?;
            }
        }
        Ok(made)
    }

    /// Whether there is a block for each of so many coordinates of an axis.
    pub fn reaches(&self, axis: usize, len: u64) -> Result<(), Error> {
        let at = |list: &[u64]| list.get(axis).copied().unwrap_or(0);
        let (block, phase) = (at(&self.field.block), at(&self.field.phase));
        let needed = match block {
            _ if len == 0 => return Ok(()),
            0 => Some(1),
            _ if phase >= block => None,
            _ => len.checked_add(phase).map(|end| end.div_ceil(block)),
        };
        let there = at(&self.field.layout.shape);
        if needed.is_none_or(|needed| needed > there) {
            return Err(Error::new(
                Reason::Size,
                format!(
                    "{len} elements in blocks of {block} need {needed:?} of them, there are {there}"
                ),
            ));
        }
        Ok(())
    }

    /// The blocks of a row, on all axes but the last.
    pub fn lead(&self, lead: &[u64]) -> Vec<u64> {
        let sizes = self.field.block.iter().zip(&self.field.phase);
        (lead.iter().zip(sizes))
            .map(|(at, (block, phase))| at.saturating_add(*phase).checked_div(*block).unwrap_or(0))
            .collect()
    }

    /// The block of a column.
    pub fn last(&self, column: u64) -> u64 {
        let block = self.field.block.last().copied().unwrap_or(0);
        let phase = self.field.phase.last().copied().unwrap_or(0);
        column.saturating_add(phase).checked_div(block).unwrap_or(0)
    }

    pub fn layout_columns(&self) -> u64 {
        self.field.layout.shape.last().copied().unwrap_or(0)
    }

    /// The numbers of blocks of a row.
    pub fn numbers<'w>(
        &self,
        window: Window<'_>,
        table: Option<&[f32]>,
        lead: &[u64],
        blocks: Range<u64>,
        work: &'w mut Work,
    ) -> &'w [f32] {
        let len = usize::try_from(blocks.end - blocks.start).unwrap_or(0);
        if work.numbers.len() < len {
            work.numbers.resize(len, 0.0);
            work.codes.resize(len.max(TILE), 0);
        }
        let codes = &mut work.codes[..len];
        self.codes.row(window, lead, blocks.start, codes);
        match self.field.bias {
            Bias::None => {}
            Bias::Open => codes.iter_mut().for_each(|code| *code += 1),
            Bias::Field => {
                let mask = low(self.bits);
                codes
                    .iter_mut()
                    .for_each(|code| *code = code.wrapping_add(1) & mask);
            }
            Bias::Word => {
                let mut index = lead.to_vec();
                index.push(0);
                for (code, block) in codes.iter_mut().zip(blocks) {
                    if let Some(last) = index.last_mut() {
                        *last = block;
                    }
                    *code = self.wordwise(window, &index).unwrap_or(*code);
                }
            }
        }
        let table = table.or(self.lookup.as_deref());
        for (number, code) in work.numbers.iter_mut().zip(&*codes) {
            *number = match table {
                Some(table) => table.get(*code as usize).copied().unwrap_or(f32::NAN),
                None => number_of(self.field.number, *code, self.bits),
            };
        }
        &work.numbers[..len]
    }

    /// A code after one was added to each code of its word at once.
    fn wordwise(&self, window: Window<'_>, index: &[u64]) -> Option<u32> {
        let address = self.field.layout.planes.first()?.at(index);
        let word = window.bits(address / 32 * 32, 32);
        let ones = (0..32 / self.bits).fold(0_u32, |ones, k| ones | 1 << (k * self.bits));
        Some(word.wrapping_add(ones) >> (address % 32) & low(self.bits))
    }
}

/// What each code stands for, where codes are few.
pub(super) fn lookup(number: Number, bits: u32) -> Option<Vec<f32>> {
    let integer = matches!(number, Number::Unsigned { .. } | Number::Signed);
    (bits <= 8 && !integer).then(|| {
        (0..1_u32 << bits)
            .map(|code| number_of(number, code, bits))
            .collect()
    })
}

pub(super) fn size(bytes: &BTreeMap<Role, u64>, role: Role) -> Result<u64, Error> {
    bytes.get(&role).copied().ok_or_else(|| missing(role))
}

pub(super) fn missing(role: Role) -> Error {
    Error::new(Reason::Missing, format!("the part {role:?} is missing"))
}
