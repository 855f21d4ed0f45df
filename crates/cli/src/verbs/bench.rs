//! `bench`: what this machine can do, and the loader against it, on the user's own checkpoint.
//!
//! Cold means that the checkpoint's own pages were dropped from the page cache before; nothing else is
//! touched. Sides take turns within a round, in another order each time; what counts is the median.

mod chart;
mod devices;
mod loader;
mod machine;
mod reference;
mod report;

use std::time::{Duration, Instant};

use tonnage::{Checkpoint, TensorRef};

use self::loader::Bench;
use self::reference::Reference;
use self::report::Report;
use crate::args::{self, Common};
use crate::exit::{Failure, OK};
use crate::glob::Selection;
use crate::json;
use crate::terminal::Out;

/// Runs the verb.
pub fn run(args: &args::Bench, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let start = Instant::now();
    let checkpoint = super::open(&args.path, common)?;
    let tensors = chosen(args, &checkpoint)?;
    let stretches = machine::stretches(&checkpoint, &tensors);
    let bytes = tensors.iter().map(TensorRef::byte_len).sum();
    let mut notes = Vec::new();
    let reference = if args.no_reference {
        None
    } else {
        let python = args.python.clone().unwrap_or_else(reference::usual);
        match Reference::start(&python) {
            Ok(reference) => Some(reference),
            // Who named one wants it.
            Err(why) if args.python.is_some() => return Err(Failure::Usage(why)),
            Err(why) => {
                notes.push(why);
                None
            }
        }
    };
    let mut report = Report {
        path: args.path.to_string_lossy().into_owned(),
        tensors: (tensors.len(), checkpoint.len()),
        bytes: (bytes, checkpoint.total_bytes()),
        machine: machine::description(&stretches),
        reference: reference.as_ref().map(|reference| reference.words.clone()),
        limits: Vec::new(),
        loads: Vec::new(),
        notes,
        seconds: 0.0,
    };
    let settings = super::devices::settings();
    let targets = devices::targets(&args.device, &settings, &mut report.notes)?;
    let mut bench = Bench {
        checkpoint: &checkpoint,
        tensors: &tensors,
        stretches: &stretches,
        reference,
        rounds: args.rounds.max(1),
        end: start.checked_add(Duration::from_secs(args.seconds)),
        targets,
    };
    bench.limits(&mut report)?;
    bench.loads(&mut report)?;
    report.seconds = start.elapsed().as_secs_f64();
    if let Some(path) = &args.html {
        std::fs::write(path, chart::html(&report)).map_err(|error| {
            let label = path.to_string_lossy();
            tonnage::Error::from(tonnage::storage::Error::new("write", &*label, error))
        })?;
    }
    if common.json {
        json::write(out, &report.to_json())?;
    } else {
        report.write(out)?;
    }
    Ok(OK)
}

/// What is loaded: the selected tensors in file order, up to so many bytes, at least one.
fn chosen<'a>(
    args: &args::Bench,
    checkpoint: &'a Checkpoint,
) -> Result<Vec<TensorRef<'a>>, Failure> {
    let selection = Selection::new(&args.select);
    let most = super::size(&args.bytes)?;
    let mut bytes = 0_u64;
    let mut chosen: Vec<TensorRef<'a>> = Vec::new();
    for tensor in checkpoint
        .iter()
        .filter(|tensor| selection.has(tensor.name()))
    {
        bytes = bytes.saturating_add(tensor.byte_len());
        if bytes > most && !chosen.is_empty() {
            break;
        }
        chosen.push(tensor);
    }
    if chosen.is_empty() && !args.select.is_empty() {
        return Err(selection.nothing(checkpoint.names()));
    }
    if chosen.iter().all(|tensor| tensor.byte_len() == 0) {
        return Err(Failure::Absent(
            "there is nothing to load: no tensor has any bytes".to_owned(),
        ));
    }
    Ok(chosen)
}
