//! Ranks of one machine that load through a window of shared memory: each byte is read once, by one of them.
//!
//! In each round every rank reads its blocks into one half of the window, waits for the others, and takes what it
//! needs of all blocks, while the other half is being filled already by those that are faster.

use std::path::Path;
use std::time::Duration;

use tonnage_engine::{self as engine, Cancel, HostBuffer, Options};
use tonnage_plan::exchange::{Exchange, Means};
use tonnage_storage::window::{Agreed, Patience, Window};

use super::PlannedLoad;
use super::load::{LocalMemory, PlanLoad, Ran, place};
use super::together::{Together, tell};
use crate::error::{Error, Result};
use crate::load::Loaded;

/// Where the ranks of a machine meet.
#[derive(Clone, Copy, Debug)]
pub struct Meeting<'a> {
    /// A file that is not there yet, in a file system that lies in memory; all give the same, and no other group
    /// does. It is gone once all have met.
    pub path: &'a Path,
    /// How long they wait for each other.
    pub timeout: Duration,
}

impl PlannedLoad<'_> {
    /// Loads a member's tensors into host memory, together with the other members of an exchange by a window.
    ///
    /// # Errors
    /// As [`PlannedLoad::load_shm_into`].
    pub fn load_shm(
        &self,
        exchange: &Exchange,
        member: usize,
        meeting: &Meeting<'_>,
        load: &PlanLoad<'_>,
    ) -> Result<Loaded> {
        let together = Together::new(self, exchange, member)?;
        let (tensors, len) = place(together.locals(), load.dtype)?;
        let mut buffer = HostBuffer::new(len)?;
        let mut parts = LocalMemory::split(buffer.as_mut_slice(), &tensors);
        let ran = self.load_shm_into(&together, &mut parts, meeting, load, &load.options())?;
        drop(parts);
        let report = ran.told(tensors.len());
        Ok(Loaded::new(buffer, tensors, report))
    }

    /// Loads all of a member's tensors into memory of the caller's.
    ///
    /// # Errors
    /// As [`PlannedLoad::load`]. `PLAN_DIGEST` where the members have not the same plan; an error of the kind `Io`
    /// where one does not come in time, dies, or gives up: no member waits longer than the time given. `WINDOW` for
    /// an exchange by other means. [`PlanLoad::verify`] is refused: no member sees whole files.
    pub fn load_shm_into(
        &self,
        together: &Together<'_>,
        parts: &mut [LocalMemory<'_>],
        meeting: &Meeting<'_>,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let exchange = together.exchange;
        let Means::Window { half } = exchange.means() else {
            return Err(Error::usage(
                "WINDOW",
                "the exchange was built for messages",
            ));
        };
        if load.verify {
            return Err(Error::usage(
                "NO_CHECKSUMS",
                "checksums are compared where each rank reads for itself",
            ));
        }
        let mut raw = together.begin(parts)?;
        let agreed = Agreed {
            members: exchange.members().len() as u32,
            half,
            digest: exchange.digest(self.plan()),
        };
        let cancelled = || options.cancel.is_some_and(Cancel::is_cancelled);
        let patience = Patience {
            timeout: meeting.timeout,
            cancelled: &cancelled,
        };
        let joined = Window::join(meeting.path, agreed, together.member as u32, &patience);
        let mut window = joined.map_err(met)?;
        let quiet = Options {
            progress: None,
            ..*options
        };
        let mut ran = together.direct(parts, &mut raw, load, &quiet)?;
        let total = together
            .locals()
            .iter()
            .map(|local| local.needed_bits() / 8)
            .sum();
        tell(options, ran.needed, total);
        for round in 0..exchange.rounds().len() {
            let half = round as u64;
            let read = fill(together, round, &mut window, &quiet)?;
            window.arrive(&patience).map_err(met)?;
            let takes = together.share.window_takes(round);
            let needed = together.take(takes, window.bytes(half), parts, &mut raw, &quiet)?;
            ran.add(&Ran {
                report: read,
                needed,
            });
            tell(options, ran.needed, total);
        }
        window.finish();
        together.end(parts, raw)?;
        ran.report.reason =
            "each byte was read by one rank of the machine, into memory that all see";
        Ok(ran)
    }
}

/// Reads a member's blocks of a round into the window.
fn fill(
    together: &Together<'_>,
    round: usize,
    window: &mut Window,
    options: &Options<'_>,
) -> Result<engine::Report> {
    let blocks = together.share.window_reads(round);
    let places: Vec<(u64, u64)> = blocks
        .iter()
        .map(|&(_, _, len, place)| (place, len))
        .collect();
    let memory = window.parts(round as u64, &places)?;
    let sources = &together.load.sources;
    let reads = blocks.iter().zip(memory).map(|(&(file, offset, ..), dst)| {
        let lost = || Error::usage("PLAN_FILES", "no such file");
        let source = &**sources.get(file).ok_or_else(lost)?;
        Ok(engine::Read {
            source,
            offset,
            dst,
        })
    });
    let reads = reads.collect::<Result<Vec<_>>>()?;
    engine::read(reads, options).map_err(|error| together.load.named(error))
}

/// What went wrong at a meeting, in words of plans.
fn met(error: tonnage_storage::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::Interrupted => engine::Error::Cancelled.into(),
        std::io::ErrorKind::InvalidData => digest(&error),
        _ if error.to_string().contains("has another plan") => digest(&error),
        _ => error.into(),
    }
}

fn digest(error: &tonnage_storage::Error) -> Error {
    tonnage_plan::Error::new(tonnage_plan::Reason::Digest)
        .found(error)
        .into()
}
