//! GPTQ, as AutoGPTQ and GPTQModel write it: codes packed down the columns of the transposed weight.
//!
//! `qweight` I32 `[in·b/32, out]`, `qzeros` I32 `[in/g, out·b/32]`, `scales` `[in/g, out]`, `g_idx` I32 `[in]`. Version 1
//! stores zero points less one, version 2 stores them as they are, under the same names, dtypes and shapes. The planar form
//! splits codes into planes of 4, 2 and 1 bits.

use tonnage_format::Dtype;

use super::{bits, field, group, optional, required, times};
use crate::descriptor::{Bias, Descriptor, Element, Field, Number, Role, Rule, Zero};
use crate::error::{Error, Reason};
use crate::layout::{Digit, Layout, Plane, Stream, digit};
use crate::scheme::{Params, PartRow, Parts, Scheme, dtype_of, needs, number, typed};

const PARTS: &[PartRow] = &[
    required(Role::Codes, &["qweight"]),
    required(Role::Zero, &["qzeros"]),
    required(Role::Scale, &["scales"]),
    optional(Role::GroupIndex, &["g_idx"]),
];

/// Zero points less one.
pub(crate) const V1: Scheme = Scheme {
    name: "gptq",
    version: 1,
    title: "GPTQ, zero points stored less one",
    parts: PARTS,
    params: &["bits", "group", "zero_wrap", "dtype"],
    expand: |params, parts| {
        let bias = match params.text("zero_wrap")? {
            None | Some("field") => Bias::Field,
            Some("word32") => Bias::Word,
            Some("none") => Bias::Open,
            Some(other) => {
                return Err(Error::new(
                    Reason::Parameter,
                    format!("zero_wrap is {other:?}, field, word32 or none is needed"),
                ));
            }
        };
        expand(params, parts, bias, false)
    },
};

/// Zero points as they are.
pub(crate) const V2: Scheme = Scheme {
    name: "gptq-v2",
    title: "GPTQ, zero points stored as they are",
    params: &["bits", "group", "dtype"],
    expand: |params, parts| expand(params, parts, Bias::None, false),
    ..V1
};

/// Codes in planes.
pub(crate) const PLANAR: Scheme = Scheme {
    name: "gptq-planar",
    title: "GPTQ, codes in planes of 4, 2 and 1 bits",
    params: &["bits", "group", "dtype"],
    expand: |params, parts| expand(params, parts, Bias::None, true),
    ..V1
};

/// The planes of a code, lowest first.
fn widths(width: u64) -> &'static [u64] {
    match width {
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        7 => &[4, 2, 1],
        _ => &[8],
    }
}

/// Planes along an axis whose 32-bit words lie `word` bits apart; `others` are the other axes, `axis` is put among them.
fn planes(width: u64, len: u64, word: i64, axis: usize, other: Digit) -> Vec<Plane> {
    let mut before = 0_i64;
    let mut shift = 0;
    let stride = |words: i64| word.saturating_mul(words);
    widths(width)
        .iter()
        .map(|&plane| {
            let digits = vec![
                digit(32 / plane, plane as i64),
                digit(plane, word),
                digit(len.div_ceil(32).max(1), stride(width as i64)),
            ];
            let mut axes = vec![vec![other], vec![other]];
            axes[axis] = digits;
            let made = Plane {
                bits: plane as u32,
                shift,
                base: u64::try_from(stride(before)).unwrap_or(u64::MAX),
                axes,
                stream: None,
            };
            before += plane as i64;
            shift += plane as u32;
            made
        })
        .collect()
}

fn expand(params: &Params, parts: &Parts, bias: Bias, planar: bool) -> Result<Descriptor, Error> {
    let width = params.one_of("bits", &[2, 3, 4, 5, 6, 7, 8])? as u64;
    let (codes, [words, out]) = typed::<2>(parts, Role::Codes, &[Dtype::I32])?;
    let (scales, [groups, columns]) =
        typed::<2>(parts, Role::Scale, &[Dtype::F16, Dtype::BF16, Dtype::F32])?;
    let (zeros, zero_shape) = typed::<2>(parts, Role::Zero, &[Dtype::I32])?;
    let inner = words.saturating_mul(32) / width;
    needs(words % width == 0 || 32 % width == 0, || {
        format!(
            "{:?} has {words} rows of words, a multiple of {width} is needed",
            codes.name
        )
    })?;
    needs(columns == out && groups > 0, || {
        format!(
            "{:?} is {:?}, [groups, {out}] is needed",
            scales.name, scales.shape
        )
    })?;
    needs(
        zero_shape == [groups, out.saturating_mul(width) / 32],
        || {
            format!(
                "{:?} is {zero_shape:?}, [{groups}, {out} · {width} / 32] is needed",
                zeros.name
            )
        },
    )?;
    let grouped = parts.contains_key(&Role::GroupIndex);
    let block = group(params, parts, inner, groups)?;
    let shape = [out, inner];
    let row = bits(&[out, 32]);
    let layout = if planar {
        Layout {
            shape: shape.to_vec(),
            planes: planes(width, inner, row, 1, digit(out.max(1), 32)),
        }
    } else {
        Layout::of(&shape, down(width, words, row, out))
    };
    let zero_row = bits(&[out, width]);
    let zero_layout = if planar {
        Layout {
            shape: vec![out, groups],
            planes: planes(width, out, 32, 0, digit(groups, zero_row)),
        }
    } else {
        let along = vec![digit(out.max(1), width as i64)];
        Layout::of(
            &[out, groups],
            Plane::new(width as u32, vec![along, vec![digit(groups, zero_row)]]),
        )
    };
    let size = scales.dtype.bitsize() as u64;
    let scale = field(
        Role::Scale,
        number(scales)?,
        &[1, block],
        &[out, groups],
        size as u32,
        vec![
            vec![digit(out.max(1), size as i64)],
            vec![digit(groups, bits(&[out, size]))],
        ],
    );
    Ok(Descriptor {
        shape: shape.to_vec(),
        view: shape.to_vec(),
        element: Element::Number(Number::Unsigned { offset: 0 }),
        codes: (Role::Codes, layout),
        scales: vec![times(scale)],
        zero: Some(Zero::Field(Field {
            role: Role::Zero,
            number: Number::Unsigned { offset: 0 },
            block: vec![1, block],
            phase: vec![0, 0],
            layout: zero_layout,
            // Word-wise carries exist where codes fill words; else they wrap by themselves.
            bias: match bias {
                Bias::Word if 32 % width != 0 => Bias::Field,
                bias => bias,
            },
        })),
        group_index: grouped.then_some(Role::GroupIndex),
        rule: Rule::Product,
        dtype: dtype_of(params, scales)?,
    })
}

/// Codes one below the other: they fill words that lie a row apart, or run over from one to the next.
fn down(width: u64, words: u64, row: i64, out: u64) -> Plane {
    let columns = vec![digit(out.max(1), 32)];
    if 32 % width == 0 {
        let along = vec![digit(32 / width, width as i64), digit(words.max(1), row)];
        return Plane::new(width as u32, vec![columns, along]);
    }
    Plane {
        stream: Some(Stream {
            axis: 1,
            step: width,
            word: 32,
            stride: row,
        }),
        ..Plane::new(width as u32, vec![columns, Vec::new()])
    }
}
