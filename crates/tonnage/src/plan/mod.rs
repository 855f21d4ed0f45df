//! Plans made for a checkpoint, and carried out: what one rank of many loads, and no more.
//!
//! [`Checkpoint::plan`] makes a [`Plan`] from a mesh and rules; [`Checkpoint::with_plan`] gives a [`PlannedLoad`], whose
//! [`PlannedLoad::load`] reads what a rank needs into host memory, [`PlannedLoad::load_to`] into a device's, and
//! [`PlannedLoad::stream`] tensor by tensor in the order of the request.
//!
//! ```
//! use tonnage::plan::{Mesh, PlanLoad, Rules};
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model.safetensors");
//! # let data: Vec<u8> = (0..24).collect();
//! # let (name, dtype, shape) = ("w", tonnage::Dtype::U8, &[4, 6][..]);
//! # let tensor = tonnage::TensorData { name, dtype, shape, data: &data };
//! # tonnage::save(&[tensor], &path, &tonnage::Save::default())?;
//! let checkpoint = tonnage::Checkpoint::open(&path)?;
//! let mesh = Mesh::new(&[("tp", 2)])?;
//! let rules = Rules::from_json(r#"{"w": {"shard": {"dim": 1}}}"#)?;
//! let plan = checkpoint.plan(&mesh, &rules)?;
//! let loaded = checkpoint.with_plan(&plan)?.load(1, &PlanLoad::default())?;
//! let (tensor, bytes) = loaded.get("w").expect("the plan has it");
//! assert_eq!((&tensor.shape[..], &bytes[..3]), (&[4, 3][..], &[3, 4, 5][..]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod auto;
mod collective;
pub(crate) mod device;
mod gathered;
mod load;
mod parts;
mod quant;
mod ranks;
mod reshard;
mod scatter;
mod shm;
mod show;
mod stream;
mod together;

use std::collections::HashMap;
use std::sync::Arc;

pub use auto::{ModelConfig, auto};
pub use collective::MessageSizes;
pub use load::{LocalMemory, PlanLoad, Ran};
pub use quant::{QuantPlan, QuantShard};
pub use tonnage_quant::map::QuantMap;
pub use tonnage_quant::slice::Fallback;

pub use ranks::{RECORD, rank_file};
pub use reshard::{Origin, SHARDS, reshard, reshard_bytes};
pub use shm::Meeting;
pub use show::{explain, html};
pub use stream::PlannedTensor;
pub use together::{Raw, Together, WINDOW, exchange, messages};
use tonnage_engine as engine;
pub use tonnage_plan::exchange::{Exchange, Means, choose};
use tonnage_plan::io::copies;
pub use tonnage_plan::io::{IoPlan, IoProfile, TensorIo, Way};
pub use tonnage_plan::{
    Allow, Error as PlanError, Expr, Fill, Layout, Local, Mesh, Nest, Others, Place, Placement,
    Plan, Proof, Region, Request, Rule, Rules, Table, Target, Uneven, Wanted, build,
};
use tonnage_storage::Source;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

impl Checkpoint {
    /// What bytes there are, as plans see it.
    ///
    /// # Errors
    /// A plan's `PLAN_BOUNDS` or `PLAN_GRANULARITY`, which no catalog that was opened has.
    pub fn plan_table(&self) -> Result<Table> {
        Ok(Table::from_catalog(&self.catalog)?)
    }

    /// Plans a load of all tensors on a mesh of ranks, each placed by the first rule that matches its name, and
    /// proves the plan.
    ///
    /// # Errors
    /// `PLAN_NO_RULE` for a tensor that no rule matches; other codes that begin with `PLAN_`, with the tensor, the
    /// range, what was found and what was needed.
    pub fn plan(&self, mesh: &Mesh, rules: &Rules) -> Result<Plan> {
        let table = self.plan_table()?;
        Ok(build(&table, &rules.request(&table, mesh)?)?)
    }

    /// Plans what a request says, and proves the plan.
    ///
    /// # Errors
    /// As [`Checkpoint::plan`].
    pub fn plan_request(&self, request: &Request) -> Result<Plan> {
        Ok(build(&self.plan_table()?, request)?)
    }

    /// A plan together with the files that it is about: those of this checkpoint.
    ///
    /// # Errors
    /// `PLAN_FILES` where a file or a tensor of the plan is not here, or lies elsewhere: it was made for another
    /// checkpoint.
    pub fn with_plan<'a>(&'a self, plan: &'a Plan) -> Result<PlannedLoad<'a>> {
        let files = match_files(self, plan)?;
        let lost = || Error::usage("PLAN_FILES", "no such file");
        let sources = (files.iter())
            .map(|&file| self.source(file).cloned().ok_or_else(lost))
            .collect::<Result<Vec<_>>>()?;
        Ok(PlannedLoad {
            plan,
            sources,
            checkpoint: Some((self, files)),
        })
    }
}

/// A plan, and sources for its files.
#[derive(Debug)]
pub struct PlannedLoad<'a> {
    plan: &'a Plan,
    /// By position of the plan's file.
    sources: Vec<Arc<dyn Source>>,
    /// The checkpoint that they are from, and the positions of the files there.
    checkpoint: Option<(&'a Checkpoint, Vec<usize>)>,
}

impl<'a> PlannedLoad<'a> {
    /// A plan, and a source for each of its files, in their order.
    ///
    /// # Errors
    /// `PLAN_FILES` where their number or the length of one is another.
    pub fn new(plan: &'a Plan, sources: Vec<Arc<dyn Source>>) -> Result<Self> {
        let (found, needed) = (sources.len(), plan.files().len());
        if found != needed {
            let text = format!("the plan is about {needed} files, given are {found}");
            return Err(Error::usage("PLAN_FILES", text));
        }
        for (source, file) in sources.iter().zip(plan.files()) {
            check_len(file, source.label(), source.len())?;
        }
        Ok(PlannedLoad {
            plan,
            sources,
            checkpoint: None,
        })
    }

    /// The plan.
    pub fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// The tensors of a rank.
    ///
    /// # Errors
    /// `PLAN_MESH` for a rank that the mesh has not.
    pub fn locals(&self, rank: u32) -> Result<Vec<Local>> {
        Ok(self.plan.rank(rank)?)
    }

    /// How a rank's bytes are read: by the profile given, or by what is known of the files.
    ///
    /// # Errors
    /// As [`PlannedLoad::locals`]; `PLAN_GRANULARITY`.
    pub fn io(&self, rank: u32, profile: Option<IoProfile>) -> Result<IoPlan> {
        let locals = self.locals(rank)?;
        let copies = copies(&locals)?;
        let profile = profile.unwrap_or_else(|| self.profile(&copies, engine::Strategy::Auto));
        Ok(IoPlan::new(copies, locals.len(), &profile))
    }

    /// The error of a run, with the tensor whose bytes could not be read.
    fn named(&self, error: engine::Error) -> Error {
        let found = match &error {
            engine::Error::Storage { error, offset } => self.source_at(error.label(), *offset),
            _ => None,
        };
        let error = Error::from(error);
        match found {
            Some((name, range)) => error.about(name, Some(range)),
            None => error,
        }
    }

    /// The tensor that has this byte of the file with this label, and its bytes.
    fn source_at(&self, label: &str, offset: u64) -> Option<(&str, std::ops::Range<u64>)> {
        let file = (self.sources.iter()).position(|source| source.label() == label)?;
        let mut sources = (self.plan.sources().iter()).filter(|one| one.file as usize == file);
        let bytes = |one: &tonnage_plan::Source| {
            one.offset..one.offset.saturating_add(one.bits().div_ceil(8))
        };
        sources
            .find(|one| bytes(one).contains(&offset))
            .map(|one| (&*one.name, bytes(one)))
    }
}

/// Placements by the names of their axes, as JSON.
pub fn place_json(place: &Place) -> String {
    // Keys are strings and there are no floats, so nothing here can fail.
    serde_json::to_string(place).unwrap_or_default()
}

/// For each file of a plan the position of the checkpoint's, once every tensor has been found where it should be.
fn match_files(checkpoint: &Checkpoint, plan: &Plan) -> Result<Vec<usize>> {
    let base = |label: &str| label.rsplit(['/', '\\']).next().unwrap_or(label).to_owned();
    let mut by_label: HashMap<String, usize> = HashMap::new();
    for (at, file) in checkpoint.files().iter().enumerate() {
        by_label.entry(base(&file.label)).or_insert(at);
        by_label.insert(file.label.clone(), at);
    }
    let mut files = Vec::with_capacity(plan.files().len());
    for file in plan.files() {
        let found = by_label
            .get(&file.label)
            .or_else(|| by_label.get(&base(&file.label)));
        let Some(&at) = found else {
            let text = format!("the plan reads {:?}, which is not here", file.label);
            return Err(Error::usage("PLAN_FILES", text));
        };
        let here = checkpoint.files().get(at).map_or(0, |file| file.len);
        check_len(file, &file.label, here)?;
        files.push(at);
    }
    for source in plan.sources() {
        let found = checkpoint.get(&source.name);
        let file = files.get(source.file as usize).copied();
        let same = found.is_some_and(|tensor| {
            tensor.dtype().ok() == Some(source.dtype)
                && tensor.shape() == &*source.shape
                && Some(tensor.file()) == file
                && tensor.offset() == source.offset
        });
        if !same {
            let text = format!(
                "tensor {:?} is not where the plan says, or is another: it was made for other files",
                &*source.name
            );
            return Err(Error::usage("PLAN_FILES", text));
        }
    }
    Ok(files)
}

fn check_len(file: &tonnage_plan::File, label: &str, found: u64) -> Result<()> {
    if file.len == found {
        return Ok(());
    }
    let text = format!(
        "{label} has {found} bytes, and the plan is about a file of {}",
        file.len
    );
    Err(Error::usage("PLAN_FILES", text))
}
