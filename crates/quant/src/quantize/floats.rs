//! Small floats: FP8, MX and NVFP4.

use super::{each, over_blocks};
use crate::descriptor::{Float, Number, Op};
use crate::error::{Error, Reason};
use crate::loose::{Blocks, Loose, Zeros, narrowest, widened};
use crate::numbers::{
    Overflow, e4m3fn_to_f32, f32_to_e2m1, f32_to_e2m3, f32_to_e4m3fn, f32_to_e4m3fnuz, f32_to_e5m2,
    f32_to_e5m2fnuz, f32_to_e8m0,
};
use crate::pack::{float_blocks, number_of};
use crate::target::{Form, Target};

/// The nearest code, the largest for what lies beyond.
fn encode(element: Number, value: f32) -> u8 {
    match element {
        Number::E2m1 => f32_to_e2m1(value),
        Number::E2m3 => f32_to_e2m3(value),
        Number::E5m2 => f32_to_e5m2(value, Overflow::Saturate),
        Number::E4m3Fnuz => f32_to_e4m3fnuz(value, Overflow::Saturate),
        Number::E5m2Fnuz => f32_to_e5m2fnuz(value, Overflow::Saturate),
        _ => f32_to_e4m3fn(value, Overflow::Saturate),
    }
}

/// The largest number, and the exponent of the largest power of two.
fn largest(element: Number) -> (f32, i32) {
    match element {
        Number::E2m1 => (6.0, 2),
        Number::E2m3 => (7.5, 2),
        Number::E5m2 | Number::E5m2Fnuz => (57344.0, 15),
        Number::E4m3Fnuz => (240.0, 7),
        _ => (448.0, 8),
    }
}

pub(super) fn loose(
    values: &[f32],
    shape: &[u64],
    dtype: Float,
    form: &Form,
    target: &Target,
) -> Result<Loose, Error> {
    let scheme = form.row()?.name;
    let element = match (form.bits[0], target.element) {
        (4, _) => Number::E2m1,
        (6, _) => Number::E2m3,
        (_, Some(element)) => element,
        _ => Number::E4m3,
    };
    if let Some(bits) = target.bits.filter(|bits| *bits != form.bits[0]) {
        let text = format!(
            "{} has codes of {} bits, not {bits}",
            form.name, form.bits[0]
        );
        return Err(Error::new(Reason::Parameter, text));
    }
    let block = float_blocks(form, shape, target)?;
    let places = Blocks::over(shape, &block, Number::F32);
    let limits = over_blocks(shape, &places, values, 0.0_f32, |most, v| most.max(v.abs()));
    let (number, codes, steps, global) = if scheme.starts_with("mx") {
        let scales: Vec<u32> = limits
            .iter()
            .map(|amax| power(*amax, largest(element).1))
            .collect();
        let steps = scales.iter().map(|code| f64::from(*code) - 127.0);
        let steps: Vec<f64> = steps.map(|exponent| exponent.exp2()).collect();
        (Number::E8m0, scales, steps, None)
    } else if scheme.starts_with("nv") {
        nvfp4(&limits, scheme == "nvfp4-div")
    } else {
        let number = target.scale.map_or(Ok(Number::F32), number_of)?;
        let mut scales = Vec::with_capacity(limits.len());
        for amax in &limits {
            let exact = amax / largest(element).0;
            let code = match (number, *amax == 0.0) {
                (Number::E8m0, _) => {
                    // The power of two above, so that nothing is cut.
                    let up = f32::from_bits(
                        (exact.max(f32::MIN_POSITIVE).to_bits() + 0x7F_FFFF) & 0xFF80_0000,
                    );
                    u32::from(f32_to_e8m0(up))
                }
                (_, true) => narrowest(number, 1.0),
                _ => narrowest(number, exact).max(1),
            };
            if !widened(number, code).is_finite() {
                let text = format!("a scale of {exact} is too large for {number:?}");
                return Err(Error::new(Reason::Usage, text));
            }
            scales.push(code);
        }
        let steps = scales.iter().map(|code| f64::from(widened(number, *code)));
        let steps = steps.collect();
        (number, scales, steps, None)
    };
    let mut made = Vec::with_capacity(values.len());
    each(shape, &places, values, |at, value| {
        let step = steps.get(at).copied().unwrap_or(1.0);
        made.push(encode(element, (f64::from(value) / step) as f32));
    });
    Ok(Loose {
        shape: shape.to_vec(),
        element,
        bits: form.bits[0],
        codes: made,
        scale: Blocks {
            number,
            codes,
            ..places
        },
        global,
        zero: Zeros::None,
        group_index: None,
        dtype,
    })
}

/// The power of two of a block, as an e8m0.
fn power(amax: f32, most: i32) -> u32 {
    if amax == 0.0 {
        return 0;
    }
    // Subnormal numbers count as the least power: their exponent is far below any scale.
    let exponent = (amax.to_bits() >> 23) as i32 - 127;
    (exponent - most + 127).clamp(0, 254) as u32
}

type Scaled = (Number, Vec<u32>, Vec<f64>, Option<(u32, Op)>);

/// Scales of blocks, and of the tensor: multiplied by, or divided by.
fn nvfp4(limits: &[f32], divide: bool) -> Scaled {
    const MOST: f32 = 6.0 * 448.0;
    let amax = limits.iter().fold(0.0_f32, |most, amax| most.max(*amax));
    let mut whole = if divide { MOST / amax } else { amax / MOST };
    if amax == 0.0 || !whole.is_finite() || whole == 0.0 {
        whole = 1.0;
    }
    let scale = |amax: &f32| {
        if *amax == 0.0 {
            // 1, as Model Optimizer has it.
            return 0x38;
        }
        let exact = if divide {
            whole * (amax / 6.0)
        } else {
            amax / 6.0 / whole
        };
        u32::from(f32_to_e4m3fn(exact, Overflow::Saturate).max(1))
    };
    let codes: Vec<u32> = limits.iter().map(scale).collect();
    let step = |code: &u32| {
        let scale = f64::from(e4m3fn_to_f32(*code as u8));
        match divide {
            true => scale / f64::from(whole),
            false => scale * f64::from(whole),
        }
    };
    let steps = codes.iter().map(step).collect();
    let op = if divide { Op::Divide } else { Op::Multiply };
    (Number::E4m3, codes, steps, Some((whole.to_bits(), op)))
}
