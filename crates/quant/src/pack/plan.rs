//! Dtypes and shapes of a form's parts, and the parameters that say the rest.

use std::collections::BTreeMap;

use tonnage_format::Dtype;

use super::ready::ordered;
use super::{dtype_of, unfit};
use crate::descriptor::{Number, Role};
use crate::error::Error;
use crate::loose::{Loose, Zeros, counts};
use crate::packed::{rows_of, too_large};
use crate::scheme::{Param, Params};
use crate::target::{Form, Target};

/// Dtype and shape of each part.
type Wanted = Vec<(Role, Dtype, Vec<u64>)>;

/// Parameters and parts of a form for a tensor.
pub(super) fn plan(loose: &Loose, form: &Form, target: &Target) -> Result<(Params, Wanted), Error> {
    let scheme = form.row()?;
    let shape = &loose.shape;
    let (_, columns) = rows_of(shape)?;
    let bits = u64::from(loose.bits);
    let mut params = BTreeMap::new();
    let mut put = |name: &str, value: Param| {
        if scheme.params.contains(&name) {
            params.insert(name.to_owned(), value);
        }
    };
    put("bits", Param::Int(loose.bits.into()));
    let group = match loose.scale.block.last() {
        None | Some(0) => columns,
        Some(size) => *size,
    };
    let fine = |what: &str, holds: bool| match holds {
        true => Ok(()),
        false => Err(unfit(format!("{shape:?} in {}: {what}", form.name))),
    };
    let scale = dtype_of(loose.scale.number);
    let wide = |count: u64| {
        count
            .checked_mul(bits)
            .map(|n| n / 32)
            .ok_or_else(too_large)
    };
    let mut parts = Vec::new();
    if scheme.name.starts_with("mx") && scheme.name != "mlx-affine" || scheme.name.starts_with("nv")
    {
        micro_plan(loose, form, &mut parts)?;
        if form.swizzled {
            put("scale_layout", Param::Text("swizzle_128x4".to_owned()));
        }
        return Ok((Params(params), parts));
    }
    if scheme.name.starts_with("fp8") {
        let [rows, inner] = target.block.unwrap_or([128, 128]).map(|n| n as i64);
        put("block", Param::List(vec![rows, inner]));
        let scales = match scheme.name {
            "fp8-tensor" => Vec::new(),
            _ => loose.scale.shape.clone(),
        };
        let scale = if loose.scale.number == Number::E8m0 {
            Dtype::F8_E8M0
        } else {
            scale
        };
        parts.push((Role::Codes, dtype_of(loose.element), shape.clone()));
        parts.push((Role::Scale, scale, scales));
        return Ok((Params(params), parts));
    }
    let grid = loose.scale.shape.clone();
    put(
        "group",
        Param::Int(if loose.group_index.is_some() {
            -1
        } else {
            group as i64
        }),
    );
    if scheme.name == "mlx-affine" {
        fine(
            "rows are no whole words",
            (columns * bits).is_multiple_of(32),
        )?;
        let (mut words, lead) = (shape.clone(), shape.len() - 1);
        words[lead] = wide(columns)?;
        parts.push((Role::Codes, Dtype::U32, words));
        parts.push((Role::Scale, scale, grid.clone()));
        parts.push((Role::Zero, scale, grid));
        return Ok((Params(params), parts));
    }
    let (&[out, inner], &[_, groups]) = (&shape[..], &grid[..]) else {
        return Err(unfit(format!(
            "{} has matrices, this is {shape:?}",
            form.name
        )));
    };
    let index = loose.group_index.is_some();
    let in_order = |form: &Form| match index {
        true => Err(ordered(form)),
        false => Ok(()),
    };
    match scheme.name {
        "gptq" | "gptq-v2" | "gptq-planar" => {
            let words = if 32 % bits == 0 && scheme.name != "gptq-planar" {
                32 / bits
            } else {
                32
            };
            fine(
                "rows or columns are no whole words",
                inner % words == 0 && out % words == 0,
            )?;
            parts.push((Role::Codes, Dtype::I32, vec![wide(inner)?, out]));
            parts.push((Role::Zero, Dtype::I32, vec![groups, wide(out)?]));
            parts.push((Role::Scale, scale, vec![groups, out]));
            parts.push((Role::GroupIndex, Dtype::I32, vec![inner]));
            if let Some(wrap) = &target.zero_wrap {
                put("zero_wrap", Param::Text(wrap.clone()));
            }
        }
        "awq-gemm" => {
            in_order(form)?;
            fine("outputs are no multiple of 8", out % 8 == 0)?;
            parts.push((Role::Codes, Dtype::I32, vec![inner, out / 8]));
            parts.push((Role::Zero, Dtype::I32, vec![groups, out / 8]));
            parts.push((Role::Scale, scale, vec![groups, out]));
        }
        "awq-gemv" | "awq-gemv-fast" => {
            in_order(form)?;
            let fast = scheme.name == "awq-gemv-fast";
            let (down, along) = if fast { (4, 64) } else { (1, 8) };
            fine(
                "rows or columns are no whole words",
                out % down == 0 && inner % along == 0,
            )?;
            let words = padded_groups(groups, group);
            if fast {
                parts.push((Role::Codes, Dtype::I16, vec![out / 4, inner]));
                parts.push((Role::Zero, Dtype::F16, vec![words * 8, out]));
                parts.push((Role::Scale, Dtype::F16, vec![words * 8, out]));
            } else {
                fine(
                    "groups of 32, 64, 128 or 256 are needed",
                    [32, 64, 128, 256].contains(&group),
                )?;
                parts.push((Role::Codes, Dtype::I32, vec![out, inner / 8]));
                parts.push((Role::Zero, Dtype::I32, vec![out, words]));
                parts.push((Role::Scale, scale, vec![out, words * 8]));
            }
        }
        "marlin" => {
            in_order(form)?;
            fine(
                "tiles of 16 × 64 are needed",
                out % 64 == 0 && inner % 16 == 0,
            )?;
            parts.push((Role::Codes, Dtype::I32, vec![inner / 16, out * 2]));
            parts.push((Role::Scale, scale, vec![groups, out]));
        }
        "ct-pack-dense" | "ct-pack-word" => {
            let dense = scheme.name == "ct-pack-dense";
            let words = |n: u64| match dense {
                true => (n * bits).div_ceil(32),
                false => n.div_ceil(32 / bits),
            };
            put("shape", Param::List(vec![out as i64, inner as i64]));
            parts.push((Role::Codes, Dtype::I32, vec![out, words(inner)]));
            parts.push((Role::Scale, scale, grid.clone()));
            parts.push((Role::Shape, Dtype::I64, vec![2]));
            if asymmetric(loose, target) {
                parts.push((Role::Zero, Dtype::I32, vec![words(out), groups]));
            }
            if index {
                parts.push((Role::GroupIndex, Dtype::I32, vec![inner]));
            }
        }
        "ct-int" => {
            in_order(form)?;
            parts.push((Role::Codes, Dtype::I8, shape.clone()));
            parts.push((Role::Scale, scale, grid.clone()));
            if asymmetric(loose, target) {
                parts.push((Role::Zero, Dtype::I8, grid.clone()));
            }
        }
        other => return Err(unfit(format!("{other} is not written from codes"))),
    }
    Ok((Params(params), parts))
}

/// Words of a row of zero points, as AutoAWQ pads them.
fn padded_groups(groups: u64, group: u64) -> u64 {
    let several = match group {
        128.. => 1,
        64.. => 2,
        _ => 4,
    };
    groups.div_ceil(8).next_multiple_of(several)
}

/// Whether zero points say something.
pub(super) fn asymmetric(loose: &Loose, target: &Target) -> bool {
    let middle = 1_i64 << (loose.bits - 1);
    let each = match &loose.zero {
        Zeros::Same(zero) => *zero != middle,
        Zeros::Each(zeros) => zeros.iter().any(|zero| *zero != middle),
        _ => false,
    };
    each || target.symmetric == Some(false)
}

fn micro_plan(loose: &Loose, form: &Form, parts: &mut Wanted) -> Result<(), Error> {
    let shape = &loose.shape;
    let columns = shape.last().copied().unwrap_or(0);
    let last = shape.len() - 1;
    let size = form.codes.bitsize() as u64;
    let mut codes = shape.clone();
    let bits = columns
        .checked_mul(u64::from(loose.bits))
        .ok_or_else(too_large)?;
    let per = if form.codes == Dtype::F4 { 4 } else { size };
    if !bits.is_multiple_of(per) || form.blocked && columns % 32 != 0 {
        return Err(unfit(format!(
            "rows of {columns} are no whole {}",
            form.codes
        )));
    }
    codes[last] = bits / per;
    if form.blocked {
        codes[last] = columns / 32;
        codes.push(16);
    }
    let dtype = match loose.element {
        Number::E5m2 if form.codes == Dtype::F8_E4M3 => Dtype::F8_E5M2,
        _ => form.codes,
    };
    parts.push((Role::Codes, dtype, codes));
    let grid = counts(shape, &loose.scale.block);
    let grid = match (form.swizzled, &grid[..]) {
        (false, _) => grid,
        // As torchao has them: 32 rows of 16 bytes for each tile of 128 × 4.
        (true, [rows, blocks]) => vec![rows.div_ceil(128) * 32, blocks.div_ceil(4) * 16],
        _ => return Err(unfit("swizzled scales of another than a matrix".to_owned())),
    };
    parts.push((Role::Scale, form.scales[0], grid));
    if loose.global.is_some() {
        let axes = if form.scheme.starts_with("nvfp4-div") {
            vec![1]
        } else {
            Vec::new()
        };
        parts.push((Role::GlobalScale, Dtype::F32, axes));
    }
    Ok(())
}
