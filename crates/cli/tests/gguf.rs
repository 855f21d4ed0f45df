//! `inspect`, `verify` and `convert` on GGUF files.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{expect, expect_json, run, text};
use tonnage::gguf::{GgmlType, GgufContent, GgufItem, GgufSave, OwnedValue, save_gguf};

fn model(folder: &Path) -> PathBuf {
    let kv = [(
        "general.architecture".to_owned(),
        OwnedValue::String(b"llama".to_vec()),
    )];
    let item = |name, ty, shape, content| GgufItem {
        name,
        ty,
        shape,
        content: GgufContent::Bytes(content),
    };
    let items = [
        item(
            "blk.0.attn_q.weight",
            GgmlType::Q4_K,
            &[2, 256][..],
            &[7; 288][..],
        ),
        item("blk.1.attn_q.weight", GgmlType::Q4_K, &[2, 256], &[8; 288]),
        item("output_norm.weight", GgmlType::F32, &[3], &[0; 12]),
    ];
    let path = folder.join("m.gguf");
    save_gguf(&kv, &items, &path, &GgufSave::default()).unwrap();
    path
}

#[test]
fn inspect_shows_types_and_elements() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let shown = expect(0, &["inspect", text(&path)]);
    assert!(
        shown.contains("  parameters  1.03 k (1,027)\n") || shown.contains("1,027"),
        "{shown}"
    );
    assert!(
        shown.contains("  gguf        version 3, alignment 32\n"),
        "{shown}"
    );
    assert!(shown.contains("Q4_K 2 tensors"), "{shown}");
    let flat = expect(0, &["inspect", text(&path), "--flat"]);
    let row = flat
        .lines()
        .find(|line| line.starts_with("blk.0.attn_q.weight"))
        .unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(
        cells,
        [
            "blk.0.attn_q.weight",
            "Q4_K",
            "[2,",
            "256]",
            "512",
            "288",
            "B"
        ]
    );
    let report = expect_json(0, &["inspect", text(&path)]);
    assert_eq!(report["tensors"][0]["dtype"], "Q4_K");
    assert_eq!(
        report["tensors"][0]["stored"]["shape"],
        serde_json::json!([2, 144])
    );
    assert_eq!(report["tensors"][2]["dtype"], "F32");
}

#[test]
fn convert_there_and_back_is_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let (there, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("again.gguf"),
    );
    let said = expect(0, &["convert", text(&path), text(&there), "--no-sync"]);
    assert!(said.contains("3 tensors in 1 file"), "{said}");
    assert_eq!(
        run(&["convert", text(&path), text(&there)]).code,
        2,
        "what is there stays"
    );
    expect(0, &["convert", text(&there), text(&back)]);
    assert_eq!(fs::read(&path).unwrap(), fs::read(&back).unwrap());
    expect(0, &["verify", text(&back)]);
    let mut bytes = fs::read(&back).unwrap();
    bytes[4] = 9;
    fs::write(&back, bytes).unwrap();
    let ran = run(&["inspect", text(&back)]);
    assert_eq!(ran.code, 5);
    assert!(ran.err.starts_with("error[GGUF_VERSION]"), "{}", ran.err);
    expect(1, &["verify", text(&back)]);
}
