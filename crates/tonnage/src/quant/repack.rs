//! Converting a quantised checkpoint to another scheme, tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use tonnage_quant::map::{Meaning, QTensor, QuantMap};
use tonnage_quant::packed::Packed;
use tonnage_quant::repack::Report;
use tonnage_quant::target::Target;

use super::quantize::{Quantized, add, finish};
use super::spool::Made;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::save::Save;

/// What a conversion made of a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Repacked {
    /// What was written.
    pub written: Quantized,
    /// What each tensor's conversion did.
    pub reports: Vec<(String, Report)>,
}

/// A quantised tensor of a checkpoint, read.
///
/// # Errors
/// A part is not there, or is another than the map says.
pub fn read(checkpoint: &Checkpoint, tensor: &QTensor) -> Result<Packed> {
    let mut bytes = BTreeMap::new();
    for (role, part) in &tensor.parts {
        let found = checkpoint.tensor(&part.name)?;
        bytes.insert(*role, found.read()?);
    }
    Packed::new(tensor.clone(), bytes).map_err(super::raised)
}

/// Converts every quantised tensor of a checkpoint to a target; plain tensors are copied, and quantised ones of families that
/// are carried as they are stay so. Where something would be lost it is refused, unless `lossy` says otherwise.
///
/// # Errors
/// `QUANT_LOSSY` with the tensor, what would be lost and how often; those of reading and saving. What was there before is
/// whole.
pub fn repack(
    checkpoint: &Checkpoint,
    map: &QuantMap,
    to: &Target,
    lossy: bool,
    target: impl AsRef<Path>,
    save: &Save<'_>,
) -> Result<Repacked> {
    let target = target.as_ref();
    if map.is_empty() {
        let text = "no quantised tensor was recognised in this checkpoint";
        return Err(Error::usage("QUANT_NOTHING", text));
    }
    let mut made = Made::beside(target)?;
    let (mut result, mut new) = (Repacked::default(), QuantMap::default());
    let mut kept: Vec<&str> = Vec::new();
    for tensor in map.tensors() {
        super::cancelled(save)?;
        if let Meaning::Opaque(family) = &tensor.meaning {
            let why = format!("opaque/{family} is carried as it is");
            result.written.kept.push((tensor.name.clone(), why));
            kept.extend(tensor.parts.values().map(|part| part.name.as_str()));
            new.insert(tensor.clone()).map_err(super::raised)?;
            continue;
        }
        let packed = read(checkpoint, tensor)?;
        let (packed, report) =
            tonnage_quant::repack::repack(&packed, to, lossy).map_err(super::raised)?;
        result.reports.push((tensor.name.clone(), report));
        result.written.tensors.push(tensor.name.clone());
        add(&mut made, &mut new, packed)?;
    }
    let stays = |name: &str| map.owner(name).is_none() || kept.contains(&name);
    let plain: Vec<_> = checkpoint
        .iter()
        .filter(|tensor| stays(tensor.name()))
        .collect();
    let written = std::mem::take(&mut result.written);
    result.written = finish(
        checkpoint,
        &plain,
        made.ready()?,
        new,
        to,
        target,
        save,
        written,
    )?;
    Ok(result)
}
