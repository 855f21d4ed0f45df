//! Pieces cut and joined into blocks: what one slot is filled with.
//!
//! A block is a range of one source that is read at once, and the parts of it that are wanted. Blocks of
//! large pieces end where a page of the file ends, so that direct reads overlap nowhere but at the ends
//! of a piece. A slot is used like this:
//!
//! ```text
//!  0        skew                      skew+len   read_len             read_len + out
//!  ├─ cut off ┤ bytes of the source ──────┤ cut off ┤ cast or gathered bytes ─┤
//!  start (on a page of the file)
//! ```
//!
//! Small pieces are gathered behind what was read, as far apart as they are in the device's memory, so that
//! all of them go there by one copy.

use std::sync::Arc;

use tonnage_device::Memory;
use tonnage_storage::Source;

use super::piece::{Cast, Piece};

/// Offsets of direct reads are multiples of this; no disk asks for more.
pub(super) const PAGE: u64 = 4096;
/// Below this, a piece is gathered with its neighbours: a copy of its own would cost more.
const SMALL: u64 = 64 << 10;
/// Unwanted bytes between two pieces up to which they are read together.
const GAP: u64 = 64 << 10;
/// Unused bytes of memory between two pieces up to which they are copied together.
const MAX_SLACK: u64 = 4096;
/// Rows shorter than this are gathered by the host: the copy engines of devices are slow with them.
const SHORT_ROW: u64 = 64;
/// Where gathered bytes begin.
const OUT_ALIGN: u64 = 64;

/// A part of a block that goes to one place.
#[derive(Debug)]
pub(super) struct Part {
    /// First byte in the slot, as it was read.
    pub from: usize,
    /// Bytes of a row, as they were read.
    pub len: usize,
    pub rows: usize,
    /// From row to row in the slot, as they were read.
    pub pitch: usize,
    /// Where its bytes are gathered or cast to, counted from the end of what is read.
    pub out: Option<usize>,
    /// Bytes of a row in the device's memory.
    pub out_len: usize,
    pub memory: Memory,
    pub at: u64,
    pub memory_pitch: u64,
    pub slack: u64,
    pub tag: u64,
    pub cast: Option<Arc<dyn Cast>>,
}

/// What one slot is filled with.
#[derive(Debug)]
pub(super) struct Block {
    pub source: Arc<dyn Source>,
    /// Position of the device among the pipeline's.
    pub device: usize,
    /// Whether the host reaches the memory without a copy.
    pub mapped: bool,
    /// A multiple of [`PAGE`].
    pub start: u64,
    pub skew: usize,
    pub len: usize,
    /// Bytes behind what is read.
    pub out: usize,
    pub parts: Vec<Part>,
    /// Whether it is whole pages that may go straight to a card.
    pub gds: bool,
}

impl Block {
    pub(super) fn new(source: &Arc<dyn Source>, device: usize, mapped: bool, offset: u64) -> Self {
        Block {
            source: Arc::clone(source),
            device,
            mapped,
            start: offset / PAGE * PAGE,
            skew: (offset % PAGE) as usize,
            len: 0,
            out: 0,
            parts: Vec::new(),
            gds: false,
        }
    }

    /// The first wanted byte.
    pub fn offset(&self) -> u64 {
        self.start + self.skew as u64
    }

    /// One past the last wanted byte.
    pub fn end(&self) -> u64 {
        self.offset() + self.len as u64
    }

    /// Bytes of the slot that a direct read takes; gathered bytes begin there.
    pub fn read_len(&self) -> usize {
        (self.skew + self.len).next_multiple_of(PAGE as usize)
    }

    /// Bytes of sources that are wanted.
    pub fn wanted(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| (part.len * part.rows) as u64)
            .sum()
    }

    /// Whether it can be read straight into mapped memory.
    pub fn straight(&self) -> Option<&Part> {
        match &self.parts[..] {
            [part] if self.mapped && part.rows == 1 && part.out.is_none() => Some(part),
            _ => None,
        }
    }
}

/// Where a piece goes: the position of its device, and what that can do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub device: usize,
    pub mapped: bool,
    pub pitched: bool,
    /// Whether large pieces go straight to a card, so that each has blocks of its own.
    pub gds: bool,
}

/// Cuts pieces and joins neighbours.
#[derive(Debug)]
pub(super) struct Cutter {
    slot: u64,
    blocks: Vec<Block>,
    /// The last block takes no more.
    closed: bool,
}

impl Cutter {
    pub fn new(slot: usize) -> Self {
        Cutter {
            slot: slot as u64,
            blocks: Vec::new(),
            closed: true,
        }
    }

    pub fn finish(self) -> Vec<Block> {
        self.blocks
    }

    /// Adds a piece, which [`Piece::fits`].
    pub fn add(&mut self, piece: &Piece, way: Way) {
        if piece.rows == 0 || piece.len == 0 {
            return;
        }
        let out = piece.out(piece.len).unwrap_or(piece.len);
        let dense = piece.rows == 1 || (piece.pitch == piece.len && piece.memory_pitch == out);
        if dense {
            self.add_plain(piece, piece.offset, piece.at, piece.len * piece.rows, way);
        } else if self.rows_at_once(piece, out, way) {
            self.add_rows(piece, out, way);
        } else {
            for row in 0..piece.rows {
                let (offset, at) = (
                    piece.offset + row * piece.pitch,
                    piece.at + row * piece.memory_pitch,
                );
                self.add_plain(piece, offset, at, piece.len, way);
            }
        }
    }

    fn add_plain(&mut self, piece: &Piece, mut offset: u64, mut at: u64, mut len: u64, way: Way) {
        let gathered = piece.cast.is_some() || len < SMALL;
        while len > 0 {
            let mut room = self.room(piece, offset, at, way, gathered);
            if room == 0 || (room < len && len < SMALL) {
                self.open(piece, offset, way);
                room = self.room(piece, offset, at, way, gathered);
            }
            let take = room.min(len);
            if take == 0 {
                // A cast whose smallest part does not fit a slot: slots are far larger than units.
                return;
            }
            let out_len = piece.out(take).unwrap_or(take);
            self.push(
                piece,
                offset,
                at,
                take,
                out_len,
                gathered,
                if take == len { piece.slack } else { 0 },
            );
            (offset, at, len) = (offset + take, at + out_len, len - take);
        }
    }

    /// Whether several rows are better read together than one by one.
    fn rows_at_once(&self, piece: &Piece, out: u64, way: Way) -> bool {
        let near = piece.pitch - piece.len <= GAP;
        let dense_out = piece.memory_pitch == out;
        let by_device =
            way.pitched && !way.mapped && piece.cast.is_none() && piece.len >= SHORT_ROW;
        let room = self.slot.saturating_sub(2 * PAGE);
        near && (by_device || dense_out) && piece.pitch.saturating_add(2 * out) <= room
    }

    fn add_rows(&mut self, piece: &Piece, out: u64, way: Way) {
        let by_device =
            way.pitched && !way.mapped && piece.cast.is_none() && piece.len >= SHORT_ROW;
        let each_out = if by_device { 0 } else { out };
        let mut row = 0;
        while row < piece.rows {
            let offset = piece.offset + row * piece.pitch;
            self.open(piece, offset, way);
            let room = self.slot.saturating_sub(offset % PAGE + PAGE);
            // skew + (n - 1) × pitch + len, rounded up, + n × out ≤ slot; there is room for one at least.
            let rows = ((room.saturating_sub(piece.len + each_out)) / (piece.pitch + each_out) + 1)
                .min(piece.rows - row);
            let len = (rows - 1) * piece.pitch + piece.len;
            let Some(block) = self.blocks.last_mut() else {
                return;
            };
            block.len = len as usize;
            block.out = (rows * each_out) as usize;
            block.parts.push(Part {
                from: block.skew,
                len: piece.len as usize,
                rows: rows as usize,
                pitch: piece.pitch as usize,
                out: (!by_device).then_some(0),
                out_len: out as usize,
                memory: piece.memory.clone(),
                at: piece.at + row * piece.memory_pitch,
                memory_pitch: piece.memory_pitch,
                slack: 0,
                tag: piece.tag,
                cast: piece.cast.clone(),
            });
            self.closed = true;
            row += rows;
        }
    }

    fn open(&mut self, piece: &Piece, offset: u64, way: Way) {
        self.blocks
            .push(Block::new(&piece.source, way.device, way.mapped, offset));
        self.closed = false;
    }

    /// How many bytes from `offset` on the last block can take.
    fn room(&self, piece: &Piece, offset: u64, at: u64, way: Way, gathered: bool) -> u64 {
        let Some(block) = self.blocks.last().filter(|_| !self.closed) else {
            return 0;
        };
        let near = offset
            .checked_sub(block.end())
            .is_some_and(|gap| gap <= GAP);
        let same = Arc::ptr_eq(&block.source, &piece.source)
            && (block.device, block.mapped) == (way.device, way.mapped);
        // What is large and mapped is read straight into its place, so it has a block of its own.
        let alone =
            way.mapped && !gathered && !block.parts.is_empty() || block.straight().is_some();
        let joins = gathered && block.parts.iter().all(|part| part.out.is_some());
        let apart = way.gds && !block.parts.is_empty() && !joins;
        if !near || !same || alone || apart {
            return 0;
        }
        let used = offset - block.start;
        if !gathered {
            // Up to the end of a page of the file.
            return (self.slot / PAGE * PAGE)
                .saturating_sub(used + (block.out as u64).next_multiple_of(PAGE));
        }
        let out = place_out(block, piece, at);
        let room = self.slot.saturating_sub(used + PAGE + out);
        match &piece.cast {
            None => room / 2,
            Some(cast) => {
                let (from, to) = cast.unit();
                let (from, to) = (from as u64, to as u64);
                room / from.saturating_add(to).max(1) * from
            }
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one call, and each is a number of its own"
    )]
    fn push(
        &mut self,
        piece: &Piece,
        offset: u64,
        at: u64,
        len: u64,
        out_len: u64,
        gathered: bool,
        slack: u64,
    ) {
        let Some(block) = self.blocks.last_mut() else {
            return;
        };
        let out = gathered.then(|| place_out(block, piece, at) as usize);
        block.parts.push(Part {
            from: (offset - block.start) as usize,
            len: len as usize,
            rows: 1,
            pitch: 0,
            out,
            out_len: out_len as usize,
            memory: piece.memory.clone(),
            at,
            memory_pitch: 0,
            slack: slack.min(MAX_SLACK),
            tag: piece.tag,
            cast: piece.cast.clone(),
        });
        block.len = (offset + len - block.offset()) as usize;
        block.out = block
            .out
            .max(out.unwrap_or(0) + if gathered { out_len as usize } else { 0 });
    }
}

/// Where a gathered part begins behind what is read: as far from the one before as in the memory, if both
/// can be copied together.
fn place_out(block: &Block, piece: &Piece, at: u64) -> u64 {
    let apart = || (block.out as u64).next_multiple_of(OUT_ALIGN);
    let Some((before, out)) = block.parts.last().and_then(|part| Some((part, part.out?))) else {
        return apart();
    };
    let end = before.at + before.out_len as u64;
    match at.checked_sub(end) {
        Some(gap)
            if gap <= before.slack
                && Arc::ptr_eq(&before.memory, &piece.memory)
                && before.rows == 1 =>
        {
            out as u64 + before.out_len as u64 + gap
        }
        _ => apart(),
    }
}
