//! What a checkpoint is opened from: paths, `bytes`, file descriptors, Python objects that can be read.

use std::path::Path;
use std::sync::{Arc, Mutex};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::PyBytes;
use tonnage::storage::{Error, FileSource, MemorySource, Source};

use crate::buffer::{PinnedBytes, duplicate};
use crate::paved::failure;

/// Most bytes asked of an object in one call, so that its answers do not pile up in memory.
const PIECE: usize = 8 << 20;

/// A Python object with `read_at(offset, length) -> bytes`. One call at a time: file objects have one
/// position.
#[derive(Debug)]
struct ObjectSource {
    object: Py<PyAny>,
    calls: Mutex<()>,
    label: String,
    len: u64,
}

impl ObjectSource {
    fn read_piece(&self, offset: u64, dst: &mut [u8]) -> PyResult<usize> {
        Python::attach(|py| {
            let _one_at_a_time = self.calls.lock_py_attached(py);
            let read_at = intern!(py, "read_at");
            let answer = self
                .object
                .bind(py)
                .call_method1(read_at, (offset, dst.len()))?;
            let bytes = answer.cast::<PyBytes>()?.as_bytes();
            let len = bytes.len().min(dst.len());
            dst[..len].copy_from_slice(&bytes[..len]);
            Ok(len)
        })
    }
}

impl Source for ObjectSource {
    fn label(&self) -> &str {
        &self.label
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, mut offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        for piece in dst.chunks_mut(PIECE) {
            let found = self.read_piece(offset, piece).map_err(|raised| {
                Error::new("read", self.label.as_str(), std::io::Error::other(raised))
            })?;
            if found < piece.len() {
                let end = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                return Err(Error::new("read", self.label.as_str(), end));
            }
            offset = offset.saturating_add(piece.len() as u64);
        }
        Ok(())
    }
}

/// One source as the Python half describes it: kind, object, label.
pub type Described<'py> = (String, Bound<'py, PyAny>, String);

/// Makes the source, and says whether reading it runs Python code.
pub fn make(described: Described<'_>) -> PyResult<(Arc<dyn Source>, bool)> {
    let (kind, object, label) = described;
    let refused = |e: Error| failure::raise(&e.into());
    Ok(match kind.as_str() {
        "path" => {
            let path: String = object.extract()?;
            (
                Arc::new(FileSource::open(Path::new(&path)).map_err(refused)?),
                false,
            )
        }
        "bytes" => {
            let owner = Arc::new(PinnedBytes::new(object.cast::<PyBytes>()?));
            (Arc::new(MemorySource::from_owner(owner, label)), false)
        }
        "fd" => {
            let file = duplicate(object.extract()?).map_err(|e| {
                refused(Error::new("duplicate the descriptor of", label.as_str(), e))
            })?;
            (
                Arc::new(FileSource::from_file(file, label).map_err(refused)?),
                false,
            )
        }
        _ => {
            let len = object.getattr(intern!(object.py(), "length"))?.extract()?;
            let (object, calls) = (object.unbind(), Mutex::new(()));
            (
                Arc::new(ObjectSource {
                    object,
                    calls,
                    label,
                    len,
                }),
                true,
            )
        }
    })
}
