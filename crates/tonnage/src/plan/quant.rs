//! Quantised tensors in plans: rules speak of a weight, and ranks get the parts that make their piece of it.
//!
//! A rule that matches a quantised tensor's logical name (`layers.0.q_proj.weight`) places the weight as its model knows
//! it. Each rank's range of it becomes a range of every part ([`Cut`]), as expressions of the plan: so the proof covers every byte
//! of the parts, and a rank's parts are a checkpoint of the same scheme. Where scales don't allow a cut, the plan says what was
//! done instead: smaller groups, a begun block, or a cut that was moved to where the parts can be cut. A rule that
//! matches a part by its own name, and not the weight, keeps its old meaning: the part is a tensor like any other.

mod said;
mod shard;
mod words;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use tonnage_format::Dtype;
use tonnage_plan::{
    Allow, Expr, Mesh, Place, Placement, Plan, Region, Request, Rules, Table, Uneven, Wanted,
    build, matches,
};
use tonnage_quant::descriptor::Role;
use tonnage_quant::map::{Meaning, QTensor, QuantMap};
use tonnage_quant::scheme::Part;
use tonnage_quant::slice::{Cut, Fallback, How};
use tonnage_quant::{Error as QuantError, Reason};

pub use shard::QuantShard;
use words::{expr, label, note};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// A plan, and what its tensors are parts of.
#[derive(Clone, Debug)]
pub struct QuantPlan {
    /// The plan: of parts and of plain tensors.
    pub plan: Plan,
    /// The pieces of quantised tensors.
    pub shards: Vec<QuantShard>,
}

impl Checkpoint {
    /// Plans all tensors by rules, the quantised ones of a map as what they mean: [`QuantPlan::new`].
    ///
    /// # Errors
    /// As [`QuantPlan::new`].
    pub fn plan_quantized(
        &self,
        map: &QuantMap,
        of: &Request,
        rules: &Rules,
        fallback: Fallback,
    ) -> Result<QuantPlan> {
        QuantPlan::new(&self.plan_table()?, map, of, rules, fallback)
    }

    /// The quantised tensors that a checkpoint names itself: the blocks of a GGUF file.
    ///
    /// # Errors
    /// `PLAN_QUANTIZED` for rows that are not whole blocks.
    pub fn own_quantized(&self) -> Result<QuantMap> {
        let mut map = QuantMap::default();
        let Some(files) = self.gguf() else {
            return Ok(map);
        };
        for (_, tensor) in files.tensors() {
            let Some(row) = self.get(tensor.name).filter(|_| !tensor.ty.is_plain()) else {
                continue;
            };
            let part = Part {
                name: tensor.name.to_owned(),
                dtype: Dtype::U8,
                shape: row.shape().to_vec(),
            };
            let made = QTensor::ggml_of(tensor.name, tensor.ty, part);
            let made = made.and_then(|made| map.insert(made));
            made.map_err(|error| refused(error, tensor.name))?;
        }
        Ok(map)
    }
}

impl QuantPlan {
    /// Plans all tensors of a table by rules, the quantised ones of a map as what they mean, and proves the plan. `of` says
    /// the mesh, and what may stay unread or be read several times; `fallback` what may be done where scales do not allow
    /// a cut, besides moving it.
    ///
    /// # Errors
    /// `PLAN_QUANTIZED` for a tensor that can't be cut as its rule says; those of
    /// [`Checkpoint::plan`](crate::Checkpoint::plan).
    pub fn new(
        table: &Table,
        map: &QuantMap,
        of: &Request,
        rules: &Rules,
        fallback: Fallback,
    ) -> Result<Self> {
        let mesh = of.mesh()?;
        let known = |name: &str| table.has(name);
        let logical: Vec<&QTensor> = map
            .tensors()
            .filter(|one| speaks_of(rules, one, &known))
            .collect();
        let names: Vec<Arc<str>> = logical.iter().map(|one| one.name.as_str().into()).collect();
        let placed = rules.over(names.iter(), &mesh)?;
        let parts: HashMap<&str, usize> = logical
            .iter()
            .enumerate()
            .flat_map(|(at, one)| all_parts(one).map(move |part| (part.name.as_str(), at)))
            .collect();
        let plain: Vec<&Arc<str>> = table
            .names()
            .filter(|name| !parts.contains_key(&***name))
            .collect();
        let mut plain = rules.over(plain.into_iter(), &mesh)?.targets.into_iter();
        let mut work = Work {
            mesh: &mesh,
            of,
            fallback,
            seats: HashMap::new(),
            targets: Vec::with_capacity(table.names().len()),
            shards: Vec::new(),
            unread: Vec::new(),
            repeated: Vec::new(),
        };
        // In the order of the checkpoint, a tensor where its first part is.
        let mut done = HashSet::new();
        for name in table.names() {
            match parts.get(&**name) {
                None => work.targets.extend(plain.next()),
                Some(&at) => {
                    if let (true, Some(tensor), Some(wanted)) =
                        (done.insert(at), logical.get(at), placed.targets.get(at))
                    {
                        work.tensor(tensor, &wanted.place)?;
                    }
                }
            }
        }
        let request = Request {
            mesh: of.mesh.clone(),
            alt: of.alt.clone(),
            targets: work.targets,
            unread: with(&of.unread, work.unread),
            repeated: with(&of.repeated, work.repeated),
        };
        Ok(QuantPlan {
            plan: build(table, &request)?,
            shards: work.shards,
        })
    }
}

/// Whether rules place a tensor as what it means: its name has a rule, and none is for one of its parts alone.
fn speaks_of(rules: &Rules, tensor: &QTensor, known: &dyn Fn(&str) -> bool) -> bool {
    let rule = |name: &str| rules.0.iter().find(|(pattern, _)| matches(pattern, name));
    !matches!(tensor.meaning, Meaning::Opaque(_))
        && rule(&tensor.name).is_some()
        && all_parts(tensor).all(|part| {
            known(&part.name)
                && rule(&part.name).is_none_or(|(pattern, _)| matches(pattern, &tensor.name))
        })
}

fn all_parts(tensor: &QTensor) -> impl Iterator<Item = &Part> {
    tensor.parts.values().chain(&tensor.extras)
}

/// More names for which something may be.
fn with(allow: &Allow, mut names: Vec<String>) -> Allow {
    match allow {
        Allow::Some(given) => {
            names.extend(given.iter().cloned());
            Allow::Some(names)
        }
        other if names.is_empty() || *other == Allow::ALL => other.clone(),
        _ => Allow::Some(names),
    }
}

/// Ranks that have the same part of a tensor.
#[derive(Clone, Debug)]
struct Seat {
    ranks: Vec<u32>,
    start: Vec<u64>,
    size: Vec<u64>,
}

struct Work<'a> {
    mesh: &'a Mesh,
    of: &'a Request,
    fallback: Fallback,
    seats: HashMap<(Vec<u64>, Place2), Arc<[Seat]>>,
    targets: Vec<Wanted>,
    shards: Vec<QuantShard>,
    unread: Vec<String>,
    repeated: Vec<String>,
}

/// Placements by axis, as something to look up by.
type Place2 = Vec<(String, Placement)>;

impl Work<'_> {
    fn tensor(&mut self, tensor: &QTensor, place: &Place) -> Result<()> {
        let told = |error: QuantError| refused(error, &tensor.name);
        let whole = Cut::whole(tensor).map_err(told)?;
        let mut seats = self.seats(&whole.shape, place, &tensor.name)?;
        let mut moved = BTreeMap::new();
        let cuts = match cuts(&whole, &seats, self.fallback) {
            Err(error) if error.reason == Reason::Granularity => {
                let place = self
                    .aligned(&whole, &seats, place, &mut moved)
                    .map_err(|e| e.unwrap_or(error))
                    .map_err(told)?;
                seats = self.seats(&whole.shape, &place, &tensor.name)?;
                cuts(&whole, &seats, self.fallback)
            }
            other => other,
        }
        .map_err(told)?;
        self.emit(tensor, &whole, &seats, &cuts, &moved);
        Ok(())
    }

    /// The ranks by what they have, for a tensor of a shape.
    fn seats(&mut self, shape: &[u64], place: &Place, name: &str) -> Result<Arc<[Seat]>> {
        let key = (
            shape.to_vec(),
            place
                .iter()
                .map(|(axis, one)| (axis.clone(), one.clone()))
                .collect(),
        );
        if let Some(known) = self.seats.get(&key) {
            return Ok(known.clone());
        }
        let made: Arc<[Seat]> = self.seat(shape, place, name)?.into();
        self.seats.insert(key, made.clone());
        Ok(made)
    }

    /// What a plan of the tensor alone, were it a plain one, gives to whom.
    fn seat(&self, shape: &[u64], place: &Place, name: &str) -> Result<Vec<Seat>> {
        let bytes = shape.iter().try_fold(4_u64, |n, &len| n.checked_mul(len));
        let mut table = Table::new();
        let file = table.add_file("", bytes.unwrap_or(0));
        table.add(name, Dtype::F32, shape, file, 0)?;
        let request = Request {
            mesh: self.of.mesh.clone(),
            alt: self.of.alt.clone(),
            targets: vec![Wanted::new(name, place.clone())],
            unread: Allow::ALL,
            repeated: Allow::ALL,
        };
        let plan = build(&table, &request)?;
        let mut seats = Vec::new();
        for target in plan.targets() {
            for (at, layout) in target.layouts.iter().enumerate() {
                if layout.shape.contains(&0) {
                    continue;
                }
                let (&[Region { global, size, .. }], true) = (
                    &layout.boxes.iter().collect::<Vec<_>>()[..],
                    layout.fills.is_empty(),
                ) else {
                    let text = "a quantised tensor's part of a rank is one range of it, without zeros: no segments, no groups, no padding";
                    return Err(Error::usage("PLAN_QUANTIZED", text).about(name, None));
                };
                seats.push(Seat {
                    ranks: target.ranks_of(at).collect(),
                    start: global.to_vec(),
                    size: size.to_vec(),
                });
            }
        }
        Ok(seats)
    }

    /// The same placements, but that cuts fall where the parts can be cut. `None`: nothing can be moved.
    fn aligned(
        &self,
        whole: &Cut,
        seats: &[Seat],
        place: &Place,
        moved: &mut BTreeMap<usize, u64>,
    ) -> std::result::Result<Place, Option<QuantError>> {
        let mut place = place.clone();
        for (axis, &len) in whole.shape.iter().enumerate() {
            if seats.iter().all(|seat| seat.size.get(axis) == Some(&len)) {
                continue;
            }
            let mut multiple = whole.multiple(axis).map_err(Some)?;
            if multiple >= len && self.fallback == Fallback::Lossless {
                // One block: its words are still cut, with smaller groups or a begun block.
                multiple = whole.carrier(axis).map_err(Some)?;
            }
            if multiple >= len {
                return Err(None);
            }
            for one in place.values_mut() {
                if let Placement::Shard { dim, uneven } = one
                    && (*dim == axis as i64 || *dim + whole.shape.len() as i64 == axis as i64)
                    && multiple > 1
                {
                    *uneven = Uneven::Granular(multiple);
                    moved.insert(axis, multiple);
                }
            }
        }
        if moved.is_empty() {
            Err(None)
        } else {
            Ok(place)
        }
    }

    fn emit(
        &mut self,
        tensor: &QTensor,
        whole: &Cut,
        seats: &[Seat],
        cuts: &[Cut],
        moved: &BTreeMap<usize, u64>,
    ) {
        let all: Vec<u32> = {
            let mut all: Vec<u32> = seats
                .iter()
                .flat_map(|seat| seat.ranks.iter().copied())
                .collect();
            all.sort_unstable();
            all
        };
        for part in &tensor.extras {
            self.want(part, None, &all, true, None);
        }
        let lossless = |cut: &Cut| (0..cut.shape.len()).any(|axis| cut.how(axis) != How::Clean);
        let shared = cuts.iter().any(lossless);
        for (role, part) in whole.parts() {
            if cuts.iter().any(|cut| cut.dropped().contains(&role)) {
                self.unread.push(part.name.clone());
                continue;
            }
            if shared && !matches!(role, Role::Codes | Role::GroupIndex) {
                self.repeated.push(part.name.clone());
                // Smaller groups need no padding behind the last one.
                self.unread.push(part.name.clone());
            }
            if cuts.iter().all(|cut| cut.steps(role).is_empty()) {
                self.want(part, None, &all, true, None);
                continue;
            }
            for (seat, cut) in seats.iter().zip(cuts) {
                let note = note(tensor, seat, cut, moved);
                self.want(
                    part,
                    Some(expr(part, cut.steps(role))),
                    &seat.ranks,
                    false,
                    Some(note),
                );
            }
        }
        for (seat, cut) in seats.iter().zip(cuts) {
            let parts = cut.parts().into_iter();
            self.shards.push(QuantShard {
                name: tensor.name.clone(),
                ranks: seat.ranks.clone(),
                start: seat.start.clone(),
                parts: parts
                    .map(|(role, part)| (role, part.name.clone()))
                    .collect(),
                cut: cut.clone(),
            });
        }
    }

    /// A part for some ranks, as few targets as owners by axis can say.
    fn want(
        &mut self,
        part: &Part,
        expr: Option<Expr>,
        ranks: &[u32],
        whole: bool,
        note: Option<String>,
    ) {
        let note = note.map(Arc::from);
        for place in self.owners(ranks) {
            let label = label(&place);
            let plain = whole && place.is_empty();
            self.targets.push(Wanted {
                name: match plain {
                    true => part.name.as_str().into(),
                    false => format!("{}@{label}", part.name).into(),
                },
                expr: match (&expr, plain) {
                    (Some(expr), _) => Some(expr.clone()),
                    (None, true) => None,
                    (None, false) => Some(Expr::source(&part.name)),
                },
                local: (!plain).then(|| part.name.as_str().into()),
                note: note.clone(),
                ..Wanted::new("", place)
            });
        }
    }

    /// Placements that together are these ranks: one where they are all combinations of coordinates.
    fn owners(&self, ranks: &[u32]) -> Vec<Place> {
        let mut place = Place::new();
        let mut product = 1_usize;
        for (axis, size) in self.mesh.axes() {
            let coords = ranks
                .iter()
                .filter_map(|&rank| self.mesh.coordinate(rank, axis).ok());
            let coords: std::collections::BTreeSet<u32> = coords.collect();
            product = product.saturating_mul(coords.len());
            if coords.len() < *size as usize {
                place.insert(axis.clone(), Placement::Owner(coords.into_iter().collect()));
            }
        }
        if product == ranks.len() {
            return vec![place];
        }
        ranks
            .iter()
            .flat_map(|&rank| self.owners(&[rank]))
            .collect()
    }
}

/// Each seat's part of a tensor, all with groups of one size.
fn cuts(
    whole: &Cut,
    seats: &[Seat],
    fallback: Fallback,
) -> std::result::Result<Vec<Cut>, QuantError> {
    let axes = 0..whole.shape.len();
    let groups: Vec<Fallback> = axes
        .clone()
        .map(|axis| common(whole, seats, axis, fallback))
        .collect();
    let one = |seat: &Seat| {
        axes.clone()
            .zip(&groups)
            .try_fold(whole.clone(), |cut, (axis, &fallback)| {
                let (start, size) = (
                    seat.start.get(axis).copied().unwrap_or(0),
                    seat.size.get(axis).copied().unwrap_or(0),
                );
                cut.cut(axis, start..start.saturating_add(size), fallback)
            })
    };
    seats.iter().map(one).collect()
}

/// The size of groups that fits all cuts of an axis.
fn common(whole: &Cut, seats: &[Seat], axis: usize, fallback: Fallback) -> Fallback {
    let (Fallback::Lossless, Some(group)) = (fallback, whole.group(axis)) else {
        return fallback;
    };
    let len = whole.shape.get(axis).copied().unwrap_or(0);
    let mut to = group;
    for seat in seats {
        let (Some(&start), Some(&size)) = (seat.start.get(axis), seat.size.get(axis)) else {
            continue;
        };
        for edge in [start, start.saturating_add(size)] {
            if edge != len {
                to = gcd(to, edge);
            }
        }
    }
    if to == group {
        Fallback::Lossless
    } else {
        Fallback::Group(to)
    }
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

fn refused(error: QuantError, name: &str) -> Error {
    Error::usage("PLAN_QUANTIZED", error.text).about(name, None)
}
