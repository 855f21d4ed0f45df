//! What the ecosystem's configurations say of a quantised checkpoint.

use std::path::Path;

use serde_json::{Map, Value, json};
use tonnage_quant::descriptor::Float;
use tonnage_quant::target::{Form, Target, To};
use tonnage_storage as storage;

use crate::error::{Error, Result};

/// What is said of all tensors of a form.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub bits: i64,
    /// Columns of a group, -1 for a row.
    pub group: i64,
    pub symmetric: bool,
    pub dtype: Float,
    /// Modules that are not quantised.
    pub ignore: Vec<String>,
}

/// The `quantization_config` of a form, where a library reads one.
pub(crate) fn quantization_config(target: &Target, said: &Said) -> Option<Value> {
    let To::Form(form) = target.to else {
        return None;
    };
    let Said {
        bits,
        group,
        symmetric,
        ignore,
        ..
    } = said;
    Some(match form.name {
        "gptq" | "gptq-v2" | "gptq-planar" | "marlin" => json!({
            "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": false,
            "checkpoint_format": match form.name {
                "gptq-v2" => "gptq_v2",
                "gptq-planar" => "gptq_p",
                "marlin" => "marlin",
                _ => "gptq",
            },
            "is_marlin_format": form.name == "marlin", "modules_in_block_to_quantize": null,
        }),
        "awq" | "awq-gemv" | "awq-gemv-fast" => json!({
            "quant_method": "awq", "bits": bits, "group_size": group, "zero_point": true,
            "version": match form.name {
                "awq" => "gemm",
                "awq-gemv" => "gemv",
                _ => "gemv_fast",
            },
            "modules_to_not_convert": ignore,
        }),
        "fp8-block" => {
            let [rows, columns] = target.block.unwrap_or([128, 128]);
            json!({
                "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                "weight_block_size": [rows, columns], "modules_to_not_convert": ignore,
            })
        }
        "nvfp4" => json!({
            "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ignore,
            "producer": {"name": "modelopt"},
        }),
        "mxfp4-gpt-oss" => json!({"quant_method": "mxfp4", "modules_to_not_convert": ignore}),
        "bnb4" => json!({
            "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false,
            "bnb_4bit_compute_dtype": match said.dtype {
                Float::F32 => "float32",
                Float::F16 => "float16",
                Float::Bf16 => "bfloat16",
            },
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ignore,
        }),
        "mlx" | "mxfp4-mlx" | "mxfp8-mlx" => json!({
            "group_size": group, "bits": bits,
            "mode": match form.name {
                "mlx" => "affine",
                "mxfp4-mlx" => "mxfp4",
                _ => "mxfp8",
            },
        }),
        _ => return compressed_tensors(form, said),
    })
}

fn compressed_tensors(form: &Form, said: &Said) -> Option<Value> {
    let (format, kind) = match form.name {
        "ct-pack" | "ct-pack-word" => ("pack-quantized", "int"),
        "ct-int" => ("int-quantized", "int"),
        "fp8-tensor" | "fp8-row" => ("float-quantized", "float"),
        "mxfp4" => ("mxfp4-pack-quantized", "float"),
        "mxfp6" => ("mxfp6-pack-quantized", "float"),
        "mxfp8" => ("mxfp8-quantized", "float"),
        "nvfp4-ct" => ("nvfp4-pack-quantized", "float"),
        _ => return None,
    };
    // The same format name means words of whole codes before 0.18, and a stream of bits since.
    let version = if form.name == "ct-pack-word" {
        "0.17.1"
    } else {
        "0.20.0"
    };
    let strategy = match (form.name, said.group) {
        ("fp8-tensor", _) => "tensor",
        ("nvfp4-ct", _) => "tensor_group",
        ("fp8-row", _) | (_, -1) => "channel",
        _ => "group",
    };
    let mut weights = json!({
        "num_bits": said.bits, "type": kind, "symmetric": said.symmetric, "strategy": strategy,
        "dynamic": false, "group_size": (said.group > 0 && strategy.ends_with("group")).then_some(said.group),
    });
    if form.name.starts_with("mx") {
        weights["scale_dtype"] = json!("torch.uint8");
    }
    Some(json!({
        "quant_method": "compressed-tensors", "format": format, "version": version,
        "quantization_status": "compressed", "kv_cache_scheme": null, "global_compression_ratio": null,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": said.ignore,
    }))
}

/// Whether MLX reads the configuration, which has a key of its own there.
pub(crate) fn is_mlx(target: &Target) -> bool {
    matches!(target.to, To::Form(form) if form.scheme == "mlx-affine@1" || form.name.ends_with("-mlx"))
}

/// The configuration beside a checkpoint, if there is one that can be read.
pub(crate) fn read(root: Option<&Path>) -> Result<Option<Map<String, Value>>> {
    /// A configuration is small.
    const MOST: u64 = 16 << 20;
    let Some(path) = root.map(|root| root.join("config.json")) else {
        return Ok(None);
    };
    let failed = |e| Error::from(storage::Error::at("read", &path, e));
    match std::fs::metadata(&path) {
        Ok(found) if found.is_file() && found.len() <= MOST => {}
        _ => return Ok(None),
    }
    let text = std::fs::read(&path).map_err(failed)?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        _ => Err(Error::usage(
            "CONFIG",
            format!("{} is no JSON object", path.display()),
        )),
    }
}

/// Writes a configuration into a folder: whole or not at all.
pub(crate) fn write(
    folder: &Path,
    mut config: Map<String, Value>,
    said: Option<Value>,
    mlx: bool,
) -> Result<std::path::PathBuf> {
    for key in ["quantization_config", "quantization", "compression_config"] {
        config.remove(key);
    }
    if let Some(said) = said {
        if mlx {
            config.insert("quantization".to_owned(), said.clone());
        }
        config.insert("quantization_config".to_owned(), said);
    }
    let path = folder.join("config.json");
    let text = serde_json::to_vec_pretty(&Value::Object(config))
        .map_err(|e| Error::usage("CONFIG", e.to_string()))?;
    let file = storage::AtomicFile::create(&path, &storage::AtomicOptions::default())?;
    storage::Sink::write_all_at(&file, 0, &text)?;
    file.stage()?.commit()?;
    Ok(path)
}
