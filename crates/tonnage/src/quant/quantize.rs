//! Quantising a checkpoint: tensor by tensor, into any form that [`tonnage_quant::quantize`] writes.

use std::path::{Path, PathBuf};

use tonnage_format::Dtype;
use tonnage_plan::matches;
use tonnage_quant::descriptor::{Float, Role};
use tonnage_quant::map::{Meaning, QTensor, QuantMap};
use tonnage_quant::packed::Packed;
use tonnage_quant::scheme::{Param, Part};
use tonnage_quant::target::Target;

use super::config::{self, Said};
use super::spool::{Made, Ready};
use crate::cast::cast;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::save::{Content, Item, Save, Saved, save_items};
use crate::tensor::{TensorRef, room};

/// Names that match get this target; `None` leaves them as they are. The first rule that matches holds.
pub type Rule = (String, Option<Target>);

/// What a quantised or converted checkpoint is made of.
#[derive(Clone, Debug, Default)]
pub struct Quantized {
    /// The files.
    pub saved: Saved,
    /// The configuration that was written beside them.
    pub config: Option<PathBuf>,
    /// The tensors that were made, by their logical names.
    pub tensors: Vec<String>,
    /// Tensors that a rule names and that stay as they are, with the reason.
    pub kept: Vec<(String, String)>,
}

/// The rules for one target: patterns that choose, or what libraries quantise where nobody chooses — matrices called
/// `….weight`, without embeddings, the head, routers and norms.
pub fn rules(target: &Target, select: &[String]) -> Vec<Rule> {
    if !select.is_empty() {
        let one = |pattern: &String| (pattern.clone(), Some(target.clone()));
        return select.iter().map(one).collect();
    }
    let left = [
        "*embed*",
        "*lm_head*",
        "*norm*",
        "*router*",
        "*gate.weight",
        "*wte*",
        "*wpe*",
    ];
    let left = left.iter().map(|pattern| ((*pattern).to_owned(), None));
    left.chain([("*.weight".to_owned(), Some(target.clone()))])
        .collect()
}

/// Quantises the tensors that rules name, and writes a checkpoint; the others are copied. Memory holds one tensor at a
/// time, as `f32`. What the file says of its tensors is in the metadata key `quant.map`; into a folder goes `config.json` too,
/// with what the form's library reads, if the source has one.
///
/// # Errors
/// A tensor that can't have the form; those of reading and saving. What was there before is whole.
pub fn quantize(
    checkpoint: &Checkpoint,
    rules: &[Rule],
    target: impl AsRef<Path>,
    save: &Save<'_>,
) -> Result<Quantized> {
    let target = target.as_ref();
    let mut made = Made::beside(target)?;
    let mut result = Quantized::default();
    let mut map = QuantMap::default();
    let mut plain = Vec::new();
    let mut last = None;
    for tensor in checkpoint.iter() {
        super::cancelled(save)?;
        let rule = rules
            .iter()
            .find(|(pattern, _)| matches(pattern, tensor.name()));
        let Some((pattern, Some(to))) = rule else {
            plain.push(tensor);
            continue;
        };
        if let Some(why) = unfit(&tensor) {
            // A pattern that takes what there is says nothing about tensors that it can't mean.
            if !crate::names::is_pattern(pattern) {
                return Err(super::failed(tensor.name(), why));
            }
            result.kept.push((tensor.name().to_owned(), why));
            plain.push(tensor);
            continue;
        }
        let values = values(&tensor)?;
        let dtype = float(tensor.dtype()?);
        let packed =
            tonnage_quant::quantize::quantize(tensor.name(), &values, tensor.shape(), dtype, to)
                .map_err(super::raised)?;
        add(&mut made, &mut map, packed)?;
        result.tensors.push(tensor.name().to_owned());
        last = Some(to);
    }
    if result.tensors.is_empty() {
        return Err(Error::usage(
            "QUANT_NOTHING",
            "no tensor was chosen that can be quantised",
        ));
    }
    let last = last.ok_or_else(|| Error::usage("QUANT_NOTHING", "no tensor was chosen"))?;
    finish(
        checkpoint,
        &plain,
        made.ready()?,
        map,
        last,
        target,
        save,
        result,
    )
}

/// Writes what was made and what is copied, and the configuration.
#[allow(clippy::too_many_arguments, reason = "all of it is one step's")]
pub(super) fn finish(
    checkpoint: &Checkpoint,
    plain: &[TensorRef<'_>],
    made: Ready,
    map: QuantMap,
    to: &Target,
    target: &Path,
    save: &Save<'_>,
    mut result: Quantized,
) -> Result<Quantized> {
    let mut items = plain.iter().map(item).collect::<Result<Vec<_>>>()?;
    if let Some(made) = &made.checkpoint {
        items.extend(
            made.iter()
                .map(|tensor| item(&tensor))
                .collect::<Result<Vec<_>>>()?,
        );
    }
    let mut metadata = checkpoint.metadata().clone();
    // Another scheme's own words would be wrong now.
    metadata.retain(|key, _| !FOREIGN.contains(&key.as_str()));
    let rows = plain.iter().map(part).collect::<Result<Vec<_>>>()?;
    let text = map.to_json(&rows).map_err(super::raised)?;
    metadata.insert("quant.map".to_owned(), text);
    if config::is_mlx(to) {
        metadata.insert("format".to_owned(), "mlx".to_owned());
    }
    metadata.extend(save.metadata.iter().cloned());
    let save = Save {
        metadata: metadata.into_iter().collect(),
        ..save.clone()
    };
    result.saved = save_items(&items, target, &save)?;
    if target.is_dir()
        && let Some(config) = config::read(checkpoint.root())?
    {
        let said = said(&map, plain);
        let said = said.and_then(|said| config::quantization_config(to, &said));
        result.config = Some(config::write(target, config, said, config::is_mlx(to))?);
    }
    Ok(result)
}

/// Metadata that describes tensors which are others now.
const FOREIGN: &[&str] = &[
    "quant.map",
    "tensor_names",
    "_quantization_metadata",
    "gguf.lengths",
];

fn item<'a>(tensor: &TensorRef<'a>) -> Result<Item<'a>> {
    Ok(Item {
        name: tensor.name(),
        dtype: tensor.dtype()?,
        shape: tensor.shape(),
        content: Content::Stored(*tensor),
    })
}

fn part(tensor: &TensorRef<'_>) -> Result<Part> {
    Ok(Part {
        name: tensor.name().to_owned(),
        dtype: tensor.dtype()?,
        shape: tensor.shape().to_vec(),
    })
}

/// What holds of all tensors, by the first of them.
fn said(map: &QuantMap, plain: &[TensorRef<'_>]) -> Option<Said> {
    let first = map.tensors().next()?;
    let Meaning::Preset(scheme, params) = &first.meaning else {
        return None;
    };
    let columns = first.shape.last().copied().unwrap_or(0) as i64;
    let number = |name: &str| match params.0.get(name) {
        Some(Param::Int(value)) => Some(*value),
        _ => None,
    };
    let group = match scheme.name {
        name if name.starts_with("mx") && name != "mlx-affine" => 32,
        name if name.starts_with("nv") => 16,
        _ => number("group").filter(|group| *group > 0).unwrap_or(-1),
    };
    let one_group = group == columns && map.tensors().all(|tensor| groups(tensor) == Some(1));
    let bits = number("bits").unwrap_or(match scheme.name {
        name if name.contains("fp4") || name.starts_with("awq") || name == "marlin" => 4,
        "mxfp6" => 6,
        _ => 8,
    });
    let module = |tensor: &TensorRef<'_>| {
        let module = tensor.name().strip_suffix(".weight")?;
        // Embeddings are no linear layers, which alone are meant by what is said.
        let linear = tensor.shape().len() >= 2 && !module.contains("embed");
        linear.then(|| module.to_owned())
    };
    Some(Said {
        bits,
        group: if one_group { -1 } else { group },
        symmetric: map.tensors().all(symmetric),
        dtype: first.dtype,
        ignore: plain.iter().filter_map(module).collect(),
    })
}

fn groups(tensor: &QTensor) -> Option<u64> {
    let scales = tensor.parts.get(&Role::Scale)?;
    let rows = tensor.shape.iter().rev().skip(1).product::<u64>();
    scales.shape.iter().product::<u64>().checked_div(rows)
}

/// Whether a form that leaves zero points out where they say nothing did so. GPTQ and AWQ have them in any case.
fn symmetric(tensor: &QTensor) -> bool {
    !tensor.parts.contains_key(&Role::Zero)
        || tensor
            .evidence
            .iter()
            .any(|e| e.field == "symmetric" && e.value == "true")
}

/// Adds the parts of a tensor.
pub(super) fn add(made: &mut Made, map: &mut QuantMap, packed: Packed) -> Result<()> {
    for (role, part) in &packed.tensor.parts {
        let Part { name, dtype, shape } = part;
        let bytes = packed.bytes.get(role).map_or(&[][..], |bytes| bytes);
        made.add(name, *dtype, shape, bytes)?;
    }
    map.insert(packed.tensor).map_err(super::raised)
}

fn unfit(tensor: &TensorRef<'_>) -> Option<String> {
    let dtype = tensor.dtype().ok()?;
    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
        return Some(format!(
            "it is {dtype}, floats of 16 or 32 bits are quantised"
        ));
    }
    let shape = tensor.shape();
    if shape.len() < 2 || shape.contains(&0) {
        return Some(format!("its shape is {shape:?}, matrices are quantised"));
    }
    None
}

/// A tensor's values.
fn values(tensor: &TensorRef<'_>) -> Result<Vec<f32>> {
    let bytes = tensor.read()?;
    to_f32(tensor.dtype()?, &bytes).map_err(|e| e.about(tensor.name(), None))
}

/// Floats as `f32`.
pub(crate) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    let len = crate::cast::cast_len(dtype, bytes.len() as u64, Dtype::F32)?;
    let mut wide = room(len)?;
    cast(dtype, bytes, Dtype::F32, &mut wide)?;
    let fours = wide.as_chunks::<4>().0.iter();
    Ok(fours.map(|four| f32::from_le_bytes(*four)).collect())
}

/// The dtype that values have once they are read again.
pub(super) fn float(dtype: Dtype) -> Float {
    match dtype {
        Dtype::F16 => Float::F16,
        Dtype::BF16 => Float::Bf16,
        _ => Float::F32,
    }
}
