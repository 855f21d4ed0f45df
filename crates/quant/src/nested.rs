//! bitsandbytes' 4-bit code books: quantised, and nested scales taken apart.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tonnage_format::Dtype;

use crate::descriptor::{Float, Role};
use crate::error::{Error, Reason};
use crate::interpret::{Bytes, field_codes, number_of};
use crate::map::{Meaning, QTensor};
use crate::numbers::f16_to_f32;
use crate::packed::{Packed, rows_of, too_large};
use crate::scheme::{Param, Params, Part, Parts, Scheme};
use crate::target::{Form, Target};

/// The entries of NF4.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

fn floats(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn form() -> Result<&'static Form, Error> {
    Form::find("bnb4").ok_or_else(too_large)
}

fn row() -> Result<&'static Scheme, Error> {
    form()?.row()
}

pub(crate) fn quantize(
    name: &str,
    values: &[f32],
    shape: &[u64],
    dtype: Float,
    target: &Target,
) -> Result<Packed, Error> {
    let block = match target.group.unwrap_or(64) {
        size @ (64 | 128 | 256 | 512 | 1024 | 2048 | 4096) => size as usize,
        size => {
            let text = format!("blocks of {size}, a power of two from 64 to 4096 is needed");
            return Err(Error::new(Reason::Parameter, text));
        }
    };
    rows_of(shape)?;
    let amax = |values: &[f32]| values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    let scales: Vec<f32> = values.chunks(block).map(amax).collect();
    let code = |value: f32| -> u8 {
        // Halfway between two entries the lower one is taken.
        NF4.windows(2)
            .filter(|pair| value > (pair[0] + pair[1]) / 2.0)
            .count() as u8
    };
    let mut codes = Vec::with_capacity(values.len());
    for (values, scale) in values.chunks(block).zip(&scales) {
        let step = if *scale == 0.0 { 0.0 } else { 1.0 / scale };
        codes.extend(values.iter().map(|value| code(value * step)));
    }
    let nibbles = codes
        .chunks(2)
        .map(|two| two[0] << 4 | two.get(1).copied().unwrap_or(0));
    let dtype_name = match dtype {
        Float::F32 => "float32",
        Float::F16 => "float16",
        Float::Bf16 => "bfloat16",
    };
    let state =
        json!({"quant_type": "nf4", "blocksize": block, "dtype": dtype_name, "shape": shape});
    let bytes = BTreeMap::from([
        (Role::Codes, nibbles.collect::<Vec<u8>>()),
        (Role::Scale, floats(&scales)),
        (Role::Table, floats(&NF4)),
        (Role::State, state.to_string().into_bytes()),
    ]);
    let params = Params::of([
        ("block", Param::Int(block as i64)),
        (
            "shape",
            Param::List(shape.iter().map(|len| *len as i64).collect()),
        ),
        ("dtype", Param::Text(dtype.name().to_owned())),
    ]);
    let mut parts = Parts::new();
    for (role, bytes) in &bytes {
        let len = bytes.len() as u64;
        let (dtype, shape) = match role {
            Role::Codes => (Dtype::U8, vec![len, 1]),
            Role::State => (Dtype::U8, vec![len]),
            _ => (Dtype::F32, vec![len / 4]),
        };
        let name = form()?.part_name(name, *role).ok_or_else(too_large)?;
        parts.insert(*role, Part { name, dtype, shape });
    }
    let mut tensor = QTensor::preset_of(name, row()?, params, parts)?;
    tensor.dtype = dtype;
    Packed::new(tensor, bytes)
}

/// Scales of a nested tensor as F32: the numbers that the nested ones stand for, so that values stay as they are.
///
/// # Errors
/// The tensor is no nested one of bitsandbytes, or its parts don't fit.
pub(crate) fn flatten(packed: &Packed) -> Result<Packed, Error> {
    let unfit = || Error::new(Reason::Unsupported, "no nested scales of bitsandbytes");
    let (Meaning::Preset(scheme, params), true) = (
        &packed.tensor.meaning,
        packed.bytes.contains_key(&Role::NestedScale),
    ) else {
        return Err(unfit());
    };
    if scheme.name != "bnb4" {
        return Err(unfit());
    }
    let meaning = packed.tensor.describe()?;
    let view = packed.view();
    let scale = meaning.scales.first().ok_or_else(unfit)?;
    let nested = scale.times.as_ref().ok_or_else(unfit)?;
    let table = packed.part(Role::NestedTable)?.as_chunks::<4>().0;
    let blocks = scale.field.layout.shape.clone();
    let groups = numbers(nested, &view)?;
    let per = nested.block.last().copied().unwrap_or(1)
        / scale.field.block.last().copied().unwrap_or(1).max(1);
    let codes = field_codes(&scale.field, &blocks, &view)?;
    let one = |(at, code): (usize, &u32)| {
        let entry = table
            .get(*code as usize)
            .map_or(f32::NAN, |four| f32::from_le_bytes(*four));
        let group = groups
            .get(at / (per.max(1) as usize))
            .copied()
            .unwrap_or(f32::NAN);
        // In the interpreter's order.
        let value = entry * group;
        if scale.plus != 0.0 {
            value + scale.plus
        } else {
            value
        }
    };
    let scales: Vec<f32> = codes.iter().enumerate().map(one).collect();
    let mut made = packed.clone();
    let mut params = params.clone();
    params.0.retain(|key, _| !key.starts_with("nested_"));
    params.0.insert(
        "dtype".to_owned(),
        Param::Text(packed.tensor.dtype.name().to_owned()),
    );
    for role in [Role::NestedScale, Role::NestedTable] {
        made.bytes.remove(&role);
        made.tensor.parts.remove(&role);
    }
    if let Some(part) = made.tensor.parts.get_mut(&Role::Scale) {
        part.dtype = Dtype::F32;
    }
    made.bytes.insert(Role::Scale, floats(&scales));
    if let Some(state) = made.bytes.get_mut(&Role::State) {
        let mut said: Value = serde_json::from_slice(state)
            .map_err(|e| Error::new(Reason::Size, format!("the tensor's state: {e}")))?;
        if let Some(said) = said.as_object_mut() {
            said.retain(|key, _| !key.starts_with("nested_"));
        }
        *state = said.to_string().into_bytes();
        if let Some(part) = made.tensor.parts.get_mut(&Role::State) {
            part.shape = vec![state.len() as u64];
        }
    }
    let mut tensor = QTensor::preset_of(&packed.tensor.name, scheme, params, made.tensor.parts)?;
    tensor.dtype = packed.tensor.dtype;
    Packed::new(tensor, made.bytes)
}

fn numbers(field: &crate::descriptor::Field, view: &Bytes<'_>) -> Result<Vec<f32>, Error> {
    let codes = field_codes(field, &field.layout.shape.clone(), view)?;
    let wide = field.layout.bits();
    let read = |code: &u32| match wide {
        16 => f16_to_f32(*code as u16),
        _ => number_of(field.number, *code, wide),
    };
    Ok(codes.iter().map(read).collect())
}
