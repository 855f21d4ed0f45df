//! `cast`: a copy with floats of another dtype.

use tonnage::cast::castable;
use tonnage::format::{Dtype, Kind};

use crate::args::{Cast, Common};
use crate::exit::Failure;
use crate::glob::Selection;
use crate::terminal::Out;

use super::write::Copying;

/// Runs the verb.
pub fn run(args: &Cast, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let to = dtype(&args.to)?;
    let max_size = args.max_size.as_deref().map(super::size).transpose()?;
    let checkpoint = super::open(&args.target.input, common)?;
    let selection = Selection::new(&args.select);
    if !args.select.is_empty() && !checkpoint.names().any(|name| selection.has(name)) {
        return Err(selection.nothing(checkpoint.names()));
    }
    let change = |tensor: &tonnage::TensorRef<'_>| -> Result<Dtype, Failure> {
        let from = tensor.dtype()?;
        let cast = selection.has(tensor.name()) && castable(from, to);
        Ok(if cast { to } else { from })
    };
    let copying = Copying::to(&args.target, max_size);
    copying.run(
        &checkpoint,
        |tensor| Ok((tensor.name(), change(tensor)?)),
        common,
        out,
    )
}

/// A dtype by its name in the format, in torch or in NumPy, in any case.
fn dtype(text: &str) -> Result<Dtype, Failure> {
    let is = |name: &str| name.eq_ignore_ascii_case(text);
    let found = Dtype::ALL.iter().map(|dtype| dtype.row()).find(|row| {
        let names = [Some(row.name), row.torch, row.numpy, row.ml_dtypes];
        names.into_iter().flatten().any(is)
    });
    match found {
        Some(row) if row.kind == Kind::Float && castable(Dtype::F32, row.dtype) => Ok(row.dtype),
        Some(row) => Err(Failure::Usage(format!(
            "cannot cast to {}; {}",
            row.name,
            choices()
        ))),
        None => Err(Failure::Usage(format!(
            "{text:?} is no dtype; {}",
            choices()
        ))),
    }
}

fn choices() -> String {
    let names = Dtype::ALL
        .iter()
        .filter(|&&to| castable(Dtype::F32, to))
        .map(|to| to.name());
    format!("choose one of {}", names.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_have_many_names() {
        for (name, expected) in [
            ("bf16", Dtype::BF16),
            ("bfloat16", Dtype::BF16),
            ("float8_e4m3fn", Dtype::F8_E4M3),
            ("F64", Dtype::F64),
        ] {
            assert_eq!(dtype(name).unwrap(), expected);
        }
        for bad in ["I32", "F4", "C64", "int", ""] {
            let Err(Failure::Usage(text)) = dtype(bad) else {
                panic!("{bad}")
            };
            assert!(text.contains("BF16"), "{text}");
        }
    }
}
