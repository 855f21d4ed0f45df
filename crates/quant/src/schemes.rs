//! One file a scheme. What they share of layouts is here.

mod awq;
mod bitnet;
mod bitsandbytes;
mod compressed_tensors;
mod fp8;
mod gemma;
mod gptq;
mod hqq;
mod marlin;
mod micro;
mod mlx;
mod modelopt;
mod quanto;

use crate::descriptor::{Bias, Field, Number, Op, Role, Scale};
use crate::error::{Error, Reason};
use crate::layout::{Digit, Layout, Plane, digit};
use crate::scheme::{Params, Part, PartRow, Parts, Scheme, count, needs, number};

/// The rows, by family.
pub(crate) static TABLE: &[&Scheme] = &[
    &gptq::V1,
    &gptq::V2,
    &gptq::PLANAR,
    &awq::GEMM,
    &awq::GEMV,
    &awq::GEMV_FAST,
    &marlin::ROW,
    &compressed_tensors::PACK_DENSE,
    &compressed_tensors::PACK_WORD,
    &compressed_tensors::INT,
    &fp8::TENSOR,
    &fp8::ROW,
    &fp8::BLOCK,
    &micro::MXFP4,
    &micro::MXFP6,
    &micro::MXFP8,
    &micro::NVFP4_MULTIPLY,
    &micro::NVFP4_DIVIDE,
    &mlx::AFFINE,
    &bitsandbytes::FOUR_BIT,
    &bitsandbytes::EIGHT_BIT,
    &bitnet::ROW,
    &gemma::ROW,
    &hqq::ROW,
    &quanto::ROW,
    &modelopt::INT4,
];

pub(crate) const fn required(role: Role, suffixes: &'static [&'static str]) -> PartRow {
    PartRow {
        role,
        suffixes,
        required: true,
    }
}

pub(crate) const fn optional(role: Role, suffixes: &'static [&'static str]) -> PartRow {
    PartRow {
        role,
        suffixes,
        required: false,
    }
}

/// A stride or a product as an address moves by it. Larger ones can't pass `Layout::check`.
pub(crate) fn bits(product: &[u64]) -> i64 {
    product
        .iter()
        .try_fold(1_u64, |n, &factor| n.checked_mul(factor))
        .and_then(|n| i64::try_from(n).ok())
        .unwrap_or(i64::MAX)
}

/// A field whose blocks are laid out by digits.
pub(crate) fn field(
    role: Role,
    number: Number,
    block: &[u64],
    shape: &[u64],
    width: u32,
    axes: Vec<Vec<Digit>>,
) -> Field {
    Field {
        role,
        number,
        block: block.to_vec(),
        phase: vec![0; block.len()],
        layout: Layout::of(shape, Plane::new(width, axes)),
        bias: Bias::None,
    }
}

/// A field over a part whose elements lie in the order of the blocks, row-major.
pub(crate) fn plain(part: &Part, role: Role, block: &[u64], shape: &[u64]) -> Result<Field, Error> {
    Ok(Field {
        role,
        number: number(part)?,
        block: block.to_vec(),
        phase: vec![0; block.len()],
        layout: Layout::dense(shape, part.dtype.bitsize() as u32, 1)?,
        bias: Bias::None,
    })
}

/// One number for the whole tensor, of `axes` axes.
pub(crate) fn single(part: &Part, role: Role, axes: usize) -> Result<Field, Error> {
    needs(count(part)? == 1, || {
        format!(
            "{:?} has shape {:?}, one number is needed",
            part.name, part.shape
        )
    })?;
    plain(part, role, &vec![0; axes], &vec![1; axes])
}

/// The columns of a group, checked against how many groups there are; 0 for all of them. Where an index says the group of
/// each column, fields are by group.
pub(crate) fn group(params: &Params, parts: &Parts, inner: u64, groups: u64) -> Result<u64, Error> {
    if parts.contains_key(&Role::GroupIndex) {
        return Ok(1);
    }
    let block = match params.int("group")? {
        Some(group) if group > 0 => group as u64,
        None | Some(-1) if groups == 1 => return Ok(0),
        None if groups > 0 && inner.is_multiple_of(groups) => inner / groups,
        found => {
            return Err(Error::new(
                Reason::Parameter,
                format!("group is {found:?}, with {groups} groups of {inner} columns"),
            ));
        }
    };
    needs(block > 0 && inner.div_ceil(block) == groups, || {
        format!("{inner} columns in groups of {block} are not {groups} groups")
    })?;
    Ok(block)
}

/// What values are multiplied by.
pub(crate) fn times(field: Field) -> Scale {
    Scale {
        field,
        table: None,
        times: None,
        plus: 0.0,
        op: Op::Multiply,
    }
}

/// Fields of `width` bits in the words of a row of `words` 32-bit words: as many in each as fit.
pub(crate) fn in_words(width: u64, words: u64) -> Vec<Digit> {
    vec![digit(32 / width, width as i64), digit(words.max(1), 32)]
}
