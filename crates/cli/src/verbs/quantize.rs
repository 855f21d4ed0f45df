//! `quantize`: a copy whose weights are rounded to nearest codes.

use tonnage::gguf::{Export, export};
use tonnage::quant;

use crate::args::{Common, Quantize};
use crate::exit::Failure;
use crate::glob::Selection;
use crate::terminal::Out;

use super::write::Copying;

/// Runs the verb.
pub fn run(args: &Quantize, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let max_size = args.max_size.as_deref().map(super::size).transpose()?;
    let output = &args.target.output;
    let to_gguf = output
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    // What can't be meant is said before anything is opened.
    let scheme = if to_gguf {
        None
    } else {
        Some(quant::target(&args.scheme)?)
    };
    let ty = if to_gguf {
        Some(super::convert::ggml_type(&args.scheme)?)
    } else {
        None
    };
    let checkpoint = super::open(&args.target.input, common)?;
    let selection = Selection::new(&args.select);
    if !args.select.is_empty() && !checkpoint.names().any(|name| selection.has(name)) {
        return Err(selection.nothing(checkpoint.names()));
    }
    let copying = Copying::to(&args.target, max_size);
    let tensors = checkpoint.len() as u64;
    copying.with_notes(tensors, common, out, |save| {
        if let Some(target) = &scheme {
            let rules = quant::rules(target, &args.select);
            let made = quant::quantize(&checkpoint, &rules, output, save)?;
            let kept = made.kept.iter();
            let kept = kept.map(|(name, why)| format!("{name} stays as it is: {why}"));
            return Ok((made.saved, kept.collect()));
        }
        let mut how = Export::default();
        match args.select.as_slice() {
            [] => how.default = ty,
            select => {
                let rules = select.iter().filter_map(|glob| Some((glob.clone(), ty?)));
                how.types = rules.collect();
            }
        }
        let made = export(&checkpoint, output, &how, save)?;
        Ok((made.saved, made.notes))
    })
}
