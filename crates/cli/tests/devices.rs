//! `devices` shows what there is, and says what to do about what there is not.

mod common;

use common::{command, ended, expect, expect_json, raw, text};
use serde_json::Value;

/// Without any driver, whatever this machine has.
fn nowhere(args: &[&str]) -> common::Ran {
    let mut command = command(args);
    for name in ["CUDA_DRIVER", "HIP_DRIVER", "VULKAN_LOADER"] {
        command.env(format!("TONNAGE_{name}"), "/nowhere/lib.so");
    }
    ended(&mut command)
}

#[test]
fn every_kind_is_named_and_the_host_is_always_there() {
    let report = expect_json(0, &["devices"]);
    assert_eq!(report["schema"], "tonnage.devices/1");
    let kinds = report["kinds"].as_array().unwrap();
    let names: Vec<&str> = kinds
        .iter()
        .map(|kind| kind["kind"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["cpu", "cuda", "rocm", "vulkan", "metal"]);
    let host = &report["devices"][0];
    assert_eq!(
        (&host["id"], &host["unified"]),
        (&"cpu".into(), &true.into())
    );
    assert!(host["free"].as_u64().unwrap() <= host["memory"].as_u64().unwrap());
    for kind in kinds {
        let count = report["devices"].as_array().unwrap().iter();
        let count = count
            .filter(|device| device["kind"] == kind["kind"])
            .count();
        assert_eq!(kind["devices"], count);
        assert_eq!(kind["reason"].is_null(), count > 0, "{kind}");
    }
    for device in report["devices"].as_array().unwrap() {
        assert!(!device["name"].as_str().unwrap().is_empty(), "{device}");
        assert!(
            !device["abilities"].as_array().unwrap().is_empty(),
            "{device}"
        );
        // What is there can be asked for by its name, alone.
        let one = expect_json(0, &["devices", device["id"].as_str().unwrap()]);
        assert_eq!(one["devices"].as_array().unwrap().len(), 1, "{one}");
        assert_eq!(one["devices"][0]["id"], device["id"]);
    }
}

#[test]
fn where_nothing_is_found_it_says_what_was_looked_for_and_what_to_do() {
    let ran = nowhere(&["devices", "--json"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(report["devices"].as_array().unwrap().len(), 1, "{report}");
    for kind in report["kinds"].as_array().unwrap().iter().skip(1) {
        let reason = kind["reason"].as_str().unwrap();
        let apple = kind["kind"] == "metal";
        assert!(
            apple || reason.contains("/nowhere/lib.so") && reason.contains("install"),
            "{kind}"
        );
        assert!(
            apple || !kind["hints"].as_array().unwrap().is_empty(),
            "{kind}"
        );
    }
    let ran = nowhere(&["devices"]);
    for kind in ["cuda", "rocm", "vulkan", "metal"] {
        assert!(
            ran.out.contains(&format!("\nno {kind} device: ")),
            "{}",
            ran.out
        );
    }
    assert!(
        ran.out.contains("\n  · ") && ran.out.starts_with("device  name"),
        "{}",
        ran.out
    );
}

#[test]
fn a_device_that_is_named_is_there_or_the_exit_code_says_so() {
    let shown = expect(0, &["devices", "cpu"]);
    assert!(
        shown.contains("host memory") && !shown.contains("cuda"),
        "{shown}"
    );
    let ran = nowhere(&["devices", "cuda:7"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.out.contains("no cuda device: ") && !ran.out.contains("vulkan"),
        "{}",
        ran.out
    );
    assert!(expect(2, &["devices", "gpu"]).contains("names no device"));
}

#[test]
fn bench_loads_to_each_device_that_is_there() {
    let report = expect_json(0, &["devices"]);
    let devices = report["devices"].as_array().unwrap().iter();
    let ids: Vec<&str> = devices
        .map(|device| device["id"].as_str().unwrap())
        .skip(1)
        .collect();
    if ids.is_empty() {
        eprintln!("not run: no device but the host");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let header = r#"{"a":{"dtype":"U8","shape":[1000000],"data_offsets":[0,1000000]}}"#;
    let path = raw(folder.path(), "m.safetensors", header, 1_000_000);
    let mut args = vec!["bench", text(&path), "--rounds", "1", "--no-reference"];
    ids.iter().for_each(|id| args.extend(["--device", id]));
    let report = expect_json(0, &args);
    for id in ids {
        let of = |key: &str, word: &str| {
            let all = report[key]
                .as_array()
                .unwrap()
                .iter()
                .filter(|row| row[word] == id);
            all.cloned().collect::<Vec<_>>()
        };
        assert_eq!(of("limits", "group").len(), 2, "{id}: {report}");
        let loads = of("loads", "to");
        assert!(!loads.is_empty(), "{id}: {report}");
        for load in loads {
            assert!(
                load["failed"].is_null() && load["median"].as_f64().unwrap() > 0.0,
                "{load}"
            );
        }
    }
}

#[test]
fn bench_refuses_a_device_that_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let path = raw(folder.path(), "m.safetensors", header, 1);
    let ran = nowhere(&["bench", text(&path), "--no-reference", "--device", "cuda"]);
    assert_eq!((ran.code, ran.err.lines().count()), (6, 1), "{ran:?}");
    assert!(ran.err.starts_with("error[NO_DEVICE]: cuda:0: "), "{ran:?}");
    expect(2, &["bench", text(&path), "--device", "card"]);
}
