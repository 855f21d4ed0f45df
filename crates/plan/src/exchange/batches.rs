//! Blocks in batches, each with its reader, and batches in rounds that fit in memory.

use std::collections::HashMap;
use std::ops::Range;

use smallvec::SmallVec;

use super::share::starts;
use super::{BATCH, Exchange, Means, PAGE, Piece, pieces};
use crate::error::{Error, Reason, Result};

/// Blocks of this size begin in a window as they do in a page of their file, so that a disk can write to them.
const LARGE: u64 = 64 << 10;
/// Where other blocks begin.
const ALIGN: u64 = 64;
/// The part of a block that members must want, on average, for all of it to be sent to all: three in four.
const MOST_OF_IT: (u64, u64) = (3, 4);

/// Blocks that one member reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Who reads them.
    pub reader: u32,
    /// Which: positions among the blocks.
    pub(crate) blocks: Vec<u32>,
    /// The first byte of each: in the window, or in the batch.
    pub(crate) places: Vec<u64>,
    /// Bytes of the batch.
    pub len: u64,
    /// Whether all of it goes to all members, by a broadcast.
    pub to_all: bool,
}

/// What is read, exchanged and taken before the next is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Positions of its batches.
    pub batches: Range<usize>,
    /// Bytes of the window that it takes; 0 without one.
    pub window: u64,
}

/// A batch that still grows.
#[derive(Default)]
struct Open {
    blocks: Vec<u32>,
    len: u64,
    /// Bytes that its messages take at most.
    packed: u64,
}

/// Bytes of messages by member.
struct Loads {
    sent: Vec<u64>,
    got: Vec<u64>,
    /// Of batches that go to all: what each member reads, and the longest.
    own: Vec<u64>,
    longest: u64,
}

impl Exchange {
    /// Cuts what is shared into blocks, gives each batch its reader, and fills rounds.
    pub(super) fn cut(&mut self, shared: Vec<Piece>) -> Result<()> {
        let block = self.block();
        for piece in shared {
            let mut at = piece.offset;
            while at < piece.end() {
                // Cuts lie at the same places whatever begins before them, and on pages.
                let end = (at / block + 1).saturating_mul(block).min(piece.end());
                self.blocks.push(Piece {
                    offset: at,
                    len: end - at,
                    wants: Vec::new(),
                    ..piece
                });
                at = end;
            }
        }
        pieces::assign(&self.wants, &mut self.blocks);
        self.blocks.retain(|block| !block.wants.is_empty());
        for block in &mut self.blocks {
            let mut sets: SmallVec<[u32; 8]> = (block.wants.iter())
                .filter_map(|&at| Some(self.wants.get(at as usize)?.set))
                .collect();
            sets.sort_unstable();
            sets.dedup();
            block.set = self.sets.union(&sets);
        }
        self.fill_batches();
        self.fill_rounds()
    }

    /// Bytes that blocks are cut to.
    fn block(&self) -> u64 {
        let members = self.members.len() as u64;
        let most = match self.means {
            // Everybody reads something in every round.
            Means::Window { half } => half / members - (half / members).min(2 * PAGE),
            // A block may go to all, packed for each, and twice where two tensors are made of it.
            Means::Messages { buffers, .. } => buffers / (4 * members),
        };
        (BATCH.min(most) / PAGE * PAGE).max(PAGE)
    }

    /// Bytes of a batch, and of its messages.
    fn batch(&self) -> (u64, u64) {
        match self.means {
            Means::Window { .. } => (self.block(), u64::MAX),
            // A broadcast takes room for what is sent and for what is got; several fit in a round.
            Means::Messages { buffers, .. } => (BATCH.min(buffers / 4), buffers / 2),
        }
    }

    fn fill_batches(&mut self) {
        let (most, most_packed) = self.batch();
        let mut open: Vec<(u32, bool, Open)> = Vec::new();
        let mut known: HashMap<(u32, bool), usize> = HashMap::new();
        for at in 0..self.blocks.len() {
            let Some(block) = self.blocks.get(at) else {
                continue;
            };
            let (set, len) = (block.set, block.len);
            let packed = self.packed(block);
            let all = self.sets.get(set).len() == self.members.len() && self.members.len() > 1;
            let enough =
                len.saturating_mul(self.members.len() as u64) / MOST_OF_IT.1 * MOST_OF_IT.0;
            let messages = matches!(self.means, Means::Messages { .. });
            let to_all = messages && all && packed >= enough;
            let slot = *known.entry((set, to_all)).or_insert_with(|| {
                open.push((set, to_all, Open::default()));
                open.len() - 1
            });
            let Some((.., one)) = open.get_mut(slot) else {
                continue;
            };
            let full = one.len + len > most || one.packed.saturating_add(packed) > most_packed;
            if full && !one.blocks.is_empty() {
                let closed = std::mem::take(one);
                one.add(at as u32, len, packed);
                self.close(set, to_all, closed);
            } else {
                one.add(at as u32, len, packed);
            }
        }
        for (set, to_all, rest) in open {
            self.close(set, to_all, rest);
        }
    }

    /// Bytes that go in messages for a block, if each member gets its own.
    fn packed(&self, block: &Piece) -> u64 {
        let wants = block
            .wants
            .iter()
            .filter_map(|&at| self.wants.get(at as usize));
        let bytes = wants.map(|want| {
            let mut bytes = 0_u64;
            (want.strided).within_src(block.offset, block.end(), &mut |part| {
                bytes += part.wanted()
            });
            bytes.saturating_mul(self.sets.get(want.set).len() as u64)
        });
        bytes.fold(0, u64::saturating_add)
    }

    fn close(&mut self, set: u32, to_all: bool, open: Open) {
        if open.blocks.is_empty() {
            return;
        }
        let read = |member: u32| self.read.get(member as usize).copied().unwrap_or(u64::MAX);
        // Whoever reads least, and of those the first.
        let reader = self
            .sets
            .get(set)
            .iter()
            .copied()
            .min_by_key(|&member| (read(member), member));
        let reader = reader.unwrap_or(0);
        if let Some(read) = self.read.get_mut(reader as usize) {
            *read += open.len;
        }
        let lens = open
            .blocks
            .iter()
            .filter_map(|&block| Some(self.blocks.get(block as usize)?.len));
        let places = starts(lens);
        self.batches.push(Batch {
            reader,
            blocks: open.blocks,
            places,
            len: open.len,
            to_all,
        });
    }

    fn fill_rounds(&mut self) -> Result<()> {
        match self.means {
            Means::Window { half } => self.fill_window(half),
            Means::Messages { buffers, .. } => self.fill_messages(buffers),
        }
    }

    fn fill_window(&mut self, half: u64) -> Result<()> {
        let (mut begin, mut at) = (0, 0_u64);
        for position in 0..self.batches.len() {
            let Some(batch) = self.batches.get(position) else {
                continue;
            };
            let mut end = at;
            let mut places = self.places(batch, &mut end);
            if end > half && position > begin {
                self.rounds.push(Round {
                    batches: begin..position,
                    window: at,
                });
                (begin, end) = (position, 0);
                places = self.places(batch, &mut end);
            }
            if end > half {
                return Err(too_small("a window", half, end));
            }
            at = end;
            if let Some(batch) = self.batches.get_mut(position) {
                batch.places = places;
            }
        }
        if begin < self.batches.len() {
            self.rounds.push(Round {
                batches: begin..self.batches.len(),
                window: at,
            });
        }
        Ok(())
    }

    /// Where a batch's blocks begin in a window that is full up to `at`.
    fn places(&self, batch: &Batch, at: &mut u64) -> Vec<u64> {
        let blocks = batch
            .blocks
            .iter()
            .filter_map(|&block| self.blocks.get(block as usize));
        let place = |block: &Piece| {
            let (step, skew) = match block.len >= LARGE {
                true => (PAGE, block.offset % PAGE),
                false => (ALIGN, 0),
            };
            let begin = (*at).saturating_sub(skew).next_multiple_of(step) + skew;
            *at = begin + block.len;
            begin
        };
        blocks.map(place).collect()
    }

    fn fill_messages(&mut self, buffers: u64) -> Result<()> {
        let members = self.members.len();
        let none = || Loads {
            sent: vec![0; members],
            got: vec![0; members],
            own: vec![0; members],
            longest: 0,
        };
        let (mut begin, mut loads) = (0, none());
        for position in 0..self.batches.len() {
            let Some(batch) = self.batches.get(position) else {
                continue;
            };
            self.load(batch, &mut loads);
            if loads.most() > buffers && position > begin {
                self.rounds.push(Round {
                    batches: begin..position,
                    window: 0,
                });
                (begin, loads) = (position, none());
                self.load(batch, &mut loads);
            }
            if loads.most() > buffers {
                return Err(too_small("buffers for messages", buffers, loads.most()));
            }
        }
        if begin < self.batches.len() {
            self.rounds.push(Round {
                batches: begin..self.batches.len(),
                window: 0,
            });
        }
        Ok(())
    }

    fn load(&self, batch: &Batch, loads: &mut Loads) {
        let reader = batch.reader as usize;
        let add = |to: &mut Vec<u64>, member: usize, bytes: u64| {
            if let Some(to) = to.get_mut(member) {
                *to += bytes;
            }
        };
        if batch.to_all {
            loads.longest = loads.longest.max(batch.len);
            return add(&mut loads.own, reader, batch.len);
        }
        for (member, bytes) in self.messages(batch) {
            add(&mut loads.sent, reader, bytes);
            add(&mut loads.got, member as usize, bytes);
        }
    }
}

impl Open {
    fn add(&mut self, block: u32, len: u64, packed: u64) {
        self.blocks.push(block);
        self.len += len;
        self.packed = self.packed.saturating_add(packed);
    }
}

impl Loads {
    /// Bytes of the member that holds most.
    fn most(&self) -> u64 {
        let each = self.sent.iter().zip(&self.got).zip(&self.own);
        each.map(|((sent, got), own)| sent + got + own + self.longest)
            .max()
            .unwrap_or(0)
    }
}

fn too_small(what: &str, found: u64, needed: u64) -> Error {
    Error::new(Reason::Limit)
        .found(format_args!("{what} of {found} bytes"))
        .needed(format_args!("{needed} bytes for one block"))
}
