//! How large a plan may grow. Requests and plans come from files and from other ranks, so each
//! number below stands between a hostile text and this process's memory.

/// Dimensions of a tensor: PyTorch has no more than 64.
pub const RANK: usize = 64;
/// Ranks of a mesh: ten times the largest training run that is known.
pub const RANKS: u64 = 1 << 20;
/// Axes of one factorisation of a mesh.
pub const AXES: usize = 16;
/// How deep an expression may nest, and a placement.
pub const DEPTH: usize = 32;
/// Nests of one view. A stack of all experts of a layer has some hundreds.
pub const NESTS: usize = 1 << 18;
/// Runs of indices that a rank has of one dimension.
pub const RUNS: usize = 1 << 16;
/// Places of a plan, one for each tensor and rank: 100,000 tensors on 1,024 ranks fit.
pub const PLACES: u64 = 1 << 27;
/// Bits of a tensor: positions in files are signed 64-bit byte numbers, so bits fit in 64.
pub const BITS: u64 = 1 << 62;
/// Loops of one copy. A view's nests have few more than it has dimensions.
pub const LOOPS: usize = 4 * RANK;
/// Tensors that ranks call by one name: one a pipeline stage, also of virtual ones.
pub const SAME_NAME: usize = 1 << 12;
