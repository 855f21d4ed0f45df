//! Rounding to nearest: against what libraries made of the same values, and against what nearest means.
#![allow(
    clippy::disallowed_methods,
    reason = "the corpus is files; the room's own code reads none"
)]

use std::fs;
use std::path::Path;

use tonnage_format::{Header, ReadOptions};
use tonnage_quant::Reason;
use tonnage_quant::descriptor::{Float, Role};
use tonnage_quant::numbers::{e4m3fn_to_f32, e8m0_to_f32, f16_to_f32};
use tonnage_quant::packed::Packed;
use tonnage_quant::quantize::quantize;
use tonnage_quant::target::{FORMS, Target};

fn target(text: &str) -> Target {
    Target::parse(text).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let fours = bytes.as_chunks::<4>().0;
    fours.iter().map(|four| f32::from_le_bytes(*four)).collect()
}

/// The tensors that a library made.
struct File {
    header: Header,
    bytes: Vec<u8>,
}

impl File {
    fn open(library: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/quant/rounded");
        let bytes = fs::read(path.join(format!("{library}.safetensors"))).unwrap();
        let len = Some(bytes.len() as u64);
        let header = Header::parse(bytes.clone(), len, &ReadOptions::strict()).unwrap();
        File { header, bytes }
    }

    fn get(&self, name: &str) -> Option<&[u8]> {
        let info = self.header.get(name)?;
        let start = (self.header.data_start() + info.begin) as usize;
        Some(&self.bytes[start..start + info.byte_len() as usize])
    }

    /// The library's parts of a case are what a target makes of its values.
    fn holds(&self, case: &str, text: &str) {
        let values = floats(self.get(&format!("{case}.values")).unwrap());
        let packed = quantize("m.weight", &values, &[8, 128], Float::F32, &target(text)).unwrap();
        for (role, part) in [
            (Role::Codes, "codes"),
            (Role::Scale, "scale"),
            (Role::Zero, "zero"),
            (Role::GlobalScale, "global"),
        ] {
            let theirs = self.get(&format!("{case}.{part}"));
            let ours = packed.bytes.get(&role).map(|bytes| &bytes[..]);
            let differ = ours
                .zip(theirs)
                .map_or(0, |(a, b)| a.iter().zip(b).filter(|(a, b)| a != b).count());
            assert!(
                ours == theirs,
                "{case} as {text}: {part} differ in {differ} bytes"
            );
        }
    }
}

#[test]
fn integers_and_fp8_are_compressed_tensors() {
    let file = File::open("compressed-tensors");
    for (case, text) in [
        ("int4-g32-sym", "ct-int:bits=4,group=32"),
        ("int8-g32-sym", "ct-int:bits=8,group=32"),
        ("int4-g32-asym", "ct-int:bits=4,group=32,symmetric=false"),
        ("int8-g32-asym", "ct-int:bits=8,group=32,symmetric=false"),
        ("int8-channel-sym", "ct-int"),
        ("fp8-row", "fp8-row"),
        ("fp8-tensor", "fp8-tensor"),
    ] {
        file.holds(case, text);
    }
}

#[test]
fn microscaling_is_torchao_s() {
    let file = File::open("torchao");
    for case in ["mxfp4", "mxfp8", "nvfp4"] {
        file.holds(case, case);
    }
}

#[test]
fn affine_is_mlx_s() {
    let file = File::open("mlx");
    for bits in [2, 3, 4, 5, 6, 8] {
        for group in [32, 64] {
            file.holds(
                &format!("mlx-b{bits}-g{group}"),
                &format!("mlx:bits={bits},group={group}"),
            );
        }
    }
}

#[test]
fn nf4_is_bitsandbytes() {
    let file = File::open("bitsandbytes");
    for block in [64, 128] {
        file.holds(&format!("nf4-b{block}"), &format!("bnb4:group={block}"));
    }
}

fn values(rows: usize, columns: usize) -> Vec<f32> {
    let mut state = 3_u64;
    let one = |at: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let size = ((at / columns) % 7) as f32 - 3.0;
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * size.exp2()
    };
    (0..rows * columns).map(one).collect()
}

/// The scale of each element, by the form's own part.
fn steps(packed: &Packed, group: usize) -> Vec<f32> {
    let bytes = &packed.bytes[&Role::Scale];
    let scales: Vec<f32> = match packed.tensor.parts[&Role::Scale].dtype.bitsize() {
        32 => floats(bytes),
        16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|two| f16_to_f32(u16::from_le_bytes(*two)))
            .collect(),
        _ => bytes.iter().map(|byte| e8m0_to_f32(*byte)).collect(),
    };
    scales
        .iter()
        .flat_map(|scale| vec![*scale; group])
        .collect()
}

#[test]
fn integers_are_within_half_a_step() {
    let (rows, columns) = (64, 128);
    let values = values(rows, columns);
    for bits in 2..=8_u32 {
        for symmetric in [true, false] {
            let text = format!("ct-pack:bits={bits},group=32,scale=F32,symmetric={symmetric}");
            let shape = [rows as u64, columns as u64];
            let packed = quantize("w", &values, &shape, Float::F32, &target(&text)).unwrap();
            let (back, steps) = (packed.all_values().unwrap(), steps(&packed, 32));
            let mut worst = 0.0_f32;
            for ((value, back), step) in values.iter().zip(&back).zip(&steps) {
                worst = worst.max((value - back).abs() / step);
            }
            // A zero point that is rounded moves the ends of the range by up to half a step more.
            let most = if symmetric { 0.5 } else { 1.0 };
            assert!(worst <= most * 1.001, "{text}: {worst}");
            assert!(
                worst > 0.4,
                "{text}: {worst} is better than rounding can be"
            );
            // Values that are codes already stay as they are: the largest code of a group fixes its scale.
            let again = quantize("w", &back, &shape, Float::F32, &target(&text)).unwrap();
            let moved = back.iter().zip(again.all_values().unwrap()).zip(&steps);
            let moved = moved
                .map(|((a, b), step)| (a - b).abs() / step)
                .fold(0.0, f32::max);
            assert!(moved <= 1.001, "{text}: {moved}");
        }
    }
}

#[test]
fn floats_are_the_nearest_under_their_scale() {
    let (rows, columns) = (64, 128);
    let values = values(rows, columns);
    let shape = [rows as u64, columns as u64];
    for text in [
        "fp8-tensor",
        "fp8-row",
        "fp8-block:block=16x32",
        "mxfp8",
        "mxfp4",
        "mxfp6",
        "nvfp4",
        "nvfp4-ct",
    ] {
        let packed = quantize("w", &values, &shape, Float::F32, &target(text)).unwrap();
        let back = packed.all_values().unwrap();
        // Half of the last bit for numbers that are not subnormal: 3 bits of e4m3 and e2m3, 1 of e2m1; and what MX cuts.
        let bits = if text.contains("4") && !text.contains("8") {
            1
        } else {
            3
        };
        let most = 0.5_f32.powi(bits + 1);
        let cut = if text.starts_with("mx") { 0.26 } else { 0.07 };
        let mut large = 0;
        for (value, back) in values.iter().zip(&back) {
            let off = (value - back).abs() / value.abs().max(f32::MIN_POSITIVE);
            // Small numbers are subnormal under a large scale.
            if value.abs() > 0.25 * 8.0 {
                large += 1;
                assert!(off <= most.max(cut), "{text}: {value} is {back}");
            }
        }
        assert!(large > 500, "{large}");
        if !text.starts_with("nv") {
            let again = quantize("w", &back, &shape, Float::F32, &target(text)).unwrap();
            if text.starts_with("mx") {
                assert_eq!(
                    again.bytes, packed.bytes,
                    "{text}: codes are their own nearest"
                );
            }
        }
    }
}

#[test]
fn every_form_is_written_and_read() {
    let values = values(64, 128);
    let mut whole = 0.0_f32;
    for value in &values {
        whole += value * value;
    }
    for form in FORMS {
        for dtype in [Float::F32, Float::F16, Float::Bf16] {
            let packed = quantize(
                "m.proj.weight",
                &values,
                &[64, 128],
                dtype,
                &target(form.name),
            )
            .unwrap_or_else(|e| panic!("{}: {e}", form.name));
            assert_eq!(packed.tensor.shape, [64, 128], "{}", form.name);
            assert_eq!(packed.tensor.dtype, dtype);
            let back = packed.all_values().unwrap();
            let off: f32 = values
                .iter()
                .zip(&back)
                .map(|(a, b)| (a - b) * (a - b))
                .sum();
            // Noise is at most a fortieth of the signal, at 4 bits.
            assert!(off / whole < 0.025, "{}: {}", form.name, off / whole);
        }
    }
}

#[test]
fn zeros_and_what_has_no_code() {
    for form in FORMS {
        let packed = quantize(
            "w",
            &[0.0; 64 * 128],
            &[64, 128],
            Float::F16,
            &target(form.name),
        )
        .unwrap();
        assert!(
            packed
                .all_values()
                .unwrap()
                .iter()
                .all(|value| *value == 0.0),
            "{}",
            form.name
        );
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 64 * 128];
            values[77] = bad;
            let error =
                quantize("w", &values, &[64, 128], Float::F16, &target(form.name)).unwrap_err();
            assert!(error.to_string().contains("element 77"), "{error}");
        }
        let large = quantize(
            "w",
            &[3e38; 64 * 128],
            &[64, 128],
            Float::F16,
            &target(form.name),
        );
        if let Ok(packed) = large {
            assert!(packed.all_values().is_ok(), "{}", form.name);
        }
        assert!(quantize("w", &[1.0; 8], &[64, 128], Float::F16, &target(form.name)).is_err());
    }
    let odd = quantize("w", &[1.0; 60], &[4, 15], Float::F16, &target("awq")).unwrap_err();
    assert_eq!(odd.reason, Reason::Unsupported);
    assert_eq!(e4m3fn_to_f32(0x7E), 448.0);
}
