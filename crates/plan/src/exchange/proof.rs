//! That each copy of the plan is served whole, and once.

use super::{Exchange, Piece};
use crate::error::{Error, Reason, Result};

impl Exchange {
    /// Pieces are disjoint; each copy is whole in the pieces that name it; who reads a batch is a member, and each
    /// block is in one batch, each batch in one round. Together with the plan's proof, that copies fill each tensor
    /// exactly once, this says that the exchange does.
    pub(super) fn prove(&self) -> Result<()> {
        let mut all: Vec<&Piece> = self.direct.iter().flatten().chain(&self.blocks).collect();
        all.sort_by_key(|piece| (piece.file, piece.offset));
        for pair in all.windows(2) {
            if let [one, two] = pair
                && one.file == two.file
                && one.end() > two.offset
            {
                return Err(broken("bytes that two members read", two));
            }
        }
        let mut served = vec![0_u64; self.wants.len()];
        for (member, pieces) in (0..).zip(&self.direct) {
            for piece in pieces {
                self.serve(piece, &[member], &mut served)?;
            }
        }
        let mut seen = vec![false; self.blocks.len()];
        let batches = self.rounds.iter().flat_map(|round| round.batches.clone());
        if !batches.eq(0..self.batches.len()) {
            return Err(Error::new(Reason::Destination).found("batches that are in no round"));
        }
        for batch in &self.batches {
            for &at in &batch.blocks {
                let block = self.blocks.get(at as usize).zip(seen.get_mut(at as usize));
                let Some((block, seen)) = block.filter(|(_, seen)| !**seen) else {
                    return Err(Error::new(Reason::Destination).found("a block that is read twice"));
                };
                *seen = true;
                if batch.reader as usize >= self.members.len() {
                    return Err(broken("bytes that nobody reads", block));
                }
                self.serve(block, self.sets.get(block.set), &mut served)?;
            }
        }
        for (want, bytes) in self.wants.iter().zip(served) {
            if bytes != want.strided.bytes() {
                return Err(Error::new(Reason::Destination)
                    .range(format_args!(
                        "bytes {}..{} of file {}",
                        want.strided.src,
                        want.strided.src_end(),
                        want.file
                    ))
                    .found(format_args!("{bytes} bytes that are brought"))
                    .needed(format_args!(
                        "{} of target {}",
                        want.strided.bytes(),
                        want.target
                    )));
            }
        }
        Ok(())
    }

    /// Counts what a piece brings of each copy that names it; whoever wants one must be served.
    fn serve(&self, piece: &Piece, members: &[u32], served: &mut [u64]) -> Result<()> {
        for &at in &piece.wants {
            let (Some(want), Some(served)) =
                (self.wants.get(at as usize), served.get_mut(at as usize))
            else {
                return Err(broken("a copy that is none", piece));
            };
            let wanting = self.sets.get(want.set);
            if want.file != piece.file
                || wanting
                    .iter()
                    .any(|one| members.binary_search(one).is_err())
            {
                return Err(broken("bytes that go to others", piece));
            }
            (want.strided).within_src(piece.offset, piece.end(), &mut |part| {
                *served += part.bytes()
            });
        }
        Ok(())
    }
}

fn broken(found: &str, piece: &Piece) -> Error {
    Error::new(Reason::Destination)
        .range(format_args!(
            "bytes {}..{} of file {}",
            piece.offset,
            piece.end(),
            piece.file
        ))
        .found(found)
        .needed("each byte read by one member, for all that need it")
}
