//! Large checkpoints that take no room on the disk: files with holes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tonnage::Dtype;
use tonnage::format::{TensorSpec, WriteOptions, layout};

const LARGE: u64 = 64 << 20;
const SMALL: u64 = 1000;

/// A file of about this many bytes: tensors `large.N` of 64 MiB, and between them a thousand `small.N`.
pub fn model(folder: &Path, bytes: u64) -> PathBuf {
    let path = folder.join("sparse.safetensors");
    let large = (0..bytes / LARGE).map(|i| (format!("large.{i}"), [LARGE]));
    let small = (0..1000).map(|i| (format!("small.{i}"), [SMALL + i % 100]));
    let tensors: Vec<(String, [u64; 1])> = large.chain(small).collect();
    let specs: Vec<TensorSpec<'_>> = tensors
        .iter()
        .map(|(name, shape)| TensorSpec {
            name,
            dtype: Dtype::U8,
            shape,
        })
        .collect();
    let layout = layout(&specs, None, &WriteOptions::default()).unwrap();
    let file = File::create(&path).unwrap();
    file.write_all_at(&layout.header, 0).unwrap();
    file.set_len(layout.file_len).unwrap();
    path
}
