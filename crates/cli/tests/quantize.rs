//! `quantize`, and `convert --type`.

mod common;

use std::fs;

use common::{expect, expect_json, text};
use tonnage::{Checkpoint, Dtype, Save, TensorData, save};

#[test]
fn a_model_is_quantised_and_exported() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let values: Vec<u8> = (0..64 * 64)
        .flat_map(|i| ((i % 97) as f32 - 48.0).to_le_bytes())
        .collect();
    let tensor = |name, shape, data| TensorData {
        name,
        dtype: Dtype::F32,
        shape,
        data,
    };
    let tensors = [
        tensor(
            "model.layers.0.self_attn.q_proj.weight",
            &[64, 64][..],
            &values[..],
        ),
        tensor("model.layers.0.mlp.up_proj.weight", &[64, 64], &values),
        tensor("model.norm.weight", &[64], &values[..256]),
    ];
    let (model, out) = (root.join("model"), root.join("out"));
    save(&tensors, &model, &Save::default()).unwrap();
    let config = r#"{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}"#;
    fs::write(model.join("config.json"), config).unwrap();

    let (from, to) = (text(&model), text(&out));
    let said = expect(0, &["quantize", from, to, "--scheme", "awq:group=32"]);
    assert!(said.contains("3 tensors in 1 file"), "{said}");
    let made = Checkpoint::open(&out).unwrap();
    assert!(made.get("model.layers.0.mlp.up_proj.qzeros").is_some());
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains("\"awq\""), "{config}");
    // Only what was chosen; and what is there is replaced only when it is asked for.
    let args = [
        "quantize",
        from,
        to,
        "--scheme",
        "gptq",
        "--select",
        "*.q_proj.*",
    ];
    expect(2, &args);
    expect(0, &[&args[..], &["--force"]].concat());
    let made = Checkpoint::open(&out).unwrap();
    assert!(made.get("model.layers.0.mlp.up_proj.weight").is_some());
    let free = root.join("x");
    for scheme in ["nothing", "gptq:bits=9000", "awq:what=1"] {
        expect(2, &["quantize", from, text(&free), "--scheme", scheme]);
    }

    let gguf = root.join("model.gguf");
    let to = text(&gguf);
    let said = expect_json(
        0,
        &[
            "convert",
            from,
            to,
            "--type",
            "q4_k",
            "--type",
            "*up_proj*=q8_0",
            "--kv",
            "llama.vocab_size=7",
        ],
    );
    let notes = said["notes"].to_string();
    assert!(notes.contains("blk.0.attn_q.weight is Q5_0"), "{notes}");
    assert!(notes.contains("tokenizer"), "{notes}");
    let made = Checkpoint::open(&gguf).unwrap();
    let files = made.gguf().unwrap();
    assert_eq!(files.get("blk.0.ffn_up.weight").unwrap().ty.name(), "Q8_0");
    assert_eq!(files.value("llama.vocab_size").unwrap().as_u64(), Some(7));
    expect(2, &["convert", from, text(&free), "--type", "q4_k"]);
    expect(0, &["quantize", from, to, "--scheme", "q8_0", "--force"]);

    // From scheme to scheme: by what the file says, or what the caller says of it.
    let (ct, awq) = (root.join("ct"), root.join("awq"));
    let said = expect(0, &["convert", to, text(&ct), "--to", "ct-pack"]);
    assert!(said.contains("tensors in 1 file"), "{said}");
    let made = Checkpoint::open(&ct).unwrap();
    assert!(made.get("blk.0.ffn_up.weight_packed").is_some());
    expect(
        0,
        &["quantize", from, text(&awq), "--scheme", "awq:group=32"],
    );
    let meaning = r#"{"*_proj.weight": {"preset": "awq-gemm", "params": {"group": 32}}}"#;
    let marlin = root.join("marlin");
    let args = [
        "convert",
        text(&awq),
        text(&marlin),
        "--to",
        "marlin",
        "--from",
        meaning,
    ];
    let said = expect(2, &args);
    assert!(
        said.contains("can't become marlin without a loss"),
        "{said}"
    );
    let said = expect_json(0, &[&args[..], &["--lossy"]].concat());
    assert!(
        said["notes"].to_string().contains("of 4096 values changed"),
        "{said}"
    );
}
