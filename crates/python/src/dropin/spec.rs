//! `TensorSpec`: a tensor to be written, as dtype, shape and address.

use pyo3::prelude::*;
use tonnage::format::Dtype;

use crate::buffer::Foreign;
use crate::error;

/// A tensor to be written: what `serialize` and `serialize_file` take.
///
/// `dtype` is a framework's name such as `"float32"`, `"bfloat16"` or `"float4_e2m1fn_x2"`. The last packs
/// two elements a byte, so the last extent of its `shape` is doubled to count elements.
///
/// `data_ptr` is a memory address. Whoever makes a spec answers for `data_len` bytes from there being
/// readable and unchanged until the call that takes it has returned; a wrong address is undefined behaviour.
#[pyclass(frozen, module = "tonnage._native")]
#[derive(Clone, Debug)]
pub struct TensorSpec {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    data_ptr: u64,
    data_len: usize,
}

impl TensorSpec {
    /// The bytes, if there is an address.
    pub fn data(&self) -> Option<Foreign> {
        Foreign::new(self.data_ptr, self.data_len)
    }

    /// How many bytes.
    pub fn byte_len(&self) -> usize {
        self.data_len
    }
}

/// The dtype of a framework's name, and whether that name counts pairs.
fn dtype_of(name: &str) -> PyResult<(Dtype, bool)> {
    let rows = || Dtype::ALL.iter().map(|dtype| dtype.row());
    if let Some(row) = rows().find(|row| row.torch == Some(name)) {
        return Ok((row.dtype, row.bits == 4));
    }
    if let Some(row) = rows().find(|row| row.ml_dtypes == Some(name)) {
        return Ok((row.dtype, false));
    }
    let known: Vec<&str> = rows()
        .filter_map(|row| row.torch.or(row.ml_dtypes))
        .collect();
    let text = format!(
        "Unknown dtype {name:?}. Supported dtypes: {}",
        known.join(", ")
    );
    Err(error::argument("UNSUPPORTED_DTYPE", &text))
}

#[pymethods]
impl TensorSpec {
    #[new]
    #[pyo3(signature = (*, dtype, shape, data_ptr, data_len))]
    fn new(dtype: &str, mut shape: Vec<u64>, data_ptr: u64, data_len: usize) -> PyResult<Self> {
        let (dtype, pairs) = dtype_of(dtype)?;
        if let Some(last) = shape.last_mut().filter(|_| pairs) {
            *last = last.checked_mul(2).ok_or_else(|| {
                error::argument("WRITE_SIZE", "the last extent of an F4 tensor overflows")
            })?;
        }
        Ok(TensorSpec {
            dtype,
            shape,
            data_ptr,
            data_len,
        })
    }

    /// The dtype's name in a header, e.g. `"F32"`.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    /// The extents in elements.
    #[getter]
    fn shape(&self) -> Vec<u64> {
        self.shape.clone()
    }

    /// The address of the bytes.
    #[getter]
    fn data_ptr(&self) -> u64 {
        self.data_ptr
    }

    /// How many bytes.
    #[getter]
    fn data_len(&self) -> usize {
        self.data_len
    }

    fn __repr__(&self) -> String {
        let TensorSpec {
            dtype,
            shape,
            data_ptr,
            data_len,
        } = self;
        format!(
            "TensorSpec(dtype='{dtype}', shape={shape:?}, data_ptr={data_ptr}, data_len={data_len})"
        )
    }
}
