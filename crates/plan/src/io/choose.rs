//! The cost model: how many of a copy's axes are read as one stretch, gaps and all.

use super::profile::IoProfile;
use super::strided::Strided;

/// Stretches of one copy at most: each takes some memory. Whoever has more reads runs, which take none.
const MOST: u64 = 1 << 20;

/// How a copy is read by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    /// How many of its innermost axes are read together; 0: each run for itself.
    pub level: usize,
    /// Seconds that this takes, about.
    pub cost: f64,
}

/// The cheapest way to read a copy by itself.
pub(super) fn choose(copy: &Strided, profile: &IoProfile) -> Choice {
    let needed = copy.wanted();
    // Bytes that are wanted several times are read once, and copied from there.
    let least = copy.axes.iter().filter(|axis| axis.src == 0).count();
    let mut best: Option<Choice> = None;
    for level in least..=copy.axes.len() {
        let (count, span) = stretches(copy, level);
        let staged = level > 0;
        if staged && count > MOST && level < copy.axes.len() {
            continue;
        }
        let bytes = count.saturating_mul(span.saturating_add(profile.page));
        let scatter = if staged {
            profile.scatters(needed)
        } else {
            0.0
        };
        let cost = profile.reads(count, bytes) + scatter;
        if best.is_none_or(|best| cost < best.cost) {
            best = Some(Choice { level, cost });
        }
    }
    best.unwrap_or(Choice {
        level: copy.axes.len(),
        cost: 0.0,
    })
}

/// How many stretches a copy is, whose innermost axes are read together, and bytes of each.
pub(super) fn stretches(copy: &Strided, level: usize) -> (u64, u64) {
    let outer = copy.axes.len().saturating_sub(level);
    let (outer, inner) = copy.axes.split_at(outer);
    let count = outer.iter().map(|axis| axis.extent).product();
    let span = inner
        .iter()
        .map(|axis| (axis.extent - 1) * axis.src)
        .sum::<u64>()
        + copy.run;
    (count, span)
}
