//! An adapter: the one way to make a framework's tensor out of a buffer, a dtype and a shape.
//!
//! The Python half is one small class a framework, `tonnage._adapters.<name>.Adapter(device)`:
//!
//! | member | meaning |
//! |---|---|
//! | `dtype(name)` | the framework's dtype for a header's dtype name, or `SafetensorError` |
//! | `tensor(buffer, dtype, shape, offset, nbytes)` | the tensor; `buffer` is `None` where `reads` is false |
//! | `ndarray` | `None`, or what `tensor` does, called as NumPy's `ndarray(shape, dtype, buffer, offset)` |
//! | `maps` | tensors may view the mapped file |
//! | `reads` | tensors have bytes (false for `torch`'s meta device) |
//! | `packed` | sub-byte elements stay packed, and `shape` counts packed units; else one element a byte |
//! | `indexes` | `tensor[key]` works for any key, with Python's bounds |
//! | `empty` | `None`, or `empty(dtype, shape)`: a tensor to read into and its address; page-locked for a GPU |
//! | `placed` | `None`, or `placed(tensor)`: such a tensor, once filled, on its device |

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use tonnage::format::Dtype;

use super::args::{Device, Framework};
use crate::buffer::Lent;
use crate::error;

/// Its Python object's members, fetched once.
pub struct Adapter {
    object: Py<PyAny>,
    tensor: Py<PyAny>,
    ndarray: Option<Py<PyAny>>,
    empty: Option<Py<PyAny>>,
    placed: Option<Py<PyAny>>,
    /// Tensors may view the mapped file.
    pub maps: bool,
    /// Tensors have bytes.
    pub reads: bool,
    /// Sub-byte elements stay packed.
    pub packed: bool,
    /// The framework can index a tensor by any key.
    pub indexes: bool,
    /// The framework's dtypes, fetched when first needed, in the order of the table.
    dtypes: Vec<PyOnceLock<Py<PyAny>>>,
}

impl Adapter {
    /// The adapter of a framework for tensors on a device. Imports the framework.
    pub fn new(py: Python<'_>, framework: Framework, device: &Device) -> PyResult<Self> {
        let module = py.import(format!("tonnage._adapters.{}", framework.adapter()).as_str())?;
        let device = device.to_python(py)?;
        let object = module.getattr(intern!(py, "Adapter"))?.call1((device,))?;
        let flag = |name: &str| object.getattr(name)?.extract::<bool>();
        let optional = |name: &str| -> PyResult<Option<Py<PyAny>>> {
            let member = object.getattr(name)?;
            Ok((!member.is_none()).then(|| member.unbind()))
        };
        Ok(Adapter {
            tensor: object.getattr(intern!(py, "tensor"))?.unbind(),
            ndarray: optional("ndarray")?,
            empty: optional("empty")?,
            placed: optional("placed")?,
            maps: flag("maps")?,
            reads: flag("reads")?,
            packed: flag("packed")?,
            indexes: flag("indexes")?,
            dtypes: Dtype::ALL.iter().map(|_| PyOnceLock::new()).collect(),
            object: object.unbind(),
        })
    }

    fn dtype<'py>(&self, py: Python<'py>, dtype: Dtype) -> PyResult<&Bound<'py, PyAny>> {
        let make = || {
            self.object
                .call_method1(py, intern!(py, "dtype"), (dtype.name(),))
        };
        let found = self.dtypes[dtype as usize].get_or_try_init(py, make)?;
        Ok(found.bind(py))
    }

    /// Refuses a dtype that the framework lacks before anything is read for it.
    pub fn check(&self, py: Python<'_>, dtype: Dtype) -> PyResult<()> {
        self.dtype(py, dtype).map(|_| ())
    }

    /// A tensor of `len` bytes to read into, where the framework makes them itself; `shape` counts elements.
    pub fn empty<'py>(
        &self,
        py: Python<'py>,
        dtype: Dtype,
        shape: &[u64],
        len: usize,
    ) -> PyResult<Option<(Bound<'py, PyAny>, Lent)>> {
        let Some(empty) = self.empty.as_ref().filter(|_| len > 0) else {
            return Ok(None);
        };
        let shape = self.shape(py, dtype, shape)?;
        let made = empty.bind(py).call1((self.dtype(py, dtype)?, shape))?;
        let (tensor, address): (Bound<'py, PyAny>, usize) = made.extract()?;
        let missing = || error::usage("DEVICE", "the framework gave no memory");
        let lent = Lent::new(address, len).ok_or_else(missing)?;
        Ok(Some((tensor, lent)))
    }

    /// The tensor that [`Adapter::empty`] gave, now that it is filled.
    pub fn placed<'py>(&self, tensor: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        match &self.placed {
            Some(placed) => placed.bind(tensor.py()).call1((tensor,)),
            None => Ok(tensor),
        }
    }

    /// Whether host memory is only on the way: one tensor at a time, then.
    pub fn stages(&self) -> bool {
        self.placed.is_some()
    }

    /// The shape as the framework counts it.
    fn shape<'py>(
        &self,
        py: Python<'py>,
        dtype: Dtype,
        shape: &[u64],
    ) -> PyResult<Bound<'py, PyTuple>> {
        if self.packed && dtype == Dtype::F4 {
            return PyTuple::new(py, halve(shape)?);
        }
        PyTuple::new(py, shape)
    }

    /// The tensor whose bytes are `buffer[offset..offset + len]`; `shape` counts elements.
    pub fn tensor<'py>(
        &self,
        buffer: &Bound<'py, PyAny>,
        dtype: Dtype,
        shape: &[u64],
        offset: u64,
        len: u64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = buffer.py();
        let shape = self.shape(py, dtype, shape)?;
        let dtype = self.dtype(py, dtype)?;
        if let Some(ndarray) = &self.ndarray {
            return ndarray.bind(py).call1((shape, dtype, buffer, offset));
        }
        self.tensor
            .bind(py)
            .call1((buffer, dtype, shape, offset, len))
    }
}

/// The shape of an `F4` tensor in pairs of elements.
fn halve(shape: &[u64]) -> PyResult<Vec<u64>> {
    match shape.split_last() {
        Some((last, outer)) if last % 2 == 0 => {
            let mut shape = outer.to_vec();
            shape.push(last / 2);
            Ok(shape)
        }
        _ => {
            let text = format!(
                "f4_x2 dtype requires that the last dim be divisible by 2 in torch: got {shape:?}"
            );
            Err(error::usage("PARTIAL_BYTE", &text))
        }
    }
}
