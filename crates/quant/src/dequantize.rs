//! Dequantising any range of a tensor's elements, fast, from as much of its parts as that range needs.
//!
//! [`Dequantizer::new`] makes a tensor ready; [`Dequantizer::needs`] says which bytes of which parts a range of elements is
//! made of, and [`Dequantizer::run`] turns those into numbers. So a tensor is dequantised piece by piece, by several
//! threads, with a piece of it in memory at a time.
//!
//! **Exact.** Values are the interpreter's, bit for bit (`tests/dequantize.rs`): the scheme's rule, rounded to the tensor's own
//! dtype. Another dtype that is asked for is one rounding more, to nearest with ties to even. Only a NaN's payload is
//! not promised.
//!
//! ```text
//!  ggml blocks     the kernels of `ggml`
//!  any layout      tiles of a few hundred columns: codes unpacked by the run, scales read once a block
//! ```

mod codes;
mod field;
mod plan;
mod rule;

use std::collections::BTreeMap;
use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt as _;

pub use codes::Window;
pub use plan::Windows;

use crate::arch::{Level, Stores};
use crate::descriptor::{Float, Role};
use crate::error::{Error, Reason};
use crate::ggml::{self, GgmlType};
use crate::interpret::Bytes;
use crate::map::{Meaning, QTensor};
use plan::Plan;

/// A quantised tensor, ready to be dequantised.
#[derive(Debug)]
pub struct Dequantizer {
    how: How,
    whole: BTreeMap<Role, u64>,
}

#[derive(Debug)]
enum How {
    Ggml(GgmlType, u64),
    Plan(Box<Plan>),
}

/// Elements of ggml's blocks at a time: whole blocks of every type.
const PIECE: u64 = 2048;

impl Dequantizer {
    /// Makes a tensor ready.
    ///
    /// # Errors
    /// Those of [`QTensor::describe`]; sizes that don't fit; `Unsupported` for opaque families, and blocks that no file has.
    pub fn new(tensor: &QTensor) -> Result<Self, Error> {
        let named = |error: Error| error.of(&tensor.name);
        let mut whole = BTreeMap::new();
        for (role, part) in &tensor.parts {
            whole.insert(
                *role,
                crate::scheme::bits_of(part).map_err(named)?.div_ceil(8),
            );
        }
        let how = match &tensor.meaning {
            Meaning::Ggml(ty) => {
                let bytes = whole.get(&Role::Codes).copied().unwrap_or(0);
                let blocks = bytes / ty.bytes() as u64;
                // Whether such blocks can be dequantised at all.
                ggml::dequantize(*ty, &[], &mut [])
                    .map_err(|error| named(Error::new(Reason::Unsupported, error.to_string())))?;
                let elements = blocks.checked_mul(ty.elements() as u64);
                How::Ggml(
                    *ty,
                    elements.ok_or_else(|| {
                        named(Error::new(Reason::Size, "elements that can't be counted"))
                    })?,
                )
            }
            _ => How::Plan(Box::new(
                Plan::new(tensor.describe()?, &whole).map_err(named)?,
            )),
        };
        Ok(Dequantizer { how, whole })
    }

    /// How many elements there are.
    pub fn elements(&self) -> u64 {
        match &self.how {
            How::Ggml(_, elements) => *elements,
            How::Plan(plan) => plan.elements(),
        }
    }

    /// The dtype to which the scheme's own rule rounds.
    pub fn dtype(&self) -> Float {
        match &self.how {
            How::Ggml(..) => Float::F32,
            How::Plan(plan) => plan.dtype(),
        }
    }

    /// Of each part, the bytes that a range of elements is made of. Where codes of a row lie far apart, that may be most
    /// of the part.
    pub fn needs(&self, elements: Range<u64>) -> BTreeMap<Role, Range<u64>> {
        let elements = elements.start..elements.end.min(self.elements());
        if elements.is_empty() {
            return BTreeMap::new();
        }
        match &self.how {
            How::Ggml(ty, _) => {
                let (block, bytes) = (ty.elements() as u64, ty.bytes() as u64);
                let span = elements.start / block * bytes..elements.end.div_ceil(block) * bytes;
                BTreeMap::from([(Role::Codes, span)])
            }
            How::Plan(plan) => {
                let mut needs = plan.needs(elements);
                for role in plan.whole() {
                    if let Some(len) = self.whole.get(&role) {
                        needs.insert(role, 0..*len);
                    }
                }
                needs
            }
        }
    }

    /// Dequantises elements, from at least what [`Dequantizer::needs`] says, into little-endian numbers of a dtype.
    ///
    /// # Errors
    /// A part is missing, elements are not there, `out` has another length, or a group index points outside.
    pub fn run(
        &self,
        elements: Range<u64>,
        parts: &Windows<'_>,
        dtype: Float,
        out: &mut [u8],
    ) -> Result<(), Error> {
        let size = dtype.bytes() as u64;
        let len = elements.end.checked_sub(elements.start);
        if elements.end > self.elements()
            || len.and_then(|len| len.checked_mul(size)) != Some(out.len() as u64)
        {
            return Err(Error::new(
                Reason::Usage,
                format!(
                    "elements {elements:?} of {} into {} bytes",
                    self.elements(),
                    out.len()
                ),
            ));
        }
        let mut halves = vec![f16::ZERO; PIECE as usize];
        match &self.how {
            How::Ggml(ty, _) => blocks(*ty, elements, parts, dtype, out),
            How::Plan(plan) => plan.run(elements, parts, |first, values| {
                let begin = (first * size) as usize;
                let out = out.get_mut(begin..).unwrap_or_default();
                encode(dtype, values, out, &mut halves);
            }),
        }
    }
}

/// All of a tensor, or a range of its elements, from its whole parts: [`Dequantizer`] in one call.
///
/// # Errors
/// As [`Dequantizer::run`].
pub fn dequantize(
    tensor: &QTensor,
    parts: &Bytes<'_>,
    elements: Range<u64>,
    dtype: Float,
    out: &mut [u8],
) -> Result<(), Error> {
    let ready = Dequantizer::new(tensor)?;
    for (role, bytes) in &ready.whole {
        let there = parts.get(role).map(|part| part.len() as u64);
        if there.is_some_and(|there| there != *bytes) {
            let text = format!("the part {role:?} has {there:?} bytes, {bytes} are needed");
            return Err(Error::new(Reason::Size, text).of(&tensor.name));
        }
    }
    let windows: Windows<'_> = (parts.iter())
        .map(|(role, bytes)| (*role, Window { start: 0, bytes }))
        .collect();
    ready
        .run(elements, &windows, dtype, out)
        .map_err(|error| error.of(&tensor.name))
}

/// ggml's blocks, from any element to any other.
fn blocks(
    ty: GgmlType,
    elements: Range<u64>,
    parts: &Windows<'_>,
    dtype: Float,
    out: &mut [u8],
) -> Result<(), Error> {
    let missing = || Error::new(Reason::Missing, "bytes of the part Codes are missing");
    let window = parts.get(&Role::Codes).ok_or_else(missing)?;
    let (block, bytes) = (ty.elements() as u64, ty.bytes() as u64);
    let mut wide = [0.0_f32; PIECE as usize];
    let mut halves = vec![f16::ZERO; PIECE as usize];
    let level = Level::best();
    let size = dtype.bytes();
    let (mut at, mut out) = (elements.start, out);
    while at < elements.end {
        let first = at / block;
        let last = (first + PIECE / block).min(elements.end.div_ceil(block));
        let begin = (first * bytes).checked_sub(window.start);
        let begin = begin
            .and_then(|begin| usize::try_from(begin).ok())
            .ok_or_else(missing)?;
        let span = begin..begin.saturating_add(((last - first) * bytes) as usize);
        let source = window.bytes.get(span).ok_or_else(missing)?;
        let values = &mut wide[..((last - first) * block) as usize];
        ggml::dequantize_with(level, Stores::Cached, ty, source, values)
            .map_err(|error| Error::new(Reason::Usage, error.to_string()))?;
        let end = elements.end.min(last * block);
        let wanted = (at - first * block) as usize..(end - first * block) as usize;
        let values = values.get(wanted).unwrap_or_default();
        let (now, rest) = std::mem::take(&mut out).split_at_mut(values.len() * size);
        encode(dtype, values, now, &mut halves);
        (at, out) = (end, rest);
    }
    Ok(())
}

/// Values as little-endian numbers of a dtype.
fn encode(dtype: Float, values: &[f32], out: &mut [u8], halves: &mut [f16]) {
    match dtype {
        Float::F32 => {
            for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *out = value.to_le_bytes();
            }
        }
        Float::Bf16 => {
            for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *out = rule::bf16_bits(*value).to_le_bytes();
            }
        }
        Float::F16 => {
            let halves = &mut halves[..values.len()];
            halves.convert_from_f32_slice(values);
            for (out, half) in out.as_chunks_mut::<2>().0.iter_mut().zip(&*halves) {
                *out = half.to_le_bytes();
            }
        }
    }
}

impl Float {
    /// Bytes of a number.
    pub const fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::Bf16 => 2,
        }
    }
}
