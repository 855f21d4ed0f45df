//! Writing `quant.map`: rules with patterns, so that tens of thousands of modules take some hundred bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::{Map, Value};

use super::glob::{Budget, Globs, template};
use super::{Meaning, QTensor, QuantMap};
use crate::descriptor::Role;
use crate::error::Error;
use crate::scheme::{Part, Scheme};

/// What tensors of one rule share: scheme, shape, order of rows.
type Key = (String, Option<Vec<u64>>, Option<String>);

impl QuantMap {
    /// The value of the metadata key `quant.map`, for the tensors `rows` of the checkpoint: patterns that match none
    /// but their own, sorted, the same for the same map.
    ///
    /// # Errors
    /// Matching the names takes too long.
    pub fn to_json(&self, rows: &[Part]) -> Result<String, Error> {
        let names: BTreeSet<&str> = rows
            .iter()
            .map(|part| &*part.name)
            .chain(
                self.tensors()
                    .flat_map(QTensor::all_parts)
                    .map(|part| &*part.name),
            )
            .collect();
        let mut quantised: BTreeMap<String, Key> = BTreeMap::new();
        let mut ends: BTreeSet<String> = BTreeSet::new();
        for tensor in self.tensors() {
            let (base, named) = split(tensor);
            let form = form(tensor, &base, &named, &names);
            let shape = shape(tensor);
            if let Some(codes) = tensor.parts.get(&Role::Codes) {
                ends.extend(codes.name.strip_prefix(&base).map(str::to_owned));
            }
            quantised.insert(base, (form, shape, tensor.rowperm.clone()));
        }
        // Every name that a rule could be asked about: what is left when the end of some codes is taken off.
        let mut bases: BTreeMap<String, Option<&Key>> = BTreeMap::new();
        for name in &names {
            for base in ends
                .iter()
                .filter_map(|end| name.strip_suffix(end.as_str()))
            {
                bases.insert(base.to_owned(), quantised.get(base));
            }
        }
        for (base, key) in &quantised {
            bases.insert(base.clone(), Some(key));
        }
        let rules = rules(&bases)?;
        Ok(text(&rules))
    }
}

/// Rules in their order: names that are exceptions, then patterns.
fn rules<'a>(
    bases: &BTreeMap<String, Option<&'a Key>>,
) -> Result<Vec<(String, Option<&'a Key>)>, Error> {
    let mut alike: BTreeMap<String, BTreeMap<Option<&Key>, usize>> = BTreeMap::new();
    for (base, key) in bases {
        *alike
            .entry(template(base))
            .or_default()
            .entry(*key)
            .or_default() += 1;
    }
    // The most frequent, the first of those.
    let mut open: Vec<(String, Option<&Key>)> = Vec::new();
    for (pattern, keys) in alike {
        let most = keys
            .iter()
            .filter(|(key, count)| key.is_some() && **count > 1)
            .max_by(|a, b| a.1.cmp(b.1).then(b.0.cmp(a.0)));
        if let (Some((key, _)), true) = (most, pattern.contains("{}")) {
            open.push((pattern, *key));
        }
    }
    let mut globs = Globs::default();
    for (pattern, _) in &open {
        globs.push(pattern);
    }
    let mut budget = Budget::new();
    let mut rules = Vec::new();
    for (base, key) in bases {
        let first = globs.first(base, &mut budget)?.and_then(|at| open.get(at));
        if first.and_then(|(_, key)| *key) != *key {
            rules.push((base.clone(), *key));
        }
    }
    rules.extend(open);
    Ok(rules)
}

/// The name that parts are called after, and what the logical name has behind it.
fn split(tensor: &QTensor) -> (String, String) {
    if matches!(tensor.meaning, Meaning::Ggml(_)) {
        return (tensor.name.clone(), String::new());
    }
    let whole = |base: &str| tensor.all_parts().all(|part| part.name.starts_with(base));
    if let Some(base) = tensor
        .name
        .strip_suffix(".weight")
        .filter(|base| whole(base))
    {
        return (base.to_owned(), ".weight".to_owned());
    }
    let mut base = &*tensor.name;
    while !whole(base) {
        let mut characters = base.chars();
        characters.next_back();
        base = characters.as_str();
    }
    (
        base.to_owned(),
        tensor.name.get(base.len()..).unwrap_or_default().to_owned(),
    )
}

/// The scheme's object.
fn form(tensor: &QTensor, base: &str, named: &str, names: &BTreeSet<&str>) -> String {
    let mut object = Map::new();
    let preset = match &tensor.meaning {
        // An unknown preset keeps its own name.
        Meaning::Opaque(family) if family.contains('@') => family.clone(),
        _ => tensor.preset(),
    };
    object.insert("preset".to_owned(), preset.into());
    let usual = if matches!(tensor.meaning, Meaning::Ggml(_)) {
        ""
    } else {
        ".weight"
    };
    if named != usual {
        object.insert("as".to_owned(), named.into());
    }
    let end = |part: &Part| part.name.strip_prefix(base).unwrap_or_default().to_owned();
    let mut parts = Map::new();
    let mut put = |role: Role, end: Value| {
        if let Ok(Value::String(role)) = serde_json::to_value(role) {
            parts.insert(role, end);
        }
    };
    let mut usual: BTreeMap<Role, Vec<String>> = BTreeMap::new();
    match &tensor.meaning {
        Meaning::Preset(scheme, params) => {
            for row in scheme.parts {
                let ends = row.suffixes.iter().map(|suffix| format!(".{suffix}"));
                usual.insert(row.role, ends.collect());
            }
            for (name, value) in &params.0 {
                if !left_out(scheme, tensor, name)
                    && let Ok(value) = serde_json::to_value(value)
                {
                    object.insert(name.clone(), value);
                }
            }
            object.insert("dtype".to_owned(), tensor.dtype.name().into());
        }
        Meaning::Ggml(_) => {
            usual.insert(Role::Codes, vec![String::new()]);
        }
        Meaning::Opaque(_) => {}
    }
    for (role, ends) in &usual {
        let found = ends
            .iter()
            .find(|end| names.contains(&*format!("{base}{end}")));
        match (tensor.parts.get(role), found) {
            (Some(part), Some(found)) if end(part) == **found => {}
            (Some(part), _) => put(*role, end(part).into()),
            (None, Some(_)) => put(*role, Value::Null),
            (None, None) => {}
        }
    }
    for (role, part) in &tensor.parts {
        if !usual.contains_key(role) {
            put(*role, end(part).into());
        }
    }
    if !parts.is_empty() {
        object.insert("parts".to_owned(), parts.into());
    }
    if !tensor.extras.is_empty() {
        let extras: Vec<Value> = tensor.extras.iter().map(|part| end(part).into()).collect();
        object.insert("extras".to_owned(), extras.into());
    }
    Value::Object(object).to_string()
}

/// Whether a parameter is not in the scheme: a shape is the rule's, and bitsandbytes' state says its own.
fn left_out(scheme: &Scheme, tensor: &QTensor, param: &str) -> bool {
    param == "shape" || (scheme.name == "bnb4" && tensor.parts.contains_key(&Role::State))
}

/// The shape that a rule states: where the parts alone don't say it.
fn shape(tensor: &QTensor) -> Option<Vec<u64>> {
    match &tensor.meaning {
        Meaning::Preset(scheme, params) => {
            if !params.0.contains_key("shape") || left_out(scheme, tensor, "block") {
                return None;
            }
            let mut less = params.clone();
            less.0.remove("shape");
            let derived = scheme
                .describe(&less, &tensor.parts)
                .map(|meaning| meaning.view);
            // A part that holds the shape would be read for it.
            let own = tensor.parts.contains_key(&Role::Shape);
            (own || derived.as_ref() != Ok(&tensor.shape)).then(|| tensor.shape.clone())
        }
        Meaning::Ggml(_) => None,
        Meaning::Opaque(_) => (!tensor.shape.is_empty()).then(|| tensor.shape.clone()),
    }
}

/// The text: schemes under short names, then the rules.
fn text(rules: &[(String, Option<&Key>)]) -> String {
    let forms: BTreeSet<&str> = rules
        .iter()
        .filter_map(|(_, key)| Some(&*key.as_ref()?.0))
        .collect();
    let mut ids: BTreeMap<&str, String> = BTreeMap::new();
    let mut taken: BTreeSet<String> = BTreeSet::new();
    let mut text = String::from("{\"v\":1,\"schemes\":{");
    for (at, form) in forms.iter().enumerate() {
        let id = id(form, &mut taken);
        let comma = if at == 0 { "" } else { "," };
        // Writing to a string does not fail.
        let _ = write!(text, "{comma}{}:{form}", Value::from(id.as_str()));
        ids.insert(form, id);
    }
    text.push_str("},\"tensors\":[");
    for (at, (pattern, key)) in rules.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        let _ = write!(text, "{comma}{{\"m\":{}", Value::from(pattern.as_str()));
        match key {
            None => text.push_str(",\"s\":null"),
            Some((form, shape, rowperm)) => {
                let id = ids.get(&**form).map_or("", String::as_str);
                let _ = write!(text, ",\"s\":{}", Value::from(id));
                if let Some(shape) = shape {
                    let _ = write!(text, ",\"shape\":{}", Value::from(shape.as_slice()));
                }
                if let Some(rowperm) = rowperm {
                    let _ = write!(text, ",\"rowperm\":{}", Value::from(rowperm.as_str()));
                }
            }
        }
        text.push('}');
    }
    text.push_str("]}");
    text
}

/// A short name: the preset's, with a number where several have it.
fn id(form: &str, taken: &mut BTreeSet<String>) -> String {
    let value: Value = serde_json::from_str(form).unwrap_or_default();
    let preset = value
        .get("preset")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let name = preset.split('@').next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default().to_lowercase();
    let numbered = (2..).map(|n| format!("{name}-{n}"));
    let free = std::iter::once(name.clone())
        .chain(numbered)
        .find(|id| !taken.contains(id));
    let id = free.unwrap_or(name);
    taken.insert(id.clone());
    id
}
