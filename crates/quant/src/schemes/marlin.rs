//! Marlin's tiles of 16 × 64 symmetric 4-bit codes, as its checkpoints have them.
//!
//! `qweight` I32 `[in/16, out·2]`; `scales` `[in/g, out]`, permuted within each 64 columns, or within each 32 where there is one group.
//! The permutation is affine in the binary digits of the coordinates.

use tonnage_format::Dtype;

use super::{bits, field, group, required, times};
use crate::descriptor::{Descriptor, Element, Number, Role, Rule};
use crate::error::Error;
use crate::layout::{Layout, Plane, digit};
use crate::scheme::{Params, Parts, Scheme, dtype_of, needs, number, typed};

/// The row.
pub(crate) const ROW: Scheme = Scheme {
    name: "marlin",
    version: 1,
    title: "Marlin, 4 bits, symmetric, in tiles of 16 × 64",
    parts: &[
        required(Role::Codes, &["qweight", "B"]),
        required(Role::Scale, &["scales", "s"]),
    ],
    params: &["bits", "group", "dtype"],
    expand,
};

fn expand(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let (codes, [tiles, columns]) = typed::<2>(parts, Role::Codes, &[Dtype::I32])?;
    let (scales, [groups, out]) = typed::<2>(parts, Role::Scale, &[Dtype::F16, Dtype::BF16])?;
    needs(
        out.checked_mul(2) == Some(columns) && out.is_multiple_of(64),
        || {
            format!(
                "{:?} {:?} and {:?} {:?}: twice the scales' columns, which are a multiple of 64, are needed",
                codes.name, codes.shape, scales.name, scales.shape
            )
        },
    )?;
    let inner = tiles.saturating_mul(16);
    let block = group(params, parts, inner, groups)?;
    let plane = Plane::new(
        4,
        vec![
            vec![
                digit(2, 512),
                digit(2, 1024),
                digit(2, 2048),
                digit(2, 8),
                digit(2, 32),
                digit(2, 64),
                digit((out / 64).max(1), 4096),
            ],
            vec![
                digit(2, 16),
                digit(2, 128),
                digit(2, 256),
                digit(2, 4),
                digit(tiles.max(1), bits(&[columns, 32])),
            ],
        ],
    );
    let along = if groups > 1 {
        vec![digit(8, 128), digit(8, 16), digit((out / 64).max(1), 1024)]
    } else {
        vec![
            digit(2, 16),
            digit(4, 128),
            digit(4, 32),
            digit((out / 32).max(1), 512),
        ]
    };
    let scale = field(
        Role::Scale,
        number(scales)?,
        &[1, block],
        &[out, groups],
        16,
        vec![along, vec![digit(groups, bits(&[out, 16]))]],
    );
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(Number::Unsigned { offset: 8 }),
        codes: (Role::Codes, Layout::of(&[out, inner], plane)),
        scales: vec![times(scale)],
        zero: None,
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, scales)?,
    })
}
