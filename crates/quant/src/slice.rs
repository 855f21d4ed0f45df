//! Cutting a quantised tensor: along a logical axis, by strided reads of its parts, without changing a value.
//!
//! What may be cut is computed from the layouts ([`Sliced::granularity`]). On each axis a part's elements are
//!
//! ```text
//! [outer, count, inner]     count: steps of the axis' highest digit, `unit` coordinates each
//! ```
//!
//! so that a range of whole units is a range of the middle dimension: one slice of the part, as a tensor. The coordinates
//! below the highest digit never leave it, and neither do those that share a carrier (a word, a byte). A cut that falls on
//! units but not on the blocks of scales can still be made without a loss, and says how ([`How`]): groups become smaller,
//! with their scales repeated; or the first block is one that the part before has begun. What can't be cut at all is refused
//! with the multiple that could be: a caller then moves the cut.

mod apply;
mod granular;
mod take;
mod tensor;

use std::collections::BTreeMap;
use std::ops::Range;

pub use apply::apply;
pub use granular::Granularity;
pub use tensor::Cut;

use crate::descriptor::{Descriptor, Field, Role, Zero};
use crate::error::{Error, Reason};
use crate::layout::Layout;
use crate::scheme::{Param, Params, Part, Parts, Scheme};

/// One operation on a part, as a tensor of its dtype.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The same elements in another shape.
    Reshape(Vec<u64>),
    /// Indices `start..stop` of a dimension.
    Slice {
        /// The dimension.
        dim: usize,
        /// The first index.
        start: u64,
        /// One past the last.
        stop: u64,
    },
    /// Each index of a dimension so many times, one after the other.
    Each {
        /// The dimension.
        dim: usize,
        /// How often.
        times: u64,
    },
}

/// How a cut was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// Between units and between blocks.
    #[default]
    Clean,
    /// Groups are smaller, and their scales and zero points repeated.
    Regroup {
        /// What groups were.
        from: u64,
        /// What they are.
        to: u64,
    },
    /// The first block began before the cut: its scale is kept on both sides.
    Phase {
        /// How many coordinates of the first block lie before the cut.
        phase: u64,
    },
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            How::Clean => f.write_str("clean"),
            How::Regroup { from, to } => write!(f, "groups of {from} as groups of {to}"),
            How::Phase { phase } => write!(f, "begins {phase} into a block"),
        }
    }
}

/// What may be done where a cut does not fall between blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Smaller groups, or a first block that began before: whichever the scheme can say.
    #[default]
    Lossless,
    /// Groups of this size, also where the cut falls between blocks: so that all parts of a tensor have the same.
    Group(u64),
    /// Nothing: the cut is refused.
    Refuse,
}

/// A quantised tensor, or what cuts have left of it: again a tensor of its scheme.
#[derive(Clone, Debug)]
pub struct Sliced {
    /// The scheme.
    pub scheme: &'static Scheme,
    /// Its parameters.
    pub params: Params,
    /// Its parts, with the shapes that they have now.
    pub parts: Parts,
    /// What makes each part from the whole one. A part without an entry is as it was.
    pub steps: BTreeMap<Role, Vec<Step>>,
    /// Parts whose values speak of the whole tensor (its shape, say), which a cut leaves out.
    pub dropped: Vec<Role>,
    /// What it means.
    pub meaning: Descriptor,
    /// How each cut was made, by axis.
    pub how: BTreeMap<usize, How>,
}

impl Sliced {
    /// All of a tensor.
    ///
    /// # Errors
    /// Those of [`Scheme::describe`].
    pub fn whole(scheme: &'static Scheme, params: &Params, parts: &Parts) -> Result<Self, Error> {
        Ok(Sliced {
            scheme,
            params: params.clone(),
            parts: parts.clone(),
            steps: BTreeMap::new(),
            dropped: Vec::new(),
            meaning: scheme.describe(params, parts)?,
            how: BTreeMap::new(),
        })
    }

    /// Coordinates `range` of an axis of the logical shape ([`Descriptor::view`]).
    ///
    /// # Errors
    /// The range is not in the axis, or lies where the parts can't be cut; the message says which multiples can be.
    pub fn cut(&self, axis: usize, range: Range<u64>, fallback: Fallback) -> Result<Self, Error> {
        let len = self.meaning.view.get(axis).copied().unwrap_or(0);
        if range.start > range.end || range.end > len {
            return Err(Error::new(
                Reason::Usage,
                format!("{range:?} of axis {axis} of {:?}", self.meaning.view),
            ));
        }
        let whole = (range.start, range.end) == (0, len);
        if whole && !matches!(fallback, Fallback::Group(_)) {
            // Also of a tensor that can't be cut.
            return Ok(self.clone());
        }
        let grain = self.granularity(axis)?;
        let smaller = match fallback {
            Fallback::Group(to) => grain.group.filter(|&from| to > 0 && to < from).map(|_| to),
            _ => None,
        };
        if whole && smaller.is_none() {
            return Ok(self.clone());
        }
        let on = |unit: u64| {
            range.start.is_multiple_of(unit) && (range.end.is_multiple_of(unit) || range.end == len)
        };
        let refused = || {
            Error::new(
                Reason::Granularity,
                format!(
                    "{} of shape {:?} can't be cut at {} to {} of axis {axis}: multiples of {} can be{}",
                    self.scheme.preset(),
                    self.meaning.view,
                    range.start,
                    range.end,
                    grain.clean(),
                    match grain.carrier < grain.clean() {
                        true => format!(
                            ", of {} with smaller groups or blocks that were begun",
                            grain.carrier
                        ),
                        false => String::new(),
                    }
                ),
            )
        };
        let span = self.span(axis, range.clone())?;
        if smaller.is_none() && grain.phase == 0 && on(grain.clean()) {
            return self.make(axis, &span, How::Clean);
        }
        if !on(grain.carrier) || (fallback == Fallback::Refuse && grain.phase == 0) {
            return Err(refused());
        }
        if let Some(from) = grain.group {
            let mut to = smaller.unwrap_or_else(|| gcd(from, range.start));
            if smaller.is_none() && range.end != len {
                to = gcd(to, range.end);
            }
            if to > 0 && from.is_multiple_of(to) && range.start.is_multiple_of(to) {
                return self.make(axis, &span, How::Regroup { from, to });
            }
        }
        if self.scheme.params.contains(&"phase") {
            let phase = span.start.saturating_add(grain.phase) % grain.scale.max(1);
            return self.make(axis, &span, How::Phase { phase });
        }
        Err(refused())
    }

    /// The parts as a cut leaves them, and the tensor's meaning with them.
    fn make(&self, axis: usize, span: &take::Span, how: How) -> Result<Self, Error> {
        let mut view = self.meaning.view.clone();
        let len = span.stop / span.inner - span.start / span.inner;
        if let Some(extent) = view.get_mut(axis) {
            *extent = len;
        }
        let mut made = self.clone();
        made.parts.clear();
        for (&role, part) in &self.parts {
            if matches!(role, Role::Shape | Role::State) {
                made.dropped.push(role);
                continue;
            }
            let (part, steps) = self.part(role, part, span, how)?;
            made.parts.insert(role, part);
            if !steps.is_empty() {
                made.steps.entry(role).or_default().extend(steps);
            }
        }
        if made.params.0.contains_key("shape") {
            let sizes = view
                .iter()
                .map(|&len| i64::try_from(len).unwrap_or(i64::MAX));
            made.put("shape", Param::List(sizes.collect()));
        }
        if let How::Regroup { to, .. } = how {
            made.put("group", Param::Int(i64::try_from(to).unwrap_or(i64::MAX)));
        }
        made.set_phase(span, self)?;
        let described = self.scheme.describe(&made.params, &made.parts);
        made.meaning = described.map_err(|error| match (how, error.reason) {
            // A scheme may know some sizes of groups only.
            (How::Regroup { .. }, Reason::Parameter) => Error {
                reason: Reason::Granularity,
                ..error
            },
            _ => error,
        })?;
        if made.meaning.view != view {
            return Err(Error::new(
                Reason::Unsupported,
                format!(
                    "{} cut to {view:?} would read as {:?}",
                    self.scheme.preset(),
                    made.meaning.view
                ),
            ));
        }
        if !self.is_alike(&made) {
            return Err(Error::new(
                Reason::Granularity,
                format!(
                    "{} permutes the scales of {view:?} in another way",
                    self.scheme.preset()
                ),
            ));
        }
        let before = made.how.get(&axis).copied().unwrap_or_default();
        made.how
            .insert(axis, if how == How::Clean { before } else { how });
        Ok(made)
    }

    /// Whether all digits but the highest ones are as they were: Marlin's scales lie otherwise where there is one group.
    fn is_alike(&self, other: &Sliced) -> bool {
        let extents = |layout: &Layout| -> Vec<Vec<u64>> {
            let axes = layout.planes.iter().flat_map(|plane| &plane.axes);
            axes.map(|digits| {
                digits
                    .iter()
                    .rev()
                    .skip(1)
                    .map(|digit| digit.extent)
                    .collect()
            })
            .collect()
        };
        let (mine, others) = (self.fields(), other.fields());
        mine.len() == others.len()
            && (mine.iter().zip(&others)).all(|(a, b)| extents(&a.layout) == extents(&b.layout))
    }

    fn put(&mut self, name: &str, value: Param) {
        self.params.0.insert(name.to_owned(), value);
    }

    /// Where the first blocks begin now: said where it is not at their start.
    fn set_phase(&mut self, span: &take::Span, before: &Sliced) -> Result<(), Error> {
        if !self.scheme.params.contains(&"phase") {
            return Ok(());
        }
        let mut phase = before.phases();
        let wide = before.widest(span.axis);
        if let (Some(at), true) = (phase.get_mut(span.axis), wide > 0) {
            *at = at.saturating_add(span.start) % wide;
        }
        self.params.0.remove("phase");
        if phase.iter().any(|&at| at > 0) {
            let phase = phase
                .iter()
                .map(|&at| i64::try_from(at).unwrap_or(i64::MAX));
            self.put("phase", Param::List(phase.collect()));
        }
        Ok(())
    }

    /// For each axis of the layout, where the first element lies in the widest block.
    fn phases(&self) -> Vec<u64> {
        let mut phases = vec![0; self.meaning.shape.len()];
        for field in self.fields() {
            for (most, &phase) in phases.iter_mut().zip(&field.phase) {
                *most = phase.max(*most);
            }
        }
        phases
    }

    /// The widest block on an axis of the layout.
    fn widest(&self, axis: usize) -> u64 {
        let blocks = self.fields().into_iter().filter_map(|f| f.block.get(axis));
        blocks.copied().max().unwrap_or(0)
    }

    /// Everything that has a number for each block.
    fn fields(&self) -> Vec<&Field> {
        let mut fields: Vec<&Field> = Vec::new();
        for scale in &self.meaning.scales {
            fields.push(&scale.field);
            fields.extend(&scale.times);
        }
        if let Some(Zero::Field(zero)) = &self.meaning.zero {
            fields.push(zero);
        }
        fields
    }

    /// The part that has the groups' number for each coordinate of the last axis is cut there, and groups are not.
    fn is_indexed(&self, axis: usize) -> bool {
        self.meaning.group_index.is_some() && axis + 1 == self.meaning.shape.len()
    }

    fn carrier(&self, role: Role) -> Result<(&Part, u64), Error> {
        let part = crate::scheme::part(&self.parts, role)?;
        Ok((part, part.dtype.bitsize() as u64))
    }
}

pub(crate) fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// The least common multiple; the largest number where it does not fit.
pub(crate) fn lcm(a: u64, b: u64) -> u64 {
    if a == 0 || b == 0 {
        return a.max(b);
    }
    (a / gcd(a, b)).saturating_mul(b)
}
