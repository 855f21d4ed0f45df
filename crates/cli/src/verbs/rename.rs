//! `rename`: other names for tensors, by name, glob or expression.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use serde_json::{Value, json};
use tonnage::Checkpoint;
use tonnage::edit::Edit;

use crate::args::{Common, Rename};
use crate::exit::{Failure, OK};
use crate::glob::{Rewrite, nothing};
use crate::terminal::Out;
use crate::{json, text};

use super::metadata::{apply, tell};
use super::write::Copying;

/// Runs the verb.
pub fn run(args: &Rename, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let rewrite = if args.regex {
        Rewrite::regex(&args.old, &args.new)?
    } else {
        Rewrite::glob(&args.old, &args.new)?
    };
    let checkpoint = super::open(&args.path, common)?;
    let renamed = mapping(&checkpoint, &rewrite)?;
    if renamed.is_empty() {
        return Err(nothing(&args.old, checkpoint.names()));
    }
    if args.dry_run {
        return show(&renamed, common, out);
    }
    if let Some(output) = &args.output {
        let copying = Copying {
            output,
            max_size: max_size(&checkpoint),
            force: args.force,
            sync: true,
            sums: args.sums,
        };
        let name = |old: &str| renamed.get(old).map(String::as_str);
        return copying.run(
            &checkpoint,
            |tensor| {
                Ok((
                    name(tensor.name()).unwrap_or(tensor.name()),
                    tensor.dtype()?,
                ))
            },
            common,
            out,
        );
    }
    if args.sums.checksums || args.sums.no_checksums {
        let text = "--checksums and --no-checksums are about a copy, which --output asks for";
        return Err(Failure::Usage(text.to_owned()));
    }
    let [file] = checkpoint.files() else {
        let text = format!(
            "{} has several files; --output says where to write the renamed copy",
            args.path.display()
        );
        return Err(Failure::Usage(text));
    };
    if checkpoint.index_path().is_some() {
        let text = format!(
            "{} has an index, which names its tensors; use --output",
            args.path.display()
        );
        return Err(Failure::Usage(text));
    }
    let path = std::path::PathBuf::from(&file.label);
    let rename = |name: &str| renamed.get(name).cloned();
    let done = apply(
        &path,
        Edit {
            rename: Some(&rename),
            ..Edit::default()
        },
        &args.editing,
        common,
    )?;
    tell(
        &path,
        &done,
        &format!("renamed {}", text::plural(done.renamed as u64, "tensor")),
        common,
        out,
    )
}

/// Old names and new ones, of those that change. Two tensors may not end up with one name.
fn mapping<'a>(
    checkpoint: &'a Checkpoint,
    rewrite: &Rewrite,
) -> Result<BTreeMap<&'a str, String>, Failure> {
    let mut renamed = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for name in checkpoint.names() {
        let new = rewrite
            .apply(name)
            .map_or_else(|| name.to_owned(), |new| new.into_owned());
        if !taken.insert(new.clone()) {
            return Err(Failure::Usage(format!(
                "two tensors would be named {new:?}"
            )));
        }
        if new != name {
            renamed.insert(name, new);
        }
    }
    Ok(renamed)
}

/// A copy of a checkpoint of several files has as large files as the original.
fn max_size(checkpoint: &Checkpoint) -> Option<u64> {
    let files = checkpoint.files();
    files
        .iter()
        .map(|file| file.data_bytes)
        .max()
        .filter(|_| files.len() > 1)
}

fn show(renamed: &BTreeMap<&str, String>, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    if common.json {
        let pairs: Vec<Value> = renamed
            .iter()
            .map(|(old, new)| json!({"old": old, "new": new}))
            .collect();
        json::write(
            out,
            &json!({"schema": "tonnage.rename/1", "dry_run": true, "renamed": pairs}),
        )?;
        return Ok(OK);
    }
    for (old, new) in renamed {
        writeln!(out, "{} → {}", text::name(old), text::name(new))?;
    }
    writeln!(
        out,
        "{} would be renamed; nothing was changed",
        text::plural(renamed.len() as u64, "tensor")
    )?;
    Ok(OK)
}
