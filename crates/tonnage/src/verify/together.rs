//! How the files of a checkpoint fit together.

use std::collections::HashMap;
use std::path::Path;

use tonnage_format::{self as format, Index, Reason};

use super::{File, Severity, Verification, Verify, look_beneath};
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::open::{names_in, read_index};

pub(super) fn set(
    verification: &mut Verification,
    root: &Path,
    names: &[String],
    options: &Verify<'_>,
) {
    let files: Vec<File> = names
        .iter()
        .filter_map(|name| look_beneath(verification, root, name, options))
        .collect();
    twice(verification, &files, Severity::Error);
    // Whether the files of a split GGUF model belong together is seen when they are opened as one.
    let gguf = names.iter().any(|name| name.ends_with(".gguf"));
    if gguf
        && verification.files.iter().all(|file| file.readable)
        && let Err(error) = Checkpoint::open_with(root, &options.open)
    {
        verification.error(&error);
    }
}

/// Tensors that are in two files. Without an index nobody knows which one counts.
fn twice(verification: &mut Verification, files: &[File], severity: Severity) {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for (label, header) in files {
        for info in header.iter_by_offset() {
            if let Some(first) = seen.insert(info.name, label) {
                let error = format::Error::new(Reason::IndexTensorTwice)
                    .tensor(info.name)
                    .found(format_args!("it in {first:?} and in {label:?}"))
                    .needed("each tensor in one file");
                verification.error(&Error::from(error).in_file(label.clone()));
                if let Some(finding) = verification.findings.last_mut() {
                    finding.severity = severity;
                }
            }
        }
    }
}

pub(super) fn indexed(
    verification: &mut Verification,
    root: &Path,
    path: &Path,
    options: &Verify<'_>,
) {
    let label = path.display().to_string();
    let index = match read_index(root, path, &options.open) {
        Ok((index, _)) => index,
        Err(error) => return verification.error(&error),
    };
    let mut files = Vec::new();
    let mut readable: HashMap<&str, usize> = HashMap::new();
    for name in index.files() {
        if let Some(file) = look_beneath(verification, root, name, options) {
            readable.insert(name, files.len());
            files.push(file);
        }
    }
    let mut total = 0_u64;
    for (tensor, name) in index.iter() {
        // A file that cannot be read is one finding, not one for each of its tensors.
        let Some((label, header)) = readable.get(name).and_then(|&at| files.get(at)) else {
            continue;
        };
        match header.get(tensor) {
            Some(info) => total = total.saturating_add(info.byte_len()),
            None => {
                let lacking = format::Error::new(Reason::IndexTensorMissing).tensor(tensor);
                verification.error(
                    &Error::from(lacking.needed(format_args!("it in {name:?}")))
                        .in_file(label.clone()),
                );
            }
        }
    }
    twice(verification, &files, Severity::Warning);
    extra(verification, &index, &files, &readable);
    let complete = readable.len() == index.files().len();
    if let Some(said) = index.total_size.filter(|&said| complete && said != total) {
        let text = format!("the index says {said} bytes in all, the tensors take {total}");
        verification.say(Severity::Note, "INDEX_TOTAL_SIZE", &label, None, text);
    }
    if let Ok((names, _)) = names_in(root) {
        for name in names.iter().filter(|name| !index.files().contains(name)) {
            let text = "the index does not name this file".to_owned();
            verification.say(
                Severity::Note,
                "INDEX_UNNAMED_FILE",
                &root.join(name).display().to_string(),
                None,
                text,
            );
        }
    }
}

fn extra(
    verification: &mut Verification,
    index: &Index,
    files: &[File],
    readable: &HashMap<&str, usize>,
) {
    let mut names: Vec<(&str, usize)> = readable.iter().map(|(name, at)| (*name, *at)).collect();
    names.sort_unstable_by_key(|&(_, at)| at);
    for (name, at) in names {
        let Some((label, header)) = files.get(at) else {
            continue;
        };
        let extra = header
            .iter()
            .filter(|info| index.get(info.name) != Some(name))
            .count();
        if extra > 0 {
            let text = format!("the index places {extra} of its tensors elsewhere or nowhere");
            verification.say(Severity::Note, "INDEX_EXTRA_TENSORS", label, None, text);
        }
    }
}
