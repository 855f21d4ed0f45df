//! Codes, scales and zero points to their places.

use std::collections::BTreeMap;

use super::plan::{asymmetric, plan};
use super::{Kept, Notes, lossy, none_lost, unfit};
use crate::descriptor::{Bias, Descriptor, Element, Field, Number, Role, Rule, Zero};
use crate::error::{Error, Reason};
use crate::interpret::split;
use crate::layout::low;
use crate::loose::{self, Loose, unravel};
use crate::map::{Confidence, Evidence, Provenance, QTensor};
use crate::packed::{Packed, rows_of, too_large};
use crate::scheme::{Param, Part, Parts, bits_of};
use crate::target::{Form, Target};

pub(super) fn write(
    name: &str,
    loose: Loose,
    form: &Form,
    target: &Target,
    lossy: bool,
    notes: &mut Notes,
) -> Result<(Packed, Kept), Error> {
    let scheme = form.row()?;
    let (mut params, plan) = plan(&loose, form, target)?;
    let mut parts = Parts::new();
    let mut bytes = BTreeMap::new();
    for (role, dtype, shape) in plan {
        let none = || unfit(format!("{} has no part {role:?}", form.name));
        let name = form.part_name(name, role).ok_or_else(none)?;
        let part = Part { name, dtype, shape };
        let len = usize::try_from(bits_of(&part)?.div_ceil(8)).map_err(|_| too_large())?;
        bytes.insert(role, vec![0_u8; len]);
        parts.insert(role, part);
    }
    if scheme.params.contains(&"dtype") {
        params.0.insert(
            "dtype".to_owned(),
            Param::Text(loose.dtype.name().to_owned()),
        );
    }
    if scheme.params.contains(&"element") && loose.element == Number::E5m2 {
        params
            .0
            .insert("element".to_owned(), Param::Text("e5m2".to_owned()));
    }
    let meaning = scheme.describe(&params, &parts)?;
    // Who says how zero points wrap knows how they are read.
    let stated = lossy || target.zero_wrap.is_some();
    let kept = fill(&meaning, &loose, &mut bytes, stated, notes)?;
    let mut tensor = QTensor::preset_of(name, scheme, params, parts)?;
    tensor.dtype = loose.dtype;
    if loose.is_integer() {
        let symmetric = !asymmetric(&loose, target);
        let said = Evidence::new(
            "symmetric",
            symmetric,
            Provenance::Values,
            Confidence::Certain,
        );
        tensor.evidence.push(said);
    }
    Ok((Packed::new(tensor, bytes)?, kept))
}

type Filled = BTreeMap<Role, Vec<u8>>;

fn part_of(bytes: &mut Filled, role: Role) -> Result<&mut Vec<u8>, Error> {
    let missing = || Error::new(Reason::Missing, format!("the part {role:?} is missing"));
    bytes.get_mut(&role).ok_or_else(missing)
}

fn fill(
    meaning: &Descriptor,
    loose: &Loose,
    bytes: &mut Filled,
    lossy: bool,
    notes: &mut Notes,
) -> Result<Kept, Error> {
    let mut kept = Kept::Codes;
    codes(meaning, loose, bytes)?;
    let (scale, more) = meaning.scales.split_first().ok_or_else(too_large)?;
    let part = part_of(bytes, scale.field.role)?;
    put_blocks(&scale.field, &loose.scale.shape, &loose.scale.codes, part)?;
    match (more, loose.global) {
        ([], None) => {}
        ([one], Some((bits, op))) => {
            let bits = if one.op == op {
                bits
            } else {
                kept = Kept::Values;
                (1.0 / f32::from_bits(bits)).to_bits()
            };
            let part = part_of(bytes, one.field.role)?;
            put_blocks(&one.field, &vec![1; meaning.shape.len()], &[bits], part)?;
        }
        _ => return Err(unfit("a scale of the tensor on one side only".to_owned())),
    }
    if loose.is_integer() {
        kept = match zeros(meaning, loose, bytes, lossy, notes)? {
            Kept::Codes => kept,
            Kept::Values => Kept::Values,
        };
    }
    if let Some(part) = bytes.get_mut(&Role::GroupIndex) {
        let group = loose.group();
        let columns = loose.shape.last().copied().unwrap_or(0);
        *part = match &loose.group_index {
            Some(index) => index.iter().flat_map(|group| group.to_le_bytes()).collect(),
            None => (0..columns)
                .flat_map(|at| ((at / group.max(1)) as u32).to_le_bytes())
                .collect(),
        };
    }
    if let Some(part) = bytes.get_mut(&Role::Shape) {
        *part = loose
            .shape
            .iter()
            .flat_map(|len| len.to_le_bytes())
            .collect();
    }
    Ok(kept)
}

fn codes(meaning: &Descriptor, loose: &Loose, bytes: &mut Filled) -> Result<(), Error> {
    let (role, layout) = &meaning.codes;
    let flip = match meaning.element {
        Element::Number(Number::Signed) => 1_u32 << (layout.bits() - 1),
        _ => 0,
    };
    let part = part_of(bytes, *role)?;
    let writer = layout.writer(part.len())?;
    let (rows, columns) = rows_of(&loose.shape)?;
    let columns = usize::try_from(columns).map_err(|_| too_large())?;
    if columns == 0 {
        return Ok(());
    }
    for (row, codes) in (0..rows).zip(loose.codes.chunks_exact(columns)) {
        let codes = codes.iter().map(|code| u32::from(*code) ^ flip);
        writer.row(part, &split(row, &meaning.shape), codes);
    }
    Ok(())
}

/// Writes a code for each block.
fn put_blocks(field: &Field, shape: &[u64], codes: &[u32], part: &mut [u8]) -> Result<(), Error> {
    field.layout.check((part.len() as u64).saturating_mul(8))?;
    let fits = shape
        .iter()
        .zip(&field.layout.shape)
        .all(|(have, room)| have <= room);
    if !fits || shape.len() != field.layout.shape.len() {
        return Err(Error::new(
            Reason::Size,
            format!("{shape:?} blocks, the layout has {:?}", field.layout.shape),
        ));
    }
    for (at, code) in (0_u64..).zip(codes) {
        field.layout.put(part, &unravel(at, shape), *code);
    }
    Ok(())
}

/// Writes zero points as the scheme has them.
fn zeros(
    meaning: &Descriptor,
    loose: &Loose,
    bytes: &mut Filled,
    lossy_too: bool,
    notes: &mut Notes,
) -> Result<Kept, Error> {
    let total = loose.scale.codes.len();
    let shape = &loose.scale.shape;
    let base = match meaning.element {
        Element::Number(Number::Unsigned { offset }) => offset,
        _ => 1 << (meaning.codes.1.bits() - 1),
    };
    let Some(Zero::Field(field)) = &meaning.zero else {
        let off = (0..total).filter(|at| loose.zero_at(*at) != Some(base));
        none_lost(
            off.count() as u64,
            total as u64,
            "zero points are not in the middle",
        )?;
        return Ok(Kept::Codes);
    };
    let part = part_of(bytes, field.role)?;
    if meaning.rule == Rule::ProductThenAdd {
        let bias = loose.biases(field.number)?;
        put_blocks(field, shape, &bias.codes, part)?;
        return Ok(Kept::Values);
    }
    if meaning.rule == Rule::RecoveredZero {
        let (mut lost, mut codes) = (0, Vec::with_capacity(total));
        for at in 0..total {
            let (scale, zero) = (loose.scale.get(at), loose.zero_at(at).unwrap_or(base));
            let code = loose::narrowest(field.number, -scale * (zero - base) as f32);
            let back = (-loose::widened(field.number, code) / scale).round_ties_even();
            lost += u64::from(scale != 0.0 && back != (zero - base) as f32);
            codes.push(code);
        }
        none_lost(
            lost,
            total as u64,
            "zero points don't come back from their product with the scale",
        )?;
        put_blocks(field, shape, &codes, part)?;
        return Ok(Kept::Codes);
    }
    let width = field.layout.bits();
    let offset = match field.number {
        Number::Unsigned { offset } => offset,
        _ => 0,
    };
    let (mut lost, mut hazards, mut codes) = (0_u64, 0_u64, Vec::with_capacity(total));
    for at in 0..total {
        let zero = loose.zero_at(at).unwrap_or(base) - base + offset;
        let signed = field.number == Number::Signed;
        let (least, most) = match (signed, field.bias) {
            (true, _) => (-(1_i64 << (width - 1)), (1 << (width - 1)) - 1),
            (_, Bias::Open) => (1, 1 << width),
            _ => (0, (1 << width) - 1),
        };
        lost += u64::from(zero < least || zero > most);
        hazards += u64::from(zero == 0 && matches!(field.bias, Bias::Field | Bias::Word));
        codes.push(match field.bias {
            Bias::Field | Bias::Open => (zero - 1) as u32 & low(width),
            Bias::None | Bias::Word => zero as u32 & low(width),
        });
    }
    none_lost(
        lost,
        total as u64,
        &format!("zero points don't fit {width} bits there"),
    )?;
    if hazards > 0 {
        let text = "zero points are 0, which readers of GPTQ's version 1 read in different ways";
        if !lossy_too {
            return Err(lossy(hazards, total as u64, text));
        }
        notes.push(format!("{hazards} of {total} {text}"));
    }
    put_blocks(field, shape, &codes, part)?;
    if field.bias == Bias::Word {
        let ones = (0..32 / width).fold(0_u32, |ones, k| ones | 1 << (k * width));
        for word in part.as_chunks_mut::<4>().0 {
            *word = u32::from_le_bytes(*word).wrapping_sub(ones).to_le_bytes();
        }
    }
    Ok(Kept::Codes)
}
