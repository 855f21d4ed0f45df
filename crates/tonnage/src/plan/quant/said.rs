//! What a checkpoint's quantised tensors mean, as the caller says it: by patterns over their logical names.
//!
//! ```json
//! {"*.experts.*": {"preset": "mxfp4"}, "*_proj.weight": {"preset": "gptq", "params": {"bits": 4, "group": 128}}}
//! ```

use std::collections::BTreeSet;

use tonnage_quant::descriptor::Role;
use tonnage_quant::map::{QTensor, QuantMap};
use tonnage_quant::scheme::{Params, Part, Parts, Scheme};

use super::refused;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

impl Checkpoint {
    /// The map of quantised tensors that patterns with schemes describe: of each name that holds a scheme's codes, the
    /// first pattern that matches its logical name says what it is. A tensor that a pattern matches and that lacks a part
    /// stays plain.
    ///
    /// # Errors
    /// `PLAN_QUANTIZED` for a text that is no such description, a scheme that is not known, and parts that don't fit it.
    pub fn described(&self, json: &str) -> Result<QuantMap> {
        let wrong = |text: String| Error::usage("PLAN_QUANTIZED", text);
        let said: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(json).map_err(|error| wrong(error.to_string()))?;
        let mut map = QuantMap::default();
        let mut known: BTreeSet<String> = BTreeSet::new();
        for (pattern, meaning) in &said {
            let preset = meaning.get("preset").and_then(serde_json::Value::as_str);
            let preset = preset.ok_or_else(|| wrong(format!("{pattern:?} names no preset")))?;
            let scheme = Scheme::find(preset)
                .ok_or_else(|| wrong(format!("no scheme is called {preset:?}")))?;
            let params = meaning.get("params").cloned().unwrap_or_default();
            let params: Params = match params.is_null() {
                true => Params::default(),
                false => {
                    serde_json::from_value(params).map_err(|error| wrong(error.to_string()))?
                }
            };
            for name in self.catalog().iter().map(|row| row.name) {
                let Some(module) = module(scheme, name) else {
                    continue;
                };
                let logical = format!("{module}.weight");
                if known.contains(&logical) || !tonnage_plan::matches(pattern, &logical) {
                    continue;
                }
                if let Some(parts) = self.parts_of(scheme, module) {
                    let tensor = QTensor::preset_of(&logical, scheme, params.clone(), parts);
                    let tensor = tensor.map_err(|error| refused(error, &logical))?;
                    map.insert(tensor)
                        .map_err(|error| refused(error, &logical))?;
                    known.insert(logical);
                }
            }
        }
        Ok(map)
    }

    /// The parts of a module's tensor, where it has all that a scheme needs.
    fn parts_of(&self, scheme: &Scheme, module: &str) -> Option<Parts> {
        let mut parts = Parts::new();
        for row in scheme.parts {
            let names = row
                .suffixes
                .iter()
                .flat_map(|suffix| [".", "_"].map(|between| format!("{module}{between}{suffix}")));
            let found = names.into_iter().find_map(|name| self.get(&name));
            match found.and_then(|one| {
                Some((
                    one.name().to_owned(),
                    one.dtype().ok()?,
                    one.shape().to_vec(),
                ))
            }) {
                Some((name, dtype, shape)) => {
                    parts.insert(row.role, Part { name, dtype, shape });
                }
                None if row.required => return None,
                None => {}
            }
        }
        Some(parts)
    }
}

/// The module of a tensor that has a scheme's codes.
fn module<'a>(scheme: &Scheme, name: &'a str) -> Option<&'a str> {
    let codes = scheme.parts.iter().find(|row| row.role == Role::Codes)?;
    codes.suffixes.iter().find_map(|suffix| {
        let rest = name.strip_suffix(suffix)?;
        rest.strip_suffix('.').or_else(|| rest.strip_suffix('_'))
    })
}
