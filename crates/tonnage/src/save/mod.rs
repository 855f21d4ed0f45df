//! Saving: tensors into one file, or into several with an index.
//!
//! A single file is replaced atomically; several become a checkpoint by the protocol of `publish.rs`.
//! Tensors are written straight out of the caller's memory, and those of checkpoints are compared with the
//! checksums that these have, if [`Save::keep`] says so (spec 13.11).

mod backs;
mod cast_fill;
mod kept;
mod run;
mod target;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonnage_device::{Device, Memory, Stream};
use tonnage_engine::checksum::Sums;
use tonnage_engine::{self as engine, Cancel, Options};
use tonnage_format::forever::CHECKSUMS_KEY;
use tonnage_format::{self as format, Checksums, Dtype, Reason, TensorSpec, WriteOptions};
use tonnage_storage::{self as storage, AtomicFile, AtomicOptions, Durability};

use crate::cast::{cast_len, castable};
use crate::checkpoint::Note;
use crate::checksums::{finished, remove_sidecar, write_sidecar};
use crate::error::Result;
use crate::load::OnProgressOf;
use crate::publish::{Part, hidden_file, publish, sweep};
use crate::shards::split;
use crate::tensor::{TensorRef, room};

pub(crate) use backs::Backs;
pub(crate) use kept::Kept;
use run::Run;
pub(crate) use target::Target;

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
    /// Keep the checksums of the checkpoints that tensors are copied from (spec 13.11): what is read is compared
    /// with them, all of every chunk of which a byte is copied; and what is written gets its own, of the kinds that
    /// one of the files had, besides those that [`Save::checksums`] and [`Save::sidecar`] ask for. Nothing else
    /// changes for tensors from elsewhere.
    pub keep: bool,
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
            keep: false,
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
    /// What became of checksums that could not be kept.
    pub notes: Vec<Note>,
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
/// As [`save`], and those of reading; with [`Save::keep`] `CHECKSUM_MISMATCH` for what is not what its checksum says,
/// `CHECKSUM_FORM`, `CHECKSUM_STALE`.
pub fn save_items(items: &[Item<'_>], path: impl AsRef<Path>, save: &Save<'_>) -> Result<Saved> {
    items.iter().try_for_each(check)?;
    check_unique(items)?;
    let target = Target::of(path.as_ref(), &save.stem)?;
    let sizes = items.iter().map(byte_len).collect::<Result<Vec<u64>>>()?;
    let total_size = sizes
        .iter()
        .fold(0, |sum: u64, &size| sum.saturating_add(size));
    let start = std::time::Instant::now();
    let kept = Kept::of_items(items, save)?;
    let save = &kept.save(save);
    let check = kept.check();
    let mut run = Run::new(save, check, total_size);
    let written = write_all(items, &sizes, &target, &mut run, &kept, save);
    let (files, index) = written.map_err(|error| kept.named(error))?;
    let report = engine::Report {
        seconds: start.elapsed().as_secs_f64(),
        ..run.report
    };
    Ok(Saved {
        files,
        index,
        total_size,
        report,
        notes: kept.notes,
    })
}

/// Writes all files, and gives them their names once everything that was read is what its checksums say.
fn write_all(
    items: &[Item<'_>],
    sizes: &[u64],
    target: &Target,
    run: &mut Run<'_>,
    kept: &Kept<'_>,
    save: &Save<'_>,
) -> Result<(Vec<PathBuf>, Option<PathBuf>)> {
    let shards = split(sizes.iter().copied(), save.max_shard_size);
    let options = Options {
        threads: save.threads,
        cancel: save.cancel,
        ..Options::default()
    };
    if let (true, Some(path)) = (shards.len() == 1, target.simple(save.numbered)) {
        let how = AtomicOptions {
            durability: save.durability,
            ..Default::default()
        };
        let file = AtomicFile::create(&path, &how)?;
        run.write(&file, items)?;
        kept.rest(&options)?;
        let hash = run.hash(&file)?;
        commit_one(file.stage()?, &path, hash, save.durability)?;
        return Ok((vec![path], None));
    }
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
    kept.rest(&options)?;
    let (folder, stem) = (&target.folder, &target.stem);
    publish(folder, stem, parts, save.numbered, save.durability)
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
