//! Loading: many tensors into one piece of host memory, cast on the way if asked.

use std::sync::atomic::{AtomicU64, Ordering};

use tonnage_engine::{
    self as engine, Cancel, HostBuffer, OnProgress, Options, Progress, Read, Strategy,
};
use tonnage_format::Dtype;
use tonnage_quant::map::QuantMap;
use tonnage_storage::Source;

use crate::cast::{cast, cast_len, castable};
use crate::checkpoint::{Checkpoint, check_buffer};
use crate::error::{Error, Result};
use crate::names::{is_pattern, matches, near};
use crate::tensor::TensorRef;

/// What to load, and how. The default loads everything as it is.
#[derive(Clone, Debug, Default)]
pub struct Load<'a> {
    /// Names and patterns (`*`, `?`, `[…]`); empty for everything. Order and repetition do not matter.
    pub select: Vec<String>,
    /// Casts floating-point tensors to this dtype; others stay as they are.
    pub dtype: Option<Dtype>,
    /// Compares what is read with the files' checksums (spec 13.8): every chunk that holds a byte of a tensor
    /// that is loaded.
    pub verify: bool,
    /// As [`Options::threads`].
    pub threads: Option<usize>,
    /// As [`Options::progress`].
    pub progress: Option<OnProgressOf<'a>>,
    /// As [`Options::cancel`].
    pub cancel: Option<&'a Cancel>,
    /// How the files are read. A load has memory of its own, so [`Strategy::Lazy`] is [`Strategy::Auto`] here;
    /// [`Checkpoint::view`] gives views.
    pub strategy: Strategy,
    /// Quantised tensors of this map come as numbers, each under its logical name ([`Checkpoint::dequantized`]).
    pub dequantize: Option<&'a QuantMap>,
}

/// [`OnProgress`] with a `Debug` of its own.
#[derive(Clone, Copy)]
pub struct OnProgressOf<'a>(pub OnProgress<'a>);

impl std::fmt::Debug for OnProgressOf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnProgress")
    }
}

impl Load<'_> {
    fn options(&self) -> Options<'_> {
        Options {
            threads: self.threads,
            block: None,
            progress: self.progress.map(|p| p.0),
            cancel: self.cancel,
            strategy: self.strategy,
            check: None,
        }
    }
}

/// Where loaded tensors start: on multiples of this, as vector instructions like it.
pub const ALIGN: u64 = 64;

/// What a load did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Wall-clock time.
    pub seconds: f64,
    /// Bytes read from the files.
    pub bytes_read: u64,
    /// Bytes of the files that the tensors are made of, where a plan says what is read; else 0.
    pub bytes_needed: u64,
    /// Threads that worked.
    pub threads: usize,
    /// The way taken: "direct", "buffered", "direct and buffered", "mmap", "memory", "lazy", or "several".
    pub strategy: &'static str,
    /// Why this way was taken.
    pub reason: &'static str,
    /// Bytes of host memory that were used besides the tensors' own.
    pub peak_staging: u64,
    /// Tensors loaded.
    pub loaded: usize,
    /// Names that were asked for, or expected, and are not there.
    pub missing: Vec<String>,
    /// Names that are there and were not expected.
    pub unexpected: Vec<String>,
    /// Names whose dtype or shape is not the expected one, and how.
    pub mismatched: Vec<(String, String)>,
}

impl Report {
    /// Gigabytes (10^9) read a second; 0 for a load too short to time.
    pub fn gb_per_s(&self) -> f64 {
        if self.seconds > 0.0 {
            self.bytes_read as f64 / self.seconds / 1e9
        } else {
            0.0
        }
    }
}

/// A loaded tensor: its bytes are `begin..end` of the load's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedTensor {
    /// Its name.
    pub name: String,
    /// Its dtype after casting.
    pub dtype: Dtype,
    /// Its extents in elements.
    pub shape: Vec<u64>,
    /// First byte.
    pub begin: usize,
    /// One past the last byte.
    pub end: usize,
}

/// What was loaded.
#[derive(Debug)]
pub struct Loaded {
    buffer: HostBuffer,
    tensors: Vec<LoadedTensor>,
    report: Report,
}

impl Loaded {
    /// Tensors in one piece of memory.
    pub(crate) fn new(buffer: HostBuffer, tensors: Vec<LoadedTensor>, report: Report) -> Self {
        Loaded {
            buffer,
            tensors,
            report,
        }
    }

    /// The tensors in the order of their bytes in the files, each with its bytes.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&LoadedTensor, &[u8])> + '_ {
        self.tensors
            .iter()
            .map(|tensor| (tensor, &self.buffer.as_slice()[tensor.begin..tensor.end]))
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<(&LoadedTensor, &[u8])> {
        self.iter().find(|(tensor, _)| tensor.name == name)
    }

    /// What the load did.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The memory, the tensors in it, and the report.
    pub fn into_parts(self) -> (HostBuffer, Vec<LoadedTensor>, Report) {
        (self.buffer, self.tensors, self.report)
    }
}

/// Bytes of a tensor's file that are cast by one thread at a time.
struct CastBlock<'a> {
    source: &'a dyn Source,
    from: Dtype,
    to: Dtype,
    offset: u64,
    len: usize,
    strategy: Strategy,
    dst: &'a mut [u8],
}

impl Checkpoint {
    /// Positions of the tensors that names and patterns select, ascending, and those that select nothing.
    pub fn select(&self, wanted: &[String]) -> (Vec<usize>, Vec<String>) {
        if wanted.is_empty() {
            return ((0..self.len()).collect(), Vec::new());
        }
        let mut chosen = vec![false; self.len()];
        let mut missing = Vec::new();
        for text in wanted {
            let mut found = false;
            if let Some(tensor) = self.get(text) {
                chosen[tensor.index()] = true;
                found = true;
            } else if is_pattern(text) {
                for tensor in self.iter().filter(|tensor| matches(text, tensor.name())) {
                    chosen[tensor.index()] = true;
                    found = true;
                }
            }
            if !found {
                missing.push(text.clone());
            }
        }
        (
            chosen
                .iter()
                .enumerate()
                .filter(|(_, chosen)| **chosen)
                .map(|(at, _)| at)
                .collect(),
            missing,
        )
    }

    /// Loads tensors into host memory.
    ///
    /// # Errors
    /// `SELECT` if nothing is selected although something was asked for; `UNSUPPORTED_DTYPE`; `CAST` for a
    /// dtype to which nothing can be cast; what the system said; `CANCELLED`; with [`Load::verify`] `NO_CHECKSUMS`,
    /// `CHECKSUM_FORM`, `CHECKSUM_STALE`, and `CHECKSUM_MISMATCH`.
    pub fn load(&self, load: &Load<'_>) -> Result<Loaded> {
        if let Some(map) = load.dequantize {
            let numbers = self.dequantized(map, load.dtype)?;
            if load.verify {
                self.verify_tensors(&self.made_of(&numbers, map, &load.select), &load.options())?;
            }
            let loaded = numbers.load(&Load {
                dequantize: None,
                verify: false,
                ..load.clone()
            })?;
            self.set_report(loaded.report.clone());
            return Ok(loaded);
        }
        let (positions, missing) = self.select(&load.select);
        if let ([], Some(first)) = (&positions[..], missing.first()) {
            let text = format!("nothing is selected: no tensor matches {first:?}");
            return Err(Error::usage("SELECT", text).suggest(near(first, self.names())));
        }
        let (tensors, len) = self.place(&positions, load.dtype)?;
        let mut buffer = HostBuffer::new(len)?;
        let memory = buffer.as_mut_slice();
        let options = load.options();
        let run = if load.verify {
            let files = positions.iter().filter_map(|&position| self.at(position));
            let files = files.map(|tensor| tensor.file());
            self.verified(files, &options, |options| {
                self.fill(&positions, &tensors, memory, options)
            })?
        } else {
            self.fill(&positions, &tensors, memory, &options)?
        };
        let report = Report {
            seconds: run.seconds,
            bytes_read: run.bytes,
            threads: run.threads,
            strategy: run.strategy,
            reason: run.reason,
            peak_staging: run.peak_staging,
            loaded: tensors.len(),
            missing,
            ..Report::default()
        };
        self.set_report(report.clone());
        Ok(Loaded {
            buffer,
            tensors,
            report,
        })
    }

    /// Reads many tensors at once, each by position into a buffer of the caller's, and casts those whose
    /// dtype is not the wanted one. Needs no memory besides the buffers but a staging block a thread.
    ///
    /// # Errors
    /// As [`Checkpoint::load`]; `BUFFER_SIZE` if a buffer has another length than its tensor takes.
    pub fn read_as(
        &self,
        jobs: Vec<(usize, Dtype, &mut [u8])>,
        options: &Options<'_>,
    ) -> Result<engine::Report> {
        let (mut reads, mut casts) = (Vec::new(), Vec::new());
        for (position, to, dst) in jobs {
            let unknown = || Error::from(tonnage_format::Reason::UnknownTensor);
            let tensor = self.at(position).ok_or_else(unknown)?;
            let from = tensor.dtype()?;
            if from == to {
                check_buffer(tensor.name(), tensor.byte_len(), dst.len())?;
                reads.push(Read {
                    source: tensor.source()?,
                    offset: tensor.offset(),
                    dst,
                });
                continue;
            }
            if !castable(from, to) {
                let refused =
                    tonnage_format::Error::new(tonnage_format::Reason::Cast).tensor(tensor.name());
                return Err(refused.found(format_args!("{from} to {to}")).into());
            }
            check_buffer(
                tensor.name(),
                cast_len(from, tensor.byte_len(), to)?,
                dst.len(),
            )?;
            casts.extend(cast_blocks(&tensor, from, to, dst, options.strategy)?);
        }
        run(reads, casts, options).map_err(|error| self.name_tensor(error))
    }

    fn place(&self, positions: &[usize], dtype: Option<Dtype>) -> Result<(Vec<LoadedTensor>, u64)> {
        let mut tensors = Vec::with_capacity(positions.len());
        let mut end = 0_u64;
        for tensor in positions.iter().filter_map(|&position| self.at(position)) {
            let from = tensor.dtype()?;
            let to = dtype.filter(|&to| castable(from, to)).unwrap_or(from);
            let len = if to == from {
                tensor.byte_len()
            } else {
                cast_len(from, tensor.byte_len(), to)?
            };
            let too_large = || Error::from(tonnage_format::Reason::SizeOverflow);
            let begin = match to == from {
                true => agreeing(end, len, tensor.offset()),
                false => end.checked_next_multiple_of(ALIGN),
            };
            let begin = begin.ok_or_else(too_large)?;
            end = begin
                .checked_add(len)
                .filter(|&end| isize::try_from(end).is_ok())
                .ok_or_else(too_large)?;
            tensors.push(LoadedTensor {
                name: tensor.name().to_owned(),
                dtype: to,
                shape: tensor.shape().to_vec(),
                begin: begin as usize,
                end: end as usize,
            });
        }
        Ok((tensors, end))
    }

    fn fill(
        &self,
        positions: &[usize],
        places: &[LoadedTensor],
        memory: &mut [u8],
        options: &Options<'_>,
    ) -> Result<engine::Report> {
        let (mut reads, mut casts) = (Vec::new(), Vec::new());
        let (mut rest, mut at) = (memory, 0);
        for (tensor, place) in positions
            .iter()
            .filter_map(|&position| self.at(position))
            .zip(places)
        {
            let (_, after) = std::mem::take(&mut rest).split_at_mut(place.begin - at);
            let (part, after) = after.split_at_mut(place.end - place.begin);
            (rest, at) = (after, place.end);
            let from = tensor.dtype()?;
            if from == place.dtype {
                reads.push(Read {
                    source: tensor.source()?,
                    offset: tensor.offset(),
                    dst: part,
                });
            } else {
                casts.extend(cast_blocks(
                    &tensor,
                    from,
                    place.dtype,
                    part,
                    options.strategy,
                )?);
            }
        }
        run(reads, casts, options).map_err(|error| self.name_tensor(error))
    }
}

/// The next place for a tensor from `end` on. Where that keeps [`ALIGN`], a large tensor lies in memory as it lies
/// in its file, modulo a page: a disk can then write to it without a copy.
pub(crate) fn agreeing(end: u64, len: u64, offset: u64) -> Option<u64> {
    const LARGE: u64 = 1 << 20;
    const PAGE: u64 = 4096;
    let next = end.checked_next_multiple_of(ALIGN)?;
    if len < LARGE || !offset.is_multiple_of(ALIGN) {
        return Some(next);
    }
    next.checked_add((offset % PAGE).wrapping_sub(next % PAGE) % PAGE)
}

fn cast_blocks<'a>(
    tensor: &TensorRef<'a>,
    from: Dtype,
    to: Dtype,
    dst: &'a mut [u8],
    strategy: Strategy,
) -> Result<Vec<CastBlock<'a>>> {
    /// Elements of a block: a multiple of 8, so blocks of every dtype begin on a byte.
    const ELEMENTS: usize = 1 << 20;
    let (step, dst_step) = (ELEMENTS / 8 * from.bitsize(), ELEMENTS / 8 * to.bitsize());
    let source = tensor.source()?;
    // For all of the file: whether some block of it is in the page cache says little about the next.
    let strategy = match strategy {
        Strategy::Auto | Strategy::Lazy => engine::settle(source, 0, source.len()),
        Strategy::Mmap => Strategy::Buffered,
        asked => asked,
    };
    let mut left = tensor.byte_len();
    let mut offset = tensor.offset();
    let block = |dst| {
        let len = left.min(step as u64);
        let block = CastBlock {
            source,
            from,
            to,
            offset,
            len: len as usize,
            strategy,
            dst,
        };
        offset += len;
        left -= len;
        block
    };
    Ok(dst.chunks_mut(dst_step).map(block).collect())
}

/// Reads, then casts what is to be cast, with one count of progress.
fn run(
    reads: Vec<Read<'_>>,
    casts: Vec<CastBlock<'_>>,
    options: &Options<'_>,
) -> Result<engine::Report, engine::Error> {
    let read_bytes: u64 = reads.iter().map(|read| read.dst.len() as u64).sum();
    let total = read_bytes + casts.iter().map(|block| block.len as u64).sum::<u64>();
    let after = |base: u64| {
        move |p: Progress| {
            if let Some(progress) = options.progress {
                progress(Progress {
                    done: base + p.done,
                    total,
                });
            }
        }
    };
    let (first, second) = (after(0), after(read_bytes));
    let told = options.progress.is_some();
    let mut report = engine::read(
        reads,
        &Options {
            progress: told.then_some(&first as OnProgress<'_>),
            ..*options
        },
    )?;
    if casts.is_empty() {
        return Ok(report);
    }
    let options = Options {
        progress: told.then_some(&second as OnProgress<'_>),
        ..*options
    };
    let cast = run_casts(casts, &options)?;
    report.seconds += cast.seconds;
    report.bytes += cast.bytes;
    report.threads = report.threads.max(cast.threads);
    report.peak_staging = report.peak_staging.max(cast.peak_staging);
    (report.strategy, report.reason) = (cast.strategy, "tensors are cast on the way");
    Ok(report)
}

fn run_casts(
    casts: Vec<CastBlock<'_>>,
    options: &Options<'_>,
) -> Result<engine::Report, engine::Error> {
    let staging = AtomicU64::new(0);
    let mut report = engine::for_each_block(
        casts,
        options,
        "read and cast",
        |block| block.len as u64,
        || None,
        |memory, block| cast_block(memory, block, options, &staging),
    )?;
    report.peak_staging = staging.into_inner();
    Ok(report)
}

/// Reads one block into memory that a disk can write to, and casts it from there.
fn cast_block(
    memory: &mut Option<HostBuffer>,
    block: CastBlock<'_>,
    options: &Options<'_>,
    total: &AtomicU64,
) -> Result<(), engine::Error> {
    const PAGE: u64 = 4096;
    let failed = |error| engine::Error::Storage {
        error,
        offset: block.offset,
    };
    let skew = (block.offset % PAGE) as usize;
    let have = memory.as_ref().map_or(0, HostBuffer::len);
    if have < skew + block.len {
        let room = block.len as u64 + PAGE;
        *memory = Some(HostBuffer::new(room).map_err(failed)?);
        total.fetch_add(room - have as u64, Ordering::Relaxed);
    }
    let memory = memory
        .as_mut()
        .map_or(&mut [][..], HostBuffer::as_mut_slice);
    let staging = &mut memory[skew..skew + block.len];
    let read = Read {
        source: block.source,
        offset: block.offset,
        dst: staging,
    };
    let alone = Options {
        threads: Some(1),
        progress: None,
        strategy: block.strategy,
        ..*options
    };
    engine::read(vec![read], &alone)?;
    let staging = &memory[skew..skew + block.len];
    cast(block.from, staging, block.to, block.dst).map_err(|error| {
        let (label, error) = (block.source.label(), std::io::Error::other(error));
        failed(tonnage_storage::Error::new("cast", label, error))
    })
}
