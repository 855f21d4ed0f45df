//! ggml's blocks of a loose tensor.

use std::collections::BTreeMap;

use tonnage_format::Dtype;

use super::{Kept, lossy, none_lost, unfit};
use crate::descriptor::{Number, Op, Role};
use crate::error::{Error, Reason};
use crate::ggml::GgmlType;
use crate::loose::{self, Loose};
use crate::map::QTensor;
use crate::packed::Packed;
use crate::scheme::Part;

/// ggml's blocks of a type that holds what the tensor has.
pub(super) fn blocks(name: &str, loose: &Loose, ty: GgmlType) -> Result<(Packed, Kept), Error> {
    let mut made = loose.clone();
    let columns = loose.shape.last().copied().unwrap_or(0);
    let row = ty.row_bytes(columns).map_err(crate::packed::from_ggml)?;
    if loose.group_index.is_some() {
        let text = "groups are in another order (g_idx), which no block can say";
        return Err(Error::new(Reason::Lossy, text));
    }
    let (bits, middle) = match ty {
        GgmlType::Q4_0 => (4, true),
        GgmlType::Q5_0 => (5, true),
        GgmlType::Q8_0 => (8, true),
        GgmlType::Q4_1 => (4, false),
        GgmlType::Q5_1 => (5, false),
        GgmlType::MXFP4 | GgmlType::NVFP4 => return micro(name, made, ty, row),
        _ => return Err(unfit(format!("{ty} has scales of its own kind"))),
    };
    if !made.is_integer() {
        return Err(unfit(format!("codes are floats, {ty} has integers")));
    }
    made.regroup(32)?;
    if columns == 32 {
        // One group of 32 columns.
        made.scale
            .block
            .iter_mut()
            .for_each(|size| *size = (*size).max(1));
    }
    let total = made.scale.codes.len() as u64;
    let (scale, lost) = made
        .scale
        .cast(Number::F16)
        .ok_or_else(|| unfit("such scales".to_owned()))?;
    none_lost(lost, total, "scales are no F16")?;
    let minima = if middle {
        made.whole_zeros()?;
        made.resize(bits)?;
        let zero = 1_i64 << (bits - 1);
        let off = (0..made.scale.codes.len()).filter(|at| made.zero_at(*at) != Some(zero));
        none_lost(
            off.count() as u64,
            total,
            "zero points are not in the middle",
        )?;
        Vec::new()
    } else {
        made.resize(bits)?;
        made.biases(Number::F16)?.codes
    };
    let bytes = loose::ggml::blocks(ty, &made.codes, &scale.codes, &minima);
    finish(name, loose, ty, row, bytes, None).map(|packed| (packed, Kept::Codes))
}

fn micro(name: &str, made: Loose, ty: GgmlType, row: u64) -> Result<(Packed, Kept), Error> {
    let nvidia = ty == GgmlType::NVFP4;
    let number = if nvidia { Number::E4m3 } else { Number::E8m0 };
    let group = if nvidia { 16 } else { 32 };
    if made.element != Number::E2m1 || made.scale.number != number || made.group() != group {
        return Err(unfit(format!("codes or scales are not those of {ty}")));
    }
    let total = made.scale.codes.len() as u64;
    let bad = made.scale.codes.iter().filter(|code| match nvidia {
        // Signs are not looked at, and what is a NaN elsewhere is zero.
        true => **code >= 0x7F,
        false => **code == 255,
    });
    none_lost(
        bad.count() as u64,
        total,
        "scales are negative or NaN, which ggml reads as something else",
    )?;
    let global = match (made.global, nvidia) {
        (None, _) => None,
        (Some((bits, Op::Multiply)), true) => Some(bits),
        (Some(_), _) => {
            return Err(lossy(
                1,
                1,
                "tensors' scales are divided by, ggml multiplies",
            ));
        }
    };
    let bytes = loose::ggml::blocks(ty, &made.codes, &made.scale.codes, &[]);
    // A tensor's scale is multiplied in at another place: values may differ in their last bit.
    finish(name, &made, ty, row, bytes, global).map(|packed| (packed, Kept::Codes))
}

fn finish(
    name: &str,
    loose: &Loose,
    ty: GgmlType,
    row: u64,
    bytes: Option<Vec<u8>>,
    global: Option<u32>,
) -> Result<Packed, Error> {
    let bytes = bytes.ok_or_else(|| unfit(format!("{ty} is not written")))?;
    let mut shape = loose.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = row;
    }
    let part = Part {
        name: name.to_owned(),
        dtype: Dtype::U8,
        shape,
    };
    let mut tensor = QTensor::ggml_of(name, ty, part)?;
    let mut parts = BTreeMap::from([(Role::Codes, bytes)]);
    if let Some(bits) = global {
        let scale = Part {
            name: format!("{}.scale", name.strip_suffix(".weight").unwrap_or(name)),
            dtype: Dtype::F32,
            shape: vec![1],
        };
        tensor.parts.insert(Role::GlobalScale, scale);
        parts.insert(Role::GlobalScale, bits.to_le_bytes().to_vec());
    }
    tensor.dtype = loose.dtype;
    Packed::new(tensor, parts)
}
