//! `plan`: which rank of a mesh reads which bytes.

use std::io::Write;
use std::path::Path;

use serde_json::Value;
use tonnage::plan::{
    IoProfile, Mesh, ModelConfig, Place, Placement, Plan, PlannedLoad, Request, Rule, Rules, Table,
    Uneven, auto, explain, html,
};

use crate::args::{Common, Placed, Plan as Arguments};
use crate::exit::{Failure, OK};
use crate::terminal::Out;
use crate::{json, text};

/// Runs the verb.
pub fn run(args: &Arguments, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let checkpoint = super::open(&args.path, common)?;
    let table = checkpoint.plan_table()?;
    let request = request(&args.placed, &table, &args.path)?;
    let plan = checkpoint.plan_request(&request)?;
    let planned = checkpoint.with_plan(&plan)?;
    if let Some(path) = &args.html {
        let page = html(&plan, &IoProfile::NVME)?;
        std::fs::write(path, page)?;
    }
    if common.json {
        // Through a value, so that names are escaped as everywhere.
        let plan: Value = serde_json::from_str(&plan.to_json()).unwrap_or_default();
        json::write(out, &plan)?;
        return Ok(OK);
    }
    match args.rank {
        Some(rank) => {
            let io = planned.io(rank, None)?;
            for line in explain(&plan, rank, &io)?.lines() {
                writeln!(out, "{}", text::line(line))?;
            }
        }
        None => ranks(&plan, &planned, out)?,
    }
    Ok(OK)
}

/// A row a rank.
fn ranks(plan: &Plan, planned: &PlannedLoad<'_>, out: &mut Out) -> Result<(), Failure> {
    if let Some(proof) = plan.proof() {
        writeln!(
            out,
            "{} of {} on {}: {} different local tensors, {} copies, {} elements compared; the proof holds",
            text::plural(plan.targets().len() as u64, "tensor"),
            text::plural(plan.files().len() as u64, "file"),
            text::plural(u64::from(plan.mesh().size()), "rank"),
            proof.layouts,
            proof.nests,
            proof.points,
        )?;
    }
    for rank in 0..plan.mesh().size() {
        let mut seat = Vec::new();
        for (name, _) in plan.mesh().axes() {
            let at = plan.mesh().coordinate(rank, name);
            seat.push(format!("{name} {}", at.map_err(tonnage::Error::from)?));
        }
        let io = planned.io(rank, None)?;
        let locals = planned.locals(rank)?;
        writeln!(
            out,
            "rank {rank} ({}): {}, {} needed, {} read",
            seat.join(", "),
            text::plural(locals.len() as u64, "tensor"),
            text::size(io.needed),
            text::size(io.read),
        )?;
    }
    Ok(())
}

/// What is asked for: all tensors of a table, placed as the arguments say.
///
/// # Errors
/// Arguments that are not of their form; tensors that no rule places.
pub fn request(placed: &Placed, table: &Table, path: &Path) -> Result<Request, Failure> {
    let mesh = mesh(&placed.mesh)?;
    if placed.rules == ["auto"] {
        return Ok(auto(table, &mesh, ModelConfig::beside(path)));
    }
    let mut rules = Rules::default();
    for rule in &placed.rules {
        rules.0.extend(one(rule)?.0);
    }
    Ok(rules.request(table, &mesh).map_err(tonnage::Error::from)?)
}

fn mesh(text: &str) -> Result<Mesh, Failure> {
    let axes: Option<Vec<(&str, u32)>> = text
        .split(',')
        .map(|axis| {
            let (name, size) = axis.split_once('=')?;
            Some((name.trim(), size.trim().parse().ok()?))
        })
        .collect();
    let axes = axes.ok_or_else(|| {
        Failure::Usage(format!(
            "{text:?} is no mesh: it is written AXIS=N,AXIS=N, as in pp=2,tp=4"
        ))
    })?;
    Ok(Mesh::new(&axes).map_err(tonnage::Error::from)?)
}

/// A rule, or the file of several.
fn one(text: &str) -> Result<Rules, Failure> {
    let Some((pattern, placement)) = text.rsplit_once('=') else {
        let json = std::fs::read_to_string(text).map_err(|error| {
            Failure::Usage(format!(
                "rules {text:?}: no PATTERN=PLACEMENT, and as a file: {error}"
            ))
        })?;
        return Ok(Rules::from_json(&json).map_err(tonnage::Error::from)?);
    };
    let wrong = || {
        Failure::Usage(format!(
            "{placement:?} is no placement: replicate, shard:DIM, strided:DIM:GROUPS or owner:COORDINATE"
        ))
    };
    let mut parts = placement.split(':');
    let word = parts.next().unwrap_or("");
    let numbers: Option<Vec<i64>> = parts.map(|part| part.parse().ok()).collect();
    let placement = match (word, numbers.ok_or_else(wrong)?.as_slice()) {
        ("replicate", []) => {
            return Ok(Rules(vec![(pattern.to_owned(), Rule::Axes(Place::new()))]));
        }
        ("shard", [dim]) => Placement::shard(*dim),
        ("strided", [dim, groups]) => Placement::Strided {
            dim: *dim,
            groups: u64::try_from(*groups).map_err(|_| wrong())?,
            uneven: Uneven::Torch,
        },
        ("owner", [coord]) => Placement::Owner(vec![u32::try_from(*coord).map_err(|_| wrong())?]),
        _ => return Err(wrong()),
    };
    Ok(Rules(vec![(pattern.to_owned(), Rule::One(placement))]))
}
