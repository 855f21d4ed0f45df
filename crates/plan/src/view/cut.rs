//! Slices of a nest: which of its positions along one dimension fall into a range, and on a step.

use smallvec::SmallVec;

use super::{Axes, Axis, Nest};
use crate::error::{Error, Reason, Result};
use crate::limits;

/// What is left of the axes of one dimension: the first index, the first element, the loops.
struct Piece {
    at: u64,
    src: u64,
    axes: Axes,
}

type Pieces = SmallVec<[Piece; 4]>;

/// Gives `out` the pieces of `nest` that have an index `start`, `start + step`, … below `stop` along
/// `dim`, where they stand in the slice.
pub(super) fn slice(
    nest: &Nest,
    dim: usize,
    start: u64,
    stop: u64,
    step: u64,
    out: &mut dyn FnMut(Nest) -> Result<()>,
) -> Result<()> {
    let along = nest.along(dim);
    let mut cropped = Pieces::new();
    crop(nest.at[dim], nest.src, &along, start, stop, &mut cropped);
    for piece in cropped {
        if step == 1 {
            out(nest.with(dim, piece.at - start, piece.src, &piece.axes))?;
            continue;
        }
        let mut thinned = Pieces::new();
        thin(piece.at - start, piece.src, &piece.axes, step, &mut thinned)?;
        for piece in thinned {
            out(nest.with(dim, piece.at, piece.src, &piece.axes))?;
        }
    }
    Ok(())
}

/// How far the last position lies behind the first.
fn span(axes: &[Axis]) -> u64 {
    axes.iter().map(|axis| (axis.extent - 1) * axis.step).sum()
}

/// The loops `axes`, from `from` to `to` of the outermost one.
fn part(axes: &[Axis], from: u64, to: u64) -> Axes {
    let mut kept: Axes = axes.into();
    match kept.first_mut() {
        Some(outer) if to - from > 1 => outer.extent = to - from,
        Some(_) => {
            kept.remove(0);
        }
        None => {}
    }
    kept
}

/// The positions that lie in `start..stop`. At most two blocks of each loop are cut themselves: the
/// blocks of nested loops don't overlap.
fn crop(at: u64, src: u64, axes: &[Axis], start: u64, stop: u64, out: &mut Pieces) {
    let last = at + span(axes);
    if at >= stop || last < start {
        return;
    }
    let (Some(outer), inner) = (axes.first(), axes.get(1..).unwrap_or(&[])) else {
        return out.push(Piece {
            at,
            src,
            axes: Axes::new(),
        });
    };
    if at >= start && last < stop {
        let axes = axes.into();
        return out.push(Piece { at, src, axes });
    }
    let reach = span(inner);
    // Blocks that the range touches, and those that lie in it: all but one at each end.
    let first = start.saturating_sub(at + reach).div_ceil(outer.step);
    let end = (stop - at).div_ceil(outer.step).min(outer.extent);
    let from = start.saturating_sub(at).div_ceil(outer.step);
    let to = match stop.checked_sub(at + reach) {
        Some(room) => room.div_ceil(outer.step).min(outer.extent),
        None => 0,
    };
    let cut = |block: u64, out: &mut Pieces| {
        let (at, src) = (at + block * outer.step, src + block * outer.src);
        crop(at, src, inner, start, stop, out);
    };
    if from >= to {
        return (first..end).for_each(|block| cut(block, out));
    }
    (first..from).for_each(|block| cut(block, out));
    out.push(Piece {
        at: at + from * outer.step,
        src: src + from * outer.src,
        axes: part(axes, from, to),
    });
    (to..end).for_each(|block| cut(block, out));
}

/// Every `step`-th position, from index 0 on: index `i · step` becomes index `i`.
fn thin(at: u64, src: u64, axes: &[Axis], step: u64, out: &mut Pieces) -> Result<()> {
    let (Some(outer), inner) = (axes.first(), axes.get(1..).unwrap_or(&[])) else {
        if at.is_multiple_of(step) {
            out.push(Piece {
                at: at / step,
                src,
                axes: Axes::new(),
            });
        }
        return Ok(());
    };
    // Blocks `period` apart have the same remainders.
    let common = gcd(outer.step, step);
    let period = step / common;
    let (first, classes) = if inner.is_empty() {
        // One class at most falls on the step: at + k · outer.step ≡ 0.
        if !at.is_multiple_of(common) {
            return Ok(());
        }
        let back = (period - (at / common) % period) % period;
        let inverse = inverse((outer.step / common) % period, period);
        let first = (u128::from(back) * u128::from(inverse) % u128::from(period)) as u64;
        (first, first.saturating_add(1))
    } else {
        (0, period)
    };
    for class in first..classes.min(outer.extent) {
        if out.len() >= limits::NESTS || class - first >= limits::NESTS as u64 {
            return Err(Error::new(Reason::Limit)
                .found("a slice of more pieces")
                .needed(format_args!("at most {}", limits::NESTS)));
        }
        let count = (outer.extent - class).div_ceil(period);
        let before = out.len();
        thin(
            at + class * outer.step,
            src + class * outer.src,
            inner,
            step,
            out,
        )?;
        if count > 1 {
            let again = Axis {
                dim: outer.dim,
                extent: count,
                step: outer.step / common,
                src: outer.src * period,
            };
            for piece in &mut out[before..] {
                piece.axes.insert(0, again);
            }
        }
    }
    Ok(())
}

pub(super) fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.max(1)
}

/// The inverse of `a` modulo `modulus`, to which it is prime.
fn inverse(a: u64, modulus: u64) -> u64 {
    let (mut r, mut next) = (i128::from(modulus), i128::from(a));
    let (mut t, mut after) = (0_i128, 1_i128);
    while next != 0 {
        let quotient = r / next;
        (r, next) = (next, r - quotient * next);
        (t, after) = (after, t - quotient * after);
    }
    t.rem_euclid(i128::from(modulus)) as u64
}
