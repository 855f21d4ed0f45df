//! HQQ: codes of groups, with scales and zero points in half precision.
//!
//! The weight is reshaped to `[groups, group]` (axis 1) or `[group, groups]` (axis 0); rows of that lie some to a byte, the first in
//! the highest bits:
//!
//! ```text
//! W_q U8, 4 bits:  row r in bits 4..8 of byte row r, row r + R/2 in bits 0..4
//! W_q I32, 3 bits: rows r, r + R/10, … from bit 27 down; rows behind the last are padding
//! ```
//!
//! What the library keeps as scalars beside it (`nbits`, `shape`, `axis`, `packing`…) are this scheme's parameters; text among them
//! that its own loader evaluates is never evaluated here.

use tonnage_format::Dtype;

use super::{bits, plain, required, times};
use crate::descriptor::{Descriptor, Element, Number, Role, Rule, Zero};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane, digit};
use crate::scheme::{Params, Parts, Scheme, count, dtype_of, needs, part, typed};

/// The row.
pub(crate) const ROW: Scheme = Scheme {
    name: "hqq",
    version: 1,
    title: "HQQ, groups with zero points in values",
    parts: &[
        required(Role::Codes, &["W_q"]),
        required(Role::Scale, &["scale"]),
        required(Role::Zero, &["zero"]),
    ],
    params: &["bits", "axis", "shape", "dtype"],
    expand,
};

fn expand(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let width = params.one_of("bits", &[1, 2, 3, 4, 5, 6, 8])? as u64;
    let axis = params.one_of("axis", &[0, 1])?;
    // Codes of 5 and 6 bits have a byte each.
    let (carrier, dtype, per) = match width {
        3 => (32, Dtype::I32, 10),
        1 | 2 | 4 => (8, Dtype::U8, 8 / width),
        _ => (8, Dtype::U8, 1),
    };
    let field = if per == 1 { 8 } else { width };
    let (codes, [stored, columns]) = typed::<2>(parts, Role::Codes, &[dtype])?;
    let view = params.sizes("shape")?;
    let elements = view
        .iter()
        .flatten()
        .try_fold(1_u64, |n, &len| n.checked_mul(len));
    let Some((view, elements)) = view.zip(elements).filter(|(view, _)| !view.is_empty()) else {
        return Err(Error::new(Reason::Parameter, "the logical shape is needed"));
    };
    let rows = elements / columns.max(1);
    needs(
        rows.saturating_mul(columns) == elements && rows.div_ceil(per) == stored,
        || {
            format!(
                "{:?} is {:?}, for {view:?} in {width} bits",
                codes.name, codes.shape
            )
        },
    )?;
    let (scale, zero) = (part(parts, Role::Scale)?, part(parts, Role::Zero)?);
    let (block, blocks) = match axis {
        1 => ([1, 0], [rows, 1]),
        _ => ([0, 1], [1, columns]),
    };
    needs(
        count(scale)? == blocks[0] * blocks[1] && count(zero)? == count(scale)?,
        || {
            format!(
                "{:?} is {:?}, {blocks:?} is needed",
                scale.name, scale.shape
            )
        },
    )?;
    let shape = [rows, columns];
    let down = vec![
        digit(stored.max(1), bits(&[columns, carrier])),
        digit(per, -(field as i64)),
    ];
    let plane = Plane {
        base: (per - 1) * field,
        ..Plane::new(
            field as u32,
            vec![down, vec![digit(columns.max(1), carrier as i64)]],
        )
    };
    Ok(Descriptor {
        shape: shape.to_vec(),
        view,
        element: Element::Number(Number::Unsigned { offset: 0 }),
        codes: (Role::Codes, Layout::of(&shape, plane)),
        scales: vec![times(plain(scale, Role::Scale, &block, &blocks)?)],
        zero: Some(Zero::Field(plain(zero, Role::Zero, &block, &blocks)?)),
        group_index: None,
        rule: Rule::RoundedDifference,
        dtype: dtype_of(params, scale)?,
    })
}
