//! ggml's blocks taken apart, and put together: codes, scales and minima as they are.

use super::{Blocks, INTEGER, Loose, Zeros};
use crate::descriptor::{Number, Op, Role};
use crate::error::{Error, Reason};
use crate::ggml::{GgmlType, q3_scales, scale_min};
use crate::numbers::f16_to_f32;
use crate::packed::{Packed, rows_of};

/// What a block of a type gives: its codes, and for each group scale and minimum.
struct Taken<'a> {
    codes: &'a mut Vec<u8>,
    scales: &'a mut Vec<u32>,
    minima: &'a mut Vec<u32>,
}

/// Columns of a group, bits of a code, the code that is zero (none for minima), the scales' number.
fn form(ty: GgmlType) -> Option<(u64, u32, Option<i64>, Number)> {
    Some(match ty {
        GgmlType::Q4_0 => (32, 4, Some(8), Number::F16),
        GgmlType::Q5_0 => (32, 5, Some(16), Number::F16),
        GgmlType::Q8_0 => (32, 8, Some(128), Number::F16),
        GgmlType::Q4_1 => (32, 4, None, Number::F16),
        GgmlType::Q5_1 => (32, 5, None, Number::F16),
        GgmlType::Q2_K => (16, 2, None, Number::F32),
        GgmlType::Q3_K => (16, 3, Some(4), Number::F32),
        GgmlType::Q4_K => (32, 4, None, Number::F32),
        GgmlType::Q5_K => (32, 5, None, Number::F32),
        GgmlType::Q6_K => (16, 6, Some(32), Number::F32),
        _ => return None,
    })
}

pub(super) fn loosen(packed: &Packed, ty: GgmlType) -> Result<Loose, Error> {
    let bytes = packed.part(Role::Codes)?;
    let shape = packed.tensor.shape.clone();
    let mut block = vec![1; shape.len()];
    let (mut codes, mut scales, mut minima) = (Vec::new(), Vec::new(), Vec::new());
    let mut taken = Taken {
        codes: &mut codes,
        scales: &mut scales,
        minima: &mut minima,
    };
    rows_of(&shape)?;
    for one in bytes.chunks_exact(ty.bytes()) {
        take(ty, one, &mut taken);
    }
    let (group, bits, zero, element, number) = match (ty, form(ty)) {
        (GgmlType::MXFP4, _) => (32, 4, None, Number::E2m1, Number::E8m0),
        (GgmlType::NVFP4, _) => (16, 4, None, Number::E2m1, Number::E4m3),
        (_, Some((group, bits, zero, number))) => (group, bits, zero, INTEGER, number),
        _ => {
            return Err(Error::new(
                Reason::Unsupported,
                format!("{ty}'s values are not codes times scales"),
            ));
        }
    };
    if let Some(last) = block.last_mut() {
        *last = group;
    }
    let over = |codes| Blocks {
        codes,
        ..Blocks::over(&shape, &block, number)
    };
    let zero = match (element, zero) {
        (Number::E2m1, _) => Zeros::None,
        (_, Some(zero)) => Zeros::Same(zero),
        (_, None) => Zeros::Bias(over(minima)),
    };
    Ok(Loose {
        element,
        bits,
        codes,
        scale: over(scales),
        global: packed
            .global_scale()?
            .map(|scale| (scale.to_bits(), Op::Multiply)),
        zero,
        group_index: None,
        dtype: packed.tensor.dtype,
        shape,
    })
}

fn take(ty: GgmlType, block: &[u8], to: &mut Taken<'_>) {
    let half = |at: usize| u32::from(u16::from_le_bytes([byte(block, at), byte(block, at + 1)]));
    let float = |at: usize| f16_to_f32(half(at) as u16);
    match ty {
        GgmlType::Q4_0 => halves(block, 2, 0, to, half(0)),
        GgmlType::Q5_0 => halves(block, 6, word(block, 2), to, half(0)),
        GgmlType::Q4_1 => {
            halves(block, 4, 0, to, half(0));
            to.minima.push(half(2));
        }
        GgmlType::Q5_1 => {
            halves(block, 8, word(block, 4), to, half(0));
            to.minima.push(half(2));
        }
        GgmlType::MXFP4 => halves(block, 1, 0, to, u32::from(byte(block, 0))),
        GgmlType::Q8_0 => {
            to.codes
                .extend(block.iter().skip(2).map(|code| code ^ 0x80));
            to.scales.push(half(0));
        }
        GgmlType::NVFP4 => {
            for group in 0..4 {
                let at = 4 + 8 * group;
                to.codes.extend((0..8).map(|j| byte(block, at + j) & 15));
                to.codes.extend((0..8).map(|j| byte(block, at + j) >> 4));
                to.scales.push(u32::from(byte(block, group)));
            }
        }
        GgmlType::Q2_K => {
            let (d, least) = (float(80), float(82));
            for group in 0..16 {
                let (half, shift) = (group / 8, group % 8 / 2 * 2);
                let at = 16 + 32 * half + 16 * (group % 2);
                to.codes
                    .extend((0..16).map(|l| byte(block, at + l) >> shift & 3));
                let scale = byte(block, group);
                to.affine(d * f32::from(scale & 15), least * f32::from(scale >> 4));
            }
        }
        GgmlType::Q3_K => {
            let scales = q3_scales(
                block
                    .get(96..)
                    .and_then(<[u8]>::first_chunk)
                    .unwrap_or(&[0; 12]),
            );
            for (group, scale) in scales.into_iter().enumerate() {
                let (half, shift) = (group / 8, group % 8 / 2 * 2);
                let (high, at) = (16 * (group % 2), 32 + 32 * half + 16 * (group % 2));
                let code = |l| {
                    let bit = byte(block, high + l) >> (group / 2) & 1;
                    byte(block, at + l) >> shift & 3 | bit << 2
                };
                to.codes.extend((0..16).map(code));
                to.scales.push((float(108) * f32::from(scale)).to_bits());
            }
        }
        GgmlType::Q4_K | GgmlType::Q5_K => {
            let (d, least) = (float(0), float(2));
            let packed = block
                .get(4..)
                .and_then(<[u8]>::first_chunk)
                .unwrap_or(&[0; 12]);
            let fifth = ty == GgmlType::Q5_K;
            for group in 0..8 {
                let at = if fifth { 48 } else { 16 } + 32 * (group / 2);
                let code = |l| {
                    let high = if fifth {
                        byte(block, 16 + l) >> group & 1
                    } else {
                        0
                    };
                    byte(block, at + l) >> (4 * (group % 2)) & 15 | high << 4
                };
                to.codes.extend((0..32).map(code));
                let (scale, m) = scale_min(packed, group);
                to.affine(d * f32::from(scale), least * f32::from(m));
            }
        }
        GgmlType::Q6_K => {
            for group in 0..16 {
                let (half, quarter, odd) = (group / 8, group % 8 / 2, group % 2);
                let low = 64 * half + 32 * (quarter % 2) + 16 * odd;
                let high = 128 + 32 * half + 16 * odd;
                let code = |l| {
                    let low = byte(block, low + l) >> (4 * (quarter / 2)) & 15;
                    low | (byte(block, high + l) >> (2 * quarter) & 3) << 4
                };
                to.codes.extend((0..16).map(code));
                let scale = byte(block, 192 + group) as i8;
                to.scales.push((float(208) * f32::from(scale)).to_bits());
            }
        }
        _ => {}
    }
}

impl Taken<'_> {
    fn affine(&mut self, scale: f32, least: f32) {
        self.scales.push(scale.to_bits());
        self.minima.push((-least).to_bits());
    }
}

/// Sixteen bytes of nibbles in split halves, with fifth bits.
fn halves(block: &[u8], at: usize, high: u32, to: &mut Taken<'_>, scale: u32) {
    let fifth = |i: usize| ((high >> i & 1) as u8) << 4;
    to.codes
        .extend((0..16).map(|j| byte(block, at + j) & 15 | fifth(j)));
    to.codes
        .extend((0..16).map(|j| byte(block, at + j) >> 4 | fifth(j + 16)));
    to.scales.push(scale);
}

fn byte(block: &[u8], at: usize) -> u8 {
    block.get(at).copied().unwrap_or(0)
}

fn word(block: &[u8], at: usize) -> u32 {
    (0..4).fold(0, |word, i| {
        word | u32::from(byte(block, at + i)) << (8 * i)
    })
}

/// Blocks of a type from codes, scales and minima in its own groups.
pub(crate) fn blocks(
    ty: GgmlType,
    codes: &[u8],
    scales: &[u32],
    minima: &[u32],
) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(codes.len() / ty.elements() * ty.bytes());
    for (at, codes) in codes.chunks_exact(ty.elements()).enumerate() {
        let scale = |i: usize| scales.get(i).copied().unwrap_or(0);
        let half = |bits: u32| (bits as u16).to_le_bytes();
        let minimum = minima.get(at).copied().unwrap_or(0);
        let fifth = (0..32).fold(0_u32, |high, i| {
            high | u32::from(byte(codes, i) >> 4 & 1) << i
        });
        match ty {
            GgmlType::Q4_0 => bytes.extend(half(scale(at))),
            GgmlType::Q4_1 => bytes.extend([half(scale(at)), half(minimum)].concat()),
            GgmlType::Q5_0 => {
                bytes.extend(half(scale(at)));
                bytes.extend(fifth.to_le_bytes());
            }
            GgmlType::Q5_1 => {
                bytes.extend([half(scale(at)), half(minimum)].concat());
                bytes.extend(fifth.to_le_bytes());
            }
            GgmlType::MXFP4 => bytes.push(scale(at) as u8),
            GgmlType::Q8_0 => {
                bytes.extend(half(scale(at)));
                bytes.extend(codes.iter().map(|code| code ^ 0x80));
                continue;
            }
            GgmlType::NVFP4 => {
                bytes.extend((0..4).map(|i| scale(4 * at + i) as u8));
                for codes in codes.chunks_exact(16) {
                    bytes.extend((0..8).map(|j| byte(codes, j) & 15 | byte(codes, j + 8) << 4));
                }
                continue;
            }
            _ => return None,
        }
        bytes.extend((0..16).map(|j| byte(codes, j) & 15 | byte(codes, j + 16) << 4));
    }
    Some(bytes)
}
