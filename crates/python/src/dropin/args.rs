//! The arguments that say where tensors go: framework, device, backend.

use std::fmt;

use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::error;

/// Whose tensors are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framework {
    Torch,
    Numpy,
    TensorFlow,
    Jax,
    Mlx,
    Paddle,
}

impl Framework {
    /// The module of `tonnage._adapters` that makes its tensors.
    pub fn adapter(self) -> &'static str {
        match self {
            Framework::Torch => "torch",
            Framework::Numpy => "numpy",
            Framework::TensorFlow => "tensorflow",
            Framework::Jax => "jax",
            Framework::Mlx => "mlx",
            Framework::Paddle => "paddle",
        }
    }

    /// Whether its tensors can be put on a device by name.
    pub fn has_devices(self) -> bool {
        matches!(self, Framework::Torch | Framework::Paddle)
    }
}

impl fmt::Display for Framework {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The reference's names, which its messages show.
        f.write_str(match self {
            Framework::Torch => "pytorch",
            Framework::Jax => "flax",
            other => other.adapter(),
        })
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Framework {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let name: String = object.extract()?;
        Ok(match name.as_str() {
            "pt" | "torch" | "pytorch" => Framework::Torch,
            "np" | "numpy" => Framework::Numpy,
            "tf" | "tensorflow" => Framework::TensorFlow,
            "jax" | "flax" => Framework::Jax,
            "mlx" => Framework::Mlx,
            "paddle" => Framework::Paddle,
            _ => {
                let text = format!("framework {name} is invalid");
                return Err(error::argument("FRAMEWORK", &text));
            }
        })
    }
}

/// Where a tensor goes. The framework gives the name its meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// No memory at all: shapes and dtypes only.
    Meta,
    /// A device by its name, with or without an index: `cuda`, `cuda:1`, `mps`.
    Named(&'static str, Option<usize>),
    /// The accelerator of this index, whichever kind the framework finds.
    Index(usize),
}

/// Kinds that take an index; `mps` is the one that has a single device.
const KINDS: [&str; 11] = [
    "cuda", "mps", "npu", "xpu", "xla", "mlu", "musa", "hpu", "rocm", "vulkan", "metal",
];

impl Device {
    fn parse(name: &str) -> PyResult<Self> {
        let invalid =
            |why: &str| error::argument("DEVICE", &format!("device {name} is invalid{why}"));
        let (kind, index) = match name.split_once(':') {
            Some((kind, index)) => (kind, Some(index)),
            None => (name, None),
        };
        match (kind, index) {
            ("cpu", None) => return Ok(Device::Cpu),
            ("meta", None) => return Ok(Device::Meta),
            _ => {}
        }
        let Some(&kind) = KINDS.iter().find(|&&known| known == kind) else {
            return Err(invalid(""));
        };
        let index = match index {
            None => None,
            Some(text) => Some(text.parse().map_err(|e| invalid(&format!(": {e}")))?),
        };
        if kind == "mps" && index.is_some_and(|index| index != 0) {
            return Err(invalid(": only mps or mps:0 is supported"));
        }
        Ok(Device::Named(kind, index))
    }

    /// The device as the adapters take it: a string, or a number.
    pub fn to_python<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(match self {
            Device::Index(index) => index.into_pyobject(py)?.into_any(),
            Device::Named("mps", _) => PyString::new(py, "mps").into_any(),
            Device::Named(kind, None) => PyString::new(py, kind).into_any(),
            other => PyString::new(py, &other.to_string()).into_any(),
        })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Meta => f.write_str("meta"),
            Device::Named("mps", _) => f.write_str("mps"),
            Device::Named(kind, index) => write!(f, "{kind}:{}", index.unwrap_or(0)),
            Device::Index(index) => write!(f, "{index}"),
        }
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Device {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(name) = object.extract::<String>() {
            return Device::parse(&name);
        }
        if let Ok(index) = object.extract::<usize>() {
            return Ok(Device::Index(index));
        }
        // `torch.device("cuda:0")` prints as its name.
        if object.get_type().name()? == "device" {
            return Device::parse(&object.str()?.to_cow()?);
        }
        let text = format!("device {} is invalid", object.repr()?.to_cow()?);
        Err(error::argument("DEVICE", &text))
    }
}

/// How tensor bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Tensors that can view the mapped file do so; others are read.
    Mmap,
    /// Every tensor is read by `pread`, exactly as many bytes as asked for.
    Pread,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Backend {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let name: String = object.extract()?;
        match name.as_str() {
            "mmap" => Ok(Backend::Mmap),
            "pread" => Ok(Backend::Pread),
            _ => {
                let text =
                    format!("backend {name:?} is invalid (expected one of: \"mmap\", \"pread\")");
                Err(error::argument("BACKEND", &text))
            }
        }
    }
}
