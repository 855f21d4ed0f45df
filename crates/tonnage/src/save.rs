//! Saving: tensors into one file, or into several with an index.
//!
//! A single file is replaced atomically; several become a checkpoint by the protocol of `publish.rs`.
//! Tensors are written straight out of the caller's memory.

use std::path::{Path, PathBuf};

use tonnage_engine::{self as engine, Cancel, OnProgress, Options, Progress};
use tonnage_format::{self as format, Dtype, Reason, TensorSpec, WriteOptions, shard_file_name};
use tonnage_storage::{self as storage, AtomicFile, AtomicOptions, Durability, Sink};

use crate::cast::{cast, cast_len, castable};
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
    /// First part of the file names in a folder.
    pub stem: String,
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
            stem: "model".to_owned(),
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
    let layout = layout(&items, save)?;
    let mut bytes = room(layout.file_len)?;
    bytes.clear();
    bytes.extend_from_slice(&layout.header);
    for &i in &layout.order {
        bytes.extend_from_slice(tensors[i].data);
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
    let (files, index) = if let (true, Some(path)) = (shards.len() == 1, target.simple()) {
        let file = AtomicFile::create(
            &path,
            &AtomicOptions {
                durability: save.durability,
                ..Default::default()
            },
        )?;
        run.write(&file, items)?;
        file.commit()?;
        (vec![path], None)
    } else {
        sweep(&target.folder, &target.stem);
        let mut parts = Vec::with_capacity(shards.len());
        for shard in &shards {
            let members: Vec<Item<'_>> = shard.iter().map(|&i| items[i]).collect();
            let file = hidden_file(&target.folder, &target.stem, save.durability)?;
            run.write(&file, &members)?;
            let tensors = shard
                .iter()
                .map(|&i| (items[i].name.to_owned(), sizes[i]))
                .collect();
            parts.push(Part {
                staged: file.stage()?,
                tensors,
            });
        }
        publish(&target.folder, &target.stem, parts, save.durability)?
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
    pub fn simple(&self) -> Option<PathBuf> {
        match &self.file {
            Some(file) => Some(file.clone()),
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

fn layout(items: &[Item<'_>], save: &Save<'_>) -> Result<format::Layout> {
    let specs: Vec<TensorSpec<'_>> = items
        .iter()
        .map(|item| TensorSpec {
            name: item.name,
            dtype: item.dtype,
            shape: item.shape,
        })
        .collect();
    Ok(layout_of(&specs, &save.metadata, &save.write)?)
}

pub(crate) fn layout_of(
    specs: &[TensorSpec<'_>],
    metadata: &[(String, String)],
    options: &WriteOptions,
) -> Result<format::Layout, format::Error> {
    let pairs: Vec<(&str, &str)> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    let metadata = if pairs.is_empty() {
        None
    } else {
        Some(&pairs[..])
    };
    format::layout(specs, metadata, options)
}

/// A save under way: files one after the other, one progress.
struct Run<'a> {
    save: &'a Save<'a>,
    base: u64,
    total: u64,
    report: engine::Report,
}

impl Run<'_> {
    /// Writes the whole content of one file.
    fn write(&mut self, file: &AtomicFile, items: &[Item<'_>]) -> Result<()> {
        let in_file = |e: Error| e.in_file(file.label());
        let layout = layout(items, self.save).map_err(in_file)?;
        file.reserve(layout.file_len)?;
        file.set_len(layout.file_len)?;
        file.write_all_at(0, &layout.header)?;
        let (mut writes, mut copies, mut casts) = (Vec::new(), Vec::new(), Vec::new());
        for (item, &(begin, end)) in items.iter().zip(&layout.ranges) {
            // `layout` has checked that all of the file fits 64 bits.
            let offset = layout.data_start() + begin;
            match item.content {
                Content::Bytes(data) => writes.push(engine::Write { offset, data }),
                Content::Stored(tensor) if tensor.dtype()? == item.dtype => {
                    let source = tensor.source()?;
                    copies.push(engine::Copy {
                        source,
                        from: tensor.offset(),
                        to: offset,
                        len: end - begin,
                    });
                }
                Content::Stored(tensor) => {
                    casts.extend(cast_blocks(&tensor, item.dtype, offset, end - begin)?)
                }
            }
        }
        self.step(|options| engine::write(file, &writes, options))?;
        self.step(|options| engine::copy(file, &copies, options))?;
        self.step(|options| write_casts(file, casts, options))
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

struct CastBlock<'a> {
    source: &'a dyn storage::Source,
    from: Dtype,
    to: Dtype,
    read: (u64, usize),
    write: (u64, usize),
}

fn cast_blocks<'a>(
    tensor: &TensorRef<'a>,
    to: Dtype,
    offset: u64,
    len: u64,
) -> Result<Vec<CastBlock<'a>>> {
    /// Elements of a block: a multiple of 8, so blocks of every dtype begin on a byte.
    const ELEMENTS: u64 = 1 << 20;
    let (from, source) = (tensor.dtype()?, tensor.source()?);
    let (read, write) = (
        ELEMENTS / 8 * from.bitsize() as u64,
        ELEMENTS / 8 * to.bitsize() as u64,
    );
    let block = |i: u64| CastBlock {
        source,
        from,
        to,
        read: (
            tensor.offset() + i * read,
            read.min(tensor.byte_len() - i * read) as usize,
        ),
        write: (offset + i * write, write.min(len - i * write) as usize),
    };
    Ok((0..len.div_ceil(write)).map(block).collect())
}

fn write_casts(
    file: &AtomicFile,
    blocks: Vec<CastBlock<'_>>,
    options: &Options<'_>,
) -> Result<engine::Report, engine::Error> {
    let size = |block: &CastBlock<'_>| block.write.1 as u64;
    let state = || (Vec::new(), Vec::new());
    engine::for_each_block(
        blocks,
        options,
        "cast",
        size,
        state,
        |(src, dst): &mut (Vec<u8>, Vec<u8>), block| {
            let failed = |offset| move |error| engine::Error::Storage { error, offset };
            src.resize(block.read.1, 0);
            dst.resize(block.write.1, 0);
            block
                .source
                .read_exact_at(block.read.0, src)
                .map_err(failed(block.read.0))?;
            let label = block.source.label();
            cast(block.from, src, block.to, dst).map_err(|e| {
                failed(block.read.0)(storage::Error::new("cast", label, std::io::Error::other(e)))
            })?;
            file.write_all_at(block.write.0, dst)
                .map_err(failed(block.write.0))
        },
    )
}
