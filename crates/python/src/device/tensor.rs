//! A tensor in a device's memory that belongs to no framework: what others make theirs of, without a copy.

use std::sync::Arc;

use pyo3::exceptions::{PyAttributeError, PyBufferError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use tonnage::device::dlpack::{RawDtype, Tensor};
use tonnage::device::{Device, DeviceId, Kind, Memory, Pool};
use tonnage::engine::{self, Downloads};
use tonnage::{DeviceData, Dtype};

use super::dlpack::export;
use super::memory::Region;
use crate::paved::failure::{raise, usage};

/// Copies bytes of a device to the host, through the process's staging memory.
pub fn fetch(data: &DeviceData<'_>, dst: &mut [u8]) -> Result<(), engine::Error> {
    downloads(data).read(data.memory, data.offset, dst)
}

/// What brings bytes of a device back.
pub fn downloads(data: &DeviceData<'_>) -> Downloads {
    let (device, pool) = (Arc::clone(data.device), Arc::clone(Pool::global()));
    let after = data.after.into_iter().collect();
    Downloads::new(device, pool, after, engine::Cancel::new())
}

/// A tensor in DLPack's terms.
pub fn show(memory: &Memory, offset: u64, dtype: Dtype, shape: &[u64]) -> PyResult<Tensor> {
    let lacking = || PyBufferError::new_err(format!("DLPack has no dtype for {dtype}"));
    let (code, bits, lanes) = dtype.row().dlpack.ok_or_else(lacking)?;
    let mut shape = shape.to_vec();
    // Lanes are elements that a unit packs, along the last dimension.
    if let (Some(last), true) = (shape.last_mut(), lanes > 1) {
        if !last.is_multiple_of(lanes.into()) {
            let text = format!("rows of {last} elements of {dtype} end within a byte");
            return Err(PyBufferError::new_err(text));
        }
        *last /= u64::from(lanes);
    }
    let dtype = RawDtype { code, bits, lanes };
    Tensor::new(Arc::clone(memory), offset, dtype, &shape).map_err(|e| raise(&e.into()))
}

/// A tensor in a device's memory.
///
/// PyTorch, CuPy, JAX and others take it by DLPack (`torch.from_dlpack(tensor)`) or, on NVIDIA and AMD, by
/// `__cuda_array_interface__`, without a copy; the memory is freed when the last of them lets go.
#[pyclass(frozen, name = "DeviceTensor", module = "tonnage")]
#[derive(Debug)]
pub struct DeviceTensor {
    pub device: Arc<dyn Device>,
    pub memory: Memory,
    pub offset: u64,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub nbytes: u64,
}

impl DeviceTensor {
    fn id(&self) -> DeviceId {
        self.memory.device()
    }

    /// A tensor in some memory, which has to have room for it.
    pub fn within(region: &Region, offset: u64, dtype: Dtype, shape: Vec<u64>) -> PyResult<Self> {
        let wrong = || usage("WRITE_SIZE", "the tensor does not lie within its memory");
        let bits = dtype.bits_of(&shape).ok_or_else(wrong)?;
        let nbytes = bits.div_ceil(8);
        let end = offset.checked_add(nbytes).ok_or_else(wrong)?;
        if end > region.memory.len() {
            return Err(wrong());
        }
        Ok(DeviceTensor {
            device: Arc::clone(&region.device),
            memory: Arc::clone(&region.memory),
            offset,
            dtype,
            shape,
            nbytes,
        })
    }

    /// The tensor in DLPack's terms.
    fn shown(&self) -> PyResult<Tensor> {
        show(&self.memory, self.offset, self.dtype, &self.shape)
    }

    /// Its bytes, for whoever writes them.
    pub fn data(&self) -> DeviceData<'_> {
        DeviceData {
            device: &self.device,
            memory: &self.memory,
            offset: self.offset,
            after: None,
        }
    }
}

#[pymethods]
impl DeviceTensor {
    #[new]
    fn new(region: &Region, offset: u64, dtype: &str, shape: Vec<u64>) -> PyResult<Self> {
        let dtype = Dtype::from_name(dtype).ok_or_else(|| usage("DTYPE", dtype))?;
        Self::within(region, offset, dtype, shape)
    }

    /// Its dtype as a header spells it, such as `"BF16"`.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    /// Its extents, in elements.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// How many dimensions.
    #[getter]
    fn ndim(&self) -> usize {
        self.shape.len()
    }

    /// How many elements.
    #[getter]
    fn size(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes it takes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// The device's name, such as `"cuda:0"`.
    #[getter]
    fn device(&self) -> String {
        self.id().to_string()
    }

    /// Its address on the device; where memory has no addresses (Vulkan, Metal), the driver's handle of the
    /// buffer that holds it.
    #[getter]
    fn data_ptr(&self) -> u64 {
        match self.id().kind {
            Kind::Vulkan | Kind::Metal => self.memory.address(),
            _ => self.memory.address().wrapping_add(self.offset),
        }
    }

    /// Where it begins in the driver's buffer, for devices whose memory has no addresses; else 0.
    #[getter]
    fn byte_offset(&self) -> u64 {
        match self.id().kind {
            Kind::Vulkan | Kind::Metal => self.offset,
            _ => 0,
        }
    }

    fn __len__(&self) -> PyResult<usize> {
        let missing = || pyo3::exceptions::PyTypeError::new_err("a tensor of no dimensions");
        Ok(usize::try_from(*self.shape.first().ok_or_else(missing)?)?)
    }

    /// `(device type, number)` as DLPack counts.
    fn __dlpack_device__(&self) -> (i32, u32) {
        (self.id().kind.dlpack(), self.id().index)
    }

    /// The tensor as a DLPack capsule. Its bytes are there already, so that no stream has to wait.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, u32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let _ = stream;
        if dl_device.is_some_and(|wanted| wanted != self.__dlpack_device__()) || copy == Some(true)
        {
            let text = "a DeviceTensor is handed over where it is; numpy() brings it to the host";
            return Err(PyBufferError::new_err(text));
        }
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        export(py, self.shown()?, versioned)
    }

    /// What CuPy, Numba and others look for, on NVIDIA and AMD.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let row = self.dtype.row();
        let numpy = row
            .numpy
            .filter(|_| matches!(self.id().kind, Kind::Cuda | Kind::Rocm));
        let Some(_) = numpy else {
            let text = format!(
                "a {} tensor on {} has no __cuda_array_interface__",
                row.name,
                self.id()
            );
            return Err(PyAttributeError::new_err(text));
        };
        let kind = match row.kind {
            tonnage::format::Kind::Bool => 'b',
            tonnage::format::Kind::Int => 'i',
            tonnage::format::Kind::UInt => 'u',
            tonnage::format::Kind::Float => 'f',
            tonnage::format::Kind::Complex => 'c',
        };
        let order = if row.bits == 8 { '|' } else { '<' };
        let interface = PyDict::new(py);
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("typestr", format!("{order}{kind}{}", row.bits / 8))?;
        interface.set_item("data", (self.data_ptr(), false))?;
        interface.set_item("strides", py.None())?;
        interface.set_item("version", 3)?;
        Ok(interface)
    }

    /// Its bytes, brought to the host.
    fn tobytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let len = usize::try_from(self.nbytes)?;
        PyBytes::new_with(py, len, |bytes| {
            py.detach(|| fetch(&self.data(), bytes))
                .map_err(|error| raise(&error.into()))
        })
    }

    /// Its elements as a NumPy array on the host, with `ml_dtypes` for the dtypes that NumPy lacks.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let module = slf.py().import("tonnage._arrays")?;
        module.getattr("numpy_of")?.call1((slf,))
    }

    #[pyo3(signature = (dtype = None, copy = None))]
    fn __array__<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if copy == Some(false) {
            let text = "a tensor on a device can't become an array without a copy";
            return Err(pyo3::exceptions::PyValueError::new_err(text));
        }
        let array = Self::numpy(slf)?;
        match dtype {
            Some(dtype) => array.call_method1("astype", (dtype,)),
            None => Ok(array),
        }
    }

    fn __repr__(&self) -> String {
        let (dtype, shape, id) = (self.dtype, &self.shape, self.id());
        format!("DeviceTensor({dtype}, {shape:?}, {id})")
    }
}
