//! Verifying finds every fault of every file and does not stop at the first.

mod common;

use std::fs;
use std::path::Path;

use common::{Tensor, model, names, refs};
use tonnage::format::ReadOptions;
use tonnage::{
    Checkpoint, Dtype, OpenOptions, Save, Severity, Verification, save, to_bytes, verify,
};

fn look(path: &Path) -> Verification {
    verify(path, &OpenOptions::default()).unwrap()
}

fn codes(verification: &Verification, severity: Severity) -> Vec<&'static str> {
    verification
        .findings
        .iter()
        .filter(|f| f.severity == severity)
        .map(|f| f.code)
        .collect()
}

#[test]
fn a_sound_checkpoint_has_no_findings() {
    let folder = tempfile::tempdir().unwrap();
    save(
        &refs(&model(1)),
        folder.path(),
        &Save {
            max_shard_size: Some(4200),
            ..Save::default()
        },
    )
    .unwrap();
    let all = look(folder.path());
    assert_eq!(
        (all.ok(), all.worst(), all.files.len(), all.tensors()),
        (true, None, 3, 8)
    );
    let one = look(Path::new(&all.files[0].label));
    assert_eq!(
        (one.ok(), one.files.len(), &one.files[0]),
        (true, 1, &all.files[0])
    );
    assert_eq!(
        verify(folder.path().join("absent"), &OpenOptions::default())
            .unwrap_err()
            .code(),
        "IO"
    );
}

#[test]
fn every_faulty_file_is_named_and_the_others_still_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    save(
        &refs(&model(1)),
        root,
        &Save {
            max_shard_size: Some(2100),
            ..Save::default()
        },
    )
    .unwrap();
    let shards: Vec<String> = names(root)
        .into_iter()
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    assert!(shards.len() >= 4);
    let cut = |name: &str| {
        let bytes = fs::read(root.join(name)).unwrap();
        fs::write(root.join(name), &bytes[..bytes.len() - 1]).unwrap();
    };
    cut(&shards[0]);
    fs::remove_file(root.join(&shards[1])).unwrap();
    fs::write(
        root.join(&shards[2]),
        to_bytes(&[], &Save::default()).unwrap(),
    )
    .unwrap();
    fs::write(
        root.join("stray.safetensors"),
        to_bytes(&[], &Save::default()).unwrap(),
    )
    .unwrap();
    fs::write(root.join(".model.safetensors.7.0123456789abcdef.tmp"), b"").unwrap();
    let found = look(root);
    assert!(!found.ok());
    assert_eq!(found.files.len(), shards.len());
    assert_eq!(
        found.files.iter().filter(|f| f.readable).count(),
        shards.len() - 2
    );
    let errors = codes(&found, Severity::Error);
    assert_eq!(errors[..2], ["DATA_TRUNCATED", "INDEX_FILE_MISSING"]);
    assert!(
        errors[2..]
            .iter()
            .all(|code| *code == "INDEX_TENSOR_MISSING")
            && errors.len() > 2
    );
    assert_eq!(
        codes(&found, Severity::Note),
        ["INDEX_UNNAMED_FILE", "LEFTOVER"]
    );
    for finding in &found.findings {
        assert!(finding.file.is_some() && !finding.text.is_empty());
        assert!(finding.severity != Severity::Error || finding.clause.is_some());
    }
}

#[test]
fn null_metadata_is_remarked_on_and_refused_by_the_strict_profile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mlx.safetensors");
    let header = br#"{"__metadata__":null,"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.push(7);
    fs::write(&path, &file).unwrap();
    let found = look(&path);
    assert!(found.ok(), "{found:?}");
    assert!(codes(&found, Severity::Warning).contains(&"METADATA_NULL"));
    let strict = OpenOptions {
        read: ReadOptions::strict(),
        ..OpenOptions::default()
    };
    assert!(Checkpoint::open(&path).is_ok());
    let refused = Checkpoint::open_with(&path, &strict).unwrap_err();
    assert!(refused.to_string().contains("7.1"), "{refused}");
    let found = verify(&path, &strict).unwrap();
    assert_eq!(codes(&found, Severity::Error), ["METADATA_NOT_OBJECT"]);
}

#[test]
fn lints_and_disagreements_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    // Spaces before the object: allowed, and worth a word.
    let header = br#" {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let mut odd = (header.len() as u64).to_le_bytes().to_vec();
    odd.extend_from_slice(header);
    odd.push(7);
    fs::write(root.join("odd.safetensors"), &odd).unwrap();
    let found = look(root);
    assert!(
        found.ok() && found.worst() == Some(Severity::Warning),
        "{found:?}"
    );

    let both = [Tensor::new("a", Dtype::U8, &[1], 1)];
    fs::write(
        root.join("b.safetensors"),
        to_bytes(&refs(&both), &Save::default()).unwrap(),
    )
    .unwrap();
    let ambiguous = look(root);
    assert_eq!(codes(&ambiguous, Severity::Error), ["AMBIGUOUS"]);
    assert_eq!(
        ambiguous.files.len(),
        2,
        "the files are looked at all the same"
    );
    let index = r#"{"metadata":{"total_size":5},"weight_map":{"a":"b.safetensors"}}"#;
    fs::write(root.join("model.safetensors.index.json"), index).unwrap();
    let found = look(root);
    assert_eq!(
        codes(&found, Severity::Note),
        ["INDEX_TOTAL_SIZE", "INDEX_UNNAMED_FILE"]
    );
    fs::write(root.join("model.safetensors.index.json"), "{").unwrap();
    assert!(!look(root).ok());
}
