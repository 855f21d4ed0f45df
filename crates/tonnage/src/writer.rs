//! Writing tensor by tensor: checkpoints larger than memory.
//!
//! A safetensors file begins with its header, which needs every name and shape. There are two ways out:
//!
//! * [`Writer::declared`] is told all of them first. Files are laid out as `save` lays them out, tensors
//!   may come in any order, and every byte is written once.
//! * [`Writer::create`] is told each tensor when it comes. Data goes into the file as it comes, after
//!   [`ROOM`] bytes left free for the header. When the file is complete and the header fits and no tensor
//!   came to lie askew, the header is put there, padded with spaces (spec 9.8). Otherwise, and for files
//!   below [`SMALL`], the data is copied once into a file laid out as `save` does it.
//!
//! Either way memory holds names and shapes, never data, and a file is completed and synced as soon as
//! it is full. Large pieces go to the disk as those of `save` do, from a few staging blocks. Nothing is visible before [`Writer::finish`]; a writer that is dropped leaves nothing.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use tonnage_engine::checksum::Sums;
use tonnage_engine::{self as engine, Origin, Put};
use tonnage_format::{self as format, Dtype, Reason, TensorSpec, WriteOptions};
use tonnage_storage::{AtomicFile, Sink, Staged};

use crate::checksums::finished;
use crate::error::{Error, Result};
use crate::publish::{Part, publish, sweep};
use crate::save::{
    Backs, Content, DeviceData, Item, Save, Saved, Target, TensorData, byte_len, commit_one,
    data_len, layout_of,
};
use crate::shards::split;
use crate::spool::{ROOM, Spool, fresh_file, stage};

/// Bytes after which the disk may start with what was written.
const WRITEBACK: u64 = 8 << 20;
/// Bytes that are written in one run: enough for several threads, and soon enough over to be cancelled.
const RUN: usize = 64 << 20;
/// Pieces of this size are worth a run, and tensors of it are given room before they come.
const LARGE: u64 = 8 << 20;

/// Writes a checkpoint tensor by tensor.
#[derive(Debug)]
pub struct Writer<'a> {
    save: Save<'a>,
    target: Target,
    start: Instant,
    known: HashMap<String, Place>,
    /// Declared files, or none.
    declared: Vec<Declared>,
    /// The file being filled, and the one of a tensor too large for it.
    current: Option<Spool>,
    own: Option<Spool>,
    parts: Vec<Part>,
    open: Option<Open>,
    total: u64,
    failed: bool,
}

/// Where a tensor is to be written, if that is known beforehand.
#[derive(Clone, Debug)]
enum Place {
    Written,
    Declared { shard: usize, tensor: usize },
}

#[derive(Debug)]
struct Declared {
    tensors: Vec<(String, Dtype, Vec<u64>)>,
    layout: format::Layout,
    file: Option<AtomicFile>,
    sums: Option<Sums>,
    left: usize,
    staged: Option<(Staged, Option<[u8; 32]>)>,
}

#[derive(Debug)]
struct Open {
    name: String,
    /// The declared file it goes to; otherwise a spool.
    shard: Option<usize>,
    own: bool,
    offset: u64,
    left: u64,
    unsynced: u64,
}

impl<'a> Writer<'a> {
    /// Starts a checkpoint whose tensors are not known yet. The path means what it means for `save`.
    ///
    /// # Errors
    /// What the system said about the folder.
    pub fn create(path: impl AsRef<Path>, save: &Save<'a>) -> Result<Self> {
        let target = Target::of(path.as_ref(), &save.stem)?;
        sweep(&target.folder, &target.stem);
        Ok(Writer {
            save: save.clone(),
            target,
            start: Instant::now(),
            known: HashMap::new(),
            declared: Vec::new(),
            current: None,
            own: None,
            parts: Vec::new(),
            open: None,
            total: 0,
            failed: false,
        })
    }

    /// Starts a checkpoint of exactly these tensors, which may be written in any order.
    ///
    /// # Errors
    /// As [`Writer::create`]; spec 9.1 to 9.5.
    pub fn declared(
        path: impl AsRef<Path>,
        tensors: &[TensorSpec<'_>],
        save: &Save<'a>,
    ) -> Result<Self> {
        let sizes = tensors
            .iter()
            .map(|t| byte_len(&item(t.name, t.dtype, t.shape)))
            .collect::<Result<Vec<_>>>()?;
        let mut writer = Self::create(path, save)?;
        writer.total = sizes
            .iter()
            .fold(0, |sum: u64, &size| sum.saturating_add(size));
        for (shard, members) in split(sizes, save.max_shard_size).into_iter().enumerate() {
            let specs: Vec<TensorSpec<'_>> = members.iter().map(|&i| tensors[i]).collect();
            for (tensor, spec) in specs.iter().enumerate() {
                if writer
                    .known
                    .insert(spec.name.to_owned(), Place::Declared { shard, tensor })
                    .is_some()
                {
                    return Err(format::Error::new(Reason::WriteDuplicate)
                        .tensor(spec.name)
                        .into());
                }
            }
            let layout = layout_of(&specs, save, &save.write, None)?;
            let start = layout.data_start();
            let tensors = specs
                .iter()
                .map(|t| (t.name.to_owned(), t.dtype, t.shape.to_vec()))
                .collect();
            writer.declared.push(Declared {
                tensors,
                sums: save.checksums.then(|| Sums::new(start, data_len(&layout))),
                layout,
                file: None,
                left: specs.len(),
                staged: None,
            });
        }
        Ok(writer)
    }

    /// Writes one tensor.
    ///
    /// # Errors
    /// As [`Writer::begin`], [`Writer::write`] and [`Writer::end`].
    pub fn add(&mut self, tensor: &TensorData<'_>) -> Result<()> {
        let needed = byte_len(&item(tensor.name, tensor.dtype, tensor.shape))?;
        if needed != tensor.data.len() as u64 {
            let wrong = format::Error::new(Reason::WriteSize).tensor(tensor.name);
            return Err(wrong
                .found(format_args!("{} bytes", tensor.data.len()))
                .needed(needed)
                .into());
        }
        self.begin(tensor.name, tensor.dtype, tensor.shape)?;
        for chunk in tensor.data.chunks(RUN) {
            self.write(chunk)?;
        }
        self.end()
    }

    /// Writes one tensor from a device's memory, block by block.
    ///
    /// # Errors
    /// As [`Writer::add`]; what the device's driver said.
    pub fn add_device(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        data: &DeviceData<'_>,
    ) -> Result<()> {
        let needed = byte_len(&item(name, dtype, shape))?;
        let found = data.memory.len().saturating_sub(data.offset);
        if found < needed {
            let wrong = format::Error::new(Reason::WriteSize).tensor(name);
            return Err(wrong
                .found(format_args!("{found} bytes"))
                .needed(needed)
                .into());
        }
        let mut backs = Backs::default();
        backs.add(data, self.save.cancel);
        self.begin(name, dtype, shape)?;
        if let Some(downloads) = backs.get(data) {
            let mut done = 0;
            while done < needed {
                let len = (needed - done).min(RUN as u64);
                let from = downloads.from(data.memory, data.offset + done);
                self.write_from(len, Origin::Fill(&from))?;
                done += len;
            }
        }
        self.end()
    }

    /// Starts a tensor; its bytes follow by [`Writer::write`].
    ///
    /// # Errors
    /// What the system said; spec 9.1 to 9.5; `WRITER` while another tensor is not complete, for one that was
    /// declared otherwise or not at all, and after a failure.
    pub fn begin(&mut self, name: &str, dtype: Dtype, shape: &[u64]) -> Result<()> {
        self.ready()?;
        if let Some(open) = &self.open {
            return Err(misuse(format!(
                "tensor {:?} still lacks {} bytes",
                open.name, open.left
            )));
        }
        let bytes = byte_len(&item(name, dtype, shape))?;
        let place = self.known.get(name).cloned();
        let open = match place {
            Some(Place::Written) => {
                return Err(format::Error::new(Reason::WriteDuplicate)
                    .tensor(name)
                    .into());
            }
            Some(Place::Declared { shard, tensor }) => {
                self.begin_declared(shard, tensor, name, dtype, shape)?
            }
            None if !self.declared.is_empty() => {
                return Err(misuse(format!("tensor {name:?} was not declared")));
            }
            None => self.begin_spooled(name, dtype, shape, bytes)?,
        };
        self.known.insert(name.to_owned(), Place::Written);
        self.open = Some(Open {
            left: bytes,
            ..open
        });
        Ok(())
    }

    /// Writes the next bytes of the tensor that was begun.
    ///
    /// # Errors
    /// What the system said; `WRITE_SIZE` for more bytes than the tensor has; `WRITER` if none was begun.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_from(bytes.len() as u64, Origin::Bytes(bytes))
    }

    fn write_from(&mut self, len: u64, from: Origin<'_>) -> Result<()> {
        self.ready()?;
        let Some(open) = &mut self.open else {
            return Err(misuse("no tensor was begun"));
        };
        if len > open.left {
            let wrong = format::Error::new(Reason::WriteSize).tensor(&open.name);
            return Err(wrong
                .found(format_args!("{} bytes too many", len - open.left))
                .into());
        }
        let place = match (open.shard, open.own) {
            (Some(shard), _) => self
                .declared
                .get(shard)
                .and_then(|shard| shard.file.as_ref().map(|file| (file, &shard.sums))),
            (None, true) => self.own.as_ref().map(|spool| (&spool.file, &spool.sums)),
            (None, false) => self
                .current
                .as_ref()
                .map(|spool| (&spool.file, &spool.sums)),
        };
        let Some((file, sums)) = place else {
            return Err(misuse("no tensor was begun"));
        };
        if self.save.cancel.is_some_and(engine::Cancel::is_cancelled) {
            self.failed = true;
            return Err(engine::Error::Cancelled.into());
        }
        if let Err(error) = write_piece(file, sums.as_ref(), open.offset, len, from, &self.save) {
            self.failed = true;
            return Err(error);
        }
        (open.offset, open.left, open.unsynced) =
            (open.offset + len, open.left - len, open.unsynced + len);
        if open.unsynced >= WRITEBACK {
            file.start_writeback(open.offset - open.unsynced, open.unsynced);
            open.unsynced = 0;
        }
        Ok(())
    }

    /// Completes the tensor that was begun.
    ///
    /// # Errors
    /// What the system said; `WRITE_SIZE` if bytes are missing; `WRITER` if no tensor was begun.
    pub fn end(&mut self) -> Result<()> {
        self.ready()?;
        let Some(open) = &self.open else {
            return Err(misuse("no tensor was begun"));
        };
        if open.left > 0 {
            let wrong = format::Error::new(Reason::WriteSize).tensor(&open.name);
            return Err(wrong
                .found(format_args!("{} bytes too few", open.left))
                .into());
        }
        let (shard, own) = (open.shard, open.own);
        self.open = None;
        let result = match shard {
            Some(shard) => self.end_declared(shard),
            None if own => self.close_own(),
            None => Ok(()),
        };
        self.failed = result.is_err();
        result
    }

    /// Makes what was written a checkpoint.
    ///
    /// # Errors
    /// What the system said; `WRITER` if a tensor is not complete or a declared one was not written.
    pub fn finish(mut self) -> Result<Saved> {
        self.ready()?;
        if let Some(open) = &self.open {
            return Err(misuse(format!(
                "tensor {:?} still lacks {} bytes",
                open.name, open.left
            )));
        }
        let unwritten = self
            .known
            .iter()
            .find(|(_, place)| matches!(place, Place::Declared { .. }));
        if let Some((name, _)) = unwritten {
            return Err(misuse(format!(
                "tensor {name:?} was declared and not written"
            )));
        }
        if self.declared.is_empty() {
            if self.parts.is_empty() && self.current.is_none() {
                self.current = Some(self.spool()?);
            }
            if let Some(spool) = self.current.take() {
                let part = spool.close(&self.target, &self.save)?;
                self.parts.push(part);
            }
        } else {
            self.collect_declared()?;
        }
        self.publish()
    }

    fn publish(self) -> Result<Saved> {
        let mut parts = self.parts;
        let total_size = self.total;
        let simple = self
            .target
            .simple(self.save.numbered)
            .filter(|_| parts.len() == 1);
        let (files, index) = match (simple, parts.pop()) {
            (Some(path), Some(mut part)) => {
                part.staged.retarget(&path)?;
                commit_one(part.staged, &path, part.hash, self.save.durability)?;
                (vec![path], None)
            }
            (_, last) => {
                parts.extend(last);
                publish(
                    &self.target.folder,
                    &self.target.stem,
                    parts,
                    self.save.numbered,
                    self.save.durability,
                )?
            }
        };
        let seconds = self.start.elapsed().as_secs_f64();
        let report = engine::Report {
            seconds,
            bytes: total_size,
            threads: 1,
            strategy: "write",
            ..engine::Report::default()
        };
        Ok(Saved {
            files,
            index,
            notes: Vec::new(),
            total_size,
            report,
        })
    }

    fn ready(&self) -> Result<()> {
        if self.failed {
            Err(misuse("an earlier write failed"))
        } else {
            Ok(())
        }
    }

    fn begin_declared(
        &mut self,
        shard: usize,
        tensor: usize,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
    ) -> Result<Open> {
        let missing = || misuse("no such file was declared");
        if self.declared.get(shard).ok_or_else(missing)?.file.is_none() {
            let file = fresh_file(&self.target, &self.save)?;
            let layout = &self.declared[shard].layout;
            file.reserve(layout.file_len)?;
            file.set_len(layout.file_len)?;
            self.declared[shard].file = Some(file);
        }
        let declared = &self.declared[shard];
        let (_, dtype_then, shape_then) = declared.tensors.get(tensor).ok_or_else(missing)?;
        if (*dtype_then, &shape_then[..]) != (dtype, shape) {
            return Err(misuse(format!(
                "tensor {name:?} was declared as {dtype_then} {shape_then:?} and is {dtype} {shape:?}"
            )));
        }
        let offset = declared.layout.data_start() + declared.layout.ranges[tensor].0;
        Ok(Open {
            name: name.to_owned(),
            shard: Some(shard),
            own: false,
            offset,
            left: 0,
            unsynced: 0,
        })
    }

    fn end_declared(&mut self, shard: usize) -> Result<()> {
        let Some(declared) = self.declared.get_mut(shard) else {
            return Ok(());
        };
        declared.left = declared.left.saturating_sub(1);
        let complete = if declared.left == 0 {
            declared.file.take()
        } else {
            None
        };
        if let Some(file) = complete {
            file.write_all_at(0, &declared.header(&self.save)?)?;
            declared.staged = Some(stage(file, &self.save)?);
        }
        Ok(())
    }

    fn collect_declared(&mut self) -> Result<()> {
        for declared in std::mem::take(&mut self.declared) {
            let header = declared.header(&self.save)?;
            let (staged, hash) = match declared.staged {
                Some(staged) => staged,
                // A file without tensors.
                None => {
                    let file = fresh_file(&self.target, &self.save)?;
                    file.write_all_at(0, &header)?;
                    stage(file, &self.save)?
                }
            };
            let ranges = declared.layout.ranges.iter();
            let tensors = declared
                .tensors
                .into_iter()
                .zip(ranges)
                .map(|((name, ..), (a, b))| (name, b - a))
                .collect();
            self.parts.push(Part {
                staged,
                tensors,
                hash,
            });
        }
        Ok(())
    }

    fn spool(&self) -> Result<Spool> {
        Spool::start(&self.target, &self.save)
    }

    fn begin_spooled(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        bytes: u64,
    ) -> Result<Open> {
        // The reserved name and sizes beyond reason are refused now, not after hours of writing.
        layout_of(
            &[TensorSpec { name, dtype, shape }],
            &Save::default(),
            &WriteOptions::default(),
            None,
        )?;
        let max = self.save.max_shard_size.unwrap_or(u64::MAX);
        let own = bytes > max;
        let full = |spool: &Spool| spool.end.checked_add(bytes).is_none_or(|sum| sum > max);
        let complete = if !own && self.current.as_ref().is_some_and(full) {
            self.current.take()
        } else {
            None
        };
        if let Some(spool) = complete {
            let part = spool.close(&self.target, &self.save)?;
            self.parts.push(part);
        }
        let fresh = if own || self.current.is_none() {
            Some(self.spool()?)
        } else {
            None
        };
        let slot = if own {
            &mut self.own
        } else {
            &mut self.current
        };
        let spool = match (fresh, slot) {
            (Some(fresh), slot) => slot.insert(fresh),
            (None, Some(spool)) => spool,
            (None, None) => return Err(misuse("no file to write to")),
        };
        let begin = spool.end;
        let too_large = || Error::from(format::Error::new(Reason::WriteSize).tensor(name));
        let end = begin
            .checked_add(bytes)
            .filter(|&end| end < i64::MAX as u64 - ROOM)
            .ok_or_else(too_large)?;
        if bytes >= LARGE {
            // Direct writes into room that is there need not wait for one another.
            spool.file.reserve(ROOM + end)?;
        }
        spool.end = end;
        spool.tensors.push((name.to_owned(), dtype, shape.to_vec()));
        spool.ranges.push((begin, spool.end));
        self.total = self.total.saturating_add(bytes);
        Ok(Open {
            name: name.to_owned(),
            shard: None,
            own,
            offset: ROOM + begin,
            left: 0,
            unsynced: 0,
        })
    }

    fn close_own(&mut self) -> Result<()> {
        if let Some(spool) = self.own.take() {
            let part = spool.close(&self.target, &self.save)?;
            self.parts.push(part);
        }
        Ok(())
    }
}

impl Declared {
    /// The header, with the checksums once all data has come.
    fn header(&self, save: &Save<'_>) -> Result<Vec<u8>> {
        let Some(sums) = &self.sums else {
            return Ok(self.layout.header.clone());
        };
        let specs: Vec<TensorSpec<'_>> = self
            .tensors
            .iter()
            .map(|(name, dtype, shape)| TensorSpec {
                name,
                dtype: *dtype,
                shape,
            })
            .collect();
        let sums = finished(sums, data_len(&self.layout))?;
        Ok(layout_of(&specs, save, &save.write, Some(&sums))?.header)
    }
}

/// Writes some bytes of a tensor; many of them as `save` writes a whole file.
fn write_piece(
    file: &AtomicFile,
    sums: Option<&Sums>,
    offset: u64,
    len: u64,
    from: Origin<'_>,
    save: &Save<'_>,
) -> Result<()> {
    if let Origin::Bytes(bytes) = from
        && len < LARGE
    {
        if let Some(sums) = sums {
            sums.feed(offset, [bytes]);
        }
        return Ok(file.write_all_at(offset, bytes)?);
    }
    let options = engine::Options {
        threads: save.threads,
        cancel: save.cancel,
        ..engine::Options::default()
    };
    engine::put(file, &[Put { offset, len, from }], sums, &options)?;
    Ok(())
}

fn item<'a>(name: &'a str, dtype: Dtype, shape: &'a [u64]) -> Item<'a> {
    Item {
        name,
        dtype,
        shape,
        content: Content::Bytes(&[]),
    }
}

fn misuse(text: impl Into<String>) -> Error {
    Error::usage("WRITER", text)
}
