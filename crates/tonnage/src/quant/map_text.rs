//! The metadata key `quant.map` of what is written here.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use tonnage_quant::map::{Meaning, QTensor, QuantMap};

/// The map as JSON: a scheme for each set of parameters, a rule for each tensor.
pub(crate) fn map_text(map: &QuantMap) -> String {
    let mut schemes: BTreeMap<String, String> = BTreeMap::new();
    let mut rules = Vec::with_capacity(map.len());
    for tensor in map.tensors() {
        let said = scheme(tensor).to_string();
        let next = format!("s{}", schemes.len());
        let id = schemes.entry(said).or_insert(next).clone();
        rules.push(json!({"m": tensor.name, "s": id}));
    }
    let parsed = |(said, id): (String, String)| Some((id, serde_json::from_str(&said).ok()?));
    let schemes: Map<String, Value> = schemes.into_iter().filter_map(parsed).collect();
    json!({"v": 1, "schemes": schemes, "tensors": rules}).to_string()
}

fn scheme(tensor: &QTensor) -> Value {
    let mut said = Map::new();
    said.insert("preset".to_owned(), json!(tensor.preset()));
    said.insert("dtype".to_owned(), json!(tensor.dtype.name()));
    if let Meaning::Preset(_, params) = &tensor.meaning {
        for (name, value) in &params.0 {
            said.insert(name.clone(), json!(value));
        }
    }
    Value::Object(said)
}
