//! Files that libraries wrote, from scheme to scheme and back.
#![allow(
    clippy::disallowed_methods,
    reason = "the corpus is files; the room's own code reads none"
)]

mod support;

use support::{Case, bits, cases, round_trip, target};
use tonnage_quant::Reason;
use tonnage_quant::descriptor::Role;
use tonnage_quant::packed::Packed;
use tonnage_quant::repack::{How, repack};
use tonnage_quant::target::Target;

#[test]
fn files_of_libraries_go_round() {
    let mut seen = 0;
    let mut all = |scheme: &str, preset: &str, more: &[(&str, &str)], there: &[(&str, &str)]| {
        for case in cases(scheme, preset, more) {
            for (to, back) in there {
                // What is refused is refused for a reason that the next test looks at.
                let Ok((made, report)) = repack(&case.packed, &target(to), false) else {
                    continue;
                };
                seen += 1;
                let difference = case.packed.difference(&made).unwrap();
                assert_eq!(difference.changed, 0, "{} to {to}: {report:?}", case.path);
                let mut home = target(back);
                home.bits = bits(&case.packed);
                home.scale = case
                    .packed
                    .tensor
                    .parts
                    .get(&Role::Scale)
                    .map(|part| part.dtype);
                let (again, _) = repack(&made, &home, false)
                    .unwrap_or_else(|e| panic!("{} {to} to {back}: {e}", case.path));
                for role in [Role::Codes, Role::Scale, Role::Zero, Role::GroupIndex] {
                    let (was, is) = (case.packed.bytes.get(&role), again.bytes.get(&role));
                    if was.is_some() {
                        assert!(
                            was == is,
                            "{} by {to} to {back}: {role:?} differs",
                            case.path
                        );
                    }
                }
            }
        }
    };
    let word = [("zero_wrap", "word32")];
    all(
        "gptq",
        "gptq",
        &word,
        &[
            ("gptq-v2", "gptq:zero_wrap=word32"),
            ("awq", "gptq:zero_wrap=word32"),
            ("ct-pack", "gptq:zero_wrap=word32"),
            ("marlin", "gptq:zero_wrap=word32"),
            ("mlx", "gptq:zero_wrap=word32"),
        ],
    );
    all(
        "gptq-v2",
        "gptq-v2",
        &[],
        &[
            ("gptq", "gptq-v2"),
            ("gptq-planar", "gptq-v2"),
            ("ct-pack", "gptq-v2"),
            ("awq-gemv", "gptq-v2"),
        ],
    );
    all(
        "gptq-planar",
        "gptq-planar",
        &[],
        &[("ct-pack", "gptq-planar"), ("gptq", "gptq-planar")],
    );
    all(
        "awq-gemm",
        "awq-gemm",
        &[],
        &[
            ("awq-gemv", "awq"),
            ("awq-gemv-fast", "awq"),
            ("gptq-v2", "awq"),
            ("mlx", "awq"),
            ("ct-pack", "awq"),
        ],
    );
    all(
        "awq-gemv",
        "awq-gemv",
        &[],
        &[("awq", "awq-gemv"), ("awq-gemv-fast", "awq-gemv")],
    );
    all(
        "awq-gemv-fast",
        "awq-gemv-fast",
        &[],
        &[("awq", "awq-gemv-fast"), ("awq-gemv", "awq-gemv-fast")],
    );
    all(
        "marlin",
        "marlin",
        &[],
        &[
            ("gptq-v2", "marlin"),
            ("ct-pack", "marlin"),
            ("mlx", "marlin"),
        ],
    );
    for scheme in ["ct-pack-dense", "ct-pack-word"] {
        let back = Target::parse(scheme).unwrap().name();
        all(
            scheme,
            scheme,
            &[],
            &[
                ("ct-pack", back),
                ("ct-pack-word", back),
                ("gptq-v2", back),
                ("gptq-planar", back),
                ("ct-int", back),
                ("mlx", back),
            ],
        );
    }
    all(
        "nvfp4-mul",
        "nvfp4-mul",
        &[],
        &[("nvfp4-torchao", "nvfp4"), ("ggml/NVFP4", "nvfp4")],
    );
    all(
        "torchao-nvfp4",
        "nvfp4-mul",
        &[("scale_layout", "swizzle_128x4")],
        &[("nvfp4", "nvfp4-torchao")],
    );
    all(
        "mxfp4",
        "mxfp4",
        &[],
        &[
            ("mxfp4", "mxfp4-gpt-oss"),
            ("mxfp4-mlx", "mxfp4-gpt-oss"),
            ("ggml/MXFP4", "mxfp4-gpt-oss"),
        ],
    );
    all(
        "deepseek-fp4",
        "mxfp4",
        &[],
        &[
            ("mxfp4-gpt-oss", "mxfp4-deepseek"),
            ("ggml/MXFP4", "mxfp4-deepseek"),
        ],
    );
    assert!(seen >= 100, "{seen}");
}

#[test]
fn groups_in_another_order_stay_where_they_can_be_said() {
    for case in cases("gptq", "gptq", &[("zero_wrap", "word32")]) {
        if !case.path.contains("actorder") {
            continue;
        }
        let scales = &case.packed.tensor.parts[&Role::Scale];
        for to in ["awq", "marlin", "q4_0", "mlx"] {
            match repack(&case.packed, &target(to), false) {
                // One group is in order whatever the index says.
                Ok(_) => assert_eq!(scales.shape[0], 1, "{} to {to}", case.path),
                Err(error) if case.path.contains("w4") && scales.shape[0] > 1 => {
                    assert!(
                        error.text.contains("g_idx"),
                        "{} to {to}: {error}",
                        case.path
                    );
                }
                Err(_) => {}
            }
        }
        round_trip(
            &case.packed,
            "ct-pack",
            "gptq:zero_wrap=word32",
            How::Rearranged,
        );
    }
}

#[test]
fn nested_scales_are_taken_apart() {
    let mut nested = 0;
    for (path, params) in support::nested() {
        let packed = params;
        let (flat, report) = repack(&packed, &target("bnb4"), false).unwrap();
        assert_eq!(
            (report.how, report.difference.changed),
            (How::SameValues, 0),
            "{path}"
        );
        assert!(!flat.bytes.contains_key(&Role::NestedScale));
        assert!(!String::from_utf8_lossy(&flat.bytes[&Role::State]).contains("nested"));
        nested += 1;
    }
    assert!(nested >= 4, "{nested}");
}

#[test]
fn files_of_a_wrong_case_are_no_case() {
    let case: Case = cases("marlin", "marlin", &[]).remove(0);
    let mut less = case.packed.clone();
    less.bytes.remove(&Role::Scale);
    assert_eq!(
        repack(&less, &target("awq"), false).unwrap_err().reason,
        Reason::Missing
    );
    assert!(Packed::new(case.packed.tensor.clone(), less.bytes).is_err());
    for text in [
        "nothing",
        "gptq:bits=x",
        "gptq:what=1",
        "fp8-block:block=0x4",
        "q8_1",
        "f32",
    ] {
        assert!(Target::parse(text).is_err(), "{text}");
    }
}
