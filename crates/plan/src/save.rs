//! The inverse of loading: which rank writes which box of which tensor into which file.
//!
//! Each rank offers what it has: tensors, of each the boxes of the whole that are its own ([`Offer`]). Boxes
//! that several ranks have alike are replicas, and one rank writes them: the one with the least to write. What
//! is left must tile every tensor exactly once, and the tensors must tile their files' data sections: that is
//! proven before anything is written, by [`SavePlan::verify`], which looks at nothing but the numbers.
//!
//! Numbers count elements of the dtype as the header does, so a box of a dtype below a byte must begin and end
//! on bytes.

use std::collections::BTreeMap;
use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use tonnage_format::{Dtype, TensorSpec, WriteOptions, layout};

use crate::error::{Error, Reason, Result};

/// What one rank has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// Its tensors, in its own order.
    pub tensors: Vec<Offered>,
}

/// A tensor of which a rank has some boxes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offered {
    /// Its name.
    pub name: String,
    /// Its dtype, as a header spells it.
    pub dtype: String,
    /// The whole tensor's extents.
    pub shape: Vec<u64>,
    /// The boxes that the rank has.
    pub boxes: Vec<Piece>,
}

/// A box of a tensor: its first index in each dimension, and its extents.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Piece(pub Vec<u64>, pub Vec<u64>);

/// Who writes what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SavePlan {
    /// The tensors, in the order in which the ranks named them first.
    pub tensors: Vec<Saved>,
    /// The files.
    pub files: Vec<SaveFile>,
    /// For each rank what it writes.
    pub writes: Vec<Vec<Write>>,
}

/// A tensor of the checkpoint to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its extents.
    pub shape: Vec<u64>,
}

/// A file of the checkpoint to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SaveFile {
    /// Its tensors, as positions in [`SavePlan::tensors`].
    pub tensors: Vec<usize>,
    /// For each of them its first byte in the data section, and one past its last.
    pub ranges: Vec<(u64, u64)>,
}

/// A box that a rank writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Write {
    /// Position of the tensor in [`SavePlan::tensors`].
    pub tensor: usize,
    /// Position of the tensor in the rank's offer.
    pub offered: usize,
    /// Position of the box there.
    pub piece: usize,
}

/// Boxes of a tensor that are alike, and who has them.
struct Choice {
    tensor: usize,
    bytes: u64,
    /// Rank, position in its offer, position of the box.
    holders: Vec<(usize, usize, usize)>,
}

/// Decides who writes what. `files` is given the size of each tensor in bytes and says which of them share a
/// file.
///
/// # Errors
/// A dtype that there is not; ranks that say different things of a tensor; boxes that do not tile it, with the
/// range that lacks or is there twice; more than a file can hold.
pub fn plan_save(
    offers: &[Offer],
    write: &WriteOptions,
    files: impl FnOnce(&[Saved], &[u64]) -> Result<Vec<Vec<usize>>>,
) -> Result<SavePlan> {
    let (tensors, choices) = agree(offers)?;
    let sizes = tensors
        .iter()
        .map(Saved::bytes)
        .collect::<Result<Vec<u64>>>()?;
    let groups = files(&tensors, &sizes)?;
    let files = groups
        .into_iter()
        .map(|group| SaveFile::of(group, &tensors, write))
        .collect::<Result<Vec<_>>>()?;
    let plan = SavePlan {
        writes: deal(choices, offers.len()),
        tensors,
        files,
    };
    plan.verify(offers)?;
    Ok(plan)
}

fn dtype_of(offered: &Offered) -> Result<Dtype> {
    let unknown = || {
        Error::new(Reason::Dtype)
            .tensor(&offered.name)
            .found(&offered.dtype)
    };
    Dtype::from_name(&offered.dtype).ok_or_else(unknown)
}

/// One list of tensors out of what all ranks say, and the boxes of each with their holders.
fn agree(offers: &[Offer]) -> Result<(Vec<Saved>, Vec<Choice>)> {
    let mut tensors: Vec<Saved> = Vec::new();
    let mut first: Vec<usize> = Vec::new();
    let mut known: HashMap<&str, usize> = HashMap::new();
    let mut choices: Vec<Choice> = Vec::new();
    let mut alike: HashMap<(usize, &Piece), usize> = HashMap::new();
    for (rank, offer) in offers.iter().enumerate() {
        for (at, offered) in offer.tensors.iter().enumerate() {
            let dtype = dtype_of(offered)?;
            let tensor = *known.entry(&offered.name).or_insert(tensors.len());
            match tensors.get(tensor) {
                None => {
                    tensors.push(Saved {
                        name: offered.name.clone(),
                        dtype,
                        shape: offered.shape.clone(),
                    });
                    first.push(rank);
                }
                Some(saved) if (saved.dtype, &saved.shape) != (dtype, &offered.shape) => {
                    let before = first.get(tensor).copied().unwrap_or(0);
                    return Err(Error::new(Reason::Disagree)
                        .tensor(&offered.name)
                        .found(format_args!("{dtype} {:?} on rank {rank}", offered.shape))
                        .needed(format_args!(
                            "{} {:?} as on rank {before}",
                            saved.dtype, saved.shape
                        )));
                }
                Some(_) => {}
            }
            for (piece, boxed) in offered.boxes.iter().enumerate() {
                let bytes = boxed.bytes(offered, dtype)?;
                // Of a tensor without elements somebody writes the name.
                if boxed.1.contains(&0) && boxed.1 != offered.shape {
                    continue;
                }
                let choice = *alike.entry((tensor, boxed)).or_insert(choices.len());
                match choices.get_mut(choice) {
                    Some(choice) => choice.holders.push((rank, at, piece)),
                    None => choices.push(Choice {
                        tensor,
                        bytes,
                        holders: vec![(rank, at, piece)],
                    }),
                }
            }
        }
    }
    Ok((tensors, choices))
}

/// Gives each box to one of its holders: first those that only one has, then the largest replicas, each to
/// whoever has the least to write, and of equals to the lowest rank.
fn deal(mut choices: Vec<Choice>, ranks: usize) -> Vec<Vec<Write>> {
    let mut load = vec![0_u64; ranks];
    let mut writes: Vec<Vec<Write>> = vec![Vec::new(); ranks];
    choices.sort_by_key(|c| (c.holders.len() > 1, std::cmp::Reverse(c.bytes), c.tensor));
    for choice in choices {
        let least = |&&(rank, ..): &&(usize, usize, usize)| (load.get(rank).copied(), rank);
        let Some(&(rank, offered, piece)) = choice.holders.iter().min_by_key(least) else {
            continue;
        };
        if let (Some(load), Some(writes)) = (load.get_mut(rank), writes.get_mut(rank)) {
            *load = load.saturating_add(choice.bytes);
            writes.push(Write {
                tensor: choice.tensor,
                offered,
                piece,
            });
        }
    }
    for writes in &mut writes {
        writes.sort_by_key(|write| (write.offered, write.piece));
    }
    writes
}

impl Saved {
    fn spec(&self) -> TensorSpec<'_> {
        TensorSpec {
            name: &self.name,
            dtype: self.dtype,
            shape: &self.shape,
        }
    }

    /// Bytes of the whole tensor.
    ///
    /// # Errors
    /// A size beyond 64 bits, or not of whole bytes.
    pub fn bytes(&self) -> Result<u64> {
        self.dtype.bytes_of(&self.shape).map_err(|error| {
            Error::new(Reason::Granularity)
                .tensor(&self.name)
                .found(error.found_text())
                .needed(error.needed_text())
        })
    }
}

impl SaveFile {
    fn of(group: Vec<usize>, tensors: &[Saved], write: &WriteOptions) -> Result<SaveFile> {
        let specs = group.iter().map(|&at| {
            let lacks = || Error::new(Reason::Form).found(format_args!("tensor number {at}"));
            tensors.get(at).map(Saved::spec).ok_or_else(lacks)
        });
        let specs = specs.collect::<Result<Vec<_>>>()?;
        let layout = layout(&specs, None, write).map_err(|error| {
            let refused = Error::new(Reason::Form).found(&error);
            match error.tensor_name() {
                Some(name) => refused.tensor(name),
                None => refused,
            }
        })?;
        Ok(SaveFile {
            tensors: group,
            ranges: layout.ranges,
        })
    }
}

impl Piece {
    fn end(&self, dim: usize) -> u64 {
        let at = |list: &[u64]| list.get(dim).copied().unwrap_or(0);
        at(&self.0).saturating_add(at(&self.1))
    }

    fn elements(&self) -> u64 {
        self.1
            .iter()
            .fold(1, |n: u64, &extent| n.saturating_mul(extent))
    }

    /// The box as a slice is written, e.g. `[0:4, 8:16]`.
    fn text(&self) -> String {
        let ranges = (0..self.0.len()).map(|dim| {
            let begin = self.0.get(dim).copied().unwrap_or(0);
            format!("{begin}:{}", self.end(dim))
        });
        format!("[{}]", ranges.collect::<Vec<_>>().join(", "))
    }

    /// Bytes of the box, which lies inside of its tensor.
    fn bytes(&self, tensor: &Offered, dtype: Dtype) -> Result<u64> {
        let rank = tensor.shape.len();
        let fits = [self.0.len(), self.1.len()] == [rank; 2]
            && (0..rank).all(|dim| {
                let end = self
                    .0
                    .get(dim)
                    .zip(self.1.get(dim))
                    .and_then(|(a, b)| a.checked_add(*b));
                end.zip(tensor.shape.get(dim))
                    .is_some_and(|(end, &extent)| end <= extent)
            });
        if !fits {
            return Err(Error::new(Reason::Bounds)
                .tensor(&tensor.name)
                .found(self.text())
                .needed(format_args!("a box inside of {:?}", tensor.shape)));
        }
        let bits = dtype.bitsize() as u64;
        // Rows of a box begin and end where its last dimension does, or where a whole row of the tensor does.
        let inner = [self.0.last(), self.1.last(), tensor.shape.last()];
        let odd = |n: Option<&u64>| n.is_some_and(|n| n.saturating_mul(bits) % 8 != 0);
        if inner.into_iter().any(odd) {
            return Err(Error::new(Reason::Granularity)
                .tensor(&tensor.name)
                .range(self.text())
                .found(format_args!("{dtype} has {bits} bits"))
                .needed("boxes and rows of whole bytes"));
        }
        let bits = self.elements().checked_mul(bits);
        bits.map(|bits| bits.div_ceil(8)).ok_or_else(|| {
            Error::new(Reason::Limit)
                .tensor(&tensor.name)
                .range(self.text())
        })
    }

    fn meets(&self, other: &Piece) -> bool {
        let begin = |piece: &Piece, dim: usize| piece.0.get(dim).copied().unwrap_or(0);
        (0..self.0.len())
            .all(|dim| begin(self, dim) < other.end(dim) && begin(other, dim) < self.end(dim))
    }
}

impl SavePlan {
    /// Proves that every byte of every file's data section is written exactly once: the boxes that are
    /// written are among those offered and tile their tensors; the tensors tile their files; each tensor is in
    /// one file.
    ///
    /// # Errors
    /// What does not hold: the tensor, and the range that lacks or is written twice, and by whom.
    pub fn verify(&self, offers: &[Offer]) -> Result<()> {
        let mut parts: Vec<Vec<(usize, &Piece)>> = vec![Vec::new(); self.tensors.len()];
        if self.writes.len() != offers.len() {
            return Err(Error::new(Reason::Form).found("another number of ranks"));
        }
        for (rank, (writes, offer)) in self.writes.iter().zip(offers).enumerate() {
            for write in writes {
                let offered = offer.tensors.get(write.offered);
                let saved = self.tensors.get(write.tensor);
                let same = offered.zip(saved).filter(|(offered, saved)| {
                    offered.name == saved.name && offered.shape == saved.shape
                });
                let piece = same.and_then(|(offered, _)| offered.boxes.get(write.piece));
                let (Some(piece), Some(parts)) = (piece, parts.get_mut(write.tensor)) else {
                    let what = format!("rank {rank} has no such box");
                    return Err(Error::new(Reason::Form).found(what));
                };
                parts.push((rank, piece));
            }
        }
        for (tensor, parts) in self.tensors.iter().zip(&mut parts) {
            tile(tensor, parts)?;
        }
        self.verify_files()
    }

    fn verify_files(&self) -> Result<()> {
        let mut home: BTreeMap<usize, usize> = BTreeMap::new();
        for (number, file) in self.files.iter().enumerate() {
            let mut ranges: Vec<(u64, u64, usize)> = Vec::with_capacity(file.tensors.len());
            for (&at, &(begin, end)) in file.tensors.iter().zip(&file.ranges) {
                let saved = self.tensors.get(at);
                let saved =
                    saved.ok_or_else(|| Error::new(Reason::Form).found("no such tensor"))?;
                let wrong = |found: String| {
                    Err(Error::new(Reason::Destination)
                        .tensor(&saved.name)
                        .found(found))
                };
                if home.insert(at, number).is_some() {
                    return wrong("it is in two files".to_owned());
                }
                if end.checked_sub(begin) != Some(saved.bytes()?) {
                    return wrong(format!("bytes {begin} to {end} of file {number}"));
                }
                ranges.push((begin, end, at));
            }
            ranges.sort_unstable();
            let mut next = 0;
            for (begin, end, at) in ranges {
                if begin != next {
                    let name = self.tensors.get(at).map_or("", |tensor| &tensor.name);
                    return Err(Error::new(Reason::Destination)
                        .tensor(name)
                        .found(format_args!("it begins at byte {begin} of file {number}"))
                        .needed(next));
                }
                next = end;
            }
        }
        match (0..self.tensors.len()).find(|at| !home.contains_key(at)) {
            Some(at) => {
                let name = self.tensors.get(at).map_or("", |tensor| &tensor.name);
                Err(Error::new(Reason::Destination)
                    .tensor(name)
                    .found("it is in no file"))
            }
            None => Ok(()),
        }
    }

    /// BLAKE3 of the plan: equal for equal plans.
    pub fn digest(&self) -> [u8; 32] {
        // Numbers and strings always have a text.
        let text = serde_json::to_vec(self).unwrap_or_default();
        *blake3::hash(&text).as_bytes()
    }
}

/// Checks that boxes tile a tensor: no two meet, and together they have its elements.
fn tile(tensor: &Saved, parts: &mut [(usize, &Piece)]) -> Result<()> {
    let wrong = || Error::new(Reason::Destination).tensor(&tensor.name);
    let whole = Piece(vec![0; tensor.shape.len()], tensor.shape.clone());
    let dim = busiest(tensor.shape.len(), parts);
    parts.sort_unstable_by_key(|(_, piece)| piece.0.get(dim).copied().unwrap_or(0));
    let mut active: Vec<(usize, &Piece)> = Vec::new();
    let mut elements = 0_u64;
    for &(rank, piece) in parts.iter() {
        let begin = piece.0.get(dim).copied().unwrap_or(0);
        active.retain(|(_, before)| dim >= before.0.len() || before.end(dim) > begin);
        if let Some((other, before)) = active.iter().find(|(_, before)| before.meets(piece)) {
            return Err(wrong()
                .range(piece.text())
                .found(format_args!(
                    "rank {rank} has it, and rank {other} has {}",
                    before.text()
                ))
                .needed("boxes that are alike or apart"));
        }
        elements = elements.saturating_add(piece.elements());
        active.push((rank, piece));
    }
    if elements == whole.elements() {
        return Ok(());
    }
    let lacks = missing(&whole, parts);
    Err(wrong()
        .range(lacks.map_or_else(String::new, |piece| piece.text()))
        .found("no rank has it")
        .needed(format_args!(
            "every element of {:?} on some rank",
            tensor.shape
        )))
}

/// The dimension along which most boxes begin in different places.
fn busiest(rank: usize, parts: &[(usize, &Piece)]) -> usize {
    let places = |dim: &usize| {
        let mut begins: Vec<u64> = parts
            .iter()
            .filter_map(|(_, p)| p.0.get(*dim).copied())
            .collect();
        begins.sort_unstable();
        begins.dedup();
        begins.len()
    };
    (0..rank).rev().max_by_key(places).unwrap_or(0)
}

/// A box that none of the parts covers, if there is one: what is left of the whole when each part is cut out of
/// it.
fn missing(whole: &Piece, parts: &[(usize, &Piece)]) -> Option<Piece> {
    /// A message needs one example, not a search without end.
    const MOST: usize = 1 << 16;
    let mut left = vec![whole.clone()];
    for (_, part) in parts {
        let mut next = Vec::new();
        for piece in left {
            if piece.meets(part) {
                cut(piece, part, &mut next);
            } else {
                next.push(piece);
            }
        }
        left = next;
        if left.len() > MOST {
            break;
        }
    }
    left.into_iter().next()
}

/// What is left of `piece` outside of `part`, which meets it.
fn cut(mut piece: Piece, part: &Piece, into: &mut Vec<Piece>) {
    for dim in 0..piece.0.len() {
        let (from, to) = (part.0.get(dim).copied().unwrap_or(0), part.end(dim));
        let (Some(&begin), end) = (piece.0.get(dim), piece.end(dim)) else {
            return;
        };
        let mut side = |from: u64, to: u64| {
            if from < to {
                let mut side = piece.clone();
                set(&mut side, dim, from, to);
                into.push(side);
            }
        };
        side(begin, from.max(begin));
        side(to.min(end), end);
        set(&mut piece, dim, from.max(begin), to.min(end));
    }
}

fn set(piece: &mut Piece, dim: usize, from: u64, to: u64) {
    if let (Some(begin), Some(extent)) = (piece.0.get_mut(dim), piece.1.get_mut(dim)) {
        (*begin, *extent) = (from, to.saturating_sub(from));
    }
}

#[cfg(test)]
mod tests;
