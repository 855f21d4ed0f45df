//! Checkpoints of ranks: what each rank of a mesh has, in files of its own, and from one mesh to another.
//!
//! [`reshard`] reads a checkpoint, whole or of ranks, and writes what every rank of a plan has: `rank-00003.safetensors`,
//! whose metadata says under [`SHARDS`] which box of which tensor each of its tensors is. A plan of one rank gives
//! an ordinary checkpoint again. The folder is replaced as a whole (`ranks.rs`). Bytes go from file to file rank by rank and tensor by tensor; in memory there are
//! never more of them than a few portions, or the largest local tensor.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tonnage_engine::checksum::BadChunk;
use tonnage_engine::{Options, Progress};
use tonnage_format::forever::CHECKSUMS_KEY;
use tonnage_plan::{Dims, Mesh, Part, Request, Rules};
use tonnage_storage::Source;

use super::load::{len_as, wanted};
use super::parts;
use super::ranks::{self, Staging};
use super::{Allow, Local, Plan, PlanLoad, PlannedLoad, Table, build};
use crate::checkpoint::{Checkpoint, CheckpointFile};
use crate::checksums::{Carried, bad_chunks, named};
use crate::error::{Error, Result};
use crate::load::OnProgressOf;
use crate::open::OpenOptions;
use crate::save::{Kept, Save, Saved};
use crate::writer::Writer;

/// The key of a file's metadata that says which parts its tensors are.
pub const SHARDS: &str = "tonnage.shards";

/// Bytes of tensors that are read before they are written.
const AHEAD: u64 = 96 << 20;
/// Bytes that are given to the writer at a time: progress moves, and a cancelled one ends.
const PIECE: usize = 64 << 20;

/// Where a checkpoint lies in files, and what is in them.
#[derive(Debug)]
pub struct Origin {
    table: Table,
    sources: Vec<Arc<dyn Source>>,
    /// What each says of itself; of its metadata only the checksums.
    known: Vec<CheckpointFile>,
    /// Whether tensors lie in parts.
    parts: bool,
    metadata: Vec<(String, String)>,
}

impl Origin {
    /// Opens what [`reshard`] reads: a checkpoint, a folder of files that ranks wrote, or one whose files say in PyTorch's
    /// words which parts of tensors they hold.
    ///
    /// # Errors
    /// As [`Checkpoint::open_with`]; `SHARDS` for metadata of parts that is not of its form.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Origin> {
        let ranks = ranks::find(path)?;
        if ranks.is_empty() {
            if let Some((files, metadata)) = parts::find(path, options)? {
                return Origin::of_parts(&files, metadata);
            }
            return Origin::whole(&Checkpoint::open_with(path, options)?);
        }
        let mut origin = Origin {
            table: Table::new(),
            sources: Vec::new(),
            known: Vec::new(),
            parts: true,
            metadata: Vec::new(),
        };
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut known: HashMap<String, usize> = HashMap::new();
        let mut first: Option<Value> = None;
        let files = ranks.len();
        for (rank, path) in ranks.iter().enumerate() {
            let checkpoint = Checkpoint::open_with(path, options)?;
            let said = said(&checkpoint)?;
            // Ranks' files get their names one after the other: those of two saves may stand side by side.
            let first = first.get_or_insert_with(|| said.clone());
            if said.get("set") != first.get("set") || said.get("mesh") != first.get("mesh") {
                return Err(form(
                    &checkpoint,
                    "is of another save than the first rank's",
                ));
            }
            let count = first.get("ranks").and_then(Value::as_u64);
            let wanted = (Some(rank as u64), Some(files as u64));
            if (said.get("rank").and_then(Value::as_u64), count) != wanted {
                let count = count.unwrap_or(0);
                let text = format!("is of a save of {count} ranks, and {files} are there");
                return Err(form(&checkpoint, &text));
            }
            origin.rank(&checkpoint, &said, &mut tensors, &mut known)?;
        }
        origin.finish(tensors)
    }

    fn of_parts(files: &[Checkpoint], metadata: Vec<(String, String)>) -> Result<Origin> {
        let mut origin = Origin {
            table: Table::new(),
            sources: Vec::new(),
            known: Vec::new(),
            parts: true,
            metadata,
        };
        let (mut tensors, mut known) = (Vec::new(), HashMap::new());
        for file in files {
            let first = origin.add_files(file);
            let table = &mut origin.table;
            parts::add(file, &mut tensors, &mut known, |stored| {
                let at = first + stored.file() as u32;
                let (name, shape) = (stored.name(), stored.shape());
                Ok(table.add_range(name.into(), stored.dtype()?, shape, at, stored.offset())?)
            })?;
        }
        origin.finish(tensors)
    }

    fn finish(mut self, tensors: Vec<Tensor>) -> Result<Origin> {
        for one in tensors {
            self.table
                .add_parts(&one.name, one.dtype, &one.shape, one.parts)?;
        }
        Ok(self)
    }

    /// Adds what a checkpoint's tensors lie in, and gives the position of the first.
    fn add_files(&mut self, checkpoint: &Checkpoint) -> u32 {
        let first = self.table.files().len() as u32;
        for (at, file) in checkpoint.files().iter().enumerate() {
            self.table.add_file(&file.label, file.len);
            self.sources.extend(checkpoint.source(at).cloned());
            self.known.push(without_other_metadata(file));
        }
        first
    }

    fn whole(checkpoint: &Checkpoint) -> Result<Origin> {
        let files = 0..checkpoint.files().len();
        Ok(Origin {
            table: checkpoint.plan_table()?,
            sources: files
                .filter_map(|at| checkpoint.source(at).cloned())
                .collect(),
            known: checkpoint
                .files()
                .iter()
                .map(without_other_metadata)
                .collect(),
            parts: false,
            metadata: checkpoint.metadata().clone().into_iter().collect(),
        })
    }

    /// Takes in the files of one rank.
    fn rank(
        &mut self,
        checkpoint: &Checkpoint,
        shards: &Value,
        tensors: &mut Vec<Tensor>,
        known: &mut HashMap<String, usize>,
    ) -> Result<()> {
        let first = self.add_files(checkpoint);
        if self.metadata.is_empty() {
            let others = checkpoint.metadata().clone().into_iter();
            self.metadata = others.filter(|(key, _)| key != SHARDS).collect();
        }
        for stored in checkpoint.iter() {
            let wrong = || {
                form(
                    checkpoint,
                    &format!("says nothing right of {:?}", stored.name()),
                )
            };
            let said = shards.get("tensors").and_then(|all| all.get(stored.name()));
            let said = said.ok_or_else(wrong)?;
            let name = said.get("name").and_then(Value::as_str);
            let name = name.unwrap_or(stored.name()).to_owned();
            let shape = said.get("shape").and_then(dims).ok_or_else(wrong)?;
            let boxes = said.get("boxes").and_then(Value::as_array);
            let dtype = stored.dtype()?;
            let file = first + stored.file() as u32;
            let range = name.as_str().into();
            let source =
                self.table
                    .add_range(range, dtype, stored.shape(), file, stored.offset())?;
            let at = *known.entry(name.clone()).or_insert_with(|| {
                tensors.push(Tensor {
                    name,
                    dtype,
                    shape: shape.clone(),
                    parts: Vec::new(),
                });
                tensors.len() - 1
            });
            let tensor = tensors.get_mut(at).ok_or_else(wrong)?;
            if tensor.dtype != dtype || tensor.shape != shape {
                return Err(form(
                    checkpoint,
                    &format!(
                        "says another dtype or shape of {:?} than other ranks",
                        tensor.name
                    ),
                ));
            }
            for one in boxes.ok_or_else(wrong)? {
                let part = part(source, one).ok_or_else(wrong)?;
                let size = |part: &Part| part.of.as_ref().map(|of| of.1.clone());
                // What another rank has too is read from the first.
                let same = |other: &Part| other.at == part.at && size(other) == size(&part);
                if !tensor.parts.iter().any(same) {
                    tensor.parts.push(part);
                }
            }
        }
        Ok(())
    }

    /// Compares all files with the checksums that they have, and finds out what kinds there are.
    fn keep(&self, save: &Save<'_>) -> Result<Kept<'static>> {
        let options = Options {
            threads: save.threads,
            cancel: save.cancel,
            ..Options::default()
        };
        let mut kept = Kept::default();
        for (at, (file, source)) in self.known.iter().zip(&self.sources).enumerate() {
            let carried = Carried::of(file, &**source, &options)?;
            let checker = carried.checksums.then(|| file.checker()).transpose()?;
            if let Some(checker) = checker
                && let Some(bad) = bad_chunks(&**source, &checker, &options)?.first()
            {
                return Err(self.corrupt(at, bad).in_file(file.label.clone()));
            }
            kept.add(carried);
        }
        Ok(kept)
    }

    /// The error for a chunk of a file, with the tensors that lie in it.
    fn corrupt(&self, file: usize, bad: &BadChunk) -> Error {
        let end = bad.offset.saturating_add(bad.len);
        let inside = self.table.sources().iter().filter(|source| {
            let len = source.bits().div_ceil(8);
            source.file as usize == file
                && source.offset < end
                && source.offset.saturating_add(len) > bad.offset
        });
        named(bad, inside.map(|source| &*source.name))
    }

    /// What bytes there are.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Plans a request for it. What ranks wrote twice, and their padding, may stay unread.
    ///
    /// # Errors
    /// As [`Checkpoint::plan_request`].
    pub fn plan_request(&self, request: &Request) -> Result<Plan> {
        if !self.parts {
            return Ok(build(&self.table, request)?);
        }
        let request = Request {
            unread: Allow::ALL,
            ..request.clone()
        };
        Ok(build(&self.table, &request)?)
    }

    /// Plans all its tensors on a mesh, each by the first rule that matches its name.
    ///
    /// # Errors
    /// As [`Checkpoint::plan`].
    pub fn plan(&self, mesh: &Mesh, rules: &Rules) -> Result<Plan> {
        self.plan_request(&rules.request(&self.table, mesh)?)
    }
}

fn without_other_metadata(file: &CheckpointFile) -> CheckpointFile {
    let pairs = file.metadata.iter().flatten();
    let sums = pairs.filter(|(key, _)| key == CHECKSUMS_KEY);
    CheckpointFile {
        metadata: Some(sums.cloned().collect()),
        ..file.clone()
    }
}

/// A tensor that is put together of what files hold of it.
#[derive(Debug)]
pub(super) struct Tensor {
    pub name: String,
    pub dtype: tonnage_format::Dtype,
    pub shape: Dims,
    pub parts: Vec<Part>,
}

fn form(checkpoint: &Checkpoint, what: &str) -> Error {
    let label = checkpoint.files().first().map_or("", |file| &file.label);
    Error::usage("SHARDS", format!("{label}: the metadata {SHARDS:?} {what}"))
}

/// What a rank's files say of themselves.
fn said(checkpoint: &Checkpoint) -> Result<Value> {
    let text = checkpoint.metadata().get(SHARDS);
    let text = text.ok_or_else(|| form(checkpoint, "lacks it"))?;
    serde_json::from_str(text).map_err(|error| form(checkpoint, &error.to_string()))
}

pub(super) fn dims(value: &Value) -> Option<Dims> {
    value.as_array()?.iter().map(Value::as_u64).collect()
}

fn part(source: u32, text: &Value) -> Option<Part> {
    let [global, local, size] = text.as_array()?.as_slice() else {
        return None;
    };
    Some(Part {
        source,
        at: dims(global)?,
        of: Some((dims(local)?, dims(size)?)),
    })
}

/// A name of one save that no other has, so that files of two are told apart.
fn set() -> String {
    format!("{:016x}", RandomState::new().build_hasher().finish())
}

/// Bytes of all ranks' tensors, as [`reshard`] writes them.
///
/// # Errors
/// `CAST` for a dtype that a tensor cannot be cast to.
pub fn reshard_bytes(plan: &Plan) -> Result<u64> {
    let mut total = 0_u64;
    for rank in 0..plan.mesh().size() {
        for local in plan.rank(rank)? {
            total = total.saturating_add(len_as(&local, wanted(&local, None))?);
        }
    }
    Ok(total)
}

/// Writes what every rank of a plan has: into `to`, a folder with a file a rank, or, for a plan of one rank, a
/// checkpoint as [`save`](crate::save()) writes it. `to` may be what is read.
///
/// [`Save::progress`] hears of the bytes of all ranks.
///
/// # Errors
/// What reading and writing can say; with [`Save::keep`], which compares all files before anything is written,
/// `CHECKSUM_MISMATCH`, `CHECKSUM_FORM`, `CHECKSUM_STALE`. All ranks' files take the places of older ones at one moment: whoever opens the
/// folder as an [`Origin`] finds those of before or the new ones, whenever this is cut off.
pub fn reshard(
    origin: &Origin,
    plan: &Plan,
    to: &Path,
    load: &PlanLoad<'_>,
    save: &Save<'_>,
) -> Result<Vec<Saved>> {
    let planned = PlannedLoad::new(plan, origin.sources.clone())?;
    // Ranks read the same bytes in many small pieces: one pass over the files beforehand costs less memory.
    let kept = match save.keep {
        true => origin.keep(save)?,
        false => Kept::default(),
    };
    let save = &kept.save(save);
    let ranks = plan.mesh().size();
    let mut written = Written {
        done: 0,
        total: reshard_bytes(plan)?,
        told: save.progress,
    };
    let save = Save {
        metadata: origin.metadata.clone(),
        progress: None,
        ..save.clone()
    };
    if ranks <= 1 {
        let mut saved = one_rank(&planned, 0, to, load, &save, &mut written)?;
        saved.notes.extend(kept.notes);
        // What is whole now was ranks' before, maybe.
        ranks::forget(to)?;
        return Ok(vec![saved]);
    }
    let staging = Staging::create(to, save.durability)?;
    let set = set();
    let mut all = Vec::with_capacity(ranks as usize);
    for rank in 0..ranks {
        let mut save = save.clone();
        let shards = shards(plan, rank, &set, &planned.locals(rank)?);
        save.metadata.push((SHARDS.to_owned(), shards.to_string()));
        let path = staging.file(rank);
        let mut saved = one_rank(&planned, rank, &path, load, &save, &mut written)?;
        let paths = saved.files.iter_mut().chain(&mut saved.index);
        for path in paths {
            // They have these names once all are there.
            if let Some(name) = path.file_name() {
                *path = to.join(name);
            }
        }
        all.push(saved);
    }
    staging.publish()?;
    if let Some(first) = all.first_mut() {
        first.notes.extend(kept.notes);
    }
    Ok(all)
}

/// How much is written.
struct Written<'a> {
    done: u64,
    total: u64,
    told: Option<OnProgressOf<'a>>,
}

impl Written<'_> {
    fn add(&mut self, bytes: usize) {
        self.done = self.done.saturating_add(bytes as u64);
        if let Some(told) = self.told {
            let (done, total) = (self.done, self.total);
            (told.0)(Progress { done, total });
        }
    }
}

fn one_rank(
    planned: &PlannedLoad<'_>,
    rank: u32,
    path: &Path,
    load: &PlanLoad<'_>,
    save: &Save<'_>,
    written: &mut Written<'_>,
) -> Result<Saved> {
    let locals = planned.locals(rank)?;
    let specs: Vec<crate::format::TensorSpec<'_>> = locals
        .iter()
        .map(|local| crate::format::TensorSpec {
            name: &local.name,
            dtype: local.cast.unwrap_or(local.dtype),
            shape: &local.shape,
        })
        .collect();
    let mut writer = Writer::declared(path, &specs, save)?;
    planned.stream(rank, load, AHEAD, &mut |tensor| {
        writer.begin(&tensor.name, tensor.dtype, &tensor.shape)?;
        for piece in tensor.bytes().chunks(PIECE) {
            writer.write(piece)?;
            written.add(piece.len());
        }
        writer.end()
    })?;
    writer.finish()
}

/// Which parts a rank's tensors are, as its files' metadata says it.
fn shards(plan: &Plan, rank: u32, set: &str, locals: &[Local]) -> Value {
    let mut tensors = serde_json::Map::new();
    for local in locals {
        let Some(target) = plan.targets().get(local.target as usize) else {
            continue;
        };
        let boxes: Vec<Value> = local
            .boxes
            .iter()
            .map(|one| json!([&one.global[..], &one.local[..], &one.size[..]]))
            .collect();
        let mut said = json!({"shape": &target.shape[..], "boxes": boxes});
        if local.name != target.name {
            said["name"] = json!(&*target.name);
        }
        tensors.insert(local.name.to_string(), said);
    }
    json!({
        "mesh": plan.mesh().axes(), "ranks": plan.mesh().size(), "rank": rank, "set": set,
        "tensors": tensors,
    })
}
