//! The file of a [`crate::Writer`] whose header is not known until its last tensor has come.

use tonnage_engine as engine;
use tonnage_format::{Dtype, Order, TensorSpec, WriteOptions};
use tonnage_storage::{AtomicFile, AtomicOptions, FileSource, Sink, Staged};

use crate::error::Result;
use crate::publish::{Part, hidden_file};
use crate::save::{Save, Target, layout_of};

/// Bytes left free for a header that is not known yet: about 2,500 tensors with usual names.
pub const ROOM: u64 = 256 << 10;
/// Files with less data than this are always laid out as `save` does it: copying them is cheap.
pub const SMALL: u64 = 64 << 20;
#[derive(Debug)]
pub(crate) struct Spool {
    pub file: AtomicFile,
    pub tensors: Vec<(String, Dtype, Vec<u64>)>,
    pub ranges: Vec<(u64, u64)>,
    pub end: u64,
}

/// A new file: under its own name where there can be only one, which also follows a symbolic link.
pub(crate) fn fresh_file(target: &Target, save: &Save<'_>) -> Result<AtomicFile> {
    let durability = save.durability;
    match (&target.file, save.max_shard_size) {
        (Some(path), None) => Ok(AtomicFile::create(
            path,
            &AtomicOptions {
                durability,
                ..Default::default()
            },
        )?),
        _ => hidden_file(&target.folder, &target.stem, durability),
    }
}

impl Spool {
    /// An empty file.
    pub fn start(target: &Target, save: &Save<'_>) -> Result<Spool> {
        Ok(Spool {
            file: fresh_file(target, save)?,
            tensors: Vec::new(),
            ranges: Vec::new(),
            end: 0,
        })
    }

    /// Puts the header where there is room for it, or the data where it should be.
    pub fn close(self, target: &Target, save: &Save<'_>) -> Result<Part> {
        let specs: Vec<TensorSpec<'_>> = self
            .tensors
            .iter()
            .map(|(name, dtype, shape)| TensorSpec {
                name,
                dtype: *dtype,
                shape,
            })
            .collect();
        let given = WriteOptions {
            order: Order::Given,
            ..save.write
        };
        let layout = layout_of(&specs, &save.metadata, &given)?;
        let straight = specs.iter().zip(&self.ranges).all(|(spec, (begin, _))| {
            // A complex number is as aligned as its parts.
            begin * 8 % (spec.dtype.bitsize() as u64).clamp(8, 64) == 0
        });
        let staged = if self.end >= SMALL && straight && layout.data_start() <= ROOM {
            let mut header = layout.header;
            header.resize(ROOM as usize, b' ');
            header[..8].copy_from_slice(&(ROOM - 8).to_le_bytes());
            self.file.write_all_at(0, &header)?;
            self.file.set_len(ROOM + self.end)?;
            self.file.stage()?
        } else {
            self.copy_out(&specs, target, save)?
        };
        let sizes = self.ranges.iter().map(|(begin, end)| end - begin);
        let tensors = self
            .tensors
            .iter()
            .map(|(name, ..)| name.clone())
            .zip(sizes)
            .collect();
        Ok(Part { staged, tensors })
    }

    fn copy_out(
        &self,
        specs: &[TensorSpec<'_>],
        target: &Target,
        save: &Save<'_>,
    ) -> Result<Staged> {
        let layout = layout_of(specs, &save.metadata, &save.write)?;
        let file = fresh_file(target, save)?;
        file.reserve(layout.file_len)?;
        file.set_len(layout.file_len)?;
        file.write_all_at(0, &layout.header)?;
        let clone = self.file.file().try_clone();
        let clone = clone.map_err(|e| tonnage_storage::Error::new("read", self.file.label(), e))?;
        let source = FileSource::from_file(clone, self.file.label())?;
        let copies: Vec<engine::Copy<'_>> = self
            .ranges
            .iter()
            .zip(&layout.ranges)
            .map(|(&(from, end), &(to, _))| engine::Copy {
                source: &source,
                from: ROOM + from,
                to: layout.data_start() + to,
                len: end - from,
            })
            .collect();
        let options = engine::Options {
            threads: save.threads,
            cancel: save.cancel,
            ..Default::default()
        };
        engine::copy(&file, &copies, &options)?;
        Ok(file.stage()?)
    }
}
