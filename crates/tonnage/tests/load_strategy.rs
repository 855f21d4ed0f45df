//! A load says which way it took and why; what fails in the middle names file, tensor and bytes.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::path::Path;

use tonnage::engine::Strategy;
use tonnage::storage::{FileSource, Source};
use tonnage::{Checkpoint, Dtype, ErrorKind, Load, Save, TensorData, save};

const MIB: usize = 1 << 20;

fn content(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) * 31 % 251) as u8).collect()
}

/// Four tensors of 6 MiB and a little.
fn write(path: &Path) -> Vec<(String, Vec<u8>)> {
    let tensors: Vec<(String, Vec<u8>)> = (0..4)
        .map(|i| (format!("layer.{i}"), content(6 * MIB + 8 * i, i)))
        .collect();
    let shapes: Vec<[u64; 1]> = tensors
        .iter()
        .map(|(_, data)| [data.len() as u64 / 4])
        .collect();
    let data: Vec<TensorData<'_>> = (tensors.iter().zip(&shapes))
        .map(|((name, data), shape)| TensorData {
            name,
            dtype: Dtype::F32,
            shape,
            data,
        })
        .collect();
    save(&data, path, &Save::default()).unwrap();
    tensors
}

fn cool(path: &Path) {
    let file = File::open(path).unwrap();
    let source = FileSource::open(path).unwrap();
    // On a busy machine some pages are still on their way to or from the disk.
    for _ in 0..200 {
        file.sync_all().unwrap();
        source.forget(0, source.len());
        if source.residency(0, source.len()).fraction() == Some(0.0) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the page cache does not let the file go");
}

fn cached(checkpoint: &Checkpoint) -> f64 {
    let source = checkpoint.source(0).unwrap();
    source.residency(0, source.len()).fraction().unwrap()
}

#[test]
fn a_load_reports_its_way_and_a_cold_one_leaves_the_page_cache_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let tensors = write(&path);
    for (strategy, way) in [
        (Strategy::Auto, "direct"),
        (Strategy::Direct, "direct"),
        (Strategy::Mmap, "mmap"),
        (Strategy::Buffered, "buffered"),
        (Strategy::Auto, "buffered"),
    ] {
        if way != "buffered" {
            cool(&path);
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        let load = Load {
            strategy,
            ..Load::default()
        };
        let loaded = checkpoint.load(&load).unwrap();
        for (name, data) in &tensors {
            assert!(loaded.get(name).unwrap().1 == data);
        }
        let report = loaded.report();
        assert_eq!(report.strategy, way, "{report:?}");
        assert!(!report.reason.is_empty());
        assert!(
            way != "direct" || cached(&checkpoint) < 0.1,
            "{}",
            cached(&checkpoint)
        );
    }
}

#[test]
fn casts_read_past_the_page_cache_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write(&path);
    let load = Load {
        dtype: Some(Dtype::BF16),
        ..Load::default()
    };
    let warm = Checkpoint::open(&path).unwrap().load(&load).unwrap();
    cool(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let cold = checkpoint.load(&load).unwrap();
    assert!(cached(&checkpoint) < 0.1, "{}", cached(&checkpoint));
    for ((tensor, cold), (_, warm)) in cold.iter().zip(warm.iter()) {
        assert!(cold == warm, "{}", tensor.name);
    }
    assert!(cold.report().peak_staging > 0);
}

#[test]
fn a_file_that_is_cut_off_names_file_tensor_and_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write(&path);
    for strategy in [Strategy::Auto, Strategy::Direct, Strategy::Buffered] {
        write(&path);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let third = checkpoint.at(2).unwrap();
        let (begin, end) = (third.offset(), third.offset() + third.byte_len());
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(begin + 1000).unwrap();
        let load = Load {
            threads: Some(1),
            strategy,
            ..Load::default()
        };
        let error = checkpoint.load(&load).unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Io, "IO"));
        assert_eq!(error.file(), path.to_str());
        assert_eq!(error.tensor(), Some(third.name()));
        assert_eq!(error.range(), Some(begin..end));
        let text = error.to_string();
        assert!(
            text.contains(third.name()) && text.contains("model.safetensors"),
            "{text}"
        );
        let error = third.read().unwrap_err();
        assert_eq!(error.tensor(), Some(third.name()));
    }
}
