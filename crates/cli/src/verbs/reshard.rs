//! `reshard`: what every rank of a mesh has, in files of its own.

use std::io::Write;

use serde_json::json;
use tonnage::plan::{Origin, PlanLoad, RECORD, reshard};
use tonnage::{Durability, OnProgressOf, Save};

use super::write::Copying;
use crate::args::{Common, Reshard};
use crate::exit::{Failure, OK};
use crate::terminal::{Bar, Out, cancel};
use crate::{json, text};

/// Runs the verb.
pub fn run(args: &Reshard, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let max_size = args
        .max_shard_size
        .as_deref()
        .map(super::size)
        .transpose()?;
    Copying::to(&args.target, max_size).must_be_free()?;
    if !args.target.force && args.target.output.join(RECORD).exists() {
        // Of a save that was cut off when all of it was there.
        let output = args.target.output.display();
        let text = format!("{output} has ranks' files already; --force replaces them");
        return Err(Failure::Usage(text));
    }
    let origin = Origin::open(&args.target.input, &super::options(common))?;
    let request = super::plan::request(&args.placed, origin.table(), &args.target.input)?;
    let plan = origin.plan_request(&request)?;
    let load = PlanLoad {
        cancel: Some(cancel()),
        ..PlanLoad::default()
    };
    let bar = Bar::new("writing", 0);
    let progress = |progress| bar.set(progress);
    let save = Save {
        progress: Some(OnProgressOf(&progress)),
        max_shard_size: max_size,
        durability: if args.target.no_sync {
            Durability::None
        } else {
            Durability::Full
        },
        cancel: Some(cancel()),
        checksums: args.target.sums.checksums,
        keep: !args.target.sums.no_checksums,
        ..Save::default()
    };
    let saved = reshard(&origin, &plan, &args.target.output, &load, &save)?;
    drop(bar);
    let files: Vec<_> = saved.iter().flat_map(|one| &one.files).collect();
    let notes: Vec<_> = saved.iter().flat_map(|one| &one.notes).cloned().collect();
    let bytes: u64 = saved.iter().map(|one| one.total_size).sum();
    let output = args.target.output.to_string_lossy();
    if common.json {
        let files: Vec<_> = files.iter().map(|file| file.to_string_lossy()).collect();
        let report = json!({
            "schema": "tonnage.reshard/1", "output": output, "files": files,
            "ranks": plan.mesh().size(), "tensors": plan.targets().len(), "bytes": bytes,
            "notes": super::notes(&notes),
        });
        json::write(out, &report)?;
        return Ok(OK);
    }
    writeln!(
        out,
        "{}: {} of {} in {}, {}",
        text::name(&output),
        text::plural(plan.targets().len() as u64, "tensor"),
        text::plural(u64::from(plan.mesh().size()), "rank"),
        text::plural(files.len() as u64, "file"),
        text::size(bytes),
    )?;
    super::tell_notes(&notes, out)?;
    Ok(OK)
}
