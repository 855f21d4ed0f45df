//! Claim: from a whole checkpoint to ranks, from those to other ranks, and back: the bytes are the same as at the
//! start, whatever the meshes in between; and a folder of ranks that lacks one is refused.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use common::{Tensor, refs};
use tonnage::engine::{Cancel, Progress};
use tonnage::plan::{
    Mesh, ModelConfig, Origin, Plan, PlanLoad, RECORD, Request, Rules, SHARDS, auto, reshard,
    reshard_bytes,
};
use tonnage::{Checkpoint, Dtype, OnProgressOf, OpenOptions, Save, save};

fn tensors() -> Vec<Tensor> {
    vec![
        Tensor::new("model.embed_tokens.weight", Dtype::BF16, &[131, 24], 1),
        Tensor::new(
            "model.layers.0.self_attn.q_proj.weight",
            Dtype::BF16,
            &[32, 24],
            2,
        ),
        Tensor::new(
            "model.layers.0.mlp.down_proj.weight",
            Dtype::F32,
            &[24, 96],
            3,
        ),
        Tensor::new(
            "model.layers.1.mlp.gate_up_proj.weight",
            Dtype::F16,
            &[64, 24],
            4,
        ),
        Tensor::new("model.norm.weight", Dtype::F32, &[24], 5),
        Tensor::new("step", Dtype::I64, &[], 6),
        Tensor::new("empty", Dtype::F32, &[0, 3], 7),
    ]
}

/// Rows, columns, a fused tensor, a padded vocabulary, and a stage whose tensors have other names there.
const RULES: &str = r#"{
    "*.q_proj.weight": {"tp": {"heads": {"dim": 0, "heads": 4, "head_dim": 8}}},
    "*.down_proj.weight": {"tp": {"shard": {"dim": 1}}},
    "*.gate_up_proj.weight": {"tp": {"strided": {"dim": 0, "groups": 2}}},
    "*embed_tokens.weight": {"tp": {"shard": {"dim": 0, "uneven": {"pad_to": 16}}}},
    "*": "replicate"
}"#;

fn ranks(from: &Path, to: PathBuf, size: u32, rules: &str) -> PathBuf {
    let origin = Origin::open(from, &OpenOptions::default()).expect("a checkpoint");
    let mesh = Mesh::new(&[("tp", size)]).unwrap();
    let rules = Rules::from_json(rules).unwrap();
    let plan = origin.plan(&mesh, &rules).expect("a plan");
    reshard(&origin, &plan, &to, &PlanLoad::default(), &Save::default()).expect("written");
    to
}

fn same(path: &Path) {
    let checkpoint = Checkpoint::open(path).expect("a checkpoint");
    let loaded = checkpoint.load(&tonnage::Load::default()).expect("loaded");
    let wanted = tensors();
    assert_eq!(checkpoint.len(), wanted.len());
    for tensor in &wanted {
        let (found, bytes) = loaded.get(&tensor.name).expect("a tensor");
        assert_eq!(
            (found.dtype, &found.shape),
            (tensor.dtype, &tensor.shape),
            "{}",
            tensor.name
        );
        assert!(bytes == tensor.data, "{}", tensor.name);
    }
}

#[test]
fn four_ranks_become_eight_and_one_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = at("whole.safetensors");
    let metadata = vec![("format".to_owned(), "pt".to_owned())];
    let options = Save {
        metadata,
        ..Save::default()
    };
    save(&refs(&tensors()), &whole, &options).unwrap();
    let four = ranks(&whole, at("tp4"), 4, RULES);
    let first = Checkpoint::open(four.join("rank-00003.safetensors")).unwrap();
    assert_eq!(
        first.get("model.embed_tokens.weight").unwrap().shape(),
        [36, 24]
    );
    assert_eq!(
        first
            .get("model.layers.0.mlp.down_proj.weight")
            .unwrap()
            .shape(),
        [24, 24]
    );
    assert!(first.metadata().contains_key(SHARDS));
    let eight = ranks(
        &four,
        at("tp8"),
        8,
        r#"{"*.q_proj.weight": {"shard": {"dim": 1}}, "*.gate_up_proj.weight": {"shard": {"dim": 0}}, "*": "replicate"}"#,
    );
    let back = ranks(&eight, at("back.safetensors"), 1, r#"{"*": "replicate"}"#);
    same(&back);
    let checkpoint = Checkpoint::open(&back).unwrap();
    assert_eq!(
        checkpoint.metadata().len(),
        1,
        "{:?}",
        checkpoint.metadata()
    );
    // A rank's file is missing: a refusal that says so.
    std::fs::remove_file(four.join("rank-00002.safetensors")).unwrap();
    let error = Origin::open(&four, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.code(), "SHARDS");
    assert!(
        error.to_string().contains("4 ranks, and 3 are there"),
        "{error}"
    );
}

#[test]
fn files_of_two_saves_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = at("whole.safetensors");
    save(&refs(&tensors()), &whole, &Save::default()).unwrap();
    // A save of fewer ranks leaves nothing of the one before it.
    let place = ranks(&whole, at("ranks"), 8, RULES);
    ranks(&whole, place.clone(), 4, RULES);
    assert_eq!(std::fs::read_dir(&place).unwrap().count(), 4);
    same(&ranks(
        &place,
        at("back.safetensors"),
        1,
        r#"{"*": "replicate"}"#,
    ));
    // What a save that was cut off has left: one file of it, the others of the save before.
    let newer = ranks(&whole, at("newer"), 4, RULES);
    std::fs::copy(
        newer.join("rank-00000.safetensors"),
        place.join("rank-00000.safetensors"),
    )
    .unwrap();
    let error = Origin::open(&place, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.code(), "SHARDS");
    assert!(
        error.to_string().contains("rank-00001.safetensors"),
        "{error}"
    );
}

#[test]
fn a_folder_of_ranks_is_replaced_as_a_whole_even_by_what_is_made_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = at("whole.safetensors");
    save(&refs(&tensors()), &whole, &Save::default()).unwrap();
    let place = ranks(&whole, at("ranks"), 4, RULES);
    std::fs::write(place.join("config.json"), "{}").unwrap();
    let listed = || common::names(&place);
    let before = listed();
    // What is cancelled leaves the old ranks, and nothing else.
    let origin = Origin::open(&place, &OpenOptions::default()).unwrap();
    let everywhere = Rules::from_json(r#"{"*": "replicate"}"#).unwrap();
    let plan = |ranks: u32| {
        let mesh = Mesh::new(&[("tp", ranks)]).unwrap();
        origin.plan(&mesh, &everywhere).unwrap()
    };
    let (cancel, heard) = (Cancel::new(), Mutex::new(Vec::new()));
    let total = reshard_bytes(&plan(3)).unwrap();
    let stop = |progress: Progress| {
        if progress.done > total / 2 {
            cancel.cancel();
        }
    };
    let options = Save {
        progress: Some(OnProgressOf(&stop)),
        cancel: Some(&cancel),
        ..Save::default()
    };
    let load = PlanLoad {
        cancel: Some(&cancel),
        ..PlanLoad::default()
    };
    let error = reshard(&origin, &plan(3), &place, &load, &options).unwrap_err();
    assert_eq!(error.code(), "CANCELLED");
    assert_eq!(listed(), before);
    // Into the folder that is read, and all of it is heard of.
    let hear = |progress: Progress| heard.lock().unwrap().push(progress);
    let options = Save {
        progress: Some(OnProgressOf(&hear)),
        ..Save::default()
    };
    let load = PlanLoad::default();
    let saved = reshard(&origin, &plan(3), &place, &load, &options).unwrap();
    assert!(
        saved
            .iter()
            .all(|one| one.files.iter().all(|file| file.is_file()))
    );
    assert_eq!(saved.iter().map(|one| one.total_size).sum::<u64>(), total);
    let heard = heard.into_inner().unwrap();
    assert!(heard.is_sorted_by_key(|progress| progress.done));
    assert_eq!(heard.last(), Some(&Progress { done: total, total }));
    let names = [
        "config.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "rank-00002.safetensors",
    ];
    assert_eq!(listed(), names);
    // A save that was cut off when its record was there: that is what counts, and the next one tidies it.
    let hidden = place.join(".rank.1.0123456789abcdef.ranks");
    std::fs::create_dir(&hidden).unwrap();
    std::fs::write(hidden.join(".lock"), "").unwrap();
    for (rank, file) in saved.iter().enumerate() {
        let name = format!("rank-{rank:05}.safetensors");
        std::fs::rename(&file.files[0], hidden.join(name)).unwrap();
    }
    ranks(&whole, at("older"), 2, RULES);
    for name in ["rank-00000.safetensors", "rank-00001.safetensors"] {
        std::fs::rename(at("older").join(name), place.join(name)).unwrap();
    }
    let record = |text: &str| std::fs::write(place.join(RECORD), text).unwrap();
    let opened = || Origin::open(&place, &OpenOptions::default());
    for wrong in [
        "{",
        r#"{"version":2,"folder":".rank.1.0123456789abcdef.ranks"}"#,
        r#"{"version":1,"folder":".rank.1.fedcba9876543210.ranks"}"#,
        r#"{"version":1,"folder":".rank.1/../.1.0123456789abcdef.ranks"}"#,
        r#"{"version":1,"folder":".."}"#,
    ] {
        record(wrong);
        assert_eq!(opened().unwrap_err().code(), "SHARDS", "{wrong}");
    }
    record(r#"{"version":1,"folder":".rank.1.0123456789abcdef.ranks"}"#);
    let mesh = Mesh::new(&[("tp", 3)]).unwrap();
    assert_eq!(opened().unwrap().table().files().len(), 3);
    let again = opened().unwrap().plan(&mesh, &everywhere).unwrap();
    reshard(&opened().unwrap(), &again, &place, &load, &Save::default()).unwrap();
    assert_eq!(listed(), names);
    same(&ranks(
        &place,
        at("back.safetensors"),
        1,
        r#"{"*": "replicate"}"#,
    ));
    // A whole checkpoint in the same folder takes the place of the ranks.
    ranks(&place, place.clone(), 1, r#"{"*": "replicate"}"#);
    assert!(listed().contains(&"model.safetensors".to_owned()));
    assert!(!listed().iter().any(|name| name.starts_with("rank-")));
    same(&place);
}

#[test]
fn stages_that_count_their_layers_anew_come_back_under_their_own_names() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = at("whole.safetensors");
    save(&refs(&tensors()), &whole, &Save::default()).unwrap();
    let origin = Origin::open(&whole, &OpenOptions::default()).unwrap();
    let mesh = Mesh::new(&[("pp", 2)]).unwrap();
    let mut request: Request = auto(origin.table(), &mesh, ModelConfig::default());
    for target in &mut request.targets {
        target.local = target
            .name
            .contains("layers.1.")
            .then(|| target.name.replace("layers.1.", "layers.0.").into());
    }
    let plan: Plan = origin.plan_request(&request).unwrap();
    let stages = at("pp2");
    let options = Save {
        max_shard_size: Some(4000),
        ..Save::default()
    };
    let saved = reshard(&origin, &plan, &stages, &PlanLoad::default(), &options).unwrap();
    assert!(saved[0].files.len() > 1, "{saved:?}");
    let last = Checkpoint::open(&saved[1].files[0]).unwrap();
    assert!(last.get("model.layers.0.mlp.gate_up_proj.weight").is_some());
    same(&ranks(
        &stages,
        at("back.safetensors"),
        1,
        r#"{"*": "replicate"}"#,
    ));
}

/// Writes a file with rows of `w` from `at` on, each filled with its number, and says so in PyTorch's words.
fn shard(folder: &Path, name: &str, at: u64, rows: u64, whole: Option<u64>) {
    let mut tensor = Tensor::new("w", Dtype::U8, &[rows, 4], 0);
    for (row, bytes) in tensor.data.chunks_mut(4).enumerate() {
        bytes.fill((at as usize + row) as u8);
    }
    let shape = whole.map_or(String::new(), |all| format!(r#","global_shape":[{all},4]"#));
    let said = format!(r#"{{"w":{{"saved_offsets":[{at},0]{shape}}}}}"#);
    let options = Save {
        metadata: vec![("DCP_SHARDING_INFO".to_owned(), said)],
        ..Save::default()
    };
    save(&refs(&[tensor]), folder.join(name), &options).unwrap();
}

/// What the origin gives as one checkpoint, or the error.
fn joined(folder: &Path) -> Result<Vec<u8>, tonnage::Error> {
    let origin = Origin::open(folder, &OpenOptions::default())?;
    let plan = origin.plan(
        &Mesh::new(&[("tp", 1)]).unwrap(),
        &Rules::from_json(r#"{"*": "replicate"}"#).unwrap(),
    )?;
    let to = tempfile::tempdir().unwrap();
    let path = to.path().join("out.safetensors");
    reshard(
        &origin,
        &plan,
        &path,
        &PlanLoad::default(),
        &Save::default(),
    )?;
    let found = Checkpoint::open(&path).unwrap();
    assert!(!found.metadata().contains_key("DCP_SHARDING_INFO"));
    found.get("w").unwrap().read()
}

#[test]
fn parts_of_tensors_in_the_words_of_pytorch_become_one() {
    let rows = |n: u8| (0..n).flat_map(|row| [row; 4]).collect::<Vec<u8>>();
    for whole in [None, Some(7)] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let names = ["shard-00001-a.safetensors", "shard-00002-a.safetensors"];
        shard(folder, names[0], 0, 3, whole);
        shard(folder, names[1], 3, 4, whole);
        assert_eq!(joined(folder).unwrap(), rows(7));
        // A replica is as good as none; without a record it counts as the others do.
        shard(folder, "shard-00003-a.safetensors", 3, 4, whole);
        assert_eq!(joined(folder).unwrap(), rows(7));
        // Nor does what a save that was cut off has left, where a record says which files are meant.
        shard(folder, "shard-00003-a.safetensors", 2, 4, whole);
        assert!(joined(folder).is_err(), "an overlap");
        let record = |files: &[&str]| {
            let text = serde_json::json!({"version": 1, "files": files, "metadata": {"k": "v"}});
            std::fs::write(folder.join("tonnage.shards.json"), text.to_string()).unwrap();
        };
        record(&names);
        assert_eq!(joined(folder).unwrap(), rows(7));
        let origin = Origin::open(folder, &OpenOptions::default()).unwrap();
        assert_eq!(origin.table().files().len(), 2);
        for wrong in [
            &["../shard-1.safetensors"][..],
            &["shard-/x.safetensors"],
            &["shard-9.safetensors"],
        ] {
            record(wrong);
            assert!(joined(folder).is_err(), "{wrong:?}");
        }
        record(&names[1..]);
        assert!(joined(folder).is_err(), "a hole");
    }
}
