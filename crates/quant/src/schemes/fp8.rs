//! 8-bit floats with a scale for the tensor, a row, or a block of rows and columns.
//!
//! DeepSeek's `weight_scale_inv` is multiplied by, whatever its name says. The block comes from the configuration, never from a
//! division: 192 rows in blocks of 128 have two scales, as 192 rows in blocks of 96 have.

use tonnage_format::Dtype;

use super::{optional, plain, required, single, times};
use crate::descriptor::{Descriptor, Element, Field, Role, Rule};
use crate::error::Error;
use crate::layout::Layout;
use crate::scheme::{Params, PartRow, Parts, Scheme, dtype_of, needs, number, part};

const CODES: &[Dtype] = &[
    Dtype::F8_E4M3,
    Dtype::F8_E5M2,
    Dtype::F8_E4M3FNUZ,
    Dtype::F8_E5M2FNUZ,
];
const SCALES: &[Dtype] = &[Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E8M0];
const PARTS: &[PartRow] = &[
    required(Role::Codes, &["weight", "qweight", "_weight_qdata"]),
    required(
        Role::Scale,
        &[
            "weight_scale",
            "weight_scale_inv",
            "scale",
            "qscale_weight",
            "_weight_scale",
            "scale_weight",
        ],
    ),
    optional(
        Role::InputScale,
        &[
            "input_scale",
            "activation_scale",
            "qscale_act",
            "input_scale_ub",
        ],
    ),
];

/// One scale.
pub(crate) const TENSOR: Scheme = Scheme {
    name: "fp8-tensor",
    version: 1,
    title: "8-bit floats, one scale",
    parts: PARTS,
    params: &["dtype"],
    expand: |params, parts| {
        let scale = part(parts, Role::Scale)?;
        expand(params, parts, |_, axes| single(scale, Role::Scale, axes))
    },
};

/// A scale for each row.
pub(crate) const ROW: Scheme = Scheme {
    name: "fp8-row",
    title: "8-bit floats, a scale for each row",
    expand: |params, parts| {
        let scale = part(parts, Role::Scale)?;
        expand(params, parts, |shape, axes| {
            // One number for each row of the last two axes, whether or not an axis of one follows.
            let rows = &shape[..axes - 1];
            let found = match scale.shape.split_last() {
                Some((1, lead)) if lead == rows => lead,
                _ => &scale.shape[..],
            };
            needs(found == rows, || {
                format!("{:?} is {:?}, {rows:?} is needed", scale.name, scale.shape)
            })?;
            let (mut block, mut blocks) = (vec![1; axes], rows.to_vec());
            block[axes - 1] = 0;
            blocks.push(1);
            plain(scale, Role::Scale, &block, &blocks)
        })
    },
    ..TENSOR
};

/// A scale for each block.
pub(crate) const BLOCK: Scheme = Scheme {
    name: "fp8-block",
    title: "8-bit floats, a scale for each block of rows and columns",
    params: &["block", "phase", "dtype"],
    expand: |params, parts| {
        let scale = part(parts, Role::Scale)?;
        let sizes = params.sizes("block")?.unwrap_or_else(|| vec![128, 128]);
        expand(params, parts, |shape, axes| {
            needs(
                sizes.len() == 2 && axes >= 2 && sizes.iter().all(|&size| size > 0),
                || format!("blocks of {sizes:?} for {shape:?}, rows and columns are needed"),
            )?;
            let mut block = vec![1; axes - 2];
            block.extend(&sizes);
            // A shard may begin within blocks that its neighbour has begun.
            let phase = params.sizes("phase")?.unwrap_or_else(|| vec![0; axes]);
            needs(
                phase.len() == axes && phase.iter().zip(&block).all(|(at, size)| at < size),
                || format!("phase {phase:?} of blocks {block:?}"),
            )?;
            let starts = shape.iter().zip(&phase);
            let blocks: Vec<u64> = starts
                .zip(&block)
                .map(|((len, at), size)| len.saturating_add(*at).div_ceil(*size))
                .collect();
            needs(scale.shape == blocks, || {
                format!(
                    "{:?} is {:?}, {blocks:?} is needed for {shape:?} in blocks of {sizes:?}",
                    scale.name, scale.shape
                )
            })?;
            Ok(Field {
                phase,
                ..plain(scale, Role::Scale, &block, &blocks)?
            })
        })
    },
    ..TENSOR
};

fn expand(
    params: &Params,
    parts: &Parts,
    scale: impl Fn(&[u64], usize) -> Result<Field, Error>,
) -> Result<Descriptor, Error> {
    let codes = part(parts, Role::Codes)?;
    let there = part(parts, Role::Scale)?;
    let axes = codes.shape.len();
    needs(
        CODES.contains(&codes.dtype) && (1..=3).contains(&axes),
        || {
            format!(
                "{:?} is {} {:?}, 8-bit floats are needed",
                codes.name, codes.dtype, codes.shape
            )
        },
    )?;
    needs(SCALES.contains(&there.dtype), || {
        format!("{:?} is {}", there.name, there.dtype)
    })?;
    Ok(Descriptor {
        shape: codes.shape.clone(),
        view: codes.shape.clone(),
        element: Element::Number(number(codes)?),
        codes: (Role::Codes, Layout::dense(&codes.shape, 8, 1)?),
        scales: vec![times(scale(&codes.shape, axes)?)],
        zero: None,
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, there)?,
    })
}
