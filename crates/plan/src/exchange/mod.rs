//! Who reads which bytes for whom, where several ranks load together.
//!
//! Every rank decides it for itself, from the plan and a few numbers that are the same on all of them, and all come
//! to the same: nothing here depends on who asks. Each byte that some member of the group needs is read from the
//! files by one of them.
//!
//! ```text
//!  file      ├─ q, rows of rank 0 ─┤├─ q, rows of rank 1 ─┤├─ norm ─┤├───── o, columns of both ─────┤
//!  pieces    ╰ read by 0, for 0    ╯╰ read by 1, for 1    ╯╰─ read by one of them, for both, in rounds ─╯
//! ```
//!
//! What one rank alone needs it reads by itself, straight into its tensors ([`Exchange::direct`]). What several need
//! is cut into blocks, blocks are put in batches, and each batch has the reader, among those who need it, that reads
//! the least so far. Batches go in rounds, none of which takes more memory than was given. How bytes get from the
//! reader to the others are the [`Means`]: a window of memory that all processes of a machine see, or messages.
//!
//! [`Exchange::build`] proves that pieces are disjoint and that each copy of the plan is whole in the pieces that
//! serve it. The plan's own proof says that copies fill each tensor exactly once, so this does as well.

mod batches;
pub mod choose;
mod pieces;
mod proof;
mod share;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::error::{Error, Reason, Result};
use crate::io::strided::Strided;
use crate::io::{self};
use crate::plan::{Local, Plan};

pub use batches::{Batch, Round};
pub use share::{Share, Splits};

/// How bytes get from the rank that reads them to those that need them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// Memory that all members see: whole blocks lie there, and everybody takes what it needs.
    Window {
        /// Bytes of a round.
        half: u64,
    },
    /// Messages: each member gets what it needs of a block, packed; what all need whole is sent to all.
    Messages {
        /// Bytes of a round's messages on one member, those that it sends and those that it gets.
        buffers: u64,
        /// Whether members also send themselves what they alone need: where tensors lie in memory that only
        /// messages reach.
        own: bool,
    },
}

/// Bytes of a batch: below about 6 MiB a message is mostly overhead.
pub const BATCH: u64 = 8 << 20;
/// The least that blocks are cut to.
pub(crate) const PAGE: u64 = 4096;

/// A strided copy that some members want: of a target, in the layout that they have.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    /// Position of the target.
    pub target: u32,
    pub file: usize,
    pub strided: Strided,
    /// Who wants it.
    pub set: u32,
}

/// A stretch of a file that the same members want.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Position of the file.
    pub file: usize,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Who wants it: position among the sets.
    pub(crate) set: u32,
    /// What is wanted of it: positions among the wants.
    pub(crate) wants: Vec<u32>,
}

impl Piece {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Sets of members, each once. Positions of members rise.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    all: Vec<Vec<u32>>,
    by_members: HashMap<Vec<u32>, u32>,
}

impl Sets {
    pub fn enter(&mut self, members: Vec<u32>) -> u32 {
        if let Some(&at) = self.by_members.get(&members) {
            return at;
        }
        let at = self.all.len() as u32;
        self.all.push(members.clone());
        self.by_members.insert(members, at);
        at
    }

    pub fn get(&self, set: u32) -> &[u32] {
        self.all.get(set as usize).map_or(&[], Vec::as_slice)
    }

    /// The union of some sets, which are sorted and each once.
    pub fn union(&mut self, sets: &[u32]) -> u32 {
        if let [one] = sets {
            return *one;
        }
        let mut members: Vec<u32> = Vec::new();
        for &set in sets {
            members.extend_from_slice(self.get(set));
        }
        members.sort_unstable();
        members.dedup();
        self.enter(members)
    }
}

/// Who reads what for whom. The same on all members.
#[derive(Debug)]
pub struct Exchange {
    /// Ranks of the plan, by member.
    members: Vec<u32>,
    means: Means,
    wants: Vec<Want>,
    sets: Sets,
    /// What each member reads for itself.
    direct: Vec<Vec<Piece>>,
    /// What is read for others too.
    blocks: Vec<Piece>,
    batches: Vec<Batch>,
    rounds: Vec<Round>,
    /// Bytes that each member reads.
    read: Vec<u64>,
}

impl Exchange {
    /// Decides, for these ranks of a plan, who reads what. A member is a position among them.
    ///
    /// # Errors
    /// [`Reason::Mesh`] for a rank that the mesh has not, twice, or none; [`Reason::Limit`] where a round would take
    /// more memory than `means` gives; [`Reason::Destination`] or [`Reason::Granularity`] for a plan that does not
    /// hold.
    pub fn build(plan: &Plan, members: &[u32], means: Means) -> Result<Exchange> {
        check_members(plan, members)?;
        let mut sets = Sets::default();
        let wants = wants(plan, members, &mut sets)?;
        let pieces = pieces::of(&wants, &mut sets)?;
        let mut made = Exchange {
            members: members.to_vec(),
            means,
            wants,
            sets,
            direct: vec![Vec::new(); members.len()],
            blocks: Vec::new(),
            batches: Vec::new(),
            rounds: Vec::new(),
            read: vec![0; members.len()],
        };
        let own = matches!(means, Means::Messages { own: true, .. });
        let mut shared = Vec::new();
        for piece in pieces {
            match made.sets.get(piece.set) {
                [one] if !own => {
                    let one = *one as usize;
                    if let (Some(direct), Some(read)) =
                        (made.direct.get_mut(one), made.read.get_mut(one))
                    {
                        *read += piece.len;
                        direct.push(piece);
                    }
                }
                _ => shared.push(piece),
            }
        }
        made.cut(shared)?;
        made.prove()?;
        Ok(made)
    }

    /// The ranks of the plan that load together, by member.
    pub fn members(&self) -> &[u32] {
        &self.members
    }

    /// How bytes get from one to another.
    pub fn means(&self) -> Means {
        self.means
    }

    /// BLAKE3 of all that decides who does what. Members compare it before they wait for each other.
    pub fn digest(&self, plan: &Plan) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"tonnage-exchange-1");
        hasher.update(&plan.digest());
        let (kind, bytes, own) = match self.means {
            Means::Window { half } => (0, half, false),
            Means::Messages { buffers, own } => (1, buffers, own),
        };
        for number in [kind, bytes, u64::from(own), self.members.len() as u64] {
            hasher.update(&number.to_le_bytes());
        }
        for rank in &self.members {
            hasher.update(&rank.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// What a member reads for itself.
    pub fn direct(&self, member: usize) -> &[Piece] {
        self.direct.get(member).map_or(&[], Vec::as_slice)
    }

    /// The rounds.
    pub fn rounds(&self) -> &[Round] {
        &self.rounds
    }

    /// Bytes of files that each member reads: for itself and for others.
    pub fn read(&self) -> &[u64] {
        &self.read
    }

    /// Bytes that are read for others too.
    pub fn shared(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }
}

fn check_members(plan: &Plan, members: &[u32]) -> Result<()> {
    let mut seen = members.to_vec();
    seen.sort_unstable();
    let twice = seen.windows(2).find(|pair| pair[0] == pair[1]);
    let wrong = |found: String| {
        Error::new(Reason::Mesh)
            .found(found)
            .needed(format_args!("different ranks below {}", plan.mesh().size()))
    };
    match (seen.last(), twice) {
        (None, _) => Err(wrong("a group of no ranks".into())),
        (_, Some(pair)) => Err(wrong(format!("rank {} twice in a group", pair[0]))),
        (Some(&last), _) if last >= plan.mesh().size() => Err(wrong(format!("rank {last}"))),
        _ => Ok(()),
    }
}

/// What members want, by file and first byte.
fn wants(plan: &Plan, members: &[u32], sets: &mut Sets) -> Result<Vec<Want>> {
    let mut wants = Vec::new();
    for (at, target) in plan.targets().iter().enumerate() {
        let mut holders: Vec<Vec<u32>> = vec![Vec::new(); target.layouts.len()];
        for (member, &rank) in (0..).zip(members) {
            let layout = target.ranks.get(rank as usize);
            if let Some(holders) = layout.and_then(|&layout| holders.get_mut(layout as usize)) {
                holders.push(member);
            }
        }
        for (layout, holders) in target.layouts.iter().zip(holders) {
            if holders.is_empty() || layout.nests.is_empty() {
                continue;
            }
            let local = Local {
                target: at as u32,
                name: target.name.clone(),
                dtype: target.dtype,
                cast: target.cast,
                layout: layout.clone(),
            };
            let set = sets.enter(holders);
            wants.extend(io::copies([&local])?.into_iter().map(|copy| Want {
                target: at as u32,
                file: copy.file,
                strided: copy.strided,
                set,
            }));
        }
    }
    // Stable: equal plans give equal orders.
    wants.sort_by_key(|want| (want.file, want.strided.src));
    Ok(wants)
}
