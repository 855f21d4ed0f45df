//! Any quantised tensor of a map, cut.

use std::ops::Range;

use super::{Fallback, How, Sliced, Step};
use crate::descriptor::{Float, Role};
use crate::error::{Error, Reason};
use crate::ggml::{self, GgmlType};
use crate::interpret::{Bytes, interpret};
use crate::map::{Meaning, QTensor};
use crate::scheme::{Param, Part, Parts};

/// A quantised tensor, or what cuts have left of it.
#[derive(Clone, Debug)]
pub struct Cut {
    kind: Kind,
    /// Logical rows of the first axis that must stay together: those of a head whose rows were permuted.
    rows: u64,
    /// The dtype of its values.
    pub dtype: Float,
    /// Its logical shape.
    pub shape: Vec<u64>,
}

#[derive(Clone, Debug)]
enum Kind {
    Preset(Box<Sliced>),
    Ggml(GgmlType, Part, Vec<Step>),
    /// Nobody knows how it could be cut.
    Opaque(Parts, String),
}

impl Cut {
    /// All of a tensor.
    ///
    /// # Errors
    /// The sizes don't fit the scheme.
    pub fn whole(tensor: &QTensor) -> Result<Self, Error> {
        let kind = match &tensor.meaning {
            Meaning::Preset(scheme, params) => {
                let mut params = params.clone();
                if scheme.params.contains(&"dtype") {
                    let dtype = Param::Text(tensor.dtype.name().to_owned());
                    params.0.insert("dtype".to_owned(), dtype);
                }
                let whole = Sliced::whole(scheme, &params, &tensor.parts);
                Kind::Preset(Box::new(whole.map_err(|e| e.of(&tensor.name))?))
            }
            Meaning::Ggml(ty) => {
                let part = crate::scheme::part(&tensor.parts, Role::Codes)?;
                Kind::Ggml(*ty, part.clone(), Vec::new())
            }
            Meaning::Opaque(_) => Kind::Opaque(tensor.parts.clone(), tensor.preset()),
        };
        let rows = tensor.rowperm.as_deref().map_or(1, |said| {
            let size = said.rsplit('x').next().and_then(|size| size.parse().ok());
            size.filter(|&size| size > 0).unwrap_or(u64::MAX)
        });
        Ok(Cut {
            kind,
            rows,
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        })
    }

    /// Multiples at which an axis may be cut without a fallback.
    ///
    /// # Errors
    /// There is no such axis, or it can't be cut at all.
    pub fn multiple(&self, axis: usize) -> Result<u64, Error> {
        let len = self.shape.get(axis).copied().unwrap_or(0);
        let rows = if axis == 0 {
            self.rows.min(len.max(1))
        } else {
            1
        };
        let own = match &self.kind {
            Kind::Preset(sliced) => sliced.granularity(axis)?.clean(),
            Kind::Ggml(ty, ..) if axis + 1 == self.shape.len() => ty.elements() as u64,
            Kind::Ggml(..) => 1,
            Kind::Opaque(_, family) => return Err(opaque(family)),
        };
        Ok(super::lcm(own, rows))
    }

    /// Multiples at which an axis may be cut, with a fallback where blocks are divided.
    ///
    /// # Errors
    /// As [`Cut::multiple`].
    pub fn carrier(&self, axis: usize) -> Result<u64, Error> {
        match &self.kind {
            Kind::Preset(sliced) if self.rows == 1 => Ok(sliced.granularity(axis)?.carrier),
            _ => self.multiple(axis),
        }
    }

    /// The size of the groups along an axis, where it can be made smaller.
    pub fn group(&self, axis: usize) -> Option<u64> {
        match &self.kind {
            Kind::Preset(sliced) => sliced.granularity(axis).ok()?.group,
            _ => None,
        }
    }

    /// Coordinates `range` of an axis.
    ///
    /// # Errors
    /// As [`Sliced::cut`].
    pub fn cut(&self, axis: usize, range: Range<u64>, fallback: Fallback) -> Result<Self, Error> {
        let len = self.shape.get(axis).copied().unwrap_or(0);
        if range.start > range.end || range.end > len {
            return Err(Error::new(
                Reason::Usage,
                format!("{range:?} of axis {axis} of {:?}", self.shape),
            ));
        }
        let whole = (range.start, range.end) == (0, len);
        let on = |unit: u64| {
            range.start.is_multiple_of(unit) && (range.end.is_multiple_of(unit) || range.end == len)
        };
        if axis == 0 && !whole && !on(self.rows.min(len.max(1))) {
            return Err(Error::new(
                Reason::Granularity,
                format!(
                    "its rows were permuted in heads of {}, which stay whole",
                    self.rows
                ),
            ));
        }
        let mut cut = self.clone();
        if let Some(extent) = cut.shape.get_mut(axis) {
            *extent = range.end - range.start;
        }
        match &mut cut.kind {
            Kind::Preset(sliced) => **sliced = sliced.cut(axis, range, fallback)?,
            Kind::Opaque(..) if whole => {}
            Kind::Opaque(_, family) => return Err(opaque(family)),
            Kind::Ggml(..) if whole => {}
            Kind::Ggml(ty, part, steps) => {
                let last = axis + 1 == self.shape.len();
                let (elements, bytes) = if last {
                    (ty.elements() as u64, ty.bytes() as u64)
                } else {
                    (1, 1)
                };
                if !on(elements) {
                    let text =
                        format!("{ty} blocks of {elements} stay whole: {range:?} can't be cut");
                    return Err(Error::new(Reason::Granularity, text));
                }
                let (start, stop) = (range.start / elements * bytes, range.end / elements * bytes);
                if let Some(extent) = part.shape.get_mut(axis) {
                    *extent = stop - start;
                }
                steps.push(Step::Slice {
                    dim: axis,
                    start,
                    stop,
                });
            }
        }
        Ok(cut)
    }

    /// The parts, by what they are for.
    pub fn parts(&self) -> Vec<(Role, &Part)> {
        match &self.kind {
            Kind::Preset(sliced) => sliced
                .parts
                .iter()
                .map(|(role, part)| (*role, part))
                .collect(),
            Kind::Ggml(_, part, _) => vec![(Role::Codes, part)],
            Kind::Opaque(parts, _) => parts.iter().map(|(role, part)| (*role, part)).collect(),
        }
    }

    /// What makes a part from the whole one: nothing where it is whole.
    pub fn steps(&self, role: Role) -> &[Step] {
        match &self.kind {
            Kind::Preset(sliced) => sliced.steps.get(&role).map_or(&[], |steps| steps),
            Kind::Ggml(_, _, steps) => steps,
            Kind::Opaque(..) => &[],
        }
    }

    /// Parts that speak of the whole tensor, and are left out where it was cut.
    pub fn dropped(&self) -> &[Role] {
        match &self.kind {
            Kind::Preset(sliced) => &sliced.dropped,
            _ => &[],
        }
    }

    /// How an axis was cut.
    pub fn how(&self, axis: usize) -> How {
        match &self.kind {
            Kind::Preset(sliced) => sliced.how.get(&axis).copied().unwrap_or_default(),
            _ => How::Clean,
        }
    }

    /// The scheme's tensor, where it is one of the table's.
    pub fn sliced(&self) -> Option<&Sliced> {
        match &self.kind {
            Kind::Preset(sliced) => Some(sliced),
            _ => None,
        }
    }

    /// Its values, from the bytes of its parts.
    ///
    /// # Errors
    /// A part is missing or too short; the family is opaque; `out` has another length.
    pub fn values(&self, bytes: &Bytes<'_>, out: &mut [f32]) -> Result<(), Error> {
        match &self.kind {
            Kind::Preset(sliced) => {
                let lead = sliced.meaning.shape.iter().rev().skip(1);
                let rows = lead.fold(1_u64, |n, &len| n.saturating_mul(len));
                interpret(&sliced.meaning, bytes, 0..rows, out)
            }
            Kind::Ggml(ty, ..) => {
                let codes = bytes.get(&Role::Codes).copied().unwrap_or(&[]);
                ggml::dequantize(*ty, codes, out)
                    .map_err(|error| Error::new(Reason::Size, error.to_string()))
            }
            Kind::Opaque(_, family) => Err(opaque(family)),
        }
    }
}

fn opaque(family: &str) -> Error {
    Error::new(
        Reason::Unsupported,
        format!("{family} is carried as it is: it can't be cut or read as numbers"),
    )
}
