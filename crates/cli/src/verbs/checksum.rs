//! `checksum`: print, check, add.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tonnage::checksums::{bad_chunks, checksums_of, write_sidecar};
use tonnage::edit::Edit;
use tonnage::engine::{Options, hash};
use tonnage::format::forever::{CHECKSUM_CHUNK, CHECKSUMS_KEY};
use tonnage::storage::FileSource;
use tonnage::{Checkpoint, CheckpointFile, Durability};

use crate::args::{Checksum, ChecksumAction, Common, Editing};
use crate::exit::{FOUND, Failure, OK};
use crate::terminal::{Bar, Out, cancel};
use crate::{json, text};

use super::metadata::{apply, tell};

/// Runs the verb.
pub fn run(args: &Checksum, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    match &args.action {
        ChecksumAction::Print { path } => print(path, common, out),
        ChecksumAction::Check { path } => check(path, common, out),
        ChecksumAction::Add {
            file,
            sidecar,
            editing,
        } => add(file, *sidecar, editing, common, out),
    }
}

/// First byte in the file, bytes and number of each chunk.
fn chunks(file: &CheckpointFile) -> impl Iterator<Item = (u64, u64)> {
    let (start, len) = (file.data_start, file.data_bytes);
    let begins = (0..len.div_ceil(CHECKSUM_CHUNK)).map(|chunk| chunk * CHECKSUM_CHUNK);
    begins.map(move |begin| (start + begin, (len - begin).min(CHECKSUM_CHUNK)))
}

fn print(path: &Path, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let checkpoint = super::open(path, common)?;
    let mut reports: Vec<Value> = Vec::new();
    for file in checkpoint.files() {
        let Some(sums) = file.checksums()? else {
            let text = format!("{} has no checksums", text::name(&file.label));
            return Err(Failure::Absent(text));
        };
        for ((offset, len), sum) in chunks(file).zip(sums) {
            if common.json {
                let crc = format!("{sum:016x}");
                reports.push(
                    json!({"file": file.label, "offset": offset, "bytes": len, "crc64_nvme": crc}),
                );
            } else {
                let name = text::name(&file.label);
                writeln!(out, "{sum:016x}  {offset:>14} {len:>8}  {name}")?;
            }
        }
    }
    if common.json {
        json::write(
            out,
            &json!({"schema": "tonnage.checksums/1", "chunks": reports}),
        )?;
    }
    Ok(OK)
}

fn check(path: &Path, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let checkpoint = super::open(path, common)?;
    let bar = Bar::new("checking", checkpoint.total_bytes());
    let (mut bad, mut checked) = (Vec::new(), 0);
    for (position, file) in checkpoint.files().iter().enumerate() {
        let checker = match file.checker() {
            Err(error) if error.code() == "NO_CHECKSUMS" => {
                let text = format!("{} has no checksums", text::name(&file.label));
                return Err(Failure::Absent(text));
            }
            checker => checker?,
        };
        let progress = |progress| bar.set(progress);
        let options = Options {
            progress: Some(&progress),
            cancel: Some(cancel()),
            ..Options::default()
        };
        if let Some(source) = checkpoint.source(position) {
            let found = bad_chunks(&**source, &checker, &options)?;
            bad.extend(found.into_iter().map(|chunk| (position, chunk)));
            checked += chunks(file).count();
        }
    }
    drop(bar);
    let code = if bad.is_empty() { OK } else { FOUND };
    if common.json {
        let rows: Vec<Value> = bad
            .iter()
            .map(|(position, chunk)| {
                let error = checkpoint.corrupt(*position, chunk);
                json!({
                    "file": error.file(), "offset": chunk.offset, "bytes": chunk.len,
                    "tensor": error.tensor(), "text": error.to_string(),
                })
            })
            .collect();
        let report = json!({"schema": "tonnage.checksum-check/1", "ok": bad.is_empty(), "chunks": checked, "bad": rows});
        json::write(out, &report)?;
        return Ok(code);
    }
    for (position, chunk) in &bad {
        let error = checkpoint.corrupt(*position, chunk).to_string();
        writeln!(out, "{}", text::line(&error))?;
    }
    let wrong = match bad.len() {
        0 => "ok".to_owned(),
        n => format!("{n} wrong"),
    };
    let shown = path.to_string_lossy();
    let all = text::plural(checked as u64, "chunk");
    writeln!(out, "{}: {wrong} · {all}", text::name(&shown))?;
    Ok(code)
}

fn add(
    file: &Path,
    sidecar: bool,
    editing: &Editing,
    common: &Common,
    out: &mut Out,
) -> Result<u8, Failure> {
    let checkpoint = super::open(file, common)?;
    let value = value_of(&checkpoint)?;
    let set = [(CHECKSUMS_KEY.to_owned(), value)];
    let change = Edit {
        set: &set,
        ..Edit::default()
    };
    let done = apply(file, change, editing, common)?;
    if sidecar {
        let source = FileSource::open(file).map_err(tonnage::Error::from)?;
        let options = Options {
            cancel: Some(cancel()),
            ..Options::default()
        };
        let hash = hash::blake3_of(&source, &options).map_err(tonnage::Error::from)?;
        write_sidecar(file, &hash, Durability::Full)?;
    }
    tell(file, &done, "checksums added", common, out)
}

/// The checksums of the data as it is; what there are already must be right.
fn value_of(checkpoint: &Checkpoint) -> Result<String, Failure> {
    let (Some(known), Some(source)) = (checkpoint.files().first(), checkpoint.source(0)) else {
        return Err(Failure::Usage("there is no file".to_owned()));
    };
    let bar = Bar::new("reading", known.data_bytes);
    let progress = |progress| bar.set(progress);
    let options = Options {
        progress: Some(&progress),
        cancel: Some(cancel()),
        ..Options::default()
    };
    if known.checksums()?.is_some()
        && let Some(bad) = bad_chunks(&**source, &known.checker()?, &options)?.first()
    {
        return Err(checkpoint.corrupt(0, bad).into());
    }
    let (start, len) = (known.data_start, known.data_bytes);
    Ok(checksums_of(&**source, start, len, &options)?.to_text())
}
