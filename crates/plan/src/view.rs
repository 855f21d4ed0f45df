//! Views: which element of which source stands where in a tensor, as strided sets.
//!
//! A [`View`] has a shape and is covered by nests. A [`Nest`] maps a lattice of indices of the view
//! to a lattice of elements of one source:
//!
//! ```text
//! index  = at  + Σ kₐ · stepₐ in dimension dimₐ      for every kₐ in 0..extentₐ
//! source = src + Σ kₐ · srcₐ                          (elements, from the source's first)
//! ```
//!
//! Several axes may run along one dimension; they are then nested, the step of an outer one being
//! larger than all that the inner ones span. What no source fills is zeros: a nest whose source is
//! [`ZEROS`]. Every operation gives a view again and costs by the nest: a nest is cut only where an
//! operation does not fall on its steps, never row by row.

mod cut;
mod reshape;

use smallvec::SmallVec;
use tonnage_format::Dtype;

use crate::error::{Error, Reason, Result};
use crate::limits;

/// A few numbers, one a dimension.
pub type Dims = SmallVec<[u64; 4]>;

/// The source of what no file fills: zeros.
pub const ZEROS: u32 = u32::MAX;

/// One loop of a [`Nest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// The dimension of the view along which it runs.
    pub dim: u32,
    /// How many positions it has: at least 2, since an axis of one position says nothing.
    pub extent: u64,
    /// Distance between positions, in indices of the dimension.
    pub step: u64,
    /// Distance between positions, in elements of the source. 0 repeats the source.
    pub src: u64,
}

/// The axes of a nest: by dimension, and along one dimension from the outermost to the innermost.
pub type Axes = SmallVec<[Axis; 4]>;

/// A lattice of indices that one source fills, or zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nest {
    /// Position of the source in its table, or [`ZEROS`].
    pub source: u32,
    /// The first index, one number a dimension.
    pub at: Dims,
    /// The element of the source at the first index.
    pub src: u64,
    /// The loops.
    pub axes: Axes,
}

impl Nest {
    /// How many elements it covers.
    pub fn elements(&self) -> u64 {
        self.axes
            .iter()
            .fold(1, |product: u64, axis| product.saturating_mul(axis.extent))
    }

    /// Whether it is zeros.
    pub fn is_zeros(&self) -> bool {
        self.source == ZEROS
    }

    /// The axes along `dim`.
    fn along(&self, dim: usize) -> Axes {
        let runs = |axis: &&Axis| axis.dim as usize == dim;
        self.axes.iter().filter(runs).copied().collect()
    }

    /// The nest with other axes along `dim`, another first index there and another first element.
    fn with(&self, dim: usize, at: u64, src: u64, along: &[Axis]) -> Nest {
        let mut nest = self.clone();
        nest.at[dim] = at;
        nest.src = src;
        nest.axes.retain(|axis| axis.dim as usize != dim);
        let place = nest
            .axes
            .iter()
            .take_while(|axis| (axis.dim as usize) < dim)
            .count();
        nest.axes.insert_many(place, along.iter().copied());
        nest
    }

    /// Brings the axes into their order, and joins those that are one loop.
    fn tidy(&mut self) {
        self.axes
            .sort_unstable_by_key(|axis| (axis.dim, std::cmp::Reverse(axis.step)));
        let mut joined = Axes::new();
        for &axis in &self.axes {
            if axis.extent == 1 {
                continue;
            }
            match joined.last_mut() {
                Some(outer)
                    if outer.dim == axis.dim
                        && outer.step == axis.extent * axis.step
                        && outer.src == axis.extent * axis.src =>
                {
                    *outer = Axis {
                        extent: outer.extent * axis.extent,
                        ..axis
                    };
                }
                _ => joined.push(axis),
            }
        }
        self.axes = joined;
    }
}

/// A tensor as it is put together from sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    dtype: Dtype,
    shape: Dims,
    nests: Vec<Nest>,
}

fn wrong(found: impl std::fmt::Display, needed: impl std::fmt::Display) -> Error {
    Error::new(Reason::View).found(found).needed(needed)
}

/// How many elements a shape has. The product of its extents other than zero must be small enough
/// too, so that no stride overflows.
pub(crate) fn elements(dtype: Dtype, shape: &[u64]) -> Result<u64> {
    if shape.len() > limits::RANK {
        return Err(Error::new(Reason::Limit)
            .found(format_args!("{} dimensions", shape.len()))
            .needed(format_args!("at most {}", limits::RANK)));
    }
    let mut product = 1_u64;
    for &extent in shape.iter().filter(|&&extent| extent != 0) {
        product = product
            .checked_mul(extent)
            .filter(|&count| count <= limits::BITS / dtype.bitsize() as u64)
            .ok_or_else(|| {
                Error::new(Reason::Limit)
                    .found(format_args!("shape {shape:?} of {dtype}"))
                    .needed("a size below 2^62 bits")
            })?;
    }
    Ok(if shape.contains(&0) { 0 } else { product })
}

/// The loops over all of a shape, with `src` counting its elements in row-major order.
fn whole(shape: &[u64]) -> Axes {
    let mut axes = Axes::new();
    let mut stride = 1;
    for (dim, &extent) in shape.iter().enumerate().rev() {
        if extent != 1 {
            axes.push(Axis {
                dim: dim as u32,
                extent,
                step: 1,
                src: stride,
            });
        }
        stride *= extent.max(1);
    }
    axes.reverse();
    axes
}

impl View {
    /// All of a source, as it is.
    ///
    /// # Errors
    /// [`Reason::Limit`] for a shape that is too large to count.
    pub fn source(source: u32, dtype: Dtype, shape: &[u64]) -> Result<View> {
        let mut view = View::empty(dtype, shape)?;
        if !shape.contains(&0) {
            view.nests.push(Nest {
                source,
                at: Dims::from_elem(0, shape.len()),
                src: 0,
                axes: whole(shape),
            });
        }
        Ok(view)
    }

    /// Zeros.
    ///
    /// # Errors
    /// As [`View::source`].
    pub fn zeros(dtype: Dtype, shape: &[u64]) -> Result<View> {
        let mut view = View::source(ZEROS, dtype, shape)?;
        for axis in view.nests.iter_mut().flat_map(|nest| &mut nest.axes) {
            axis.src = 0;
        }
        Ok(view)
    }

    /// A view of this shape that nothing fills yet.
    fn empty(dtype: Dtype, shape: &[u64]) -> Result<View> {
        elements(dtype, shape)?;
        Ok(View {
            dtype,
            shape: shape.into(),
            nests: Vec::new(),
        })
    }

    /// Parts laid side by side: each view with the index at which it begins. They need not fill the
    /// shape, and may overlap: a proof says whether they tile it.
    ///
    /// # Errors
    /// [`Reason::View`] for a part of another dtype or one that reaches past the shape.
    pub fn mosaic(dtype: Dtype, shape: &[u64], parts: &[(View, Dims)]) -> Result<View> {
        let mut whole = View::empty(dtype, shape)?;
        for (part, at) in parts {
            part.has_dtype(dtype)?;
            let fits = part.shape.len() == shape.len() && at.len() == shape.len();
            let inside = |dim: usize| {
                let end = at[dim].checked_add(part.shape[dim]);
                end.is_some_and(|end| end <= shape[dim])
            };
            if !fits || !(0..shape.len()).all(inside) {
                return Err(wrong(
                    format_args!("a part of shape {:?} at {at:?}", part.shape),
                    format_args!("one inside of {shape:?}"),
                ));
            }
            for nest in &part.nests {
                let mut nest = nest.clone();
                nest.at.iter_mut().zip(at).for_each(|(a, by)| *a += by);
                whole.push(nest)?;
            }
        }
        Ok(whole)
    }

    /// The dtype of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its extents.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// What fills it. Nests are disjoint, unless it was made by [`View::mosaic`] of parts that
    /// overlap.
    pub fn nests(&self) -> &[Nest] {
        &self.nests
    }

    /// How many elements it has.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    fn push(&mut self, nest: Nest) -> Result<()> {
        if self.nests.len() >= limits::NESTS {
            return Err(Error::new(Reason::Limit)
                .found("a view of more pieces")
                .needed(format_args!("at most {}", limits::NESTS)));
        }
        self.nests.push(nest);
        Ok(())
    }

    fn has_dtype(&self, dtype: Dtype) -> Result<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(wrong(self.dtype, dtype))
    }

    /// The position of a dimension, which may count from the end.
    ///
    /// # Errors
    /// [`Reason::View`] where there is no such dimension.
    pub fn dim(&self, dim: i64) -> Result<usize> {
        position(dim, self.shape.len())
    }

    /// The same nests, but that `f` changes each, in another shape.
    fn map(&self, shape: Dims, f: impl Fn(&mut Nest)) -> Result<View> {
        elements(self.dtype, &shape)?;
        let mut nests = self.nests.clone();
        nests.iter_mut().for_each(f);
        Ok(View {
            dtype: self.dtype,
            shape,
            nests,
        })
    }

    /// `start`, `start + step`, … below `stop` of a dimension.
    ///
    /// # Errors
    /// [`Reason::View`] for a step of zero, or a range that does not lie inside of the dimension.
    pub fn slice(&self, dim: i64, start: u64, stop: u64, step: u64) -> Result<View> {
        let dim = self.dim(dim)?;
        let extent = self.shape[dim];
        if step == 0 || start > stop || stop > extent {
            return Err(wrong(
                format_args!("{start}..{stop} step {step} of dimension {dim}"),
                format_args!("a step of at least 1, within 0..{extent}"),
            ));
        }
        if (start, stop, step) == (0, extent, 1) {
            return Ok(self.clone());
        }
        // A longer step takes the first index alone, as this one does.
        let step = step.min((stop - start).max(1));
        let mut shape = self.shape.clone();
        shape[dim] = (stop - start).div_ceil(step);
        let mut view = View::empty(self.dtype, &shape)?;
        if shape.contains(&0) {
            return Ok(view);
        }
        for nest in &self.nests {
            cut::slice(nest, dim, start, stop, step, &mut |piece| view.push(piece))?;
        }
        Ok(view)
    }

    /// Views one behind the other along a dimension.
    ///
    /// # Errors
    /// [`Reason::View`] for none, for other dtypes, or for extents that differ elsewhere.
    pub fn concat(views: &[View], dim: i64) -> Result<View> {
        let first = views
            .first()
            .ok_or_else(|| wrong("nothing to concatenate", "at least one view"))?;
        let dim = first.dim(dim)?;
        let mut shape = first.shape.clone();
        shape[dim] = 0;
        for view in views {
            view.has_dtype(first.dtype)?;
            let alike = view.shape.len() == shape.len()
                && (0..shape.len()).all(|d| d == dim || view.shape[d] == shape[d]);
            if !alike {
                return Err(wrong(
                    format_args!("shape {:?} beside {:?}", view.shape, first.shape),
                    format_args!("extents that differ in dimension {dim} only"),
                ));
            }
            shape[dim] = shape[dim]
                .checked_add(view.shape[dim])
                .ok_or_else(|| Error::new(Reason::Limit).found("a dimension past 2^64"))?;
        }
        let mut joined = View::empty(first.dtype, &shape)?;
        let mut start = 0;
        for view in views {
            for nest in &view.nests {
                let mut nest = nest.clone();
                nest.at[dim] += start;
                joined.push(nest)?;
            }
            start += view.shape[dim];
        }
        Ok(joined)
    }

    /// Views of one shape as the indices of a new dimension.
    ///
    /// # Errors
    /// As [`View::concat`].
    pub fn stack(views: &[View], dim: i64) -> Result<View> {
        let first = views
            .first()
            .ok_or_else(|| wrong("nothing to stack", "at least one view"))?;
        let dim = position(dim, first.shape.len() + 1)?;
        let layers: Result<Vec<View>> = views.iter().map(|view| view.insert(dim)).collect();
        View::concat(&layers?, dim as i64)
    }

    /// A new dimension of extent 1 before `dim`.
    fn insert(&self, dim: usize) -> Result<View> {
        let mut shape = self.shape.clone();
        shape.insert(dim, 1);
        self.map(shape, |nest| {
            nest.at.insert(dim, 0);
            for axis in &mut nest.axes {
                axis.dim += u32::from(axis.dim as usize >= dim);
            }
        })
    }

    /// The dimensions in another order: dimension `i` of the result is dimension `dims[i]` of this.
    ///
    /// # Errors
    /// [`Reason::View`] where `dims` is not each dimension once.
    pub fn permute(&self, dims: &[i64]) -> Result<View> {
        let order: Result<Vec<usize>> = dims.iter().map(|&dim| self.dim(dim)).collect();
        let order = order?;
        let mut place = vec![usize::MAX; self.shape.len()];
        for (to, &from) in order.iter().enumerate() {
            place[from] = to;
        }
        if order.len() != self.shape.len() || place.contains(&usize::MAX) {
            return Err(wrong(
                format_args!("the order {dims:?}"),
                format_args!("each of {} dimensions once", self.shape.len()),
            ));
        }
        let shape = order.iter().map(|&from| self.shape[from]).collect();
        self.map(shape, |nest| {
            nest.at = order.iter().map(|&from| nest.at[from]).collect();
            for axis in &mut nest.axes {
                axis.dim = place[axis.dim as usize] as u32;
            }
            nest.tidy();
        })
    }

    /// The same elements, in row-major order, in another shape.
    ///
    /// # Errors
    /// [`Reason::View`] for a shape of another number of elements.
    pub fn reshape(&self, shape: &[u64]) -> Result<View> {
        if elements(self.dtype, shape)? != self.elements() {
            return Err(wrong(
                format_args!("{} elements of shape {:?}", self.elements(), self.shape),
                format_args!("as many as shape {shape:?} has"),
            ));
        }
        if shape.contains(&0) {
            return View::empty(self.dtype, shape);
        }
        let mut view = View::empty(self.dtype, shape)?;
        reshape::reshape(&self.nests, &self.shape, shape, &mut |nest| view.push(nest))?;
        Ok(view)
    }

    /// Views of one shape, of which each gives one index of `dim` in turn: element `i · n + j` of the
    /// result is element `i` of view `j` of `n`.
    ///
    /// # Errors
    /// As [`View::concat`].
    pub fn interleave(views: &[View], dim: i64) -> Result<View> {
        let first = views
            .first()
            .ok_or_else(|| wrong("nothing to interleave", "at least one view"))?;
        let dim = first.dim(dim)?;
        let turns = views.len() as u64;
        let mut shape = first.shape.clone();
        shape[dim] = shape[dim]
            .checked_mul(turns)
            .ok_or_else(|| Error::new(Reason::Limit).found("a dimension past 2^64"))?;
        let mut woven = View::empty(first.dtype, &shape)?;
        for (turn, view) in views.iter().enumerate() {
            view.has_dtype(first.dtype)?;
            if view.shape != first.shape {
                return Err(wrong(
                    format_args!("shape {:?} beside {:?}", view.shape, first.shape),
                    "views of one shape",
                ));
            }
            for nest in &view.nests {
                let mut nest = nest.clone();
                nest.at[dim] = nest.at[dim] * turns + turn as u64;
                for axis in &mut nest.axes {
                    if axis.dim as usize == dim {
                        axis.step *= turns;
                    }
                }
                woven.push(nest)?;
            }
        }
        Ok(woven)
    }

    /// The whole dimension `times` times, one copy behind the other.
    ///
    /// # Errors
    /// [`Reason::View`] where there is no such dimension; [`Reason::Limit`].
    pub fn repeat(&self, dim: i64, times: u64) -> Result<View> {
        let dim = self.dim(dim)?;
        let extent = self.shape[dim];
        let mut shape = self.shape.clone();
        shape[dim] = extent
            .checked_mul(times)
            .ok_or_else(|| Error::new(Reason::Limit).found("a dimension past 2^64"))?;
        if times == 0 {
            return View::empty(self.dtype, &shape);
        }
        self.map(shape, |nest| {
            if times > 1 {
                let again = Axis {
                    dim: dim as u32,
                    extent: times,
                    step: extent,
                    src: 0,
                };
                nest.axes.push(again);
                nest.tidy();
            }
        })
    }

    /// Zeros before and after, along a dimension.
    ///
    /// # Errors
    /// As [`View::repeat`].
    pub fn pad(&self, dim: i64, before: u64, after: u64) -> Result<View> {
        let dim = self.dim(dim)?;
        let zeros = |extent: u64| {
            let mut shape = self.shape.clone();
            shape[dim] = extent;
            View::zeros(self.dtype, &shape)
        };
        View::concat(&[zeros(before)?, self.clone(), zeros(after)?], dim as i64)
    }

    /// The part of the view from `start`, of extents `size`.
    pub(crate) fn crop(&self, start: &[u64], size: &[u64]) -> Result<View> {
        let mut view = self.clone();
        for (dim, (&start, &size)) in start.iter().zip(size).enumerate() {
            view = view.slice(dim as i64, start, start.saturating_add(size), 1)?;
        }
        Ok(view)
    }
}

/// The position of a dimension that may count from the end.
pub(crate) fn position(dim: i64, rank: usize) -> Result<usize> {
    let counted = if dim < 0 { dim + rank as i64 } else { dim };
    usize::try_from(counted)
        .ok()
        .filter(|&dim| dim < rank)
        .ok_or_else(|| {
            wrong(
                format_args!("dimension {dim}"),
                format_args!("one of {rank}"),
            )
        })
}
