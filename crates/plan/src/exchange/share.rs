//! What one member does in a round: what it reads, what it sends, what it takes.

use std::collections::HashMap;

use smallvec::SmallVec;

use super::{Batch, Exchange, Means, Piece, Want};
use crate::error::Result;
use crate::io::strided::{Strided, Strides};
use crate::io::{Copy, IoPlan, IoProfile, Read};
use crate::plan::Plan;

/// Bytes that a member sends to each member in a round, and gets from each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Splits {
    /// By receiver.
    pub send: Vec<u64>,
    /// By sender.
    pub receive: Vec<u64>,
}

/// A member, and where its tensors are.
#[derive(Debug)]
pub struct Share<'a> {
    exchange: &'a Exchange,
    member: u32,
    /// By target: position among the rank's tensors.
    locals: HashMap<u32, usize>,
}

impl Exchange {
    /// What one member does, by the plan that the exchange was built from.
    ///
    /// # Errors
    /// [`Reason::Mesh`](crate::Reason::Mesh) for a member that is none.
    pub fn share(&self, plan: &Plan, member: usize) -> Result<Share<'_>> {
        let rank = self.members.get(member).copied().unwrap_or(u32::MAX);
        let locals = plan.rank(rank)?;
        Ok(Share {
            exchange: self,
            member: member as u32,
            locals: (locals.iter().enumerate())
                .map(|(at, local)| (local.target, at))
                .collect(),
        })
    }

    fn wants_of<'a>(
        &'a self,
        block: &'a Piece,
        member: u32,
    ) -> impl Iterator<Item = &'a Want> + 'a {
        let wants = block
            .wants
            .iter()
            .filter_map(|&at| self.wants.get(at as usize));
        wants.filter(move |want| self.sets.get(want.set).binary_search(&member).is_ok())
    }

    fn blocks_of<'a>(&'a self, batch: &'a Batch) -> impl Iterator<Item = (&'a Piece, u64)> + 'a {
        let blocks = batch.blocks.iter().zip(&batch.places);
        blocks.filter_map(|(&block, &place)| Some((self.blocks.get(block as usize)?, place)))
    }

    pub(super) fn batches_of(&self, round: usize) -> &[Batch] {
        let batches = self.rounds.get(round).map(|round| round.batches.clone());
        batches
            .and_then(|batches| self.batches.get(batches))
            .unwrap_or_default()
    }

    /// Bytes of a batch's messages to each member that gets some, by member.
    pub(super) fn messages(&self, batch: &Batch) -> SmallVec<[(u32, u64); 8]> {
        let own = matches!(self.means, Means::Messages { own: true, .. });
        let mut sent: SmallVec<[(u32, u64); 8]> = SmallVec::new();
        for (block, _) in self.blocks_of(batch) {
            for want in block
                .wants
                .iter()
                .filter_map(|&at| self.wants.get(at as usize))
            {
                let mut bytes = 0;
                (want.strided).within_src(block.offset, block.end(), &mut |part| {
                    bytes += part.wanted()
                });
                for &member in self.sets.get(want.set) {
                    if member == batch.reader && !own {
                        continue;
                    }
                    match sent.iter_mut().find(|(other, _)| *other == member) {
                        Some((_, sum)) => *sum += bytes,
                        None => sent.push((member, bytes)),
                    }
                }
            }
        }
        sent
    }

    /// Bytes that members send each other in a round, besides broadcasts.
    pub fn exchanged(&self, round: usize) -> u64 {
        let batches = self.batches_of(round).iter().filter(|batch| !batch.to_all);
        batches
            .flat_map(|batch| self.messages(batch))
            .map(|(_, bytes)| bytes)
            .sum()
    }

    /// Batches of a round that go whole to all members, in the order in which they are sent: reader and bytes.
    pub fn broadcasts(&self, round: usize) -> Vec<(u32, u64)> {
        let batches = self.batches_of(round).iter().filter(|batch| batch.to_all);
        batches.map(|batch| (batch.reader, batch.len)).collect()
    }
}

/// Copies and the reads that bring them.
#[derive(Default)]
struct Made {
    copies: Vec<Copy>,
    reads: Vec<Read>,
}

impl Made {
    fn read(&mut self, file: usize, offset: u64, len: u64, first: usize) {
        let copies = first..self.copies.len();
        let wanted = self.copies.get(copies.clone()).unwrap_or_default();
        let wanted = wanted
            .iter()
            .map(|copy| copy.strided.wanted())
            .sum::<u64>()
            .min(len);
        if !copies.is_empty() {
            self.reads.push(Read::Block {
                file,
                offset,
                len,
                wanted,
                copies: copies.collect(),
            });
        }
    }

    fn plan(self) -> IoPlan {
        IoPlan {
            needed: self.copies.iter().map(|copy| copy.strided.wanted()).sum(),
            read: self.reads.iter().map(Read::bytes).sum(),
            copies: self.copies,
            reads: self.reads,
            tensors: Vec::new(),
        }
    }
}

impl Share<'_> {
    /// How many tensors the rank has.
    pub fn locals(&self) -> usize {
        self.locals.len()
    }

    /// What is read straight into the rank's tensors, since nobody else needs it.
    pub fn direct(&self, profile: &IoProfile) -> IoPlan {
        let mut all = IoPlan::default();
        for piece in self.exchange.direct(self.member as usize) {
            let mut copies = Vec::new();
            self.parts(piece, piece.offset, piece.file, &mut copies);
            // Each for itself: what lies between two of them is for others to read.
            let mut one = IoPlan::new(copies, 0, profile);
            let before = all.copies.len();
            for read in &mut one.reads {
                if let Read::Block { copies, .. } = read {
                    copies.iter_mut().for_each(|at| *at += before);
                }
            }
            all.needed += one.needed;
            all.read += one.read;
            all.copies.append(&mut one.copies);
            all.reads.append(&mut one.reads);
        }
        all
    }

    /// Copies of what this member wants of a piece whose bytes lie at `place` of `file`.
    fn parts(&self, piece: &Piece, place: u64, file: usize, copies: &mut Vec<Copy>) {
        for want in self.exchange.wants_of(piece, self.member) {
            let Some(&local) = self.locals.get(&want.target) else {
                continue;
            };
            (want.strided).within_src(piece.offset, piece.end(), &mut |part| {
                let src = part.src - piece.offset + place;
                let strided = Strided { src, ..part };
                copies.push(Copy {
                    local,
                    file,
                    strided,
                });
            });
        }
    }

    /// The blocks of a window that this member reads in a round: position of the file, first byte, bytes, first byte
    /// in the window. By their place in the window.
    pub fn window_reads(&self, round: usize) -> Vec<(usize, u64, u64, u64)> {
        let batches = self.exchange.batches_of(round).iter();
        let mine = batches.filter(|batch| batch.reader == self.member);
        let blocks = mine.flat_map(|batch| self.exchange.blocks_of(batch));
        let mut reads: Vec<_> = blocks
            .map(|(block, place)| (block.file, block.offset, block.len, place))
            .collect();
        reads.sort_unstable_by_key(|read| read.3);
        reads
    }

    /// What this member takes out of a window in a round. The window is file 0.
    pub fn window_takes(&self, round: usize) -> IoPlan {
        self.takes(self.exchange.batches_of(round).iter())
    }

    /// What this member takes out of the broadcast of this position in a round, which is file 0.
    pub fn broadcast_takes(&self, round: usize, position: usize) -> IoPlan {
        let batches = self
            .exchange
            .batches_of(round)
            .iter()
            .filter(|batch| batch.to_all);
        self.takes(batches.skip(position).take(1))
    }

    fn takes<'b>(&self, batches: impl Iterator<Item = &'b Batch>) -> IoPlan {
        let mut made = Made::default();
        for batch in batches {
            for (block, place) in self.exchange.blocks_of(batch) {
                let first = made.copies.len();
                self.parts(block, place, 0, &mut made.copies);
                made.read(0, place, block.len, first);
            }
        }
        made.plan()
    }

    /// Bytes that go to each member and come from each in a round, besides broadcasts.
    pub fn splits(&self, round: usize) -> Splits {
        let members = self.exchange.members.len();
        let mut splits = Splits {
            send: vec![0; members],
            receive: vec![0; members],
        };
        let batches = self
            .exchange
            .batches_of(round)
            .iter()
            .filter(|batch| !batch.to_all);
        for batch in batches {
            for (member, bytes) in self.exchange.messages(batch) {
                let to = splits.send.get_mut(member as usize);
                if let Some(to) = to.filter(|_| batch.reader == self.member) {
                    *to += bytes;
                }
                let from = splits.receive.get_mut(batch.reader as usize);
                if let Some(from) = from.filter(|_| member == self.member) {
                    *from += bytes;
                }
            }
        }
        splits
    }

    /// Bytes of the broadcasts that this member makes in a round.
    pub fn broadcast_len(&self, round: usize) -> u64 {
        let batches = self.exchange.batches_of(round).iter();
        let mine = batches.filter(|batch| batch.to_all && batch.reader == self.member);
        mine.map(|batch| batch.len).sum()
    }

    /// What this member reads in a round: into its own tensors, into the messages that it sends, as tensor
    /// [`Share::locals`], and into its broadcasts, one after the other, as the tensor after that.
    pub fn reads(&self, round: usize) -> IoPlan {
        let (send, to_all) = (self.locals(), self.locals() + 1);
        let own = matches!(self.exchange.means, Means::Messages { own: true, .. });
        let mut next = starts(self.splits(round).send);
        let (mut made, mut broadcast) = (Made::default(), 0);
        let batches = self.exchange.batches_of(round).iter();
        for batch in batches.filter(|batch| batch.reader == self.member) {
            for (block, place) in self.exchange.blocks_of(batch) {
                if batch.to_all {
                    made.reads.push(Read::Range {
                        local: to_all,
                        file: block.file,
                        offset: block.offset,
                        dst: broadcast + place,
                        len: block.len,
                    });
                    continue;
                }
                let first = made.copies.len();
                if !own {
                    self.parts(block, block.offset, block.file, &mut made.copies);
                }
                self.pack(block, own, &mut next, &mut |strided| {
                    let file = block.file;
                    made.copies.push(Copy {
                        local: send,
                        file,
                        strided,
                    });
                });
                made.read(block.file, block.offset, block.len, first);
            }
            broadcast += if batch.to_all { batch.len } else { 0 };
        }
        made.plan()
    }

    /// Packs what others want of a block, each behind what it gets already.
    fn pack(&self, block: &Piece, own: bool, next: &mut [u64], each: &mut dyn FnMut(Strided)) {
        for want in block
            .wants
            .iter()
            .filter_map(|&at| self.exchange.wants.get(at as usize))
        {
            for &member in self.exchange.sets.get(want.set) {
                let Some(at) = next.get_mut(member as usize) else {
                    continue;
                };
                if member == self.member && !own {
                    continue;
                }
                (want.strided).within_src(block.offset, block.end(), &mut |part| {
                    let (to, _) = packed(&part, *at);
                    *at += to.bytes();
                    each(to);
                });
            }
        }
    }

    /// What this member takes out of the messages that it got in a round, which are file 0.
    pub fn message_takes(&self, round: usize) -> IoPlan {
        let own = matches!(self.exchange.means, Means::Messages { own: true, .. });
        let mut next = starts(self.splits(round).receive);
        let mut made = Made::default();
        let batches = self
            .exchange
            .batches_of(round)
            .iter()
            .filter(|batch| !batch.to_all);
        for batch in batches.filter(|batch| batch.reader != self.member || own) {
            let Some(at) = next.get_mut(batch.reader as usize) else {
                continue;
            };
            for (block, _) in self.exchange.blocks_of(batch) {
                let (first, begin) = (made.copies.len(), *at);
                for want in self.exchange.wants_of(block, self.member) {
                    (want.strided).within_src(block.offset, block.end(), &mut |part| {
                        let (to, from) = packed(&part, *at);
                        *at += to.bytes();
                        if let Some(&local) = self.locals.get(&want.target) {
                            made.copies.push(Copy {
                                local,
                                file: 0,
                                strided: from,
                            });
                        }
                    });
                }
                made.read(0, begin, *at - begin, first);
            }
        }
        made.plan()
    }
}

/// Where each part begins, one behind the other.
pub(super) fn starts(lens: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let begin = |at: &mut u64, len| {
        let begin = *at;
        *at += len;
        Some(begin)
    };
    lens.into_iter().scan(0, begin).collect()
}

/// A copy in two: into a message, whose bytes from `at` on it fills without a gap, and out of it. Bytes that are
/// wanted several times are sent once.
fn packed(part: &Strided, at: u64) -> (Strided, Strided) {
    let mut to = Strided {
        dst: at,
        axes: Strides::new(),
        ..*part
    };
    let mut from = Strided {
        src: at,
        ..part.clone()
    };
    let mut step = part.run;
    for axis in from.axes.iter_mut().rev().filter(|axis| axis.src != 0) {
        let mut packed = *axis;
        packed.dst = step;
        axis.src = step;
        step *= axis.extent;
        to.axes.insert(0, packed);
    }
    (to, from)
}
