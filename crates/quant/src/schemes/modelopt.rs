//! Model Optimizer's own INT4 tensors, as they are in memory: `weight` U8 `[out, in/2]`, the higher nibble first, codes plus 8;
//! `weight_scale` has the *reciprocal* of a scale for each group of the flattened tensor, by which values are divided.

use tonnage_format::Dtype;

use super::{bits, optional, plain, required, times};
use crate::descriptor::{Descriptor, Element, Number, Op, Role, Rule, Scale};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane, digit};
use crate::scheme::{Params, Parts, Scheme, count, dtype_of, needs, part, typed};

/// The row.
pub(crate) const INT4: Scheme = Scheme {
    name: "modelopt-int4-qtensor",
    version: 1,
    title: "Model Optimizer's INT4 tensors, with scales that divide",
    parts: &[
        required(Role::Codes, &["weight"]),
        required(Role::Scale, &["weight_scale"]),
        optional(Role::InputScale, &["input_scale"]),
    ],
    params: &["group", "dtype"],
    expand,
};

fn expand(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let (codes, [out, bytes]) = typed::<2>(parts, Role::Codes, &[Dtype::U8])?;
    let scale = part(parts, Role::Scale)?;
    let inner = bytes.saturating_mul(2);
    let group = match params.int("group")? {
        Some(group) if group > 0 => group as u64,
        found => {
            return Err(Error::new(
                Reason::Parameter,
                format!("group is {found:?}, its columns are needed"),
            ));
        }
    };
    let groups = inner / group;
    needs(
        inner.is_multiple_of(group) && Some(count(scale)?) == out.checked_mul(groups),
        || {
            format!(
                "{:?} {:?} and {:?} {:?} in groups of {group}",
                codes.name, codes.shape, scale.name, scale.shape
            )
        },
    )?;
    let plane = Plane {
        base: 4,
        ..Plane::new(
            4,
            vec![
                vec![digit(out.max(1), bits(&[bytes, 8]))],
                vec![digit(2, -4), digit(bytes.max(1), 8)],
            ],
        )
    };
    let shape = [out, inner];
    Ok(Descriptor {
        shape: shape.to_vec(),
        view: shape.to_vec(),
        element: Element::Number(Number::Unsigned { offset: 8 }),
        codes: (Role::Codes, Layout::of(&shape, plane)),
        scales: vec![Scale {
            op: Op::Divide,
            ..times(plain(scale, Role::Scale, &[1, group], &[out, groups])?)
        }],
        zero: None,
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, scale)?,
    })
}
