//! Other shapes of the same elements: dimensions joined in row-major order, and split again.
//!
//! To join dimensions is to scale steps. To split one dimension into rows of `width` is to write
//! each index as `row · width + column`; a loop whose step divides the width, or is a multiple of it,
//! stays whole but for what it has of a first and a last row.

use smallvec::SmallVec;

use super::cut::gcd;
use super::{Axis, Dims, Nest};
use crate::error::{Error, Reason, Result};
use crate::limits;

type Out<'a> = &'a mut dyn FnMut(Nest) -> Result<()>;

/// Gives `out` the nests in the new shape. Both shapes have the same elements, and some.
pub(super) fn reshape(nests: &[Nest], from: &[u64], to: &[u64], out: Out<'_>) -> Result<()> {
    let groups = groups(from, to);
    let split: Vec<(usize, u64)> = splits(&groups, to);
    for nest in nests {
        let mut nest = join(nest, from, &groups);
        nest.tidy();
        unflatten(nest, &split, out)?;
    }
    Ok(())
}

/// Smallest runs of dimensions that have the same number of elements in both shapes, as ends.
fn groups(from: &[u64], to: &[u64]) -> Vec<(usize, usize)> {
    let (mut i, mut j) = (0, 0);
    let mut groups = Vec::new();
    while i < from.len() && j < to.len() {
        let (mut left, mut right) = (from[i], to[j]);
        (i, j) = (i + 1, j + 1);
        while left != right {
            // Equal products: the smaller side has dimensions left.
            let (side, at, shape) = if left < right {
                (&mut left, &mut i, from)
            } else {
                (&mut right, &mut j, to)
            };
            let Some(extent) = shape.get(*at) else { break };
            *side *= extent;
            *at += 1;
        }
        groups.push((i, j));
    }
    // What is left over on either side are extents of 1.
    if i < from.len() || j < to.len() {
        match groups.last_mut() {
            Some(last) => *last = (from.len(), to.len()),
            None => groups.push((from.len(), to.len())),
        }
    }
    groups
}

/// The nest with each group of dimensions as one.
fn join(nest: &Nest, from: &[u64], groups: &[(usize, usize)]) -> Nest {
    let mut at = Dims::new();
    let mut weights: SmallVec<[(u32, u64); 8]> = SmallVec::new();
    let mut begin = 0;
    for (group, &(end, _)) in groups.iter().enumerate() {
        let mut index = 0;
        for dim in begin..end {
            let weight = from[dim + 1..end].iter().product();
            weights.push((group as u32, weight));
            index += nest.at[dim] * weight;
        }
        at.push(index);
        begin = end;
    }
    let place = |axis: &Axis| {
        let (dim, weight) = weights[axis.dim as usize];
        Axis {
            dim,
            step: axis.step * weight,
            ..*axis
        }
    };
    Nest {
        at,
        axes: nest.axes.iter().map(place).collect(),
        ..*nest
    }
}

/// How to come from one dimension a group to the new shape: dimensions to split into rows of a
/// width, in order. A group that no dimension is left of is dropped by splitting it away.
fn splits(groups: &[(usize, usize)], to: &[u64]) -> Vec<(usize, u64)> {
    let mut split = Vec::new();
    let mut begin = 0;
    for &(_, end) in groups {
        if begin == end {
            split.push((begin, DROP));
        }
        for dim in begin..end.saturating_sub(1) {
            split.push((dim, to[dim + 1..end].iter().product()));
        }
        begin = end;
    }
    split
}

/// A width that no row has: the dimension has extent 1 and goes.
const DROP: u64 = 0;

fn unflatten(nest: Nest, split: &[(usize, u64)], out: Out<'_>) -> Result<()> {
    let Some((&(dim, width), rest)) = split.split_first() else {
        let mut nest = nest;
        nest.tidy();
        return out(nest);
    };
    if width == DROP {
        let mut nest = nest;
        nest.at.remove(dim);
        for axis in &mut nest.axes {
            axis.dim -= u32::from(axis.dim as usize > dim);
        }
        return unflatten(nest, rest, out);
    }
    let mut pieces = Vec::new();
    rows(nest.at[dim], nest.src, &nest.along(dim), width, &mut pieces)?;
    for piece in pieces {
        unflatten(piece.place(&nest, dim), rest, out)?;
    }
    Ok(())
}

/// A part of a dimension's loops, of which each runs along the rows or within them.
struct Piece {
    row: u64,
    column: u64,
    src: u64,
    axes: SmallVec<[(bool, Axis); 4]>,
}

impl Piece {
    fn new(at: u64, src: u64, width: u64) -> Piece {
        Piece {
            row: at / width,
            column: at % width,
            src,
            axes: SmallVec::new(),
        }
    }

    fn within(mut self, axes: &[Axis]) -> Piece {
        self.axes.extend(axes.iter().map(|&axis| (false, axis)));
        self
    }

    fn along(mut self, extent: u64, step: u64, src: u64) -> Piece {
        let axis = Axis {
            dim: 0,
            extent,
            step,
            src,
        };
        if extent > 1 {
            self.axes.push((true, axis));
        }
        self
    }

    /// The nest with this instead of its loops along `dim`, which becomes `dim` and `dim + 1`.
    fn place(self, nest: &Nest, dim: usize) -> Nest {
        let mut at = nest.at.clone();
        at[dim] = self.row;
        at.insert(dim + 1, self.column);
        let others = nest.axes.iter().filter(|axis| axis.dim as usize != dim);
        let mut axes: super::Axes = others
            .map(|&axis| Axis {
                dim: axis.dim + u32::from(axis.dim as usize > dim),
                ..axis
            })
            .collect();
        axes.extend(self.axes.iter().map(|&(row, axis)| Axis {
            dim: dim as u32 + u32::from(!row),
            ..axis
        }));
        Nest {
            source: nest.source,
            at,
            src: self.src,
            axes,
        }
    }
}

/// Splits the loops of one dimension into rows of `width`.
fn rows(at: u64, src: u64, axes: &[Axis], width: u64, out: &mut Vec<Piece>) -> Result<()> {
    if out.len() >= limits::NESTS {
        return Err(Error::new(Reason::Limit)
            .found("a reshape of more pieces")
            .needed(format_args!("at most {}", limits::NESTS)));
    }
    let span: u64 = axes.iter().map(|axis| (axis.extent - 1) * axis.step).sum();
    let (Some(&outer), inner) = (axes.first(), axes.get(1..).unwrap_or(&[])) else {
        out.push(Piece::new(at, src, width));
        return Ok(());
    };
    if at % width + span < width {
        out.push(Piece::new(at, src, width).within(axes));
        return Ok(());
    }
    let reach = span - (outer.extent - 1) * outer.step;
    if outer.step % width == 0 {
        return again(at, src, outer, inner, (outer.extent, 1), width, out);
    }
    if at % outer.step + reach < outer.step
        && (width.is_multiple_of(outer.step) || inner.is_empty())
    {
        return wrap(at, src, outer, inner, width, out);
    }
    // Blocks `period` apart begin at the same column.
    let period = width / gcd(outer.step, width);
    for class in 0..period.min(outer.extent) {
        let count = (outer.extent - class).div_ceil(period);
        let (at, src) = (at + class * outer.step, src + class * outer.src);
        again(at, src, outer, inner, (count, period), width, out)?;
    }
    Ok(())
}

/// Blocks that begin at the same column: `count` of them, `period` positions of `outer` apart.
fn again(
    at: u64,
    src: u64,
    outer: Axis,
    inner: &[Axis],
    (count, period): (u64, u64),
    width: u64,
    out: &mut Vec<Piece>,
) -> Result<()> {
    let before = out.len();
    rows(at, src, inner, width, out)?;
    if count > 1 {
        let (step, src) = (outer.step * period / width, outer.src * period);
        for piece in out.drain(before..).collect::<Vec<_>>() {
            out.push(piece.along(count, step, src));
        }
    }
    Ok(())
}

/// A loop that goes through rows from end to end, `inner` staying within its step: a part of a first
/// row, whole rows, a part of a last one. Where the step does not divide the width, rows begin at
/// different columns, and those that begin at the same one are a piece.
fn wrap(
    at: u64,
    src: u64,
    outer: Axis,
    inner: &[Axis],
    width: u64,
    out: &mut Vec<Piece>,
) -> Result<()> {
    let Axis { extent, step, .. } = outer;
    let after = |k: u64| (at + k * step, src + k * outer.src);
    // Positions of the row in which position k lies, from it on.
    let fit = |k: u64| (width - after(k).0 % width).div_ceil(step);
    let mut push = |k: u64, count: u64, (times, apart): (u64, u64)| {
        let (begin, from) = after(k);
        let mut piece = Piece::new(begin, from, width);
        if times > 1 {
            piece = piece.along(times, apart * step / width, apart * outer.src);
        }
        if count > 1 {
            let loop_ = Axis {
                extent: count,
                ..outer
            };
            piece = piece.within(&[loop_]);
        }
        out.push(piece.within(inner));
        if out.len() >= limits::NESTS {
            return Err(Error::new(Reason::Limit).found("a reshape of more pieces"));
        }
        Ok(())
    };
    // Rows begin alike after `period` positions, which is a whole number of rows.
    let period = width / gcd(step, width);
    let mut k = 0;
    if at % width >= step {
        // The first row lacks what lies before the first position.
        k = fit(0).min(extent);
        push(0, k, (1, 0))?;
    }
    let begin = k;
    while k < extent && k - begin < period {
        let count = fit(k);
        // How often this row is there in full.
        let times = (extent - k).saturating_sub(count) / period + 1;
        if k + count <= extent {
            push(k, count, (times, period))?;
        }
        // And once more in part, at the end.
        let last = if k + count <= extent {
            k + times * period
        } else {
            k
        };
        if last < extent {
            push(last, (extent - last).min(count), (1, 0))?;
        }
        k += count;
    }
    Ok(())
}
