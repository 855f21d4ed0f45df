//! `convert`: a copy in another container, or plain tensors as a GGUF file with types of choice.

use tonnage::Checkpoint;
use tonnage::gguf::{Export, GgmlType, OwnedValue, convert, export};
use tonnage::quant::{self, Difference, Policy};

use crate::args::{Common, Convert};
use crate::exit::Failure;
use crate::terminal::Out;

use super::write::Copying;

/// Runs the verb.
pub fn run(args: &Convert, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let max_size = args.max_size.as_deref().map(super::size).transpose()?;
    let how = exported(args)?;
    let checkpoint = super::open(&args.target.input, common)?;
    let copying = Copying::to(&args.target, max_size);
    let tensors = checkpoint.len() as u64;
    if let Some(to) = &args.to {
        return repacked(
            args,
            &quant::target(to)?,
            &checkpoint,
            &copying,
            common,
            out,
        );
    }
    let Some(how) = how else {
        return copying.with(tensors, common, out, |save| {
            convert(&checkpoint, &args.target.output, save)
        });
    };
    copying.with_notes(tensors, common, out, |save| {
        let made = export(&checkpoint, &args.target.output, &how, save)?;
        Ok((made.saved, made.notes))
    })
}

/// Quantised tensors in another scheme.
fn repacked(
    args: &Convert,
    to: &quant::Target,
    checkpoint: &Checkpoint,
    copying: &Copying<'_>,
    common: &Common,
    out: &mut Out,
) -> Result<u8, Failure> {
    let map = match &args.from {
        Some(json) => checkpoint.described(json)?,
        None => checkpoint.quantization(Policy::Strict)?,
    };
    let tensors = checkpoint.len() as u64;
    copying.with_notes(tensors, common, out, |save| {
        let made = quant::repack(checkpoint, &map, to, args.lossy, &args.target.output, save)?;
        let kept = made.written.kept.iter();
        let mut notes: Vec<String> = kept.map(|(name, why)| format!("{name}: {why}")).collect();
        for (name, report) in &made.reports {
            let Difference {
                elements,
                changed,
                largest,
            } = report.difference;
            if changed > 0 {
                let how = report.how.name();
                notes.push(format!(
                    "{name} is {how}: {changed} of {elements} values changed, by up to {largest}"
                ));
            }
            notes.extend(report.notes.iter().map(|note| format!("{name}: {note}")));
        }
        Ok((made.written.saved, notes))
    })
}

/// What the options ask of an export; nothing where they don't.
fn exported(args: &Convert) -> Result<Option<Export>, Failure> {
    if args.types.is_empty() {
        return Ok(None);
    }
    if args
        .target
        .output
        .extension()
        .is_none_or(|e| !e.eq_ignore_ascii_case("gguf"))
    {
        let text = "--type is of GGUF files: OUTPUT must end in .gguf";
        return Err(Failure::Usage(text.to_owned()));
    }
    let mut how = Export {
        keep_names: args.keep_names,
        ..Export::default()
    };
    for rule in &args.types {
        let (pattern, name) = rule.rsplit_once('=').unwrap_or(("", rule));
        let ty = ggml_type(name)?;
        match pattern {
            "" => how.default = Some(ty),
            _ => how.types.push((pattern.to_owned(), ty)),
        }
    }
    for pair in &args.kv {
        let none = || Failure::Usage(format!("--kv {pair:?}: KEY=VALUE is needed"));
        let (key, value) = pair.split_once('=').ok_or_else(none)?;
        how.kv.push((key.to_owned(), value_of(value)));
    }
    Ok(Some(how))
}

/// A type of ggml's that tensors can be made into.
pub(super) fn ggml_type(name: &str) -> Result<GgmlType, Failure> {
    let none = || {
        Failure::Usage(format!(
            "{name:?} is no type of ggml, such as q4_k, q8_0, f16"
        ))
    };
    GgmlType::from_name(name).ok_or_else(none)
}

fn value_of(text: &str) -> OwnedValue {
    match (text.parse::<u32>(), text.parse::<f32>(), text) {
        (Ok(whole), ..) => OwnedValue::U32(whole),
        (_, Ok(number), _) if text.contains(|c: char| c.is_ascii_digit()) => {
            OwnedValue::F32(number)
        }
        (.., "true" | "false") => OwnedValue::Bool(text == "true"),
        _ => OwnedValue::String(text.as_bytes().to_vec()),
    }
}
