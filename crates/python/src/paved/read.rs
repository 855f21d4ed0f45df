//! Reads in bulk: whole tensors, slices, casts and spread sub-byte elements, into Python's own memory.

use std::time::Instant;

use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use tonnage::engine::{Options, Strategy};
use tonnage::{Checkpoint, Dtype, Slice};

use super::failure::usage;
use super::run::{Request, run};
use crate::buffer::Target;
use crate::dropin::packing::unpack;

/// Position of the tensor; a writable buffer; ranges, if a slice is wanted; whether sub-byte elements
/// are spread out one a byte; the dtype that floats are cast to.
pub type Job<'py> = (
    usize,
    Bound<'py, PyAny>,
    Option<Vec<(u64, u64, u64)>>,
    bool,
    Option<String>,
);

/// Seconds, bytes read, threads, strategy, bytes of staging memory, why that strategy.
pub type Done = (f64, u64, usize, &'static str, u64, &'static str);

/// A job whose buffer is held.
struct Held {
    index: usize,
    dtype: Dtype,
    wanted: Dtype,
    ranges: Option<Vec<Slice>>,
    spread: bool,
    /// Bytes to be read, where that is known without looking at ranges.
    len: u64,
    target: Target,
}

impl Held {
    /// Whether it can go with all the others in one run of the engine.
    fn is_plain(&self) -> bool {
        self.ranges.is_none() && !self.spread
    }
}

fn hold(checkpoint: &Checkpoint, job: Job<'_>) -> PyResult<Held> {
    let (index, buffer, ranges, spread, cast) = job;
    let unknown = || usage("UNKNOWN_TENSOR", &format!("no tensor has position {index}"));
    let tensor = checkpoint.at(index).ok_or_else(unknown)?;
    let dtype = tensor.dtype().map_err(|e| super::failure::raise(&e))?;
    let wanted = match cast {
        Some(name) => Dtype::from_name(&name).ok_or_else(|| usage("DTYPE", &name))?,
        None => dtype,
    };
    let ranges: Option<Vec<Slice>> = ranges.map(|ranges| {
        ranges
            .into_iter()
            .map(|(start, stop, step)| Slice { start, stop, step })
            .collect()
    });
    let target = Target::any(&buffer)?;
    Ok(Held {
        index,
        dtype,
        wanted,
        ranges,
        spread,
        len: tensor.byte_len(),
        target,
    })
}

/// Refuses buffers that share memory: threads write to them at the same time.
fn check_apart(jobs: &[Held]) -> PyResult<()> {
    let mut spans: Vec<(usize, usize)> = jobs.iter().map(|job| job.target.span()).collect();
    spans.sort_unstable();
    if spans.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(PyBufferError::new_err(
            "two buffers to read into share memory",
        ));
    }
    Ok(())
}

/// Runs the jobs: plain reads and casts all at once, the rest one by one.
pub fn read(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    jobs: Vec<Job<'_>>,
    request: Request<'_>,
    strategy: Strategy,
    verify: bool,
) -> PyResult<Done> {
    let mut held = Vec::with_capacity(jobs.len());
    for job in jobs {
        held.push(hold(checkpoint, job)?);
    }
    check_apart(&held)?;
    let total = held
        .iter()
        .map(|job| if job.ranges.is_some() { 0 } else { job.len })
        .sum();
    let request = Request { total, ..request };
    run(py, request, |options| {
        let options = &Options {
            strategy,
            ..*options
        };
        if !verify {
            return read_all(checkpoint, &mut held, options);
        }
        let tensors = held.iter().filter_map(|job| checkpoint.at(job.index));
        let files: Vec<usize> = tensors.map(|tensor| tensor.file()).collect();
        checkpoint.verified(files, options, |options| {
            read_all(checkpoint, &mut held, options)
        })
    })
}

fn read_all(
    checkpoint: &Checkpoint,
    jobs: &mut [Held],
    options: &Options<'_>,
) -> tonnage::Result<Done> {
    let plain = jobs.iter_mut().filter(|job| job.is_plain());
    let reads = plain
        .map(|job| (job.index, job.wanted, job.target.as_mut_slice()))
        .collect();
    let report = checkpoint.read_as(reads, options)?;
    let mut done: Done = (
        report.seconds,
        report.bytes,
        report.threads,
        report.strategy,
        report.peak_staging,
        report.reason,
    );
    for job in jobs.iter_mut().filter(|job| !job.is_plain()) {
        read_part(checkpoint, job, options, &mut done)?;
    }
    jobs.iter_mut()
        .for_each(|job| to_native(job.wanted, job.target.as_mut_slice()));
    Ok(done)
}

/// Reads a slice, or a tensor whose elements are to be spread out.
fn read_part(
    checkpoint: &Checkpoint,
    job: &mut Held,
    options: &Options<'_>,
    done: &mut Done,
) -> tonnage::Result<()> {
    let Some(tensor) = checkpoint.at(job.index) else {
        return Ok(());
    };
    let slice = tensor.slice(job.ranges.as_deref().unwrap_or_default())?;
    let began = Instant::now();
    let target = job.target.as_mut_slice();
    if job.spread {
        // The file justified the length: a slice is no longer than its tensor.
        let mut packed = vec![0; slice.byte_len() as usize];
        slice.read_into(&mut packed, options)?;
        unpack(&packed, job.dtype.bitsize() as u32, target);
        done.4 = done.4.max(packed.len() as u64);
    } else {
        slice.read_into(target, options)?;
    }
    done.0 += began.elapsed().as_secs_f64();
    done.1 += slice.byte_len();
    done.2 = done.2.max(1);
    Ok(())
}

/// The bytes of a big-endian host's elements are the file's, reversed.
pub fn to_native(dtype: Dtype, bytes: &mut [u8]) {
    if cfg!(target_endian = "big") && dtype.swap_unit() > 1 {
        bytes
            .chunks_exact_mut(dtype.swap_unit())
            .for_each(<[u8]>::reverse);
    }
}
