//! What a GGUF file says of its model, from the files beside a checkpoint.

use std::path::Path;

use serde_json::{Map, Value};
use tonnage_foreign::gguf::names::{ARCHITECTURES, Names};
use tonnage_foreign::gguf::{GgmlType, OwnedValue, ValueType};

use super::Export;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

type Kv = Vec<(String, OwnedValue)>;

/// What is known of a model.
pub(super) struct Described {
    pub kv: Kv,
    pub names: Option<&'static Names>,
    pub notes: Vec<String>,
}

pub(super) fn describe(checkpoint: &Checkpoint, export: &Export) -> Result<Described> {
    let config = crate::quant::config_of(checkpoint.root())?.unwrap_or_default();
    let given = export
        .kv
        .iter()
        .find(|(key, _)| key == "general.architecture");
    let given = given.and_then(|(_, value)| match value {
        OwnedValue::String(text) => std::str::from_utf8(text).ok(),
        _ => None,
    });
    let model_type = config.get("model_type").and_then(Value::as_str);
    let names = match given {
        Some(name) => Names::of_architecture(name),
        None => model_type.and_then(Names::of_model_type),
    };
    let mut notes = Vec::new();
    let names = names.filter(|_| !export.keep_names);
    if names.is_none() && !export.keep_names {
        let known: Vec<&str> = ARCHITECTURES
            .iter()
            .map(|names| names.architecture)
            .collect();
        let text = format!(
            "the names of {} are not known in GGUF; known are {}. Say general.architecture, or keep names as they are",
            given
                .or(model_type)
                .unwrap_or("a checkpoint without model_type"),
            known.join(", ")
        );
        return Err(Error::usage("GGUF_EXPORT", text));
    }
    let architecture = names
        .map(|names| names.architecture)
        .or(given)
        .or(model_type);
    let mut kv = Kv::new();
    if let Some(architecture) = architecture {
        put(&mut kv, "general.architecture", text(architecture));
        numbers(&config, architecture, &mut kv, &mut notes);
    } else {
        notes.push("general.architecture is not known, and is not written".to_owned());
    }
    let folder = checkpoint
        .root()
        .and_then(Path::file_name)
        .and_then(|name| name.to_str());
    if let Some(name) = folder {
        put(&mut kv, "general.name", text(name));
    }
    put(&mut kv, "general.quantization_version", OwnedValue::U32(2));
    tokenizer(checkpoint.root(), &config, &mut kv, &mut notes);
    Ok(Described { kv, names, notes })
}

fn text(text: &str) -> OwnedValue {
    OwnedValue::String(text.as_bytes().to_vec())
}

fn put(kv: &mut Kv, key: &str, value: OwnedValue) {
    kv.push((key.to_owned(), value));
}

/// What llama.cpp calls the numbers of a configuration.
const NUMBERS: &[(&str, &str, bool)] = &[
    ("max_position_embeddings", "context_length", true),
    ("hidden_size", "embedding_length", true),
    ("num_hidden_layers", "block_count", true),
    ("intermediate_size", "feed_forward_length", true),
    ("num_attention_heads", "attention.head_count", true),
    ("num_key_value_heads", "attention.head_count_kv", false),
    ("head_dim", "attention.key_length", false),
    ("head_dim", "attention.value_length", false),
    ("vocab_size", "vocab_size", false),
    ("sliding_window", "attention.sliding_window", false),
];

fn numbers(config: &Map<String, Value>, architecture: &str, kv: &mut Kv, notes: &mut Vec<String>) {
    let whole = |key: &str| {
        let found = config.get(key)?.as_u64()?;
        u32::try_from(found).ok()
    };
    for (key, to, needed) in NUMBERS {
        match whole(key) {
            Some(value) => put(kv, &format!("{architecture}.{to}"), OwnedValue::U32(value)),
            None if *needed => notes.push(format!("{architecture}.{to}: config.json has no {key}")),
            None => {}
        }
    }
    if let (None, Some(heads)) = (whole("num_key_value_heads"), whole("num_attention_heads")) {
        let key = format!("{architecture}.attention.head_count_kv");
        put(kv, &key, OwnedValue::U32(heads));
    }
    let head = whole("head_dim")
        .or_else(|| whole("hidden_size")?.checked_div(whole("num_attention_heads")?));
    if let (Some(head), true) = (head, !architecture.starts_with("gemma")) {
        put(
            kv,
            &format!("{architecture}.rope.dimension_count"),
            OwnedValue::U32(head),
        );
    }
    let scaling = config.get("rope_parameters").or(config.get("rope_scaling"));
    let theta = config
        .get("rope_theta")
        .or_else(|| scaling?.get("rope_theta"));
    for (value, to) in [
        (
            config.get("rms_norm_eps"),
            "attention.layer_norm_rms_epsilon",
        ),
        (theta, "rope.freq_base"),
    ] {
        match value.and_then(Value::as_f64) {
            Some(value) => put(
                kv,
                &format!("{architecture}.{to}"),
                OwnedValue::F32(value as f32),
            ),
            None => notes.push(format!("{architecture}.{to}: config.json does not say it")),
        }
    }
    let kind = scaling
        .and_then(|s| s.get("rope_type").or(s.get("type")))
        .and_then(Value::as_str);
    if let Some(kind) = kind.filter(|kind| *kind != "default") {
        notes.push(format!(
            "scaling of positions ({kind}) is not written; give its keys"
        ));
    }
}

/// `general.file_type`: llama.cpp's number for what most matrices are.
pub(super) fn file_type(kv: &mut Kv, types: &[GgmlType]) {
    let number = |ty: &GgmlType| {
        Some(match ty {
            GgmlType::F32 => 0_u32,
            GgmlType::F16 => 1,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q8_0 => 7,
            GgmlType::Q5_0 => 8,
            GgmlType::Q5_1 => 9,
            GgmlType::Q2_K => 10,
            GgmlType::Q3_K => 12,
            GgmlType::Q4_K => 15,
            GgmlType::Q5_K => 17,
            GgmlType::Q6_K => 18,
            GgmlType::IQ4_NL => 25,
            GgmlType::IQ4_XS => 30,
            GgmlType::BF16 => 32,
            GgmlType::TQ1_0 => 36,
            GgmlType::TQ2_0 => 37,
            GgmlType::MXFP4 => 38,
            _ => return None,
        })
    };
    let count = |ty: &GgmlType| types.iter().filter(|other| *other == ty).count();
    let matrices = types.iter().filter(|ty| **ty != GgmlType::F32);
    let most = matrices
        .max_by_key(|ty| count(ty))
        .unwrap_or(&GgmlType::F32);
    if let Some(number) = number(most) {
        put(kv, "general.file_type", OwnedValue::U32(number));
    }
}

/// A byte-pair tokenizer, as GPT-2 and its heirs have it; of others it is said that they are not written.
fn tokenizer(
    root: Option<&Path>,
    config: &Map<String, Value>,
    kv: &mut Kv,
    notes: &mut Vec<String>,
) {
    /// Vocabularies of a million entries are below it.
    const MOST: u64 = 256 << 20;
    let path = root.map(|root| root.join("tokenizer.json"));
    let there = path.filter(|path| std::fs::metadata(path).is_ok_and(|found| found.len() <= MOST));
    let Some(path) = there else {
        notes.push(
            "the tokenizer is not written: no tokenizer.json beside the checkpoint".to_owned(),
        );
        return;
    };
    let parsed = std::fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    let Some(found) = parsed
        .as_ref()
        .and_then(|parsed| byte_pairs(parsed, config))
    else {
        notes.push(
            "the tokenizer is not written: tokenizer.json has no byte-level pairs".to_owned(),
        );
        return;
    };
    kv.extend(found);
    for (key, to) in [
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ] {
        let value = config.get(key);
        let value = value.and_then(|v| v.as_u64().or_else(|| v.get(0)?.as_u64()));
        if let Some(id) = value.and_then(|id| u32::try_from(id).ok()) {
            put(kv, &format!("tokenizer.ggml.{to}"), OwnedValue::U32(id));
        }
    }
    notes.push(
        "tokenizer.ggml.pre says \"default\": which splitting a model has is known by name only; give it".to_owned(),
    );
}

/// Tokens by number, what they are, and merges.
fn byte_pairs(parsed: &Value, config: &Map<String, Value>) -> Option<Kv> {
    /// What tokens are: text, control, named by the user, and not used.
    const KINDS: [i32; 4] = [1, 3, 4, 5];
    let model = parsed.get("model")?;
    let level = parsed
        .get("decoder")
        .and_then(|decoder| decoder.get("type"))
        .and_then(Value::as_str);
    if model.get("type").and_then(Value::as_str)? != "BPE" || level != Some("ByteLevel") {
        return None;
    }
    let vocabulary = model.get("vocab")?.as_object()?;
    let added = parsed.get("added_tokens").and_then(Value::as_array);
    let ids = vocabulary.values().filter_map(Value::as_u64);
    let more = added
        .into_iter()
        .flatten()
        .filter_map(|token| token.get("id")?.as_u64());
    let said = config
        .get("vocab_size")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    let count = ids.chain(more).max()?.saturating_add(1).max(said);
    // A number that nothing has asks for no room.
    if count > 4 * (vocabulary.len() as u64 + 4096) {
        return None;
    }
    let mut tokens: Vec<(String, i32)> = (0..count)
        .map(|id| (format!("[PAD{id}]"), KINDS[3]))
        .collect();
    for (token, id) in vocabulary {
        *tokens.get_mut(usize::try_from(id.as_u64()?).ok()?)? = (token.clone(), KINDS[0]);
    }
    for token in added.into_iter().flatten() {
        let id = usize::try_from(token.get("id")?.as_u64()?).ok()?;
        let special = token
            .get("special")
            .and_then(Value::as_bool)
            .unwrap_or(false);
        let kind = if special { KINDS[1] } else { KINDS[2] };
        *tokens.get_mut(id)? = (token.get("content")?.as_str()?.to_owned(), kind);
    }
    let merges: Option<Vec<OwnedValue>> = model
        .get("merges")?
        .as_array()?
        .iter()
        .map(|merge| match merge {
            Value::String(pair) => Some(text(pair)),
            Value::Array(pair) => {
                let (a, b) = (pair.first()?.as_str()?, pair.get(1)?.as_str()?);
                Some(text(&format!("{a} {b}")))
            }
            _ => None,
        })
        .collect();
    let kinds = tokens
        .iter()
        .map(|(_, kind)| OwnedValue::I32(*kind))
        .collect();
    let words = tokens.iter().map(|(token, _)| text(token)).collect();
    let key = |key: &str| format!("tokenizer.ggml.{key}");
    Some(vec![
        (key("model"), text("gpt2")),
        (key("pre"), text("default")),
        (key("tokens"), OwnedValue::Array(ValueType::String, words)),
        (key("token_type"), OwnedValue::Array(ValueType::I32, kinds)),
        (key("merges"), OwnedValue::Array(ValueType::String, merges?)),
    ])
}
