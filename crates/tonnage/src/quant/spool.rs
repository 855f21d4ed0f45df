//! Tensors that are made before a checkpoint can be laid out: a file of its own beside the target, gone in the end.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tonnage_format::Dtype;
use tonnage_storage::{self as storage, Durability};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::save::{Save, TensorData};
use crate::writer::Writer;

/// A folder that goes when it is dropped.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

/// Tensors on the disk that are not a checkpoint yet.
#[derive(Debug)]
pub(crate) struct Made {
    writer: Writer<'static>,
    folder: Folder,
    any: bool,
}

/// What was made, to be read from.
#[derive(Debug)]
pub(crate) struct Ready {
    /// The tensors; none where nothing was made.
    pub checkpoint: Option<Checkpoint>,
    _folder: Folder,
}

impl Made {
    /// Room beside a target, on its own file system.
    pub fn beside(target: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let (pid, no) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(format!(".tonnage-{pid}-{no}"));
        std::fs::create_dir_all(&path).map_err(|e| storage::Error::at("create", &path, e))?;
        let folder = Folder(path);
        let save = Save {
            durability: Durability::None,
            ..Save::default()
        };
        Ok(Made {
            writer: Writer::create(folder.0.join("made.safetensors"), &save)?,
            folder,
            any: false,
        })
    }

    /// Adds a tensor.
    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[u64], data: &[u8]) -> Result<()> {
        self.any = true;
        self.writer.add(&TensorData {
            name,
            dtype,
            shape,
            data,
        })
    }

    /// Starts a tensor that comes in pieces.
    pub fn begin(&mut self, name: &str, dtype: Dtype, shape: &[u64]) -> Result<()> {
        self.any = true;
        self.writer.begin(name, dtype, shape)
    }

    /// The next piece.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write(bytes)
    }

    /// Completes the tensor.
    pub fn end(&mut self) -> Result<()> {
        self.writer.end()
    }

    /// What was made.
    pub fn ready(self) -> Result<Ready> {
        let checkpoint = if self.any {
            self.writer.finish()?;
            Some(Checkpoint::open(self.folder.0.join("made.safetensors"))?)
        } else {
            None
        };
        Ok(Ready {
            checkpoint,
            _folder: self.folder,
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left behind is hidden, and of no checkpoint.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
