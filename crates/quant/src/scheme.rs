//! The table of schemes: one row each, in the file named after it under `schemes/`.
//!
//! A row says what the scheme is called (`gptq@1`), which parts a tensor of it has and under which suffixes, which
//! parameters it takes, and how dtypes and shapes of the parts and those parameters expand to a [`Descriptor`]. A row
//! never changes its meaning: what changes is a new version.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tonnage_format::Dtype;

use crate::descriptor::{Descriptor, Float, Number, Role};
use crate::error::{Error, Reason};

/// One part of a quantised tensor: a tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
}

/// The parts of a quantised tensor.
pub type Parts = BTreeMap<Role, Part>;

/// A parameter of a scheme.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Param {
    /// Yes or no.
    Flag(bool),
    /// A number.
    Int(i64),
    /// A word.
    Text(String),
    /// Several numbers, such as a shape.
    List(Vec<i64>),
}

/// The parameters of a scheme, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Params(pub BTreeMap<String, Param>);

/// What a part is called: the module's name and this.
#[derive(Clone, Copy, Debug)]
pub struct PartRow {
    /// What it is for.
    pub role: Role,
    /// What follows the module's name, the usual one first.
    pub suffixes: &'static [&'static str],
    /// Whether a tensor without it is refused.
    pub required: bool,
}

/// One row of the table.
#[derive(Clone, Copy)]
pub struct Scheme {
    /// Its name, without the version.
    pub name: &'static str,
    /// The version, from 1.
    pub version: u32,
    /// What it is, in a few words.
    pub title: &'static str,
    /// The parts.
    pub parts: &'static [PartRow],
    /// The names of its parameters.
    pub params: &'static [&'static str],
    /// The meaning of a tensor with these parameters and parts.
    pub expand: fn(&Params, &Parts) -> Result<Descriptor, Error>,
}

impl Scheme {
    /// Every row, by name.
    pub fn all() -> impl Iterator<Item = &'static Scheme> {
        crate::schemes::TABLE.iter().copied()
    }

    /// The row called `name@version`, or the newest version of `name`.
    pub fn find(preset: &str) -> Option<&'static Scheme> {
        let (name, version) = match preset.split_once('@') {
            Some((name, version)) => (name, Some(version.parse::<u32>().ok()?)),
            None => (preset, None),
        };
        Scheme::all()
            .filter(|row| row.name == name && version.is_none_or(|v| v == row.version))
            .max_by_key(|row| row.version)
    }

    /// `name@version`.
    pub fn preset(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }

    /// The meaning of a tensor: parameters and parts are checked, and so is every address.
    ///
    /// # Errors
    /// A part is missing, a size or a dtype does not fit, a parameter is unknown or has no such value.
    pub fn describe(&self, params: &Params, parts: &Parts) -> Result<Descriptor, Error> {
        for name in params.0.keys() {
            if !self.params.contains(&name.as_str()) {
                return Err(Error::new(
                    Reason::Parameter,
                    format!("{} knows no parameter {name:?}", self.preset()),
                ));
            }
        }
        for row in self.parts.iter().filter(|row| row.required) {
            part(parts, row.role)?;
        }
        let meaning = (self.expand)(params, parts)?;
        let mut fields = vec![(meaning.codes.0, &meaning.codes.1)];
        let scales = meaning.scales.iter();
        fields.extend(scales.clone().map(|s| (s.field.role, &s.field.layout)));
        fields.extend(scales.filter_map(|s| s.times.as_ref().map(|f| (f.role, &f.layout))));
        if let Some(crate::descriptor::Zero::Field(zero)) = &meaning.zero {
            fields.push((zero.role, &zero.layout));
        }
        for (role, layout) in fields {
            let there = part(parts, role)?;
            layout.check(bits_of(there)?).map_err(|error| Error {
                reason: Reason::Size,
                text: format!("{:?} {:?}: {}", there.name, there.shape, error.text),
                ..error
            })?;
        }
        Ok(meaning)
    }
}

impl std::fmt::Debug for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.preset())
    }
}

impl Params {
    /// Parameters from pairs.
    pub fn of<const N: usize>(pairs: [(&str, Param); N]) -> Self {
        Params(pairs.map(|(name, value)| (name.to_owned(), value)).into())
    }

    /// A number, if it is given.
    ///
    /// # Errors
    /// It is something else.
    pub fn int(&self, name: &str) -> Result<Option<i64>, Error> {
        match self.0.get(name) {
            None => Ok(None),
            Some(Param::Int(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong(name, other)),
        }
    }

    /// A number among those allowed.
    ///
    /// # Errors
    /// It is missing or another.
    pub fn one_of(&self, name: &str, allowed: &[i64]) -> Result<i64, Error> {
        match self.int(name)? {
            Some(value) if allowed.contains(&value) => Ok(value),
            found => Err(Error::new(
                Reason::Parameter,
                format!("parameter {name:?} is {found:?}, one of {allowed:?} is needed"),
            )),
        }
    }

    /// A word, if it is given.
    ///
    /// # Errors
    /// It is something else.
    pub fn text(&self, name: &str) -> Result<Option<&str>, Error> {
        match self.0.get(name) {
            None => Ok(None),
            Some(Param::Text(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(name, other)),
        }
    }

    /// A list of sizes, if it is given.
    ///
    /// # Errors
    /// It is something else, or has a negative number.
    pub fn sizes(&self, name: &str) -> Result<Option<Vec<u64>>, Error> {
        match self.0.get(name) {
            None => Ok(None),
            Some(Param::List(values)) => values
                .iter()
                .map(|&value| u64::try_from(value).ok())
                .collect::<Option<_>>()
                .map(Some)
                .ok_or_else(|| Error::new(Reason::Parameter, format!("{name:?}: {values:?}"))),
            Some(other) => Err(wrong(name, other)),
        }
    }

    /// The dtype of the values, if it is given as `"dtype"`.
    ///
    /// # Errors
    /// It is none that values can have.
    pub fn dtype(&self) -> Result<Option<Float>, Error> {
        match self.text("dtype")? {
            None => Ok(None),
            Some("F32") => Ok(Some(Float::F32)),
            Some("F16") => Ok(Some(Float::F16)),
            Some("BF16") => Ok(Some(Float::Bf16)),
            Some(other) => Err(Error::new(
                Reason::Parameter,
                format!("dtype {other:?}, F32, F16 or BF16 is needed"),
            )),
        }
    }
}

fn wrong(name: &str, found: &Param) -> Error {
    Error::new(
        Reason::Parameter,
        format!("parameter {name:?} can't be {found:?}"),
    )
}

/// The part with a role.
pub(crate) fn part(parts: &Parts, role: Role) -> Result<&Part, Error> {
    parts
        .get(&role)
        .ok_or_else(|| Error::new(Reason::Missing, format!("the part {role:?} is missing")))
}

/// A part of one of these dtypes with so many axes, and its shape.
pub(crate) fn typed<'a, const N: usize>(
    parts: &'a Parts,
    role: Role,
    dtypes: &[Dtype],
) -> Result<(&'a Part, [u64; N]), Error> {
    let part = part(parts, role)?;
    match <[u64; N]>::try_from(&part.shape[..]) {
        Ok(shape) if dtypes.contains(&part.dtype) => Ok((part, shape)),
        _ => Err(Error::new(
            Reason::Size,
            format!(
                "{:?} is {} {:?}, {dtypes:?} with {N} axes is needed",
                part.name, part.dtype, part.shape
            ),
        )),
    }
}

/// Elements of a part, by its shape.
pub(crate) fn count(part: &Part) -> Result<u64, Error> {
    part.shape
        .iter()
        .try_fold(1_u64, |n, &len| n.checked_mul(len))
        .ok_or_else(|| Error::new(Reason::Size, format!("{:?} {:?}", part.name, part.shape)))
}

/// Bits of a part, by its shape.
pub(crate) fn bits_of(part: &Part) -> Result<u64, Error> {
    count(part)?
        .checked_mul(part.dtype.bitsize() as u64)
        .ok_or_else(|| Error::new(Reason::Size, format!("{:?} {:?}", part.name, part.shape)))
}

/// How the elements of a dtype are read as numbers.
pub(crate) fn number(part: &Part) -> Result<Number, Error> {
    Ok(match part.dtype {
        Dtype::F32 => Number::F32,
        Dtype::F16 => Number::F16,
        Dtype::BF16 => Number::Bf16,
        Dtype::F8_E8M0 => Number::E8m0,
        Dtype::F8_E4M3 => Number::E4m3,
        Dtype::F8_E4M3FNUZ => Number::E4m3Fnuz,
        Dtype::F8_E5M2 => Number::E5m2,
        Dtype::F8_E5M2FNUZ => Number::E5m2Fnuz,
        Dtype::F4 => Number::E2m1,
        Dtype::U8 => Number::Unsigned { offset: 0 },
        Dtype::I8 | Dtype::I32 => Number::Signed,
        other => {
            return Err(Error::new(
                Reason::Size,
                format!("{:?} is {other}, which is no number of a scheme", part.name),
            ));
        }
    })
}

/// The dtype of values for which nobody says one: that of the scales, where values can have it.
pub(crate) fn dtype_of(params: &Params, scale: &Part) -> Result<Float, Error> {
    Ok(params.dtype()?.unwrap_or(match scale.dtype {
        Dtype::F16 => Float::F16,
        Dtype::BF16 => Float::Bf16,
        _ => Float::F32,
    }))
}

/// Refuses sizes that do not fit, in one sentence.
pub(crate) fn needs(holds: bool, what: impl FnOnce() -> String) -> Result<(), Error> {
    if holds {
        return Ok(());
    }
    Err(Error::new(Reason::Size, what()))
}
