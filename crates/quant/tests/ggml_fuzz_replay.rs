//! The fuzzer's committed corpus (`fuzz/corpus/ggml`), through the very checks that its target runs.
#![allow(clippy::disallowed_methods)]

#[path = "../../../fuzz/ggml_checks.rs"]
mod checks;

use std::path::Path;

#[test]
fn ggml_blocks() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/ggml");
    let mut inputs: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    inputs.sort();
    assert!(inputs.len() >= 30, "{} inputs", inputs.len());
    for input in inputs {
        checks::ggml(&std::fs::read(&input).unwrap());
    }
}
