//! What a coordinate has of a tensor: for each dimension, runs of the tensor's indices.

use smallvec::SmallVec;

use super::{Others, Placement, Uneven};
use crate::error::{Error, Reason, Result};
use crate::limits;
use crate::view::{Dims, position};

/// Neighbouring indices of a dimension, or as many zeros that no tensor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Run {
    pub at: u64,
    pub len: u64,
    pub zeros: bool,
}

pub(crate) type Runs = SmallVec<[Run; 2]>;

/// The elements of a weight whose scales a dimension holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Weight {
    at: u64,
    len: u64,
    block: u64,
}

/// What a coordinate has: of each dimension these runs, one behind the other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Held {
    pub dims: SmallVec<[Runs; 4]>,
    /// It has the shape, and is filled with zeros.
    pub zeros: bool,
    weights: SmallVec<[Option<Weight>; 4]>,
}

fn wrong(found: impl std::fmt::Display, needed: impl std::fmt::Display) -> Error {
    Error::new(Reason::Placement).found(found).needed(needed)
}

fn extent(runs: &Runs) -> u64 {
    runs.iter().map(|run| run.len).sum()
}

impl Held {
    /// All of a tensor.
    pub(crate) fn whole(shape: &[u64]) -> Held {
        let run = |&len: &u64| {
            let mut runs = Runs::new();
            if len > 0 {
                runs.push(Run {
                    at: 0,
                    len,
                    zeros: false,
                });
            }
            runs
        };
        Held {
            dims: shape.iter().map(run).collect(),
            zeros: false,
            weights: SmallVec::from_elem(None, shape.len()),
        }
    }

    /// Its extents.
    pub(crate) fn shape(&self) -> Dims {
        self.dims.iter().map(extent).collect()
    }

    /// For each dimension, where in a block of its weight the first scale's part begins.
    pub(crate) fn phase(&self) -> Dims {
        let phase = |weight: &Option<Weight>| weight.map_or(0, |weight| weight.at % weight.block);
        if self.weights.iter().all(Option::is_none) {
            return Dims::new();
        }
        self.weights.iter().map(phase).collect()
    }

    /// Keeps these parts of a dimension, one behind the other.
    fn keep(&mut self, dim: usize, parts: &[Part]) -> Result<()> {
        let Some(old) = self.dims.get(dim) else {
            return Ok(());
        };
        let mut kept = Runs::new();
        for part in parts {
            let mut before = 0;
            for run in old {
                let from = part.start.max(before);
                let to = part.stop.min(before + run.len);
                if from < to {
                    let at = run.at + (from - before);
                    push(
                        &mut kept,
                        Run {
                            at,
                            len: to - from,
                            ..*run
                        },
                    )?;
                }
                before += run.len;
            }
            if part.zeros > 0 {
                let run = Run {
                    at: 0,
                    len: part.zeros,
                    zeros: true,
                };
                push(&mut kept, run)?;
            }
        }
        self.dims[dim] = kept;
        Ok(())
    }
}

fn push(runs: &mut Runs, run: Run) -> Result<()> {
    if let Some(last) = runs.last_mut()
        && last.zeros == run.zeros
        && (run.zeros || last.at + last.len == run.at)
    {
        last.len += run.len;
        return Ok(());
    }
    if runs.len() >= limits::RUNS {
        return Err(Error::new(Reason::Limit)
            .found("a placement of more runs")
            .needed(format_args!("at most {}", limits::RUNS)));
    }
    runs.push(run);
    Ok(())
}

/// Indices `start..stop` of what was there, then zeros.
#[derive(Clone, Copy, Debug)]
struct Part {
    start: u64,
    stop: u64,
    zeros: u64,
}

type Parts = SmallVec<[Part; 2]>;

/// One axis: its size, and a coordinate on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat {
    pub size: u64,
    pub coord: u64,
}

/// Applies one axis to what was held; `None` where this coordinate has nothing.
pub(crate) fn place(held: Held, placement: &Placement, seat: Seat) -> Result<Option<Held>> {
    let mut held = held;
    match placement {
        Placement::Replicate => {}
        Placement::Owner(coords) => {
            if let Some(coord) = coords.iter().find(|&&coord| u64::from(coord) >= seat.size) {
                return Err(wrong(
                    format_args!("owner {coord}"),
                    format_args!("coordinates below {}", seat.size),
                ));
            }
            if !coords.iter().any(|&coord| u64::from(coord) == seat.coord) {
                return Ok(None);
            }
        }
        Placement::Only { coord, others } => {
            if u64::from(*coord) >= seat.size {
                return Err(wrong(
                    format_args!("coordinate {coord}"),
                    format_args!("one below {}", seat.size),
                ));
            }
            if u64::from(*coord) != seat.coord {
                match others {
                    Others::Absent => return Ok(None),
                    Others::Zeros => held.zeros = true,
                }
            }
        }
        Placement::Blocks {
            dim,
            block,
            extent,
            uneven,
        } => {
            let dim = position(*dim, held.dims.len())?;
            blocks(&mut held, dim, (*block, *extent, *uneven), seat)?;
        }
        Placement::Shard { dim, .. }
        | Placement::Strided { dim, .. }
        | Placement::Segments { dim, .. }
        | Placement::Heads { dim, .. } => {
            let dim = position(*dim, held.dims.len())?;
            if held.weights[dim].is_some() {
                return Err(wrong(
                    format_args!("blocks and another placement in dimension {dim}"),
                    "blocks alone: they follow the weight",
                ));
            }
            let mut parts = Parts::new();
            let whole = (0, extent(&held.dims[dim]));
            cut(placement, whole, seat, held.dims.len(), 0, &mut parts)
                .map_err(|error| error.range_or(format_args!("dimension {dim}")))?;
            held.keep(dim, &parts)?;
        }
    }
    Ok(Some(held))
}

/// The parts of `start..start + len` that a coordinate has.
fn cut(
    placement: &Placement,
    (start, len): (u64, u64),
    seat: Seat,
    rank: usize,
    depth: usize,
    out: &mut Parts,
) -> Result<()> {
    if depth >= limits::DEPTH || out.len() > limits::RUNS {
        return Err(Error::new(Reason::Limit)
            .found("a placement of more parts, or nested deeper")
            .needed(format_args!(
                "at most {} parts and {} levels",
                limits::RUNS,
                limits::DEPTH
            )));
    }
    match placement {
        Placement::Replicate => out.push(Part {
            start,
            stop: start + len,
            zeros: 0,
        }),
        Placement::Shard { uneven, .. } => {
            let part = share(len, seat, *uneven)?;
            out.push(part.after(start));
        }
        Placement::Strided { groups, uneven, .. } => {
            strided(start, len, *groups, *uneven, seat, out)?;
        }
        Placement::Heads {
            heads,
            head_dim,
            uneven,
            ..
        } => {
            let part = whole_heads(len, *heads, *head_dim, *uneven, seat)?;
            out.push(part.after(start));
        }
        Placement::Segments { dim, sizes, each } => {
            let sum = sizes
                .iter()
                .try_fold(0_u64, |sum, &size| sum.checked_add(size));
            if sum != Some(len) || each.len() != sizes.len() {
                return Err(wrong(
                    format_args!("segments {sizes:?} with {} placements", each.len()),
                    format_args!("one placement a segment, and {len} indices in all"),
                ));
            }
            let mut start = start;
            for (placement, &size) in each.iter().zip(sizes) {
                same_dim(placement, *dim, rank)?;
                cut(placement, (start, size), seat, rank, depth + 1, out)?;
                start += size;
            }
        }
        Placement::Blocks {
            block,
            extent,
            uneven,
            ..
        } => out.push(block_part(len, (*block, *extent, *uneven), seat)?.after(start)),
        Placement::Owner(_) | Placement::Only { .. } => {
            return Err(wrong(
                "a segment that some coordinates lack",
                "replicate, shard, strided, heads, blocks or segments: it is a part of a tensor",
            ));
        }
    }
    Ok(())
}

/// Requires that a segment's placement runs along the dimension of the segments.
fn same_dim(placement: &Placement, of: i64, rank: usize) -> Result<()> {
    let (Placement::Shard { dim, .. }
    | Placement::Strided { dim, .. }
    | Placement::Heads { dim, .. }
    | Placement::Blocks { dim, .. }
    | Placement::Segments { dim, .. }) = placement
    else {
        return Ok(());
    };
    if position(*dim, rank)? == position(of, rank)? {
        return Ok(());
    }
    Err(wrong(
        format_args!("a segment placed along dimension {dim}"),
        format_args!("dimension {of}, which the segments divide"),
    ))
}

impl Part {
    fn after(self, start: u64) -> Part {
        Part {
            start: self.start + start,
            stop: self.stop + start,
            ..self
        }
    }
}

fn uneven_error(found: impl std::fmt::Display, needed: impl std::fmt::Display) -> Error {
    Error::new(Reason::Uneven).found(found).needed(needed)
}

/// What a coordinate has of `len` indices.
fn share(len: u64, seat: Seat, uneven: Uneven) -> Result<Part> {
    let Seat { size, coord } = seat;
    let plain = |start: u64, stop: u64| {
        let (start, stop) = (start.min(len), stop.min(len));
        Ok(Part {
            start,
            stop,
            zeros: 0,
        })
    };
    let balanced = |len: u64| {
        let (each, more) = (len / size, len % size);
        let start = coord * each + coord.min(more);
        (start, start + each + u64::from(coord < more))
    };
    match uneven {
        Uneven::Torch => {
            let each = len.div_ceil(size);
            plain(each.saturating_mul(coord), each.saturating_mul(coord + 1))
        }
        Uneven::Balanced => {
            let (start, stop) = balanced(len);
            plain(start, stop)
        }
        Uneven::Error if len.is_multiple_of(size) => {
            plain(len / size * coord, len / size * (coord + 1))
        }
        Uneven::Error => Err(uneven_error(
            format_args!("{len} indices over {size} coordinates"),
            format_args!("a multiple of {size}, or another choice of `uneven`"),
        )),
        Uneven::PadTo(0) | Uneven::Granular(0) => {
            Err(wrong("a multiple or a unit of 0", "at least 1"))
        }
        Uneven::PadTo(multiple) => {
            let padded = len
                .checked_next_multiple_of(multiple)
                .filter(|padded| padded % size == 0)
                .ok_or_else(|| {
                    uneven_error(
                        format_args!("{len} indices padded to a multiple of {multiple}"),
                        format_args!("a multiple that divides by {size} coordinates"),
                    )
                })?;
            let each = padded / size;
            let (start, stop) = ((each * coord).min(len), (each * (coord + 1)).min(len));
            Ok(Part {
                start,
                stop,
                zeros: each - (stop - start),
            })
        }
        Uneven::Granular(unit) => {
            let (start, stop) = balanced(len.div_ceil(unit));
            plain(start.saturating_mul(unit), stop.saturating_mul(unit))
        }
    }
}

/// One part of each of `groups` groups. The groups are as torch cuts them, unless all must be even.
fn strided(
    start: u64,
    len: u64,
    groups: u64,
    uneven: Uneven,
    seat: Seat,
    out: &mut Parts,
) -> Result<()> {
    if groups == 0 {
        return Err(wrong("0 groups", "at least 1"));
    }
    if groups > limits::RUNS as u64 {
        return Err(Error::new(Reason::Limit)
            .found(format_args!("{groups} groups"))
            .needed(format_args!("at most {}", limits::RUNS)));
    }
    for group in 0..groups {
        let of = Seat {
            size: groups,
            coord: group,
        };
        let cut = match uneven {
            Uneven::PadTo(_) => share(len, of, Uneven::Error)?,
            other => share(len, of, other)?,
        };
        let part = share(cut.stop - cut.start, seat, uneven)?;
        out.push(part.after(start + cut.start));
    }
    Ok(())
}

fn whole_heads(len: u64, heads: u64, head_dim: u64, uneven: Uneven, seat: Seat) -> Result<Part> {
    if heads == 0 || heads.checked_mul(head_dim) != Some(len) {
        return Err(wrong(
            format_args!("{heads} heads of {head_dim}"),
            format_args!("{len} indices in all"),
        ));
    }
    let Seat { size, coord } = seat;
    let even = if heads >= size {
        heads.is_multiple_of(size)
    } else {
        size % heads == 0
    };
    let heads_of = match uneven {
        _ if even && heads < size => {
            let head = coord / (size / heads);
            (head, head + 1)
        }
        _ if even => (heads / size * coord, heads / size * (coord + 1)),
        // Each head on as equal a number of neighbours as can be.
        Uneven::Balanced if heads < size => {
            let head = (u128::from(coord) * u128::from(heads) / u128::from(size)) as u64;
            (head, head + 1)
        }
        Uneven::Balanced => {
            let part = share(heads, seat, Uneven::Balanced)?;
            (part.start, part.stop)
        }
        Uneven::Error => {
            return Err(uneven_error(
                format_args!("{heads} heads over {size} coordinates"),
                "one number that divides the other, or `uneven` as \"balanced\"",
            ));
        }
        _ => {
            return Err(wrong(
                "heads with another choice of `uneven`",
                "\"error\" or \"balanced\": a head is never split",
            ));
        }
    };
    Ok(Part {
        start: heads_of.0 * head_dim,
        stop: heads_of.1 * head_dim,
        zeros: 0,
    })
}

/// The scales of the blocks that a coordinate's part of the weight touches.
fn blocks(
    held: &mut Held,
    dim: usize,
    (block, len, uneven): (u64, u64, Uneven),
    seat: Seat,
) -> Result<()> {
    let whole = match held.weights[dim] {
        Some(weight) if weight.block == block => weight,
        Some(weight) => {
            return Err(wrong(
                format_args!("blocks of {block} after blocks of {}", weight.block),
                "one block size",
            ));
        }
        None => {
            whole_blocks(block, len, extent(&held.dims[dim]))?;
            Weight { at: 0, len, block }
        }
    };
    let part = share(whole.len, seat, uneven)?;
    let weight = Weight {
        at: whole.at + part.start,
        len: part.stop - part.start,
        block,
    };
    // What is held now begins at the block of the weight's first element.
    let (start, stop) = touched(weight);
    let first = touched(whole).0;
    let padded = (weight.at % block)
        .saturating_add(weight.len)
        .saturating_add(part.zeros);
    let kept = Part {
        start: start - first,
        stop: stop - first,
        zeros: match part.zeros {
            0 => 0,
            _ => padded.div_ceil(block).saturating_sub(stop - start),
        },
    };
    held.keep(dim, &[kept])?;
    held.weights[dim] = Some(weight);
    Ok(())
}

fn whole_blocks(block: u64, len: u64, scales: u64) -> Result<()> {
    if block == 0 || len.div_ceil(block) != scales {
        return Err(wrong(
            format_args!("{scales} scales of blocks of {block}"),
            format_args!("one a block of {len} elements"),
        ));
    }
    Ok(())
}

/// The blocks that elements touch.
fn touched(weight: Weight) -> (u64, u64) {
    let Weight { at, len, block } = weight;
    if len == 0 {
        return (at / block, at / block);
    }
    (at / block, (at + len).div_ceil(block))
}

/// A segment of scales: its weight's part must begin with a block, since one number says where it
/// begins for all of a dimension.
fn block_part(scales: u64, (block, len, uneven): (u64, u64, Uneven), seat: Seat) -> Result<Part> {
    whole_blocks(block, len, scales)?;
    let part = share(len, seat, uneven)?;
    if part.start % block != 0 || part.zeros != 0 {
        return Err(Error::new(Reason::Uneven)
            .found(format_args!("a part that begins at {}", part.start))
            .needed(format_args!(
                "parts of whole blocks of {block} in a segment, or `uneven` as {{\"granular\": {block}}}"
            )));
    }
    Ok(Part {
        start: part.start / block,
        stop: part.stop.div_ceil(block),
        zeros: 0,
    })
}
