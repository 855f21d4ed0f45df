//! The conformance corpus through the façade: headers from files and from bytes, index files, and
//! folders with their links. What a header says in detail is tested in the format crate; here it is
//! that nothing on the way to a file changes a verdict.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tonnage::format::{Limits, ReadOptions};
use tonnage::{Checkpoint, Error, OpenOptions, Result};

fn corpus() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../conformance"))
}

fn cases(kind: &str) -> Vec<Value> {
    let manifest: Value =
        serde_json::from_slice(&fs::read(corpus().join("manifest.json")).unwrap()).unwrap();
    let all = manifest["cases"].as_array().unwrap();
    let found: Vec<Value> = all
        .iter()
        .filter(|case| case["kind"] == kind)
        .cloned()
        .collect();
    assert!(!found.is_empty(), "no case of kind {kind}");
    found
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key]
        .as_str()
        .unwrap_or_else(|| panic!("{key} in {case}"))
}

fn none_wrong(checked: usize, wrong: Vec<String>) {
    assert!(
        wrong.is_empty(),
        "{} of {checked} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

fn options(case: &Value) -> OpenOptions {
    let mut limits = Limits::default();
    for (name, value) in case["limits"].as_object().into_iter().flatten() {
        let value = value.as_u64().unwrap();
        match name.as_str() {
            "header_bytes" => limits.header_bytes = value,
            "tensors" => limits.tensors = value,
            "rank" => limits.rank = value,
            "dims" => limits.dims = value,
            "metadata_entries" => limits.metadata_entries = value,
            "index_bytes" => limits.index_bytes = value,
            "shards" => limits.shards = value,
            other => panic!("unknown limit {other}"),
        }
    }
    OpenOptions {
        read: ReadOptions {
            limits,
            ..ReadOptions::strict()
        },
        ..OpenOptions::default()
    }
}

/// What is wrong with a refusal; `None` if it is the manifest's and names a file.
fn misjudged(case: &Value, error: &Error) -> Option<String> {
    let code = case["code"]
        .as_str()
        .unwrap_or("none: the case is accepted");
    let same_tensor = case["tensor"]
        .as_str()
        .is_none_or(|name| error.tensor() == Some(name));
    let fine = error.code() == code && error.clause() == case["clause"].as_str() && same_tensor;
    if !fine {
        return Some(format!(
            "{}: {error}, needed {code} {}",
            case["id"], case["tensor"]
        ));
    }
    let names_a_file = error.file().is_some() || error.to_string().contains(".safetensors");
    (!names_a_file).then(|| format!("{}: names no file: {error}", case["id"]))
}

/// Name → dtype, shape and size, as a checkpoint reports them and as the manifest wants them.
type Content = BTreeMap<String, (String, Vec<u64>, u64)>;

fn content(checkpoint: &Checkpoint) -> Content {
    let row = |tensor: tonnage::TensorRef<'_>| {
        (
            tensor.dtype_name().to_owned(),
            tensor.shape().to_vec(),
            tensor.byte_len(),
        )
    };
    checkpoint
        .iter()
        .map(|tensor| (tensor.name().to_owned(), row(tensor)))
        .collect()
}

fn integer(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| value.as_str().unwrap().parse().unwrap())
}

fn expected(expect: &Value) -> Content {
    let rows = expect["tensors"].as_array().unwrap().iter();
    rows.map(|row| {
        let shape = row["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(integer)
            .collect();
        let size = integer(&row["data_offsets"][1]) - integer(&row["data_offsets"][0]);
        (
            text(row, "name").to_owned(),
            (text(row, "dtype").to_owned(), shape, size),
        )
    })
    .collect()
}

fn judge(case: &Value, opened: Result<Checkpoint>) -> Option<String> {
    match (opened, text(case, "verdict")) {
        (Err(error), "reject") => misjudged(case, &error),
        (Err(error), _) => Some(format!("{}: {error}", case["id"])),
        (Ok(_), "reject") => Some(format!("{}: accepted", case["id"])),
        (Ok(checkpoint), verdict) => {
            if content(&checkpoint) != expected(&case["expect"]) {
                return Some(format!("{}: read {:?}", case["id"], content(&checkpoint)));
            }
            if verdict == "unsupported" {
                let tensor = checkpoint.get(text(case, "tensor")).unwrap();
                return match tensor.dtype() {
                    Err(error) => misjudged(case, &error),
                    Ok(dtype) => Some(format!("{}: took it for {dtype}", case["id"])),
                };
            }
            // The bytes are there to the last one.
            let unread = checkpoint.iter().find(|tensor| {
                tensor
                    .read()
                    .map_or(true, |bytes| bytes.len() as u64 != tensor.byte_len())
            });
            unread.map(|tensor| format!("{}: cannot read {:?}", case["id"], tensor.name()))
        }
    }
}

#[test]
fn headers_from_files() {
    let cases = cases("header");
    let open = |case: &Value| {
        let path = corpus().join(text(case, "file"));
        judge(case, Checkpoint::open_with(path, &options(case)))
    };
    none_wrong(cases.len(), cases.iter().filter_map(open).collect());
}

#[test]
fn headers_from_bytes() {
    let cases = cases("header");
    let open = |case: &Value| {
        let bytes = fs::read(corpus().join(text(case, "file"))).unwrap();
        judge(
            case,
            Checkpoint::from_bytes(bytes, "<bytes>", &options(case)),
        )
    };
    none_wrong(cases.len(), cases.iter().filter_map(open).collect());
}

/// Whether a report gives the chunk that the case gives, if it gives one.
fn placed(case: &Value, report: &str) -> bool {
    let Some(begin) = case["chunk"]["offset"].as_u64() else {
        return true;
    };
    let end = begin + case["chunk"]["bytes"].as_u64().unwrap();
    report.contains(&format!("(bytes {begin} to {end})"))
}

/// Verifying says what the manifest says, and a file whose checksums are wrong is read all the same.
#[test]
fn checksums() {
    let cases = cases("checksums");
    let mut wrong = Vec::new();
    for case in &cases {
        let path = corpus().join(text(case, "file"));
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(content(&checkpoint), expected(&case["expect"]), "{case}");
        checkpoint.load(&tonnage::Load::default()).unwrap();
        let found = tonnage::verify(&path, &OpenOptions::default()).unwrap();
        let errors = found.findings.iter();
        let errors: Vec<_> = errors
            .filter(|finding| finding.severity == tonnage::Severity::Error)
            .collect();
        let verifying = tonnage::Load {
            verify: true,
            ..tonnage::Load::default()
        };
        let loaded = checkpoint.load(&verifying).map(drop);
        // Loading compares chunks only.
        let sidecar = case["sidecar"].is_string();
        let loaded = match (sidecar, loaded) {
            (true, Ok(())) => Ok(()),
            (true, Err(e)) if e.code() == "NO_CHECKSUMS" => Ok(()),
            (_, loaded) => loaded,
        };
        let code = case["code"].as_str();
        assert_eq!(found.files[0].hashed, sidecar && code.is_none(), "{case}");
        let same = match (&errors[..], &loaded, code) {
            ([], Ok(()), None) => true,
            ([], Err(e), None) => e.code() == "NO_CHECKSUMS" && found.files[0].chunks == 0,
            ([one], Ok(()), Some(code)) if sidecar => {
                (one.code, one.clause) == (code, case["clause"].as_str())
            }
            ([one], Err(e), Some(code)) => {
                let tensor = case["tensor"].as_str();
                let named = |found: Option<&str>| tensor.is_none() || found == tensor;
                (one.code, e.code()) == (code, code)
                    && (one.clause, e.clause())
                        == (case["clause"].as_str(), case["clause"].as_str())
                    && named(one.tensor.as_deref())
                    && named(e.tensor())
                    && placed(case, &one.text)
                    && placed(case, &e.to_string())
            }
            _ => false,
        };
        if !same {
            wrong.push(format!("{}: {errors:?}, {loaded:?}", case["id"]));
        }
    }
    none_wrong(cases.len(), wrong);
}

/// An index on its own: a good one is followed as far as its first file, which is not there.
#[test]
fn index_files() {
    let cases = cases("index");
    let open = |case: &Value| {
        let path = corpus().join(text(case, "file"));
        let opened = Checkpoint::open_with(path, &options(case));
        let empty = case["expect"]["files"]
            .as_array()
            .is_some_and(Vec::is_empty);
        match (opened, text(case, "verdict")) {
            (Err(error), "reject") => misjudged(case, &error),
            (Err(error), "accept") if error.code() == "INDEX_FILE_MISSING" && !empty => None,
            (Ok(checkpoint), "accept") if empty && checkpoint.is_empty() => None,
            (opened, _) => Some(format!("{}: {:?}", case["id"], opened.map(|it| it.len()))),
        }
    };
    none_wrong(cases.len(), cases.iter().filter_map(open).collect());
}

#[test]
fn folders() {
    let cases = cases("directory");
    let scratch = tempfile::tempdir().unwrap();
    let copy = scratch.path().join("directory");
    copy_folder(&corpus().join("files/directory"), &copy);
    let open = |case: &Value| {
        let folder = copy.join(text(case, "file").strip_prefix("files/directory/").unwrap());
        for link in case["links"].as_array().into_iter().flatten() {
            symlink(text(link, "target"), &folder.join(text(link, "path")))?;
        }
        let opened = Checkpoint::open_with(&folder, &options(case));
        let misplaced = opened
            .as_ref()
            .ok()
            .and_then(|it| misplaced(case, it, &folder));
        judge(case, opened).or(misplaced)
    };
    none_wrong(cases.len(), cases.iter().filter_map(open).collect());
}

/// A tensor that was found in another file than the manifest says.
fn misplaced(case: &Value, checkpoint: &Checkpoint, folder: &Path) -> Option<String> {
    let rows = case["expect"]["tensors"].as_array()?;
    rows.iter().find_map(|row| {
        let label = checkpoint.get(text(row, "name"))?.file_label().to_owned();
        let wanted = folder.join(text(row, "file"));
        (Path::new(&label) != wanted).then(|| format!("{}: {row} is in {label}", case["id"]))
    })
}

/// Makes a link; `None`, which skips the case, only where the system has none.
#[cfg(unix)]
fn symlink(target: &str, at: &Path) -> Option<()> {
    std::os::unix::fs::symlink(target, at).unwrap();
    Some(())
}

#[cfg(not(unix))]
fn symlink(_: &str, _: &Path) -> Option<()> {
    None
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
