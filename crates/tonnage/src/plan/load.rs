//! Loading what a rank needs into host memory.

use tonnage_engine::{self as engine, Cancel, HostBuffer, OnProgress, Options, Progress, Strategy};
use tonnage_format::Dtype;
use tonnage_plan::Local;
use tonnage_plan::io::{Copy, IoPlan, IoProfile, copies};
use tonnage_storage::StorageKind;

use super::PlannedLoad;
use super::scatter::{self, File, Target};
use crate::cast::{cast, cast_len, castable};
use crate::checkpoint::check_buffer;
use crate::error::{Error, Result};
use crate::load::{ALIGN, Loaded, LoadedTensor, OnProgressOf, Report, agreeing};

/// How a rank's tensors are loaded.
#[derive(Clone, Debug, Default)]
pub struct PlanLoad<'a> {
    /// Casts floating-point tensors to this dtype, where the plan says no other.
    pub dtype: Option<Dtype>,
    /// Bytes of staging memory at most, which parts of tensors pass through; [`PlanLoad::STAGING`] by default.
    pub staging: Option<u64>,
    /// As [`Options::threads`].
    pub threads: Option<usize>,
    /// How the files are read.
    pub strategy: Strategy,
    /// What is known of where the files lie; found out by default.
    pub profile: Option<IoProfile>,
    /// Compares what is read with the files' checksums: every chunk of which a byte is read.
    pub verify: bool,
    /// As [`Options::progress`].
    pub progress: Option<OnProgressOf<'a>>,
    /// As [`Options::cancel`].
    pub cancel: Option<&'a Cancel>,
}

impl PlanLoad<'_> {
    /// Staging memory by default.
    pub const STAGING: u64 = 256 << 20;
    /// The least: a page for each thread would be all overhead.
    pub const MIN_STAGING: u64 = 1 << 20;

    pub(super) fn options(&self) -> Options<'_> {
        Options {
            threads: self.threads,
            block: None,
            progress: self.progress.map(|told| told.0),
            cancel: self.cancel,
            strategy: self.strategy,
            check: None,
        }
    }
}

/// A local tensor and memory for it.
#[derive(Debug)]
pub struct LocalMemory<'a> {
    /// Its position among the rank's.
    pub local: usize,
    /// What it becomes.
    pub dtype: Dtype,
    /// Memory for all of it.
    pub memory: &'a mut [u8],
    /// Whether that is zeros already.
    pub zeroed: bool,
}

impl<'a> LocalMemory<'a> {
    /// Memory of a rank's tensors that lie in one piece, which is zeros.
    pub(super) fn split(buffer: &'a mut [u8], tensors: &[LoadedTensor]) -> Vec<LocalMemory<'a>> {
        let (mut rest, mut at) = (buffer, 0);
        let mut parts = Vec::with_capacity(tensors.len());
        for (local, tensor) in tensors.iter().enumerate() {
            let (_, after) = std::mem::take(&mut rest).split_at_mut(tensor.begin - at);
            let (memory, after) = after.split_at_mut(tensor.end - tensor.begin);
            (rest, at) = (after, tensor.end);
            parts.push(LocalMemory {
                local,
                dtype: tensor.dtype,
                memory,
                zeroed: true,
            });
        }
        parts
    }
}

/// What a load of some of a rank's tensors did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ran {
    /// What the engine did; its bytes are those that were read.
    pub report: engine::Report,
    /// Bytes of the files that the tensors are made of.
    pub needed: u64,
}

impl Ran {
    /// The same, as a load of so many tensors tells it.
    pub(super) fn told(&self, loaded: usize) -> Report {
        Report {
            seconds: self.report.seconds,
            bytes_read: self.report.bytes,
            bytes_needed: self.needed,
            threads: self.report.threads,
            strategy: self.report.strategy,
            reason: self.report.reason,
            peak_staging: self.report.peak_staging,
            loaded,
            ..Report::default()
        }
    }
}

/// What a local tensor becomes: what the plan says, or what is asked for where that can be.
pub(super) fn wanted(local: &Local, dtype: Option<Dtype>) -> Dtype {
    let asked = dtype.filter(|&to| castable(local.dtype, to));
    local.cast.or(asked).unwrap_or(local.dtype)
}

/// Bytes that a local tensor takes as this dtype.
pub(super) fn len_as(local: &Local, to: Dtype) -> Result<u64> {
    if to == local.dtype {
        return Ok(local.bytes());
    }
    if !castable(local.dtype, to) {
        let refused = tonnage_format::Error::new(tonnage_format::Reason::Cast).tensor(&local.name);
        return Err(refused
            .found(format_args!("{} to {to}", local.dtype))
            .into());
    }
    Ok(cast_len(local.dtype, local.bytes(), to)?)
}

impl PlannedLoad<'_> {
    /// Loads a rank's tensors into host memory. Besides them it takes staging memory only.
    ///
    /// # Errors
    /// `PLAN_MESH` for a rank that the mesh has not; what the system said; `CANCELLED`; `CAST`; with
    /// [`PlanLoad::verify`] those of [`Checkpoint::load`](crate::Checkpoint::load).
    pub fn load(&self, rank: u32, load: &PlanLoad<'_>) -> Result<Loaded> {
        let locals = self.locals(rank)?;
        let (tensors, len) = place(&locals, load.dtype)?;
        let mut buffer = HostBuffer::new(len)?;
        let parts = LocalMemory::split(buffer.as_mut_slice(), &tensors);
        let ran = self.load_into(&locals, parts, load, &load.options())?;
        let report = ran.told(tensors.len());
        if let Some((checkpoint, _)) = &self.checkpoint {
            checkpoint.set_report(report.clone());
        }
        Ok(Loaded::new(buffer, tensors, report))
    }

    /// Loads some of a rank's tensors, which [`PlannedLoad::locals`] gives, into memory of the caller's.
    /// What `load` says of threads, progress and cancelling comes from `options` instead.
    ///
    /// # Errors
    /// As [`PlannedLoad::load`]; `BUFFER_SIZE` if a memory has another length than its tensor takes.
    pub fn load_into(
        &self,
        locals: &[Local],
        parts: Vec<LocalMemory<'_>>,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let Some((checkpoint, files)) = self.checkpoint.as_ref().filter(|_| load.verify) else {
            if load.verify {
                let text = "checksums are compared for the files of a checkpoint";
                return Err(Error::usage("NO_CHECKSUMS", text));
            }
            return self.fill(locals, parts, load, options);
        };
        let read = parts.iter().filter_map(|part| locals.get(part.local));
        let read = read.flat_map(|local| &local.nests);
        let mut read: Vec<usize> = read
            .filter_map(|nest| files.get(nest.file as usize).copied())
            .collect();
        read.sort_unstable();
        read.dedup();
        checkpoint.verified(read, options, |options| {
            self.fill(locals, parts, load, options)
        })
    }

    fn fill(
        &self,
        locals: &[Local],
        parts: Vec<LocalMemory<'_>>,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let mut chosen = Vec::with_capacity(parts.len());
        let mut targets = Vec::with_capacity(parts.len());
        for part in parts {
            let unknown = || Error::usage("PLAN_MESH", "the rank has no such tensor");
            let local = locals.get(part.local).ok_or_else(unknown)?;
            check_buffer(&local.name, len_as(local, part.dtype)?, part.memory.len())?;
            if !part.zeroed && !local.fills.is_empty() {
                part.memory.fill(0);
            }
            chosen.push(local);
            targets.push(Target {
                memory: part.memory,
                cast: (part.dtype != local.dtype).then_some((local.dtype, part.dtype)),
            });
        }
        let copies = copies(chosen.iter().copied())?;
        self.check(&chosen, &copies)?;
        let (odd, copies): (Vec<Copy>, Vec<Copy>) = (copies.into_iter()).partition(|copy| {
            let cast = targets.get(copy.local).and_then(|target| target.cast);
            cast.is_some_and(|(from, _)| !whole_elements(copy, from))
        });
        if !odd.is_empty() {
            return self.fill_odd(&chosen, copies, odd, targets, load, options);
        }
        self.read(copies, targets, load, options)
    }

    /// Everything lies within its file and its tensor: a plan that was verified has nothing else.
    fn check(&self, locals: &[&Local], copies: &[Copy]) -> Result<()> {
        for copy in copies {
            let len = locals.get(copy.local).map_or(0, |local| local.bytes());
            let file = self.sources.get(copy.file).map_or(0, |source| source.len());
            if copy.strided.dst_end() > len || copy.strided.src_end() > file {
                let name = locals.get(copy.local).map_or("", |local| &local.name);
                let error = tonnage_plan::Error::new(tonnage_plan::Reason::Bounds).tensor(name);
                return Err(error
                    .found("a copy that leaves its file or its tensor")
                    .into());
            }
        }
        Ok(())
    }

    fn read(
        &self,
        copies: Vec<Copy>,
        targets: Vec<Target<'_>>,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let mut profile = (load.profile).unwrap_or_else(|| self.profile(&copies, options.strategy));
        let staging = load.staging.unwrap_or(PlanLoad::STAGING);
        if staging < PlanLoad::MIN_STAGING {
            let least = PlanLoad::MIN_STAGING;
            let text = format!("a staging budget of {staging} bytes; {least} are needed");
            return Err(Error::usage("STAGING", text));
        }
        // Besides its block, a thread's pages at its ends, and what the engine's own edges take.
        let threads = scatter::threads(options.threads, &profile);
        let block = (staging / threads as u64).saturating_sub(16 << 10) / 4096 * 4096;
        profile.block = profile.block.min(block).max(4096);
        if let Some(block) = options.block {
            profile.block = profile.block.min(block as u64).max(4096);
        }
        let shared = self.plan.mesh().size() > 1;
        let io = IoPlan::new(copies, targets.len(), &profile);
        let files = self.files(options.strategy)?;
        let options = Options {
            threads: Some(threads),
            block: Some((profile.block as usize).min(Options::BLOCK)),
            ..*options
        };
        let run = scatter::run(&files, &io, targets, shared, &options);
        let report = run.map_err(|error| self.named(error))?;
        Ok(Ran {
            report,
            needed: io.needed,
        })
    }

    pub(super) fn files(&self, strategy: Strategy) -> Result<Vec<File<'_>>> {
        let files = self.sources.iter().enumerate().map(|(at, source)| {
            let mapped = match (&self.checkpoint, strategy) {
                (Some((checkpoint, files)), Strategy::Mmap) => {
                    let file = files.get(at).copied().unwrap_or(usize::MAX);
                    Some(checkpoint.mapped(file)?)
                }
                _ => source.bytes(),
            };
            Ok(File {
                source: &**source,
                bytes: mapped,
            })
        });
        files.collect()
    }

    /// Tensors that can't be cast block by block, since elements lie across the bytes that blocks end on: read as
    /// they are, each into memory of its own, and cast from there.
    fn fill_odd(
        &self,
        locals: &[&Local],
        mut copies: Vec<Copy>,
        odd: Vec<Copy>,
        mut targets: Vec<Target<'_>>,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let mut those: Vec<usize> = odd.iter().map(|copy| copy.local).collect();
        those.sort_unstable();
        those.dedup();
        let mut all = odd;
        copies.retain(|copy| {
            let is = those.binary_search(&copy.local).is_ok();
            if is {
                all.push(copy.clone());
            }
            !is
        });
        let mut ran = Ran::default();
        let quiet = Options {
            progress: None,
            ..*options
        };
        for &at in &those {
            let (Some(local), Some(target)) = (locals.get(at), targets.get_mut(at)) else {
                continue;
            };
            let Some((from, to)) = target.cast else {
                continue;
            };
            let mut memory = HostBuffer::new(local.bytes())?;
            let mine = all.iter().filter(|copy| copy.local == at).cloned();
            let mine = mine.map(|copy| Copy { local: 0, ..copy }).collect();
            let plain = Target {
                memory: memory.as_mut_slice(),
                cast: None,
            };
            let done = self.read(mine, vec![plain], load, &quiet)?;
            let cast = cast(from, memory.as_slice(), to, target.memory);
            cast.map_err(|error| Error::from(error.tensor(&local.name)))?;
            ran.add(&done);
            ran.report.peak_staging = ran.report.peak_staging.max(local.bytes());
        }
        let read = ran.report.bytes;
        let told = |progress: Progress| {
            if let Some(told) = options.progress {
                told(Progress {
                    done: read + progress.done,
                    total: read + progress.total,
                });
            }
        };
        let options = Options {
            progress: options
                .progress
                .is_some()
                .then_some(&told as OnProgress<'_>),
            ..*options
        };
        let done = self.read(copies, targets, load, &options)?;
        ran.add(&done);
        Ok(ran)
    }

    /// What is known of where these bytes lie: the kind of storage that most of them come from, and whether the
    /// page cache has them.
    pub(super) fn profile(&self, copies: &[Copy], strategy: Strategy) -> IoProfile {
        match strategy {
            Strategy::Mmap => return IoProfile::PAGE_CACHE,
            Strategy::Direct => return IoProfile::NVME,
            Strategy::Auto | Strategy::Lazy | Strategy::Buffered => {}
        }
        // By file: first byte, last byte, bytes.
        let mut spans = vec![(u64::MAX, 0, 0_u64); self.sources.len()];
        for copy in copies {
            if let Some((begin, end, bytes)) = spans.get_mut(copy.file) {
                *begin = (*begin).min(copy.strided.src);
                *end = (*end).max(copy.strided.src_end());
                *bytes = bytes.saturating_add(copy.strided.wanted());
            }
        }
        let mut votes = [0_u64; IoProfile::ALL.len()];
        for (source, (begin, end, bytes)) in self.sources.iter().zip(spans) {
            if bytes == 0 {
                continue;
            }
            let profile = match source.kind() {
                StorageKind::Memory => IoProfile::PAGE_CACHE,
                StorageKind::Remote => IoProfile::S3,
                StorageKind::Network(_) => IoProfile::NFS,
                StorageKind::Local => {
                    let cached = source.residency(begin, end - begin).fraction();
                    match cached.is_some_and(|part| part >= CACHED) {
                        true => IoProfile::PAGE_CACHE,
                        false => IoProfile::NVME,
                    }
                }
            };
            let at = IoProfile::ALL
                .iter()
                .position(|one| one.name == profile.name);
            if let Some(votes) = at.and_then(|at| votes.get_mut(at)) {
                *votes = votes.saturating_add(bytes);
            }
        }
        let most = IoProfile::ALL
            .into_iter()
            .zip(votes)
            .max_by_key(|(_, votes)| *votes);
        most.map_or(IoProfile::NVME, |(profile, _)| profile)
    }
}

/// From this part on a file counts as cached.
const CACHED: f64 = 0.98;

impl Ran {
    /// Counts another run in.
    pub fn add(&mut self, other: &Ran) {
        let (mine, more) = (&mut self.report, &other.report);
        mine.seconds += more.seconds;
        if more.bytes >= mine.bytes {
            (mine.strategy, mine.reason) = (more.strategy, more.reason);
        }
        mine.bytes += more.bytes;
        mine.threads = mine.threads.max(more.threads);
        mine.peak_staging = mine.peak_staging.max(more.peak_staging);
        self.needed += other.needed;
    }
}

/// Whether a copy consists of whole elements wherever a block of whole pages is cut.
pub(super) fn whole_elements(copy: &Copy, dtype: Dtype) -> bool {
    let unit = (dtype.bitsize() as u64 / 8).max(1);
    let even = dtype.bitsize().is_power_of_two();
    let whole = |bytes: u64| bytes.is_multiple_of(unit);
    let Copy { strided, .. } = copy;
    even && [strided.src, strided.dst, strided.run]
        .into_iter()
        .all(whole)
        && strided
            .axes
            .iter()
            .all(|axis| whole(axis.src) && whole(axis.dst))
}

/// Where a rank's tensors lie in one piece of memory, and how many bytes that has.
pub(super) fn place(locals: &[Local], dtype: Option<Dtype>) -> Result<(Vec<LoadedTensor>, u64)> {
    let mut tensors = Vec::with_capacity(locals.len());
    let mut end = 0_u64;
    for local in locals {
        let to = wanted(local, dtype);
        let len = len_as(local, to)?;
        let too_large = || Error::from(tonnage_format::Reason::SizeOverflow);
        let begin = match &local.nests[..] {
            // A range: as it lies in its file, so that a disk can write to it without a copy.
            [nest] if nest.loops.is_empty() && to == local.dtype => {
                agreeing(end, len, nest.src / 8)
            }
            _ => end.checked_next_multiple_of(ALIGN),
        };
        let begin = begin.ok_or_else(too_large)?;
        end = begin
            .checked_add(len)
            .filter(|&end| isize::try_from(end).is_ok())
            .ok_or_else(too_large)?;
        tensors.push(LoadedTensor {
            name: local.name.to_string(),
            dtype: to,
            shape: local.shape.to_vec(),
            begin: begin as usize,
            end: end as usize,
        });
    }
    Ok((tensors, end))
}
