//! bitsandbytes: 4-bit code books over the flattened tensor, and 8-bit integers with a scale for each row.
//!
//! Of two 4-bit codes in a byte the higher nibble is the first. `absmax` is F32, or codes of a nested code book with scales of their own
//! for each 256 and an offset, which the tensor's own state says.

use tonnage_format::Dtype;

use super::{optional, plain, required, times};
use crate::descriptor::{Descriptor, Element, Field, Number, Role, Rule, Scale};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane, digit};
use crate::scheme::{Params, Parts, Scheme, bits_of, dtype_of, needs, part};

/// NF4 and FP4, nested or not.
pub(crate) const FOUR_BIT: Scheme = Scheme {
    name: "bnb4",
    version: 1,
    title: "bitsandbytes 4-bit code books (NF4, FP4)",
    parts: &[
        required(Role::Codes, &["weight"]),
        required(Role::Scale, &["weight.absmax"]),
        required(Role::Table, &["weight.quant_map"]),
        optional(Role::NestedScale, &["weight.nested_absmax"]),
        optional(Role::NestedTable, &["weight.nested_quant_map"]),
        optional(
            Role::State,
            &[
                "weight.quant_state.bitsandbytes__nf4",
                "weight.quant_state.bitsandbytes__fp4",
            ],
        ),
    ],
    params: &[
        "block",
        "shape",
        "nested_block",
        "nested_offset_bits",
        "phase",
        "dtype",
    ],
    expand: four,
};

/// LLM.int8().
pub(crate) const EIGHT_BIT: Scheme = Scheme {
    name: "bnb8",
    title: "bitsandbytes LLM.int8()",
    parts: &[
        required(Role::Codes, &["weight"]),
        required(Role::Scale, &["SCB", "weight.SCB"]),
        optional(Role::State, &["weight_format", "weight.weight_format"]),
    ],
    params: &["dtype"],
    expand: eight,
    ..FOUR_BIT
};

fn four(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let codes = part(parts, Role::Codes)?;
    let absmax = part(parts, Role::Scale)?;
    let table = part(parts, Role::Table)?;
    let (Some(view), Some(block)) = (params.sizes("shape")?, params.int("block")?) else {
        return Err(Error::new(Reason::Parameter, "shape and block are needed"));
    };
    let block = u64::try_from(block).unwrap_or(0);
    let elements = view.iter().try_fold(1_u64, |n, &len| n.checked_mul(len));
    let Some(elements) = elements.filter(|n| block > 0 && *n > 0) else {
        return Err(Error::new(
            Reason::Parameter,
            format!("shape {view:?}, blocks of {block}"),
        ));
    };
    needs(bits_of(codes)? / 8 == elements.div_ceil(2), || {
        format!("{:?} {:?} for {view:?}", codes.name, codes.shape)
    })?;
    needs(table.dtype == Dtype::F32 && table.shape == [16], || {
        format!(
            "{:?} is {} {:?}, F32 [16] is needed",
            table.name, table.dtype, table.shape
        )
    })?;
    // A shard may begin within a block, and within one of the blocks of blocks.
    let begins = match params.sizes("phase")?.as_deref() {
        None => 0,
        Some(&[0, at]) => at,
        Some(other) => {
            return Err(Error::new(
                Reason::Parameter,
                format!("phase {other:?}, [0, elements] is needed"),
            ));
        }
    };
    let phase = begins % block;
    let blocks = elements.saturating_add(phase).div_ceil(block);
    needs(absmax.shape == [blocks], || {
        format!(
            "{:?} is {:?}, [{blocks}] is needed",
            absmax.name, absmax.shape
        )
    })?;
    let shape = [1, elements];
    let nibbles = vec![digit(2, -4), digit(elements.div_ceil(2), 8)];
    let plane = Plane {
        base: 4,
        ..Plane::new(4, vec![vec![digit(1, 0)], nibbles])
    };
    let field = Field {
        phase: vec![0, phase],
        ..plain(absmax, Role::Scale, &[1, block], &[1, blocks])?
    };
    let scale = match (parts.get(&Role::NestedScale), parts.get(&Role::NestedTable)) {
        (None, None) => times(field),
        (Some(nested), Some(_)) => {
            let size =
                params.one_of("nested_block", &[64, 128, 256, 512, 1024, 2048, 4096])? as u64;
            let bits = params.int("nested_offset_bits")?.unwrap_or(0);
            let offset = u32::try_from(bits)
                .map_err(|_| Error::new(Reason::Parameter, format!("nested_offset_bits {bits}")))?;
            let wide = block.saturating_mul(size);
            let groups = elements.saturating_add(begins % wide).div_ceil(wide);
            needs(
                nested.shape == [groups] && absmax.dtype == Dtype::U8,
                || {
                    format!(
                        "{:?} is {:?}, [{groups}] is needed",
                        nested.name, nested.shape
                    )
                },
            )?;
            Scale {
                table: Some(Role::NestedTable),
                times: Some(Field {
                    phase: vec![0, begins % wide],
                    ..plain(nested, Role::NestedScale, &[1, wide], &[1, groups])?
                }),
                plus: f32::from_bits(offset),
                ..times(field)
            }
        }
        _ => {
            return Err(Error::new(
                Reason::Missing,
                "one of the two parts of a nested scale",
            ));
        }
    };
    Ok(Descriptor {
        shape: shape.to_vec(),
        view,
        element: Element::Table(Role::Table),
        codes: (Role::Codes, Layout::of(&shape, plane)),
        scales: vec![scale],
        zero: None,
        group_index: None,
        rule: Rule::Product,
        dtype: dtype_of(params, absmax)?,
    })
}

fn eight(params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
    let codes = part(parts, Role::Codes)?;
    let scale = part(parts, Role::Scale)?;
    let &[out, inner] = &codes.shape[..] else {
        return Err(Error::new(
            Reason::Size,
            format!("{:?} {:?}", codes.name, codes.shape),
        ));
    };
    needs(
        codes.dtype == Dtype::I8 && scale.dtype == Dtype::F32 && scale.shape == [out],
        || {
            format!(
                "{:?} is {} {:?}, F32 [{out}] is needed",
                scale.name, scale.dtype, scale.shape
            )
        },
    )?;
    Ok(Descriptor {
        shape: vec![out, inner],
        view: vec![out, inner],
        element: Element::Number(Number::Signed),
        codes: (Role::Codes, Layout::dense(&[out, inner], 8, 1)?),
        scales: vec![times(plain(scale, Role::Scale, &[1, 0], &[out, 1])?)],
        zero: None,
        group_index: None,
        rule: Rule::ProductTimes(1.0 / 127.0),
        dtype: params.dtype()?.unwrap_or(crate::descriptor::Float::F16),
    })
}
