//! The corpus of checkpoints that libraries wrote, as tests use it.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    reason = "the corpus is files; not every test uses all of this"
)]

#[path = "../corpus/file.rs"]
mod file;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;

use file::{File, corpus, decoded};
use serde_json::Value;
use tonnage_format::Dtype;
use tonnage_quant::Error;
use tonnage_quant::map::{Policy, QuantMap};
use tonnage_quant::recognise::Configs;
use tonnage_quant::scheme::Part;

impl File {
    pub fn tensors(&self) -> Vec<(String, Dtype)> {
        let names = self.header.iter().map(|info| info.name.to_string());
        names
            .map(|name| {
                let dtype = self.get(&name).unwrap().0;
                (name, dtype)
            })
            .collect()
    }

    pub fn parts(&self) -> Vec<Part> {
        self.tensors()
            .into_iter()
            .map(|(name, dtype)| {
                let shape = self.get(&name).unwrap().1;
                Part { name, dtype, shape }
            })
            .collect()
    }

    pub fn metadata(&self) -> BTreeMap<String, String> {
        let pairs = self.header.metadata().into_iter().flat_map(|m| m.iter());
        pairs.map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    pub fn sniff(&self, name: &str, range: Range<u64>) -> Option<Vec<u8>> {
        let (_, _, bytes) = self.get(name)?;
        bytes
            .get(range.start as usize..range.end as usize)
            .map(<[u8]>::to_vec)
    }
}

/// One checkpoint of the corpus.
pub struct Case {
    pub path: String,
    pub row: Value,
    pub model: File,
    pub expected: File,
    pub configs: Configs,
}

pub fn cases() -> Vec<Case> {
    let text = fs::read(corpus().join("cases.json")).unwrap();
    let all: Value = serde_json::from_slice(&text).unwrap();
    all["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(Case::open)
        .collect()
}

impl Case {
    fn open(row: &Value) -> Self {
        let path = row["path"].as_str().unwrap().to_owned();
        let here = corpus().join(&path);
        let model = File::open(&here.join("model.safetensors"));
        let mut configs = Configs::new(model.metadata());
        for file in Configs::FILES {
            if let Ok(text) = fs::read(here.join(file)) {
                configs.add(file, &text);
            }
        }
        Case {
            path,
            row: row.clone(),
            model,
            expected: File::open(&here.join("expected.safetensors")),
            configs,
        }
    }

    pub fn scheme(&self) -> &str {
        self.row["scheme"].as_str().unwrap()
    }

    pub fn detect(&self, policy: Policy) -> Result<QuantMap, Error> {
        let mut sniff = |name: &str, range| self.model.sniff(name, range);
        QuantMap::detect(&self.model.parts(), &self.configs, &mut sniff, policy)
    }

    /// The library's own values: dtype, shape as stored, and the values in that order.
    pub fn wanted(&self, name: &str) -> (&'static str, Vec<u64>, Vec<f32>) {
        let (dtype, mut shape, bytes) = self.expected.get(name).unwrap();
        let mut values = decoded(dtype, bytes);
        if self.scheme() == "mxfp4" && shape.len() == 3 {
            // transformers turns the last two axes of experts.
            let (rows, columns) = (shape[1] as usize, shape[2] as usize);
            let turned = values.chunks(rows * columns).flat_map(|matrix| {
                (0..columns * rows).map(move |at| matrix[at % rows * columns + at / rows])
            });
            values = turned.collect();
            shape.swap(1, 2);
        }
        (dtype.name(), shape, values)
    }
}
