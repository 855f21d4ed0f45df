//! Safetensors to GGUF: types chosen tensor by tensor, names and rows as llama.cpp has them (docs/gguf.md, chapter 11).

mod describe;
mod write;

use std::path::{Path, PathBuf};

use tonnage_foreign::gguf::names::{Change, Names};
use tonnage_foreign::gguf::{GgmlType, OwnedValue};
use tonnage_plan::matches;

use super::write::{GgufContent, GgufItem, save_gguf};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::quant::Made;
use crate::save::{Save, Saved};
use crate::tensor::TensorRef;

/// How a model becomes a GGUF file.
#[derive(Clone, Debug, Default)]
pub struct Export {
    /// The types of tensors by patterns over their names, here or there; the first that matches holds. `None` in the place of a
    /// pattern is every other matrix. Vectors are `F32` in any case.
    pub types: Vec<(String, GgmlType)>,
    /// The type of matrices that no pattern names; `None` keeps what they are.
    pub default: Option<GgmlType>,
    /// Metadata on top of what the configuration says; it wins.
    pub kv: Vec<(String, OwnedValue)>,
    /// Names as they are, and values untouched: for models whose names are not known.
    pub keep_names: bool,
}

/// What an export made.
#[derive(Clone, Debug, Default)]
pub struct Exported {
    /// The file.
    pub saved: Saved,
    /// Names there and types, in the order of the file.
    pub tensors: Vec<(String, GgmlType)>,
    /// What the file lacks that a runtime may want, and what was done in another way than asked.
    pub notes: Vec<String>,
}

/// A tensor on its way.
struct Planned<'a> {
    tensor: TensorRef<'a>,
    name: String,
    ty: GgmlType,
    change: Change,
}

/// Writes a checkpoint of plain tensors as a GGUF file. Architecture and metadata come from the `config.json` beside it, the
/// tokenizer from `tokenizer.json`; what they don't say is among the notes. Memory holds a piece of a tensor at a time.
///
/// # Errors
/// `GGUF_EXPORT` for an architecture or a tensor whose name is not known (then [`Export::keep_names`]), or a type that a tensor
/// can't have; those of reading and saving. What was there before is whole.
pub fn export(
    checkpoint: &Checkpoint,
    target: impl AsRef<Path>,
    export: &Export,
    save: &Save<'_>,
) -> Result<Exported> {
    let target: PathBuf = target.as_ref().to_owned();
    let described = describe::describe(checkpoint, export)?;
    let mut notes = described.notes;
    let planned = plan(checkpoint, export, described.names, &mut notes)?;
    let mut kv = described.kv;
    describe::file_type(&mut kv, &planned.iter().map(|p| p.ty).collect::<Vec<_>>());
    for (key, value) in &export.kv {
        kv.retain(|(known, _)| known != key);
        kv.push((key.clone(), value.clone()));
    }
    let heads = |key: &str| {
        let found = kv.iter().find(|(known, _)| known == key)?;
        match found.1 {
            OwnedValue::U32(heads) => Some(u64::from(heads)),
            _ => None,
        }
    };
    let mut made = Made::beside(&target)?;
    let mut direct = vec![false; planned.len()];
    for (one, direct) in planned.iter().zip(&mut direct) {
        crate::quant::cancelled(save)?;
        *direct = write::tensor(one, &mut made, &heads)?;
    }
    let ready = made.ready()?;
    let mut items = Vec::with_capacity(planned.len());
    for (one, direct) in planned.iter().zip(&direct) {
        let stored = match (direct, &ready.checkpoint) {
            (true, _) => one.tensor,
            (false, Some(made)) => made.tensor(&one.name)?,
            (false, None) => continue,
        };
        items.push(GgufItem {
            name: &one.name,
            ty: one.ty,
            shape: one.tensor.shape(),
            content: GgufContent::Stored(stored),
        });
    }
    let how = super::convert::gguf_save(save);
    Ok(Exported {
        saved: save_gguf(&kv, &items, &target, &how)?,
        tensors: planned.iter().map(|p| (p.name.clone(), p.ty)).collect(),
        notes,
    })
}

fn refused(tensor: &str, text: String) -> Error {
    Error::usage("GGUF_EXPORT", text).about(tensor, None)
}

fn plan<'a>(
    checkpoint: &'a Checkpoint,
    export: &Export,
    names: Option<&'static Names>,
    notes: &mut Vec<String>,
) -> Result<Vec<Planned<'a>>> {
    let mut planned = Vec::with_capacity(checkpoint.len());
    let tied = checkpoint.get("lm_head.weight").is_none();
    for tensor in checkpoint.iter() {
        let hf = tensor.name();
        if hf.ends_with("rotary_emb.inv_freq") || hf.ends_with(".masked_bias") {
            notes.push(format!(
                "{hf} is computed by every runtime, and is not written"
            ));
            continue;
        }
        let (name, change) = match names {
            None => (hf.to_owned(), Change::None),
            Some(names) => {
                let name = names.to_gguf(hf).ok_or_else(|| {
                    refused(
                        hf,
                        format!("no name is known for it in {}", names.architecture),
                    )
                })?;
                let change = names.change(&name);
                (name, change)
            }
        };
        let ty = choose(&tensor, &name, export, notes)?;
        planned.push(Planned {
            tensor,
            name,
            ty,
            change,
        });
    }
    if tied && names.is_some() {
        notes.push("no lm_head.weight: the embedding gives the next token too".to_owned());
    }
    Ok(planned)
}

/// The type of a tensor: what was asked for, or the nearest that its rows can have.
fn choose(
    tensor: &TensorRef<'_>,
    name: &str,
    export: &Export,
    notes: &mut Vec<String>,
) -> Result<GgmlType> {
    let hf = tensor.name();
    let own = match tensor.dtype()? {
        tonnage_format::Dtype::F32 => GgmlType::F32,
        tonnage_format::Dtype::F16 => GgmlType::F16,
        tonnage_format::Dtype::BF16 => GgmlType::BF16,
        other => return Err(refused(hf, format!("it is {other}, floats are exported"))),
    };
    let shape = tensor.shape();
    if shape.len() < 2 {
        return Ok(GgmlType::F32);
    }
    let rule = export.types.iter();
    let mut rule = rule.filter(|(pattern, _)| matches(pattern, name) || matches(pattern, hf));
    let asked = rule
        .next()
        .map(|(_, ty)| *ty)
        .or(export.default)
        .unwrap_or(own);
    let columns = shape.last().copied().unwrap_or(0);
    let fits = |ty: &GgmlType| columns.is_multiple_of(ty.elements() as u64);
    if fits(&asked) {
        return Ok(asked);
    }
    // What llama.cpp takes for rows that are no whole super-blocks.
    let instead = match asked {
        GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::IQ4_XS | GgmlType::TQ1_0 | GgmlType::TQ2_0 => {
            GgmlType::IQ4_NL
        }
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        _ => GgmlType::F16,
    };
    let instead = if fits(&instead) {
        instead
    } else {
        GgmlType::F16
    };
    notes.push(format!(
        "{name} is {instead}: its rows of {columns} are no whole blocks of {asked}"
    ));
    Ok(instead)
}
