//! A loose tensor with a form's groups, widths and numbers, or what stands against it.

use super::{lossy, none_lost, number_of, unfit};
use crate::descriptor::{Float, Number};
use crate::error::{Error, Reason};
use crate::loose::{self, Blocks, Loose, Zeros};
use crate::target::{Form, Target};

/// The tensor with the form's groups, widths and numbers.
pub(super) fn ready(loose: &Loose, form: &Form, target: &Target) -> Result<Loose, Error> {
    let mut made = loose.clone();
    let integer = form.row()?.name;
    let integer =
        !integer.starts_with("fp8") && !integer.starts_with("mx") && !integer.starts_with("nv");
    if integer != loose.is_integer() {
        return Err(unfit(format!(
            "codes are {}, {} has {}",
            kind(loose.is_integer()),
            form.name,
            kind(integer)
        )));
    }
    if !integer {
        return floats(made, form, target);
    }
    let bits = match target.bits {
        Some(bits) => bits,
        None if form.bits.contains(&loose.bits) => loose.bits,
        // Codes of a byte each may be of fewer bits.
        None => form
            .bits
            .iter()
            .copied()
            .filter(|b| *b >= loose.bits)
            .min()
            .unwrap_or(form.bits[0]),
    };
    if !form.bits.contains(&bits) {
        return Err(unfit(format!("{} has no codes of {bits} bits", form.name)));
    }
    let mlx = form.name == "mlx";
    if mlx {
        if loose.group_index.is_some() {
            return Err(ordered(form));
        }
    } else {
        made.whole_zeros()?;
    }
    made.resize(bits)?;
    if let Some(group) = target.group {
        made.regroup(group)?;
    }
    let numbers: Vec<Number> = match target.scale {
        Some(dtype) => vec![number_of(dtype)?],
        // Only numbers of MLX's own are rounded as MLX rounds; others need the room of F32.
        None if mlx && !own_biases(loose) => vec![Number::F32],
        None => form
            .scales
            .iter()
            .map(|d| number_of(*d))
            .collect::<Result<_, _>>()?,
    };
    let total = made.scale.codes.len() as u64;
    // As they are where the form has such numbers; else the first that holds all of them.
    let keep = numbers.contains(&made.scale.number) && made.scale.number != Number::F32;
    let first = if keep {
        Some((made.scale.clone(), 0))
    } else {
        None
    };
    let mut tried = first
        .into_iter()
        .chain(numbers.iter().filter_map(|n| made.scale.cast(*n)));
    let mut fewest = u64::MAX;
    let found = tried.find(|(_, lost)| {
        fewest = fewest.min(*lost);
        *lost == 0
    });
    let Some((scale, _)) = found else {
        return Err(lossy(
            fewest.min(total),
            total,
            "scales have no such number there",
        ));
    };
    made.scale = scale;
    if mlx {
        // MLX's values have the dtype of the scales.
        made.dtype = match made.scale.number {
            Number::F16 => Float::F16,
            Number::Bf16 => Float::Bf16,
            _ => Float::F32,
        };
    }
    Ok(made)
}

/// Whether a tensor has biases, and values of the dtype of its scales: as MLX's have.
fn own_biases(loose: &Loose) -> bool {
    let own = matches!(
        (loose.dtype, loose.scale.number),
        (Float::F16, Number::F16) | (Float::Bf16, Number::Bf16) | (Float::F32, Number::F32)
    );
    own && matches!(loose.zero, Zeros::Bias(_))
}

/// The refusal of groups that don't follow each other.
pub(super) fn ordered(form: &Form) -> Error {
    let text = format!(
        "groups are in another order (g_idx), which {} can't say",
        form.name
    );
    Error::new(Reason::Lossy, text)
}

fn kind(integer: bool) -> &'static str {
    if integer { "integers" } else { "floats" }
}

/// The blocks that a form of floats has over a shape.
pub(crate) fn float_blocks(form: &Form, shape: &[u64], target: &Target) -> Result<Vec<u64>, Error> {
    let axes = shape.len();
    let mut block = vec![1; axes];
    let scheme = form.row()?.name;
    match scheme {
        "fp8-tensor" => block.fill(0),
        "fp8-block" => {
            let [rows, columns] = target.block.unwrap_or([128, 128]);
            if axes < 2 {
                return Err(unfit("blocks of rows and columns need two axes".to_owned()));
            }
            block[axes - 2] = rows;
            block[axes - 1] = columns;
        }
        "fp8-row" => block[axes - 1] = 0,
        _ => block[axes - 1] = form.group as u64,
    }
    Ok(block)
}

fn floats(mut made: Loose, form: &Form, target: &Target) -> Result<Loose, Error> {
    let scheme = form.row()?.name;
    if made.bits != form.bits[0] {
        return Err(unfit(format!(
            "codes of {} bits, {} has {}",
            made.bits, form.name, form.bits[0]
        )));
    }
    let micro = scheme.starts_with("mx") || scheme.starts_with("nv");
    let mx = made.scale.number == Number::E8m0 && made.global.is_none() && made.group() == 32;
    let nv = made.scale.number == Number::E4m3 && made.group() == 16;
    if scheme.starts_with("mx") && !mx || scheme.starts_with("nv") && !nv {
        return Err(unfit(format!("scales are not those of {}", form.name)));
    }
    if scheme == "mxfp6" && made.element == Number::E3m2 {
        return Err(unfit("codes are e3m2".to_owned()));
    }
    let block = float_blocks(form, &made.shape, target)?;
    if block != made.scale.block {
        let (scale, lost) = made.scale.reblock(&made.shape, &block);
        none_lost(lost, scale.codes.len() as u64, "blocks have several scales")?;
        made.scale = scale;
    }
    if let Some(element) = target.element.filter(|_| !micro) {
        made.change_float(element)?;
    }
    if !micro {
        let number = match target.scale {
            Some(dtype) => number_of(dtype)?,
            None => made.scale.number,
        };
        let (scale, lost) = made
            .scale
            .cast(number)
            .ok_or_else(|| unfit("such scales".to_owned()))?;
        none_lost(
            lost,
            scale.codes.len() as u64,
            "scales have no such number there",
        )?;
        made.scale = scale;
    }
    Ok(made)
}

impl Loose {
    /// Codes of another width around the same zero.
    pub(crate) fn resize(&mut self, bits: u32) -> Result<(), Error> {
        if bits == self.bits {
            return Ok(());
        }
        let shift = match self.zero {
            Zeros::Bias(_) => 0,
            _ => (1_i64 << (self.bits - 1)) - (1_i64 << (bits - 1)),
        };
        let mut lost = 0;
        for code in &mut self.codes {
            let moved = i64::from(*code) - shift;
            lost += u64::from(moved < 0 || moved >= 1 << bits);
            *code = moved as u8;
        }
        none_lost(
            lost,
            self.codes.len() as u64,
            &format!("codes don't fit {bits} bits"),
        )?;
        match &mut self.zero {
            Zeros::Same(zero) => *zero -= shift,
            Zeros::Each(zeros) => zeros.iter_mut().for_each(|zero| *zero -= shift),
            _ => {}
        }
        self.bits = bits;
        Ok(())
    }

    /// Groups of so many columns, -1 for one: finer ones repeat a scale, coarser ones need equal ones.
    pub(crate) fn regroup(&mut self, group: i64) -> Result<(), Error> {
        let columns = self.shape.last().copied().unwrap_or(0);
        let group = match u64::try_from(group) {
            Ok(size) if size > 0 && size < columns => size,
            Ok(0) => return Err(Error::new(Reason::Parameter, "groups of 0 columns")),
            _ => 0,
        };
        let mut block = self.scale.block.clone();
        let Some(last) = block.last_mut() else {
            return Ok(());
        };
        if *last == group {
            return Ok(());
        }
        if self.group_index.is_some() {
            return Err(unfit(
                "groups in another order can't be of another size".to_owned(),
            ));
        }
        *last = group;
        let what = "groups would have several scales or zero points";
        let old = self.scale.clone();
        let (scale, lost) = old.reblock(&self.shape, &block);
        none_lost(lost, scale.codes.len() as u64, what)?;
        self.scale = scale;
        self.zero = match &self.zero {
            Zeros::Each(zeros) => {
                let as_codes = Blocks {
                    codes: zeros.iter().map(|zero| *zero as u32).collect(),
                    ..old
                };
                let (moved, lost) = as_codes.reblock(&self.shape, &block);
                none_lost(lost, moved.codes.len() as u64, what)?;
                Zeros::Each(
                    moved
                        .codes
                        .iter()
                        .map(|code| i64::from(*code as i32))
                        .collect(),
                )
            }
            Zeros::Bias(bias) => {
                let (moved, lost) = bias.reblock(&self.shape, &block);
                none_lost(lost, moved.codes.len() as u64, what)?;
                Zeros::Bias(moved)
            }
            other => other.clone(),
        };
        Ok(())
    }

    /// Zero points that are codes: a bias is one where it is a whole number of steps.
    pub(crate) fn whole_zeros(&mut self) -> Result<(), Error> {
        let Zeros::Bias(bias) = &self.zero else {
            return Ok(());
        };
        let (mut lost, mut zeros) = (0, Vec::with_capacity(bias.codes.len()));
        for at in 0..bias.codes.len() {
            let (scale, bias) = (f64::from(self.scale.get(at)), f64::from(bias.get(at)));
            let zero = (-bias / scale).round_ties_even();
            let exact = -zero * scale == bias && zero.abs() < f64::from(1 << 16);
            match (scale == 0.0 && bias == 0.0, exact) {
                // All values of the group are zero, whatever its zero point.
                (true, _) => zeros.push(1 << (self.bits - 1)),
                (_, true) => zeros.push(zero as i64),
                _ => {
                    lost += 1;
                    zeros.push(0);
                }
            }
        }
        none_lost(
            lost,
            zeros.len() as u64,
            "biases are no whole number of steps",
        )?;
        self.zero = Zeros::Each(zeros);
        Ok(())
    }

    /// Biases in place of zero points, as numbers of this kind.
    pub(super) fn biases(&self, number: Number) -> Result<Blocks, Error> {
        if let Zeros::Bias(bias) = &self.zero {
            let (made, lost) = bias
                .cast(number)
                .ok_or_else(|| unfit("such biases".to_owned()))?;
            none_lost(
                lost,
                made.codes.len() as u64,
                "biases have no such number there",
            )?;
            return Ok(made);
        }
        let mut made = Blocks {
            number,
            codes: Vec::with_capacity(self.scale.codes.len()),
            ..self.scale.clone()
        };
        let mut lost = 0;
        for at in 0..self.scale.codes.len() {
            let zero = self.zero_at(at).unwrap_or(0);
            let exact = -(zero as f64) * f64::from(self.scale.get(at));
            let code = loose::narrowest(number, exact as f32);
            lost += u64::from(f64::from(loose::widened(number, code)) != exact);
            made.codes.push(code);
        }
        none_lost(
            lost,
            made.codes.len() as u64,
            "biases have no such number there",
        )?;
        Ok(made)
    }

    /// The other reading of 8-bit floats: FNUZ has half the value for the same bits, and no negative zero.
    fn change_float(&mut self, element: Number) -> Result<(), Error> {
        use Number::{E4m3, E4m3Fnuz, E5m2, E5m2Fnuz};
        let (factor, fnuz) = match (self.element, element) {
            (a, b) if a == b => return Ok(()),
            (E4m3, E4m3Fnuz) | (E5m2, E5m2Fnuz) => (2.0, true),
            (E4m3Fnuz, E4m3) | (E5m2Fnuz, E5m2) => (0.5, false),
            _ => {
                return Err(unfit(format!(
                    "{:?} is no other reading of {element:?}",
                    self.element
                )));
            }
        };
        let five = matches!(self.element, E5m2 | E5m2Fnuz);
        let (mut lost, total) = (0, self.codes.len() as u64);
        for code in &mut self.codes {
            let special = if five {
                *code & 0x7F > 0x7C
            } else {
                *code & 0x7F == 0x7F
            };
            *code = match (fnuz, *code) {
                (true, 0x80) => 0,
                (true, _) if special => 0x80,
                (true, 0x7C | 0xFC) if five => {
                    lost += 1;
                    *code
                }
                (false, 0x80) => 0x7F,
                (false, code) if special || (five && code & 0x7F == 0x7C) => {
                    lost += 1;
                    code
                }
                (_, code) => code,
            };
        }
        none_lost(lost, total, "codes have no such number there")?;
        let mut lost = 0;
        for at in 0..self.scale.codes.len() {
            let old = self.scale.get(at);
            let new = old * factor;
            let code = loose::narrowest(self.scale.number, new);
            let exact = loose::widened(self.scale.number, code) / factor == old;
            lost += u64::from(!exact && !old.is_nan());
            self.scale.codes[at] = match self.scale.number {
                Number::E8m0 => u32::from(crate::numbers::f32_to_e8m0(new)),
                _ => code,
            };
        }
        none_lost(
            lost,
            self.scale.codes.len() as u64,
            "scales have no such number there",
        )?;
        self.element = element;
        Ok(())
    }
}
