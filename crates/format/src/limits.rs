//! Budgets of a reader (spec chapter 10). They are a value, passed in; nothing reads the environment.

use crate::error::{Error, Reason};
use crate::forever;

/// How much a reader is willing to take on. The defaults accept every file that the specification
/// says a reader must accept; a service that reads strangers' files may lower them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the header, prefix not counted. Default: the format's own cap, 100,000,000 (spec 2.3).
    pub header_bytes: u64,
    /// Tensors in one file. Default 16,777,216: a 100 MB header has room for about 1.8 million.
    pub tensors: u64,
    /// Dimensions of one tensor. Default 65,535; the specification asks for at least 64 (spec 10.4).
    pub rank: u64,
    /// Dimensions of all tensors together. Default 16,777,216: eight for each tensor that fits a
    /// 100 MB header, and the reason why a header of nothing but dimensions costs at most 1.3 × its
    /// size in memory.
    pub dims: u64,
    /// Entries of `__metadata__`. Default 4,194,304: real files have dozens.
    pub metadata_entries: u64,
    /// Depth of nested values that are skipped, the header's object counted. Default 32 (spec 3.11).
    pub depth: u32,
    /// Bytes of an index file, less than 4 GiB. Default 1 GiB: the largest seen in the wild is 60 MB.
    pub index_bytes: u64,
    /// Files of one checkpoint. Default 100,000.
    pub shards: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            header_bytes: forever::MAX_HEADER_LEN,
            tensors: 1 << 24,
            rank: u16::MAX as u64,
            dims: 1 << 24,
            metadata_entries: 1 << 22,
            depth: 32,
            index_bytes: 1 << 30,
            shards: 100_000,
        }
    }
}

impl Limits {
    pub(crate) fn check(found: u64, limit: u64, reason: Reason) -> Result<(), Error> {
        if found > limit {
            Err(Error::over(reason, found, limit))
        } else {
            Ok(())
        }
    }
}

/// Verdicts of the reference implementation that the specification does not share, each by name.
///
/// [`Quirks::NONE`] is the strict profile (spec 10.1), [`Quirks::EVERYDAY`] what readers take unless they are
/// told otherwise; [`Quirks::REFERENCE`] gives the verdicts of the `safetensors` crate 0.8.0, case by case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Quirks(u16);

impl Quirks {
    /// The strict profile.
    pub const NONE: Quirks = Quirks(0);
    /// Of two tensors with one name the last counts; the earlier one's layout is not looked at.
    pub const DUPLICATE_TENSOR_LAST_WINS: Quirks = Quirks(1);
    /// Of two metadata entries with one key the last counts.
    pub const DUPLICATE_METADATA_KEY_LAST_WINS: Quirks = Quirks(1 << 1);
    /// A tensor may be written as an array: `["F32",[2],[0,8]]`.
    pub const ENTRY_AS_ARRAY: Quirks = Quirks(1 << 2);
    /// A dtype may be written as `{"F32":null}`.
    pub const DTYPE_AS_ENUM_MAP: Quirks = Quirks(1 << 3);
    /// `"__metadata__":null` counts as absent.
    pub const METADATA_NULL: Quirks = Quirks(1 << 4);
    /// The size is multiplied from left to right, so a zero saves only what follows it.
    pub const ORDERED_ZERO_OVERFLOW: Quirks = Quirks(1 << 5);
    /// Sizes and offsets reach to 2^64−1.
    pub const FULL_U64: Quirks = Quirks(1 << 6);
    /// Skipped values nest to a depth of 127.
    pub const DEPTH_127: Quirks = Quirks(1 << 7);
    /// One unknown dtype refuses the whole file.
    pub const UNKNOWN_DTYPE_REFUSED: Quirks = Quirks(1 << 8);
    /// A number in a skipped value must fit a finite double.
    pub const NUMBER_RANGE_IN_SKIPPED: Quirks = Quirks(1 << 9);
    /// A header of fewer than two bytes is judged as JSON rather than by its length, and keys that
    /// the entry does not know may repeat.
    pub const UNKNOWN_FIELD_REPEATS: Quirks = Quirks(1 << 10);
    /// The only one that a reader has by default (spec 10.1): MLX writes null where a file has no metadata.
    pub const EVERYDAY: Quirks = Quirks::METADATA_NULL;
    /// All of them: the reference's verdicts.
    pub const REFERENCE: Quirks = Quirks((1 << 11) - 1);

    /// Each quirk with its name, in the order of their definition.
    pub const NAMES: &'static [(&'static str, Quirks)] = &[
        (
            "DUPLICATE_TENSOR_LAST_WINS",
            Quirks::DUPLICATE_TENSOR_LAST_WINS,
        ),
        (
            "DUPLICATE_METADATA_KEY_LAST_WINS",
            Quirks::DUPLICATE_METADATA_KEY_LAST_WINS,
        ),
        ("ENTRY_AS_ARRAY", Quirks::ENTRY_AS_ARRAY),
        ("DTYPE_AS_ENUM_MAP", Quirks::DTYPE_AS_ENUM_MAP),
        ("METADATA_NULL", Quirks::METADATA_NULL),
        ("ORDERED_ZERO_OVERFLOW", Quirks::ORDERED_ZERO_OVERFLOW),
        ("FULL_U64", Quirks::FULL_U64),
        ("DEPTH_127", Quirks::DEPTH_127),
        ("UNKNOWN_DTYPE_REFUSED", Quirks::UNKNOWN_DTYPE_REFUSED),
        ("NUMBER_RANGE_IN_SKIPPED", Quirks::NUMBER_RANGE_IN_SKIPPED),
        ("UNKNOWN_FIELD_REPEATS", Quirks::UNKNOWN_FIELD_REPEATS),
    ];

    /// Whether every quirk of `other` is set.
    pub const fn has(self, other: Quirks) -> bool {
        self.0 & other.0 == other.0
    }

    /// These quirks and those of `other`.
    #[must_use]
    pub const fn with(self, other: Quirks) -> Quirks {
        Quirks(self.0 | other.0)
    }

    /// These quirks without those of `other`.
    #[must_use]
    pub const fn without(self, other: Quirks) -> Quirks {
        Quirks(self.0 & !other.0)
    }
}

/// How to read a header: a profile and its budgets. The default is the strict profile that takes null for absent
/// metadata (spec 10.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// Deviations from the strict profile.
    pub quirks: Quirks,
    /// Budgets.
    pub limits: Limits,
}

impl Default for ReadOptions {
    fn default() -> Self {
        ReadOptions {
            quirks: Quirks::EVERYDAY,
            limits: Limits::default(),
        }
    }
}

impl ReadOptions {
    /// The strict profile with the default budgets (spec 10.1).
    pub fn strict() -> Self {
        ReadOptions {
            quirks: Quirks::NONE,
            limits: Limits::default(),
        }
    }

    /// The reference implementation's verdicts (spec 10.9).
    pub fn compat() -> Self {
        ReadOptions {
            quirks: Quirks::REFERENCE,
            limits: Limits::default(),
        }
    }

    pub(crate) fn depth(&self) -> u32 {
        if self.quirks.has(Quirks::DEPTH_127) {
            127
        } else {
            self.limits.depth
        }
    }

    pub(crate) fn max_integer(&self) -> u64 {
        if self.quirks.has(Quirks::FULL_U64) {
            u64::MAX
        } else {
            forever::MAX_INTEGER
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quirks_are_distinct_and_together_the_reference() {
        let mut all = Quirks::NONE;
        for &(name, quirk) in Quirks::NAMES {
            assert!(!all.has(quirk), "{name} repeats a bit");
            all = all.with(quirk);
            assert!(!all.without(quirk).has(quirk));
        }
        assert_eq!(all, Quirks::REFERENCE);
        assert_eq!(ReadOptions::compat().quirks, all);
        assert_eq!(ReadOptions::strict().quirks, Quirks::NONE);
        assert_eq!(ReadOptions::default().quirks, Quirks::METADATA_NULL);
    }
}
