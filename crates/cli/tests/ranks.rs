//! `plan` says who reads what, and `reshard` writes it: there and back the bytes are the same.

mod common;

use common::{expect, expect_json, listing, model, text};

#[test]
fn plan_shows_ranks_tensors_and_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 4);
    let mesh = ["plan", text(&path), "--mesh", "pp=2,tp=2"];
    let shown = expect(0, &mesh);
    assert!(shown.contains("the proof holds"), "{shown}");
    assert!(shown.contains("rank 3 (pp 1, tp 1)"), "{shown}");
    let picture = folder.path().join("plan.html");
    let rules = ["--rules", "*.weight=shard:0", "--rules", "*=replicate"];
    let html = [
        &mesh[..],
        &rules,
        &["--rank", "1", "--html", text(&picture)],
    ]
    .concat();
    assert!(expect(0, &html).contains("model.layers.0.proj.weight"));
    assert!(std::fs::read_to_string(&picture).unwrap().contains("<html"));
    let plan = expect_json(0, &[&mesh[..], &rules].concat());
    assert_eq!(
        (&plan["format"], &plan["mesh"][1][1]),
        (&"tonnage-plan".into(), &2.into())
    );
    let read = tonnage::plan::Plan::from_json(&plan.to_string()).expect("a plan");
    read.verify().expect("a plan that holds");
    for (wrong, word) in [
        (&["--mesh", "tp"][..], "AXIS=N"),
        (&["--mesh", "tp=0"], "PLAN_MESH"),
        (&["--mesh", "tp=2", "--rules", "*=shard"], "no placement"),
        (&["--mesh", "tp=2", "--rules", "absent.json"], "absent.json"),
        (
            &["--mesh", "tp=2", "--rules", "embed*=replicate"],
            "PLAN_NO_RULE",
        ),
        (&["--mesh", "tp=2", "--rank", "2"], "PLAN_MESH"),
    ] {
        let said = expect(2, &[&["plan", text(&path)], wrong].concat());
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn reshard_goes_to_other_meshes_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 4);
    let [two, three, back] =
        ["two", "three", "back.safetensors"].map(|name| folder.path().join(name));
    let rules = folder.path().join("rules.json");
    std::fs::write(
        &rules,
        r#"{"*.weight": {"tp": {"shard": {"dim": 1}}}, "*": "replicate"}"#,
    )
    .unwrap();
    let report = expect_json(
        0,
        &[
            "reshard",
            text(&path),
            text(&two),
            "--mesh",
            "tp=2",
            "--rules",
            text(&rules),
        ],
    );
    assert_eq!(
        (&report["schema"], &report["ranks"]),
        (&"tonnage.reshard/1".into(), &2.into())
    );
    assert_eq!(
        listing(&two),
        ["rank-00000.safetensors", "rank-00001.safetensors"]
    );
    expect(
        0,
        &[
            "verify",
            text(&two.join("rank-00001.safetensors")),
            "--warnings-fail",
        ],
    );
    let again = [
        "reshard",
        text(&two),
        text(&three),
        "--mesh",
        "tp=3",
        "--rules",
        "*.weight=shard:0",
        "--rules",
        "*=replicate",
    ];
    assert!(expect(0, &again).contains("3 ranks"));
    assert!(expect(2, &again).contains("--force"));
    expect(
        0,
        &[
            "reshard",
            text(&three),
            text(&back),
            "--mesh",
            "tp=1",
            "--no-sync",
        ],
    );
    expect(0, &["diff", text(&path), text(&back)]);
}

#[test]
fn what_fsdp_and_tensor_parallel_ranks_saved_goes_to_tensor_parallel_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 4);
    let at = |name: &str| folder.path().join(name);
    // FSDP2 outside of tensor parallelism cuts rows that this cut already: PyTorch's strided shards.
    let rows = r#"{"fsdp": {"strided": {"dim": 0, "groups": 2}}, "tp": {"shard": {"dim": 0}}}"#;
    let both = at("both.json");
    std::fs::write(
        &both,
        format!(r#"{{"*.weight": {rows}, "*": "replicate"}}"#),
    )
    .unwrap();
    let columns = ["--rules", "*.weight=shard:1", "--rules", "*=replicate"];
    let (path, both) = (text(&path), text(&both));
    let reshard = |from: &str, to: &std::path::Path, rest: &[&str]| {
        let words = [&["reshard", from, text(to), "--mesh"], rest].concat();
        expect(0, &words)
    };
    let from = [
        (
            "fsdp",
            vec![
                "fsdp=4",
                "--rules",
                "*.weight=shard:0",
                "--rules",
                "*=replicate",
            ],
        ),
        ("both", vec!["fsdp=2,tp=2", "--rules", both]),
    ];
    let tp = [&["tp=2"][..], &columns].concat();
    reshard(path, &at("wanted"), &tp);
    for (name, mesh) in from {
        reshard(path, &at(name), &mesh);
        assert_eq!(listing(&at(name)).len(), 4);
        let to = at(&format!("{name}-tp"));
        reshard(text(&at(name)), &to, &tp);
        assert_eq!(listing(&to), listing(&at("wanted")));
        for file in listing(&to) {
            let wanted = at("wanted").join(&file);
            expect(0, &["diff", text(&wanted), text(&to.join(&file))]);
        }
        // In place as well: the folder that is read is the one that is replaced.
        reshard(
            text(&at(name)),
            &at(name),
            &[&tp[..], &["--force"]].concat(),
        );
        assert_eq!(listing(&at(name)), listing(&at("wanted")));
        reshard(
            text(&at(name)),
            &at("back.safetensors"),
            &["tp=1", "--force"],
        );
        expect(0, &["diff", path, text(&at("back.safetensors"))]);
    }
}
