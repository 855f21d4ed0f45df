//! The file of a [`crate::Writer`] whose header is not known until its last tensor has come.

use tonnage_engine::checksum::Sums;
use tonnage_engine::{self as engine, Put};
use tonnage_format::{Checksums, Dtype, Order, TensorSpec, WriteOptions};
use tonnage_storage::{AtomicFile, AtomicOptions, FileSource, Sink, Staged};

use crate::checksums::{finished, hash_of};
use crate::error::Result;
use crate::publish::{Part, hidden_file};
use crate::save::{Save, Target, data_len, layout_of};

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
    /// Fed with what comes, if the file is to have checksums.
    pub sums: Option<Sums>,
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
            // How much will come is known when nothing more does.
            sums: save.checksums.then(|| Sums::new(ROOM, u64::MAX)),
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
        let sums = self.sums.as_ref().map(|sums| finished(sums, self.end));
        let sums: Option<Checksums> = sums.transpose()?;
        let layout = layout_of(&specs, save, &given, sums.as_ref())?;
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
            stage(self.file, save)?
        } else {
            self.copy_out(&specs, target, save)?
        };
        let (staged, hash) = staged;
        let sizes = self.ranges.iter().map(|(begin, end)| end - begin);
        let tensors = self
            .tensors
            .iter()
            .map(|(name, ..)| name.clone())
            .zip(sizes)
            .collect();
        Ok(Part {
            staged,
            tensors,
            hash,
        })
    }

    fn copy_out(
        &self,
        specs: &[TensorSpec<'_>],
        target: &Target,
        save: &Save<'_>,
    ) -> Result<(Staged, Option<[u8; 32]>)> {
        let layout = layout_of(specs, save, &save.write, None)?;
        let file = fresh_file(target, save)?;
        file.reserve(layout.file_len)?;
        file.set_len(layout.file_len)?;
        let start = layout.data_start();
        let sums = save.checksums.then(|| Sums::new(start, data_len(&layout)));
        let clone = self.file.file().try_clone();
        let clone = clone.map_err(|e| tonnage_storage::Error::new("read", self.file.label(), e))?;
        let source = FileSource::from_file(clone, self.file.label())?;
        let puts: Vec<Put<'_>> = self
            .ranges
            .iter()
            .zip(&layout.ranges)
            .map(|(&(from, end), &(to, _))| {
                Put::source(start + to, &source, ROOM + from, end - from)
            })
            .collect();
        let options = engine::Options {
            threads: save.threads,
            cancel: save.cancel,
            ..Default::default()
        };
        engine::put(&file, &puts, sums.as_ref(), &options)?;
        let sums = sums.map(|sums| finished(&sums, data_len(&layout)));
        let sealed = layout_of(specs, save, &save.write, sums.transpose()?.as_ref())?;
        file.write_all_at(0, &sealed.header)?;
        stage(file, save)
    }
}

/// Completes a file, and hashes it if it is to have a sidecar.
pub(crate) fn stage(file: AtomicFile, save: &Save<'_>) -> Result<(Staged, Option<[u8; 32]>)> {
    let options = engine::Options {
        threads: save.threads,
        cancel: save.cancel,
        ..Default::default()
    };
    let hash = save.sidecar.then(|| hash_of(&file, &options)).transpose()?;
    Ok((file.stage()?, hash))
}
