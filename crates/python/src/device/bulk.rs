//! Many whole tensors at once. What each of them is, where it lies and what of a file belongs there stays
//! here: Python sees a call for each region of memory, and the tensors at the end.
//!
//! Objects of Python for each tensor on its way (its row, its place, its job) took 11 µs a tensor; small
//! tensors are read in less than one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tonnage::arena::{Rules, place};
use tonnage::cast::{cast_len, castable};
use tonnage::device::dlpack::Exchange;
use tonnage::engine::{Cast, Piece};
use tonnage::{Checkpoint, Dtype, TensorRef};

use super::arrange::too_large;
use super::dlpack;
use super::memory::Region;
use super::open;
use super::pieces::cast_of;
use super::tensor::{DeviceTensor, show};
use crate::paved::failure::{raise, usage};
use crate::paved::handle::Handle;

/// Tensors are placed and handed over in portions of so many bytes, so that reading begins at once.
const PORTION: u64 = 64 << 20;
const PORTION_TENSORS: usize = 16384;

/// Memory that tensors lie in.
struct Held {
    region: Py<Region>,
    /// What keeps it; the tensor itself, if it is alone there and made already.
    holder: Py<PyAny>,
    is_tensor: bool,
}

/// Where a tensor lies: which memory, and its first byte there. A tensor without a byte lies nowhere.
type Place = Option<(usize, u64)>;

/// Whole tensors that a transfer brings; their tags are their positions here.
#[pyclass(frozen, name = "_Bulk", module = "tonnage._native")]
pub struct Bulk {
    handle: Py<Handle>,
    positions: Arc<Vec<usize>>,
    /// The target of each; the first one's where there is one only.
    goes: Option<Vec<usize>>,
    wanted: Option<Dtype>,
    held: Mutex<(Vec<Held>, Vec<Place>)>,
}

/// What a target's tensors are made of: the framework's table of C functions; whether they are
/// `DeviceTensor`s; what makes one of what holds its memory, its first byte there, and its position; and
/// whether a tensor has the dtype of this name, as the framework should have it.
type Maker<'py> = (
    Option<Bound<'py, PyAny>>,
    bool,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
);

fn unknown(position: usize) -> PyErr {
    let text = format!("no tensor has position {position}");
    usage("UNKNOWN_TENSOR", &text)
}

/// The dtype that a tensor has and the one that it is to have.
fn dtypes(tensor: &TensorRef<'_>, wanted: Option<Dtype>) -> PyResult<(Dtype, Dtype)> {
    let from = tensor.dtype().map_err(|e| raise(&e))?;
    let to = wanted.filter(|&to| castable(from, to)).unwrap_or(from);
    Ok((from, to))
}

/// Bytes of these tensors in their files, and the dtypes that they are to have.
pub fn totals(
    checkpoint: &Checkpoint,
    positions: &[usize],
    wanted: Option<&str>,
) -> PyResult<(u64, Vec<&'static str>)> {
    let wanted = parse(wanted)?;
    let (mut bytes, mut found) = (0_u64, Vec::new());
    for &position in positions {
        let tensor = checkpoint.at(position).ok_or_else(|| unknown(position))?;
        let (_, to) = dtypes(&tensor, wanted)?;
        bytes = bytes.saturating_add(tensor.byte_len());
        if !found.contains(&to) {
            found.push(to);
        }
    }
    Ok((bytes, found.into_iter().map(Dtype::name).collect()))
}

fn parse(name: Option<&str>) -> PyResult<Option<Dtype>> {
    name.map(|name| Dtype::from_name(name).ok_or_else(|| usage("DTYPE", name)))
        .transpose()
}

/// Where a bulk's tensors go, and who has memory there.
pub struct Targets<'a, 'py> {
    /// The devices' names.
    pub names: &'a [String],
    /// Called with a target's number, bytes, and the position of the tensor that is alone there, if one is:
    /// gives a region, what keeps it, and whether that is the tensor.
    pub allocate: &'a Bound<'py, PyAny>,
}

impl Bulk {
    pub fn new(
        handle: Py<Handle>,
        positions: Vec<usize>,
        goes: Option<Vec<usize>>,
        wanted: Option<&str>,
    ) -> PyResult<Self> {
        let count = positions.len();
        if goes.as_ref().is_some_and(|goes| goes.len() != count) {
            return Err(usage("DEVICE_MAP", "each tensor goes to one device"));
        }
        Ok(Bulk {
            handle,
            positions: Arc::new(positions),
            goes,
            wanted: parse(wanted)?,
            held: Mutex::new((Vec::new(), vec![None; count])),
        })
    }

    /// Whose tensors these are, for messages.
    pub fn whose(&self, py: Python<'_>) -> (Py<Handle>, Arc<Vec<usize>>) {
        (self.handle.clone_ref(py), Arc::clone(&self.positions))
    }

    fn target(&self, at: usize) -> usize {
        let goes = self.goes.as_ref().and_then(|goes| goes.get(at));
        goes.copied().unwrap_or(0)
    }

    /// Refuses a tensor that no allocation of its device holds, before anything is allocated or read.
    pub fn check_sizes(&self, py: Python<'_>, devices: &[String]) -> PyResult<()> {
        let opened = devices.iter().map(|name| open::device(py, name));
        let opened = opened.collect::<PyResult<Vec<_>>>()?;
        let checkpoint = &self.handle.get().checkpoint;
        for (at, &position) in self.positions.iter().enumerate() {
            let tensor = checkpoint.at(position).ok_or_else(|| unknown(position))?;
            let (from, to) = dtypes(&tensor, self.wanted)?;
            let len = cast_len(from, tensor.byte_len(), to).map_err(|e| raise(&e.into()))?;
            let Some(device) = opened.get(self.target(at)) else {
                return Err(usage("DEVICE_MAP", "no such target"));
            };
            if len > device.info().max_region {
                return Err(too_large(tensor.name(), len, device.info()));
            }
        }
        Ok(())
    }

    /// Places the tensors from `begin` on, as many as a portion has, and says where it ends.
    pub fn portion(
        &self,
        py: Python<'_>,
        begin: usize,
        targets: &Targets<'_, '_>,
        into: &mut Vec<Piece>,
    ) -> PyResult<usize> {
        let checkpoint = &self.handle.get().checkpoint;
        let (mut members, mut bytes) = (vec![Vec::new(); targets.names.len()], 0_u64);
        let mut end = begin;
        while let Some(&position) = self.positions.get(end) {
            if end > begin && (bytes >= PORTION || end - begin >= PORTION_TENSORS) {
                break;
            }
            let tensor = checkpoint.at(position).ok_or_else(|| unknown(position))?;
            let (from, to) = dtypes(&tensor, self.wanted)?;
            let len = cast_len(from, tensor.byte_len(), to).map_err(|e| raise(&e.into()))?;
            let target = members.get_mut(self.target(end));
            let target = target.ok_or_else(|| usage("DEVICE_MAP", "no such target"))?;
            target.push((end, len));
            bytes = bytes.saturating_add(len);
            end += 1;
        }
        for (number, members) in members.iter().enumerate() {
            self.place(py, number, members, targets, into)?;
        }
        // Files are read from front to back, whatever goes where.
        if targets.names.len() > 1 {
            into.sort_by_key(|piece| piece.tag);
        }
        Ok(end)
    }

    /// Memory for some tensors of one target, and the pieces that fill it.
    fn place(
        &self,
        py: Python<'_>,
        number: usize,
        members: &[(usize, u64)],
        targets: &Targets<'_, '_>,
        into: &mut Vec<Piece>,
    ) -> PyResult<()> {
        let name = targets.names.get(number).map_or("", String::as_str);
        let full: Vec<(usize, u64)> = members
            .iter()
            .copied()
            .filter(|&(_, len)| len > 0)
            .collect();
        if full.is_empty() {
            return Ok(());
        }
        let device = open::device(py, name)?;
        let arena = place(full.iter().map(|&(_, len)| len), Rules::of(device.info()));
        let arena = arena.map_err(|at| {
            let (at, len) = full.get(at).copied().unwrap_or_default();
            too_large(self.name(at), len, device.info())
        })?;
        let mut sharing = vec![0_usize; arena.regions.len()];
        for place in &arena.places {
            sharing[place.region] += 1;
        }
        let checkpoint = &self.handle.get().checkpoint;
        let mut made: Vec<Option<usize>> = vec![None; arena.regions.len()];
        let mut casts = Casts::default();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for (&(at, _), place) in full.iter().zip(&arena.places) {
            let region = match made[place.region] {
                Some(region) => region,
                None => {
                    let alone = (sharing[place.region] == 1).then(|| self.positions.get(at));
                    let len = arena.regions[place.region];
                    let given = targets.allocate.call1((number, len, alone.flatten()))?;
                    let (region, holder, is_tensor) = given.extract()?;
                    held.0.push(Held {
                        region,
                        holder,
                        is_tensor,
                    });
                    *made[place.region].insert(held.0.len() - 1)
                }
            };
            if let Some(known) = held.1.get_mut(at) {
                *known = Some((region, place.offset));
            }
            let Some(memory) = held.0.get(region) else {
                continue;
            };
            let position = self.positions.get(at).copied().unwrap_or(usize::MAX);
            let tensor = checkpoint.at(position).ok_or_else(|| unknown(position))?;
            let source = checkpoint
                .source(tensor.file())
                .ok_or_else(|| unknown(position))?;
            let (from, to) = dtypes(&tensor, self.wanted)?;
            let (source, memory) = (Arc::clone(source), memory.region.get());
            let (offset, len, tag) = (tensor.offset(), tensor.byte_len(), at as u64);
            let to_memory = Arc::clone(&memory.memory);
            into.push(Piece {
                slack: place.slack,
                cast: casts.of(from, to, memory),
                ..Piece::plain(source, offset, len, to_memory, place.offset, tag)
            });
        }
        Ok(())
    }

    fn name(&self, at: usize) -> &str {
        let position = self.positions.get(at).copied();
        let tensor = position.and_then(|position| self.handle.get().checkpoint.at(position));
        tensor.map_or("", |tensor| tensor.name())
    }
}

/// Casts by what they turn into what: tensors share them.
#[derive(Default)]
struct Casts(HashMap<(Dtype, Dtype), Option<Arc<dyn Cast>>>);

impl Casts {
    fn of(&mut self, from: Dtype, to: Dtype, region: &Region) -> Option<Arc<dyn Cast>> {
        let known = self.0.entry((from, to));
        known.or_insert_with(|| cast_of(from, to, region)).clone()
    }
}

#[pymethods]
impl Bulk {
    /// The tensors by name, all of which have landed, each target's as its maker makes them. Once.
    fn tensors<'py>(
        &self,
        py: Python<'py>,
        makers: Vec<Maker<'py>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (held, places) = std::mem::take(&mut *held);
        let makers = makers.into_iter().map(Making::new);
        let mut makers = makers.collect::<PyResult<Vec<_>>>()?;
        let checkpoint = &self.handle.get().checkpoint;
        let all = PyDict::new(py);
        for (at, place) in places.into_iter().enumerate() {
            let position = self.positions.get(at).copied().unwrap_or(usize::MAX);
            let tensor = checkpoint.at(position).ok_or_else(|| unknown(position))?;
            let no_maker = || usage("DEVICE_MAP", "no such target");
            let maker = makers.get_mut(self.target(at)).ok_or_else(no_maker)?;
            let place = place.and_then(|(region, offset)| Some((held.get(region)?, offset)));
            let made = match place {
                None => maker.within.call1((py.None(), 0, position))?,
                Some((held, _)) if held.is_tensor => held.holder.bind(py).clone(),
                Some((held, offset)) => {
                    let (_, dtype) = dtypes(&tensor, self.wanted)?;
                    match maker.make(py, held, offset, dtype, tensor.shape())? {
                        Some(made) => made,
                        None => maker.within.call1((&held.holder, offset, position))?,
                    }
                }
            };
            all.set_item(tensor.name(), made)?;
        }
        Ok(all)
    }
}

/// A maker at work.
struct Making<'py> {
    table: Option<Exchange>,
    plain: bool,
    within: Bound<'py, PyAny>,
    fits: Bound<'py, PyAny>,
    /// Whether the table makes what is wanted of a dtype.
    knows: HashMap<Dtype, bool>,
}

impl<'py> Making<'py> {
    fn new((table, plain, within, fits): Maker<'py>) -> PyResult<Self> {
        let table = table.as_ref().map(dlpack::exchange).transpose()?;
        Ok(Making {
            table: table.flatten(),
            plain,
            within,
            fits,
            knows: HashMap::new(),
        })
    }

    /// A tensor without Python's help; `None` where that is needed.
    fn make(
        &mut self,
        py: Python<'py>,
        held: &Held,
        offset: u64,
        dtype: Dtype,
        shape: &[u64],
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let region = held.region.get();
        if self.plain {
            let tensor = DeviceTensor::within(region, offset, dtype, shape.to_vec())?;
            return Ok(Some(Bound::new(py, tensor)?.into_any()));
        }
        let Some(table) = self.table else {
            return Ok(None);
        };
        if self.knows.get(&dtype) == Some(&false) {
            return Ok(None);
        }
        let shown = show(&region.memory, offset, dtype, shape);
        let made = shown
            .ok()
            .and_then(|tensor| dlpack::object(py, &table, tensor));
        if let (Some(made), false) = (&made, self.knows.contains_key(&dtype)) {
            let fits = self.fits.call1((dtype.name(), made))?;
            self.knows.insert(dtype, fits.is_truthy()?);
            if !fits.is_truthy()? {
                return Ok(None);
            }
        }
        Ok(made)
    }
}
