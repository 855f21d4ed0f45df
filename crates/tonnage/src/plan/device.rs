//! A rank's tensors brought to devices, through the ring of staging memory that other loads go through.
//!
//! A strided copy is one piece with rows, whatever their number, where the device's engine or the host's gathering
//! into the slot can do it; see [`gathered`](super::gathered) for the others.

use std::sync::Arc;

use tonnage_device::Memory;
use tonnage_engine::Piece;
use tonnage_format::Dtype;
use tonnage_plan::Local;
use tonnage_plan::io::copies;
use tonnage_plan::io::strided::{Strided, Strides};
use tonnage_storage::Source;

use super::PlannedLoad;
use super::gathered::{Gathered, Zeros};
use super::load::{len_as, wanted};
use crate::checksums::Verifying;
use crate::device_load::{DeviceLoad, DeviceLoaded, DeviceMap, bring};
use crate::device_plan::Planned;
use crate::error::{Error, Result};
use crate::names::{is_pattern, matches};
use crate::stream::{DeviceStream, Stream, order};

/// Pieces that one copy becomes at most.
const PIECES: u64 = 4096;
/// Rows shorter than this are gathered by the host.
const SHORT: u64 = 64;
/// Bytes of a tensor that the host puts together at a time.
const WINDOW: u64 = 8 << 20;

/// What a tensor on a device is made of.
pub(crate) type Copies = Vec<(Arc<dyn Source>, Strided)>;

impl PlannedLoad<'_> {
    /// Brings a rank's tensors to devices. [`DeviceLoad::select`] says which, by the rank's names; slices are the
    /// plan's business.
    ///
    /// # Errors
    /// As [`PlannedLoad::load`] and [`Checkpoint::load_to`](crate::Checkpoint::load_to).
    pub fn load_to(
        &self,
        rank: u32,
        map: impl Into<DeviceMap>,
        load: &DeviceLoad,
    ) -> Result<DeviceLoaded> {
        let (map, begin) = (map.into(), std::time::Instant::now());
        let planned = self.planned(rank, &map, load)?;
        let verifying = self.verifying(rank, load)?;
        let run = bring(&map, load, &planned, verifying.as_ref());
        let named = |error| match (&self.checkpoint, &verifying) {
            (Some((checkpoint, _)), Some(verifying)) => verifying.named(checkpoint, error),
            _ => error,
        };
        let (tensors, mut report) = run.map_err(named)?;
        report.seconds = begin.elapsed().as_secs_f64();
        Ok(DeviceLoaded::new(tensors, report))
    }

    /// Brings a rank's tensors to devices one after the other, by default in the order of the request, never more
    /// of them ahead than a budget.
    ///
    /// # Errors
    /// As [`PlannedLoad::load_to`]; later ones come from the iterator.
    pub fn stream_to(
        &self,
        rank: u32,
        map: impl Into<DeviceMap>,
        stream: &Stream,
    ) -> Result<DeviceStream> {
        let map = map.into();
        let planned = self.planned(rank, &map, &stream.load)?;
        let order = order(&planned, &stream.order)?;
        let verifying = self.verifying(rank, &stream.load)?;
        DeviceStream::start(map, stream, planned, order, verifying, Vec::new())
    }

    fn verifying(&self, rank: u32, load: &DeviceLoad) -> Result<Option<Arc<Verifying>>> {
        if !load.verify {
            return Ok(None);
        }
        let Some((checkpoint, files)) = &self.checkpoint else {
            let text = "checksums are compared for the files of a checkpoint";
            return Err(Error::usage("NO_CHECKSUMS", text));
        };
        let locals = self.locals(rank)?;
        let read = locals.iter().flat_map(|local| &local.nests);
        let mut read: Vec<usize> = read
            .filter_map(|nest| files.get(nest.file as usize).copied())
            .collect();
        read.sort_unstable();
        read.dedup();
        Ok(Some(Arc::new(Verifying::new(checkpoint, read)?)))
    }

    fn planned(&self, rank: u32, map: &DeviceMap, load: &DeviceLoad) -> Result<Vec<Planned>> {
        let locals = self.locals(rank)?;
        if !load.slices.is_empty() {
            let text = "a plan says what is taken of each tensor; slices are not for it";
            return Err(Error::usage("SELECT", text));
        }
        let chosen = |name: &str| {
            let is = |text: &String| text == name || is_pattern(text) && matches(text, name);
            load.select.is_empty() || load.select.iter().any(is)
        };
        let locals = locals.iter().filter(|local| chosen(&local.name));
        let planned = locals.map(|local| {
            let name = &*local.name;
            let no_device =
                || Error::usage("SELECT", format!("no device is given for tensor {name:?}"));
            let device = map.position(name).ok_or_else(no_device)?;
            self.planned_one(local, wanted(local, load.dtype), device)
        });
        planned.collect()
    }

    /// The pieces that bring a local tensor, as another dtype perhaps, to a place of a device's memory, for those who
    /// run a pipeline of their own.
    ///
    /// # Errors
    /// `CAST`; `PLAN_GRANULARITY`.
    pub fn pieces(
        &self,
        local: &Local,
        to: Dtype,
        place: (&Memory, u64),
        tag: u64,
        into: &mut Vec<Piece>,
    ) -> Result<()> {
        let planned = self.planned_one(local, to, 0)?;
        planned.pieces(place.0, place.1, 0, tag, into);
        Ok(())
    }

    fn planned_one(&self, local: &Local, to: Dtype, device: usize) -> Result<Planned> {
        let lost = || Error::usage("PLAN_FILES", "no such file");
        let mut made: Copies = Vec::new();
        for copy in copies(std::iter::once(local))? {
            let source = self.sources.get(copy.file).ok_or_else(lost)?;
            made.push((Arc::clone(source), copy.strided));
        }
        let hard = made.iter().any(|(_, copy)| is_hard(copy));
        if hard {
            // In windows, so that the host holds little of it at a time.
            let len = local.bytes();
            made = (0..len.div_ceil(WINDOW))
                .map(|at| {
                    let (begin, end) = (at * WINDOW, len.min((at + 1) * WINDOW));
                    let source: Arc<dyn Source> = Arc::new(Gathered::new(&made, begin, end));
                    let strided = Strided {
                        src: 0,
                        dst: begin,
                        run: end - begin,
                        axes: Strides::new(),
                    };
                    (source, strided)
                })
                .collect();
        } else {
            for fill in &local.fills {
                made.push((Arc::new(Zeros), zeros(local, fill)?));
            }
        }
        Planned::of_local(local, to, len_as(local, to)?, device, made)
    }
}

/// Zeros as a copy from a source that has nothing else.
fn zeros(local: &Local, fill: &tonnage_plan::Fill) -> Result<Strided> {
    let mut step = fill.run;
    let mut loops: Vec<(u64, u64, u64)> = Vec::with_capacity(fill.loops.len());
    for one in fill.loops.iter().rev() {
        loops.push((one.extent, step, one.dst));
        step = step.saturating_mul(one.extent);
    }
    let inside = || {
        let error = tonnage_plan::Error::new(tonnage_plan::Reason::Granularity);
        Error::from(error.tensor(&local.name))
    };
    let made = Strided::new(0, fill.dst, fill.run, loops).map_err(|_| inside())?;
    made.ok_or_else(inside)
}

/// Whether a copy would be too many pieces, or rows that nobody copies fast.
fn is_hard(copy: &Strided) -> bool {
    let Some((axis, outer)) = rows(copy) else {
        return false;
    };
    outer > PIECES || copy.run < SHORT && axis.dst != copy.run
}

/// The axis that becomes the rows of pieces, and how many pieces there are; `None` for a range.
fn rows(copy: &Strided) -> Option<(tonnage_plan::io::strided::Stride, u64)> {
    let axis = *copy
        .axes
        .iter()
        .rev()
        .find(|axis| axis.src != 0)
        .or(copy.axes.last())?;
    let extent = if axis.src == 0 { 1 } else { axis.extent };
    Some((axis, copy.runs() / extent))
}

/// Adds the pieces of a copy. `plain` makes one of an offset, a length and a place in the tensor's stored dtype;
/// `out` says how many bytes so many of them become.
pub(crate) fn pieces(
    copy: &Strided,
    plain: &dyn Fn(u64, u64, u64) -> Piece,
    out: &dyn Fn(u64) -> u64,
    into: &mut Vec<Piece>,
) {
    let at = copy.axes.iter().rposition(|axis| axis.src != 0);
    let mut outer = Strided {
        axes: copy.axes.clone(),
        ..*copy
    };
    let rows = at.map(|at| outer.axes.remove(at));
    let each = outer.for_each_run(&mut |src, dst| {
        let piece = plain(src, copy.run, dst);
        into.push(match rows {
            None => piece,
            Some(axis) => Piece {
                rows: axis.extent,
                pitch: axis.src,
                memory_pitch: out(axis.dst),
                ..piece
            },
        });
        Ok::<(), std::convert::Infallible>(())
    });
    match each {
        Ok(()) => {}
    }
}
