//! BitNet's ternary weights: `weight` U8 `[out/4, in]`, in each byte four rows that lie `out/4` apart, the lowest bits first.
//!
//! `weight_scale` divides in transformers' `bitlinear` and multiplies in its `autobitlinear`; the configuration says which.

use tonnage_format::Dtype;

use super::{bits, optional, required, single, times};
use crate::descriptor::{Descriptor, Element, Number, Op, Role, Rule, Scale};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane, digit};
use crate::scheme::{Params, Parts, Scheme, dtype_of, part, typed};

/// The row.
pub(crate) const ROW: Scheme = Scheme {
    name: "bitnet",
    version: 1,
    title: "BitNet, ternary",
    parts: &[
        required(Role::Codes, &["weight"]),
        required(Role::Scale, &["weight_scale"]),
        optional(Role::InputScale, &["input_scale"]),
    ],
    params: &["scale", "dtype"],
    expand,
};

fn expand(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let (_, [fours, inner]) = typed::<2>(parts, Role::Codes, &[Dtype::U8])?;
    let scale = part(parts, Role::Scale)?;
    let op = match params.text("scale")? {
        Some("multiply") => Op::Multiply,
        Some("divide") => Op::Divide,
        found => {
            return Err(Error::new(
                Reason::Ambiguous,
                format!("whether the scale multiplies or divides must be said; scale is {found:?}"),
            ));
        }
    };
    let out = fours.saturating_mul(4);
    let rows = vec![digit(fours.max(1), bits(&[inner, 8])), digit(4, 2)];
    let plane = Plane::new(2, vec![rows, vec![digit(inner.max(1), 8)]]);
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(Number::Unsigned { offset: 1 }),
        codes: (Role::Codes, Layout::of(&[out, inner], plane)),
        scales: vec![Scale {
            op,
            ..times(single(scale, Role::Scale, 2)?)
        }],
        zero: None,
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, scale)?,
    })
}
