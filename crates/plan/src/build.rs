//! From a request to a plan.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::{Error, Reason, Result};
use crate::limits;
use crate::lower;
use crate::mesh::{Mesh, MeshAxis};
use crate::placement::{Held, Placement, Seat, place};
use crate::plan::{ABSENT, Layout, Plan, Target};
use crate::request::{Place, Request, Wanted};
use crate::table::{Source, Table};
use crate::view::View;

/// Plans a request, and proves the plan (see [`Plan::verify`]).
///
/// # Errors
/// An [`Error`] that names the tensor: what was asked cannot be, or the proof does not hold.
pub fn build(table: &Table, request: &Request) -> Result<Plan> {
    let mesh = request.mesh()?;
    let places = u64::from(mesh.size()).saturating_mul(request.targets.len() as u64);
    if places > limits::PLACES {
        return Err(Error::new(Reason::Limit)
            .found(format_args!(
                "{} tensors on {} ranks",
                request.targets.len(),
                mesh.size()
            ))
            .needed(format_args!("at most {} pairs", limits::PLACES)));
    }
    let mut seats = Seats::new(&mesh);
    let mut targets = Vec::with_capacity(request.targets.len());
    let mut views = Vec::with_capacity(request.targets.len());
    for wanted in &request.targets {
        let view = view_of(table, wanted).map_err(|error| error.tensor(&wanted.name))?;
        let placed = seats
            .place(&view, &wanted.place, table.sources())
            .map_err(|error| error.tensor(&wanted.name))?;
        targets.push(Target {
            name: wanted.name.clone(),
            dtype: view.dtype(),
            cast: wanted.dtype.filter(|&dtype| dtype != view.dtype()),
            shape: view.shape().into(),
            expr: wanted.expr.clone(),
            place: wanted.place.clone(),
            local: wanted.local.clone(),
            note: wanted.note.clone(),
            layouts: placed.0,
            ranks: placed.1,
        });
        views.push(view);
    }
    drop(seats);
    let plan = Plan {
        mesh,
        table: table.clone(),
        targets,
        unread: request.unread.clone(),
        repeated: request.repeated.clone(),
        proof: None,
    };
    let proof = plan.prove(&views)?;
    Ok(Plan {
        proof: Some(proof),
        ..plan
    })
}

fn view_of(table: &Table, wanted: &Wanted) -> Result<View> {
    match &wanted.expr {
        Some(expr) => expr.view(&|name| table.view(name)),
        None => table.view(&wanted.name),
    }
}

/// For each rank the position of what it has.
type Ranks = Arc<[u32]>;
/// Axes, and the position of what each combination of their coordinates has.
type Seating = (SmallVec<[MeshAxis; 4]>, SmallVec<[u32; 8]>);

/// An axis with its placement on a target.
type Placed<'a> = (MeshAxis, &'a Placement);

/// What the combinations of coordinates have, and the ranks that sit there.
pub(crate) struct Seats<'a> {
    mesh: &'a Mesh,
    ranks: HashMap<Seating, Ranks>,
}

impl<'a> Seats<'a> {
    pub(crate) fn new(mesh: &'a Mesh) -> Self {
        let ranks = HashMap::new();
        Seats { mesh, ranks }
    }

    /// The different layouts of a view that is placed so, and the one of each rank.
    fn place(
        &mut self,
        view: &View,
        places: &Place,
        sources: &[Source],
    ) -> Result<(Vec<Arc<Layout>>, Ranks)> {
        let (held, ranks) = self.held(view.shape(), places)?;
        let layouts: Result<Vec<Arc<Layout>>> = held
            .iter()
            .map(|held| lower::layout(view, held, sources).map(Arc::new))
            .collect();
        Ok((layouts?, ranks))
    }

    /// The different things that ranks hold of a tensor of this shape, and which each rank does.
    pub(crate) fn held(&mut self, shape: &[u64], places: &Place) -> Result<(Vec<Held>, Ranks)> {
        let placed = self.axes(places)?;
        let mut held: Vec<Held> = Vec::new();
        let mut known: HashMap<Held, u32> = HashMap::new();
        let mut seats: SmallVec<[u32; 8]> = SmallVec::new();
        let combinations: u64 = placed
            .iter()
            .map(|(axis, _)| u64::from(axis.size))
            .product();
        for number in 0..combinations {
            let Some(one) = hold(shape, &placed, number)? else {
                seats.push(ABSENT);
                continue;
            };
            // Few are compared one by one, many by their hash.
            let found = match held.len() {
                0..8 => held
                    .iter()
                    .position(|other| *other == one)
                    .map(|at| at as u32),
                _ => known.get(&one).copied(),
            };
            seats.push(found.unwrap_or(held.len() as u32));
            if found.is_none() {
                if held.len() == 8 {
                    known = (0..)
                        .zip(&held)
                        .map(|(at, held)| (held.clone(), at))
                        .collect();
                }
                if held.len() >= 8 {
                    known.insert(one.clone(), held.len() as u32);
                }
                held.push(one);
            }
        }
        let axes = placed.iter().map(|(axis, _)| *axis).collect();
        Ok((held, self.spread(axes, seats)))
    }

    /// The axes that a target is placed on, in the order in which they are applied.
    fn axes<'p>(&self, places: &'p Place) -> Result<SmallVec<[Placed<'p>; 4]>> {
        let names: SmallVec<[&str; 4]> = places.keys().map(String::as_str).collect();
        let order = self.mesh.in_order(&names)?;
        let placed = order
            .into_iter()
            .filter_map(|(name, axis)| Some((axis, places.get(name)?)));
        Ok(placed
            .filter(|(_, placement)| **placement != Placement::Replicate)
            .collect())
    }

    /// What each rank has, from what each combination of coordinates has.
    fn spread(&mut self, axes: SmallVec<[MeshAxis; 4]>, seats: SmallVec<[u32; 8]>) -> Ranks {
        let size = self.mesh.size();
        let key = (axes, seats);
        if let Some(ranks) = self.ranks.get(&key) {
            return ranks.clone();
        }
        let (axes, seats) = &key;
        let seat = |rank: u32| {
            axes.iter().fold(0_usize, |number, axis| {
                number * axis.size as usize + axis.coordinate(rank) as usize
            })
        };
        let ranks: Ranks = (0..size)
            .map(|rank| seats.get(seat(rank)).copied().unwrap_or(ABSENT))
            .collect();
        self.ranks.insert(key, ranks.clone());
        ranks
    }
}

/// What the combination `number` of the axes' coordinates, the last axis running fastest, holds.
fn hold(shape: &[u64], placed: &[Placed<'_>], number: u64) -> Result<Option<Held>> {
    let mut held = Held::whole(shape);
    let mut behind: u64 = placed
        .iter()
        .map(|(axis, _)| u64::from(axis.size))
        .product();
    for &(axis, placement) in placed {
        let size = u64::from(axis.size);
        behind /= size;
        let coord = number / behind % size;
        match place(held, placement, Seat { size, coord })? {
            Some(next) => held = next,
            None => return Ok(None),
        }
    }
    Ok(Some(held))
}
