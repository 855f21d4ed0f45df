//! Tensors to save and ways to look at what was saved.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tonnage::format::TensorSpec;
use tonnage::{Checkpoint, Dtype, TensorData};

/// A tensor with its own memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn new(name: &str, dtype: Dtype, shape: &[u64], seed: u64) -> Tensor {
        let len = dtype.bytes_of(shape).unwrap() as usize;
        Tensor {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            data: noise(len, seed),
        }
    }

    pub fn spec(&self) -> TensorSpec<'_> {
        TensorSpec {
            name: &self.name,
            dtype: self.dtype,
            shape: &self.shape,
        }
    }
}

/// Bytes that differ from each other and from those of other seeds.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn refs(tensors: &[Tensor]) -> Vec<TensorData<'_>> {
    tensors
        .iter()
        .map(|t| TensorData {
            name: &t.name,
            dtype: t.dtype,
            shape: &t.shape,
            data: &t.data,
        })
        .collect()
}

/// Tensors of several dtypes, ranks and sizes, an empty one among them.
pub fn model(seed: u64) -> Vec<Tensor> {
    vec![
        Tensor::new("embed.weight", Dtype::F32, &[100, 16], seed),
        Tensor::new("layers.0.up", Dtype::BF16, &[16, 64], seed + 1),
        Tensor::new("layers.0.down", Dtype::BF16, &[64, 16], seed + 2),
        Tensor::new("layers.1.up", Dtype::F16, &[16, 64], seed + 3),
        Tensor::new("scale", Dtype::F64, &[], seed + 4),
        Tensor::new("empty", Dtype::I64, &[0, 4], seed + 5),
        Tensor::new("mask", Dtype::U8, &[3, 5, 7], seed + 6),
        Tensor::new("nibbles", Dtype::F4, &[4, 6], seed + 7),
    ]
}

/// Name, dtype, shape and bytes of everything in a checkpoint.
pub fn content(checkpoint: &Checkpoint) -> BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)> {
    checkpoint
        .iter()
        .map(|t| {
            (
                t.name().to_owned(),
                (t.dtype().unwrap(), t.shape().to_vec(), t.read().unwrap()),
            )
        })
        .collect()
}

pub fn content_of(tensors: &[Tensor]) -> BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)> {
    tensors
        .iter()
        .map(|t| (t.name.clone(), (t.dtype, t.shape.clone(), t.data.clone())))
        .collect()
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
