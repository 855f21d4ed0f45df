//! Large checkpoints that take no room on the disk: files with holes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tonnage::Dtype;
use tonnage::format::{TensorSpec, WriteOptions, layout};
use tonnage::gguf::{GgmlType, TensorSpec as BlockSpec, layout as gguf_layout};

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

/// The same as a GGUF file: `large.N` of blocks, almost 64 MiB, and a thousand `small.N`.
#[allow(dead_code, reason = "not every test that has such models has these")]
pub fn gguf(folder: &Path, bytes: u64) -> PathBuf {
    let path = folder.join("sparse.gguf");
    let ty = GgmlType::Q4_K;
    let rows = LARGE / (16 * ty.bytes() as u64);
    let row = 16 * ty.elements() as u64;
    let large = (0..bytes / LARGE).map(|i| (format!("large.{i}"), ty, vec![rows, row]));
    let small = (0..1000).map(|i| (format!("small.{i}"), GgmlType::F32, vec![SMALL + i % 100]));
    let tensors: Vec<(String, GgmlType, Vec<u64>)> = large.chain(small).collect();
    let specs: Vec<BlockSpec<'_>> = tensors
        .iter()
        .map(|(name, ty, shape)| BlockSpec {
            name,
            ty: *ty,
            shape,
        })
        .collect();
    let layout = gguf_layout(&[], &specs, &Default::default()).unwrap();
    let file = File::create(&path).unwrap();
    file.write_all_at(&layout.header, 0).unwrap();
    file.set_len(layout.file_len).unwrap();
    path
}
