//! Sources that stand for parts of a local tensor, for devices: what no engine of a device copies, the host puts
//! together first.
//!
//! A transposed tensor is a run of one element a place; a device would copy them one by one. A [`Gathered`] is a
//! window of such a tensor: when the pipeline first reads of it, the window is put together in host memory, which is
//! free again when all of it has gone to the device.

use std::sync::{Arc, Mutex, PoisonError};

use tonnage_engine::HostBuffer;
use tonnage_plan::io::strided::Strided;
use tonnage_storage::{Error, Source, StorageKind};

/// Bytes that are read at a time.
const BLOCK: u64 = 1 << 20;

/// A part of a tensor that is put together when it is wanted.
#[derive(Debug)]
pub(crate) struct Gathered {
    label: String,
    len: u64,
    /// What it is made of; destinations count from its first byte.
    parts: Vec<(Arc<dyn Source>, Strided)>,
    memory: Mutex<Option<HostBuffer>>,
}

impl Gathered {
    /// The bytes `begin..end` of a tensor that these copies fill.
    pub fn new(copies: &[(Arc<dyn Source>, Strided)], begin: u64, end: u64) -> Self {
        let mut parts = Vec::new();
        for (source, copy) in copies {
            copy.within_dst(begin, end, &mut |mut part| {
                part.dst -= begin;
                parts.push((Arc::clone(source), part));
            });
        }
        Gathered {
            label: copies
                .first()
                .map_or(String::new(), |(source, _)| source.label().to_owned()),
            len: end - begin,
            parts,
            memory: Mutex::new(None),
        }
    }

    fn gather(&self) -> Result<HostBuffer, Error> {
        let mut memory = HostBuffer::new(self.len)?;
        let mut staging = HostBuffer::new(BLOCK)?;
        for (source, part) in &self.parts {
            let (mut begin, last) = (part.src, part.src_end());
            while begin < last {
                let end = last.min(begin + BLOCK);
                let mut cuts = Vec::new();
                part.within_src(begin, end, &mut |cut| cuts.push(cut));
                let bytes = (staging.as_mut_slice().get_mut(..(end - begin) as usize))
                    .filter(|_| !cuts.is_empty());
                if let Some(bytes) = bytes {
                    source.read_exact_at(begin, bytes)?;
                    for cut in cuts {
                        if !cut.copy(bytes, begin, memory.as_mut_slice(), 0) {
                            return Err(self.outside());
                        }
                    }
                }
                begin = end;
            }
        }
        Ok(memory)
    }

    fn outside(&self) -> Error {
        let text = std::io::Error::other("a copy of the plan leaves its tensor");
        Error::new("place bytes of", self.label.as_str(), text)
    }
}

impl Source for Gathered {
    fn label(&self) -> &str {
        &self.label
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = match &mut *memory {
            Some(memory) => memory,
            none => none.insert(self.gather()?),
        };
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = memory
            .as_slice()
            .get(begin..begin.saturating_add(dst.len()));
        dst.copy_from_slice(bytes.ok_or_else(|| self.outside())?);
        Ok(())
    }

    fn kind(&self) -> StorageKind {
        StorageKind::Memory
    }
}

/// Zeros, as many as anybody wants.
#[derive(Debug)]
pub(crate) struct Zeros;

impl Source for Zeros {
    fn label(&self) -> &str {
        "<zeros>"
    }

    fn len(&self) -> u64 {
        i64::MAX as u64
    }

    fn read_exact_at(&self, _: u64, dst: &mut [u8]) -> Result<(), Error> {
        dst.fill(0);
        Ok(())
    }

    fn kind(&self) -> StorageKind {
        StorageKind::Memory
    }
}
