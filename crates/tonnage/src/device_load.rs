//! Loading to devices: tensors placed in regions of a device's memory and brought there through the ring.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use tonnage_device::{Cause, Device, DeviceId, Error as DeviceError, Memory, Pool, Stream, gds};
use tonnage_engine::{
    self as engine, Cancel, DeviceReport, Failed, Pipeline, PipelineOptions, SharedProgress,
    Strategy,
};
use tonnage_format::slice::Range;
use tonnage_format::{Dtype, Reason};
use tonnage_quant::map::QuantMap;

use crate::arena::{Arena, Rules, place, too_large};
use crate::checkpoint::Checkpoint;
use crate::checksums::Verifying;
use crate::device_plan::{Planned, plan};
use crate::error::{Error, Result};
use crate::load::Report;
use crate::names::{is_pattern, matches};

/// Allocates memory of this length on a device: a framework's allocator, whose memory came in by
/// [`Device::adopt`].
pub type Allocate = Arc<dyn Fn(&Arc<dyn Device>, u64) -> Result<Memory, DeviceError> + Send + Sync>;

/// What to bring to devices, and how. The default brings everything as it is.
#[derive(Clone, Default)]
pub struct DeviceLoad {
    /// Names and patterns (`*`, `?`, `[…]`); empty for everything.
    pub select: Vec<String>,
    /// What to take of a tensor, by its name: one range a dimension. Others are taken whole.
    pub slices: HashMap<String, Vec<Range>>,
    /// Casts floating-point tensors to this dtype; others stay as they are.
    pub dtype: Option<Dtype>,
    /// Memory for a tensor, by its name, and its first byte there; others are placed in regions.
    pub into: HashMap<String, (Memory, u64)>,
    /// Who allocates regions; by default the device does.
    pub allocate: Option<Allocate>,
    /// Streams in whose order that memory was allocated: copies wait for what they have been given.
    pub after: Vec<(DeviceId, Stream)>,
    /// Bytes of staging memory at most; 256 MiB by default.
    pub staging: Option<u64>,
    /// As [`PipelineOptions::threads`].
    pub threads: Option<usize>,
    /// As [`PipelineOptions::strategy`].
    pub strategy: Strategy,
    /// Compares what is read with the checksums of its file: every chunk of which a byte is read.
    pub verify: bool,
    /// Told how far it is.
    pub progress: Option<SharedProgress>,
    /// Ends it.
    pub cancel: Cancel,
    /// Where staging slots come from; by default the process's pool, or one of its own for a budget that is
    /// larger than that.
    pub pool: Option<Arc<Pool>>,
    /// Asks for GPUDirect Storage on CUDA devices; without a setting it is never tried. Where it does not work, and
    /// with `verify`, bytes go through the staging memory, and the report says why.
    pub gds: Option<gds::Settings>,
    /// Quantised tensors of this map come as numbers, each under its logical name ([`Checkpoint::dequantized`]).
    pub dequantize: Option<Arc<QuantMap>>,
}

impl fmt::Debug for DeviceLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceLoad")
            .field("select", &self.select)
            .field("slices", &self.slices)
            .field("dtype", &self.dtype)
            .field("into", &self.into)
            .field("allocate", &self.allocate.is_some())
            .field("after", &self.after)
            .field("staging", &self.staging)
            .field("threads", &self.threads)
            .field("strategy", &self.strategy)
            .field("verify", &self.verify)
            .field("progress", &self.progress.is_some())
            .field("cancel", &self.cancel)
            .field("gds", &self.gds)
            .finish()
    }
}

impl DeviceLoad {
    pub(crate) fn start(
        &self,
        map: &DeviceMap,
        total: Option<u64>,
        verifying: Option<&Arc<Verifying>>,
    ) -> Result<Pipeline> {
        let staging = self.staging.unwrap_or(Pool::CAPACITY);
        if staging < PipelineOptions::MIN_STAGING {
            let least = PipelineOptions::MIN_STAGING;
            let text = format!("a staging budget of {staging} bytes; {least} are needed");
            return Err(Error::usage("STAGING", text));
        }
        let own = || match staging {
            ..=Pool::CAPACITY => Arc::clone(Pool::global()),
            _ => Pool::new(staging),
        };
        let options = PipelineOptions {
            staging,
            slot: None,
            threads: self.threads,
            strategy: self.strategy,
            cancel: self.cancel.clone(),
            pool: self.pool.clone().unwrap_or_else(own),
            progress: self.progress.clone(),
            total,
            check: verifying.map(|verifying| Arc::clone(verifying) as _),
            gds: self.gds.as_ref().map_or(gds::Use::Off, gds::Use::wanted),
        };
        let pipeline = Pipeline::start(map.devices.clone(), options).map_err(Failed::into_error)?;
        for &(device, stream) in &self.after {
            pipeline.after(device, stream);
        }
        Ok(pipeline)
    }

    /// How the rest of a checksum's chunk is read.
    pub(crate) fn rest_options(&self) -> engine::Options<'_> {
        engine::Options {
            threads: self.threads,
            cancel: Some(&self.cancel),
            ..Default::default()
        }
    }

    pub(crate) fn allocate(
        &self,
        device: &Arc<dyn Device>,
        len: u64,
    ) -> Result<Memory, DeviceError> {
        match &self.allocate {
            Some(allocate) => allocate(device, len),
            None => device.allocate(len),
        }
    }
}

/// Which tensor goes to which device.
#[derive(Clone, Debug, Default)]
pub struct DeviceMap {
    devices: Vec<Arc<dyn Device>>,
    rules: Vec<(String, usize)>,
}

impl From<&Arc<dyn Device>> for DeviceMap {
    fn from(device: &Arc<dyn Device>) -> Self {
        DeviceMap::new().to("*", device)
    }
}

impl DeviceMap {
    /// Nothing goes anywhere yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tensors that this name or pattern (`*`, `?`, `[…]`) selects go to this device, unless an earlier rule
    /// has them.
    #[must_use]
    pub fn to(mut self, pattern: impl Into<String>, device: &Arc<dyn Device>) -> Self {
        let id = device.info().id;
        let known = self.devices.iter().position(|known| known.info().id == id);
        let at = known.unwrap_or_else(|| {
            self.devices.push(Arc::clone(device));
            self.devices.len() - 1
        });
        self.rules.push((pattern.into(), at));
        self
    }

    /// The devices, in the order in which they were first named.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        &self.devices
    }

    /// The position of a tensor's device.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        let is = |pattern: &str| pattern == name || is_pattern(pattern) && matches(pattern, name);
        self.rules
            .iter()
            .find(|(pattern, _)| is(pattern))
            .map(|(_, at)| *at)
    }
}

/// A tensor in a device's memory.
#[derive(Clone, Debug)]
pub struct DeviceTensor {
    /// Its name.
    pub name: String,
    /// Its dtype after casting.
    pub dtype: Dtype,
    /// Its extents in elements.
    pub shape: Vec<u64>,
    /// The memory, which it may share with others; freed with the last that uses it.
    pub memory: Memory,
    /// Its first byte there.
    pub offset: u64,
    /// Bytes it takes.
    pub len: u64,
}

impl DeviceTensor {
    /// Where it is.
    pub fn device(&self) -> DeviceId {
        self.memory.device()
    }
}

/// What was brought to devices.
#[derive(Debug)]
pub struct DeviceLoaded {
    tensors: Vec<DeviceTensor>,
    missing: Vec<String>,
    report: DeviceReport,
}

impl DeviceLoaded {
    pub(crate) fn new(tensors: Vec<DeviceTensor>, report: DeviceReport) -> Self {
        DeviceLoaded {
            tensors,
            missing: Vec::new(),
            report,
        }
    }

    /// The tensors, in the order of their bytes in the files.
    pub fn tensors(&self) -> &[DeviceTensor] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<&DeviceTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Names that were asked for and are not there.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// What it took.
    pub fn report(&self) -> &DeviceReport {
        &self.report
    }

    /// The tensors and the report.
    pub fn into_parts(self) -> (Vec<DeviceTensor>, DeviceReport) {
        (self.tensors, self.report)
    }
}

/// Pieces are handed over in portions, so that reading begins before all memory is allocated.
const PORTION: u64 = 32 << 20;
const PORTION_PIECES: usize = 4096;

impl Checkpoint {
    /// Brings tensors to devices: one pass over the files, through one ring of staging memory.
    ///
    /// # Errors
    /// As [`Checkpoint::load`]; `DEVICE_MEMORY` if a device has no room, with what was needed and what was free;
    /// `SELECT` for a tensor that the map has no device for; what a driver said. Whatever the error, all memory
    /// that was allocated here is free again.
    pub fn load_to(&self, map: impl Into<DeviceMap>, load: &DeviceLoad) -> Result<DeviceLoaded> {
        if let Some(numbers) = self.numbers(load)? {
            let plain = DeviceLoad {
                dequantize: None,
                verify: false,
                ..load.clone()
            };
            let loaded = numbers.load_to(map, &plain)?;
            if let Some(report) = numbers.report() {
                self.set_report(report);
            }
            return Ok(loaded);
        }
        let (map, begin) = (map.into(), Instant::now());
        let (planned, missing) = plan(self, &map, load)?;
        let verifying = self.verifying(&planned, load)?;
        let run = bring(&map, load, &planned, verifying.as_ref());
        let (tensors, run) = run.map_err(|error| self.verified_error(verifying.as_ref(), error))?;
        let report = DeviceReport {
            seconds: begin.elapsed().as_secs_f64(),
            ..run
        };
        self.set_report(Report {
            seconds: report.seconds,
            bytes_read: report.bytes_read,
            threads: report.threads,
            strategy: report.strategy,
            peak_staging: report.peak_staging,
            loaded: tensors.len(),
            missing: missing.clone(),
            ..Report::default()
        });
        Ok(DeviceLoaded {
            tensors,
            missing,
            report,
        })
    }

    /// The checkpoint of numbers, where a load wants them; its bytes have been verified if that is wanted.
    pub(crate) fn numbers(&self, load: &DeviceLoad) -> Result<Option<Checkpoint>> {
        let Some(map) = &load.dequantize else {
            return Ok(None);
        };
        let numbers = self.dequantized(map, load.dtype)?;
        if load.verify {
            let names = self.made_of(&numbers, map, &load.select);
            self.verify_tensors(&names, &load.rest_options())?;
        }
        Ok(Some(numbers))
    }

    /// The checkers of the files of these tensors, if they are wanted.
    pub(crate) fn verifying(
        &self,
        planned: &[Planned],
        load: &DeviceLoad,
    ) -> Result<Option<Arc<Verifying>>> {
        let verifying = load
            .verify
            .then(|| Verifying::new(self, planned.iter().map(|tensor| tensor.file)));
        Ok(verifying.transpose()?.map(Arc::new))
    }

    /// The error, with the tensors of a chunk that is wrong.
    pub(crate) fn verified_error(&self, verifying: Option<&Arc<Verifying>>, error: Error) -> Error {
        match verifying {
            Some(verifying) => verifying.named(self, error),
            None => error,
        }
    }
}

/// Allocates memory for tensors and brings them there.
pub(crate) fn bring(
    map: &DeviceMap,
    load: &DeviceLoad,
    planned: &[Planned],
    verifying: Option<&Arc<Verifying>>,
) -> Result<(Vec<DeviceTensor>, DeviceReport)> {
    let mut regions = Regions::new(map, load, planned)?;
    let total = planned
        .iter()
        .fold(0, |sum: u64, tensor| sum.saturating_add(tensor.wanted()));
    let pipeline = load.start(map, Some(total), verifying)?;
    let named = |failed: Failed| about(failed, planned);
    let mut tensors = Vec::with_capacity(planned.len());
    let (mut pieces, mut bytes) = (Vec::new(), 0_u64);
    for (position, tensor) in planned.iter().enumerate() {
        if load.cancel.is_cancelled() {
            return Err(tonnage_engine::Error::Cancelled.into());
        }
        let (memory, offset, slack) = regions.memory(position, tensor)?;
        tensor.pieces(&memory, offset, slack, position as u64, &mut pieces);
        tensors.push(tensor.on_device(memory, offset));
        bytes = bytes.saturating_add(tensor.wanted());
        if bytes >= PORTION || pieces.len() >= PORTION_PIECES {
            pipeline
                .submit(std::mem::take(&mut pieces))
                .map_err(named)?;
            bytes = 0;
        }
    }
    pipeline.submit(pieces).map_err(named)?;
    let report = pipeline.finish().map_err(named)?;
    if let Some(verifying) = verifying {
        verifying.rest(&load.rest_options())?;
    }
    Ok((tensors, report))
}

/// What a pipeline failed of, with the tensor's name.
pub(crate) fn about(failed: Failed, planned: &[Planned]) -> Error {
    let tag = failed.tag().and_then(|tag| usize::try_from(tag).ok());
    let name = tag
        .and_then(|tag| planned.get(tag))
        .map(|tensor| tensor.name.clone());
    let (label, range) = (failed.label().map(str::to_owned), failed.range());
    let mut error = Error::from(failed.into_error());
    if error.code() == Reason::ChecksumMismatch.code() {
        // A chunk has its own place.
        return error;
    }
    if let Some(label) = label {
        error = error.in_file(label);
    }
    match name {
        Some(name) => error.about(&name, range),
        None => error,
    }
}

/// The regions of a load, allocated when the first tensor of each is reached.
struct Regions<'a> {
    map: &'a DeviceMap,
    load: &'a DeviceLoad,
    arenas: Vec<DeviceRegions>,
    /// By position of a planned tensor, its position among those of its device.
    within: Vec<usize>,
}

struct DeviceRegions {
    arena: Arena,
    memory: Vec<Option<Memory>>,
    free: Option<u64>,
}

impl<'a> Regions<'a> {
    fn new(map: &'a DeviceMap, load: &'a DeviceLoad, planned: &[Planned]) -> Result<Self> {
        let mut members: Vec<Vec<&Planned>> = map.devices.iter().map(|_| Vec::new()).collect();
        let mut within = Vec::with_capacity(planned.len());
        for tensor in planned {
            let Some(members) = members.get_mut(tensor.device) else {
                continue;
            };
            within.push(members.len());
            if !load.into.contains_key(&tensor.name) {
                members.push(tensor);
            }
        }
        let arenas = map.devices.iter().zip(members).map(|(device, members)| {
            let info = device.info();
            let arena = place(members.iter().map(|tensor| tensor.len), Rules::of(info));
            let arena = arena.map_err(|at| {
                let (name, len) = members.get(at).map_or(("", 0), |t| (&t.name, t.len));
                too_large(name, len, info)
            })?;
            Ok(DeviceRegions {
                memory: vec![None; arena.regions.len()],
                free: device.free_memory().ok(),
                arena,
            })
        });
        Ok(Regions {
            map,
            load,
            arenas: arenas.collect::<Result<_>>()?,
            within,
        })
    }

    /// The memory of a tensor, its first byte there, and how many unused bytes are behind it.
    fn memory(&mut self, position: usize, tensor: &Planned) -> Result<(Memory, u64, u64)> {
        if let Some((memory, offset)) = self.load.into.get(&tensor.name) {
            tensor.check_target(memory, *offset, self.map)?;
            return Ok((Arc::clone(memory), *offset, 0));
        }
        let lost = || Error::usage("SELECT", "a tensor has no place");
        let at = *self.within.get(position).ok_or_else(lost)?;
        let device = self.map.devices.get(tensor.device).ok_or_else(lost)?;
        let regions = self.arenas.get_mut(tensor.device).ok_or_else(lost)?;
        let place = *regions.arena.places.get(at).ok_or_else(lost)?;
        let memory = regions.memory.get_mut(place.region).ok_or_else(lost)?;
        let memory = match memory {
            Some(memory) => Arc::clone(memory),
            None => {
                let len = regions
                    .arena
                    .regions
                    .get(place.region)
                    .copied()
                    .unwrap_or(0);
                let made = self.load.allocate(device, len);
                let made = made.map_err(|error| {
                    let needed = regions
                        .arena
                        .regions
                        .iter()
                        .fold(0, |sum: u64, &len| sum.saturating_add(len));
                    no_room(error, needed, regions.free).about(&tensor.name, None)
                })?;
                Arc::clone(memory.insert(made))
            }
        };
        Ok((memory, place.offset, place.slack))
    }
}

/// A device without room: what everything needs is told, not what one region does.
pub(crate) fn no_room(error: DeviceError, needed: u64, free: Option<u64>) -> Error {
    if !error.is_out_of_memory() {
        return error.into();
    }
    DeviceError::new(
        error.device(),
        "hold the tensors",
        Cause::OutOfMemory { needed, free },
    )
    .into()
}
