//! A rank's part in a load of several: what it reads, and where what it gets belongs.
//!
//! What is common to windows of shared memory and to messages. Memory besides the tensors is, in each process, the
//! staging budget: half of it for messages, if there are any, half for blocks that are read and copied from. Only
//! tensors of a sub-byte dtype that are cast, and cannot be block by block, are held once more as they are stored.

use std::fmt::Debug;

use tonnage_engine::{self as engine, HostBuffer, Options, Strategy};
use tonnage_format::Dtype;
use tonnage_plan::exchange::{BATCH, Exchange, Means, Share};
use tonnage_plan::io::{IoPlan, IoProfile, Read, copies};
use tonnage_plan::{Local, Plan};
use tonnage_storage::Source;

use super::PlannedLoad;
use super::load::{LocalMemory, PlanLoad, Ran, len_as, whole_elements};
use super::scatter::{self, File, Target};
use crate::cast::cast;
use crate::checkpoint::check_buffer;
use crate::error::{Error, Result};

/// Bytes of one half of a window, unless asked otherwise: both and the header fit in the 64 MiB that containers
/// give to shared memory.
pub const WINDOW: u64 = 24 << 20;

/// Tensors as they are stored, where they are cast when all of their bytes are there.
#[derive(Debug, Default)]
pub struct Raw(Vec<Option<HostBuffer>>);

/// A rank's part in an [`Exchange`].
#[derive(Debug)]
pub struct Together<'a> {
    pub(super) load: &'a PlannedLoad<'a>,
    pub(super) exchange: &'a Exchange,
    pub(super) share: Share<'a>,
    pub(super) member: usize,
    locals: Vec<Local>,
}

/// Where bytes go: the rank's tensors, and up to two more pieces of memory.
pub(super) struct Places<'p, 'm> {
    pub parts: &'p mut [LocalMemory<'m>],
    pub raw: &'p mut Raw,
    pub extra: [&'p mut [u8]; 2],
}

/// How messages are bounded by a staging budget.
pub fn messages(staging: u64, own: bool) -> Means {
    let buffers = staging / 2;
    Means::Messages { buffers, own }
}

impl PlannedLoad<'_> {
    /// What is known of where a rank's bytes lie.
    ///
    /// # Errors
    /// As [`PlannedLoad::locals`].
    pub fn storage(&self, rank: u32) -> Result<IoProfile> {
        Ok(self.profile(&copies(&self.locals(rank)?)?, Strategy::Auto))
    }
}

/// Who reads what for whom, for these ranks of a plan.
///
/// # Errors
/// As [`Exchange::build`].
pub fn exchange(plan: &Plan, members: &[u32], means: Means) -> Result<Exchange> {
    Ok(Exchange::build(plan, members, means)?)
}

impl<'a> Together<'a> {
    /// The part of one member.
    ///
    /// # Errors
    /// `PLAN_MESH` for a member that is none.
    pub fn new(load: &'a PlannedLoad<'a>, exchange: &'a Exchange, member: usize) -> Result<Self> {
        let rank = exchange.members().get(member).copied().unwrap_or(u32::MAX);
        let locals = load.locals(rank)?;
        Ok(Together {
            share: exchange.share(load.plan(), member)?,
            load,
            exchange,
            member,
            locals,
        })
    }

    /// The rank's tensors.
    pub fn locals(&self) -> &[Local] {
        &self.locals
    }

    /// Looks at memory for all of the rank's tensors, in their order, and readies it.
    ///
    /// # Errors
    /// `BUFFER_SIZE` if a memory has another length than its tensor takes; `CAST`; `PLAN_MESH` for others than all
    /// of the rank's tensors.
    pub fn begin(&self, parts: &mut [LocalMemory<'_>]) -> Result<Raw> {
        let all = parts.iter().enumerate().all(|(at, part)| part.local == at);
        if !all || parts.len() != self.locals.len() {
            let text =
                "ranks load together all of their tensors, each once and in the plan's order";
            return Err(Error::usage("PLAN_MESH", text));
        }
        let mut raw = Vec::with_capacity(parts.len());
        for (local, part) in self.locals.iter().zip(parts) {
            check_buffer(&local.name, len_as(local, part.dtype)?, part.memory.len())?;
            if !part.zeroed && !local.fills.is_empty() {
                part.memory.fill(0);
            }
            let odd = part.dtype != local.dtype
                && !copies([local])?
                    .iter()
                    .all(|copy| whole_elements(copy, local.dtype));
            raw.push(match odd {
                true => Some(HostBuffer::new(local.bytes())?),
                false => None,
            });
        }
        Ok(Raw(raw))
    }

    /// Casts what could not be cast on the way.
    ///
    /// # Errors
    /// `CAST`.
    pub fn end(&self, parts: &mut [LocalMemory<'_>], raw: Raw) -> Result<()> {
        for ((local, part), raw) in self.locals.iter().zip(parts).zip(raw.0) {
            if let Some(raw) = raw {
                let done = cast(local.dtype, raw.as_slice(), part.dtype, part.memory);
                done.map_err(|error| Error::from(error.tensor(&local.name)))?;
            }
        }
        Ok(())
    }

    /// Reads what nobody else needs, straight into the rank's tensors.
    ///
    /// # Errors
    /// As [`PlannedLoad::load`].
    pub fn direct(
        &self,
        parts: &mut [LocalMemory<'_>],
        raw: &mut Raw,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let wanted = copies(&self.locals)?;
        let chosen = load.profile;
        let mut profile = chosen.unwrap_or_else(|| self.load.profile(&wanted, options.strategy));
        let (threads, block) =
            self.scratch(load, options, scatter::threads(options.threads, &profile))?;
        profile.block = profile.block.min(block);
        let io = self.share.direct(&profile);
        let options = Options {
            threads: Some(threads),
            block: Some(block as usize),
            ..*options
        };
        let files = self.load.files(options.strategy)?;
        let extra = [&mut [][..], &mut []];
        self.run(&files, io, Places { parts, raw, extra }, &options)
    }

    /// Threads that read, and the largest block that each may hold.
    pub(super) fn scratch(
        &self,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
        threads: usize,
    ) -> Result<(usize, u64)> {
        /// A page at both ends, and what the engine's own edges take.
        const EDGES: u64 = 16 << 10;
        let staging = load.staging.unwrap_or(PlanLoad::STAGING);
        if staging < PlanLoad::MIN_STAGING {
            let text = format!(
                "a staging budget of {staging} bytes; {} are needed",
                PlanLoad::MIN_STAGING
            );
            return Err(Error::usage("STAGING", text));
        }
        let (budget, most) = match self.exchange.means() {
            Means::Window { .. } => (staging, 0),
            Means::Messages { buffers, .. } => (
                staging / 2,
                BATCH
                    .min(buffers / (4 * self.exchange.members().len() as u64))
                    .max(4096),
            ),
        };
        let threads = threads.min((budget / (most + EDGES)) as usize).max(1);
        let block = (budget / threads as u64).saturating_sub(EDGES) / 4096 * 4096;
        let asked = options.block.unwrap_or(Options::BLOCK).min(Options::BLOCK) as u64;
        Ok((threads, block.min(asked.max(4096)).max(4096)))
    }

    /// Carries out reads whose tensors are the rank's, and after them what is extra.
    pub(super) fn run(
        &self,
        files: &[File<'_>],
        mut io: IoPlan,
        places: Places<'_, '_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let mut used: Vec<usize> = io.copies.iter().map(|copy| copy.local).collect();
        used.extend(io.reads.iter().filter_map(|read| match read {
            Read::Range { local, .. } => Some(*local),
            Read::Runs(copy) => Some(copy.local),
            Read::Block { .. } => None,
        }));
        used.sort_unstable();
        used.dedup();
        let place = |local: &mut usize| *local = used.binary_search(local).unwrap_or(usize::MAX);
        io.copies.iter_mut().for_each(|copy| place(&mut copy.local));
        for read in &mut io.reads {
            match read {
                Read::Range { local, .. } => place(local),
                Read::Runs(copy) => place(&mut copy.local),
                Read::Block { .. } => {}
            }
        }
        let own = places
            .parts
            .iter_mut()
            .zip(&self.locals)
            .zip(&mut places.raw.0);
        let own = own.map(|((part, local), raw)| match raw {
            Some(raw) => Target {
                memory: raw.as_mut_slice(),
                cast: None,
            },
            None => Target {
                memory: &mut *part.memory,
                cast: (part.dtype != local.dtype).then_some((local.dtype, part.dtype)),
            },
        });
        let extra = places
            .extra
            .into_iter()
            .map(|memory| Target { memory, cast: None });
        let all = own.enumerate().chain((self.locals.len()..).zip(extra));
        let targets: Vec<Target<'_>> = all
            .filter(|(at, _)| used.binary_search(at).is_ok())
            .map(|(_, target)| target)
            .collect();
        let report = scatter::run(files, &io, targets, false, options);
        Ok(Ran {
            report: report.map_err(|error| self.load.named(error))?,
            needed: io.needed,
        })
    }

    /// Takes what a rank wants out of bytes that are here.
    pub(super) fn take(
        &self,
        io: IoPlan,
        bytes: &[u8],
        parts: &mut [LocalMemory<'_>],
        raw: &mut Raw,
        options: &Options<'_>,
    ) -> Result<u64> {
        let here = Here(bytes);
        let file = File {
            source: &here,
            bytes: Some(bytes),
        };
        let extra = [&mut [][..], &mut []];
        let options = Options {
            progress: None,
            check: None,
            ..*options
        };
        let taken = io.needed;
        self.run(&[file], io, Places { parts, raw, extra }, &options)?;
        Ok(taken)
    }

    /// What the tensors become, where a load casts them.
    pub fn wanted(&self, dtype: Option<Dtype>) -> Vec<Dtype> {
        self.locals
            .iter()
            .map(|local| super::load::wanted(local, dtype))
            .collect()
    }
}

/// Bytes in memory that are not ours to keep.
#[derive(Debug)]
struct Here<'a>(&'a [u8]);

impl Source for Here<'_> {
    fn label(&self) -> &str {
        "<exchanged>"
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), tonnage_storage::Error> {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.0.get(offset..));
        let from = from.and_then(|from| from.get(..dst.len()));
        let end =
            || tonnage_storage::Error::new("read", self.label(), std::io::ErrorKind::UnexpectedEof);
        dst.copy_from_slice(from.ok_or_else(end)?);
        Ok(())
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self.0)
    }
}

/// How far a load of several rounds is, for whoever wants to know.
pub(super) fn tell(options: &Options<'_>, done: u64, total: u64) {
    if let Some(told) = options.progress {
        let done = done.min(total);
        told(engine::Progress { done, total });
    }
}
