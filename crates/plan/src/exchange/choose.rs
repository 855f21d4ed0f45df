//! Which way ranks load together, by what it costs: each by itself, through a window of shared memory, or by messages.
//!
//! ```text
//!  direct      a cache that all share: what any rank of a machine reads, once · else what each reads, all of it
//!  shm         what the ranks of a machine need, once, and two copies in memory
//!  collective  what the group needs, once, by all machines together; what others read, over the network
//! ```
//!
//! It is arithmetic on numbers that are the same on all ranks, so all choose the same.

use crate::error::Result;
use crate::io::{IoPlan, IoProfile, copies};
use crate::plan::Plan;

/// A way to load together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Every rank reads what it needs.
    Direct,
    /// The ranks of a machine read each byte once, into memory that all see.
    Shm,
    /// The ranks of the group read each byte once, and send it.
    Collective,
}

impl Mode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Direct => "direct",
            Mode::Shm => "shm",
            Mode::Collective => "collective",
        }
    }

    /// The mode of this name.
    pub fn named(name: &str) -> Option<Mode> {
        [Mode::Direct, Mode::Shm, Mode::Collective]
            .into_iter()
            .find(|mode| mode.name() == name)
    }
}

/// Where a group loads.
#[derive(Clone, Debug, PartialEq)]
pub struct Where {
    /// For each member the machine that it is on, as a number.
    pub nodes: Vec<u32>,
    /// What is known of the files.
    pub profile: IoProfile,
    /// Whether the processes of a machine share a cache that keeps what one of them reads.
    pub cached: bool,
    /// Whether all machines read from one place, whose bandwidth they share; otherwise each has a disk of its own.
    pub shared: bool,
    /// Bytes a second from one member to another by messages; `None` where there are none.
    pub fabric: Option<f64>,
}

/// Messages on one machine, through the loopback: measured with gloo.
pub const LOOPBACK: f64 = 1.5e9;
/// Messages between machines: a network of 100 Gbit/s.
pub const NETWORK: f64 = 10e9;

/// What each way would cost, and which is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The cheapest way that there is.
    pub mode: Mode,
    /// Seconds of reading each for itself.
    pub direct: f64,
    /// Seconds through a window; `None` where it is no way.
    pub shm: Option<f64>,
    /// Seconds by messages; `None` where there are none.
    pub collective: Option<f64>,
    /// Why, as a phrase.
    pub reason: &'static str,
}

/// What a way must save for being taken instead of one that needs no other rank: one part in ten.
const WORTH: f64 = 0.9;

/// Chooses how these ranks of a plan load.
///
/// # Errors
/// As [`Plan::io`](crate::Plan::io).
pub fn choose(plan: &Plan, members: &[u32], place: &Where) -> Result<Choice> {
    let profile = &place.profile;
    let node = |member: usize| place.nodes.get(member).copied().unwrap_or(0);
    let mut nodes: Vec<Node> = Vec::new();
    for (member, &rank) in members.iter().enumerate() {
        let locals = plan.rank(rank)?;
        let copies = copies(&locals)?;
        let at = nodes.iter().position(|one| one.number == node(member));
        let at = at.unwrap_or_else(|| {
            nodes.push(Node {
                number: node(member),
                ..Node::default()
            });
            nodes.len() - 1
        });
        let Some(one) = nodes.get_mut(at) else {
            continue;
        };
        one.spans.extend(
            copies
                .iter()
                .map(|copy| (copy.file, copy.strided.src, copy.strided.src_end())),
        );
        let io = IoPlan::new(copies, locals.len(), profile);
        one.ranks += 1;
        one.read += io.read;
        one.needed += io.needed;
        one.most_needed = one.most_needed.max(io.needed);
        one.requests = one.requests.max(io.requests());
    }
    let mut all = Vec::new();
    for one in &mut nodes {
        all.extend_from_slice(&one.spans);
        one.once = union(&mut one.spans);
        one.spans = Vec::new();
    }
    Ok(decide(&nodes, union(&mut all), members.len(), place))
}

/// The ranks of one machine.
#[derive(Default)]
struct Node {
    number: u32,
    ranks: u64,
    spans: Vec<(usize, u64, u64)>,
    /// Bytes that its ranks read, each for itself, and those that they need.
    read: u64,
    needed: u64,
    most_needed: u64,
    /// Requests of the rank that asks most.
    requests: u64,
    /// Bytes that any of them needs.
    once: u64,
}

/// Bytes in the union of ranges.
fn union(spans: &mut [(usize, u64, u64)]) -> u64 {
    spans.sort_unstable();
    let (mut bytes, mut file, mut end) = (0, usize::MAX, 0);
    for &(of, begin, until) in spans.iter() {
        if of != file {
            (file, end) = (of, 0);
        }
        bytes += until.saturating_sub(begin.max(end));
        end = end.max(until);
    }
    bytes
}

fn decide(nodes: &[Node], once: u64, members: usize, place: &Where) -> Choice {
    let profile = &place.profile;
    let most = |of: &dyn Fn(&Node) -> f64| nodes.iter().map(of).fold(0.0, f64::max);
    // Where all machines read from one place, what one reads the others wait for.
    let reads = |of: &dyn Fn(&Node) -> u64| match place.shared {
        true => nodes.iter().map(of).sum::<u64>() as f64,
        false => nodes.iter().map(of).max().unwrap_or(0) as f64,
    };
    let asks = |bytes: f64| bytes / profile.block.max(1) as f64 * profile.latency / profile.depth;
    let copied = most(&|node| node.needed as f64) / profile.memcpy;
    let direct_bytes = match place.cached {
        true => reads(&|node| node.once),
        false => reads(&|node| node.read),
    };
    let direct = direct_bytes / profile.bandwidth
        + most(&|node| node.requests as f64) * profile.latency / profile.depth
        + if place.cached { copied } else { 0.0 };
    let through = |bytes: f64| bytes / profile.bandwidth + asks(bytes);
    // A byte goes into the window and out of it.
    let shm = through(reads(&|node| node.once)) + 2.0 * copied;
    let collective = place.fabric.map(|fabric| {
        let read = once as f64
            / if place.shared {
                1.0
            } else {
                nodes.len().max(1) as f64
            };
        let others = (members.saturating_sub(1)) as f64 / members.max(1) as f64;
        through(read) + most(&|node| node.most_needed as f64) * others / fabric + 2.0 * copied
    });
    let shm = (members > 1 && nodes.iter().any(|node| node.ranks > 1)).then_some(shm);
    let collective = collective.filter(|_| members > 1);
    let (mode, reason) = cheapest(direct, shm, collective, place);
    Choice {
        mode,
        direct,
        shm,
        collective,
        reason,
    }
}

fn cheapest(
    direct: f64,
    shm: Option<f64>,
    collective: Option<f64>,
    place: &Where,
) -> (Mode, &'static str) {
    let together = [(Mode::Shm, shm), (Mode::Collective, collective)];
    let together = together
        .into_iter()
        .filter_map(|(mode, cost)| Some((mode, cost?)));
    let best = together.min_by(|a, b| a.1.total_cmp(&b.1));
    match best.filter(|(_, cost)| *cost < direct * WORTH) {
        Some((Mode::Shm, _)) => (
            Mode::Shm,
            "each byte is read once a machine, through memory that all see",
        ),
        Some((mode, _)) => (mode, "each byte is read once and sent to who needs it"),
        None if best.is_none() => (Mode::Direct, "no rank needs what another reads"),
        None if place.cached => (
            Mode::Direct,
            "the page cache reads each byte once for all ranks of a machine",
        ),
        None => (Mode::Direct, "reading each for itself costs no more"),
    }
}
