//! Placements: what one axis of the mesh does to a tensor, and what each coordinate then has.

mod cut;

use serde::{Deserialize, Serialize};

pub(crate) use cut::{Held, Seat, place};

/// What one axis of the mesh does to a tensor. Axes are applied one by one, from the mesh's first to
/// its last, each to what the ones before it left: the order of PyTorch's `DTensor`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Placement {
    /// Every coordinate has all of it.
    Replicate,
    /// Each coordinate has one part of a dimension, in order.
    Shard {
        /// The dimension; it may count from the end, as in every placement.
        dim: i64,
        /// What happens where it does not divide.
        #[serde(default)]
        uneven: Uneven,
    },
    /// The dimension is cut into groups, and each coordinate has one part of every group: PyTorch's
    /// `_StridedShard(dim, split_factor=groups)`.
    Strided {
        /// The dimension.
        dim: i64,
        /// How many groups.
        groups: u64,
        /// What happens where groups or parts don't come out even.
        #[serde(default)]
        uneven: Uneven,
    },
    /// The dimension is made of parts, each with a placement of its own along it; what a coordinate
    /// has of them lies one behind the other.
    Segments {
        /// The dimension.
        dim: i64,
        /// The extents of the parts.
        sizes: Vec<u64>,
        /// Their placements.
        each: Vec<Placement>,
    },
    /// The dimension is `heads` heads of `head_dim`; coordinates get whole heads. Where there are
    /// fewer heads than coordinates, neighbours have the same one.
    Heads {
        /// The dimension.
        dim: i64,
        /// How many heads.
        heads: u64,
        /// Indices of one head.
        head_dim: u64,
        /// [`Uneven::Error`] unless asked otherwise; [`Uneven::Balanced`] lets some coordinates have
        /// one head more.
        #[serde(default = "error", skip_serializing_if = "is_error")]
        uneven: Uneven,
    },
    /// The whole tensor, on these coordinates and no others.
    Owner(Vec<u32>),
    /// The whole tensor on one coordinate; on the others it is absent, or zeros.
    Only {
        /// The coordinate.
        coord: u32,
        /// What the others have.
        #[serde(default)]
        others: Others,
    },
    /// The scales of a weight that is sharded along a dimension of `extent` elements, one scale a
    /// block: each coordinate has the scales of every block that its part of the weight touches.
    Blocks {
        /// The dimension, of the scales and of the weight.
        dim: i64,
        /// Elements of the weight that share a scale.
        block: u64,
        /// Elements that the weight has in this dimension.
        extent: u64,
        /// How the weight is sharded.
        #[serde(default)]
        uneven: Uneven,
    },
}

/// The word that stands for each placement in JSON.
pub(crate) const WORDS: &[&str] = &[
    "replicate",
    "shard",
    "strided",
    "segments",
    "heads",
    "owner",
    "only",
    "blocks",
];

/// What happens where a dimension does not divide by the coordinates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Uneven {
    /// Each coordinate has the rounded-up part, so the last ones have less, or nothing: 131 over 4
    /// is 33, 33, 33, 32, and 5 over 4 is 2, 2, 1, 0.
    #[default]
    Torch,
    /// The first coordinates have one more: 5 over 4 is 2, 1, 1, 1.
    Balanced,
    /// It is refused.
    Error,
    /// The dimension is filled with zeros up to a multiple of this, then divided evenly.
    PadTo(u64),
    /// Coordinates have whole units of this many indices, the first ones one unit more. The last
    /// unit may be shorter.
    Granular(u64),
}

fn error() -> Uneven {
    Uneven::Error
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_error(uneven: &Uneven) -> bool {
    *uneven == Uneven::Error
}

/// What coordinates have that are not [`Placement::Only`]'s one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Others {
    /// Nothing.
    #[default]
    Absent,
    /// A tensor of zeros.
    Zeros,
}

impl Placement {
    /// [`Placement::Shard`] with PyTorch's division.
    pub fn shard(dim: i64) -> Placement {
        Placement::Shard {
            dim,
            uneven: Uneven::Torch,
        }
    }
}
