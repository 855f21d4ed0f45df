//! Gemma's integers of 2, 4 and 8 bits: `weight` U8 `[out, bytes]`, the lowest bits first, codes plus 2^(b−1), rows that end inside a
//! byte padded; or I8 `[out, in]`. `weight_scale` F32 `[out, 1]`.

use tonnage_format::Dtype;

use super::{bits, optional, plain, required, times};
use crate::descriptor::{Descriptor, Element, Number, Role, Rule};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane, digit};
use crate::scheme::{Params, Parts, Scheme, dtype_of, needs, part, typed};

/// The row.
pub(crate) const ROW: Scheme = Scheme {
    name: "gemma",
    version: 1,
    title: "Gemma's integers, a scale for each row",
    parts: &[
        required(Role::Codes, &["weight"]),
        required(Role::Scale, &["weight_scale"]),
        optional(Role::InputScale, &["input_activation_scale"]),
        optional(Role::Other, &["output_activation_scale"]),
    ],
    params: &["bits", "shape", "dtype"],
    expand,
};

fn expand(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let width = params.one_of("bits", &[2, 4, 8])? as u64;
    let wanted = if width == 8 { Dtype::I8 } else { Dtype::U8 };
    let (codes, [out, bytes]) = typed::<2>(parts, Role::Codes, &[wanted])?;
    let scale = part(parts, Role::Scale)?;
    let inner = match params.sizes("shape")?.as_deref() {
        None => bytes.saturating_mul(8 / width),
        Some(&[rows, inner]) if rows == out => inner,
        Some(other) => {
            return Err(Error::new(
                Reason::Parameter,
                format!("shape {other:?}, [{out}, columns] is needed"),
            ));
        }
    };
    needs(inner.div_ceil(8 / width) == bytes, || {
        format!(
            "{:?} is {:?}, for {inner} columns of {width} bits",
            codes.name, codes.shape
        )
    })?;
    needs(scale.dtype == Dtype::F32 && scale.shape == [out, 1], || {
        format!(
            "{:?} is {} {:?}, F32 [{out}, 1] is needed",
            scale.name, scale.dtype, scale.shape
        )
    })?;
    let plane = Plane::new(
        width as u32,
        vec![
            vec![digit(out.max(1), bits(&[bytes, 8]))],
            vec![digit(inner.max(1), width as i64)],
        ],
    );
    let offset = 1_i64 << (width - 1);
    let number = match wanted {
        Dtype::I8 => Number::Signed,
        _ => Number::Unsigned { offset },
    };
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(number),
        codes: (Role::Codes, Layout::of(&[out, inner], plane)),
        scales: vec![times(plain(scale, Role::Scale, &[1, 0], &[out, 1])?)],
        zero: None,
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, scale)?,
    })
}
