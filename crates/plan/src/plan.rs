//! Plans: for every rank, which bits of which file go where in its tensors.

use std::ops::Deref;
use std::sync::Arc;

use smallvec::SmallVec;
use tonnage_format::Dtype;

use crate::error::{Error, Reason, Result};
use crate::expr::Expr;
use crate::mesh::Mesh;
use crate::proof::Proof;
use crate::request::{Allow, Place};
use crate::table::{File, Source, Table};
use crate::view::Dims;

/// The layout of a rank that has nothing of a target.
pub(crate) const ABSENT: u32 = u32::MAX;

/// One loop of a [`Nest`], in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loop {
    /// How many positions it has, at least 2.
    pub extent: u64,
    /// Distance between positions in the file. 0 repeats.
    pub src: u64,
    /// Distance between positions in the local tensor.
    pub dst: u64,
}

/// A strided copy: `run` neighbouring bits, over all positions of the loops.
///
/// ```text
/// for each k:  file[src + Σ kₐ · srcₐ ..][..run]  →  tensor[dst + Σ kₐ · dstₐ ..][..run]
/// ```
///
/// Loops stand from the outermost to the innermost in the tensor, so that copies in their order
/// fill it from front to back. All numbers are bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nest {
    /// Position of the source.
    pub source: u32,
    /// Position of the source's file.
    pub file: u32,
    /// The first bit, counted from the start of the file.
    pub src: u64,
    /// The first bit in the local tensor.
    pub dst: u64,
    /// Bits that are neighbours on both sides.
    pub run: u64,
    /// The loops.
    pub loops: SmallVec<[Loop; 3]>,
}

/// Zeros in a local tensor. As a [`Nest`], without a source; the loops' `src` are 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The first bit in the local tensor.
    pub dst: u64,
    /// Bits that are neighbours.
    pub run: u64,
    /// The loops.
    pub loops: SmallVec<[Loop; 3]>,
}

impl Nest {
    /// How many bits it copies.
    pub fn bits(&self) -> u64 {
        bits(self.run, &self.loops)
    }

    /// How many runs it has.
    pub fn runs(&self) -> u64 {
        bits(1, &self.loops)
    }

    /// One past its last bit in the file.
    pub fn src_end(&self) -> u64 {
        end(self.src, self.run, &self.loops, |one| one.src)
    }
}

impl Fill {
    /// How many bits it fills.
    pub fn bits(&self) -> u64 {
        bits(self.run, &self.loops)
    }
}

fn bits(run: u64, loops: &[Loop]) -> u64 {
    loops
        .iter()
        .fold(run, |product, one| product.saturating_mul(one.extent))
}

pub(crate) fn end(start: u64, run: u64, loops: &[Loop], stride: impl Fn(&Loop) -> u64) -> u64 {
    let reach = |one: &Loop| one.extent.saturating_sub(1).saturating_mul(stride(one));
    loops.iter().fold(start.saturating_add(run), |sum, one| {
        sum.saturating_add(reach(one))
    })
}

/// A part of a target that a local tensor holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region {
    /// Its first index in the target.
    pub global: Dims,
    /// Its first index in the local tensor.
    pub local: Dims,
    /// Its extents.
    pub size: Dims,
}

/// What a rank has of a target. Ranks that have the same share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The extents of the local tensor.
    pub shape: Dims,
    /// Which parts of the target it holds, and where. Empty where it is all zeros.
    pub boxes: Vec<Region>,
    /// The copies that fill it.
    pub nests: Vec<Nest>,
    /// What is zeros in it.
    pub fills: Vec<Fill>,
    /// For scales of blocks: how many elements of the first block, in each dimension, belong to ranks
    /// before this one. Empty for other tensors.
    pub block_phase: Dims,
}

impl Layout {
    /// How many elements the local tensor has.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bits that are read for it.
    pub fn needed_bits(&self) -> u64 {
        self.nests.iter().map(Nest::bits).sum()
    }
}

/// A tensor of the plan: what it is made of, and what each rank has of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: Arc<str>,
    /// The dtype of its bytes.
    pub dtype: Dtype,
    /// The dtype that it is cast to after reading, if another.
    pub cast: Option<Dtype>,
    /// Its extents.
    pub shape: Dims,
    /// What it is put together from, if not from the tensor of its name.
    pub expr: Option<Expr>,
    /// Where it goes.
    pub place: Arc<Place>,
    /// What ranks call it, if not by its name.
    pub local: Option<Arc<str>>,
    /// What people should know of it.
    pub note: Option<Arc<str>>,
    /// The different layouts that ranks have.
    pub layouts: Vec<Arc<Layout>>,
    /// For each rank the position of its layout, or [`u32::MAX`] where it has nothing.
    pub(crate) ranks: Arc<[u32]>,
}

impl Target {
    /// What a rank has of it.
    pub fn layout(&self, rank: u32) -> Option<&Arc<Layout>> {
        let position = *self.ranks.get(rank as usize)?;
        self.layouts.get(position as usize)
    }

    /// The ranks that have a layout, given by its position.
    pub fn ranks_of(&self, layout: usize) -> impl Iterator<Item = u32> + '_ {
        let ranks = self.ranks.iter().enumerate();
        ranks.filter_map(move |(rank, &at)| (at as usize == layout).then_some(rank as u32))
    }
}

/// A tensor of one rank. Dereferences to its [`Layout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// Position of its target.
    pub target: u32,
    /// What the rank calls it.
    pub name: Arc<str>,
    /// The dtype of its bytes.
    pub dtype: Dtype,
    /// The dtype that it is cast to after reading, if another.
    pub cast: Option<Dtype>,
    /// What the rank has of the target.
    pub layout: Arc<Layout>,
}

impl Local {
    /// Bytes that it takes, before a cast.
    pub fn bytes(&self) -> u64 {
        (self.layout.elements() * self.dtype.bitsize() as u64).div_ceil(8)
    }
}

impl Deref for Local {
    type Target = Layout;

    fn deref(&self) -> &Layout {
        &self.layout
    }
}

/// Who reads which bytes. Made by [`build`](crate::build), which proves it, or read from JSON, which
/// [`Plan::verify`] does.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) mesh: Mesh,
    pub(crate) table: Table,
    pub(crate) targets: Vec<Target>,
    pub(crate) unread: Allow,
    pub(crate) repeated: Allow,
    pub(crate) proof: Option<Proof>,
}

impl PartialEq for Plan {
    /// Whether two plans say the same; whether they were proved does not matter.
    fn eq(&self, other: &Plan) -> bool {
        self.mesh == other.mesh
            && self.table == other.table
            && self.targets == other.targets
            && self.unread == other.unread
            && self.repeated == other.repeated
    }
}

impl Plan {
    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The files.
    pub fn files(&self) -> &[File] {
        self.table.files()
    }

    /// The sources.
    pub fn sources(&self) -> &[Source] {
        self.table.sources()
    }

    /// The table of files, sources and names.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The targets, in the order of the request.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// What was checked when it was built; a plan from JSON has to be asked to [`Plan::verify`].
    pub fn proof(&self) -> Option<&Proof> {
        self.proof.as_ref()
    }

    /// The tensors of a rank, in the order of the request.
    ///
    /// # Errors
    /// [`Reason::Mesh`] for a rank that the mesh has not.
    pub fn rank(&self, rank: u32) -> Result<Vec<Local>> {
        if rank >= self.mesh.size() {
            return Err(Error::new(Reason::Mesh)
                .found(format_args!("rank {rank}"))
                .needed(format_args!("one of {}", self.mesh.size())));
        }
        let locals = self.targets.iter().enumerate().filter_map(|(at, target)| {
            Some(Local {
                target: at as u32,
                name: target.local.as_ref().unwrap_or(&target.name).clone(),
                dtype: target.dtype,
                cast: target.cast,
                layout: target.layout(rank)?.clone(),
            })
        });
        Ok(locals.collect())
    }
}
