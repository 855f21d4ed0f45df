//! compressed-tensors' integers: packed into 32-bit words, or one a byte.
//!
//! `weight_packed` I32 `[out, words]` holds codes plus 2^(b−1). Since version 0.18 they are a stream of bits ("dense"); before,
//! each word held as many whole codes as fit ("word"), under the same format name. Zero points are packed along the outputs:
//! `weight_zero_point` I32 `[out·b/32, groups]`. The logical shape is a tensor of its own, since packing may pad.

use tonnage_format::Dtype;

use super::{bits, group, in_words, optional, plain, required, times};
use crate::descriptor::{Descriptor, Element, Field, Number, Role, Rule, Zero};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane, Stream, digit};
use crate::scheme::{Params, PartRow, Parts, Scheme, dtype_of, needs, typed};

const SCALES: &[Dtype] = &[Dtype::F16, Dtype::BF16, Dtype::F32];
const PARTS: &[PartRow] = &[
    required(Role::Codes, &["weight_packed"]),
    required(Role::Scale, &["weight_scale"]),
    optional(Role::Zero, &["weight_zero_point"]),
    optional(Role::GroupIndex, &["weight_g_idx"]),
    optional(Role::Shape, &["weight_shape"]),
];

/// A stream of bits.
pub(crate) const PACK_DENSE: Scheme = Scheme {
    name: "ct-pack-dense",
    version: 1,
    title: "compressed-tensors pack-quantized, a stream of bits",
    parts: PARTS,
    params: &["bits", "group", "shape", "dtype"],
    expand: |params, parts| packed(params, parts, true),
};

/// Whole codes in words.
pub(crate) const PACK_WORD: Scheme = Scheme {
    name: "ct-pack-word",
    title: "compressed-tensors pack-quantized before 0.18, whole codes in words",
    expand: |params, parts| packed(params, parts, false),
    ..PACK_DENSE
};

/// One code a byte.
pub(crate) const INT: Scheme = Scheme {
    name: "ct-int",
    title: "compressed-tensors int-quantized, one code a byte",
    parts: &[
        required(Role::Codes, &["weight", "_weight_qdata"]),
        required(Role::Scale, &["weight_scale", "_weight_scale"]),
        optional(Role::Zero, &["weight_zero_point", "_weight_zero_point"]),
        optional(Role::InputScale, &["input_scale"]),
    ],
    params: &["group", "dtype"],
    expand: bytes,
    ..PACK_DENSE
};

fn packed(params: &Params, parts: &Parts, dense: bool) -> Result<Descriptor, Error> {
    let width = params.one_of("bits", &[1, 2, 3, 4, 5, 6, 7, 8])? as u64;
    let (codes, [rows, words]) = typed::<2>(parts, Role::Codes, &[Dtype::I32])?;
    let shape = match params.sizes("shape")? {
        Some(shape) => shape,
        None if 32 % width == 0 => vec![rows, words.saturating_mul(32 / width)],
        None => {
            return Err(Error::new(
                Reason::Parameter,
                "the logical shape is needed for codes that do not fill words",
            ));
        }
    };
    let &[out, inner] = &shape[..] else {
        return Err(Error::new(
            Reason::Parameter,
            format!("shape {shape:?}, two axes are needed"),
        ));
    };
    let needed = if dense {
        inner.saturating_mul(width).div_ceil(32)
    } else {
        inner.div_ceil(32 / width)
    };
    needs(out == rows && needed == words, || {
        format!(
            "{:?} {:?}, [{out}, {needed}] is needed for {shape:?}",
            codes.name, codes.shape
        )
    })?;
    let along = if dense {
        vec![digit(inner.max(1), width as i64)]
    } else {
        in_words(width, words)
    };
    let plane = Plane::new(
        width as u32,
        vec![vec![digit(out.max(1), bits(&[words, 32]))], along],
    );
    let offset = 1_i64 << (width - 1);
    let (scale, block, groups) = scales(params, parts, out, inner)?;
    let zero = match parts.get(&Role::Zero) {
        None => None,
        Some(_) => {
            let (part, [zero_rows, columns]) = typed::<2>(parts, Role::Zero, &[Dtype::I32])?;
            let needed = if dense {
                out.saturating_mul(width).div_ceil(32)
            } else {
                out.div_ceil(32 / width)
            };
            needs(zero_rows == needed && columns == groups, || {
                format!(
                    "{:?} {:?}, [{needed}, {groups}] is needed",
                    part.name, part.shape
                )
            })?;
            let row = bits(&[groups, 32]);
            let across = vec![digit(groups.max(1), 32)];
            let plane = if dense && 32 % width != 0 {
                Plane {
                    stream: Some(Stream {
                        axis: 0,
                        step: width,
                        word: 32,
                        stride: row,
                    }),
                    ..Plane::new(width as u32, vec![Vec::new(), across])
                }
            } else {
                let down = vec![
                    digit(32 / width, width as i64),
                    digit(zero_rows.max(1), row),
                ];
                Plane::new(width as u32, vec![down, across])
            };
            Some(Zero::Field(Field {
                role: Role::Zero,
                number: Number::Unsigned { offset },
                block: block.to_vec(),
                phase: vec![0, 0],
                layout: Layout::of(&[out, groups], plane),
                bias: crate::descriptor::Bias::None,
            }))
        }
    };
    Ok(Descriptor {
        element: Element::Number(Number::Unsigned { offset }),
        codes: (Role::Codes, Layout::of(&shape, plane)),
        zero,
        scales: vec![scale],
        group_index: parts
            .contains_key(&Role::GroupIndex)
            .then_some(Role::GroupIndex),
        rule: Rule::Product,
        dtype: dtype_of(params, crate::scheme::part(parts, Role::Scale)?)?,
        view: shape.clone(),
        shape,
    })
}

fn bytes(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let (_, [out, inner]) = typed::<2>(parts, Role::Codes, &[Dtype::I8])?;
    let (scale, block, groups) = scales(params, parts, out, inner)?;
    let zero = match parts.get(&Role::Zero) {
        None => None,
        Some(part) => {
            needs(part.dtype == Dtype::I8, || {
                format!("{:?} is {}", part.name, part.dtype)
            })?;
            let rows = scale.field.layout.shape[0];
            Some(Zero::Field(plain(
                part,
                Role::Zero,
                &block,
                &[rows, groups],
            )?))
        }
    };
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(Number::Signed),
        codes: (Role::Codes, Layout::dense(&[out, inner], 8, 1)?),
        scales: vec![scale],
        zero,
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, crate::scheme::part(parts, Role::Scale)?)?,
    })
}

/// The scales of a tensor, a channel, or groups; their blocks; and how many groups a row has.
fn scales(
    params: &Params,
    parts: &Parts,
    out: u64,
    inner: u64,
) -> Result<(crate::descriptor::Scale, [u64; 2], u64), Error> {
    let part = crate::scheme::part(parts, Role::Scale)?;
    needs(SCALES.contains(&part.dtype), || {
        format!("{:?} is {}", part.name, part.dtype)
    })?;
    let (rows, groups) = match part.shape[..] {
        [] | [1] => (1, 1),
        [rows] if rows == out => (rows, 1),
        [rows, groups] if rows == out || rows == 1 => (rows, groups),
        _ => {
            return Err(Error::new(
                Reason::Size,
                format!(
                    "{:?} is {:?}, one scale, a row, or a group of {out} rows is needed",
                    part.name, part.shape
                ),
            ));
        }
    };
    let block = group(params, parts, inner, groups)?;
    let block = [u64::from(rows > 1 || out == 1), block];
    let field = plain(part, Role::Scale, &block, &[rows, groups])?;
    Ok((times(field), block, groups))
}
