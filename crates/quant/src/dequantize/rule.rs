//! The rule that joins codes, scales and zeros, over a tile: each step of it for all columns, in the interpreter's order.

use half::f16;
use half::slice::HalfFloatSliceExt as _;

use super::plan::Work;
use crate::descriptor::{Descriptor, Float, Op, Rule};

/// Joins values, scales and zeros as the rule says.
pub(super) fn join(descriptor: &Descriptor, len: usize, work: &mut Work) {
    let divides = (descriptor.scales.first()).is_some_and(|scale| scale.op == Op::Divide);
    let Work {
        values,
        scale,
        zero,
        halves,
        ..
    } = work;
    let (values, scale, zero) = (&mut values[..len], &scale[..len], &zero[..len]);
    let less = |values: &mut [f32]| values.iter_mut().zip(zero).for_each(|(v, z)| *v -= z);
    let plus = |values: &mut [f32]| values.iter_mut().zip(zero).for_each(|(v, z)| *v += z);
    let scaled = |values: &mut [f32]| match divides {
        true => values.iter_mut().zip(scale).for_each(|(v, s)| *v /= s),
        false => values.iter_mut().zip(scale).for_each(|(v, s)| *v *= s),
    };
    let mut round = |values: &mut [f32]| round(descriptor.dtype, values, halves);
    match descriptor.rule {
        Rule::Product => {
            less(values);
            scaled(values);
        }
        Rule::RoundedDifference => {
            less(values);
            round(values);
            scaled(values);
        }
        Rule::ProductThenAdd => {
            scaled(values);
            round(values);
            plus(values);
        }
        Rule::ProductThenSubtract => {
            scaled(values);
            round(values);
            less(values);
        }
        Rule::RecoveredZero => {
            for ((value, &scale), &zero) in values.iter_mut().zip(scale).zip(zero) {
                let shifted = *value - (-zero / scale).round_ties_even();
                *value = match (scale == 0.0, divides) {
                    // A scale of zero makes all values zero, whatever its zero point was.
                    (true, _) => 0.0,
                    (false, true) => shifted / scale,
                    (false, false) => shifted * scale,
                };
            }
        }
        Rule::ProductTimes(factor) => {
            less(values);
            scaled(values);
            values.iter_mut().for_each(|value| *value *= factor);
        }
    }
    round(values);
}

/// Rounds to a dtype and back.
fn round(dtype: Float, values: &mut [f32], halves: &mut [f16]) {
    match dtype {
        Float::F32 => {}
        Float::Bf16 => values.iter_mut().for_each(|value| {
            *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
        }),
        Float::F16 => {
            let halves = &mut halves[..values.len()];
            halves.convert_from_f32_slice(values);
            halves.convert_to_f32_slice(values);
        }
    }
}

/// The nearest bfloat16, ties to even; without a branch.
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let even = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let quiet = bits | 0x0040_0000;
    ((if value.is_nan() { quiet } else { even }) >> 16) as u16
}
