//! The metadata key `quant.map`: what is written is read back as it was, patterns keep it small, and a stranger's text
//! gives an error and nothing else.
#![allow(
    clippy::disallowed_methods,
    reason = "the corpus is files; the room's own code reads none"
)]

mod recognised;

use recognised::cases;
use tonnage_format::Dtype;
use tonnage_quant::Reason;
use tonnage_quant::map::{Policy, QTensor, QuantMap};
use tonnage_quant::scheme::Part;

fn bare(map: &QuantMap) -> Vec<QTensor> {
    let bare = |tensor: &QTensor| QTensor {
        evidence: Vec::new(),
        ..tensor.clone()
    };
    map.tensors().map(bare).collect()
}

fn part(name: String, dtype: Dtype, shape: &[u64]) -> Part {
    Part {
        name,
        dtype,
        shape: shape.to_vec(),
    }
}

#[test]
fn what_is_written_of_every_checkpoint_of_the_corpus_is_read_back() {
    for case in cases() {
        let map = case.detect(Policy::Lenient).unwrap();
        let rows = case.model.parts();
        let text = map.to_json(&rows).unwrap();
        let mut sniff = |name: &str, range| case.model.sniff(name, range);
        let again = QuantMap::parse(&text, &rows, &mut sniff).unwrap();
        assert!(
            again.refused.is_empty(),
            "{}: {:?}",
            case.path,
            again.refused
        );
        assert_eq!(bare(&again), bare(&map), "{}: {text}", case.path);
        assert_eq!(again.to_json(&rows).unwrap(), text);
    }
}

#[test]
fn forty_thousand_modules_take_some_hundred_bytes() {
    let mut rows = Vec::new();
    for layer in 0..58 {
        for expert in 0..256 {
            for which in ["gate", "up", "down"] {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.{which}_proj");
                rows.push(part(format!("{name}.weight"), Dtype::F8_E4M3, &[256, 128]));
                let scales = format!("{name}.weight_scale_inv");
                rows.push(part(scales, Dtype::F32, &[2, 1]));
            }
        }
    }
    let map = r#"{"v":1,"schemes":{"f":{"preset":"fp8-block@1","block":[128,128]}},
        "tensors":[{"m":"model.layers.{}.mlp.experts.{}.{}_proj","s":"f"}]}"#;
    let mut nothing = |_: &str, _| None;
    let map = QuantMap::parse(map, &rows, &mut nothing).unwrap();
    assert_eq!((map.len(), map.refused.len()), (44_544, 0));
    let text = map.to_json(&rows).unwrap();
    assert!(text.len() < 600, "{text}");
    let again = QuantMap::parse(&text, &rows, &mut nothing).unwrap();
    assert!(again.refused.is_empty() && bare(&again) == bare(&map));
}

#[test]
fn a_strangers_text_is_refused_and_says_why() {
    let read = |text: &str| QuantMap::parse(text, &[], &mut |_: &str, _| None);
    let wrong = [
        ("{", "EOF"),
        ("{}", "no version"),
        (r#"{"v":1}"#, "schemes"),
        (
            r#"{"v":1,"schemes":{},"tensors":[{"m":"a","s":"x"}]}"#,
            "no scheme",
        ),
        (
            r#"{"v":1,"schemes":{"a":{"preset":"gptq@1","bits":4.0}},"tensors":[]}"#,
            "float",
        ),
        (
            r#"{"v":1,"schemes":{"a":{"preset":"x"},"a":{"preset":"x"}},"tensors":[]}"#,
            "twice",
        ),
        (
            r#"{"v":1,"schemes":{"a":{"preset":"gptq@1"}},"tensors":[{"m":"a","s":"a","colperm":1}]}"#,
            "colperm",
        ),
    ];
    for (text, why) in wrong {
        let error = read(text).unwrap_err();
        assert!(error.to_string().contains(why), "{text}: {error}");
    }
    assert_eq!(
        read(r#"{"v":2,"x":0.5}"#).unwrap_err().reason,
        Reason::Unsupported
    );
    let deep = format!("{{\"v\":1,\"schemes\":{}", "[".repeat(100_000));
    assert!(read(&deep).is_err());
}
