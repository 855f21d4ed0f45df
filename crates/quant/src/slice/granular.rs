//! Where a tensor may be cut.

use super::take::run;
use super::{Sliced, lcm};
use crate::error::Error;

/// Where an axis may be cut, in logical coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granularity {
    /// Multiples at which no carrier (a word, a byte, a tile) is divided: parts can be read there.
    pub carrier: u64,
    /// Multiples at which no block of scales is divided.
    pub scale: u64,
    /// The groups, where they can be made smaller.
    pub group: Option<u64>,
    /// How far into its first block the tensor begins.
    pub phase: u64,
}

impl Granularity {
    /// Multiples at which nothing is divided.
    pub fn clean(&self) -> u64 {
        lcm(self.carrier, self.scale).max(1)
    }
}

impl Sliced {
    /// Where an axis of the logical shape may be cut.
    ///
    /// # Errors
    /// The axis is not there, or its parts can't be cut along it at all.
    pub fn granularity(&self, axis: usize) -> Result<Granularity, Error> {
        let len = self.meaning.view.get(axis).copied().unwrap_or(0);
        let span = self.span(axis, 0..len)?;
        let (codes, bits) = self.carrier(self.meaning.codes.0)?;
        let mut carrier = run(&self.meaning.codes.1, span.axis, bits)?.unit;
        // gpt-oss' blocks are a dimension of their own: a cut leaves them whole.
        if let Some(&[blocks, bytes]) = codes.shape.last_chunk::<2>()
            && codes.shape.len() == self.meaning.shape.len() + 1
            && span.axis + 1 == self.meaning.shape.len()
            && blocks > 0
        {
            carrier = lcm(
                carrier,
                bytes.saturating_mul(len) / blocks.saturating_mul(bytes).max(1),
            );
        }
        let (mut scale, mut group, mut phase) = (1, None, 0);
        let mut same = self.scheme.params.contains(&"group");
        for field in self.fields() {
            let block = field.block.get(span.axis).copied().unwrap_or(0);
            let there = field.layout.shape.get(span.axis).copied().unwrap_or(0);
            if block == 0 || self.is_indexed(span.axis) || (there == 1 && block == 1) {
                continue;
            }
            let unit = run(&field.layout, span.axis, self.carrier(field.role)?.1)?.unit;
            if unit > 1 {
                carrier = lcm(carrier, unit.saturating_mul(block));
                same &= block == 1;
            }
            scale = lcm(scale, block);
            phase = phase.max(field.phase.get(span.axis).copied().unwrap_or(0));
            if block > 1 {
                same &= group.is_none_or(|group| group == block);
                group = Some(block);
            }
        }
        let same = same && span.inner == 1 && span.outer == 1;
        // Of a flattened tensor: so many logical coordinates that the flattened ones are a multiple.
        let up = |unit: u64| unit / super::gcd(unit, span.inner);
        let (mut carrier, mut scale) = (up(carrier), up(scale));
        if span.outer > 1 {
            // Each period must begin with a unit and with a block.
            let whole =
                |unit: u64| match span.period.is_multiple_of(unit.saturating_mul(span.inner)) {
                    true => unit,
                    false => len.max(1),
                };
            (carrier, scale) = (whole(lcm(carrier, scale)), whole(scale));
        }
        Ok(Granularity {
            carrier: carrier.min(len.max(1)),
            scale,
            group: group.filter(|_| same),
            phase,
        })
    }
}
