//! AWQ's 4-bit integers with zero points.
//!
//! GEMM: `qweight` I32 `[in, out/8]`, `qzeros` I32 `[in/g, out/8]`, `scales` `[in/g, out]`; the fields of a word are the columns
//! 0, 2, 4, 6, 1, 3, 5, 7. GEMV: `qweight` I32 `[out, in/8]`, `qzeros` I32 `[out, W]`, `scales` `[out, 8·W]`, fields in order, with `W`
//! words for the groups and padding behind them.

use tonnage_format::Dtype;

use super::{bits, field, group, required, times};
use crate::descriptor::{Descriptor, Element, Number, Role, Rule, Zero};
use crate::error::{Error, Reason};
use crate::layout::{Digit, Layout, Plane, digit};
use crate::scheme::{Params, PartRow, Parts, Scheme, dtype_of, needs, number, typed};

const PARTS: &[PartRow] = &[
    required(Role::Codes, &["qweight"]),
    required(Role::Zero, &["qzeros"]),
    required(Role::Scale, &["scales"]),
];
const SCALES: &[Dtype] = &[Dtype::F16, Dtype::BF16, Dtype::F32];

/// The layout of most AWQ checkpoints.
pub(crate) const GEMM: Scheme = Scheme {
    name: "awq-gemm",
    version: 1,
    title: "AWQ, 4 bits, interleaved along the outputs",
    parts: PARTS,
    params: &["bits", "group", "dtype"],
    expand: gemm,
};

/// Rows of outputs.
pub(crate) const GEMV: Scheme = Scheme {
    name: "awq-gemv",
    title: "AWQ, 4 bits, in order along the inputs",
    expand: gemv,
    ..GEMM
};

/// Rows of outputs, interleaved by four.
pub(crate) const GEMV_FAST: Scheme = Scheme {
    name: "awq-gemv-fast",
    title: "AWQ, 4 bits, four outputs interleaved, zero points in values",
    expand: gemv_fast,
    ..GEMM
};

/// Columns in words of eight: column bit 0 is field bit 2, bit 1 is field bit 0, bit 2 is field bit 1.
fn interleaved(words: u64) -> Vec<Digit> {
    vec![
        digit(2, 16),
        digit(2, 4),
        digit(2, 8),
        digit(words.max(1), 32),
    ]
}

fn gemm(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    four_bits(params)?;
    let (_, [inner, words]) = typed::<2>(parts, Role::Codes, &[Dtype::I32])?;
    let (scales, [groups, out]) = typed::<2>(parts, Role::Scale, SCALES)?;
    let (zeros, zero_shape) = typed::<2>(parts, Role::Zero, &[Dtype::I32])?;
    needs(
        words.checked_mul(8) == Some(out) && zero_shape == [groups, words],
        || {
            format!(
                "{words} words of eight codes, {:?} {:?}, {:?} {zero_shape:?}",
                scales.name, scales.shape, zeros.name
            )
        },
    )?;
    let block = group(params, parts, inner, groups)?;
    let size = scales.dtype.bitsize() as u64;
    let row = bits(&[words, 32]);
    let blocks = [out, groups];
    let scale = field(
        Role::Scale,
        number(scales)?,
        &[1, block],
        &blocks,
        size as u32,
        vec![
            vec![digit(out.max(1), size as i64)],
            vec![digit(groups, bits(&[out, size]))],
        ],
    );
    let zero = field(
        Role::Zero,
        Number::Unsigned { offset: 0 },
        &[1, block],
        &blocks,
        4,
        vec![interleaved(words), vec![digit(groups, row)]],
    );
    let codes = Plane::new(4, vec![interleaved(words), vec![digit(inner.max(1), row)]]);
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(Number::Unsigned { offset: 0 }),
        codes: (Role::Codes, Layout::of(&[out, inner], codes)),
        scales: vec![times(scale)],
        zero: Some(Zero::Field(zero)),
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, scales)?,
    })
}

fn gemv(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    four_bits(params)?;
    let (codes, [out, words]) = typed::<2>(parts, Role::Codes, &[Dtype::I32])?;
    let (scales, [rows, columns]) = typed::<2>(parts, Role::Scale, SCALES)?;
    let (zeros, [zero_rows, padded]) = typed::<2>(parts, Role::Zero, &[Dtype::I32])?;
    let inner = words.saturating_mul(8);
    needs(
        rows == out && zero_rows == out && padded.checked_mul(8) == Some(columns),
        || {
            format!(
                "{:?} {:?}, {:?} {:?}, {:?} {:?} don't belong together",
                codes.name, codes.shape, scales.name, scales.shape, zeros.name, zeros.shape
            )
        },
    )?;
    let block = params.one_of("group", &[32, 64, 128, 256])? as u64;
    let size = scales.dtype.bitsize() as u64;
    let fields = |width: u64, row: i64| {
        vec![
            vec![digit(out.max(1), row)],
            vec![digit(columns.max(1), width as i64)],
        ]
    };
    let blocks = [out, columns];
    let scale = field(
        Role::Scale,
        number(scales)?,
        &[1, block],
        &blocks,
        size as u32,
        fields(size, bits(&[columns, size])),
    );
    let zero = field(
        Role::Zero,
        Number::Unsigned { offset: 0 },
        &[1, block],
        &blocks,
        4,
        fields(4, bits(&[padded, 32])),
    );
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(Number::Unsigned { offset: 0 }),
        codes: (Role::Codes, Layout::dense(&[out, inner], 4, 1)?),
        scales: vec![times(scale)],
        zero: Some(Zero::Field(zero)),
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, scales)?,
    })
}

fn gemv_fast(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    four_bits(params)?;
    let (codes, [fours, inner]) = typed::<2>(parts, Role::Codes, &[Dtype::I16])?;
    let (scales, [groups, out]) = typed::<2>(parts, Role::Scale, &[Dtype::F16])?;
    let (zeros, zero_shape) = typed::<2>(parts, Role::Zero, &[Dtype::F16])?;
    needs(
        fours.checked_mul(4) == Some(out)
            && zero_shape == [groups, out]
            && inner.is_multiple_of(64),
        || {
            format!(
                "{:?} {:?}, {:?} {:?}, {:?} {:?} don't belong together",
                codes.name, codes.shape, scales.name, scales.shape, zeros.name, zeros.shape
            )
        },
    )?;
    // Groups behind the last one are padding.
    let block = match params.int("group")? {
        Some(group) if group > 0 => group as u64,
        found => {
            return Err(Error::new(
                Reason::Parameter,
                format!("group is {found:?}, its columns are needed"),
            ));
        }
    };
    let plane = Plane::new(
        4,
        vec![
            vec![
                digit(2, 256),
                digit(2, 512),
                digit(fours.max(1), bits(&[inner, 16])),
            ],
            vec![
                digit(2, 16),
                digit(2, 32),
                digit(2, 64),
                digit(2, 4),
                digit(2, 8),
                digit(2, 128),
                digit((inner / 64).max(1), 1024),
            ],
        ],
    );
    let values = |role| {
        let down = vec![digit(groups.max(1), bits(&[out, 16]))];
        field(
            role,
            Number::F16,
            &[1, block],
            &[out, groups],
            16,
            vec![vec![digit(out.max(1), 16)], down],
        )
    };
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(Number::Unsigned { offset: 0 }),
        codes: (Role::Codes, Layout::of(&[out, inner], plane)),
        scales: vec![times(values(Role::Scale))],
        zero: Some(Zero::Field(values(Role::Zero))),
        group_index: None,
        rule: Rule::RecoveredZero,
        dtype: dtype_of(params, scales)?,
    })
}

fn four_bits(params: &Params) -> Result<(), Error> {
    match params.int("bits")? {
        None | Some(4) => Ok(()),
        Some(_) => params.one_of("bits", &[4]).map(|_| ()),
    }
}
