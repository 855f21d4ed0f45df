//! Each verb that writes keeps the checksums that there were, right ones, and refuses what is damaged.

mod common;

use std::path::Path;

use common::{expect, expect_json, model, run, text};
use serde_json::json;

/// Chunks compared, and whether a hash was, of the first file of a checkpoint that is right.
fn verified(path: &Path) -> (bool, bool) {
    let report = expect_json(0, &["verify", text(path)]);
    let file = &report["checked"][0]["files"][0];
    (
        file["chunks"].as_u64() > Some(0),
        file["hashed"] == json!(true),
    )
}

fn flip_last_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn copies_keep_checksums_and_do_not_launder_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 4);
    let to = |name: &str| folder.path().join(name);
    let (plain, source) = (to("plain.safetensors"), text(&path));
    expect(0, &["merge", source, text(&plain)]);
    assert_eq!(verified(&plain), (false, false));
    expect(
        0,
        &["merge", source, text(&plain), "--force", "--checksums"],
    );
    assert_eq!(verified(&plain), (true, false));

    expect(0, &["checksum", "add", source, "--sidecar"]);
    let outs: Vec<_> = (0..6).map(|i| to(&format!("out{i}.safetensors"))).collect();
    let folders = [to("split"), to("ranks")];
    let verbs: [(&[&str], &Path); 6] = [
        (
            &["shard", source, text(&folders[0]), "--max-size", "100B"],
            &folders[0],
        ),
        (&["merge", source, text(&outs[1])], &outs[1]),
        (&["cast", source, text(&outs[2]), "--to", "BF16"], &outs[2]),
        (&["convert", source, text(&outs[3])], &outs[3]),
        (
            &[
                "rename",
                source,
                "steps",
                "counted",
                "--output",
                text(&outs[4]),
            ],
            &outs[4],
        ),
        (
            &["reshard", source, text(&outs[5]), "--mesh", "tp=1"],
            &outs[5],
        ),
    ];
    for (verb, out) in verbs {
        expect(0, verb);
        assert_eq!(verified(out), (true, true), "{verb:?}");
        let none = [verb, &["--no-checksums", "--force"]].concat();
        expect(0, &none);
        assert_eq!(verified(out), (false, false), "{none:?}");
    }
    flip_last_bit(&path);
    for (verb, _) in verbs {
        let again = [verb, &["--force"]].concat();
        let ran = run(&again);
        assert_eq!(ran.code, 3, "{again:?}: {}", ran.err);
        assert!(ran.err.contains("CHECKSUM_MISMATCH"), "{}", ran.err);
        expect(0, &[verb, &["--no-checksums", "--force"]].concat());
    }
    let ran = run(&["rename", source, "steps", "counted", "--no-checksums"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
}

#[test]
fn edits_keep_checksums_and_renew_the_hash() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 4);
    let source = text(&path);
    expect(0, &["checksum", "add", source, "--sidecar"]);
    for verb in [
        &["metadata", "set", source, "note=x"][..],
        &["metadata", "delete", source, "note"],
        &["rename", source, "steps", "counted"],
        &["metadata", "delete", source, "format", "--in-place"],
    ] {
        expect(0, verb);
        assert_eq!(verified(&path), (true, true), "{verb:?}");
    }
    let sidecar = folder.path().join("m.safetensors.b3");
    std::fs::write(&sidecar, "nothing\n").unwrap();
    let report = expect_json(0, &["metadata", "set", source, "note=z"]);
    assert_eq!(report["notes"][0]["code"], "SIDECAR_UNKNOWN");
    assert!(!sidecar.exists());
    expect(0, &["checksum", "add", source, "--sidecar"]);
    flip_last_bit(&path);
    assert_eq!(run(&["metadata", "set", source, "note=1"]).code, 3);
    assert!(sidecar.exists());
    // Sums stay, and go on saying that the data is damaged.
    expect(
        0,
        &[
            "metadata",
            "set",
            source,
            "note=1",
            "--drop-sidecar",
            "--in-place",
        ],
    );
    assert!(!sidecar.exists());
    assert_eq!(run(&["verify", source]).code, 1);
}
