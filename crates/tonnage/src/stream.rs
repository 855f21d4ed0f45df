//! Tensors on a device one after the other, while the next ones are on their way.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use tonnage_device::Memory;
use tonnage_engine::{DeviceReport, Landed, Pipeline};

use crate::arena::{Rules, place, too_large};
use crate::checkpoint::Checkpoint;
use crate::checksums::Verifying;
use crate::device_load::{DeviceLoad, DeviceMap, DeviceTensor, about, no_room};
use crate::device_plan::{Planned, plan};
use crate::error::{Error, Result};
use crate::names::{is_pattern, matches};

/// In which order tensors come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// As they land; they are read in the order of the files.
    #[default]
    Landed,
    /// As these names and patterns say; what is selected and not named comes after, in the order of the files.
    Given(Vec<String>),
}

/// How a stream runs.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// What to bring, and how.
    pub load: DeviceLoad,
    /// In which order tensors come.
    pub order: Order,
    /// Bytes of device memory for tensors that have not been handed out, at most; a single tensor may take
    /// more. By default [`Stream::AHEAD`].
    pub ahead: Option<u64>,
}

impl Stream {
    /// Device memory for tensors on their way, by default.
    pub const AHEAD: u64 = 1 << 30;
}

/// Tensors of this many bytes are placed and submitted together.
const PORTION: u64 = 16 << 20;
const PORTION_TENSORS: usize = 4096;

/// Tensors as they come. What has been handed out is the caller's; what has not is freed with the stream.
pub struct DeviceStream {
    map: DeviceMap,
    load: DeviceLoad,
    planned: Vec<Planned>,
    /// Positions of `planned`, in the order in which they are submitted.
    order: Vec<usize>,
    /// How many of `order` have been submitted, and handed out if the order is given.
    submitted: usize,
    handed_out: usize,
    given: bool,
    /// Where tensors on their way and tensors that have landed are.
    placed: HashMap<usize, DeviceTensor>,
    ready: HashSet<usize>,
    /// What has landed, in that order; for streams without a given order.
    landed: VecDeque<usize>,
    ahead: u64,
    outstanding: u64,
    /// `None` after a failure, and after the end.
    pipeline: Option<Pipeline>,
    verifying: Option<Arc<Verifying>>,
    missing: Vec<String>,
    report: DeviceReport,
}

impl Checkpoint {
    /// Brings tensors to devices one after the other, never more of them ahead than a budget: the first
    /// layer can run while the rest is read. Reading begins with the first call of the iterator's `next`.
    ///
    /// # Errors
    /// As [`Checkpoint::load_to`]; later ones come from the iterator. With [`DeviceLoad::verify`], a chunk at the
    /// seam of two tensors is compared when both have been read, so its error may come after the first of
    /// them, at the end at the latest.
    pub fn stream_to(&self, map: impl Into<DeviceMap>, stream: &Stream) -> Result<DeviceStream> {
        if let Some(numbers) = self.numbers(&stream.load)? {
            let mut plain = stream.clone();
            (plain.load.dequantize, plain.load.verify) = (None, false);
            return numbers.stream_to(map, &plain);
        }
        let map = map.into();
        let (planned, missing) = plan(self, &map, &stream.load)?;
        let order = order(&planned, &stream.order)?;
        let verifying = self.verifying(&planned, &stream.load)?;
        DeviceStream::start(map, stream, planned, order, verifying, missing)
    }
}

impl DeviceStream {
    pub(crate) fn start(
        map: DeviceMap,
        stream: &Stream,
        planned: Vec<Planned>,
        order: Vec<usize>,
        verifying: Option<Arc<Verifying>>,
        missing: Vec<String>,
    ) -> Result<Self> {
        let total = planned
            .iter()
            .fold(0, |sum: u64, tensor| sum.saturating_add(tensor.wanted()));
        Ok(DeviceStream {
            pipeline: Some(stream.load.start(&map, Some(total), verifying.as_ref())?),
            verifying,
            map,
            load: stream.load.clone(),
            planned,
            order,
            submitted: 0,
            handed_out: 0,
            given: stream.order != Order::Landed,
            placed: HashMap::new(),
            ready: HashSet::new(),
            landed: VecDeque::new(),
            ahead: stream.ahead.unwrap_or(Stream::AHEAD),
            outstanding: 0,
            missing,
            report: DeviceReport::default(),
        })
    }
}

/// Positions in the order that is asked for.
pub(crate) fn order(planned: &[Planned], order: &Order) -> Result<Vec<usize>> {
    let Order::Given(names) = order else {
        return Ok((0..planned.len()).collect());
    };
    let by_name: HashMap<&str, usize> = planned
        .iter()
        .enumerate()
        .map(|(at, tensor)| (&*tensor.name, at))
        .collect();
    let mut taken = vec![false; planned.len()];
    let mut positions = Vec::with_capacity(planned.len());
    let mut take = |at: usize, positions: &mut Vec<usize>| {
        if !std::mem::replace(&mut taken[at], true) {
            positions.push(at);
        }
    };
    for text in names {
        let before = positions.len();
        if let Some(&at) = by_name.get(&**text) {
            take(at, &mut positions);
            continue;
        }
        if is_pattern(text) {
            let members = planned
                .iter()
                .enumerate()
                .filter(|(_, t)| matches(text, &t.name));
            let members: Vec<usize> = members.map(|(at, _)| at).collect();
            if !members.is_empty() {
                members.into_iter().for_each(|at| take(at, &mut positions));
                continue;
            }
        }
        if positions.len() == before {
            let text =
                format!("the order names {text:?}, and no tensor that is to come matches it");
            return Err(Error::usage("SELECT", text));
        }
    }
    (0..planned.len()).for_each(|at| take(at, &mut positions));
    Ok(positions)
}

impl fmt::Debug for DeviceStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceStream")
            .field("map", &self.map)
            .field("tensors", &self.planned.len())
            .field("handed_out", &self.handed_out)
            .finish()
    }
}

impl DeviceStream {
    /// Names that were asked for and are not there.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// How many tensors have not been handed out.
    pub fn remaining(&self) -> usize {
        self.planned.len() - self.handed_out
    }

    /// What it took so far.
    pub fn report(&self) -> DeviceReport {
        match &self.pipeline {
            Some(pipeline) => pipeline.progress_report(),
            None => self.report.clone(),
        }
    }

    /// Submits the next tensors, if the budget has room for them.
    fn submit_some(&mut self) -> Result<bool> {
        let Some(pipeline) = &self.pipeline else {
            return Ok(false);
        };
        // Refilled by halves: tensor by tensor, each small one would get a region of its own.
        if self.outstanding > self.ahead / 2 {
            return Ok(false);
        }
        let (mut bytes, mut next) = (0_u64, self.submitted);
        while let Some(tensor) = self.order.get(next).and_then(|&at| self.planned.get(at)) {
            let more = bytes.saturating_add(tensor.len);
            let none = self.outstanding == 0 && bytes == 0;
            let over = self.outstanding.saturating_add(more) > self.ahead;
            if over && !none || bytes >= PORTION || next - self.submitted >= PORTION_TENSORS {
                break;
            }
            (bytes, next) = (more, next + 1);
        }
        let members = self.order.get(self.submitted..next).unwrap_or(&[]);
        if members.is_empty() {
            return Ok(false);
        }
        let mut pieces = Vec::with_capacity(members.len());
        for (at, memory, offset, slack) in self.allocate(members)? {
            let Some(tensor) = self.planned.get(at) else {
                continue;
            };
            tensor.pieces(&memory, offset, slack, at as u64, &mut pieces);
            self.placed.insert(at, tensor.on_device(memory, offset));
        }
        let submitted = pipeline.submit(pieces);
        submitted.map_err(|failed| about(failed, &self.planned))?;
        (self.submitted, self.outstanding) = (next, self.outstanding.saturating_add(bytes));
        Ok(true)
    }

    /// Memory for some tensors: position, memory, first byte, unused bytes behind.
    fn allocate(&self, members: &[usize]) -> Result<Vec<(usize, Memory, u64, u64)>> {
        let mut all = Vec::with_capacity(members.len());
        for (of, device) in self.map.devices().iter().enumerate() {
            let here = members
                .iter()
                .filter_map(|&at| Some((at, self.planned.get(at)?)));
            let (into, here): (Vec<_>, Vec<_>) = here
                .filter(|(_, tensor)| tensor.device == of)
                .partition(|(_, tensor)| self.load.into.contains_key(&tensor.name));
            for (at, tensor) in into {
                let Some((memory, offset)) = self.load.into.get(&tensor.name) else {
                    continue;
                };
                tensor.check_target(memory, *offset, &self.map)?;
                all.push((at, memory.clone(), *offset, 0));
            }
            let info = device.info();
            let arena = place(here.iter().map(|(_, tensor)| tensor.len), Rules::of(info));
            let arena = arena.map_err(|at| {
                let (name, len) = here.get(at).map_or(("", 0), |(_, t)| (&t.name, t.len));
                too_large(name, len, info)
            })?;
            let regions = arena.regions.iter().map(|&len| {
                self.load.allocate(device, len).map_err(|error| {
                    let free = device.free_memory().ok();
                    let first = here.first().map_or("", |(_, tensor)| &tensor.name);
                    no_room(error, len, free).about(first, None)
                })
            });
            let regions = regions.collect::<Result<Vec<Memory>>>()?;
            for ((at, _), place) in here.iter().zip(&arena.places) {
                let Some(memory) = regions.get(place.region) else {
                    continue;
                };
                all.push((*at, memory.clone(), place.offset, place.slack));
            }
        }
        // Pieces are brought in the order of the stream, whatever their device.
        let rank: HashMap<usize, usize> = members
            .iter()
            .enumerate()
            .map(|(rank, &at)| (at, rank))
            .collect();
        all.sort_by_key(|(at, ..)| rank.get(at).copied());
        Ok(all)
    }

    fn take_in(&mut self, landed: Landed) {
        for tag in landed.tags {
            let Ok(at) = usize::try_from(tag) else {
                continue;
            };
            if self.given {
                self.ready.insert(at);
            } else {
                self.landed.push_back(at);
            }
        }
    }

    /// The tensor that is next, if it has landed.
    fn hand_out(&mut self) -> Option<DeviceTensor> {
        let at = if self.given {
            let at = *self.order.get(self.handed_out)?;
            self.ready.remove(&at).then_some(at)?
        } else {
            self.landed.pop_front()?
        };
        let tensor = self.placed.remove(&at)?;
        self.handed_out += 1;
        self.outstanding = self.outstanding.saturating_sub(tensor.len);
        Some(tensor)
    }

    fn advance(&mut self) -> Result<Option<DeviceTensor>> {
        loop {
            if let Some(tensor) = self.hand_out() {
                // While the caller works with it, the next ones come.
                self.submit_some()?;
                return Ok(Some(tensor));
            }
            let Some(pipeline) = &self.pipeline else {
                return Ok(None);
            };
            let failed = |failed| about(failed, &self.planned);
            if let Some(landed) = pipeline.poll().map_err(failed)? {
                self.take_in(landed);
            } else if !self.submit_some()? {
                let Some(pipeline) = &self.pipeline else {
                    return Ok(None);
                };
                let failed = |failed| about(failed, &self.planned);
                match pipeline.landed().map_err(failed)? {
                    Some(landed) => self.take_in(landed),
                    None => return self.end().map(|()| None),
                }
            }
        }
    }

    fn end(&mut self) -> Result<()> {
        if let Some(pipeline) = self.pipeline.take() {
            self.report = pipeline
                .finish()
                .map_err(|failed| about(failed, &self.planned))?;
            if let Some(verifying) = &self.verifying {
                verifying.rest(&self.load.rest_options())?;
            }
        }
        Ok(())
    }
}

impl Iterator for DeviceStream {
    type Item = Result<DeviceTensor>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.advance();
        if result.is_err() {
            if let Some(pipeline) = self.pipeline.take() {
                self.report = pipeline.progress_report();
            }
            self.placed.clear();
            self.landed.clear();
            self.ready.clear();
        }
        result.transpose()
    }
}
