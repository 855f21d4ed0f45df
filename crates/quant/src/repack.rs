//! From one scheme to another.
//!
//! What both schemes can say goes over as it is: codes, scales and zero points keep their bits, and only their places
//! change. Where the other scheme says it in another way (biases for zero points, a scale divided by instead of multiplied)
//! all values are compared, and a value that changes is a loss. A loss is refused, with what is lost and how often, unless
//! it was asked for; then it is counted.

use crate::error::{Error, Reason};
use crate::loose::Loose;
use crate::map::Meaning;
use crate::nested;
use crate::pack::{Kept, Notes, pack};
use crate::packed::{Difference, Packed};
use crate::quantize::quantize;
use crate::target::{Target, To};

/// What a conversion did.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// How far the bits were kept.
    pub how: How,
    /// What of the values is another now.
    pub difference: Difference,
    /// What was written although readers differ, or what was given up.
    pub notes: Vec<String>,
}

/// How far bits were kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Codes, scales and zero points are the same: the way back gives the same bytes.
    Rearranged,
    /// Values are the same, said in another way.
    SameValues,
    /// Codes were kept, and some values changed.
    Changed,
    /// Values were rounded to new codes.
    Requantised,
}

impl How {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            How::Rearranged => "rearranged",
            How::SameValues => "same values",
            How::Changed => "changed",
            How::Requantised => "requantised",
        }
    }
}

/// Makes a tensor into a target. Where that would lose something it is refused, unless `lossy` says otherwise.
///
/// # Errors
/// [`Reason::Lossy`] with what would be lost and how often; the parts don't fit their scheme; the target has no such
/// shape or option.
pub fn repack(packed: &Packed, target: &Target, lossy: bool) -> Result<(Packed, Report), Error> {
    let name = packed.tensor.name.clone();
    match kept(packed, target, lossy) {
        Ok(done) => Ok(done),
        Err(error) if lossy && matches!(error.reason, Reason::Lossy | Reason::Unsupported) => {
            let made = rounded(packed, target)?;
            let difference = packed.difference(&made)?;
            let report = Report {
                how: How::Requantised,
                difference,
                notes: vec![error.text],
            };
            Ok((made, report))
        }
        Err(error) if error.reason == Reason::Lossy => Err(Error {
            text: format!(
                "{} can't become {} without a loss: {}",
                packed.tensor.preset(),
                target.name(),
                error.text
            ),
            ..error
        }
        .of(&name)),
        Err(error) => Err(error.of(&name)),
    }
}

fn kept(packed: &Packed, target: &Target, lossy: bool) -> Result<(Packed, Report), Error> {
    let mut notes = Notes::new();
    let (made, kept) = match (&packed.tensor.meaning, target.to) {
        (Meaning::Preset(scheme, _), To::Form(form))
            if scheme.name == "bnb4" && form.name == "bnb4" =>
        {
            match packed
                .bytes
                .contains_key(&crate::descriptor::Role::NestedScale)
            {
                true => (nested::flatten(packed)?, Kept::Values),
                false => (packed.clone(), Kept::Codes),
            }
        }
        (Meaning::Ggml(have), To::Ggml(want)) if *have == want => (packed.clone(), Kept::Codes),
        _ => {
            wrapped(packed, lossy, &mut notes)?;
            let loose = Loose::of(packed)?;
            pack(&packed.tensor.name, &loose, target, lossy, &mut notes)?
        }
    };
    let elements = packed.tensor.shape.iter().product();
    let mut report = Report {
        how: How::Rearranged,
        difference: Difference {
            elements,
            ..Difference::default()
        },
        notes,
    };
    if kept == Kept::Values {
        report.difference = packed.difference(&made)?;
        report.how = match report.difference.changed {
            0 => How::SameValues,
            changed if !lossy => {
                let text = format!(
                    "{changed} of {elements} values change, by up to {}",
                    report.difference.largest
                );
                return Err(Error::new(Reason::Lossy, text));
            }
            _ => How::Changed,
        };
    }
    Ok((made, report))
}

/// Zero points of GPTQ's version 1 that have several readings: the largest code, where nobody said how it wraps.
fn wrapped(packed: &Packed, lossy: bool, notes: &mut Notes) -> Result<(), Error> {
    let Meaning::Preset(scheme, params) = &packed.tensor.meaning else {
        return Ok(());
    };
    if scheme.name != "gptq" || params.text("zero_wrap")?.is_some() {
        return Ok(());
    }
    let meaning = packed.tensor.describe()?;
    let Some(crate::descriptor::Zero::Field(field)) = &meaning.zero else {
        return Ok(());
    };
    let shape = field.layout.shape.clone();
    let codes = crate::interpret::field_codes(field, &shape, &packed.view())?;
    let count = codes.iter().filter(|code| **code == 0).count();
    if count == 0 {
        return Ok(());
    }
    let text = format!(
        "{count} of {} stored zero points are all ones, which readers of GPTQ's version 1 read in different ways",
        codes.len()
    );
    if lossy {
        notes.push(text);
        return Ok(());
    }
    Err(Error::new(Reason::Lossy, text))
}

/// New codes for the values.
fn rounded(packed: &Packed, target: &Target) -> Result<Packed, Error> {
    let values = packed.all_values()?;
    quantize(
        &packed.tensor.name,
        &values,
        &packed.tensor.shape,
        packed.tensor.dtype,
        target,
    )
}
