//! What a pipeline is asked to bring to a device, and what it says when that has arrived.

use std::fmt::Debug;
use std::sync::Arc;

use tonnage_device::Memory;
use tonnage_storage::Source;

/// Bytes of a source that belong at a place of a device's memory: all of a range, or the same part of
/// each of many rows.
///
/// ```text
///  source   offset ├─ len ─┤          ├─ len ─┤          ├─ len ─┤     rows = 3
///                  ├────── pitch ─────┤
///  memory   at     ├─ out ─┤ ├─ out ─┤ ├─ out ─┤                       out = len, or what it is cast to
///                  ├ memory_pitch ┤
/// ```
#[derive(Clone, Debug)]
pub struct Piece {
    /// Where the bytes are.
    pub source: Arc<dyn Source>,
    /// The first of them there.
    pub offset: u64,
    /// Bytes of a row; of everything, if there is one row.
    pub len: u64,
    /// How many rows.
    pub rows: u64,
    /// From one row to the next in the source; at least `len` if there are several.
    pub pitch: u64,
    /// Where the bytes belong.
    pub memory: Memory,
    /// The first of them there.
    pub at: u64,
    /// From one row to the next in the memory.
    pub memory_pitch: u64,
    /// Bytes of the memory behind this piece whose content does not matter: they may be overwritten, so that
    /// neighbours that are not quite adjacent can be copied together.
    pub slack: u64,
    /// What this belongs to; all pieces of a tag are submitted together.
    pub tag: u64,
    /// Turns bytes of the source into bytes of the memory.
    pub cast: Option<Arc<dyn Cast>>,
}

impl Piece {
    /// A range of consecutive bytes.
    pub fn plain(
        source: Arc<dyn Source>,
        offset: u64,
        len: u64,
        memory: Memory,
        at: u64,
        tag: u64,
    ) -> Self {
        Piece {
            source,
            offset,
            len,
            rows: 1,
            pitch: 0,
            memory,
            at,
            memory_pitch: 0,
            slack: 0,
            tag,
            cast: None,
        }
    }

    /// Bytes that are wanted of the source.
    pub fn byte_len(&self) -> u64 {
        self.len.saturating_mul(self.rows)
    }

    /// Bytes that this many bytes of the source take in the memory.
    pub(super) fn out(&self, len: u64) -> Option<u64> {
        let Some(cast) = &self.cast else {
            return Some(len);
        };
        let (from, to) = cast.unit();
        let (from, to) = (u64::try_from(from).ok()?, u64::try_from(to).ok()?);
        if from == 0 || !len.is_multiple_of(from) {
            return None;
        }
        (len / from).checked_mul(to)
    }

    /// Whether all of it lies within its source and its memory, and rows do not overlap.
    pub(super) fn fits(&self) -> bool {
        let end = |start: u64, pitch: u64, len: u64| {
            let rest = pitch.checked_mul(self.rows.checked_sub(1)?)?;
            rest.checked_add(len)?.checked_add(start)
        };
        if self.rows == 0 || self.len == 0 {
            return self.offset <= self.source.len() && self.at <= self.memory.len();
        }
        let Some(out) = self.out(self.len) else {
            return false;
        };
        let apart = self.rows == 1 || (self.pitch >= self.len && self.memory_pitch >= out);
        apart
            && end(self.offset, self.pitch, self.len).is_some_and(|end| end <= self.source.len())
            && end(self.at, self.memory_pitch, out).is_some_and(|end| end <= self.memory.len())
    }
}

/// Turns bytes into other bytes, block by block: a cast of elements. The engine knows no dtypes.
pub trait Cast: Debug + Send + Sync {
    /// Bytes of the smallest part that can be cast by itself, before and after.
    fn unit(&self) -> (usize, usize);

    /// Casts whole units; `dst` has exactly the room.
    ///
    /// # Errors
    /// Why these bytes can't be cast.
    fn cast(
        &self,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Tags whose every byte is in the device's memory: any stream may use it without further waiting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Landed {
    /// The tags, in the order in which they were complete.
    pub tags: Vec<u64>,
}
