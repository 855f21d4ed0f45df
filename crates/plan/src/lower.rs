//! From index space to bits: what a coordinate holds of a view, as strided copies.

use smallvec::SmallVec;

use crate::error::{Error, Reason, Result};
use crate::limits;
use crate::placement::Held;
use crate::plan::{Fill, Layout, Loop, Nest, Region};
use crate::table::Source;
use crate::view::{self, Dims, View, ZEROS, elements};

type Loops = SmallVec<[Loop; 8]>;

/// The layout of what is held of a view.
pub(crate) fn layout(view: &View, held: &Held, sources: &[Source]) -> Result<Layout> {
    let shape = held.shape();
    elements(view.dtype(), &shape)?;
    let mut lower = Lower {
        view,
        sources,
        strides: strides(&shape, view.dtype().bitsize() as u64),
        plain: plain(view),
        layout: Layout {
            shape: shape.clone(),
            boxes: Vec::new(),
            nests: Vec::new(),
            fills: Vec::new(),
            block_phase: held.phase(),
        },
    };
    if shape.contains(&0) {
        return Ok(lower.layout);
    }
    if held.zeros {
        lower.fill(&Dims::from_elem(0, shape.len()), &shape);
        return Ok(lower.layout);
    }
    each_box(held, &mut |region, zeros| {
        if zeros {
            lower.fill(&region.local, &region.size);
            return Ok(());
        }
        lower.region(region)
    })?;
    Ok(lower.layout)
}

/// Bits between neighbours, for each dimension of a row-major tensor.
pub(crate) fn strides(shape: &[u64], bits: u64) -> Dims {
    let mut strides = Dims::from_elem(bits, shape.len());
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim].saturating_mul(shape[dim].max(1));
    }
    strides
}

/// Every combination of the runs of all dimensions, in row-major order: the part of the local tensor,
/// with its place in the target, and whether it is zeros.
pub(crate) fn each_box(
    held: &Held,
    each: &mut dyn FnMut(Region, bool) -> Result<()>,
) -> Result<()> {
    let count = held
        .dims
        .iter()
        .fold(1_usize, |product, runs| product.saturating_mul(runs.len()));
    if count > limits::NESTS {
        return Err(Error::new(Reason::Limit)
            .found(format_args!("{count} pieces of a tensor on one rank"))
            .needed(format_args!("at most {}", limits::NESTS)));
    }
    let rank = held.dims.len();
    let mut at: SmallVec<[usize; 4]> = SmallVec::from_elem(0, rank);
    let mut local = Dims::from_elem(0, rank);
    for _ in 0..count {
        let runs = (0..rank).map(|dim| held.dims[dim][at[dim]]);
        let mut region = Region {
            global: Dims::new(),
            local: local.clone(),
            size: Dims::new(),
        };
        let mut zeros = false;
        for run in runs {
            region.global.push(run.at);
            region.size.push(run.len);
            zeros |= run.zeros;
        }
        each(region, zeros)?;
        for dim in (0..rank).rev() {
            let len = held.dims[dim][at[dim]].len;
            at[dim] += 1;
            if at[dim] < held.dims[dim].len() {
                local[dim] += len;
                break;
            }
            (at[dim], local[dim]) = (0, 0);
        }
    }
    Ok(())
}

/// The one nest of a view that has no other, if it is all of the view in steps of one.
fn plain(view: &View) -> Option<&view::Nest> {
    let [nest] = view.nests() else { return None };
    let shape = view.shape();
    let mut next = 0;
    for axis in &nest.axes {
        let dim = axis.dim as usize;
        // The dimensions in between have extent 1.
        let gap = shape.get(next..dim)?;
        if axis.step != 1 || Some(&axis.extent) != shape.get(dim) || gap.iter().any(|&n| n != 1) {
            return None;
        }
        next = dim + 1;
    }
    shape.get(next..)?.iter().all(|&n| n == 1).then_some(nest)
}

struct Lower<'a> {
    view: &'a View,
    sources: &'a [Source],
    strides: Dims,
    plain: Option<&'a view::Nest>,
    layout: Layout,
}

impl Lower<'_> {
    fn offset(&self, local: &[u64]) -> u64 {
        let at = local.iter().zip(&self.strides);
        at.map(|(index, stride)| index * stride).sum()
    }

    fn fill(&mut self, local: &[u64], size: &[u64]) {
        let loops = size.iter().zip(&self.strides);
        let loops = loops.map(|(&extent, &dst)| Loop {
            extent,
            src: 0,
            dst,
        });
        let bits = self.view.dtype().bitsize() as u64;
        let (run, loops) = tidy(bits, loops.collect(), true);
        let dst = self.offset(local);
        self.layout.fills.push(Fill { dst, run, loops });
    }

    fn region(&mut self, region: Region) -> Result<()> {
        match self.plain {
            Some(nest) => {
                let mut cut = nest.clone();
                cut.axes.clear();
                for axis in &nest.axes {
                    let dim = axis.dim as usize;
                    cut.src += region.global[dim] * axis.src;
                    let extent = region.size[dim];
                    if extent > 1 {
                        cut.axes.push(view::Axis { extent, ..*axis });
                    }
                }
                self.nest(&cut, &region.local);
            }
            None => {
                let part = self.view.crop(&region.global, &region.size)?;
                for nest in part.nests() {
                    self.nest(nest, &region.local);
                }
            }
        }
        if self.layout.nests.len() + self.layout.fills.len() > limits::NESTS {
            return Err(Error::new(Reason::Limit)
                .found("a local tensor of more pieces")
                .needed(format_args!("at most {}", limits::NESTS)));
        }
        self.layout.boxes.push(region);
        Ok(())
    }

    /// Adds a nest of a part that begins at `local`.
    fn nest(&mut self, nest: &view::Nest, local: &[u64]) {
        let bits = self.view.dtype().bitsize() as u64;
        let dst = self.offset(local) + self.offset(&nest.at);
        let loops = nest.axes.iter().map(|axis| Loop {
            extent: axis.extent,
            src: axis.src * bits,
            dst: axis.step * self.strides[axis.dim as usize],
        });
        let zeros = nest.source == ZEROS;
        let (run, loops) = tidy(bits, loops.collect(), zeros);
        match self.sources.get(nest.source as usize) {
            Some(source) if !zeros => self.layout.nests.push(Nest {
                source: nest.source,
                file: source.file,
                src: source.offset * 8 + nest.src * bits,
                dst,
                run,
                loops,
            }),
            _ => self.layout.fills.push(Fill { dst, run, loops }),
        }
    }
}

/// Loops in the order of the tensor, those that are one joined, the innermost as a run where it is
/// neighbours on both sides; zeros are neighbours wherever the tensor's bits are.
fn tidy(bits: u64, mut loops: Loops, zeros: bool) -> (u64, SmallVec<[Loop; 3]>) {
    loops.retain(|one| one.extent > 1);
    if !loops.is_sorted_by(|a, b| a.dst >= b.dst) {
        loops.sort_unstable_by_key(|one| std::cmp::Reverse(one.dst));
    }
    let mut run = bits;
    while let Some(inner) = loops.last() {
        if inner.dst != run || (inner.src != run && !zeros) {
            break;
        }
        run *= inner.extent;
        loops.pop();
    }
    let mut joined: SmallVec<[Loop; 3]> = SmallVec::new();
    for one in loops {
        match joined.last_mut() {
            Some(outer)
                if outer.dst == one.extent * one.dst && outer.src == one.extent * one.src =>
            {
                *outer = Loop {
                    extent: outer.extent * one.extent,
                    ..one
                };
            }
            _ => joined.push(one),
        }
    }
    (run, joined)
}
