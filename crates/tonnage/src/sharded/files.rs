//! The coordinator's part: files that are made, filled by others, and given their names.

use std::path::{Path, PathBuf};
use std::time::Instant;

use tonnage_engine::{self as engine, Options};
use tonnage_format::{self as format, Checksums, Dtype, Reason, TensorSpec, WriteOptions};
use tonnage_storage::{self as storage, AtomicFile, AtomicOptions, FileSource, Sink};

use crate::error::{Error, Result};
use crate::publish::{Part, hidden_file, publish, sweep};
use crate::save::{Save, Saved, Target, commit_one, layout_of};

/// Files under way: of their final size, with a header, and without a name.
#[derive(Debug)]
pub struct Files {
    target: Target,
    save: Save<'static>,
    /// Where a single file goes that needs no index.
    simple: Option<PathBuf>,
    files: Vec<Pending>,
    total: u64,
    start: Instant,
}

#[derive(Debug)]
struct Pending {
    file: AtomicFile,
    tensors: Vec<(String, Dtype, Vec<u64>)>,
    place: Place,
}

/// Where a file lies until it gets its name, and what goes where in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// Its length.
    pub len: u64,
    /// The first byte behind the header.
    pub data_start: u64,
    /// For each of the file's tensors, in the order in which they were given, its first byte in the file.
    pub tensors: Vec<u64>,
}

impl Files {
    /// Makes a file for each group of tensors, beside what lies at `path`, which means what it means for
    /// [`crate::save()`]. The disk's room is reserved and the headers are written. `room` bytes are kept free
    /// in each header, for metadata that [`Files::seal`] may bring.
    ///
    /// # Errors
    /// What the system said, such as that the disk is full; spec 9.1 to 9.5 for tensors that cannot be
    /// written.
    pub fn create(
        path: impl AsRef<Path>,
        groups: &[Vec<TensorSpec<'_>>],
        room: u64,
        save: &Save<'static>,
    ) -> Result<Self> {
        let start = Instant::now();
        check_unique(groups)?;
        let target = Target::of(path.as_ref(), &save.stem)?;
        let simple = target.simple(save.numbered).filter(|_| groups.len() == 1);
        if simple.is_none() {
            sweep(&target.folder, &target.stem);
        }
        let mut made = Files {
            target,
            save: save.clone(),
            simple,
            files: Vec::with_capacity(groups.len()),
            total: 0,
            start,
        };
        for group in groups {
            let pending = made.pending(group, room)?;
            made.total = made.total.saturating_add(pending.place.data_len());
            made.files.push(pending);
        }
        Ok(made)
    }

    /// Where the files lie, in the order of the groups.
    pub fn places(&self) -> impl ExactSizeIterator<Item = &Place> {
        self.files.iter().map(|file| &file.place)
    }

    fn fresh(&self) -> Result<AtomicFile> {
        let Save { durability, .. } = self.save;
        match &self.simple {
            Some(path) => Ok(AtomicFile::create(
                path,
                &AtomicOptions {
                    durability,
                    ..Default::default()
                },
            )?),
            None => hidden_file(&self.target.folder, &self.target.stem, durability),
        }
    }

    fn pending(&self, specs: &[TensorSpec<'_>], room: u64) -> Result<Pending> {
        let options = WriteOptions {
            reserve: self.save.write.reserve.saturating_add(room),
            ..self.save.write
        };
        let layout = layout_of(specs, &self.save, &options, None)?;
        let file = self.fresh()?;
        file.reserve(layout.file_len)?;
        file.set_len(layout.file_len)?;
        file.write_all_at(0, &layout.header)?;
        let data_start = layout.data_start();
        // `layout` has checked that all of the file fits 64 bits.
        let begin = |&(begin, _): &(u64, u64)| data_start + begin;
        Ok(Pending {
            place: Place {
                path: file.path().to_owned(),
                len: layout.file_len,
                data_start,
                tensors: layout.ranges.iter().map(begin).collect(),
            },
            file,
            tensors: specs
                .iter()
                .map(|t| (t.name.to_owned(), t.dtype, t.shape.to_vec()))
                .collect(),
        })
    }

    /// Writes the header of one file anew, with this metadata in place of what the save began with, and with
    /// checksums, if the save has them: those of [`sum_part`], for all of the data. A header that does not fit
    /// its room costs a copy of the file.
    ///
    /// # Errors
    /// What the system said; `SEAL` for a file that there is not, or checksums that lack.
    pub fn seal(
        &mut self,
        file: usize,
        metadata: &[(String, String)],
        sums: Option<Vec<u64>>,
    ) -> Result<()> {
        let wrong = |text| Error::usage("SEAL", text);
        let pending = self
            .files
            .get(file)
            .ok_or_else(|| wrong("there is no such file"))?;
        let data_len = pending.place.data_len();
        let sums = match (self.save.checksums, sums) {
            (false, _) => None,
            (true, Some(sums)) if sums.len() as u64 == engine::checksum::chunks_of(data_len) => {
                Some(Checksums { data_len, sums })
            }
            (true, _) => return Err(wrong("checksums of all of the data are needed")),
        };
        let save = Save {
            metadata: metadata.to_vec(),
            ..self.save.clone()
        };
        let specs = specs(&pending.tensors);
        let layout = layout_of(&specs, &save, &save.write, sums.as_ref())?;
        let (start, found) = (pending.place.data_start, layout.data_start());
        let mut header = layout.header;
        if found <= start {
            header.resize(start as usize, b' ');
            header[..8].copy_from_slice(&(start - 8).to_le_bytes());
            pending.file.write_all_at(0, &header)?;
            return Ok(());
        }
        let fresh = self.fresh()?;
        fresh.reserve(layout.file_len)?;
        fresh.set_len(layout.file_len)?;
        fresh.write_all_at(0, &header)?;
        copy(&pending.file, start, &fresh, found, data_len)?;
        if let Some(pending) = self.files.get_mut(file) {
            pending.place.path = fresh.path().to_owned();
            pending.file = fresh;
        }
        Ok(())
    }

    /// Makes the files the checkpoint at the path, durably if that was asked for.
    ///
    /// # Errors
    /// What the system said. Up to the first rename the old checkpoint is as it was.
    pub fn commit(self) -> Result<Saved> {
        let (numbered, durability) = (self.save.numbered, self.save.durability);
        let mut parts = Vec::with_capacity(self.files.len());
        for pending in self.files {
            let sizes = pending.tensors.into_iter().map(|(name, dtype, shape)| {
                let bytes = dtype.bytes_of(&shape).unwrap_or(0);
                (name, bytes)
            });
            parts.push(Part {
                tensors: sizes.collect(),
                staged: pending.file.stage()?,
                hash: None,
            });
        }
        let (files, index) = match (self.simple, parts.pop()) {
            (Some(path), Some(part)) => {
                commit_one(part.staged, &path, None, durability)?;
                (vec![path], None)
            }
            (_, last) => {
                parts.extend(last);
                publish(
                    &self.target.folder,
                    &self.target.stem,
                    parts,
                    numbered,
                    durability,
                )?
            }
        };
        Ok(Saved {
            files,
            index,
            notes: Vec::new(),
            total_size: self.total,
            report: engine::Report {
                seconds: self.start.elapsed().as_secs_f64(),
                bytes: self.total,
                strategy: "shared",
                ..engine::Report::default()
            },
        })
    }
}

impl Place {
    fn data_len(&self) -> u64 {
        self.len.saturating_sub(self.data_start)
    }
}

/// The checksums of some chunks of a file's data, of which `len` bytes from `begin` on are looked at; `begin`
/// is a multiple of the chunk's length. What is read is what the disk or the page cache has, so a byte that a
/// rank has not written is not passed over.
///
/// # Errors
/// What the system said.
pub fn sum_part(
    path: &Path,
    data_start: u64,
    begin: u64,
    len: u64,
    options: &Options<'_>,
) -> Result<Vec<u64>> {
    let source = FileSource::open(path)?;
    let start = data_start
        .checked_add(begin)
        .ok_or_else(|| Error::usage("SEAL", "beyond 64 bits"))?;
    Ok(engine::checksum::sum_chunks(&source, start, len, options)?)
}

fn specs(tensors: &[(String, Dtype, Vec<u64>)]) -> Vec<TensorSpec<'_>> {
    tensors
        .iter()
        .map(|(name, dtype, shape)| TensorSpec {
            name,
            dtype: *dtype,
            shape,
        })
        .collect()
}

fn copy(from: &AtomicFile, begin: u64, into: &AtomicFile, at: u64, len: u64) -> Result<()> {
    let clone = from.file().try_clone();
    let clone = clone.map_err(|e| storage::Error::new("read", from.label(), e))?;
    let source = FileSource::from_file(clone, from.label())?;
    let all = engine::Copy {
        source: &source,
        from: begin,
        to: at,
        len,
    };
    engine::copy(into, &[all], &Options::default())?;
    Ok(())
}

/// The writer checks the names of one file; several files must not share one either.
fn check_unique(groups: &[Vec<TensorSpec<'_>>]) -> Result<()> {
    let mut names: Vec<&str> = groups.iter().flatten().map(|spec| spec.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format::Error::new(Reason::WriteDuplicate)
            .tensor(pair[0])
            .into()),
        None => Ok(()),
    }
}
