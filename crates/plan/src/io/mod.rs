//! How a rank's bytes are read: which ranges of which files, and where their bytes belong.
//!
//! Row shards are ranges of their file and are read straight into the tensor. Column shards are a run a row;
//! for them the cost model ([`IoProfile`]) chooses between reading each run for itself, which moves the fewest
//! bytes, and reading whole blocks from which the runs are copied in memory, which asks the fewest times:
//!
//! ```text
//!  runs    requests · latency / depth + bytes / bandwidth
//!  blocks  requests · latency / depth + bytes and what lies between them / bandwidth + bytes / memcpy
//! ```
//!
//! The choice is made for each axis of a nest, so a stack of matrices may be read matrix by matrix, but not
//! from the first to the last. What several tensors want of the same range is read once, where that is cheaper.
//! [`IoPlan`] says what is read, in order, and how much of it nobody wanted; nothing of it is as long as the number
//! of runs.

mod choose;
pub mod profile;
mod reads;
pub mod strided;

pub use profile::IoProfile;
use strided::{Refused, Strided};

use crate::error::{Error, Reason, Result};
use crate::plan::{Local, Plan};

/// A strided copy from a file to a local tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Position of the local tensor among the rank's.
    pub local: usize,
    /// Position of the file among the plan's.
    pub file: usize,
    /// Which bytes, and where they go.
    pub strided: Strided,
}

/// The copies that fill local tensors, which are numbered as they come.
///
/// # Errors
/// [`Reason::Granularity`] for a copy inside of bytes, [`Reason::Bounds`] for other copies that cannot be: a plan that
/// was verified has none.
pub fn copies<'a>(locals: impl IntoIterator<Item = &'a Local>) -> Result<Vec<Copy>> {
    let mut made = Vec::new();
    for (at, local) in locals.into_iter().enumerate() {
        for nest in &local.nests {
            let loops = nest.loops.iter().map(|one| (one.extent, one.src, one.dst));
            let strided = Strided::new(nest.src, nest.dst, nest.run, loops).map_err(|refused| {
                let reason = match refused {
                    Refused::PartialByte => Reason::Granularity,
                    Refused::Overflow | Refused::Irregular => Reason::Bounds,
                };
                Error::new(reason).tensor(&local.name).found(refused)
            })?;
            made.extend(strided.map(|strided| Copy {
                local: at,
                file: nest.file as usize,
                strided,
            }));
        }
    }
    Ok(made)
}

impl Plan {
    /// How a rank's bytes are read, from files of which this is known.
    ///
    /// # Errors
    /// [`Reason::Mesh`] for a rank that the mesh has not; those of [`copies`].
    pub fn io(&self, rank: u32, profile: &IoProfile) -> Result<IoPlan> {
        let locals = self.rank(rank)?;
        Ok(IoPlan::new(copies(&locals)?, locals.len(), profile))
    }
}

/// How bytes of a tensor are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// Nothing is read.
    #[default]
    Nothing,
    /// Ranges, straight into the tensor.
    Ranges,
    /// Short runs, each for itself, straight into the tensor.
    Runs,
    /// Whole blocks, from which the wanted bytes are copied.
    Blocks,
}

impl Way {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Way::Nothing => "nothing",
            Way::Ranges => "ranges",
            Way::Runs => "runs",
            Way::Blocks => "blocks",
        }
    }
}

/// Something that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// A range that belongs in one place.
    Range {
        /// The local tensor.
        local: usize,
        /// The file.
        file: usize,
        /// First byte in the file.
        offset: u64,
        /// First byte in the tensor.
        dst: u64,
        /// How many.
        len: u64,
    },
    /// Runs of a strided copy, each for itself.
    Runs(Copy),
    /// A block, parts of which belong in one tensor or several.
    Block {
        /// The file.
        file: usize,
        /// First byte in the file.
        offset: u64,
        /// How many.
        len: u64,
        /// How many of them anybody wants.
        wanted: u64,
        /// Who wants some of it: positions in [`IoPlan::copies`].
        copies: Vec<usize>,
    },
}

impl Read {
    /// The file.
    pub fn file(&self) -> usize {
        match self {
            Read::Range { file, .. } | Read::Block { file, .. } => *file,
            Read::Runs(copy) => copy.file,
        }
    }

    /// Its first byte in the file.
    pub fn offset(&self) -> u64 {
        match self {
            Read::Range { offset, .. } | Read::Block { offset, .. } => *offset,
            Read::Runs(copy) => copy.strided.src,
        }
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> u64 {
        match self {
            Read::Range { len, .. } | Read::Block { len, .. } => *len,
            Read::Runs(copy) => copy.strided.bytes(),
        }
    }

    /// How many requests it is.
    pub fn requests(&self) -> u64 {
        match self {
            Read::Range { .. } | Read::Block { .. } => 1,
            Read::Runs(copy) => copy.strided.runs(),
        }
    }
}

/// What the reads of one local tensor come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorIo {
    /// Bytes of files that it is made of, each counted once.
    pub needed: u64,
    /// Bytes that are read for it. Of a block that several tensors share each answers for what it wants, and those
    /// whose parts have gaps for the gaps.
    pub read: u64,
    /// Runs that it is made of.
    pub runs: u64,
    /// The way in which most of it is read.
    pub way: Way,
}

impl TensorIo {
    /// Bytes read for each byte needed.
    pub fn amplification(&self) -> f64 {
        ratio(self.read, self.needed)
    }
}

/// What one rank reads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IoPlan {
    /// What is wanted.
    pub copies: Vec<Copy>,
    /// What is read, by file and offset.
    pub reads: Vec<Read>,
    /// What that comes to, for each local tensor.
    pub tensors: Vec<TensorIo>,
    /// Bytes of files that the rank's tensors are made of.
    pub needed: u64,
    /// Bytes that are read.
    pub read: u64,
}

impl IoPlan {
    /// Chooses how these copies are read; `locals` is the number of the rank's local tensors.
    pub fn new(copies: Vec<Copy>, locals: usize, profile: &IoProfile) -> IoPlan {
        reads::plan(copies, locals, profile)
    }

    /// Bytes read for each byte needed; 1 where nothing is.
    pub fn amplification(&self) -> f64 {
        ratio(self.read, self.needed)
    }

    /// How many requests the reads are.
    pub fn requests(&self) -> u64 {
        self.reads.iter().map(Read::requests).sum()
    }
}

fn ratio(read: u64, needed: u64) -> f64 {
    match needed {
        0 => 1.0,
        _ => read as f64 / needed as f64,
    }
}

#[cfg(test)]
mod tests;
