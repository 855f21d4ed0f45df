//! What a checkpoint says of its quantised tensors: in its metadata, in the files beside it, in its names, shapes and
//! values.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use tonnage_quant::map::{Confidence, Evidence, Policy, Provenance, QTensor, QuantMap};
use tonnage_quant::recognise::{Configs, MAX_CONFIG};
use tonnage_quant::scheme::Part;

use super::raised;
use crate::checkpoint::Checkpoint;
use crate::error::Result;

impl Checkpoint {
    /// What the quantised tensors of this checkpoint mean, each field with its evidence: from `quant.map`, from what a library
    /// wrote into the files, from the configuration beside them, and from names, dtypes, shapes and a few values. A GGUF file
    /// says it all itself. What is not recognised is a plain tensor.
    ///
    /// Values are looked at in reads of at most 4 KiB; nothing else of the data is read.
    ///
    /// # Errors
    /// Under [`Policy::Strict`]: `AMBIGUOUS` for a tensor with several readings, which are named; `QUANT_SIZE` and the like
    /// for one that looks like a scheme's and does not fit it. Otherwise only a GGUF file's rows that are not whole blocks.
    pub fn quantization(&self, policy: Policy) -> Result<QuantMap> {
        if self.gguf().is_some() {
            return self.blocks();
        }
        let mut configs = Configs::new(self.metadata().clone());
        if let Some(root) = self.root() {
            for name in Configs::FILES {
                if let Some(text) = beside(root, name) {
                    configs.add(name, &text);
                }
            }
        }
        let rows: Vec<Part> = self.tensors().filter_map(|tensor| part(&tensor)).collect();
        let mut sniff = |name: &str, range: Range<u64>| {
            let mut bytes = vec![0; usize::try_from(range.end.checked_sub(range.start)?).ok()?];
            let tensor = self.get(name)?;
            tensor.read_at(range.start, &mut bytes).ok()?;
            Some(bytes)
        };
        QuantMap::detect(&rows, &configs, &mut sniff, policy).map_err(raised)
    }

    /// The value of the metadata key `quant.map` that says what a map says of this checkpoint's tensors.
    ///
    /// # Errors
    /// `QUANT_SIZE` where finding patterns for the names takes too long.
    pub fn quant_map(&self, map: &QuantMap) -> Result<String> {
        let rows: Vec<Part> = self.tensors().filter_map(|tensor| part(&tensor)).collect();
        map.to_json(&rows).map_err(raised)
    }

    /// The blocks of a GGUF file, which names the type of each tensor.
    fn blocks(&self) -> Result<QuantMap> {
        let mut map = QuantMap::default();
        let files = self.gguf();
        for (_, tensor) in files.iter().flat_map(|files| files.tensors()) {
            let Some(row) = self.get(tensor.name).filter(|_| !tensor.ty.is_plain()) else {
                continue;
            };
            let Some(part) = part(&row) else { continue };
            let mut made = QTensor::ggml_of(tensor.name, tensor.ty, part).map_err(raised)?;
            let own = Provenance::Own("GGUF".to_owned());
            let evidence = Evidence::new("scheme", made.preset(), own, Confidence::Certain);
            made.evidence.push(evidence);
            map.insert(made).map_err(raised)?;
        }
        Ok(map)
    }
}

/// A tensor as recognition sees it; one of a dtype that is not known means nothing to it.
fn part(tensor: &crate::TensorRef<'_>) -> Option<Part> {
    Some(Part {
        name: tensor.name().to_owned(),
        dtype: tensor.dtype().ok()?,
        shape: tensor.shape().to_vec(),
    })
}

/// A configuration beside the checkpoint, if it is there and of a size that such files have. One byte more than that is read,
/// so that recognition says that the file is too long.
fn beside(root: &Path, name: &str) -> Option<Vec<u8>> {
    let file = std::fs::File::open(root.join(name)).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(MAX_CONFIG as u64 + 1)
        .read_to_end(&mut text)
        .ok()?;
    Some(text)
}
