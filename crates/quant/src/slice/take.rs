//! A range of an axis, as a range of a part.

use std::ops::Range;

use super::{How, Sliced, Step, gcd};
use crate::descriptor::{Field, Role};
use crate::error::{Error, Reason};
use crate::layout::{Layout, Plane};
use crate::scheme::{Part, count};

/// What of an axis of the layouts is kept. Where the logical shape is flattened into one axis, a logical axis is
/// a range of each of `outer` periods of it.
#[derive(Clone, Debug)]
pub(super) struct Span {
    /// The axis of the layouts.
    pub axis: usize,
    /// The first coordinate, of each period.
    pub start: u64,
    /// One past the last, of each period.
    pub stop: u64,
    /// Coordinates of a period.
    pub period: u64,
    /// How many periods there are.
    pub outer: u64,
    /// Coordinates of the layout's axis for each of the logical axis.
    pub inner: u64,
}

/// How a part's elements lie along an axis: the highest digit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Coordinates that a step has.
    pub unit: u64,
    /// Elements of the part from one step to the next.
    pub inner: u64,
}

impl Sliced {
    /// A range of a logical axis as one of an axis of the layouts.
    pub(super) fn span(&self, axis: usize, range: Range<u64>) -> Result<Span, Error> {
        let (shape, view) = (&self.meaning.shape, &self.meaning.view);
        let len = view.get(axis).copied().unwrap_or(0);
        if shape == view {
            return Ok(Span {
                axis,
                start: range.start,
                stop: range.end,
                period: len,
                outer: 1,
                inner: 1,
            });
        }
        if shape.len() != 2 || shape[0] != 1 {
            return Err(Error::new(
                Reason::Unsupported,
                format!(
                    "{} lies as {shape:?} where {view:?} is meant: it is read whole, or not at all",
                    self.scheme.preset()
                ),
            ));
        }
        let product = |dims: &[u64]| dims.iter().fold(1_u64, |n, &len| n.saturating_mul(len));
        let inner = product(view.get(axis + 1..).unwrap_or(&[])).max(1);
        Ok(Span {
            axis: 1,
            start: range.start.saturating_mul(inner),
            stop: range.end.saturating_mul(inner),
            period: len.saturating_mul(inner),
            outer: product(view.get(..axis).unwrap_or(&[])).max(1),
            inner,
        })
    }

    /// A part as it is after a cut, and what makes it.
    pub(super) fn part(
        &self,
        role: Role,
        part: &Part,
        span: &Span,
        how: How,
    ) -> Result<(Part, Vec<Step>), Error> {
        let whole = || Ok((part.clone(), Vec::new()));
        if role == self.meaning.codes.0 {
            return taken(part, &self.meaning.codes.1, span, span.period);
        }
        if role == Role::GroupIndex && self.is_indexed(span.axis) {
            let step = Step::Slice {
                dim: 0,
                start: span.start,
                stop: span.stop,
            };
            let shape = vec![span.stop - span.start];
            return Ok((
                Part {
                    shape,
                    ..part.clone()
                },
                vec![step],
            ));
        }
        let Some(field) = self.fields().into_iter().find(|field| field.role == role) else {
            return whole();
        };
        let block = field.block.get(span.axis).copied().unwrap_or(0);
        let there = field.layout.shape.get(span.axis).copied().unwrap_or(0);
        if block == 0 || self.is_indexed(span.axis) || (there == 1 && span.period > 1 && block == 1)
        {
            return whole();
        }
        blocks(part, field, block, span, how)
    }
}

/// The blocks that a range touches, smaller and repeated where that is how.
fn blocks(
    part: &Part,
    field: &Field,
    block: u64,
    span: &Span,
    how: How,
) -> Result<(Part, Vec<Step>), Error> {
    let phase = field.phase.get(span.axis).copied().unwrap_or(0);
    let there = field.layout.shape.get(span.axis).copied().unwrap_or(0);
    let (start, stop) = (
        span.start.saturating_add(phase),
        span.stop.saturating_add(phase),
    );
    let last = span.outer == 1 && span.stop == span.period;
    let regroup = match how {
        How::Regroup { from, to } if from == block && to > 0 => Some(to),
        _ => None,
    };
    let touched = Span {
        start: start / block,
        // Blocks behind the last one are padding that the scheme wants.
        stop: if last && regroup.is_none() {
            there
        } else {
            stop.div_ceil(block)
        },
        period: if span.outer == 1 {
            there
        } else {
            there / span.outer
        },
        ..span.clone()
    };
    let (mut part, mut steps) = taken(part, &field.layout, &touched, touched.period)?;
    let Some(to) = regroup else {
        return Ok((part, steps));
    };
    let run = run(&field.layout, span.axis, part.dtype.bitsize() as u64)?;
    let wide = touched.stop - touched.start;
    let is_it = |dim: usize| {
        let (len, rest) = (
            part.shape.get(dim),
            part.shape.get(dim + 1..).unwrap_or(&[]),
        );
        len == Some(&wide) && rest.iter().product::<u64>() == run.inner
    };
    // Most parts have the tensor's axes; some have them turned.
    let dims = std::iter::once(span.axis).chain(0..part.shape.len());
    let dim = dims.into_iter().find(|&dim| is_it(dim));
    let (Some(dim), 1, 1) = (dim, run.unit, span.outer) else {
        return Err(refused(
            &part,
            "its groups are packed together, so none can be repeated",
        ));
    };
    let first = start % block / to;
    let count = (span.stop - span.start).div_ceil(to);
    steps.push(Step::Each {
        dim,
        times: block / to,
    });
    steps.push(Step::Slice {
        dim,
        start: first,
        stop: first + count,
    });
    part.shape[dim] = count;
    Ok((part, steps))
}

/// Coordinates `start..stop` of each period of an axis, whole units of it.
fn taken(
    part: &Part,
    layout: &Layout,
    span: &Span,
    period: u64,
) -> Result<(Part, Vec<Step>), Error> {
    let run = run(layout, span.axis, part.dtype.bitsize() as u64)?;
    let (start, stop) = (span.start, span.stop);
    let ends = stop.is_multiple_of(run.unit) || (span.outer == 1 && stop == period);
    if !start.is_multiple_of(run.unit)
        || !ends
        || (span.outer > 1 && !period.is_multiple_of(run.unit))
    {
        return Err(refused(
            part,
            &format!("it is cut at multiples of {}", run.unit),
        ));
    }
    let (start, stop) = (start / run.unit, stop.div_ceil(run.unit));
    let all = count(part)?;
    let per = period.div_ceil(run.unit);
    if (start, stop) == (0, per) {
        return Ok((part.clone(), Vec::new()));
    }
    let wide = per.saturating_mul(run.inner).max(1);
    let mut behind = all;
    for (dim, &len) in part.shape.iter().enumerate() {
        let rest = behind / len.max(1);
        // The dimension in which a period lies with all that follows it. The last unit may end before it is full.
        let short = span.outer == 1 && behind < wide && behind > wide - run.inner;
        if (behind == wide || short) && len > 1 {
            let (from, to) = (start * run.inner, (stop * run.inner).min(behind));
            if !from.is_multiple_of(rest) || !to.is_multiple_of(rest) {
                break;
            }
            let mut shape = part.shape.clone();
            shape[dim] = (to - from) / rest;
            let step = Step::Slice {
                dim,
                start: from / rest,
                stop: to / rest,
            };
            return Ok((
                Part {
                    shape,
                    ..part.clone()
                },
                vec![step],
            ));
        }
        behind = rest;
    }
    if !all.is_multiple_of(wide) {
        return Err(refused(part, "it does not divide along the axis"));
    }
    // In no dimension of its own: tiles, or a flattened tensor.
    let dim = part
        .shape
        .iter()
        .rposition(|&len| len > 1 && len.is_multiple_of(per));
    let dim = dim.ok_or_else(|| refused(part, "no dimension of it divides along the axis"))?;
    let mut shape = part.shape.clone();
    shape[dim] = shape[dim] / per * (stop - start);
    let steps = vec![
        Step::Reshape(vec![all / wide, per, run.inner]),
        Step::Slice {
            dim: 1,
            start,
            stop,
        },
        Step::Reshape(shape.clone()),
    ];
    Ok((
        Part {
            shape,
            ..part.clone()
        },
        steps,
    ))
}

fn refused(part: &Part, why: &str) -> Error {
    Error::new(
        Reason::Granularity,
        format!("{:?} {:?} can't be cut there: {why}", part.name, part.shape),
    )
}

/// The highest digit of an axis, counted in whole carriers of `carrier` bits.
pub(super) fn run(layout: &Layout, axis: usize, carrier: u64) -> Result<Run, Error> {
    let mut runs = layout
        .planes
        .iter()
        .map(|plane| plane_run(plane, axis, carrier));
    let first = runs.next().flatten();
    match first {
        Some(run) if runs.all(|other| other == Some(run)) => Ok(run),
        _ => Err(Error::new(
            Reason::Unsupported,
            format!("axis {axis} is not made of whole carriers of {carrier} bits"),
        )),
    }
}

fn plane_run(plane: &Plane, axis: usize, carrier: u64) -> Option<Run> {
    if let Some(stream) = plane.stream.filter(|stream| stream.axis == axis) {
        let unit = stream.word / gcd(stream.word, stream.step);
        let words = unit.checked_mul(stream.step)? / stream.word;
        let bits = u64::try_from(stream.stride).ok()?.checked_mul(words)?;
        return bits.is_multiple_of(carrier).then_some(Run {
            unit,
            inner: bits / carrier,
        });
    }
    let (top, low) = plane.axes.get(axis)?.split_last()?;
    let below = low
        .iter()
        .try_fold(1_u64, |n, digit| n.checked_mul(digit.extent))?;
    let stride = u64::try_from(top.stride).ok();
    // Lower digits that reach further than the highest one's step are no part of it: nothing can be cut.
    let Some(stride) = stride.filter(|&stride| stride > 0) else {
        return Some(Run {
            unit: below.checked_mul(top.extent)?,
            inner: carrier.max(1),
        });
    };
    let times = carrier / gcd(carrier, stride);
    Some(Run {
        unit: below.checked_mul(times)?,
        inner: stride.checked_mul(times)? / carrier,
    })
}
