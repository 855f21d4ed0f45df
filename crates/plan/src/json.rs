//! Plans as JSON: what other ranks, other programs and other days read, and what the digest is of.
//!
//! ```text
//! {"format": "tonnage-plan", "version": 1, "mesh": …, "alt": …, "unread": …, "repeated": …,
//!  "files":   [[label, bytes], …],
//!  "sources": [[name, dtype, shape, file, first byte, whether the name stands for it], …],
//!  "parts":   [[name, dtype, shape, [[source, index, box or null], …]], …],
//!  "ranks":   [[layout or null, for each rank], …],
//!  "targets": [{"name", "dtype", "cast", "shape", "expr", "place", "local", "note", "ranks": position,
//!               "layouts": [{"shape", "boxes": [[global, local, size], …],
//!                            "nests": [[source, src, dst, run, [[extent, src, dst], …]], …],
//!                            "fills": [[dst, run, [[extent, dst], …]], …], "phase"}, …]}, …]}
//! ```

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use tonnage_format::Dtype;

use crate::error::{Error, Reason, Result};
use crate::expr::Expr;
use crate::limits;
use crate::mesh::Mesh;
use crate::plan::{ABSENT, Fill, Layout, Loop, Nest, Plan, Region, Target};
use crate::request::{Allow, Place};
use crate::table::{Part, Table};
use crate::view::{Dims, elements};

const FORMAT: &str = "tonnage-plan";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text<'a> {
    format: Cow<'a, str>,
    version: u32,
    mesh: Vec<(String, u32)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    alt: Vec<Vec<(String, u32)>>,
    #[serde(default, skip_serializing_if = "Allow::is_error")]
    unread: Allow,
    #[serde(default, skip_serializing_if = "Allow::is_error")]
    repeated: Allow,
    files: Vec<(Cow<'a, str>, u64)>,
    sources: Vec<(Arc<str>, Dtype, Dims, u32, u64, bool)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parts: Vec<(Arc<str>, Dtype, Dims, PartTexts)>,
    ranks: Vec<Vec<Option<u32>>>,
    targets: Vec<TargetText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetText {
    name: Arc<str>,
    dtype: Dtype,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cast: Option<Dtype>,
    shape: Dims,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expr: Option<Expr>,
    #[serde(default, skip_serializing_if = "is_empty")]
    place: Arc<Place>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    local: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<Arc<str>>,
    ranks: u32,
    layouts: Vec<LayoutText>,
}

type PartTexts = Vec<(u32, Dims, Option<(Dims, Dims)>)>;
type Loops = SmallVec<[(u64, u64, u64); 3]>;
type FillLoops = SmallVec<[(u64, u64); 3]>;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayoutText {
    shape: Dims,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    boxes: Vec<(Dims, Dims, Dims)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    nests: Vec<(u32, u64, u64, u64, Loops)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    fills: Vec<(u64, u64, FillLoops)>,
    #[serde(default, skip_serializing_if = "SmallVec::is_empty")]
    phase: Dims,
}

fn is_empty(place: &Arc<Place>) -> bool {
    place.is_empty()
}

fn form(found: impl std::fmt::Display, needed: impl std::fmt::Display) -> Error {
    Error::new(Reason::Form).found(found).needed(needed)
}

impl Plan {
    /// The plan as JSON.
    pub fn to_json(&self) -> String {
        let mut text = Vec::new();
        // Keys are strings, there are no floats, and memory takes all bytes: nothing here can fail.
        let _ = self.write(&mut text, true);
        String::from_utf8(text).unwrap_or_default()
    }

    /// Writes the plan as JSON.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_json(&self, to: impl Write) -> io::Result<()> {
        self.write(to, true)
    }

    /// BLAKE3 of the plan's JSON, but for the labels of files, which are paths and may differ between
    /// ranks. Ranks that work together compare it before they do.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let _ = self.write(io::BufWriter::with_capacity(1 << 16, &mut hasher), false);
        *hasher.finalize().as_bytes()
    }

    fn write(&self, to: impl Write, labels: bool) -> io::Result<()> {
        let mut maps = Maps::default();
        let targets = self.targets.iter().map(|t| maps.target(t)).collect();
        let table = &self.table;
        let text = Text {
            format: FORMAT.into(),
            version: VERSION,
            mesh: self.mesh.axes().to_vec(),
            alt: self.mesh.alt().to_vec(),
            unread: self.unread.clone(),
            repeated: self.repeated.clone(),
            files: table
                .files()
                .iter()
                .map(|file| {
                    (
                        if labels { file.label.as_str() } else { "" }.into(),
                        file.len,
                    )
                })
                .collect(),
            sources: table
                .sources()
                .iter()
                .enumerate()
                .map(|(at, source)| {
                    let named = table.stands_for(&source.name, at as u32);
                    let (shape, file) = (source.shape.clone(), source.file);
                    (
                        source.name.clone(),
                        source.dtype,
                        shape,
                        file,
                        source.offset,
                        named,
                    )
                })
                .collect(),
            parts: table
                .parts()
                .iter()
                .map(|parts| {
                    let of = parts.parts.iter();
                    let of = of.map(|part| (part.source, part.at.clone(), part.of.clone()));
                    (
                        parts.name.clone(),
                        parts.dtype,
                        parts.shape.clone(),
                        of.collect(),
                    )
                })
                .collect(),
            ranks: maps.lists,
            targets,
        };
        let mut to = to;
        serde_json::to_writer(&mut to, &text)?;
        to.flush()
    }

    /// A plan from its JSON. That it has the form of one is checked here; that it holds,
    /// [`Plan::verify`] says.
    ///
    /// # Errors
    /// [`Reason::Form`], [`Reason::Bounds`], [`Reason::Mesh`], [`Reason::Limit`].
    pub fn from_json(text: &str) -> Result<Plan> {
        let text: Text<'_> =
            serde_json::from_str(text).map_err(|error| Error::new(Reason::Form).found(error))?;
        if text.format != FORMAT || text.version != VERSION {
            return Err(form(
                format_args!("{:?}, version {}", text.format, text.version),
                format_args!("{FORMAT:?}, version {VERSION}"),
            ));
        }
        let mesh = Mesh::with_alt(text.mesh, text.alt)?;
        let places = u64::from(mesh.size()).saturating_mul(text.targets.len() as u64);
        if places > limits::PLACES {
            return Err(Error::new(Reason::Limit)
                .found(format_args!("{places} pairs of tensors and ranks"))
                .needed(format_args!("at most {}", limits::PLACES)));
        }
        let mut table = Table::new();
        for (label, len) in &text.files {
            table.add_file(label, *len);
        }
        for (name, dtype, shape, file, offset, named) in text.sources {
            if named {
                table.add(&name, dtype, &shape, file, offset)?;
            } else {
                table.add_range(name, dtype, &shape, file, offset)?;
            }
        }
        for (name, dtype, shape, of) in text.parts {
            let parts = of.into_iter();
            let parts = parts.map(|(source, at, of)| Part { source, at, of });
            table.add_parts(&name, dtype, &shape, parts.collect())?;
        }
        let ranks: Result<Vec<Arc<[u32]>>> = text.ranks.iter().map(|one| map(one, &mesh)).collect();
        let ranks = ranks?;
        let mut targets = Vec::with_capacity(text.targets.len());
        for target in text.targets {
            let name = target.name.clone();
            let made = target.made(&ranks, &table);
            targets.push(made.map_err(|error| error.tensor(&name))?);
        }
        Ok(Plan {
            mesh,
            table,
            targets,
            unread: text.unread,
            repeated: text.repeated,
            proof: None,
        })
    }
}

fn map(list: &[Option<u32>], mesh: &Mesh) -> Result<Arc<[u32]>> {
    if list.len() != mesh.size() as usize {
        return Err(form(
            format_args!("layouts of {} ranks", list.len()),
            format_args!("of {}", mesh.size()),
        ));
    }
    Ok(list.iter().map(|one| one.unwrap_or(ABSENT)).collect())
}

/// Lists of what each rank has, each written once.
#[derive(Default)]
struct Maps {
    known: HashMap<Arc<[u32]>, u32>,
    lists: Vec<Vec<Option<u32>>>,
}

impl Maps {
    fn target(&mut self, target: &Target) -> TargetText {
        let ranks = match self.known.get(&target.ranks) {
            Some(&at) => at,
            None => {
                let at = self.lists.len() as u32;
                let list = target.ranks.iter();
                self.lists
                    .push(list.map(|&one| (one != ABSENT).then_some(one)).collect());
                self.known.insert(target.ranks.clone(), at);
                at
            }
        };
        TargetText {
            name: target.name.clone(),
            dtype: target.dtype,
            cast: target.cast,
            shape: target.shape.clone(),
            expr: target.expr.clone(),
            place: target.place.clone(),
            local: target.local.clone(),
            note: target.note.clone(),
            ranks,
            layouts: target.layouts.iter().map(|one| layout(one)).collect(),
        }
    }
}

fn layout(layout: &Layout) -> LayoutText {
    let boxes = layout.boxes.iter();
    let nests = layout.nests.iter();
    let fills = layout.fills.iter();
    LayoutText {
        shape: layout.shape.clone(),
        boxes: boxes
            .map(|one| (one.global.clone(), one.local.clone(), one.size.clone()))
            .collect(),
        nests: nests
            .map(|nest| {
                let loops = nest.loops.iter();
                let loops = loops.map(|one| (one.extent, one.src, one.dst)).collect();
                (nest.source, nest.src, nest.dst, nest.run, loops)
            })
            .collect(),
        fills: fills
            .map(|fill| {
                let loops = fill.loops.iter().map(|one| (one.extent, one.dst));
                (fill.dst, fill.run, loops.collect())
            })
            .collect(),
        phase: layout.block_phase.clone(),
    }
}

impl TargetText {
    fn made(self, ranks: &[Arc<[u32]>], table: &Table) -> Result<Target> {
        elements(self.dtype, &self.shape)?;
        let map = ranks.get(self.ranks as usize).ok_or_else(|| {
            form(
                format_args!("ranks {}", self.ranks),
                "a position of `ranks`",
            )
        })?;
        let count = self.layouts.len() as u32;
        if let Some(one) = map.iter().find(|&&one| one != ABSENT && one >= count) {
            return Err(form(
                format_args!("layout {one}"),
                format_args!("one of {count}"),
            ));
        }
        let (dtype, rank) = (self.dtype, self.shape.len());
        let layouts = self.layouts.into_iter();
        let layouts: Result<Vec<Arc<Layout>>> = layouts
            .map(|one| one.made(dtype, rank, table).map(Arc::new))
            .collect();
        Ok(Target {
            name: self.name,
            dtype,
            cast: self.cast,
            shape: self.shape,
            expr: self.expr,
            place: self.place,
            local: self.local,
            note: self.note,
            layouts: layouts?,
            ranks: map.clone(),
        })
    }
}

impl LayoutText {
    fn made(self, dtype: Dtype, rank: usize, table: &Table) -> Result<Layout> {
        let bits = elements(dtype, &self.shape)?.saturating_mul(dtype.bitsize() as u64);
        let fits = |dims: &Dims| dims.len() == rank;
        let boxes = self.boxes.iter();
        let shaped = boxes.fold(fits(&self.shape), |fit, (global, local, size)| {
            fit && fits(global) && fits(local) && fits(size)
        });
        if !shaped || !(self.phase.is_empty() || fits(&self.phase)) {
            return Err(form(
                format_args!("a layout of shape {:?}", self.shape),
                format_args!("{rank} dimensions in all of it"),
            ));
        }
        let nests = self
            .nests
            .into_iter()
            .map(|(source, src, dst, run, loops)| {
                let file = table.sources().get(source as usize).map(|one| one.file);
                let file = file.ok_or_else(|| {
                    form(
                        format_args!("source {source}"),
                        format_args!("one of {}", table.sources().len()),
                    )
                })?;
                let loops = loops.into_iter();
                let loops = loops.map(|(extent, src, dst)| Loop { extent, src, dst });
                let loops = checked(loops.collect(), run, bits)?;
                Ok(Nest {
                    source,
                    file,
                    src,
                    dst,
                    run,
                    loops,
                })
            });
        let fills = self.fills.into_iter().map(|(dst, run, loops)| {
            let loops = loops.into_iter();
            let loops = loops.map(|(extent, dst)| Loop {
                extent,
                src: 0,
                dst,
            });
            let loops = checked(loops.collect(), run, bits)?;
            Ok(Fill { dst, run, loops })
        });
        Ok(Layout {
            nests: nests.collect::<Result<Vec<Nest>>>()?,
            fills: fills.collect::<Result<Vec<Fill>>>()?,
            shape: self.shape,
            boxes: self
                .boxes
                .into_iter()
                .map(|(global, local, size)| Region {
                    global,
                    local,
                    size,
                })
                .collect(),
            block_phase: self.phase,
        })
    }
}

/// Loops that can be: no more than dimensions twice over, none of less than two positions, no more
/// bits in all than the tensor has.
fn checked(loops: SmallVec<[Loop; 3]>, run: u64, bits: u64) -> Result<SmallVec<[Loop; 3]>> {
    let count = loops
        .iter()
        .try_fold(run, |product, one| product.checked_mul(one.extent));
    let fits = count.is_some_and(|count| count <= bits);
    if run == 0 || !fits || loops.len() > limits::LOOPS || loops.iter().any(|one| one.extent < 2) {
        return Err(form(
            format_args!("a copy of runs of {run} bits in {} loops", loops.len()),
            format_args!("runs, loops of at least 2, and at most {bits} bits in all"),
        ));
    }
    Ok(loops)
}
