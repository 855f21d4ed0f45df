//! What a checkpoint's tensors mean: which parts make one quantised tensor, by which scheme, and how that is known.
//!
//! A [`QuantMap`] holds a [`QTensor`] for each quantised tensor; every other name is a plain tensor. It comes from a
//! checkpoint's own words and bytes ([`QuantMap::detect`]) or from the metadata key `quant.map` ([`QuantMap::parse`]),
//! which [`QuantMap::to_json`] writes. Nothing in it is trusted: sizes are checked against the scheme before a tensor
//! gets in.

mod glob;
mod json;
mod parse;
mod write;

use std::collections::BTreeMap;

use crate::descriptor::{Descriptor, Float, Role};
use crate::error::{Error, Reason};
use crate::ggml::GgmlType;
use crate::scheme::{Param, Params, Part, Parts, Scheme};

/// What a quantised tensor's parts mean.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Meaning {
    /// A row of the table of schemes, with its parameters (without `dtype`, which is the tensor's own field).
    Preset(&'static Scheme, Params),
    /// Blocks of ggml: one part of dtype U8, rows of whole blocks.
    Ggml(GgmlType),
    /// A family that is carried as it is: the name behind `opaque/`, or a preset that is not known here.
    Opaque(String),
}

/// One quantised tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct QTensor {
    /// Its logical name: the module's and `.weight` where parts hang on a module, the part's own where the codes are the
    /// tensor itself.
    pub name: String,
    /// What the parts mean.
    pub meaning: Meaning,
    /// The parts, by what they are for.
    pub parts: Parts,
    /// Parts beyond them that belong to the tensor and go where it goes: a library's own scalars, an opaque family's tables.
    pub extras: Vec<Part>,
    /// The logical shape; empty where it is not known (opaque families).
    pub shape: Vec<u64>,
    /// The dtype of its values.
    pub dtype: Float,
    /// How rows lie in another order than the model's, where they do: `llama-rope:4x256`.
    pub rowperm: Option<String>,
    /// How each field is known.
    pub evidence: Vec<Evidence>,
}

/// How a field of a tensor's meaning is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The field: `scheme`, `bits`, `group`, `zero_wrap`…
    pub field: String,
    /// Its value, as it is shown.
    pub value: String,
    /// Who says so.
    pub provenance: Provenance,
    /// How sure that is.
    pub confidence: Confidence,
}

/// Who says what a field is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Provenance {
    /// The metadata key `quant.map`.
    Map,
    /// The tensor's own description in the file, as its library wrote it: the part or the metadata key.
    Own(String),
    /// A configuration beside the checkpoint: the file's name.
    Config(String),
    /// Names, dtypes and shapes of the parts.
    Shapes,
    /// Values that were looked at.
    Values,
    /// Nobody: what the scheme's library does where nothing is said.
    Default,
}

/// How sure a field's value is, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Confidence {
    /// One of several possible readings.
    Guess,
    /// Other readings are possible, and unusual.
    Likely,
    /// Stated, or the only reading that fits.
    Certain,
}

/// A field with several possible readings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ambiguity {
    /// The tensor.
    pub tensor: String,
    /// The field: `scheme`, `bits`…
    pub field: String,
    /// The readings that fit, the one taken first.
    pub readings: Vec<String>,
    /// Why it can't be known, in one sentence.
    pub why: String,
}

/// What is done where a checkpoint has several readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The likeliest is taken and the ambiguity recorded.
    #[default]
    Lenient,
    /// The checkpoint is refused.
    Strict,
}

/// The quantised tensors of a checkpoint. Every name that none of them claims is a plain tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantMap {
    tensors: BTreeMap<String, QTensor>,
    owners: BTreeMap<String, String>,
    /// Fields with several possible readings.
    pub ambiguities: Vec<Ambiguity>,
    /// Tensors that look like a scheme's and do not fit it: they stay plain.
    pub refused: Vec<Error>,
    /// How many rules of `quant.map` match no tensor (lint Q010).
    pub idle_rules: usize,
    /// What was seen and not followed: an unknown version of `quant.map`, a configuration that can't be read.
    pub warnings: Vec<String>,
}

impl PartialEq for Scheme {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.version == other.version
    }
}

impl Evidence {
    /// A field, its value, and how that is known.
    pub fn new(
        field: &str,
        value: impl std::fmt::Display,
        provenance: Provenance,
        confidence: Confidence,
    ) -> Self {
        Evidence {
            field: field.to_owned(),
            value: value.to_string(),
            provenance,
            confidence,
        }
    }
}

impl QTensor {
    /// A tensor of a scheme of the table: sizes are checked, and the logical shape comes out of the layout.
    ///
    /// # Errors
    /// Whatever [`Scheme::describe`] refuses.
    pub fn preset_of(
        name: &str,
        scheme: &'static Scheme,
        mut params: Params,
        parts: Parts,
    ) -> Result<Self, Error> {
        let descriptor = scheme.describe(&params, &parts).map_err(|e| e.of(name))?;
        params.0.remove("dtype");
        Ok(QTensor {
            name: name.to_owned(),
            meaning: Meaning::Preset(scheme, params),
            parts,
            extras: Vec::new(),
            shape: descriptor.view,
            dtype: descriptor.dtype,
            rowperm: None,
            evidence: Vec::new(),
        })
    }

    /// Rows of ggml blocks: a U8 part `[.., rows, bytes of a row]`.
    ///
    /// # Errors
    /// The part is no U8, or a row is not whole blocks.
    pub fn ggml_of(name: &str, ty: GgmlType, part: Part) -> Result<Self, Error> {
        let refused = || {
            let text = format!(
                "{:?} is {} {:?}, rows of whole {ty} blocks of {} bytes are needed",
                part.name,
                part.dtype,
                part.shape,
                ty.bytes()
            );
            Error::new(Reason::Size, text).of(name)
        };
        let mut shape = part.shape.clone();
        let last = shape.last_mut().ok_or_else(refused)?;
        let block = ty.bytes() as u64;
        if part.dtype != tonnage_format::Dtype::U8 || !last.is_multiple_of(block) {
            return Err(refused());
        }
        *last = (*last / block)
            .checked_mul(ty.elements() as u64)
            .ok_or_else(refused)?;
        Ok(QTensor {
            name: name.to_owned(),
            meaning: Meaning::Ggml(ty),
            parts: Parts::from([(Role::Codes, part)]),
            extras: Vec::new(),
            shape,
            dtype: Float::F32,
            rowperm: None,
            evidence: Vec::new(),
        })
    }

    /// A tensor of a family that is carried as it is.
    pub fn opaque_of(name: &str, family: &str, parts: Parts) -> Self {
        QTensor {
            name: name.to_owned(),
            meaning: Meaning::Opaque(family.to_owned()),
            parts,
            extras: Vec::new(),
            shape: Vec::new(),
            dtype: Float::F32,
            rowperm: None,
            evidence: Vec::new(),
        }
    }

    /// The meaning, spelled out: of a scheme of the table.
    ///
    /// # Errors
    /// The sizes don't fit the scheme; or the meaning is no layout (ggml's blocks, opaque families).
    pub fn describe(&self) -> Result<Descriptor, Error> {
        let Meaning::Preset(scheme, params) = &self.meaning else {
            return Err(Error::new(
                Reason::Unsupported,
                format!("{} is not described by a layout", self.preset()),
            )
            .of(&self.name));
        };
        let mut params = params.clone();
        if scheme.params.contains(&"dtype") {
            let dtype = Param::Text(self.dtype.name().to_owned());
            params.0.insert("dtype".to_owned(), dtype);
        }
        scheme
            .describe(&params, &self.parts)
            .map_err(|e| e.of(&self.name))
    }

    /// All tensors of the checkpoint that belong to it.
    pub fn all_parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.values().chain(&self.extras)
    }

    /// What it is called in `quant.map`: `gptq@1`, `ggml/Q4_K@1`, `opaque/exl3`.
    pub fn preset(&self) -> String {
        match &self.meaning {
            Meaning::Preset(scheme, _) => scheme.preset(),
            Meaning::Ggml(ty) => format!("ggml/{ty}@1"),
            Meaning::Opaque(family) => format!("opaque/{family}"),
        }
    }
}

impl Float {
    /// The dtype's name: `BF16`.
    pub fn name(self) -> &'static str {
        match self {
            Float::F32 => "F32",
            Float::F16 => "F16",
            Float::Bf16 => "BF16",
        }
    }
}

impl QuantMap {
    /// Adds a tensor: its parts are its own from now on.
    ///
    /// # Errors
    /// The name is taken, or another tensor has one of the parts (lint Q010).
    pub fn insert(&mut self, tensor: QTensor) -> Result<(), Error> {
        let refuse = |text: String| Err(Error::new(Reason::Ambiguous, text).of(&tensor.name));
        if self.tensors.contains_key(&tensor.name) {
            return refuse("two quantised tensors have this name".to_owned());
        }
        for part in tensor.all_parts() {
            if let Some(owner) = self.owners.get(&part.name) {
                return refuse(format!("the part {:?} is {owner:?}'s", part.name));
            }
        }
        for part in tensor.all_parts() {
            self.owners.insert(part.name.clone(), tensor.name.clone());
        }
        self.tensors.insert(tensor.name.clone(), tensor);
        Ok(())
    }

    /// The tensor of a logical name.
    pub fn get(&self, name: &str) -> Option<&QTensor> {
        self.tensors.get(name)
    }

    /// The tensor that has a tensor of the checkpoint as a part.
    pub fn owner(&self, part: &str) -> Option<&QTensor> {
        self.tensors.get(self.owners.get(part)?)
    }

    /// The tensors, by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &QTensor> {
        self.tensors.values()
    }

    /// The same map with other names of tensors, so that a change of prefixes can't part tensors from their meaning.
    ///
    /// # Errors
    /// Two names become one.
    pub fn rename(&self, rename: impl Fn(&str) -> String) -> Result<Self, Error> {
        let mut map = QuantMap {
            tensors: BTreeMap::new(),
            owners: BTreeMap::new(),
            ..self.clone()
        };
        for tensor in self.tensors.values() {
            let mut tensor = tensor.clone();
            tensor.name = rename(&tensor.name);
            for part in tensor.parts.values_mut().chain(&mut tensor.extras) {
                part.name = rename(&part.name);
            }
            map.insert(tensor)?;
        }
        for ambiguity in &mut map.ambiguities {
            ambiguity.tensor = rename(&ambiguity.tensor);
        }
        Ok(map)
    }

    /// How many tensors are quantised.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether nothing is quantised.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}
