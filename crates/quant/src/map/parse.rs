//! Reading `quant.map`: a version, named schemes, and rules that say which names have which.
//!
//! It is a stranger's text: caps on everything, linear time, and no tensor gets in whose parts do not fit its scheme.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;

use super::glob::{Budget, Globs};
use super::json::Json;
use super::{Confidence, Evidence, Provenance, QTensor, QuantMap};
use crate::descriptor::Role;
use crate::error::{Error, Reason};
use crate::ggml::GgmlType;
use crate::recognise::{Sniff, own::bnb_state, shape_in, shown_param, sizes};
use crate::scheme::{Param, Params, Part, Parts, Scheme};

/// Most bytes of a map.
pub const MAX_BYTES: usize = 16 << 20;
/// Most schemes of a map.
pub const MAX_SCHEMES: usize = 4096;
/// Most rules of a map.
pub const MAX_RULES: usize = 1 << 20;
/// Most bytes of a tensor's own state or shape.
const MAX_STATE: u64 = 64 << 10;

/// What the parts of a rule's tensors mean.
#[derive(Clone, Debug)]
enum Kind {
    Preset(&'static Scheme),
    Ggml(GgmlType),
    Opaque(String),
}

/// One scheme of a map.
struct Form {
    kind: Kind,
    params: Params,
    /// What a role's part ends in; `None` where there is none.
    parts: BTreeMap<Role, Option<String>>,
    extras: Vec<String>,
    /// What the logical name ends in.
    named: String,
}

/// One rule.
struct Rule {
    scheme: Option<usize>,
    shape: Option<Vec<u64>>,
    rowperm: Option<String>,
}

fn refused(text: impl Into<String>) -> Error {
    Error::new(Reason::Parameter, text)
}

impl QuantMap {
    /// Reads the value of the metadata key `quant.map` over the tensors of a checkpoint. `sniff` reads the parts that hold
    /// a tensor's own shape or state, where the map leaves it to them.
    ///
    /// Tensors that don't fit their scheme are in [`QuantMap::refused`] and stay plain.
    ///
    /// # Errors
    /// [`Reason::Unsupported`] for a version that is not known; else what is wrong with the text.
    pub fn parse(text: &str, rows: &[Part], sniff: &mut Sniff<'_>) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Version {
            v: Option<i64>,
        }
        if text.len() > MAX_BYTES {
            return Err(refused(format!(
                "{} bytes, {MAX_BYTES} at most",
                text.len()
            )));
        }
        let version: Version = serde_json::from_str(text).map_err(|e| refused(e.to_string()))?;
        match version.v {
            Some(1) => {}
            Some(other) => {
                let text = format!("version {other} is not known, 1 is");
                return Err(Error::new(Reason::Unsupported, text));
            }
            None => return Err(refused("no version")),
        }
        let root: Json = serde_json::from_str(text).map_err(|e| refused(e.to_string()))?;
        let Json::Object(mut root) = root else {
            return Err(refused("no object"));
        };
        let (ids, forms) = forms(root.remove("schemes"))?;
        let (globs, rules) = rules(root.remove("tensors"), &ids)?;
        Reader {
            rows: rows.iter().map(|part| (&*part.name, part)).collect(),
            forms,
            globs,
            rules,
            sniff,
            map: QuantMap::default(),
        }
        .run(rows)
    }
}

/// The schemes, and their places by name.
fn forms(schemes: Option<Json>) -> Result<(HashMap<String, usize>, Vec<Form>), Error> {
    let Some(Json::Object(schemes)) = schemes else {
        return Err(refused("\"schemes\" is no object"));
    };
    if schemes.len() > MAX_SCHEMES {
        return Err(refused(format!("more than {MAX_SCHEMES} schemes")));
    }
    let (mut ids, mut forms) = (HashMap::new(), Vec::new());
    for (id, scheme) in schemes {
        let form = form(scheme).map_err(|e| refused(format!("scheme {id:?}: {}", e.text)))?;
        ids.insert(id, forms.len());
        forms.push(form);
    }
    Ok((ids, forms))
}

fn form(scheme: Json) -> Result<Form, Error> {
    let Json::Object(mut scheme) = scheme else {
        return Err(refused("no object"));
    };
    let Some(Json::Text(preset)) = scheme.remove("preset") else {
        return Err(refused("no \"preset\""));
    };
    let kind = kind(&preset);
    let named = match (scheme.remove("as"), &kind) {
        (Some(Json::Text(named)), _) => named,
        (None, Kind::Ggml(_)) => String::new(),
        (None, _) => ".weight".to_owned(),
        _ => return Err(refused("\"as\" is no text")),
    };
    let mut parts = BTreeMap::new();
    match scheme.remove("parts") {
        None => {}
        Some(Json::Object(own)) => {
            for (role, suffix) in own {
                let suffix = match suffix {
                    Json::Text(suffix) => Some(suffix),
                    Json::Null => None,
                    _ => return Err(refused(format!("the part {role:?} is no text"))),
                };
                parts.insert(role_of(&role)?, suffix);
            }
        }
        Some(_) => return Err(refused("\"parts\" is no object")),
    }
    let extras = match scheme.remove("extras") {
        None => Vec::new(),
        Some(Json::List(list)) if list.len() <= 64 => list
            .into_iter()
            .map(|suffix| match suffix {
                Json::Text(suffix) => Ok(suffix),
                _ => Err(refused("an entry of \"extras\" is no text")),
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(refused("\"extras\" is no list of at most 64")),
    };
    // An unknown preset may have parameters of any kind.
    let known = !matches!(kind, Kind::Opaque(_));
    let mut params = Params::default();
    for (name, value) in scheme {
        match param(value) {
            Some(value) => {
                params.0.insert(name, value);
            }
            None if known => return Err(refused(format!("the parameter {name:?}"))),
            None => {}
        }
    }
    if matches!(kind, Kind::Ggml(_)) && params.0.keys().any(|name| name != "dtype") {
        return Err(refused(format!("{preset} has no parameters")));
    }
    Ok(Form {
        kind,
        params,
        parts,
        extras,
        named,
    })
}

/// What a preset is here; what is not known is opaque.
fn kind(preset: &str) -> Kind {
    let numbered = preset.contains('@');
    if let Some(scheme) = Scheme::find(preset).filter(|_| numbered) {
        return Kind::Preset(scheme);
    }
    if let Some(ty) = preset
        .strip_prefix("ggml/")
        .and_then(|ty| GgmlType::from_name(ty.strip_suffix("@1")?))
    {
        return Kind::Ggml(ty);
    }
    Kind::Opaque(preset.strip_prefix("opaque/").unwrap_or(preset).to_owned())
}

fn role_of(name: &str) -> Result<Role, Error> {
    use serde::de::IntoDeserializer;
    use serde::de::value::{Error as Plain, StrDeserializer};
    let text: StrDeserializer<'_, Plain> = name.into_deserializer();
    Role::deserialize(text).map_err(|_| refused(format!("no part has the role {name:?}")))
}

fn param(value: Json) -> Option<Param> {
    Some(match value {
        Json::Flag(flag) => Param::Flag(flag),
        Json::Int(number) => Param::Int(number),
        Json::Text(text) => Param::Text(text),
        Json::List(list) => Param::List(
            list.into_iter()
                .map(|number| match number {
                    Json::Int(number) => Some(number),
                    _ => None,
                })
                .collect::<Option<_>>()?,
        ),
        Json::Null | Json::Object(_) => return None,
    })
}

fn rules(tensors: Option<Json>, ids: &HashMap<String, usize>) -> Result<(Globs, Vec<Rule>), Error> {
    let Some(Json::List(tensors)) = tensors else {
        return Err(refused("\"tensors\" is no list"));
    };
    if tensors.len() > MAX_RULES {
        return Err(refused(format!("more than {MAX_RULES} rules")));
    }
    let (mut globs, mut rules) = (Globs::default(), Vec::new());
    for (at, rule) in tensors.into_iter().enumerate() {
        let (pattern, rule) =
            one_rule(rule, ids).map_err(|e| refused(format!("rule {at}: {}", e.text)))?;
        globs.push(&pattern);
        rules.push(rule);
    }
    Ok((globs, rules))
}

fn one_rule(rule: Json, ids: &HashMap<String, usize>) -> Result<(String, Rule), Error> {
    let Json::Object(mut rule) = rule else {
        return Err(refused("no object"));
    };
    let Some(Json::Text(pattern)) = rule.remove("m") else {
        return Err(refused("no \"m\""));
    };
    let scheme = match rule.remove("s") {
        Some(Json::Null) => None,
        Some(Json::Text(id)) => match ids.get(&id) {
            Some(at) => Some(*at),
            None => return Err(refused(format!("no scheme is called {id:?}"))),
        },
        _ => return Err(refused("no \"s\"")),
    };
    let shape = match rule.remove("shape").map(param) {
        None => None,
        Some(Some(Param::List(sizes))) if sizes.len() <= 8 => {
            let sizes: Option<Vec<u64>> = sizes.iter().map(|&n| u64::try_from(n).ok()).collect();
            Some(sizes.ok_or_else(|| refused("a negative size"))?)
        }
        Some(_) => return Err(refused("\"shape\" is no list of at most 8 sizes")),
    };
    let rowperm = match rule.remove("rowperm") {
        None => None,
        Some(Json::Text(text)) if text.len() <= 128 => Some(text),
        Some(_) => return Err(refused("\"rowperm\" is no text of at most 128 bytes")),
    };
    // What is not known may change what the tensor means.
    if let Some(key) = rule.keys().next() {
        return Err(refused(format!("the key {key:?} is not known")));
    }
    Ok((
        pattern,
        Rule {
            scheme,
            shape,
            rowperm,
        },
    ))
}

struct Reader<'a, 's> {
    rows: HashMap<&'a str, &'a Part>,
    forms: Vec<Form>,
    globs: Globs,
    rules: Vec<Rule>,
    sniff: &'a mut Sniff<'s>,
    map: QuantMap,
}

impl Reader<'_, '_> {
    fn run(mut self, rows: &[Part]) -> Result<QuantMap, Error> {
        let mut ends: Vec<String> = self.forms.iter().flat_map(Form::codes).collect();
        ends.sort_unstable();
        ends.dedup();
        let mut budget = Budget::new();
        let mut done: HashSet<&str> = HashSet::new();
        let mut used = vec![false; self.rules.len()];
        for row in rows {
            budget.spend(ends.len() as u64)?;
            for end in &ends {
                let Some(base) = row.name.strip_suffix(end.as_str()) else {
                    continue;
                };
                if done.contains(base) {
                    continue;
                }
                let Some(at) = self.globs.first(base, &mut budget)? else {
                    continue;
                };
                let Some(form) = self.rules.get(at).and_then(|rule| rule.scheme) else {
                    if let Some(used) = used.get_mut(at) {
                        *used = true;
                    }
                    continue;
                };
                if !self
                    .forms
                    .get(form)
                    .is_some_and(|form| form.codes().contains(end))
                {
                    continue;
                }
                done.insert(base);
                if let Some(used) = used.get_mut(at) {
                    *used = true;
                }
                if let Err(error) = self.tensor(base, at, form) {
                    self.map.refused.push(error);
                }
            }
        }
        let idle = used.iter().filter(|used| !**used).count();
        if idle > 0 {
            // Lint Q010; a shard opened by itself has it too.
            self.map.idle_rules = idle;
        }
        Ok(self.map)
    }

    fn tensor(&mut self, base: &str, rule: usize, form: usize) -> Result<(), Error> {
        let (Some(rule), Some(form)) = (self.rules.get(rule), self.forms.get(form)) else {
            return Ok(());
        };
        let name = format!("{base}{}", form.named);
        let find = |suffix: &str| {
            self.rows
                .get(&*format!("{base}{suffix}"))
                .map(|part| (*part).clone())
        };
        let mut parts = Parts::new();
        if let Kind::Preset(scheme) = &form.kind {
            for row in scheme.parts {
                if form.parts.contains_key(&row.role) {
                    continue;
                }
                let found = row
                    .suffixes
                    .iter()
                    .find_map(|suffix| find(&format!(".{suffix}")));
                if let Some(found) = found {
                    parts.insert(row.role, found);
                }
            }
        } else if !form.parts.contains_key(&Role::Codes) {
            parts.extend(find("").map(|part| (Role::Codes, part)));
        }
        for (role, suffix) in &form.parts {
            if let Some(part) = suffix.as_deref().and_then(find) {
                parts.insert(*role, part);
            }
        }
        let extras: Vec<Part> = form
            .extras
            .iter()
            .filter_map(|suffix| find(suffix))
            .collect();
        let mut params = form.params.clone();
        let mut tensor = match &form.kind {
            Kind::Preset(scheme) => {
                if let (Some(shape), true) = (&rule.shape, scheme.params.contains(&"shape")) {
                    params.0.insert("shape".to_owned(), sizes(shape));
                }
                complete(scheme, &mut params, &parts, self.sniff).map_err(|e| e.of(&name))?;
                QTensor::preset_of(&name, scheme, params.clone(), parts)?
            }
            Kind::Ggml(ty) => {
                let part = parts.remove(&Role::Codes).ok_or_else(|| {
                    Error::new(Reason::Missing, "the blocks are missing").of(&name)
                })?;
                let mut tensor = QTensor::ggml_of(&name, *ty, part)?;
                if let Some(dtype) = params.dtype().map_err(|e| e.of(&name))? {
                    tensor.dtype = dtype;
                }
                tensor
            }
            Kind::Opaque(family) => {
                let mut tensor = QTensor::opaque_of(&name, family, parts);
                tensor.shape = rule.shape.clone().unwrap_or_default();
                tensor
            }
        };
        if let Some(shape) = rule.shape.as_ref().filter(|shape| **shape != tensor.shape) {
            let text = format!("the map says {shape:?}, the parts hold {:?}", tensor.shape);
            return Err(Error::new(Reason::Size, text).of(&name));
        }
        tensor.rowperm.clone_from(&rule.rowperm);
        tensor.extras = extras;
        let stated = |field: &str, value: String| {
            Evidence::new(field, value, Provenance::Map, Confidence::Certain)
        };
        tensor.evidence.push(stated("scheme", tensor.preset()));
        let fields = params.0.iter();
        tensor
            .evidence
            .extend(fields.map(|(name, value)| stated(name, shown_param(value))));
        self.map.insert(tensor)
    }
}

impl Form {
    /// What the part of the codes may end in.
    fn codes(&self) -> Vec<String> {
        match (self.parts.get(&Role::Codes), &self.kind) {
            (Some(Some(suffix)), _) => vec![suffix.clone()],
            (Some(None), _) => Vec::new(),
            (None, Kind::Preset(scheme)) => scheme
                .parts
                .iter()
                .filter(|row| row.role == Role::Codes)
                .flat_map(|row| row.suffixes.iter().map(|suffix| format!(".{suffix}")))
                .collect(),
            (None, _) => vec![String::new()],
        }
    }
}

/// Adds what the tensor's own parts say and the map does not: a shape, or bitsandbytes' state.
fn complete(
    scheme: &Scheme,
    params: &mut Params,
    parts: &Parts,
    sniff: &mut Sniff<'_>,
) -> Result<(), Error> {
    let takes_shape = scheme.params.contains(&"shape") && !params.0.contains_key("shape");
    let mut read = |part: &Part| {
        let len = (crate::scheme::bits_of(part).ok()? / 8).min(MAX_STATE);
        sniff(&part.name, 0..len)
    };
    if let (true, Some(part)) = (takes_shape, parts.get(&Role::Shape)) {
        if let Some(shape) = read(part).and_then(|bytes| shape_in(&bytes)) {
            params.0.insert("shape".to_owned(), sizes(&shape));
        }
    } else if let (true, "bnb4", Some(part)) = (takes_shape, scheme.name, parts.get(&Role::State)) {
        let text = read(part)
            .ok_or_else(|| Error::new(Reason::Missing, format!("{:?} can't be read", part.name)))?;
        for (name, value) in bnb_state(&text)?.0 {
            params.0.entry(name).or_insert(value);
        }
    }
    Ok(())
}
