//! The fuzzers' committed corpus (`fuzz/corpus/`), through the very checks that the fuzz targets run.

#![allow(
    clippy::disallowed_macros,
    reason = "a test may say what it counted; the crate prints nothing"
)]

#[path = "../../../fuzz/checks.rs"]
mod checks;

use std::fs;
use std::path::Path;

/// Runs `check` on every file of a target's corpus.
#[allow(
    clippy::disallowed_methods,
    reason = "tests read the corpus from files"
)]
fn replay(target: &str, check: fn(&[u8])) {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus")).join(target);
    let mut inputs: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    inputs.sort();
    assert!(inputs.len() >= 15, "{target}: {} inputs", inputs.len());
    for input in inputs {
        println!("{}", input.display());
        check(&fs::read(&input).unwrap());
    }
}

#[test]
fn headers() {
    replay("header", checks::header);
}

#[test]
fn indexes() {
    replay("index", checks::index);
}

#[test]
fn round_trips() {
    replay("roundtrip", checks::roundtrip);
}

#[test]
fn slices() {
    replay("slice", checks::slice);
}
