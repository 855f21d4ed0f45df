//! `metadata`: get, set, delete.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::json;
use tonnage::edit::{Edit, Edited, Way, edit};
use tonnage::engine::Options;

use crate::args::{Common, Editing, Metadata, MetadataAction};
use crate::exit::{Failure, OK};
use crate::terminal::{Bar, Out, cancel};
use crate::{json, text};

/// Runs the verb.
pub fn run(args: &Metadata, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    match &args.action {
        MetadataAction::Get { path, key } => get(path, key.as_deref(), common, out),
        MetadataAction::Set {
            file,
            pairs,
            editing,
        } => {
            let set = pairs
                .iter()
                .map(|pair| split(pair))
                .collect::<Result<Vec<_>, _>>()?;
            let change = Edit {
                set: &set,
                ..Edit::default()
            };
            let done = apply(file, change, editing, common)?;
            tell(
                file,
                &done,
                &format!("set {}", text::plural(set.len() as u64, "key")),
                common,
                out,
            )
        }
        MetadataAction::Delete {
            file,
            keys,
            editing,
        } => {
            let change = Edit {
                delete: keys,
                ..Edit::default()
            };
            let done = apply(file, change, editing, common)?;
            if done.deleted == 0 {
                return Err(Failure::Absent(format!(
                    "no such key in {}",
                    file.display()
                )));
            }
            let what = format!("deleted {}", text::plural(done.deleted as u64, "key"));
            tell(file, &done, &what, common, out)
        }
    }
}

fn get(path: &Path, key: Option<&str>, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let checkpoint = super::open(path, common)?;
    let all = checkpoint.metadata();
    let Some(key) = key else {
        if common.json {
            json::write(
                out,
                &json!({"schema": "tonnage.metadata/1", "metadata": all}),
            )?;
            return Ok(OK);
        }
        for (key, value) in all {
            writeln!(out, "{} = {}", text::name(key), text::whole(value))?;
        }
        return Ok(OK);
    };
    let Some(value) = all.get(key) else {
        return Err(Failure::Absent(format!(
            "{} has no metadata key {key:?}",
            path.display()
        )));
    };
    if common.json {
        let one = BTreeMap::from([(key, value)]);
        json::write(
            out,
            &json!({"schema": "tonnage.metadata/1", "metadata": one}),
        )?;
    } else {
        writeln!(out, "{}", text::whole(value))?;
    }
    Ok(OK)
}

fn split(pair: &str) -> Result<(String, String), Failure> {
    let Some((key, value)) = pair.split_once('=') else {
        return Err(Failure::Usage(format!("{pair:?} is not KEY=VALUE")));
    };
    Ok((key.to_owned(), value.to_owned()))
}

/// Edits a file with a progress bar, until Ctrl-C.
pub fn apply(
    file: &Path,
    change: Edit<'_>,
    editing: &Editing,
    common: &Common,
) -> Result<Edited, Failure> {
    must_be_editable(file)?;
    let reserve = match &editing.reserve {
        Some(size) => super::size(size)?,
        None => 0,
    };
    let bar = Bar::new("copying", 0);
    let progress = |progress| bar.set(progress);
    let options = Options {
        progress: Some(&progress),
        cancel: Some(cancel()),
        ..Options::default()
    };
    let read = super::options(common).read;
    Ok(edit(
        file,
        &Edit {
            in_place: editing.in_place,
            drop_sidecar: editing.drop_sidecar,
            reserve,
            read,
            options,
            ..change
        },
    )?)
}

/// A folder has no header; a file of a download cache is named after its content and may not change.
fn must_be_editable(file: &Path) -> Result<(), Failure> {
    let shown = file.display();
    let Ok(real) = file.canonicalize() else {
        // The edit itself says what is wrong.
        return Ok(());
    };
    if real.is_dir() {
        return Err(Failure::Usage(format!(
            "{shown} is a folder; name the file whose header is to change"
        )));
    }
    let blobs = real.parent().filter(|folder| folder.ends_with("blobs"));
    let cached = blobs
        .and_then(Path::parent)
        .is_some_and(|cache| cache.join("snapshots").is_dir());
    if cached && file.is_symlink() {
        let text = format!(
            "{shown} is a link into a download cache, whose files must not change; edit a copy"
        );
        return Err(Failure::Usage(text));
    }
    Ok(())
}

/// Says what was done, and which way.
pub fn tell(
    file: &Path,
    done: &Edited,
    what: &str,
    common: &Common,
    out: &mut Out,
) -> Result<u8, Failure> {
    let path = file.to_string_lossy();
    if common.json {
        let report = json!({
            "schema": "tonnage.edit/1", "file": path, "way": done.way.name(), "bytes_written": done.written,
            "renamed": done.renamed, "deleted": done.deleted, "notes": super::notes(&done.notes),
        });
        json::write(out, &report)?;
        return Ok(OK);
    }
    let way = match done.way {
        Way::Unchanged => "nothing to change".to_owned(),
        Way::Sector => format!(
            "in place, {} of one sector",
            text::plural(done.written, "byte")
        ),
        Way::InPlace => format!("in place, a header of {}", text::size(done.written)),
        Way::Replaced => format!("file replaced, {}", text::size(done.written)),
    };
    writeln!(out, "{}: {what} ({way})", text::name(&path))?;
    super::tell_notes(&done.notes, out)?;
    Ok(OK)
}
