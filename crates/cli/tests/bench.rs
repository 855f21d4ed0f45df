//! `bench` measures what it says, on the user's own file, and leaves nothing but its report.

mod common;

use std::path::{Path, PathBuf};

use common::{expect, expect_json, listing, raw, run, text};
use serde_json::Value;

/// 3 MiB in 12 tensors, one of them of odd length.
fn large(folder: &Path) -> PathBuf {
    let entry = |i: usize, end: usize| {
        let begin = i << 18;
        let len = end - begin;
        format!(r#""t{i:02}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{begin},{end}]}}"#)
    };
    let mut entries: Vec<String> = (0..12).map(|i| entry(i, (i + 1) << 18)).collect();
    let end = 12 << 18;
    entries.push(format!(
        r#""odd":{{"dtype":"U8","shape":[3],"data_offsets":[{end},{}]}}"#,
        end + 3
    ));
    raw(
        folder,
        "m.safetensors",
        &format!("{{{}}}", entries.join(",")),
        end + 3,
    )
}

fn loads(report: &Value) -> Vec<(String, String, String)> {
    let word = |load: &Value, key: &str| load[key].as_str().unwrap().to_owned();
    let loads = report["loads"].as_array().unwrap().iter();
    loads
        .map(|l| (word(l, "who"), word(l, "from"), word(l, "to")))
        .collect()
}

#[test]
fn the_machine_and_the_loader_are_measured() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = large(folder.path());
    let html = folder.path().join("r.html");
    let args = [
        "bench",
        text(&path),
        "--rounds",
        "2",
        "--no-reference",
        "--device",
        "cpu",
        "--html",
        text(&html),
    ];
    let report = expect_json(0, &args);
    assert_eq!(report["schema"], "tonnage.bench/1");
    assert_eq!(
        (&report["tensors"], &report["bytes"]),
        (&13.into(), &((12 << 18) + 3).into())
    );
    for limit in report["limits"].as_array().unwrap() {
        assert!(
            limit["gb_per_s"].as_f64().is_none_or(|speed| speed > 0.0),
            "{limit}"
        );
    }
    let named = |group: &str| {
        let limits = report["limits"].as_array().unwrap().iter();
        limits
            .filter(|limit| limit["group"] == group && limit["gb_per_s"].is_number())
            .count()
    };
    assert!(named("memory") >= 3 && named("page cache") >= 2, "{report}");
    let host: Vec<_> = loads(&report)
        .into_iter()
        .filter(|(_, _, to)| to == "cpu")
        .collect();
    assert!(
        host.contains(&("tonnage".into(), "warm".into(), "cpu".into())),
        "{host:?}"
    );
    // A file system in memory has no cold loads, and the report says so.
    let cold = host.contains(&("tonnage".into(), "cold".into(), "cpu".into()));
    let said = report["notes"].to_string().contains("no cold loads");
    assert!(cold != said, "{report}");
    for load in report["loads"].as_array().unwrap() {
        assert!(load["failed"].is_null(), "{load}");
        assert_eq!(load["seconds"].as_array().unwrap().len(), 2, "{load}");
        assert!(
            load["median"].as_f64().unwrap() > 0.0 && load["strategy"].is_string(),
            "{load}"
        );
    }
    let html = std::fs::read_to_string(html).unwrap();
    assert!(
        html.contains("<svg") && html.contains("warm to cpu, tonnage"),
        "{html}"
    );
    for outside in [
        "http:", "https:", "src=", "href=", "url(", "<script", "@import",
    ] {
        assert!(!html.contains(outside), "{outside} in the report");
    }
    assert_eq!(listing(folder.path()), ["m.safetensors", "r.html"]);
}

#[test]
fn only_so_many_bytes_are_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = large(folder.path());
    let args = [
        "bench",
        text(&path),
        "--rounds",
        "1",
        "--no-reference",
        "--device",
        "cpu",
        "--bytes",
        "1MiB",
    ];
    let report = expect_json(0, &args);
    assert_eq!(
        (&report["tensors"], &report["bytes"]),
        (&4.into(), &(1 << 20).into())
    );
    assert_eq!(report["tensor_count"], 13);
    let shown = expect(0, &args);
    assert!(
        shown.contains("4 of 13 tensors, 1.0 MiB") && shown.contains("memory copy, 1 thread"),
        "{shown}"
    );
    // One tensor is loaded however large it is.
    let least = expect_json(
        0,
        &[
            "bench",
            text(&path),
            "--rounds",
            "1",
            "--no-reference",
            "--device",
            "cpu",
            "--bytes",
            "1",
        ],
    );
    assert_eq!(least["tensors"], 1);
}

#[test]
fn the_reference_is_measured_beside_it() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    if !python.exists() {
        // `make test` makes the environment first.
        assert!(std::env::var_os("CI").is_none(), "no environment in .venv");
        eprintln!("not run: no environment in .venv");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = large(folder.path());
    let args = [
        "bench",
        text(&path),
        "--rounds",
        "1",
        "--bytes",
        "1MiB",
        "--python",
        text(&python),
    ];
    let report = expect_json(0, &args);
    assert!(
        report["reference"]
            .as_str()
            .unwrap()
            .starts_with("safetensors "),
        "{report}"
    );
    let reference = report["loads"]
        .as_array()
        .unwrap()
        .iter()
        .find(|load| load["who"] == "reference");
    let reference = reference.unwrap();
    assert!(
        reference["failed"].is_null() && reference["median"].as_f64().unwrap() > 0.0,
        "{reference}"
    );
}

#[test]
fn what_cannot_be_measured_is_an_error_or_a_note() {
    let folder = tempfile::tempdir().unwrap();
    let path = large(folder.path());
    let absent = folder.path().join("no-python");
    let line = expect(2, &["bench", text(&path), "--python", text(&absent)]);
    assert!(line.contains("no-python"), "{line}");
    // A Python that was only looked for may be missing.
    let mut command = common::command(&[
        "bench",
        text(&path),
        "--rounds",
        "1",
        "--bytes",
        "1",
        "--device",
        "cpu",
        "--json",
    ]);
    let ran = common::ended(command.env("PATH", folder.path()).env_remove("VIRTUAL_ENV"));
    assert!(
        ran.code == 0 && ran.out.contains("no reference package beside it"),
        "{ran:?}"
    );
    let empty = raw(folder.path(), "empty.safetensors", "{}", 0);
    assert!(expect(1, &["bench", text(&empty)]).is_empty());
    let ran = run(&["bench", text(&path), "--select", "zzz"]);
    assert_eq!((ran.code, ran.out.as_str()), (1, ""));
    let odd = r#"{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,1]}}"#;
    let odd = raw(folder.path(), "odd.safetensors", odd, 1);
    assert!(
        expect(
            5,
            &["bench", text(&odd), "--no-reference", "--device", "cpu"]
        )
        .contains("F9")
    );
}
