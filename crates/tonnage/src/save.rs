//! Saving: tensors into one file, or into several with an index.
//!
//! A single file is replaced atomically; several become a checkpoint by the protocol of `publish.rs`.
//! Tensors are written straight out of the caller's memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonnage_device::{Device, DeviceId, Memory, Pool, Stream};
use tonnage_engine::checksum::Sums;
use tonnage_engine::{
    self as engine, Cancel, Downloads, FromDevice, OnProgress, Options, Progress, Put,
};
use tonnage_format::forever::CHECKSUMS_KEY;
use tonnage_format::{
    self as format, Checksums, Dtype, Reason, TensorSpec, WriteOptions, shard_file_name,
};
use tonnage_storage::{self as storage, AtomicFile, AtomicOptions, Durability, Sink};

use crate::cast::{cast, cast_len, castable};
use crate::checksums::{finished, hash_of, remove_sidecar, write_sidecar};
use crate::error::{Error, Result};
use crate::load::OnProgressOf;
use crate::publish::{Part, hidden_file, is_simple, publish, sweep};
use crate::shards::split;
use crate::tensor::{TensorRef, room};

/// How to save. The default writes one file, durably, with the reference's bytes.
#[derive(Clone, Debug)]
pub struct Save<'a> {
    /// Metadata of every file. Empty: the header has no `__metadata__`.
    pub metadata: Vec<(String, String)>,
    /// Bytes of data in one file at most; a larger tensor gets a file of its own.
    pub max_shard_size: Option<u64>,
    /// What the save survives.
    pub durability: Durability,
    /// How each file is laid out.
    pub write: WriteOptions,
    /// Store the checksums of each file's data in its metadata (spec chapter 13); they are computed while
    /// it is written. Checksums among [`Save::metadata`] are those of other data and are left out.
    pub checksums: bool,
    /// Put the BLAKE3 hash of each file beside it (spec 13.14). The file is read once more for it.
    pub sidecar: bool,
    /// First part of the file names in a folder.
    pub stem: String,
    /// A single file in a folder is named as one of several is, `stem-00001-of-00001.safetensors`, and has
    /// an index, as PyTorch's `HuggingFaceStorageWriter` leaves it.
    pub numbered: bool,
    /// As [`Options::threads`].
    pub threads: Option<usize>,
    /// As [`Options::progress`].
    pub progress: Option<OnProgressOf<'a>>,
    /// As [`Options::cancel`].
    pub cancel: Option<&'a Cancel>,
}

impl Default for Save<'_> {
    fn default() -> Self {
        Save {
            metadata: Vec::new(),
            max_shard_size: None,
            durability: Durability::Full,
            write: WriteOptions::default(),
            checksums: false,
            sidecar: false,
            stem: "model".to_owned(),
            numbered: false,
            threads: None,
            progress: None,
            cancel: None,
        }
    }
}

/// A tensor to be saved, in memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorData<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its extents in elements.
    pub shape: &'a [u64],
    /// Its bytes: row-major, little-endian.
    pub data: &'a [u8],
}

/// A tensor to be saved, wherever it is.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// The name it gets.
    pub name: &'a str,
    /// The dtype it gets. One that its content does not have is cast to.
    pub dtype: Dtype,
    /// Its extents in elements.
    pub shape: &'a [u64],
    /// Its bytes.
    pub content: Content<'a>,
}

/// Where a tensor's bytes come from.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Memory.
    Bytes(&'a [u8]),
    /// A checkpoint; read block by block while it is written.
    Stored(TensorRef<'a>),
    /// A device's memory; brought back block by block while it is written.
    Device(DeviceData<'a>),
}

/// A tensor's bytes in a device's memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceData<'a> {
    /// The device.
    pub device: &'a Arc<dyn Device>,
    /// The memory.
    pub memory: &'a Memory,
    /// The tensor's first byte there.
    pub offset: u64,
    /// The stream that writes it, if it may still do so.
    pub after: Option<Stream>,
}

/// Brings tensors back from their devices; one queue and ring for all tensors of a device and stream.
#[derive(Debug, Default)]
pub(crate) struct Backs(Vec<(DeviceId, Option<Stream>, Downloads)>);

impl Backs {
    /// Takes in the device of some data.
    pub fn add(&mut self, data: &DeviceData<'_>, cancel: Option<&Cancel>) {
        let id = data.device.info().id;
        if self.get(data).is_none() {
            let cancel = cancel.cloned().unwrap_or_default();
            let after = data.after.into_iter().collect();
            let pool = Arc::clone(Pool::global());
            let downloads = Downloads::new(Arc::clone(data.device), pool, after, cancel);
            self.0.push((id, data.after, downloads));
        }
    }

    /// What brings an item back, if it is on a device.
    fn fill<'a>(&'a self, item: &Item<'a>) -> Option<FromDevice<'a>> {
        match item.content {
            Content::Device(data) => Some(self.get(&data)?.from(data.memory, data.offset)),
            Content::Bytes(_) | Content::Stored(_) => None,
        }
    }

    pub fn get(&self, data: &DeviceData<'_>) -> Option<&Downloads> {
        let of = (data.device.info().id, data.after);
        self.0
            .iter()
            .find(|(id, after, _)| (*id, *after) == of)
            .map(|(.., downloads)| downloads)
    }
}

/// What a save made.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// The files, in order.
    pub files: Vec<PathBuf>,
    /// The index, if there is more than one file.
    pub index: Option<PathBuf>,
    /// Bytes of all tensors.
    pub total_size: u64,
    /// Speed of writing. The seconds include bringing the bytes to the disk, if that was asked for.
    pub report: engine::Report,
}

/// Saves tensors. A path that ends in `.safetensors` is that file, or the stem of the files beside it if
/// [`Save::max_shard_size`] is exceeded; any other path is a folder, which is created.
///
/// # Errors
/// What the system said; spec 9.1 to 9.5 for tensors that cannot be written; `CANCELLED`. Whatever the
/// error, what was there before is still there, whole.
pub fn save(tensors: &[TensorData<'_>], path: impl AsRef<Path>, save: &Save<'_>) -> Result<Saved> {
    save_items(&items(tensors), path, save)
}

fn items<'a>(tensors: &[TensorData<'a>]) -> Vec<Item<'a>> {
    let item = |t: &TensorData<'a>| Item {
        name: t.name,
        dtype: t.dtype,
        shape: t.shape,
        content: Content::Bytes(t.data),
    };
    tensors.iter().map(item).collect()
}

/// The bytes of a file with these tensors.
///
/// # Errors
/// As [`save`].
pub fn to_bytes(tensors: &[TensorData<'_>], save: &Save<'_>) -> Result<Vec<u8>> {
    let items = items(tensors);
    items.iter().try_for_each(check)?;
    let layout = layout(&items, save, None)?;
    let mut bytes = room(layout.file_len)?;
    bytes.clear();
    bytes.extend_from_slice(&layout.header);
    for &i in &layout.order {
        bytes.extend_from_slice(tensors[i].data);
    }
    if save.checksums {
        let (start, len) = (layout.data_start(), data_len(&layout));
        let sums = Sums::new(start, len);
        sums.feed(0, [&bytes[..]]);
        let sealed = self::layout(&items, save, Some(&finished(&sums, len)?))?.header;
        bytes[..sealed.len()].copy_from_slice(&sealed);
    }
    Ok(bytes)
}

/// Saves tensors from memory and from checkpoints: what `shard`, `merge`, `rename` and `cast` are made
/// of. A checkpoint may be saved over itself.
///
/// # Errors
/// As [`save`], and those of reading.
pub fn save_items(items: &[Item<'_>], path: impl AsRef<Path>, save: &Save<'_>) -> Result<Saved> {
    items.iter().try_for_each(check)?;
    check_unique(items)?;
    let target = Target::of(path.as_ref(), &save.stem)?;
    let sizes = items.iter().map(byte_len).collect::<Result<Vec<u64>>>()?;
    let total_size = sizes
        .iter()
        .fold(0, |sum: u64, &size| sum.saturating_add(size));
    let shards = split(sizes.iter().copied(), save.max_shard_size);
    let mut run = Run {
        save,
        base: 0,
        total: total_size,
        report: engine::Report::default(),
    };
    let start = std::time::Instant::now();
    let (files, index) =
        if let (true, Some(path)) = (shards.len() == 1, target.simple(save.numbered)) {
            let file = AtomicFile::create(
                &path,
                &AtomicOptions {
                    durability: save.durability,
                    ..Default::default()
                },
            )?;
            run.write(&file, items)?;
            let hash = run.hash(&file)?;
            commit_one(file.stage()?, &path, hash, save.durability)?;
            (vec![path], None)
        } else {
            sweep(&target.folder, &target.stem);
            let mut parts = Vec::with_capacity(shards.len());
            for shard in &shards {
                let members: Vec<Item<'_>> = shard.iter().map(|&i| items[i]).collect();
                let file = hidden_file(&target.folder, &target.stem, save.durability)?;
                run.write(&file, &members)?;
                let hash = run.hash(&file)?;
                let tensors = shard
                    .iter()
                    .map(|&i| (items[i].name.to_owned(), sizes[i]))
                    .collect();
                parts.push(Part {
                    staged: file.stage()?,
                    tensors,
                    hash,
                });
            }
            publish(
                &target.folder,
                &target.stem,
                parts,
                save.numbered,
                save.durability,
            )?
        };
    let report = engine::Report {
        seconds: start.elapsed().as_secs_f64(),
        ..run.report
    };
    Ok(Saved {
        files,
        index,
        total_size,
        report,
    })
}

/// Where a save goes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub folder: PathBuf,
    pub stem: String,
    /// The file, where the caller named one.
    pub file: Option<PathBuf>,
}

impl Target {
    pub fn of(path: &Path, stem: &str) -> Result<Target> {
        let is_file = path.extension().is_some_and(|e| e == "safetensors") || path.is_file();
        if is_file && !path.is_dir() {
            let folder = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
                _ => PathBuf::from("."),
            };
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let stem = stem.ok_or_else(|| {
                Error::usage("WRITER", format!("{} is no file name", path.display()))
            })?;
            return Ok(Target {
                folder,
                stem: stem.to_owned(),
                file: Some(path.to_owned()),
            });
        }
        if stem.is_empty() || stem.contains('/') || stem.starts_with('.') {
            return Err(Error::usage(
                "WRITER",
                format!("{stem:?} is no stem for file names"),
            ));
        }
        std::fs::create_dir_all(path).map_err(|e| storage::Error::at("create", path, e))?;
        Ok(Target {
            folder: path.to_owned(),
            stem: stem.to_owned(),
            file: None,
        })
    }

    /// The path of a single file, if replacing it is all there is to do.
    pub fn simple(&self, numbered: bool) -> Option<PathBuf> {
        match &self.file {
            Some(file) => Some(file.clone()),
            None if numbered => None,
            None => is_simple(&self.folder, &self.stem)
                .then(|| self.folder.join(shard_file_name(&self.stem, 1, 1))),
        }
    }
}

pub(crate) fn byte_len(item: &Item<'_>) -> Result<u64> {
    let len = item.dtype.bytes_of(item.shape);
    len.map_err(|e| {
        let reason = if e.reason() == Reason::PartialByte {
            Reason::WritePartialByte
        } else {
            Reason::WriteSize
        };
        format::Error::new(reason)
            .tensor(item.name)
            .found(e.found_text())
            .needed(e.needed_text())
            .into()
    })
}

fn check(item: &Item<'_>) -> Result<()> {
    let needed = byte_len(item)?;
    let found = match item.content {
        Content::Bytes(data) => data.len() as u64,
        // The memory may hold more behind it.
        Content::Device(data) => data.memory.len().saturating_sub(data.offset).min(needed),
        Content::Stored(tensor) => match tensor.dtype()? {
            from if from == item.dtype => tensor.byte_len(),
            from if castable(from, item.dtype) => cast_len(from, tensor.byte_len(), item.dtype)?,
            from => {
                let cast = format::Error::new(Reason::Cast).tensor(item.name);
                return Err(cast
                    .found(format_args!("{from} to {}", item.dtype))
                    .needed("two floating-point dtypes")
                    .into());
            }
        },
    };
    if found != needed {
        let wrong = format::Error::new(Reason::WriteSize).tensor(item.name);
        return Err(wrong
            .found(format_args!("{found} bytes"))
            .needed(format_args!("{needed} for {} {:?}", item.dtype, item.shape))
            .into());
    }
    Ok(())
}

/// The writer checks the names of one file; several files must not share one either.
fn check_unique(items: &[Item<'_>]) -> Result<()> {
    let mut names: Vec<&str> = items.iter().map(|item| item.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format::Error::new(Reason::WriteDuplicate)
            .tensor(pair[0])
            .into()),
        None => Ok(()),
    }
}

/// Gives a complete file its name, and its sidecar after it. An old sidecar goes first.
pub(crate) fn commit_one(
    staged: storage::Staged,
    path: &Path,
    hash: Option<[u8; 32]>,
    durability: Durability,
) -> Result<()> {
    remove_sidecar(path)?;
    remove_sidecar(staged.target())?;
    staged.commit()?;
    match hash {
        Some(hash) => write_sidecar(path, &hash, durability),
        None => Ok(()),
    }
}

fn layout(items: &[Item<'_>], save: &Save<'_>, sums: Option<&Checksums>) -> Result<format::Layout> {
    let specs: Vec<TensorSpec<'_>> = items
        .iter()
        .map(|item| TensorSpec {
            name: item.name,
            dtype: item.dtype,
            shape: item.shape,
        })
        .collect();
    Ok(layout_of(&specs, save, &save.write, sums)?)
}

/// Lays a file out. Where it is to have checksums and they are not known yet, room is left for them: the
/// layout with them differs in nothing but their digits.
pub(crate) fn layout_of(
    specs: &[TensorSpec<'_>],
    save: &Save<'_>,
    options: &WriteOptions,
    sums: Option<&Checksums>,
) -> Result<format::Layout, format::Error> {
    let text = match (save.checksums, sums) {
        (false, _) => None,
        (true, Some(sums)) => Some(sums.to_text()),
        (true, None) => {
            // A size that overflows is refused by `layout`, which names the tensor.
            let sizes = specs.iter().map(|spec| spec.dtype.bytes_of(spec.shape));
            let len = sizes.fold(0, |sum: u64, size| sum.saturating_add(size.unwrap_or(0)));
            Some(Checksums::zeros(len)?.to_text())
        }
    };
    let own = text.as_deref().map(|text| (CHECKSUMS_KEY, text));
    let given = save.metadata.iter();
    let pairs: Vec<(&str, &str)> = given
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .filter(|(key, _)| *key != CHECKSUMS_KEY)
        .chain(own)
        .collect();
    let metadata = if pairs.is_empty() {
        None
    } else {
        Some(&pairs[..])
    };
    format::layout(specs, metadata, options)
}

pub(crate) fn data_len(layout: &format::Layout) -> u64 {
    layout.file_len.saturating_sub(layout.data_start())
}

/// A save under way: files one after the other, one progress.
struct Run<'a> {
    save: &'a Save<'a>,
    base: u64,
    total: u64,
    report: engine::Report,
}

impl Run<'_> {
    /// Writes the whole content of one file. The header goes last where it waits for the checksums.
    fn write(&mut self, file: &AtomicFile, items: &[Item<'_>]) -> Result<()> {
        let in_file = |e: Error| e.in_file(file.label());
        let layout = layout(items, self.save, None).map_err(in_file)?;
        let start = layout.data_start();
        file.reserve(layout.file_len)?;
        file.set_len(layout.file_len)?;
        let sums = self
            .save
            .checksums
            .then(|| Sums::new(start, data_len(&layout)));
        if sums.is_none() {
            file.write_all_at(0, &layout.header)?;
        }
        let casts = items.iter().map(CastFill::of).collect::<Result<Vec<_>>>()?;
        let mut backs = Backs::default();
        for item in items {
            if let Content::Device(data) = &item.content {
                backs.add(data, self.save.cancel);
            }
        }
        let downloads: Vec<_> = items.iter().map(|item| backs.fill(item)).collect();
        let mut puts = Vec::with_capacity(items.len());
        let fills = casts.iter().zip(&downloads);
        for ((item, (cast, download)), &(begin, end)) in items.iter().zip(fills).zip(&layout.ranges)
        {
            // `layout` has checked that all of the file fits 64 bits.
            let (offset, len) = (start + begin, end - begin);
            puts.push(match (item.content, cast) {
                (Content::Bytes(data), _) => Put::bytes(offset, data),
                (Content::Stored(_), Some(cast)) => Put::fill(offset, len, cast),
                (Content::Stored(tensor), None) => {
                    Put::source(offset, tensor.source()?, tensor.offset(), len)
                }
                (Content::Device(_), _) => match download {
                    Some(download) => Put::fill(offset, len, download),
                    None => Put::bytes(offset, &[]),
                },
            });
        }
        self.step(|options| engine::put(file, &puts, sums.as_ref(), options))?;
        if let Some(sums) = sums {
            let sums = finished(&sums, data_len(&layout))?;
            let sealed = self::layout(items, self.save, Some(&sums)).map_err(in_file)?;
            file.write_all_at(0, &sealed.header)?;
        }
        Ok(())
    }

    /// The file's hash, if it is to have a sidecar.
    fn hash(&self, file: &AtomicFile) -> Result<Option<[u8; 32]>> {
        let options = Options {
            threads: self.save.threads,
            cancel: self.save.cancel,
            ..Options::default()
        };
        let hash = self.save.sidecar.then(|| hash_of(file, &options));
        hash.transpose()
    }

    fn step(
        &mut self,
        run: impl FnOnce(&Options<'_>) -> Result<engine::Report, engine::Error>,
    ) -> Result<()> {
        let (base, total) = (self.base, self.total);
        let after = |p: Progress| {
            if let Some(OnProgressOf(progress)) = self.save.progress {
                progress(Progress {
                    done: base.saturating_add(p.done),
                    total,
                });
            }
        };
        let progress = self.save.progress.map(|_| &after as OnProgress<'_>);
        let options = Options {
            threads: self.save.threads,
            block: None,
            progress,
            cancel: self.save.cancel,
            ..Options::default()
        };
        let report = run(&options)?;
        if report.bytes > 0 || self.report.strategy.is_empty() {
            self.report.strategy = report.strategy;
        }
        self.report.bytes += report.bytes;
        self.report.threads = self.report.threads.max(report.threads);
        self.base = self.base.saturating_add(report.bytes);
        Ok(())
    }
}

/// Casts a stored tensor while it is written.
struct CastFill<'a> {
    source: &'a dyn storage::Source,
    offset: u64,
    len: u64,
    from: Dtype,
    to: Dtype,
}

impl<'a> CastFill<'a> {
    /// `None` for a tensor that keeps its dtype.
    fn of(item: &Item<'a>) -> Result<Option<CastFill<'a>>> {
        let Content::Stored(tensor) = item.content else {
            return Ok(None);
        };
        let (from, to) = (tensor.dtype()?, item.dtype);
        if from == to {
            return Ok(None);
        }
        Ok(Some(CastFill {
            source: tensor.source()?,
            offset: tensor.offset(),
            len: tensor.byte_len(),
            from,
            to,
        }))
    }

    /// Casts the elements from `first` on, in groups of eight, of which `dst` holds whole ones, but perhaps
    /// for the last of the tensor.
    fn groups(&self, first: u64, src: &mut Vec<u8>, dst: &mut [u8]) -> Result<(), engine::Error> {
        // Eight elements of a dtype take as many bytes as one has bits.
        let begin = first * self.from.bitsize() as u64;
        let count = (dst.len() as u64).div_ceil(self.to.bitsize() as u64);
        let len = (count * self.from.bitsize() as u64).min(self.len.saturating_sub(begin));
        let offset = self.offset.saturating_add(begin);
        src.resize(len as usize, 0);
        let failed = |error| engine::Error::Storage { error, offset };
        self.source.read_exact_at(offset, src).map_err(failed)?;
        cast(self.from, src, self.to, dst).map_err(|e| {
            let other = std::io::Error::other(e);
            failed(storage::Error::new("cast", self.source.label(), other))
        })
    }
}

impl engine::Fill for CastFill<'_> {
    fn fill(&self, mut at: u64, mut dst: &mut [u8]) -> Result<(), engine::Error> {
        /// Groups that are cast at a time: what is read for them stays in the processor's cache.
        const GROUPS: u64 = 8 << 10;
        let unit = self.to.bitsize() as u64;
        let all = cast_len(self.from, self.len, self.to).unwrap_or(0);
        let mut src = Vec::new();
        while !dst.is_empty() {
            let (first, skip) = (at / unit, (at % unit) as usize);
            let left = all.saturating_sub(first * unit);
            let whole = (dst.len() as u64 / unit).min(GROUPS) * unit;
            // A block may begin or end inside of a group: that group is cast apart.
            let (now, rest) = if skip == 0 && (whole > 0 || left <= dst.len() as u64) {
                let len = if whole > 0 { whole } else { left };
                let (now, rest) = dst.split_at_mut((len as usize).min(dst.len()));
                self.groups(first, &mut src, now)?;
                (now.len(), rest)
            } else {
                let mut group = vec![0; left.min(unit) as usize];
                self.groups(first, &mut src, &mut group)?;
                let part = group.get(skip..).unwrap_or_default();
                let len = part.len().min(dst.len());
                let (now, rest) = dst.split_at_mut(len);
                now.copy_from_slice(&part[..len]);
                if len == 0 {
                    let over = std::io::ErrorKind::UnexpectedEof;
                    let error = storage::Error::new("cast", self.source.label(), over);
                    return Err(engine::Error::Storage { error, offset: at });
                }
                (len, rest)
            };
            at += now as u64;
            dst = rest;
        }
        Ok(())
    }
}
