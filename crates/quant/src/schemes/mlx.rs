//! MLX's affine mode: `weight` U32 `[out, in·b/32]`, a stream of bits; `scales` and `biases` `[out, in/g]`.
//!
//! Values are rounded twice: the product with the scale, then the sum with the bias.

use tonnage_format::Dtype;

use super::{plain, required, times};
use crate::descriptor::{Descriptor, Element, Number, Role, Rule, Zero};
use crate::error::Error;
use crate::layout::Layout;
use crate::scheme::{Params, Parts, Scheme, dtype_of, needs, part};

/// The row.
pub(crate) const AFFINE: Scheme = Scheme {
    name: "mlx-affine",
    version: 1,
    title: "MLX affine, with scales and biases",
    parts: &[
        required(Role::Codes, &["weight"]),
        required(Role::Scale, &["scales"]),
        required(Role::Zero, &["biases", "qbiases"]),
    ],
    params: &["bits", "group", "dtype"],
    expand,
};

fn expand(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let width = params.one_of("bits", &[2, 3, 4, 5, 6, 8])? as u64;
    let group = params.one_of("group", &[16, 32, 64, 128])? as u64;
    let codes = part(parts, Role::Codes)?;
    let (scales, biases) = (part(parts, Role::Scale)?, part(parts, Role::Zero)?);
    let mut shape = codes.shape.clone();
    let wide = shape.last().map_or(0, |words| words.saturating_mul(32));
    needs(
        codes.dtype == Dtype::U32 && (2..=3).contains(&shape.len()) && wide % width == 0,
        || format!("{:?} is {} {:?}", codes.name, codes.dtype, codes.shape),
    )?;
    let (mut blocks, mut sizes) = (shape.clone(), vec![1; shape.len()]);
    if let (Some(last), Some(block), Some(size)) =
        (shape.last_mut(), blocks.last_mut(), sizes.last_mut())
    {
        *last = wide / width;
        *block = last.div_ceil(group);
        *size = group;
    }
    needs(
        scales.shape == blocks && biases.shape == blocks && scales.dtype == biases.dtype,
        || {
            format!(
                "{:?} {:?} and {:?} {:?}, {blocks:?} is needed for {shape:?}",
                scales.name, scales.shape, biases.name, biases.shape
            )
        },
    )?;
    Ok(Descriptor {
        element: Element::Number(Number::Unsigned { offset: 0 }),
        codes: (Role::Codes, Layout::dense(&shape, width as u32, 1)?),
        scales: vec![times(plain(scales, Role::Scale, &sizes, &blocks)?)],
        zero: Some(Zero::Field(plain(biases, Role::Zero, &sizes, &blocks)?)),
        group_index: None,
        rule: Rule::ProductThenAdd,
        dtype: dtype_of(params, scales)?,
        view: shape.clone(),
        shape,
    })
}
