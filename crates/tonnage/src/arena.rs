//! Where tensors lie in a device's memory.
//!
//! A large tensor gets a region of its own; small ones share regions, since each allocation of a driver takes a
//! while and is rounded up. Regions are filled in the order of the tensors, so that neighbours in a file are
//! neighbours on the device and go there by one copy.

use crate::error::{Error, Result};

/// From here on a tensor has a region of its own.
pub const LARGE: u64 = 1 << 20;
/// Bytes of a region that small tensors share, at most.
pub const ARENA: u64 = 32 << 20;

/// Where a tensor lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which region.
    pub region: usize,
    /// Its first byte there.
    pub offset: u64,
    /// Unused bytes behind it, up to the next tensor.
    pub slack: u64,
}

/// Places of tensors, and the regions that hold them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arena {
    /// One place a tensor.
    pub places: Vec<Place>,
    /// Bytes of each region.
    pub regions: Vec<u64>,
}

/// What a device asks of places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Tensors begin on multiples of this: a power of two.
    pub align: u64,
    /// Bytes of a region at most.
    pub max_region: u64,
    /// Bytes of a shared region at most.
    pub arena: u64,
}

impl Rules {
    /// Those of a device.
    pub fn of(info: &tonnage_device::Info) -> Self {
        // Frameworks and kernels expect what their own allocators give, which is 256 at least.
        Rules {
            align: info.align.max(256).next_power_of_two(),
            max_region: info.max_region,
            arena: ARENA,
        }
    }
}

/// Places tensors of these lengths, in this order.
///
/// # Errors
/// The position of a tensor that is longer than a region may be.
pub fn place(lens: impl IntoIterator<Item = u64>, rules: Rules) -> Result<Arena, usize> {
    let mut arena = Arena::default();
    // The region that small tensors go to now, and the last of them there.
    let mut shared: Option<(usize, usize)> = None;
    for (position, len) in lens.into_iter().enumerate() {
        if len > rules.max_region {
            return Err(position);
        }
        if len >= LARGE.min(rules.arena) {
            arena.own(len);
            continue;
        }
        let room = |region: usize| {
            let used = arena.regions.get(region)?;
            let begin = used.checked_next_multiple_of(rules.align)?;
            let end = begin.checked_add(len)?;
            (end <= rules.arena.min(rules.max_region)).then_some((begin, end))
        };
        match shared.and_then(|(region, last)| Some((region, last, room(region)?))) {
            Some((region, last, (begin, end))) => {
                let used = std::mem::replace(&mut arena.regions[region], end);
                arena.places[last].slack = begin - used;
                arena.places.push(Place {
                    region,
                    offset: begin,
                    slack: 0,
                });
                shared = Some((region, position));
            }
            None => {
                arena.own(len);
                shared = Some((arena.regions.len() - 1, position));
            }
        }
    }
    Ok(arena)
}

impl Arena {
    fn own(&mut self, len: u64) {
        self.places.push(Place {
            region: self.regions.len(),
            offset: 0,
            slack: 0,
        });
        self.regions.push(len);
    }
}

/// The error of a tensor that no region holds: an empty `name` where only its length is known.
pub fn too_large(name: &str, len: u64, info: &tonnage_device::Info) -> Error {
    let (id, most) = (info.id, info.max_region);
    let text = format!(
        "it takes {len} bytes, and {id} has no allocation of more than {most}; slices of it fit"
    );
    let cause = tonnage_device::Cause::Invalid(text);
    Error::from(tonnage_device::Error::new(id, "hold a tensor", cause)).about(name, None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules {
        align: 256,
        max_region: 1 << 40,
        arena: ARENA,
    };

    #[test]
    fn small_ones_share_and_large_ones_do_not() {
        let arena = place([10, LARGE, 300, 0, 5], RULES).unwrap();
        let at = |region, offset, slack| Place {
            region,
            offset,
            slack,
        };
        assert_eq!(
            arena.places,
            [
                at(0, 0, 246),
                at(1, 0, 0),
                at(0, 256, 212),
                at(0, 768, 0),
                at(0, 768, 0)
            ]
        );
        assert_eq!(arena.regions, [773, LARGE]);
    }

    #[test]
    fn what_no_region_holds_is_named() {
        let rules = Rules {
            max_region: 1000,
            ..RULES
        };
        assert_eq!(place([999, 1000, 1001], rules), Err(2));
        assert_eq!(place([u64::MAX], RULES), Err(0));
    }

    proptest! {
        #[test]
        fn no_two_overlap_and_every_rule_is_kept(
            lens in prop::collection::vec(prop_oneof![0..2000_u64, 0..3 * LARGE], 0..200),
            align in 0..13_u32,
            max_region in prop_oneof![3 * LARGE..100 * LARGE, Just(u64::MAX)],
            arena_len in prop_oneof![4096..10 * LARGE, Just(ARENA)],
        ) {
            let rules = Rules { align: 1 << align, max_region, arena: arena_len };
            let arena = place(lens.iter().copied(), rules).unwrap();
            prop_assert_eq!(arena.places.len(), lens.len());
            let mut spans: Vec<(usize, u64, u64, u64)> = Vec::new();
            for (place, &len) in arena.places.iter().zip(&lens) {
                prop_assert!(place.offset.is_multiple_of(rules.align));
                prop_assert!(place.offset + len + place.slack <= arena.regions[place.region]);
                spans.push((place.region, place.offset, len, place.slack));
            }
            spans.sort();
            for pair in spans.windows(2) {
                let ((a, at, len, slack), (b, next, ..)) = (pair[0], pair[1]);
                if a == b {
                    prop_assert!(at + len + slack <= next, "{:?}", pair);
                }
            }
            for (region, &len) in arena.regions.iter().enumerate() {
                let members = spans.iter().filter(|span| span.0 == region).count();
                prop_assert!(members >= 1 && len <= max_region);
                prop_assert!(members == 1 || len <= arena_len);
            }
            // Nothing is wasted but alignment and the ends of shared regions.
            let small = lens.iter().filter(|&&len| len < LARGE.min(arena_len)).count() as u64;
            let (held, wanted): (u64, u64) = (arena.regions.iter().sum(), lens.iter().sum());
            prop_assert!(held <= wanted + small * rules.align);
        }
    }
}
