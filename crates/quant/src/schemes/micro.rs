//! Microscaling: 4, 6 or 8-bit floats with a scale for each 32 (MX) or 16 (NVFP4) columns.
//!
//! Two e2m1 share a byte, the lower nibble first, whether the part is `U8`, `I8`, `F4` or in words. NVFP4 has one more scale for the
//! tensor, which modelopt multiplies by and compressed-tensors divides by. A swizzled scale lies in tiles of 128 rows × 4 blocks.

use tonnage_format::Dtype;

use super::{bits, field, optional, required, single, times};
use crate::descriptor::{Descriptor, Element, Field, Number, Op, Role, Rule, Scale};
use crate::error::{Error, Reason};
use crate::layout::{Layout, digit};
use crate::scheme::{Params, Part, PartRow, Parts, Scheme, bits_of, needs, part};

const MX_PARTS: &[PartRow] = &[
    required(
        Role::Codes,
        &["weight", "weight_packed", "blocks", "_weight_qdata"],
    ),
    required(
        Role::Scale,
        &[
            "weight_scale",
            "weight_scale_inv",
            "scale",
            "scales",
            "_weight_scale",
        ],
    ),
];
const NV_PARTS: &[PartRow] = &[
    required(Role::Codes, &["weight", "weight_packed", "_weight_qdata"]),
    required(Role::Scale, &["weight_scale", "scales", "_weight_scale"]),
    optional(
        Role::GlobalScale,
        &[
            "weight_scale_2",
            "weight_global_scale",
            "_weight_per_tensor_scale",
        ],
    ),
    optional(Role::InputScale, &["input_scale", "input_global_scale"]),
];

/// 4-bit floats, blocks of 32.
pub(crate) const MXFP4: Scheme = Scheme {
    name: "mxfp4",
    version: 1,
    title: "MX, 4-bit floats (e2m1) in blocks of 32",
    parts: MX_PARTS,
    params: &["scale_layout", "dtype"],
    expand: |params, parts| expand(params, parts, Number::E2m1, 4, 32, None),
};

/// 6-bit floats, blocks of 32.
pub(crate) const MXFP6: Scheme = Scheme {
    name: "mxfp6",
    title: "MX, 6-bit floats (e2m3, or e3m2) in blocks of 32",
    params: &["element", "scale_layout", "dtype"],
    expand: |params, parts| {
        let number = match params.text("element")? {
            None | Some("e2m3") => Number::E2m3,
            Some("e3m2") => Number::E3m2,
            Some(other) => {
                return Err(Error::new(
                    Reason::Parameter,
                    format!("element {other:?}, e2m3 or e3m2 is needed"),
                ));
            }
        };
        expand(params, parts, number, 6, 32, None)
    },
    ..MXFP4
};

/// 8-bit floats, blocks of 32.
pub(crate) const MXFP8: Scheme = Scheme {
    name: "mxfp8",
    title: "MX, 8-bit floats (e4m3, or e5m2) in blocks of 32",
    params: &["element", "scale_layout", "dtype"],
    expand: |params, parts| {
        let codes = part(parts, Role::Codes)?;
        let number = match (params.text("element")?, codes.dtype) {
            (Some("e5m2"), _) | (None, Dtype::F8_E5M2) => Number::E5m2,
            _ => Number::E4m3,
        };
        expand(params, parts, number, 8, 32, None)
    },
    ..MXFP4
};

/// NVFP4 as modelopt has it.
pub(crate) const NVFP4_MULTIPLY: Scheme = Scheme {
    name: "nvfp4-mul",
    title: "NVFP4, the tensor's scale multiplied by (modelopt, torchao)",
    parts: NV_PARTS,
    expand: |params, parts| expand(params, parts, Number::E2m1, 4, 16, Some(Op::Multiply)),
    ..MXFP4
};

/// NVFP4 as compressed-tensors has it.
pub(crate) const NVFP4_DIVIDE: Scheme = Scheme {
    name: "nvfp4-div",
    title: "NVFP4, the tensor's scale divided by (compressed-tensors)",
    expand: |params, parts| expand(params, parts, Number::E2m1, 4, 16, Some(Op::Divide)),
    ..NVFP4_MULTIPLY
};

fn expand(
    params: &Params,
    parts: &Parts,
    element: Number,
    width: u64,
    block: u64,
    global: Option<Op>,
) -> Result<Descriptor, Error> {
    let codes = part(parts, Role::Codes)?;
    let shape = logical(codes, part(parts, Role::Scale)?, width, block)?;
    let mut scales = vec![block_scale(params, parts, &shape, block, global.is_some())?];
    if let Some(op) = global
        && let Some(part) = parts.get(&Role::GlobalScale)
    {
        needs(part.dtype == Dtype::F32, || {
            format!("{:?} is {}", part.name, part.dtype)
        })?;
        scales.push(Scale {
            op,
            ..times(single(part, Role::GlobalScale, shape.len())?)
        });
    }
    Ok(Descriptor {
        element: Element::Number(element),
        codes: (Role::Codes, Layout::dense(&shape, width as u32, 1)?),
        scales,
        zero: None,
        group_index: None,
        rule: Rule::Product,
        dtype: params.dtype()?.unwrap_or(crate::descriptor::Float::Bf16),
        view: shape.clone(),
        shape,
    })
}

/// The logical shape: the last axis counted in codes; gpt-oss's `[.., in/32, 16]` are the same bytes.
fn logical(codes: &Part, scale: &Part, width: u64, block: u64) -> Result<Vec<u64>, Error> {
    let known = match width {
        8 => matches!(
            codes.dtype,
            Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::U8 | Dtype::U32
        ),
        4 => matches!(
            codes.dtype,
            Dtype::U8 | Dtype::I8 | Dtype::F4 | Dtype::U32 | Dtype::I32
        ),
        _ => matches!(codes.dtype, Dtype::U8 | Dtype::F6_E2M3 | Dtype::F6_E3M2),
    };
    let refused = || {
        format!(
            "{:?} is {} {:?}, codes of {width} bits in blocks of {block} are needed",
            codes.name, codes.dtype, codes.shape
        )
    };
    needs(known, refused)?;
    let mut shape = codes.shape.clone();
    let per = if codes.dtype.bitsize() as u64 == width {
        (1, 1)
    } else {
        (codes.dtype.bitsize() as u64, width)
    };
    let blocked = codes.dtype == Dtype::U8
        && width == 4
        && shape.len() >= 3
        && shape.last() == Some(&(block / 2))
        // Rows that are one block long look alike; their scales have as many axes as they.
        && scale.shape.len() + 1 == shape.len();
    if blocked {
        let inner = shape.pop().unwrap_or(0);
        if let Some(last) = shape.last_mut() {
            *last = last.saturating_mul(inner);
        }
    }
    let all = bits_of(codes)?;
    let Some(last) = shape.last_mut() else {
        return Err(Error::new(Reason::Size, refused()));
    };
    let wide = last.saturating_mul(per.0);
    needs(wide % per.1 == 0, refused)?;
    *last = wide / per.1;
    needs(
        (1..=3).contains(&shape.len())
            && all % width == 0
            && shape.iter().try_fold(1_u64, |n, &l| n.checked_mul(l)) == Some(all / width),
        refused,
    )?;
    Ok(shape)
}

fn block_scale(
    params: &Params,
    parts: &Parts,
    shape: &[u64],
    block: u64,
    nvidia: bool,
) -> Result<Scale, Error> {
    let part = part(parts, Role::Scale)?;
    let number = match (part.dtype, nvidia) {
        (Dtype::U8 | Dtype::F8_E8M0, false) => Number::E8m0,
        (Dtype::U8 | Dtype::F8_E4M3, true) => Number::E4m3,
        _ => {
            return Err(Error::new(
                Reason::Size,
                format!(
                    "{:?} is {}, a block's scale is needed",
                    part.name, part.dtype
                ),
            ));
        }
    };
    let mut blocks = shape.to_vec();
    let mut sizes = vec![1; shape.len()];
    if let (Some(last), Some(size)) = (blocks.last_mut(), sizes.last_mut()) {
        *last = last.div_ceil(block);
        *size = block;
    }
    match params.text("scale_layout")? {
        None | Some("rows") => {
            needs(part.shape == blocks, || {
                format!("{:?} is {:?}, {blocks:?} is needed", part.name, part.shape)
            })?;
            Ok(times(Field {
                number,
                ..field_of_bytes(&sizes, &blocks)?
            }))
        }
        Some("swizzle_128x4") => swizzled(part, number, &sizes, &blocks),
        Some(other) => Err(Error::new(
            Reason::Parameter,
            format!("scale_layout {other:?}, rows or swizzle_128x4 is needed"),
        )),
    }
}

fn field_of_bytes(sizes: &[u64], blocks: &[u64]) -> Result<Field, Error> {
    Ok(Field {
        role: Role::Scale,
        number: Number::E8m0,
        block: sizes.to_vec(),
        phase: vec![0; sizes.len()],
        layout: Layout::dense(blocks, 8, 1)?,
        bias: crate::descriptor::Bias::None,
    })
}

/// Byte `(r, c)` of the scales at `(R·Cn + C)·512 + (r%32)·16 + (r%128/32)·4 + c%4`, in tiles of 128 × 4.
fn swizzled(part: &Part, number: Number, sizes: &[u64], blocks: &[u64]) -> Result<Scale, Error> {
    let &[rows, columns] = blocks else {
        return Err(Error::new(
            Reason::Unsupported,
            "swizzled scales of another than a matrix",
        ));
    };
    let (tiles_down, tiles) = (rows.div_ceil(128), columns.div_ceil(4));
    let needed = bits(&[tiles_down, tiles, 512]);
    needs(crate::scheme::count(part)? == needed as u64, || {
        format!(
            "{:?} is {:?}, {needed} swizzled scales are needed",
            part.name, part.shape
        )
    })?;
    Ok(times(field(
        Role::Scale,
        number,
        sizes,
        blocks,
        8,
        vec![
            vec![
                digit(32, 16 * 8),
                digit(4, 4 * 8),
                digit(tiles_down.max(1), bits(&[tiles, 512, 8])),
            ],
            vec![digit(4, 8), digit(tiles.max(1), 512 * 8)],
        ],
    )))
}
