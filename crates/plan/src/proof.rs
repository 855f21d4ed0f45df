//! The proof: what a plan must hold, checked before a byte is read.
//!
//! * **Destinations**: the copies and zeros of every local tensor fill it, each bit once.
//! * **Sources**: every source is read, each element by as many targets as any other; once, unless
//!   whole tensors are tied. A repetition that an expression asks for counts as one. Every part of
//!   a target is on some rank; which ranks have it follows from the placements, which are kept in
//!   the plan and applied anew.
//! * **Bounds**: copies lie inside of their source; those of sub-byte dtypes begin and end on bytes.
//! * **Semantics**: at the corners of every copy, on its first steps and at points in between, the
//!   element is the one that expression and placements say, word by word: the reference that is asked
//!   shares no code with the planner. [`Plan::check_every_element`] asks it of all elements.
//!
//! Ranks compare [`Plan::digest`] before they rely on each other's plans.

mod compare;
mod reference;
mod tile;

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;
use tonnage_format::Dtype;

use crate::build::Seats;
use crate::error::{Error, Reason, Result};
use crate::limits;
use crate::lower::each_box;
use crate::mesh::MeshAxis;
use crate::placement::Placement;
use crate::plan::{ABSENT, Layout, Loop, Nest, Plan, Region, Target, end};
use crate::table::Source;
use crate::view::{Dims, View};
use compare::Compare;
use reference::{Node, Way, unravel};
use tile::{Cover, Lattice, cover};

/// What was checked, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Sources of which every element is read.
    pub sources: u64,
    /// Targets, each wholly on some ranks.
    pub targets: u64,
    /// Different local tensors, each filled exactly once.
    pub layouts: u64,
    /// Copies, each inside of its source.
    pub nests: u64,
    /// Elements that were compared with the reference.
    pub points: u64,
    /// Names of tensors that stay unread, in whole or in part, as the request allows.
    pub unread: Vec<Arc<str>>,
    /// Names of tensors that are read by several targets.
    pub repeated: Vec<Arc<str>>,
}

impl Plan {
    /// Checks the plan by itself, as it came from JSON.
    ///
    /// # Errors
    /// An [`Error`] that names the tensor and the range, with what was found and what was needed.
    pub fn verify(&self) -> Result<Proof> {
        let views: Result<Vec<View>> = self
            .targets
            .iter()
            .map(|target| {
                self.view(target)
                    .map_err(|error| error.tensor(&target.name))
            })
            .collect();
        let mut seats = Seats::new(&self.mesh);
        for target in &self.targets {
            self.declared(target, &mut seats)
                .map_err(|error| error.tensor(&target.name))?;
        }
        self.prove(&views?)
    }

    /// The view that a target is.
    pub(crate) fn view(&self, target: &Target) -> Result<View> {
        let view = match &target.expr {
            Some(expr) => expr.view(&|name| self.table.view(name))?,
            None => self.table.view(&target.name)?,
        };
        if view.shape() != &*target.shape || view.dtype() != target.dtype {
            return Err(Error::new(Reason::View)
                .found(format_args!("shape {:?} of {}", view.shape(), view.dtype()))
                .needed(format_args!("{:?} of {}", target.shape, target.dtype)));
        }
        Ok(view)
    }

    /// Checks that each rank has what the placements say.
    fn declared(&self, target: &Target, seats: &mut Seats<'_>) -> Result<()> {
        let (held, ranks) = seats.held(&target.shape, &target.place)?;
        let differs = |rank: usize, found: String| {
            Err(Error::new(Reason::Placement)
                .range(format_args!("rank {rank}"))
                .found(found)
                .needed("what the placements say"))
        };
        let mut seen: Vec<Option<u32>> = vec![None; held.len()];
        for (rank, (&given, &wanted)) in target.ranks.iter().zip(ranks.iter()).enumerate() {
            let layout = target.layouts.get(given as usize);
            let (Some(layout), Some(held)) = (layout, held.get(wanted as usize)) else {
                if given == wanted {
                    continue;
                }
                let found = if given == ABSENT {
                    "no tensor"
                } else {
                    "a tensor"
                };
                return differs(rank, found.to_owned());
            };
            // The same layout, for the same thing held, was compared before.
            let known = seen.get(wanted as usize).copied().flatten();
            if known == Some(given) {
                continue;
            }
            let mut boxes: Vec<Region> = Vec::new();
            if !held.zeros && !held.shape().contains(&0) {
                each_box(held, &mut |region, zeros| {
                    if !zeros {
                        boxes.push(region);
                    }
                    Ok(())
                })?;
            }
            let same = layout.shape == held.shape()
                && layout.boxes == boxes
                && layout.block_phase == held.phase();
            if !same {
                return differs(
                    rank,
                    format!("shape {:?}, {:?}", layout.shape, layout.boxes.first()),
                );
            }
            if let Some(one) = seen.get_mut(wanted as usize) {
                *one = Some(given);
            }
        }
        Ok(())
    }

    /// Checks the copies, given the views of all targets.
    pub(crate) fn prove(&self, views: &[View]) -> Result<Proof> {
        let mut proof = Proof::default();
        for target in &self.targets {
            self.target(target, &mut proof)
                .map_err(|error| error.tensor(&target.name))?;
        }
        self.names_differ()?;
        self.sources_covered(views, &mut proof)?;
        Ok(proof)
    }

    /// Checks that no rank has two tensors of one name.
    fn names_differ(&self) -> Result<()> {
        let name = |target: &Target| target.local.as_ref().unwrap_or(&target.name).clone();
        let mut known: HashMap<Arc<str>, SmallVec<[usize; 1]>> =
            HashMap::with_capacity(self.targets.len());
        for (at, target) in self.targets.iter().enumerate() {
            let others = known.entry(name(target)).or_default();
            for other in others.iter().filter_map(|&other| self.targets.get(other)) {
                let mut both = target.ranks.iter().zip(other.ranks.iter());
                if let Some(rank) = both.position(|(one, two)| *one != ABSENT && *two != ABSENT) {
                    return Err(Error::new(Reason::Form)
                        .tensor(&target.name)
                        .range(format_args!("rank {rank}"))
                        .found(format_args!("another tensor called {:?}", name(target)))
                        .needed("each name once on a rank"));
                }
            }
            if others.len() >= limits::SAME_NAME {
                return Err(Error::new(Reason::Limit)
                    .tensor(&target.name)
                    .found(format_args!("more than {} of this name", limits::SAME_NAME)));
            }
            others.push(at);
        }
        Ok(())
    }

    fn target(&self, target: &Target, proof: &mut Proof) -> Result<()> {
        let bits = target.dtype.bitsize() as u64;
        let node = match &target.expr {
            Some(expr) => Node::of(&self.table, expr, 0)?,
            None => Node::named(&self.table, &target.name)?,
        };
        let placed = self.placed(target)?;
        for (at, layout) in target.layouts.iter().enumerate() {
            filled(layout, bits)?;
            for nest in &layout.nests {
                inside(nest, target.dtype, self.sources())?;
            }
            for fill in &layout.fills {
                whole_bytes(target.dtype, 0, fill.dst, fill.run, &fill.loops)?;
            }
            let Some(rank) = target.ranks_of(at).next() else {
                return Err(Error::new(Reason::Form)
                    .found("a layout that no rank has")
                    .needed("each layout on a rank"));
            };
            let way = Way::of(&target.shape, &placed, rank)?;
            let compare = Compare {
                sources: self.sources(),
                layout,
                node: &node,
                way: way.as_ref(),
                bits,
            };
            proof.points += compare.points()?;
            proof.nests += layout.nests.len() as u64;
            proof.layouts += 1;
        }
        if self.unread.allows(&target.name) || on_ranks(target)? {
            proof.targets += 1;
        }
        Ok(())
    }

    /// The axes that a target is placed on, in their order.
    fn placed<'a>(&self, target: &'a Target) -> Result<SmallVec<[(MeshAxis, &'a Placement); 4]>> {
        let names: SmallVec<[&str; 4]> = target.place.keys().map(String::as_str).collect();
        let order = self.mesh.in_order(&names)?.into_iter();
        Ok(order
            .filter_map(|(name, axis)| Some((axis, target.place.get(name)?)))
            .collect())
    }

    /// Compares every element of every local tensor with the reference, for plans of at most `limit`
    /// elements on all ranks, and gives their number.
    ///
    /// # Errors
    /// [`Reason::Semantics`] with the first element that differs, [`Reason::Limit`].
    pub fn check_every_element(&self, limit: u64) -> Result<u64> {
        let mut count = 0_u64;
        for target in &self.targets {
            let node = match &target.expr {
                Some(expr) => Node::of(&self.table, expr, 0)?,
                None => Node::named(&self.table, &target.name)?,
            };
            let placed = self.placed(target)?;
            for (rank, &at) in target.ranks.iter().enumerate() {
                let Some(layout) = target.layouts.get(at as usize) else {
                    continue;
                };
                count = count.saturating_add(layout.elements());
                if count > limit {
                    return Err(Error::new(Reason::Limit)
                        .found("a plan of more elements")
                        .needed(format_args!("at most {limit}")));
                }
                let way = Way::of(&target.shape, &placed, rank as u32)?;
                let compare = Compare {
                    sources: self.sources(),
                    layout,
                    node: &node,
                    way: way.as_ref(),
                    bits: target.dtype.bitsize() as u64,
                };
                compare.all().map_err(|error| {
                    error
                        .tensor(&target.name)
                        .range_or(format_args!("rank {rank}"))
                })?;
            }
        }
        Ok(count)
    }

    /// Checks that each element of each source is read as often as the others.
    fn sources_covered(&self, views: &[View], proof: &mut Proof) -> Result<()> {
        let mut readers: Vec<SmallVec<[(u32, u32); 1]>> =
            vec![SmallVec::new(); self.sources().len()];
        for (target, view) in views.iter().enumerate() {
            for (at, nest) in view.nests().iter().enumerate() {
                if let Some(readers) = readers.get_mut(nest.source as usize) {
                    readers.push((target as u32, at as u32));
                }
            }
        }
        for (source, readers) in self.sources().iter().zip(&readers) {
            let nests = readers.iter().filter_map(|&(target, at)| {
                let nest = views.get(target as usize)?.nests().get(at as usize)?;
                Some(Lattice {
                    start: nest.src,
                    run: 1,
                    // What an expression repeats is declared: it counts once.
                    loops: nest
                        .axes
                        .iter()
                        .filter(|axis| axis.src != 0)
                        .map(|axis| (axis.extent, axis.src))
                        .collect(),
                })
            });
            self.source_covered(source, cover(source.elements(), nests), proof)
                .map_err(|error| error.tensor(&source.name))?;
        }
        for name in self.table.unknown() {
            if !self.unread.allows(name) {
                return Err(Error::new(Reason::Unread)
                    .tensor(name)
                    .found("a dtype that is not known")
                    .needed("a request that leaves it unread: \"unread\": [names]"));
            }
            proof.unread.push(name.clone());
        }
        Ok(())
    }

    fn source_covered(&self, source: &Source, found: Cover, proof: &mut Proof) -> Result<()> {
        let range = |from: u64, to: u64| {
            format!(
                "elements {from}..{to} of {}, from index {:?}",
                source.elements(),
                unravel(from, &source.shape)
            )
        };
        match found {
            Cover::Times(1) => {}
            Cover::Times(_) => proof.repeated.push(source.name.clone()),
            Cover::Gap(from, to) => {
                if !self.unread.allows(&source.name) {
                    return Err(Error::new(Reason::Unread)
                        .range(range(from, to))
                        .found("no target that takes them")
                        .needed("each element in a target, or \"unread\": [names]"));
                }
                proof.unread.push(source.name.clone());
                return Ok(());
            }
            Cover::Over(from, to) if !self.repeated.allows(&source.name) => {
                return Err(Error::new(Reason::Repeated)
                    .range(range(from, to))
                    .found("more targets that take them than take others")
                    .needed("each element as often as any other, or \"repeated\": [names]"));
            }
            Cover::Unlike if !self.repeated.allows(&source.name) => {
                return Err(Error::new(Reason::Repeated)
                    .found("elements that more targets take than take others")
                    .needed("each element as often as any other, or \"repeated\": [names]"));
            }
            Cover::Over(..) | Cover::Unlike => proof.repeated.push(source.name.clone()),
            Cover::Past(from, to) => {
                return Err(Error::new(Reason::Bounds)
                    .range(range(from, to))
                    .needed(format_args!("{} elements", source.elements())));
            }
        }
        proof.sources += 1;
        Ok(())
    }
}

fn lattice(start: u64, run: u64, loops: &[Loop]) -> Lattice {
    Lattice {
        start,
        run,
        loops: loops.iter().map(|one| (one.extent, one.dst)).collect(),
    }
}

/// Checks that copies and zeros fill the tensor, each bit once.
fn filled(layout: &Layout, bits: u64) -> Result<()> {
    let size = layout.elements().saturating_mul(bits);
    let nests = layout.nests.iter();
    let copies = nests.map(|nest| lattice(nest.dst, nest.run, &nest.loops));
    let fills = layout.fills.iter();
    let zeros = fills.map(|fill| lattice(fill.dst, fill.run, &fill.loops));
    let (range, found) = match cover(size, copies.chain(zeros)) {
        Cover::Times(1) => return Ok(()),
        Cover::Times(times) => ((0, size), format!("bits that {times} copies fill")),
        Cover::Gap(from, to) => ((from, to), "bits that no copy fills".to_owned()),
        Cover::Over(from, to) => ((from, to), "bits that several copies fill".to_owned()),
        Cover::Past(from, to) => ((from, to), "bits past the end".to_owned()),
        Cover::Unlike => ((0, size), "bits that no copy fills, or several".to_owned()),
    };
    Err(Error::new(Reason::Destination)
        .range(format_args!(
            "bits {}..{} of a local tensor of shape {:?}",
            range.0, range.1, layout.shape
        ))
        .found(found)
        .needed("each bit filled once"))
}

/// Checks that a copy lies inside of its source.
fn inside(nest: &Nest, dtype: Dtype, sources: &[Source]) -> Result<()> {
    let source = sources
        .get(nest.source as usize)
        .filter(|source| source.file == nest.file && source.dtype == dtype)
        .ok_or_else(|| {
            Error::new(Reason::Bounds)
                .found(format_args!(
                    "a copy of {dtype} from source {}",
                    nest.source
                ))
                .needed("a source of this dtype in this file")
        })?;
    let begin = source.offset * 8;
    let stop = begin + source.bits();
    let last = end(nest.src, nest.run, &nest.loops, |one| one.src);
    if nest.src < begin || last > stop {
        return Err(Error::new(Reason::Bounds)
            .range(format_args!(
                "bits {}..{last} of file {}",
                nest.src, nest.file
            ))
            .found(format_args!("a copy from {:?}", source.name))
            .needed(format_args!("bits within {begin}..{stop}")));
    }
    whole_bytes(dtype, nest.src, nest.dst, nest.run, &nest.loops)
}

/// Checks that a copy moves whole bytes.
fn whole_bytes(dtype: Dtype, src: u64, dst: u64, run: u64, loops: &[Loop]) -> Result<()> {
    let strides = loops.iter().flat_map(|one| [one.src, one.dst]);
    let mut numbers = [src, dst, run].into_iter().chain(strides);
    match numbers.find(|bits| bits % 8 != 0) {
        None => Ok(()),
        Some(bits) => Err(Error::new(Reason::Granularity)
            .range(format_args!(
                "a copy of runs of {run} bits from bit {src} to bit {dst}"
            ))
            .found(format_args!("a position or distance of {bits} bits"))
            .needed(format_args!(
                "a multiple of {} elements of {dtype}: {{\"granular\": n}}, or another dimension",
                elements_a_byte(dtype)
            ))),
    }
}

/// The fewest elements that fill whole bytes.
fn elements_a_byte(dtype: Dtype) -> u32 {
    let mut count = 1;
    while !(dtype.bitsize() as u32 * count).is_multiple_of(8) {
        count += 1;
    }
    count
}

/// Cells of the grid that the boxes of all ranks cut a target into, at most.
const CELLS: usize = 1 << 22;

/// Checks that every part of a target is on some rank.
fn on_ranks(target: &Target) -> Result<bool> {
    if target.shape.contains(&0) {
        return Ok(true);
    }
    let rank = target.shape.len();
    let boxes = || target.layouts.iter().flat_map(|layout| &layout.boxes);
    let whole = |one: &Region| one.size == target.shape && one.global.iter().all(|&at| at == 0);
    if boxes().any(whole) {
        return Ok(true);
    }
    let mut cuts: SmallVec<[Vec<u64>; 4]> = SmallVec::from_elem(Vec::new(), rank);
    for one in boxes() {
        for (dim, cuts) in cuts.iter_mut().enumerate() {
            let (from, len) = (one.global[dim], one.size[dim]);
            cuts.extend([from, from.saturating_add(len)]);
        }
    }
    let mut cells = 1_usize;
    for (cuts, &extent) in cuts.iter_mut().zip(&target.shape) {
        cuts.extend([0, extent]);
        cuts.sort_unstable();
        cuts.dedup();
        cells = cells.saturating_mul(cuts.len() - 1);
        if cuts.last() != Some(&extent) || cells > CELLS {
            return Err(Error::new(Reason::Bounds)
                .found(format_args!("parts that end at {:?}", cuts.last()))
                .needed(format_args!("{extent}, and at most {CELLS} parts")));
        }
    }
    let mut covered = vec![false; cells];
    for one in boxes() {
        mark(one, &cuts, &mut covered);
    }
    let Some(hole) = covered.iter().position(|&covered| !covered) else {
        return Ok(true);
    };
    let counts: Dims = cuts.iter().map(|cuts| cuts.len() as u64 - 1).collect();
    let cell = unravel(hole as u64, &counts);
    let edge = |by: usize| -> Dims {
        let corner = cuts.iter().zip(&cell);
        corner.map(|(cuts, &at)| cuts[at as usize + by]).collect()
    };
    Err(Error::new(Reason::Unread)
        .range(format_args!("indices {:?} to {:?}", edge(0), edge(1)))
        .found("no rank that has them")
        .needed("a rank for each, or \"unread\": [names]"))
}

/// Marks the cells that a box covers.
fn mark(one: &Region, cuts: &[Vec<u64>], covered: &mut [bool]) {
    let find = |dim: usize, at: u64| cuts[dim].partition_point(|&cut| cut < at);
    let mut starts: SmallVec<[usize; 16]> = SmallVec::from_elem(0, 1);
    for (dim, cuts) in cuts.iter().enumerate() {
        let from = find(dim, one.global[dim]);
        let to = find(dim, one.global[dim] + one.size[dim]);
        let cells = cuts.len() - 1;
        starts = starts
            .iter()
            .flat_map(|start| (from..to).map(move |at| start * cells + at))
            .collect();
    }
    for cell in starts {
        if let Some(cell) = covered.get_mut(cell) {
            *cell = true;
        }
    }
}
