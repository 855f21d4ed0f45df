//! The uneven values of `IQ4_NL` and `IQ4_XS`.

use super::search::{EPSILON, nearest};
use super::{inverse, largest, put_half};
use crate::ggml::IQ4_VALUES;

/// The nearest of the uneven values, the larger of two as near.
fn nearest_value(x: f32) -> u8 {
    let values = IQ4_VALUES.map(f32::from);
    let above = values
        .iter()
        .position(|&value| value > x)
        .unwrap_or(values.len());
    match above {
        0 => 0,
        16 => 15,
        _ if x - values[above - 1] < values[above] - x => above as u8 - 1,
        _ => above as u8,
    }
}

fn value(code: u8) -> f32 {
    IQ4_VALUES[code as usize & 15] as f32
}

/// The weighted sums of a fit with the codes that `id` gives.
fn sums(x: &[f32; 32], id: f32) -> (f32, f32) {
    let (mut qx, mut q2) = (0.0_f32, 0.0_f32);
    for &x in x {
        let q = value(nearest_value(id * x));
        let w = x * x;
        qx += w * q * x;
        q2 += w * q * q;
    }
    (qx, q2)
}

/// Writes codes as nibbles in split halves.
fn pack(codes: &[u8; 32], out: &mut [u8]) {
    let (low, high) = codes.split_at(16);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = low | high << 4;
    }
}

/// The scale of a group: the best of sixteen.
fn scale(x: &[f32; 32]) -> f32 {
    let max = largest(x);
    if max.abs() < EPSILON {
        return 0.0;
    }
    let (qx, q2) = sums(x, 1.0 / (-max / value(0)));
    let mut d = if q2 > 0.0 { qx / q2 } else { 0.0 };
    let mut best = d * qx;
    for step in -7..=7 {
        let (qx, q2) = sums(x, (step as f32 + value(0)) / max);
        if q2 > 0.0 && qx * qx > best * q2 {
            d = qx / q2;
            best = d * qx;
        }
    }
    d
}

/// `quantize_iq4_nl`, which files are made with; `quantize_row_iq4_nl_ref` looks for no scale.
pub(super) fn iq4_nl(x: &[f32; 32], out: &mut [u8; 18]) -> Option<()> {
    let scale = scale(x);
    let id = inverse(scale);
    pack(&x.map(|x| nearest_value(id * x)), &mut out[2..]);
    put_half(out, 0, scale).map(drop)
}

pub(super) fn iq4_xs(x: &[f32; 256], out: &mut [u8; 136]) -> Option<()> {
    *out = [0; 136];
    let groups = x.as_chunks::<32>().0;
    let mut scales = [0.0; 8];
    for (out, x) in scales.iter_mut().zip(groups) {
        *out = scale(x);
    }
    let d = -largest(&scales) / 32.0;
    put_half(out, 0, d)?;
    let id = inverse(d);
    let mut high = 0_u16;
    for (ib, (x, scale)) in groups.iter().zip(scales).enumerate() {
        let level = nearest(id * scale).clamp(-32, 31);
        let idl = inverse(d * level as f32);
        pack(&x.map(|x| nearest_value(idl * x)), &mut out[8 + 16 * ib..]);
        let level = (level + 32) as u8;
        out[4 + ib / 2] |= (level & 15) << (4 * (ib % 2));
        high |= ((level >> 4) as u16) << (2 * ib);
    }
    out[2..4].copy_from_slice(&high.to_le_bytes());
    Some(())
}
