//! An open file: its header, its bytes, and the adapter that makes tensors of them.

use std::path::Path;
use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use tonnage::engine::{self, Read};
use tonnage::format::slice::{Range, Runs};
use tonnage::format::{self, Dtype, Header, ReadOptions, Step, TensorInfo, probe};
use tonnage::storage::{self, FileSource, MemorySource, PrivateMap, ReadAhead, Source};
use tonnage::{Checkpoint, OpenOptions};

use super::adapter::Adapter;
use super::args::{Backend, Device, Framework};
use super::gather::gather;
use super::packing::unpack;
use crate::buffer::{Buffer, Lent, Owned, PinnedBytes};
use crate::error;
use crate::paved::failure;
use crate::paved::handle::Handle;

/// A file open for one framework and device. Shared by `safe_open` and the slices it gave out.
pub struct Opened {
    pub header: Header<Vec<u8>>,
    pub adapter: Adapter,
    /// Whose tensors are wanted, and where.
    framework: Framework,
    device: Device,
    source: Arc<dyn Source>,
    /// The file once more, for bulk reads; made when first needed.
    handle: PyOnceLock<Py<Handle>>,
    /// The mapped file, where tensors view it.
    map: Option<Py<Buffer>>,
}

/// Where a tensor's bytes are read to.
enum Memory {
    /// Ours: a buffer that the tensor will keep.
    Owned(Owned),
    /// The framework's: the tensor itself.
    Tensor(Py<PyAny>, Lent),
}

impl Memory {
    fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Memory::Owned(owned) => owned.as_mut_slice(),
            Memory::Tensor(_, lent) => lent.as_mut_slice(),
        }
    }
}

enum Refusal {
    Io(storage::Error),
    Format(format::Error),
}

/// Reads the header, asking for no memory that the file's length does not justify.
fn read_header(source: &dyn Source) -> Result<Header<Vec<u8>>, Refusal> {
    let options = ReadOptions::default();
    let mut bytes = Vec::new();
    while let Step::Need { offset, len } =
        probe(&bytes, Some(source.len()), &options).map_err(Refusal::Format)?
    {
        // `probe` checked the header's length against the file's, so both fit in memory.
        let have = bytes.len();
        bytes.resize(have + len as usize, 0);
        source
            .read_exact_at(offset, &mut bytes[have..])
            .map_err(Refusal::Io)?;
    }
    Header::parse(bytes, Some(source.len()), &options).map_err(Refusal::Format)
}

/// The bytes of a big-endian host's elements are the file's, reversed.
fn to_native(dtype: Dtype, bytes: &mut [u8]) {
    if cfg!(target_endian = "big") && dtype.swap_unit() > 1 {
        bytes
            .chunks_exact_mut(dtype.swap_unit())
            .for_each(<[u8]>::reverse);
    }
}

impl Opened {
    /// Opens a file by its path.
    pub fn path(
        py: Python<'_>,
        path: &Path,
        framework: Framework,
        device: &Device,
        backend: Backend,
    ) -> PyResult<Self> {
        let source = py
            .detach(|| FileSource::open(path))
            .map_err(|e| error::open(&e))?;
        check_device(framework, device)?;
        let header = py
            .detach(|| read_header(&source))
            .map_err(|refusal| match refusal {
                Refusal::Io(e) => error::io("Error while deserializing header", &e, None),
                Refusal::Format(e) => {
                    error::format("Error while deserializing header", &e, Some(source.label()))
                }
            })?;
        let adapter = Adapter::new(py, framework, device)?;
        let mut map = None;
        let viewable = adapter.maps && cfg!(target_endian = "little");
        if let (Backend::Mmap, true, Some(file)) = (backend, viewable, source.file()) {
            let made = PrivateMap::from_file(file, source.label()).map_err(|e| error::open(&e))?;
            if (made.len() as u64) < source.len() {
                let text = format!("{} became shorter while it was opened", source.label());
                return Err(error::usage("DATA_TRUNCATED", &text));
            }
            map = Some(Py::new(py, Buffer::map(made))?);
        }
        Ok(Opened {
            header,
            adapter,
            framework,
            device: device.clone(),
            handle: PyOnceLock::new(),
            // Files of many small tensors are read in the order of the file, one call a tensor.
            source: Arc::new(ReadAhead::new(source)),
            map,
        })
    }

    /// Takes the content of a file.
    pub fn bytes(
        data: &Bound<'_, PyBytes>,
        framework: Framework,
        device: &Device,
    ) -> PyResult<Self> {
        let py = data.py();
        check_device(framework, device)?;
        let owner = Arc::new(PinnedBytes::new(data));
        let source = MemorySource::from_owner(owner, "<bytes>");
        let header = py
            .detach(|| read_header(&source))
            .map_err(|refusal| match refusal {
                Refusal::Io(e) => error::io("Error while deserializing", &e, None),
                Refusal::Format(e) => error::format("Error while deserializing", &e, None),
            })?;
        let adapter = Adapter::new(py, framework, device)?;
        Ok(Opened {
            header,
            adapter,
            framework,
            device: device.clone(),
            handle: PyOnceLock::new(),
            source: Arc::new(source),
            map: None,
        })
    }

    /// The file as a checkpoint, for bulk reads.
    fn checkpoint<'py>(&self, py: Python<'py>) -> PyResult<&Bound<'py, Handle>> {
        let label = self.label();
        let open = || -> tonnage::Result<Checkpoint> {
            let source: Arc<dyn Source> = match self.source.file() {
                // A descriptor of its own: the loader may outlive this, and nothing is read ahead for it.
                Some(file) => {
                    let file = file
                        .try_clone()
                        .map_err(|e| storage::Error::new("duplicate", label, e))?;
                    Arc::new(FileSource::from_file(file, label)?)
                }
                None => Arc::clone(&self.source),
            };
            Checkpoint::from_sources(vec![source], &OpenOptions::default())
        };
        let make = || {
            let checkpoint = py.detach(open).map_err(|e| failure::raise(&e))?;
            Py::new(py, Handle::new(checkpoint))
        };
        Ok(self.handle.get_or_try_init(py, make)?.bind(py))
    }

    /// Tensors on a device that the engine brings them to; `None` where the framework does it: on devices that
    /// only it reaches, and for one small tensor.
    fn by_engine<'py>(
        &self,
        py: Python<'py>,
        name: Option<&str>,
        len: u64,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        if !self.adapter.stages() {
            return Ok(None);
        }
        let module = py.import(intern!(py, "tonnage._prefetch"))?;
        let device = self.device.to_python(py)?;
        let args = (
            self.checkpoint(py)?,
            name,
            len,
            device,
            self.framework.adapter(),
        );
        let found = module.getattr(intern!(py, "by_engine"))?.call1(args)?;
        Ok(found.extract()?)
    }

    /// Refuses to prefetch what the reference would not.
    pub fn check_as_reference(&self, device: Option<&Device>) -> PyResult<()> {
        if self.framework != Framework::Torch {
            let text = "prefetch is only compatible with framework=\"pt\"";
            return Err(error::usage("FRAMEWORK", text));
        }
        match device.unwrap_or(&self.device) {
            Device::Named("cuda", _) | Device::Index(_) => Ok(()),
            other => {
                let text = format!("prefetch loads to cuda devices, not {other}");
                Err(error::usage("DEVICE", &text))
            }
        }
    }

    /// Starts to load tensors in the background.
    pub fn prefetch<'py>(
        &self,
        py: Python<'py>,
        plan: Option<Bound<'py, PyAny>>,
        device: Option<Device>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let device = device.as_ref().unwrap_or(&self.device).to_python(py)?;
        let module = py.import(intern!(py, "tonnage._prefetch"))?;
        let args = (
            self.checkpoint(py)?,
            plan,
            device,
            self.framework.adapter(),
            threads,
        );
        module.getattr(intern!(py, "of_file"))?.call1(args)
    }

    /// What the file is called in messages.
    pub fn label(&self) -> &str {
        self.source.label()
    }

    /// Position of the tensor of this name.
    pub fn position(&self, name: &str) -> PyResult<usize> {
        self.header.position(name).ok_or_else(|| {
            let text = format!("File does not contain tensor {name}");
            let (tensor, file) = (Some(name), Some(self.label()));
            let fields = error::Fields {
                code: "UNKNOWN_TENSOR",
                tensor,
                file,
                ..Default::default()
            };
            error::raise(error::Kind::Plain, &text, fields)
        })
    }

    /// The tensor at a position that [`Opened::position`] gave.
    pub fn info(&self, position: usize) -> PyResult<TensorInfo<'_>> {
        let missing = || error::usage("UNKNOWN_TENSOR", "no tensor at this position");
        self.header.tensor(position).ok_or_else(missing)
    }

    /// The tensor's dtype, if this version knows it and the framework has it.
    pub fn dtype(&self, py: Python<'_>, info: &TensorInfo<'_>) -> PyResult<Dtype> {
        let dtype = info.dtype.known().map_err(|e| {
            let context = format!("Dtype not understood: {}", info.dtype.name());
            error::format(&context, &e.tensor(info.name), Some(self.label()))
        })?;
        self.adapter.check(py, dtype)?;
        Ok(dtype)
    }

    /// Whether tensors of this dtype view the mapped file.
    pub fn views(&self, dtype: Dtype) -> bool {
        self.map.is_some() && (self.adapter.packed || dtype.bitsize() >= 8)
    }

    /// The whole tensor.
    pub fn tensor<'py>(
        &self,
        py: Python<'py>,
        info: &TensorInfo<'_>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let dtype = self.dtype(py, info)?;
        if let Some(map) = self.map.as_ref().filter(|_| self.views(dtype)) {
            let offset = self.header.data_start() + info.begin;
            let map = map.bind(py).as_any();
            return self
                .adapter
                .tensor(map, dtype, info.shape, offset, info.byte_len());
        }
        if let Some(found) = self.by_engine(py, Some(info.name), info.byte_len())?
            && let Some(tensor) = found.get_item(info.name)?
        {
            return Ok(tensor);
        }
        let (source, start) = (&*self.source, self.header.data_start() + info.begin);
        self.fresh(py, info.name, dtype, info.shape, info.byte_len(), |dst| {
            source.read_exact_at(start, dst)
        })
    }

    /// The slice of a tensor that `runs` of these ranges cover, as a tensor of `shape`.
    pub fn slice<'py>(
        &self,
        py: Python<'py>,
        info: &TensorInfo<'_>,
        ranges: &[Range],
        runs: Runs,
        shape: &[u64],
    ) -> PyResult<Bound<'py, PyAny>> {
        let dtype = self.dtype(py, info)?;
        if let Some(tensor) = self.slice_by_engine(py, info, ranges, runs.byte_len(), shape)? {
            return Ok(tensor);
        }
        let (source, start) = (&*self.source, self.header.data_start() + info.begin);
        self.fresh(py, info.name, dtype, shape, runs.byte_len(), |dst| {
            gather(source, start, runs, dst)
        })
    }

    /// A slice on a device that the engine brings it to; `None` as for [`Opened::by_engine`].
    fn slice_by_engine<'py>(
        &self,
        py: Python<'py>,
        info: &TensorInfo<'_>,
        ranges: &[Range],
        len: u64,
        shape: &[u64],
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        if !self.adapter.stages() {
            return Ok(None);
        }
        let module = py.import(intern!(py, "tonnage._prefetch"))?;
        let ranges: Vec<(u64, u64, u64)> = ranges
            .iter()
            .map(|range| (range.start, range.stop, range.step))
            .collect();
        let args = (
            self.checkpoint(py)?,
            info.name,
            len,
            ranges,
            PyTuple::new(py, shape)?,
            self.device.to_python(py)?,
            self.framework.adapter(),
        );
        let made = module
            .getattr(intern!(py, "slice_by_engine"))?
            .call1(args)?;
        Ok((!made.is_none()).then_some(made))
    }

    /// A tensor of memory of its own, `len` bytes that `fill` reads with the GIL released.
    fn fresh<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        len: u64,
        fill: impl FnOnce(&mut [u8]) -> Result<(), storage::Error> + Send,
    ) -> PyResult<Bound<'py, PyAny>> {
        if !self.adapter.reads {
            return self
                .adapter
                .tensor(py.None().bind(py), dtype, shape, 0, len);
        }
        let mut memory = self.memory(py, dtype, shape, len)?;
        let bytes = memory.as_mut_slice();
        py.detach(|| fill(bytes).map(|()| to_native(dtype, bytes)))
            .map_err(|e| unreadable(name, &e))?;
        self.finish(py, dtype, shape, memory, len)
    }

    /// Memory for a tensor's bytes in the file.
    fn memory(&self, py: Python<'_>, dtype: Dtype, shape: &[u64], len: u64) -> PyResult<Memory> {
        let size = in_memory(len)?;
        Ok(match self.adapter.empty(py, dtype, shape, size)? {
            Some((tensor, lent)) => Memory::Tensor(tensor.unbind(), lent),
            None => Memory::Owned(Owned::new(size)?),
        })
    }

    /// Makes the tensor of memory that was filled.
    fn finish<'py>(
        &self,
        py: Python<'py>,
        dtype: Dtype,
        shape: &[u64],
        memory: Memory,
        mut len: u64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut owned = match memory {
            Memory::Tensor(tensor, _) => return self.adapter.placed(tensor.into_bound(py)),
            Memory::Owned(owned) => owned,
        };
        if !self.adapter.packed && dtype.bitsize() < 8 {
            len = len * 8 / dtype.bitsize() as u64;
            let mut spread = Owned::new(in_memory(len)?)?;
            let (from, to) = (owned.as_mut_slice(), spread.as_mut_slice());
            py.detach(|| unpack(from, dtype.bitsize() as u32, to));
            owned = spread;
        }
        let buffer = Bound::new(py, Buffer::owned(owned))?;
        self.adapter.tensor(buffer.as_any(), dtype, shape, 0, len)
    }

    /// Every tensor by name, in the order of the file.
    pub fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        if let Some(all) = self.by_engine(py, None, u64::MAX)? {
            return Ok(all);
        }
        let all = PyDict::new(py);
        if self.map.is_some() || !self.adapter.reads || self.adapter.stages() {
            for info in self.header.iter_by_offset() {
                all.set_item(info.name, self.tensor(py, &info)?)?;
            }
            return Ok(all);
        }
        let infos: Vec<TensorInfo<'_>> = self.header.iter_by_offset().collect();
        let mut dtypes = Vec::with_capacity(infos.len());
        let mut memory = Vec::with_capacity(infos.len());
        for info in &infos {
            let dtype = self.dtype(py, info)?;
            dtypes.push(dtype);
            memory.push(self.memory(py, dtype, info.shape, info.byte_len())?);
        }
        py.detach(|| self.fill_all(&infos, &dtypes, &mut memory))?;
        for ((info, dtype), filled) in infos.iter().zip(dtypes).zip(memory) {
            let tensor = self.finish(py, dtype, info.shape, filled, info.byte_len())?;
            all.set_item(info.name, tensor)?;
        }
        Ok(all)
    }

    /// Reads every tensor into its memory.
    fn fill_all(
        &self,
        infos: &[TensorInfo<'_>],
        dtypes: &[Dtype],
        memory: &mut [Memory],
    ) -> PyResult<()> {
        let (source, start) = (&*self.source, self.header.data_start());
        let jobs = infos
            .iter()
            .zip(memory.iter_mut())
            .map(|(info, owned)| Read {
                source,
                offset: start + info.begin,
                dst: owned.as_mut_slice(),
            });
        engine::read(jobs.collect(), &engine::Options::default()).map_err(|e| match e {
            engine::Error::Storage { error, offset } => {
                let failed = infos.iter().find(|info| start + info.end > offset);
                unreadable(failed.map_or("", |info| info.name), &error)
            }
            engine::Error::Device(failed) => error::usage("DEVICE", &failed.to_string()),
            other => error::usage("CANCELLED", &other.to_string()),
        })?;
        for (filled, &dtype) in memory.iter_mut().zip(dtypes) {
            to_native(dtype, filled.as_mut_slice());
        }
        Ok(())
    }
}

fn check_device(framework: Framework, device: &Device) -> PyResult<()> {
    let named =
        framework.has_devices() && (*device != Device::Meta || framework == Framework::Torch);
    if *device == Device::Cpu || named {
        return Ok(());
    }
    let text = format!("Device {device} is not supported for framework {framework}");
    Err(error::argument("DEVICE", &text))
}

fn unreadable(name: &str, error: &storage::Error) -> PyErr {
    error::io(
        &format!("Could not read tensor {name} from file"),
        error,
        Some(name),
    )
}

fn in_memory(len: u64) -> PyResult<usize> {
    usize::try_from(len).map_err(|_| {
        pyo3::exceptions::PyMemoryError::new_err(format!("{len} bytes do not fit in memory"))
    })
}
