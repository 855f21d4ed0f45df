//! optimum-quanto: 8-bit integers and floats with a scale for each row, and 2 and 4-bit groups with scales and shifts.
//!
//! Small codes: the weight reshaped to `[groups, group]`, of which `8 / bits` rows that lie far apart share a byte, the first in the
//! lowest bits; `_shift` is in the domain of values. The file says neither shape nor group: the model does, and the codes' own width.

use tonnage_format::Dtype;

use super::{bits, optional, plain, required, times};
use crate::descriptor::{Descriptor, Element, Number, Role, Rule, Zero};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane, digit};
use crate::scheme::{Params, Parts, Scheme, count, dtype_of, needs, number, part, typed};

/// The row.
pub(crate) const ROW: Scheme = Scheme {
    name: "quanto",
    version: 1,
    title: "optimum-quanto, rows of 8 bits or groups of 2 and 4 with shifts",
    parts: &[
        required(Role::Codes, &["weight._data._data", "weight._data"]),
        required(Role::Scale, &["weight._scale"]),
        optional(Role::Zero, &["weight._shift"]),
        optional(Role::InputScale, &["input_scale"]),
        optional(Role::Other, &["output_scale"]),
    ],
    params: &["bits", "shape", "dtype"],
    expand,
};

const BYTES: &[Dtype] = &[
    Dtype::I8,
    Dtype::F8_E4M3,
    Dtype::F8_E5M2,
    Dtype::F8_E4M3FNUZ,
    Dtype::F8_E5M2FNUZ,
];

fn expand(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let width = params.one_of("bits", &[2, 4, 8])? as u64;
    let scale = part(parts, Role::Scale)?;
    if width == 8 {
        let (codes, shape) = typed::<2>(parts, Role::Codes, BYTES)?;
        let (block, blocks) = match count(scale)? {
            1 => ([0, 0], [1, 1]),
            _ => ([1, 0], [shape[0], 1]),
        };
        needs(count(scale)? == blocks[0], || {
            format!(
                "{:?} is {:?}, a scale a row is needed",
                scale.name, scale.shape
            )
        })?;
        return Ok(Descriptor {
            shape: shape.to_vec(),
            view: shape.to_vec(),
            element: Element::Number(number(codes)?),
            codes: (Role::Codes, Layout::dense(&shape, 8, 1)?),
            scales: vec![times(plain(scale, Role::Scale, &block, &blocks)?)],
            zero: None,
            group_index: None,
            rule: Rule::Product,
            dtype: dtype_of(params, scale)?,
        });
    }
    let per = 8 / width;
    let (codes, [stored, columns]) = typed::<2>(parts, Role::Codes, &[Dtype::U8])?;
    let shift = part(parts, Role::Zero)?;
    let Some(view) = params.sizes("shape")?.filter(|view| !view.is_empty()) else {
        return Err(Error::new(Reason::Parameter, "the logical shape is needed"));
    };
    let elements = view
        .iter()
        .try_fold(1_u64, |n, &len| n.checked_mul(len))
        .unwrap_or(0);
    let rows = elements / columns.max(1);
    needs(
        rows.saturating_mul(columns) == elements && rows > 0 && rows.div_ceil(per) == stored,
        || {
            format!(
                "{:?} is {:?}, for {view:?} in {width} bits",
                codes.name, codes.shape
            )
        },
    )?;
    needs(count(scale)? == rows && count(shift)? == rows, || {
        format!(
            "{:?} is {:?}, [{rows}, 1] is needed",
            scale.name, scale.shape
        )
    })?;
    let down = vec![
        digit(stored.max(1), bits(&[columns, 8])),
        digit(per, width as i64),
    ];
    let plane = Plane::new(width as u32, vec![down, vec![digit(columns.max(1), 8)]]);
    let (block, blocks) = ([1, 0], [rows, 1]);
    Ok(Descriptor {
        shape: vec![rows, columns],
        view,
        element: Element::Number(Number::Unsigned { offset: 0 }),
        codes: (Role::Codes, Layout::of(&[rows, columns], plane)),
        scales: vec![times(plain(scale, Role::Scale, &block, &blocks)?)],
        zero: Some(Zero::Field(plain(shift, Role::Zero, &block, &blocks)?)),
        group_index: None,
        rule: Rule::ProductThenSubtract,
        dtype: dtype_of(params, scale)?,
    })
}
