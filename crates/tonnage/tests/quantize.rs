//! Whole checkpoints quantised, converted, and exported to GGUF.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tonnage::gguf::{Export, GgmlType, OwnedValue, export, names};
use tonnage::quant::{self, How, Target};
use tonnage::{Checkpoint, Dtype, Save, TensorData, save};

/// A llama of one layer: 64 wide, 4 heads of queries and 2 of keys.
fn model(root: &Path) -> Checkpoint {
    let mut state = 7_u64;
    let mut number = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.1
    };
    let rows = [
        ("model.embed_tokens.weight", vec![128_u64, 64]),
        ("model.layers.0.self_attn.q_proj.weight", vec![64, 64]),
        ("model.layers.0.self_attn.k_proj.weight", vec![32, 64]),
        ("model.layers.0.self_attn.v_proj.weight", vec![32, 64]),
        ("model.layers.0.self_attn.o_proj.weight", vec![64, 64]),
        ("model.layers.0.mlp.gate_proj.weight", vec![256, 64]),
        ("model.layers.0.mlp.up_proj.weight", vec![256, 64]),
        ("model.layers.0.mlp.down_proj.weight", vec![64, 256]),
        ("model.layers.0.input_layernorm.weight", vec![64]),
        ("model.layers.0.post_attention_layernorm.weight", vec![64]),
        ("model.norm.weight", vec![64]),
        ("lm_head.weight", vec![128, 64]),
    ];
    let data: Vec<Vec<u8>> = rows
        .iter()
        .map(|(_, shape)| {
            let count = shape.iter().product::<u64>();
            (0..count).flat_map(|_| number().to_le_bytes()).collect()
        })
        .collect();
    let tensors: Vec<TensorData<'_>> = rows
        .iter()
        .zip(&data)
        .map(|((name, shape), data)| TensorData {
            name,
            dtype: Dtype::F32,
            shape,
            data,
        })
        .collect();
    save(&tensors, root, &Save::default()).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 128, "torch_dtype": "float32",
    });
    fs::write(root.join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(root).unwrap()
}

fn target(text: &str) -> Target {
    Target::parse(text).unwrap()
}

fn hidden(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_checkpoint_is_quantised_with_its_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let checkpoint = model(&root.join("model"));
    for (text, codes, method) in [
        ("gptq:group=32", "qweight", "gptq"),
        ("awq:group=32", "qweight", "awq"),
        (
            "ct-pack:group=32,symmetric=false",
            "weight_packed",
            "compressed-tensors",
        ),
        ("fp8-block", "weight", "fp8"),
        ("mlx", "weight", ""),
        ("nvfp4", "weight", "modelopt"),
        ("bnb4", "weight", "bitsandbytes"),
    ] {
        let out = root.join(text.replace([':', ',', '='], "-"));
        let rules = quant::rules(&target(text), &[]);
        let made = quant::quantize(&checkpoint, &rules, &out, &Save::default()).unwrap();
        assert_eq!(made.tensors.len(), 7, "{text}: {:?}", made.tensors);
        let again = Checkpoint::open(&out).unwrap();
        let part = format!("model.layers.0.mlp.up_proj.{codes}");
        assert!(
            again.get(&part).is_some(),
            "{text}: {:?}",
            again.names().collect::<Vec<_>>()
        );
        // What was not chosen is as it was.
        for name in [
            "model.norm.weight",
            "lm_head.weight",
            "model.embed_tokens.weight",
        ] {
            assert_eq!(again.read(name).unwrap(), checkpoint.read(name).unwrap());
        }
        let map: Value = serde_json::from_str(&again.metadata()["quant.map"]).unwrap();
        assert_eq!(map["v"], 1);
        let config: Value =
            serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        let said = &config["quantization_config"];
        if text == "mlx" {
            assert_eq!(
                config["quantization"],
                json!({"group_size": 64, "bits": 4, "mode": "affine"})
            );
        } else {
            assert_eq!(said["quant_method"], method, "{config}");
        }
        if text.starts_with("gptq") {
            assert_eq!(
                (&said["group_size"], &said["sym"]),
                (&json!(32), &json!(true))
            );
        }
        if text.starts_with("awq") {
            assert_eq!(said["modules_to_not_convert"], json!(["lm_head"]));
        }
        if text.starts_with("ct") {
            let weights = &said["config_groups"]["group_0"]["weights"];
            assert_eq!(
                (&weights["strategy"], &weights["symmetric"]),
                (&json!("group"), &json!(false))
            );
        }
        assert_eq!(config["hidden_size"], 64);
    }
    assert_eq!(hidden(root), [""; 0]);
    // What can't be quantised is refused where it is named, and the old files stay.
    let rules = vec![("model.norm.weight".to_owned(), Some(target("awq")))];
    let error =
        quant::quantize(&checkpoint, &rules, root.join("no"), &Save::default()).unwrap_err();
    assert_eq!(
        (error.code(), error.tensor()),
        ("QUANT_UNSUPPORTED", Some("model.norm.weight"))
    );
    let nothing = quant::rules(&target("awq"), &["*.nothing".to_owned()]);
    let error =
        quant::quantize(&checkpoint, &nothing, root.join("no"), &Save::default()).unwrap_err();
    assert_eq!(error.code(), "QUANT_NOTHING");
    assert!(!root.join("no").join("model.safetensors").exists());
}

#[test]
fn a_quantised_checkpoint_is_converted_and_losses_are_refused() {
    use tonnage_quant::map::{QTensor, QuantMap};
    use tonnage_quant::scheme::{Param, Params, Part, Parts, Scheme};

    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let checkpoint = model(&root.join("model"));
    let rules = quant::rules(&target("awq:group=32,scale=F16"), &[]);
    let made = quant::quantize(&checkpoint, &rules, root.join("awq"), &Save::default()).unwrap();
    let awq = Checkpoint::open(root.join("awq")).unwrap();
    let mut map = QuantMap::default();
    for name in &made.tensors {
        let scheme = Scheme::find("awq-gemm@1").unwrap();
        let module = name.strip_suffix(".weight").unwrap();
        let mut parts = Parts::new();
        for row in scheme.parts {
            let name = format!("{module}.{}", row.suffixes[0]);
            let found = awq.tensor(&name).unwrap();
            let (dtype, shape) = (found.dtype().unwrap(), found.shape().to_vec());
            parts.insert(row.role, Part { name, dtype, shape });
        }
        let params = Params::of([("group", Param::Int(32))]);
        map.insert(QTensor::preset_of(name, scheme, params, parts).unwrap())
            .unwrap();
    }
    let there = root.join("ct");
    let done = quant::repack(
        &awq,
        &map,
        &target("ct-pack"),
        false,
        &there,
        &Save::default(),
    )
    .unwrap();
    assert_eq!(done.reports.len(), 7);
    assert!(
        done.reports
            .iter()
            .all(|(_, report)| report.how == How::Rearranged)
    );
    let config: Value =
        serde_json::from_slice(&fs::read(there.join("config.json")).unwrap()).unwrap();
    let weights = &config["quantization_config"]["config_groups"]["group_0"]["weights"];
    assert_eq!(
        (&weights["num_bits"], &weights["group_size"]),
        (&json!(4), &json!(32))
    );
    let ct = Checkpoint::open(&there).unwrap();
    assert!(ct.get("model.layers.0.mlp.up_proj.qweight").is_none());
    let error = quant::repack(
        &awq,
        &map,
        &target("marlin"),
        false,
        root.join("m"),
        &Save::default(),
    )
    .unwrap_err();
    assert_eq!(error.code(), "QUANT_LOSSY");
    assert!(
        error
            .to_string()
            .contains("zero points are not in the middle"),
        "{error}"
    );
    assert!(!root.join("m").join("model.safetensors").exists());
    let error = quant::repack(
        &awq,
        &QuantMap::default(),
        &target("marlin"),
        true,
        root.join("m"),
        &Save::default(),
    );
    assert_eq!(error.unwrap_err().code(), "QUANT_NOTHING");
    assert_eq!(hidden(root), [""; 0]);
}

#[test]
fn a_model_becomes_a_gguf_file_with_chosen_types() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let checkpoint = model(&root.join("tiny"));
    let how = Export {
        types: vec![
            ("*ffn_down*".to_owned(), GgmlType::Q6_K),
            ("*.embed_tokens.weight".to_owned(), GgmlType::Q8_0),
            ("*.o_proj.weight".to_owned(), GgmlType::Q4_K),
        ],
        default: Some(GgmlType::F32),
        kv: vec![(
            "tokenizer.ggml.pre".to_owned(),
            OwnedValue::String(b"llama-bpe".to_vec()),
        )],
        keep_names: false,
    };
    let out = root.join("tiny.gguf");
    let made = export(&checkpoint, &out, &how, &Save::default()).unwrap();
    assert!(
        made.notes
            .iter()
            .any(|note| note.contains("blk.0.attn_output.weight is Q5_0")),
        "{:?}",
        made.notes
    );
    assert!(
        made.notes
            .iter()
            .any(|note| note.contains("no tokenizer.json"))
    );
    let gguf = Checkpoint::open(&out).unwrap();
    let files = gguf.gguf().unwrap();
    assert_eq!(
        files.value("general.architecture").unwrap().as_str(),
        Some("llama")
    );
    assert_eq!(
        files.value("tokenizer.ggml.pre").unwrap().as_str(),
        Some("llama-bpe")
    );
    assert_eq!(
        files.get("blk.0.ffn_down.weight").unwrap().ty,
        GgmlType::Q6_K
    );
    assert_eq!(files.get("token_embd.weight").unwrap().ty, GgmlType::Q8_0);
    assert_eq!(files.get("output_norm.weight").unwrap().logical_shape, [64]);
    // Blocks are what ggml makes of the values.
    let values: Vec<f32> = checkpoint
        .read("model.layers.0.mlp.down_proj.weight")
        .unwrap()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|four| f32::from_le_bytes(*four))
        .collect();
    let mut blocks = vec![0; 64 * 210];
    tonnage_quant::ggml::quantize(GgmlType::Q6_K, &values, &mut blocks).unwrap();
    assert_eq!(gguf.read("blk.0.ffn_down.weight").unwrap(), blocks);
    // Rows of queries and keys are in llama.cpp's order, the others as they were.
    for (there, here, heads) in [("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)] {
        let was = checkpoint
            .read(&format!("model.layers.0.self_attn.{here}.weight"))
            .unwrap();
        let is = gguf.read(&format!("blk.0.{there}.weight")).unwrap();
        let rows = was.len() as u64 / 256;
        for (row, bytes) in was.chunks(256).enumerate() {
            let at = names::rope_row(row as u64, rows, heads).unwrap() as usize;
            assert_eq!(&is[at * 256..at * 256 + 256], bytes, "{there} {row}");
        }
    }
    let v = checkpoint
        .read("model.layers.0.self_attn.v_proj.weight")
        .unwrap();
    assert_eq!(gguf.read("blk.0.attn_v.weight").unwrap(), v);
    assert_eq!(hidden(root), [""; 0]);

    fs::write(
        root.join("tiny").join("config.json"),
        r#"{"model_type": "mamba9"}"#,
    )
    .unwrap();
    let error = export(&checkpoint, &out, &how, &Save::default()).unwrap_err();
    assert_eq!(error.code(), "GGUF_EXPORT");
    assert!(error.to_string().contains("mamba9"), "{error}");
    let keep = Export {
        keep_names: true,
        ..how
    };
    export(&checkpoint, root.join("kept.gguf"), &keep, &Save::default()).unwrap();
    let kept = Checkpoint::open(root.join("kept.gguf")).unwrap();
    assert!(kept.get("model.layers.0.self_attn.q_proj.weight").is_some());
}
