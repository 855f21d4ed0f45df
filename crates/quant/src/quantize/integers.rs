//! Integers in groups: symmetric, asymmetric, and MLX's.

use super::{each, over_blocks};
use crate::descriptor::{Float, Number};
use crate::error::{Error, Reason};
use crate::loose::{Blocks, Loose, Zeros, narrowest, widened};
use crate::pack::{integers, number_of};
use crate::target::{Form, Target};

pub(super) fn loose(
    values: &[f32],
    shape: &[u64],
    dtype: Float,
    form: &Form,
    target: &Target,
) -> Result<Loose, Error> {
    let bits = target.bits.unwrap_or(form.bits[0]);
    // A byte holds codes of up to 8 bits: compressed-tensors has narrower ones in bytes too.
    if !(form.bits.contains(&bits) || form.name == "ct-int" && (2..8).contains(&bits)) {
        let text = format!(
            "{} has no codes of {bits} bits, it has {:?}",
            form.name, form.bits
        );
        return Err(Error::new(Reason::Parameter, text));
    }
    let columns = shape.last().copied().unwrap_or(0);
    let mut block = vec![1; shape.len()];
    if let Some(last) = block.last_mut() {
        *last = match u64::try_from(target.group.unwrap_or(form.group)) {
            Ok(size) if size > 0 && size < columns => size,
            Ok(0) => return Err(Error::new(Reason::Parameter, "groups of 0 columns")),
            _ if form.name == "mlx" => columns,
            _ => 0,
        };
    }
    let number = match target.scale {
        Some(dtype) => number_of(dtype)?,
        None => match (dtype, form.scales) {
            (_, [only]) => number_of(*only)?,
            (Float::Bf16, _) => Number::Bf16,
            (Float::F32, _) if form.scales.contains(&tonnage_format::Dtype::F32) => Number::F32,
            _ => Number::F16,
        },
    };
    let blocks = Blocks::over(shape, &block, number);
    let limits = over_blocks(
        shape,
        &blocks,
        values,
        (0.0_f32, 0.0_f32),
        |(least, most), v| (least.min(v), most.max(v)),
    );
    if form.name == "mlx" {
        return mlx(values, shape, dtype, bits, blocks);
    }
    let symmetric = target.symmetric.unwrap_or(form.symmetric);
    let steps = ((1_u32 << bits) - 1) as f32;
    let middle = 1_i64 << (bits - 1);
    let (mut scales, mut zeros) = (Vec::new(), Vec::new());
    for (least, most) in limits {
        let wide = if symmetric {
            2.0 * most.max(-least)
        } else {
            most - least
        };
        let code = stored(number, wide / steps)?;
        scales.push(code);
        let step = widened(number, code);
        zeros.push(match symmetric {
            true => middle,
            false => ((-least / step).round_ties_even() as i64).clamp(0, (1 << bits) - 1),
        });
    }
    let most = (1_i64 << bits) - 1;
    let mut codes = Vec::with_capacity(values.len());
    let steps: Vec<f32> = scales.iter().map(|code| widened(number, *code)).collect();
    each(shape, &blocks, values, |at, value| {
        let (step, zero) = (
            steps.get(at).copied().unwrap_or(1.0),
            zeros.get(at).copied(),
        );
        let code = (value / step).round_ties_even() as i64 + zero.unwrap_or(middle);
        codes.push(code.clamp(0, most) as u8);
    });
    let scale = Blocks {
        codes: scales,
        ..blocks
    };
    let zero = if symmetric {
        Zeros::Same(middle)
    } else {
        Zeros::Each(zeros)
    };
    let mut made = integers(shape, bits, codes, scale, zero, dtype);
    if form.name == "ct-int" {
        made.resize(8)?;
    }
    Ok(made)
}

/// A scale as it is stored: 1 for a block of zeros, the smallest there is where it would be zero.
fn stored(number: Number, scale: f32) -> Result<u32, Error> {
    if scale == 0.0 {
        return Ok(narrowest(number, 1.0));
    }
    let code = narrowest(number, scale).max(1);
    if !widened(number, code).is_finite() {
        let text = format!("a scale of {scale} is too large for {number:?}");
        return Err(Error::new(Reason::Usage, text));
    }
    Ok(code)
}

/// As `mx.quantize` does: the end of the larger magnitude is a whole code away from zero, and is the bias.
fn mlx(
    values: &[f32],
    shape: &[u64],
    dtype: Float,
    bits: u32,
    blocks: Blocks,
) -> Result<Loose, Error> {
    let number = blocks.number;
    let start = (f32::INFINITY, f32::NEG_INFINITY);
    let limits = over_blocks(shape, &blocks, values, start, |(least, most), value| {
        (least.min(value), most.max(value))
    });
    let steps = ((1_u32 << bits) - 1) as f32;
    let (mut scales, mut biases, mut used) = (Vec::new(), Vec::new(), Vec::new());
    for (least, most) in limits {
        let low = least.abs() > most.abs();
        let step = ((most - least) / steps).max(1e-7);
        let step = if low { step } else { -step };
        let edge = if low { least } else { most };
        let whole = (edge / step).round_ties_even();
        let (step, bias) = if whole == 0.0 {
            (step, 0.0)
        } else {
            (edge / whole, edge)
        };
        used.push((step, bias));
        let (step, bias) = (narrowest(number, step), narrowest(number, bias));
        if !widened(number, step).is_finite() || !widened(number, bias).is_finite() {
            let text = format!("values from {least} to {most} are too large for {number:?}");
            return Err(Error::new(Reason::Usage, text));
        }
        scales.push(step);
        biases.push(bias);
    }
    let mut codes = Vec::with_capacity(values.len());
    each(shape, &blocks, values, |at, value| {
        let (step, bias) = used.get(at).copied().unwrap_or((1.0, 0.0));
        codes.push(((value - bias) / step).round_ties_even().clamp(0.0, steps) as u8);
    });
    let bias = Blocks {
        codes: biases,
        ..blocks.clone()
    };
    let scale = Blocks {
        codes: scales,
        ..blocks
    };
    Ok(integers(
        shape,
        bits,
        codes,
        scale,
        Zeros::Bias(bias),
        dtype,
    ))
}
