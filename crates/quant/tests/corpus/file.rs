//! Files of the corpus, and their values.

use std::fs;
use std::path::{Path, PathBuf};

use tonnage_format::{Dtype, Header, ReadOptions};
use tonnage_quant::numbers::{bf16_to_f32, f16_to_f32};

/// A safetensors file in memory.
pub struct File {
    pub header: Header,
    pub bytes: Vec<u8>,
}

impl File {
    pub fn open(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let header = Header::parse(
            bytes.clone(),
            Some(bytes.len() as u64),
            &ReadOptions::strict(),
        )
        .unwrap();
        File { header, bytes }
    }

    pub fn get(&self, name: &str) -> Option<(Dtype, Vec<u64>, &[u8])> {
        let info = self.header.get(name)?;
        let start = (self.header.data_start() + info.begin) as usize;
        let bytes = &self.bytes[start..start + info.byte_len() as usize];
        Some((info.dtype.known().ok()?, info.shape.to_vec(), bytes))
    }
}

/// Where the corpus is.
pub fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/quant")
}

/// The values of floats.
pub fn decoded(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let halves = || {
        bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| u16::from_le_bytes(*b))
    };
    match dtype {
        Dtype::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::F16 => halves().map(f16_to_f32).collect(),
        Dtype::BF16 => halves().map(bf16_to_f32).collect(),
        other => panic!("{other}"),
    }
}
