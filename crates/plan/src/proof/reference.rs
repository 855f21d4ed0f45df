//! The reference: what a plan must do, one element at a time, straight from the words of expressions
//! and placements. Shares no code with views, cuts or copies, so that a mistake there shows here.

use smallvec::SmallVec;

use crate::error::{Error, Reason, Result};
use crate::expr::Expr;
use crate::limits;
use crate::mesh::MeshAxis;
use crate::placement::{Others, Placement, Uneven};
use crate::table::Table;
use crate::view::Dims;

/// An element of a source, or zero.
pub(super) type Element = Option<(u32, u64)>;

/// An expression with the shapes of its operands.
pub(super) struct Node {
    shape: Dims,
    op: Op,
}

/// A box of a source, and where it begins in a tensor.
struct Piece {
    source: u32,
    at: Dims,
    from: Dims,
    size: Dims,
    shape: Dims,
}

enum Op {
    Parts(Vec<Piece>),
    Slice(Box<Node>, usize, u64, u64),
    Concat(Vec<Node>, usize),
    Stack(Vec<Node>, usize),
    Permute(Box<Node>, Vec<usize>),
    Reshape(Box<Node>),
    Interleave(Vec<Node>, usize),
    Repeat(Box<Node>, usize),
    Pad(Box<Node>, usize, u64),
}

fn bad() -> Error {
    Error::new(Reason::View).found("an expression that cannot be")
}

fn axis(dim: i64, rank: usize) -> Result<usize> {
    let dim = if dim < 0 { dim + rank as i64 } else { dim };
    usize::try_from(dim)
        .ok()
        .filter(|&d| d < rank)
        .ok_or_else(bad)
}

fn linear(index: &[u64], shape: &[u64]) -> u64 {
    let pairs = index.iter().zip(shape);
    pairs.fold(0, |sum, (index, extent)| sum * extent + index)
}

pub(super) fn unravel(mut at: u64, shape: &[u64]) -> Dims {
    let mut index = Dims::from_elem(0, shape.len());
    for (dim, &extent) in shape.iter().enumerate().rev() {
        index[dim] = at % extent.max(1);
        at /= extent.max(1);
    }
    index
}

impl Node {
    /// The tensor of a name.
    pub(super) fn named(table: &Table, name: &str) -> Result<Node> {
        let missing = || Error::new(Reason::UnknownTensor).tensor(name);
        let whole: Dims = table.shape(name).ok_or_else(missing)?.into();
        let source = |at: u32| table.sources().get(at as usize);
        let parts = table.pieces(name).into_iter().map(|part| {
            let shape = source(part.source).map(|one| one.shape.clone());
            let shape = shape.ok_or_else(missing)?;
            let all = || (Dims::from_elem(0, shape.len()), shape.clone());
            let (from, size) = part.of.unwrap_or_else(all);
            Ok(Piece {
                source: part.source,
                at: part.at,
                from,
                size,
                shape,
            })
        });
        Ok(Node {
            shape: whole,
            op: Op::Parts(parts.collect::<Result<_>>()?),
        })
    }

    pub(super) fn of(table: &Table, expr: &Expr, depth: usize) -> Result<Node> {
        if depth >= limits::DEPTH {
            return Err(Error::new(Reason::Limit).found("an expression nested deeper"));
        }
        let one = |of: &Expr| Node::of(table, of, depth + 1).map(Box::new);
        let all = |of: &[Expr]| -> Result<Vec<Node>> {
            of.iter().map(|of| Node::of(table, of, depth + 1)).collect()
        };
        let first = |nodes: &[Node]| nodes.first().map(|node| node.shape.clone()).ok_or_else(bad);
        let (shape, op) = match expr {
            Expr::Source(name) => return Node::named(table, name),
            Expr::Slice {
                of,
                dim,
                start,
                stop,
                step,
            } => {
                let node = one(of)?;
                let dim = axis(*dim, node.shape.len())?;
                let mut shape = node.shape.clone();
                shape[dim] = stop.saturating_sub(*start).div_ceil((*step).max(1));
                (shape, Op::Slice(node, dim, *start, *step))
            }
            Expr::Concat { of, dim } => {
                let nodes = all(of)?;
                let mut shape = first(&nodes)?;
                let dim = axis(*dim, shape.len())?;
                shape[dim] = nodes.iter().filter_map(|node| node.shape.get(dim)).sum();
                (shape, Op::Concat(nodes, dim))
            }
            Expr::Stack { of, dim } => {
                let nodes = all(of)?;
                let mut shape = first(&nodes)?;
                let dim = axis(*dim, shape.len() + 1)?;
                shape.insert(dim, nodes.len() as u64);
                (shape, Op::Stack(nodes, dim))
            }
            Expr::Permute { of, dims } => {
                let node = one(of)?;
                let order: Result<Vec<usize>> = dims
                    .iter()
                    .map(|&dim| axis(dim, node.shape.len()))
                    .collect();
                let order = order?;
                (
                    order.iter().map(|&dim| node.shape[dim]).collect(),
                    Op::Permute(node, order),
                )
            }
            Expr::Reshape { of, shape } => (shape.as_slice().into(), Op::Reshape(one(of)?)),
            Expr::Interleave { of, dim } => {
                let nodes = all(of)?;
                let mut shape = first(&nodes)?;
                let dim = axis(*dim, shape.len())?;
                shape[dim] *= nodes.len() as u64;
                (shape, Op::Interleave(nodes, dim))
            }
            Expr::Repeat { of, dim, times } => {
                let node = one(of)?;
                let mut shape = node.shape.clone();
                let dim = axis(*dim, shape.len())?;
                shape[dim] *= times;
                (shape, Op::Repeat(node, dim))
            }
            Expr::Pad {
                of,
                dim,
                before,
                after,
            } => {
                let node = one(of)?;
                let mut shape = node.shape.clone();
                let dim = axis(*dim, shape.len())?;
                shape[dim] += before + after;
                (shape, Op::Pad(node, dim, *before))
            }
        };
        Ok(Node { shape, op })
    }

    /// What stands at an index.
    pub(super) fn at(&self, index: &[u64]) -> Element {
        let mut inner: Dims = index.into();
        match &self.op {
            Op::Parts(parts) => parts.iter().find_map(|piece| {
                let mut inside = Dims::new();
                for (dim, &i) in index.iter().enumerate() {
                    let within = i.checked_sub(piece.at[dim])?;
                    inside.push((within < piece.size[dim]).then(|| piece.from[dim] + within)?);
                }
                Some((piece.source, linear(&inside, &piece.shape)))
            }),
            Op::Slice(of, dim, start, step) => {
                inner[*dim] = start + inner[*dim] * step;
                of.at(&inner)
            }
            Op::Concat(of, dim) => {
                let mut of = of.iter();
                of.find_map(|node| match inner[*dim].checked_sub(node.shape[*dim]) {
                    Some(behind) => {
                        inner[*dim] = behind;
                        None
                    }
                    None => Some(node.at(&inner)),
                })
                .flatten()
            }
            Op::Stack(of, dim) => {
                let which = inner.remove(*dim);
                of.get(which as usize)?.at(&inner)
            }
            Op::Permute(of, order) => {
                for (&dim, &i) in order.iter().zip(index) {
                    inner[dim] = i;
                }
                of.at(&inner)
            }
            Op::Reshape(of) => of.at(&unravel(linear(index, &self.shape), &of.shape)),
            Op::Interleave(of, dim) => {
                let turns = of.len() as u64;
                let turn = inner[*dim] % turns;
                inner[*dim] /= turns;
                of.get(turn as usize)?.at(&inner)
            }
            Op::Repeat(of, dim) => {
                inner[*dim] %= of.shape[*dim];
                of.at(&inner)
            }
            Op::Pad(of, dim, before) => {
                inner[*dim] = inner[*dim].checked_sub(*before)?;
                (inner[*dim] < of.shape[*dim])
                    .then(|| of.at(&inner))
                    .flatten()
            }
        }
    }
}

/// One axis of the mesh, at one coordinate, with what it does to a dimension of so many indices.
struct Step<'a> {
    placement: &'a Placement,
    size: u64,
    coord: u64,
    /// The dimension, and its extent before this axis.
    dim: usize,
    len: u64,
    /// For scales: the part of the weight before this axis, as first element and count.
    weight: (u64, u64),
}

/// What one rank has of a target: from its local indices to those of the target.
pub(super) struct Way<'a> {
    steps: SmallVec<[Step<'a>; 4]>,
    /// The extents of the local tensor.
    pub(super) shape: Dims,
    zeros: bool,
}

impl<'a> Way<'a> {
    /// The way of a rank; `None` where it has nothing.
    pub(super) fn of(
        shape: &[u64],
        placed: &[(MeshAxis, &'a Placement)],
        rank: u32,
    ) -> Result<Option<Way<'a>>> {
        let mut way = Way {
            steps: SmallVec::new(),
            shape: shape.into(),
            zeros: false,
        };
        let mut weights: SmallVec<[Option<(u64, u64)>; 4]> = SmallVec::from_elem(None, shape.len());
        for &(axis_, placement) in placed {
            let (size, coord) = (u64::from(axis_.size), u64::from(axis_.coordinate(rank)));
            let dim = match placement {
                Placement::Replicate => continue,
                Placement::Owner(coords) => {
                    if !coords.iter().any(|&one| u64::from(one) == coord) {
                        return Ok(None);
                    }
                    continue;
                }
                Placement::Only { coord: one, others } => {
                    if u64::from(*one) != coord {
                        if *others == Others::Absent {
                            return Ok(None);
                        }
                        way.zeros = true;
                    }
                    continue;
                }
                Placement::Shard { dim, .. }
                | Placement::Strided { dim, .. }
                | Placement::Segments { dim, .. }
                | Placement::Heads { dim, .. }
                | Placement::Blocks { dim, .. } => axis(*dim, shape.len())?,
            };
            let mut step = Step {
                placement,
                size,
                coord,
                dim,
                len: way.shape[dim],
                weight: (0, 0),
            };
            if let Placement::Blocks { extent, uneven, .. } = placement {
                step.weight = weights[dim].unwrap_or((0, *extent));
                let first = back(*uneven, step.weight.1, size, coord, 0).unwrap_or(step.weight.1);
                let count = share(*uneven, step.weight.1, size, coord);
                let real = count.min(step.weight.1.saturating_sub(first));
                weights[dim] = Some((step.weight.0 + first, real));
            }
            way.shape[dim] = step.extent(placement, step.len);
            way.steps.push(step);
        }
        Ok(Some(way))
    }

    /// The index of the target at a local one; `None` for zeros.
    pub(super) fn global(&self, local: &[u64]) -> Option<Dims> {
        let mut index: Dims = local.into();
        for step in self.steps.iter().rev() {
            let at = index.get_mut(step.dim)?;
            *at = step.back(step.placement, step.len, *at)?;
        }
        (!self.zeros).then_some(index)
    }
}

impl Step<'_> {
    /// How many of `len` indices this coordinate has.
    fn extent(&self, placement: &Placement, len: u64) -> u64 {
        let (size, coord) = (self.size, self.coord);
        match placement {
            Placement::Shard { uneven, .. } => share(*uneven, len, size, coord),
            Placement::Strided { groups, uneven, .. } => (0..*groups)
                .map(|group| {
                    share(
                        *uneven,
                        share(grouping(*uneven), len, *groups, group),
                        size,
                        coord,
                    )
                })
                .sum(),
            Placement::Segments { sizes, each, .. } => {
                let parts = sizes.iter().zip(each);
                parts.map(|(&size, one)| self.extent(one, size)).sum()
            }
            Placement::Heads {
                heads, head_dim, ..
            } => self.heads(*heads).1 * head_dim,
            Placement::Blocks {
                block,
                extent,
                uneven,
                ..
            } => {
                // In a segment the weight is the segment's own.
                let (at, count) = if len == self.len {
                    self.weight
                } else {
                    (0, *extent)
                };
                let count_here = share(*uneven, count, size, coord);
                match back(*uneven, count, size, coord, 0) {
                    _ if count_here == 0 => 0,
                    Some(first) => ((at + first) % block + count_here).div_ceil(*block),
                    None => count_here.div_ceil(*block),
                }
            }
            Placement::Replicate | Placement::Owner(_) | Placement::Only { .. } => len,
        }
    }

    /// First head and number of heads.
    fn heads(&self, heads: u64) -> (u64, u64) {
        if heads < self.size {
            return (self.coord * heads / self.size, 1);
        }
        let first = back(Uneven::Balanced, heads, self.size, self.coord, 0);
        (
            first.unwrap_or(0),
            share(Uneven::Balanced, heads, self.size, self.coord),
        )
    }

    /// The index before this axis of index `at` after it; `None` for zeros.
    fn back(&self, placement: &Placement, len: u64, at: u64) -> Option<u64> {
        let (size, coord) = (self.size, self.coord);
        match placement {
            Placement::Shard { uneven, .. } => back(*uneven, len, size, coord, at),
            Placement::Strided { groups, uneven, .. } => {
                let (mut at, mut start) = (at, 0);
                for group in 0..*groups {
                    let members = share(grouping(*uneven), len, *groups, group);
                    let here = share(*uneven, members, size, coord);
                    if at < here {
                        return Some(start + back(*uneven, members, size, coord, at)?);
                    }
                    (at, start) = (at - here, start + members);
                }
                None
            }
            Placement::Segments { sizes, each, .. } => {
                let (mut at, mut start) = (at, 0);
                for (&members, one) in sizes.iter().zip(each) {
                    let here = self.extent(one, members);
                    if at < here {
                        return Some(start + self.back(one, members, at)?);
                    }
                    (at, start) = (at - here, start + members);
                }
                None
            }
            Placement::Heads {
                heads, head_dim, ..
            } => Some(self.heads(*heads).0 * head_dim + at),
            Placement::Blocks {
                block,
                extent,
                uneven,
                ..
            } => {
                let (from, count) = if len == self.len {
                    self.weight
                } else {
                    (0, *extent)
                };
                let first = back(*uneven, count, size, coord, 0)?;
                let scale = (from + first) / block - from / block + at;
                (scale < (from + count).div_ceil(*block) - from / block).then_some(scale)
            }
            Placement::Replicate | Placement::Owner(_) | Placement::Only { .. } => Some(at),
        }
    }
}

/// How the groups of a strided placement are cut.
fn grouping(uneven: Uneven) -> Uneven {
    match uneven {
        Uneven::PadTo(_) => Uneven::Error,
        other => other,
    }
}

/// How many of `len` indices a coordinate has, zeros counted.
fn share(uneven: Uneven, len: u64, size: u64, coord: u64) -> u64 {
    let each = len.div_ceil(size);
    let balanced = |len: u64| len / size + u64::from(coord < len % size);
    match uneven {
        Uneven::Torch | Uneven::Error => len.saturating_sub(each.saturating_mul(coord)).min(each),
        Uneven::Balanced => balanced(len),
        Uneven::PadTo(multiple) => len.div_ceil(multiple.max(1)) * multiple / size,
        Uneven::Granular(unit) => {
            let unit = unit.max(1);
            let units = len.div_ceil(unit);
            let first = before(units, size, coord) * unit;
            (balanced(units) * unit).min(len.saturating_sub(first))
        }
    }
}

/// What the coordinates before one have, where the first ones have one more.
fn before(len: u64, size: u64, coord: u64) -> u64 {
    coord * (len / size) + coord.min(len % size)
}

/// The index of which a coordinate's index `at` is made; `None` for zeros.
fn back(uneven: Uneven, len: u64, size: u64, coord: u64, at: u64) -> Option<u64> {
    let index = match uneven {
        Uneven::Torch | Uneven::Error => len.div_ceil(size) * coord + at,
        Uneven::Balanced => before(len, size, coord) + at,
        Uneven::PadTo(_) => share(uneven, len, size, coord) * coord + at,
        Uneven::Granular(unit) => before(len.div_ceil(unit.max(1)), size, coord) * unit + at,
    };
    (index < len).then_some(index)
}
