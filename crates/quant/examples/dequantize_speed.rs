//! How fast blocks become floats on one core: what `bench/quant.py` starts and asks, a line a measurement.
//!
//! ```text
//! > dequantize Q4_K f32 32768 100     100 times the same blocks, 32768 elements
//! < 0.000123                          seconds for one
//! > fill f32 32768 100                the same output filled with one number
//! ```
//!
//! A fourth kind, `scalar`, is `dequantize` without the processor's kernels.
#![allow(clippy::disallowed_types, clippy::disallowed_methods)]

use std::error::Error;
use std::hint::black_box;
use std::io::{BufRead, Write, stdin, stdout};
use std::time::Instant;

use half::{bf16, f16};
use tonnage_quant::ggml::{
    GgmlType, Level, Stores, dequantize, dequantize_bf16, dequantize_f16, dequantize_with,
};

/// Output memory for each width, touched once and kept: pages that are new cost more than any kernel.
#[derive(Default)]
struct Buffers {
    blocks: Vec<u8>,
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
}

/// Bytes from 60 to 119: no binary16 is infinite or NaN, no power of two far from one.
fn blocks(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        60 + (state >> 57) as u8 % 60
    };
    (0..len).map(|_| next()).collect()
}

/// A slice of a multiple of 32 bytes' address, as the allocator gives large ones but for a header.
fn aligned<T: Copy + Default>(values: &mut Vec<T>, len: usize) -> &mut [T] {
    let spare = 64 / size_of::<T>();
    values.resize(len + spare, T::default());
    let start = values.as_ptr().align_offset(64);
    &mut values[start..start + len]
}

fn timed(times: u32, mut one: impl FnMut()) -> f64 {
    let begin = Instant::now();
    for _ in 0..times {
        one();
    }
    begin.elapsed().as_secs_f64() / f64::from(times)
}

fn measure(line: &str, buffers: &mut Buffers) -> Result<f64, Box<dyn Error>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["fill", "f32", elements, times] => {
            let out = aligned(&mut buffers.f32, elements.parse()?);
            Ok(timed(times.parse()?, || {
                black_box(&mut *out).fill(black_box(0.0))
            }))
        }
        [kind, name, width, elements, times] => {
            let ty = GgmlType::from_name(name).ok_or("no such type")?;
            let (elements, times) = (elements.parse()?, times.parse()?);
            let len = usize::try_from(ty.row_bytes(elements as u64)?)?;
            if buffers.blocks.len() < len {
                buffers.blocks = blocks(len);
            }
            let bytes = &buffers.blocks[..len];
            let (wide, half, brain) = (&mut buffers.f32, &mut buffers.f16, &mut buffers.bf16);
            macro_rules! run {
                ($out:expr, $call:expr) => {{
                    let out = aligned($out, elements);
                    $call(out)?;
                    timed(times, || _ = black_box($call(black_box(&mut *out))))
                }};
            }
            let scalar =
                |out: &mut [f32]| dequantize_with(Level::SCALAR, Stores::Auto, ty, bytes, out);
            Ok(match (kind, width) {
                ("scalar", "f32") => run!(wide, scalar),
                ("dequantize", "f32") => run!(wide, |out: &mut [f32]| dequantize(ty, bytes, out)),
                ("dequantize", "f16") => {
                    run!(half, |out: &mut [f16]| dequantize_f16(ty, bytes, out))
                }
                ("dequantize", "bf16") => {
                    run!(brain, |out: &mut [bf16]| dequantize_bf16(ty, bytes, out))
                }
                _ => return Err("no such measurement".into()),
            })
        }
        _ => Err("dequantize TYPE WIDTH ELEMENTS TIMES, or fill f32 ELEMENTS TIMES".into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut buffers = Buffers::default();
    for line in stdin().lock().lines() {
        let seconds = measure(&line?, &mut buffers)?;
        writeln!(stdout(), "{seconds:e}")?;
    }
    Ok(())
}
