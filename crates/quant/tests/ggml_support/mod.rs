//! What the tests of ggml's types share: the committed files, random blocks, comparison by bits.
#![allow(dead_code)]
#![allow(clippy::disallowed_methods)]

use std::path::Path;

use tonnage_format::{Header, ReadOptions};
use tonnage_quant::ggml::GgmlType;

/// A file of `conformance/quant/ggml`, parsed.
pub struct Vectors {
    header: Header,
}

impl Vectors {
    pub fn open(name: &str) -> Vectors {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/quant/ggml");
        let file = std::fs::read(root.join(name)).unwrap();
        let len = Some(file.len() as u64);
        let header = Header::parse(file, len, &ReadOptions::strict()).unwrap();
        Vectors { header }
    }

    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let tensor = self.header.get(name)?;
        let start = (self.header.data_start() + tensor.begin) as usize;
        Some(&self.header.bytes()[start..start + tensor.byte_len() as usize])
    }

    pub fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let (floats, rest) = self.bytes(name)?.as_chunks();
        assert!(rest.is_empty());
        Some(
            floats
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect(),
        )
    }
}

/// Every type that becomes floats.
pub fn dequantised() -> impl Iterator<Item = GgmlType> {
    use GgmlType::{F64, I8, I16, I32, I64};
    let plain = |ty: &GgmlType| !matches!(ty, F64 | I8 | I16 | I32 | I64) && !ty.is_runtime_only();
    GgmlType::ALL.iter().copied().filter(plain)
}

/// The same bits, or NaN both.
pub fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

pub fn assert_same(ty: GgmlType, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{ty}");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            same(found, expected),
            "{ty}, element {i}: {found:e}, not {expected:e}"
        );
    }
}

/// xorshift64*: blocks of any bits, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next().to_le_bytes());
        words.take(len.div_ceil(8)).flatten().take(len).collect()
    }

    /// From -1 to 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
