//! Each verb does on real files what its help says.

mod common;

use common::{expect, expect_json, listing, model, raw, run, text};
use serde_json::json;

#[test]
fn inspect_shows_modules_once_and_sums_that_hold() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 12);
    let shown = expect(0, &["inspect", text(&path)]);
    assert!(shown.contains("  tensors     26\n"), "{shown}");
    assert!(shown.contains("  parameters  183\n"), "{shown}");
    assert!(shown.contains("  metadata    format = pt\n"), "{shown}");
    let row = |start: &str| {
        let line = shown
            .lines()
            .find(|line| line.trim_start().starts_with(start));
        line.unwrap_or_else(|| panic!("{start} in {shown}"))
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(
        row("layers.[0-11].proj"),
        "layers.[0-11].proj 12 × 15 12 × 60 B"
    );
    assert_eq!(row("weight"), "weight F32 [4, 3] 12 48 B");
    assert_eq!(row("embed"), "embed BF16 [1, 2] 2 4 B");
    assert_eq!(row("steps"), "steps I64 [] 1 8 B");
    let full = expect(0, &["inspect", text(&path), "--full"]);
    assert!(full.lines().count() > shown.lines().count() + 20, "{full}");
    let flat = expect(
        0,
        &["inspect", text(&path), "--flat", "--select", "*.1?.*bias"],
    );
    assert!(
        flat.contains("2 of 26 (selected)") && flat.contains("model.layers.10.proj.bias"),
        "{flat}"
    );
    let ran = run(&["inspect", text(&path), "--select", "step"]);
    assert_eq!((ran.code, ran.out.as_str()), (1, ""));
    assert_eq!(
        ran.err,
        "error[ABSENT]: no tensor matches \"step\"; did you mean \"steps\"?\n"
    );
}

#[test]
fn inspect_reads_values_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 1);
    let report = expect_json(0, &["inspect", text(&path), "--stats"]);
    let stats = |name: &str| {
        let tensors = report["tensors"].as_array().unwrap();
        tensors
            .iter()
            .find(|tensor| tensor["name"] == name)
            .unwrap()["stats"]
            .clone()
    };
    assert_eq!(
        stats("model.layers.0.proj.bias"),
        json!({"count": 3, "min": 0.0, "max": 2.5, "mean": 1.25, "std": 1.25, "nan": 1, "inf": 0, "zeros": 1})
    );
    assert_eq!(stats("model.embed")["min"], json!(-2.0));
    assert_eq!(stats("steps")["mean"], json!(7.0));
    let table = expect(0, &["inspect", text(&path), "--stats"]);
    assert!(table.contains("min") && table.contains("1.25"), "{table}");
}

#[test]
fn verify_names_code_and_clause_and_never_stops_at_the_first_file() {
    let folder = tempfile::tempdir().unwrap();
    let good = model(folder.path(), "good.safetensors", 2);
    let hole = raw(
        folder.path(),
        "hole.safetensors",
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#,
        3,
    );
    let odd = raw(
        folder.path(),
        "odd.safetensors",
        r#"{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,1]}}"#,
        1,
    );
    let said = expect(0, &["verify", text(&good)]);
    assert!(
        said.ends_with("good.safetensors: ok · 1 file, 6 tensors, 624 B\n")
            || said.contains(": ok · "),
        "{said}"
    );
    let said = expect(1, &["verify", text(&hole), text(&good)]);
    assert!(
        said.contains("error[HOLE]: ") && said.contains("(spec 6.4)") && said.contains("\"b\""),
        "{said}"
    );
    assert_eq!(
        said.matches("hole.safetensors").count(),
        2,
        "the file once in the finding: {said}"
    );
    assert!(said.contains("good.safetensors: ok"), "{said}");
    let report = expect_json(1, &["verify", text(&hole)]);
    assert_eq!(report["ok"], json!(false));
    assert_eq!(report["checked"][0]["findings"][0]["clause"], json!("6.4"));
    let said = expect(0, &["verify", text(&odd), "--quiet"]);
    assert!(said.contains("warning[UNKNOWN_DTYPE]"), "{said}");
    expect(1, &["verify", text(&odd), "--warnings-fail"]);
    expect(6, &["verify", "/absent/x.safetensors"]);
    let said = expect(1, &["verify", "/absent/x.safetensors", text(&hole)]);
    assert!(
        said.contains("error[IO]: cannot open /absent") && said.contains("error[HOLE]"),
        "{said}"
    );
    assert_eq!(
        run(&["verify", "/absent/x.safetensors", text(&good)]).code,
        6
    );
}

#[test]
fn diff_says_what_differs_and_how_far() {
    let folder = tempfile::tempdir().unwrap();
    let a = model(folder.path(), "a.safetensors", 2);
    let b = folder.path().join("b.safetensors");
    expect(
        0,
        &[
            "cast",
            text(&a),
            text(&b),
            "--to",
            "float16",
            "--select",
            "*.0.*weight",
        ],
    );
    let said = expect(0, &["diff", text(&a), text(&a)]);
    assert!(
        said.starts_with("equal: ") && said.ends_with(", 6 tensors in every value\n"),
        "{said}"
    );
    let said = expect(1, &["diff", text(&a), text(&b)]);
    assert!(
        said.contains("dtype F32 → F16") && said.contains("0 of 12"),
        "{said}"
    );
    expect(0, &["diff", text(&a), text(&b), "--ignore-dtype"]);
    // One weight moves by a half: 1.75 is the last value of the file's last tensor but one.
    let mut bytes = std::fs::read(&a).unwrap();
    let at = bytes
        .windows(4)
        .rposition(|four| four == 1.75_f32.to_le_bytes())
        .unwrap();
    bytes[at..at + 4].copy_from_slice(&1.25_f32.to_le_bytes());
    let c = folder.path().join("c.safetensors");
    std::fs::write(&c, bytes).unwrap();
    let report = expect_json(1, &["diff", text(&a), text(&c)]);
    assert_eq!(report["tensors"][0]["kind"], json!("values"));
    assert_eq!(
        report["tensors"][0]["values"],
        json!({"elements": 12, "different": 1, "max_abs": 0.5, "mean_abs": 0.5 / 12.0, "not_finite": 0})
    );
    expect(0, &["diff", text(&a), text(&c), "--tolerance", "0.5"]);
    expect(0, &["diff", text(&a), text(&c), "--no-values"]);
    let d = model(folder.path(), "d.safetensors", 3);
    let said = expect(1, &["diff", text(&a), text(&d)]);
    assert_eq!(said.matches("only in B").count(), 2, "{said}");
    expect(0, &["metadata", "set", text(&c), "format=np"]);
    expect(0, &["diff", text(&a), text(&c), "--no-values"]);
    let said = expect(
        1,
        &["diff", text(&a), text(&c), "--no-values", "--metadata"],
    );
    assert!(said.contains("metadata format: pt → np"), "{said}");
}

#[test]
fn metadata_are_read_set_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 20);
    let copy = folder.path().join("copy.safetensors");
    std::fs::copy(&path, &copy).unwrap();
    assert_eq!(
        expect(0, &["metadata", "get", text(&path), "format"]),
        "pt\n"
    );
    expect(1, &["metadata", "get", text(&path), "absent"]);
    let said = expect(0, &["metadata", "set", text(&path), "format=np"]);
    assert!(
        said.contains("set 1 key (in place, 2 bytes of one sector)"),
        "{said}"
    );
    let report = expect_json(
        0,
        &[
            "metadata",
            "set",
            text(&path),
            "note=a=b",
            "--reserve",
            "8KiB",
        ],
    );
    assert_eq!(report["way"], json!("replaced"));
    assert_eq!(
        expect(0, &["metadata", "get", text(&path), "note"]),
        "a=b\n"
    );
    let report = expect_json(
        0,
        &[
            "metadata",
            "set",
            text(&path),
            "note=much longer than before",
            "--in-place",
        ],
    );
    assert_eq!(report["way"], json!("in_place"));
    assert_eq!(
        expect_json(0, &["metadata", "get", text(&path)])["metadata"],
        json!({"format": "np", "note": "much longer than before"})
    );
    expect(0, &["metadata", "delete", text(&path), "note", "format"]);
    expect(1, &["metadata", "delete", text(&path), "note"]);
    assert_eq!(expect(0, &["metadata", "get", text(&path)]), "");
    expect(0, &["diff", text(&path), text(&copy)]);
    assert_eq!(
        listing(folder.path()),
        ["copy.safetensors", "m.safetensors"]
    );
    expect(2, &["metadata", "set", text(&copy), "no equals sign"]);
    let cache = tempfile::tempdir().unwrap();
    for name in ["blobs", "snapshots"] {
        std::fs::create_dir(cache.path().join(name)).unwrap();
    }
    std::fs::copy(&copy, cache.path().join("blobs/0123")).unwrap();
    let link = cache.path().join("snapshots/m.safetensors");
    std::os::unix::fs::symlink("../blobs/0123", &link).unwrap();
    assert!(expect(2, &["metadata", "set", text(&link), "a=b"]).contains("download cache"));
    expect(0, &["metadata", "get", text(&link)]);
    expect(2, &["metadata", "set", text(folder.path()), "a=b"]);
    let long = format!("k={}", "x".repeat(100_000));
    assert!(expect(2, &["metadata", "set", text(&copy), &long, "--in-place"]).contains("NO_ROOM"));
    expect(0, &["diff", text(&path), text(&copy)]);
}

#[test]
fn rename_changes_headers_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 3);
    let said = expect(
        0,
        &[
            "rename",
            text(&path),
            "model.layers.*.proj.*",
            "blocks.*.*",
            "--dry-run",
        ],
    );
    assert!(
        said.contains("model.layers.2.proj.bias → blocks.2.bias\n"),
        "{said}"
    );
    assert!(
        said.ends_with("6 tensors would be renamed; nothing was changed\n"),
        "{said}"
    );
    let before = std::fs::read(&path).unwrap();
    expect(2, &["rename", text(&path), "model.layers.*.proj.*", "same"]);
    expect(1, &["rename", text(&path), "absent", "present"]);
    assert!(std::fs::read(&path).unwrap() == before);
    let report = expect_json(
        0,
        &[
            "rename",
            text(&path),
            "--regex",
            r"^model\.layers\.(\d+)",
            "l$1",
        ],
    );
    assert_eq!(report["renamed"], json!(6));
    let names = expect(0, &["inspect", text(&path), "--flat"]);
    assert!(
        names.contains("l0.proj.weight") && !names.contains("layers"),
        "{names}"
    );
    expect(0, &["rename", text(&path), "steps", "counter"]);
    let shards = folder.path().join("shards");
    expect(
        0,
        &["shard", text(&path), text(&shards), "--max-size", "100"],
    );
    assert!(expect(2, &["rename", text(&shards), "counter", "steps"]).contains("--output"));
    let other = folder.path().join("other");
    expect(
        0,
        &[
            "rename",
            text(&shards),
            "counter",
            "steps",
            "--output",
            text(&other),
        ],
    );
    expect(0, &["rename", text(&path), "counter", "steps"]);
    expect(0, &["diff", text(&path), text(&other)]);
}

#[test]
fn shard_and_merge_are_inverse_and_refuse_to_overwrite() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 5);
    let (shards, merged) = (
        folder.path().join("out"),
        folder.path().join("merged.safetensors"),
    );
    let report = expect_json(
        0,
        &["shard", text(&path), text(&shards), "--max-size", "120"],
    );
    assert!(report["files"].as_array().unwrap().len() > 2, "{report}");
    assert!(listing(&shards).contains(&"model.safetensors.index.json".to_owned()));
    expect(0, &["verify", text(&shards), "--warnings-fail"]);
    expect(0, &["merge", text(&shards), text(&merged)]);
    assert!(
        std::fs::read(&path).unwrap() == std::fs::read(&merged).unwrap(),
        "the same bytes"
    );
    assert!(expect(2, &["merge", text(&shards), text(&merged)]).contains("--force"));
    assert!(expect(2, &["shard", text(&path), text(&shards)]).contains("--force"));
    expect(
        0,
        &[
            "merge",
            text(&shards),
            text(&merged),
            "--force",
            "--no-sync",
        ],
    );
    // A whole checkpoint onto itself, through its own index.
    let index = shards.join("model.safetensors.index.json");
    expect(
        0,
        &[
            "shard",
            text(&index),
            text(&shards),
            "--max-size",
            "1KB",
            "--force",
        ],
    );
    expect(0, &["diff", text(&path), text(&shards)]);
    assert!(
        expect(
            2,
            &["shard", text(&path), text(&shards), "--max-size", "many"]
        )
        .contains("many")
    );
}

#[test]
fn cast_changes_floats_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 2);
    let half = folder.path().join("half.safetensors");
    expect(0, &["cast", text(&path), text(&half), "--to", "bf16"]);
    let report = expect_json(0, &["inspect", text(&half)]);
    let dtypes: Vec<&str> = report["dtypes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d["dtype"].as_str().unwrap())
        .collect();
    assert_eq!(dtypes, ["BF16", "I64"]);
    assert_eq!(report["metadata"], json!({"format": "pt"}));
    expect(0, &["diff", text(&path), text(&half), "--ignore-dtype"]);
    assert!(
        expect(
            2,
            &["cast", text(&path), text(&half), "--to", "int8", "--force"]
        )
        .contains("choose one of")
    );
    expect(
        1,
        &[
            "cast",
            text(&path),
            text(&half),
            "--to",
            "F16",
            "--select",
            "zzz",
            "--force",
        ],
    );
}

#[test]
fn checksum_adds_prints_and_finds_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 4);
    let data = |bytes: &[u8]| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header..].to_vec()
    };
    let before = data(&std::fs::read(&path).unwrap());
    for action in ["print", "check"] {
        let ran = run(&["checksum", action, text(&path)]);
        assert_eq!(ran.code, 1, "{}", ran.err);
        assert!(ran.err.contains("has no checksums"), "{}", ran.err);
    }
    let said = expect(0, &["checksum", "add", text(&path), "--sidecar"]);
    assert!(said.contains("checksums added"), "{said}");
    assert_eq!(data(&std::fs::read(&path).unwrap()), before);
    let sidecar = std::fs::read_to_string(folder.path().join("m.safetensors.b3")).unwrap();
    assert!(sidecar.ends_with("  m.safetensors\n") && sidecar.len() == 64 + 2 + 13 + 1);
    let printed = expect_json(0, &["checksum", "print", text(&path)]);
    assert_eq!(printed["chunks"].as_array().unwrap().len(), 1);
    assert_eq!(printed["chunks"][0]["bytes"], json!(before.len()));
    let shown = expect(0, &["checksum", "print", text(&path)]);
    let crc = printed["chunks"][0]["crc64_nvme"].as_str().unwrap();
    assert!(shown.starts_with(crc), "{shown}");
    let said = expect(0, &["checksum", "check", text(&path)]);
    assert!(said.contains("ok · 1 chunk"), "{said}");
    let verified = expect_json(0, &["verify", text(&path)]);
    let file = &verified["checked"][0]["files"][0];
    assert_eq!(
        (&file["chunks"], &file["hashed"]),
        (&json!(1), &json!(true))
    );
    // Adding again changes nothing, and takes the hash of the same file away only to an edit.
    let again = expect(0, &["checksum", "add", text(&path)]);
    assert!(again.contains("nothing to change"), "{again}");

    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let report = expect_json(1, &["checksum", "check", text(&path)]);
    assert_eq!(report["ok"], json!(false));
    let bad = &report["bad"][0];
    assert!(
        bad["tensor"].is_string() && bad["offset"].as_u64() > Some(8),
        "{report}"
    );
    let ran = run(&["verify", text(&path)]);
    assert_eq!(ran.code, 1);
    assert_eq!(
        ran.out.matches("error[CHECKSUM_MISMATCH]").count(),
        2,
        "{}",
        ran.out
    );
    expect(0, &["verify", text(&path), "--headers-only"]);
    // What is damaged is not made good by new sums.
    let ran = run(&["checksum", "add", text(&path)]);
    assert_eq!(ran.code, 3, "{}", ran.err);
    assert!(ran.err.contains("CHECKSUM_MISMATCH"), "{}", ran.err);
}

#[test]
fn null_metadata_is_taken_for_absent_unless_strict() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mlx.safetensors");
    let header = br#"{"__metadata__":null,"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}   "#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.push(7);
    std::fs::write(&path, &file).unwrap();
    let shown = expect(0, &["verify", text(&path)]);
    assert!(shown.contains("METADATA_NULL"), "{shown}");
    let refused = run(&["inspect", text(&path), "--strict"]);
    assert_ne!(refused.code, 0);
    assert!(
        refused.err.contains("METADATA_NOT_OBJECT"),
        "{}",
        refused.err
    );
    // Metadata that is set takes the place of null.
    expect(0, &["metadata", "set", text(&path), "format=mlx"]);
    let shown = expect(0, &["verify", text(&path), "--strict"]);
    assert!(!shown.contains("METADATA_NULL"), "{shown}");
    assert_eq!(std::fs::read(&path).unwrap().last(), Some(&7));
}
