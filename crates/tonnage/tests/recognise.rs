//! Checkpoints on disk are recognised by what lies in them and beside them.

use std::fs;
use std::path::{Path, PathBuf};

use tonnage::Checkpoint;
use tonnage::quant::{Meaning, Policy, Provenance};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/quant")
}

#[test]
fn every_checkpoint_of_the_corpus_is_recognised_from_its_folder() {
    let text = fs::read(corpus().join("cases.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let mut seen = 0;
    for case in cases["cases"].as_array().unwrap() {
        let path = corpus().join(case["path"].as_str().unwrap());
        let checkpoint = Checkpoint::open(path.join("model.safetensors")).unwrap();
        let map = checkpoint.quantization(Policy::Lenient).unwrap();
        let expected = case["tensors"].as_object().unwrap();
        assert_eq!(map.len(), expected.len(), "{}", path.display());
        for name in expected.keys() {
            let tensor = map.get(name);
            let tensor = tensor.unwrap_or_else(|| panic!("{}: {name}", path.display()));
            assert!(!tensor.evidence.is_empty(), "{name}");
            seen += 1;
        }
    }
    assert!(seen > 400, "{seen}");
}

#[test]
fn a_configuration_beside_the_file_decides_and_without_it_strict_refuses() {
    let from = corpus().join("gptq");
    let case = fs::read_dir(&from).unwrap().map(|e| e.unwrap().path());
    let case = case
        .filter(|path| path.join("quantize_config.json").is_file())
        .min()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    fs::copy(case.join("model.safetensors"), &model).unwrap();
    let alone = Checkpoint::open(&model).unwrap();
    let guessed = alone.quantization(Policy::Lenient).unwrap();
    assert!(!guessed.is_empty());
    fs::copy(
        case.join("quantize_config.json"),
        folder.path().join("quantize_config.json"),
    )
    .unwrap();
    let told = Checkpoint::open(&model).unwrap();
    let map = told.quantization(Policy::Strict).unwrap();
    assert_eq!(map.len(), guessed.len());
    for tensor in map.tensors() {
        assert!(matches!(tensor.meaning, Meaning::Preset(..)));
        let by_config =
            |e: &tonnage::quant::Evidence| matches!(e.provenance, Provenance::Config(_));
        assert!(tensor.evidence.iter().any(by_config), "{tensor:?}");
    }
    // A configuration that can't be read is a warning; the rest is recognised all the same.
    fs::write(folder.path().join("quantize_config.json"), "{").unwrap();
    let broken = Checkpoint::open(&model).unwrap();
    let map = broken.quantization(Policy::Lenient).unwrap();
    assert_eq!(map.len(), guessed.len());
    assert!(
        map.warnings
            .iter()
            .any(|w| w.contains("quantize_config.json")),
        "{:?}",
        map.warnings
    );
}

#[test]
fn a_checkpoint_without_quantised_tensors_has_an_empty_map() {
    let bytes = tonnage::to_bytes(&[], &tonnage::Save::default());
    let empty = Checkpoint::from_bytes(bytes.unwrap(), "<bytes>", &Default::default()).unwrap();
    assert!(empty.quantization(Policy::Strict).unwrap().is_empty());
}
