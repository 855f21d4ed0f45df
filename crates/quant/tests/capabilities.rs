//! `docs/quantized-schemes.md`: what can be done with each scheme, as this test has just seen it done.
//!
//! No cell is written by hand. Each says what an operation did to the corpus of checkpoints that other libraries wrote, or to
//! tensors made here; what it says is held against the values. With `TONNAGE_WRITE_DOCS` set the page is written anew.
#![allow(
    clippy::disallowed_methods,
    reason = "the corpus and the page are files; the room's own code reads none"
)]

mod corpus;
mod ggml_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use corpus::{File, NO_ROW, Told, cases, compare, corpus, tensor};
use ggml_support::{Vectors, dequantised};
use tonnage_format::Dtype;
use tonnage_quant::descriptor::{Float, Role};
use tonnage_quant::ggml::GgmlType;
use tonnage_quant::interpret::Bytes;
use tonnage_quant::map::QTensor;
use tonnage_quant::packed::Packed;
use tonnage_quant::quantize::quantize;
use tonnage_quant::repack::repack;
use tonnage_quant::scheme::{Part, Scheme};
use tonnage_quant::slice::{Cut, Fallback, How, apply};
use tonnage_quant::target::{FORMS, Target, To};

/// What was seen of a scheme.
#[derive(Default)]
struct Seen {
    /// Tensors whose values were a library's own, bit for bit, by library.
    decoded: BTreeMap<String, usize>,
    /// Axes that were cut, and how.
    cuts: BTreeMap<&'static str, BTreeSet<&'static str>>,
    /// Forms that values were rounded to.
    made: BTreeSet<&'static str>,
    /// Forms that it became without a loss.
    repacked: BTreeSet<&'static str>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    let bits = |value: &f32| {
        if value.is_nan() {
            u32::MAX
        } else {
            value.to_bits()
        }
    };
    values.iter().map(bits).collect()
}

fn values(cut: &Cut, bytes: &BTreeMap<Role, Vec<u8>>) -> Vec<u32> {
    let bytes: Bytes<'_> = bytes
        .iter()
        .map(|(role, bytes)| (*role, &bytes[..]))
        .collect();
    let mut out = vec![0.0; cut.shape.iter().product::<u64>() as usize];
    cut.values(&bytes, &mut out).unwrap();
    self::bits(&out)
}

/// Cuts each axis into parts and puts their values together again.
fn cut(seen: &mut Seen, packed: &Packed) {
    let whole = Cut::whole(&packed.tensor).unwrap();
    let all = values(&whole, &packed.bytes);
    let axes = whole.shape.len();
    for axis in 0..axes {
        let name = match axes - axis {
            1 => "in",
            2 => "out",
            _ => "experts",
        };
        let len = whole.shape[axis];
        let inner = whole.shape[axis + 1..].iter().product::<u64>();
        for at in 1..len {
            let (Ok(low), Ok(high)) = (
                whole.cut(axis, 0..at, Fallback::Lossless),
                whole.cut(axis, at..len, Fallback::Lossless),
            ) else {
                continue;
            };
            // Every place would take long: those that are taken in another way, and a few more.
            let how = if high.how(axis) == How::Clean {
                low.how(axis)
            } else {
                high.how(axis)
            };
            let how = match how {
                How::Clean => "clean",
                How::Regroup { .. } => "smaller groups",
                How::Phase { .. } => "begun blocks",
            };
            if !seen.cuts.entry(name).or_default().insert(how) && at * 2 != len {
                continue;
            }
            let of = |cut: &Cut| {
                let parts = cut.parts().into_iter();
                let parts = parts.map(|(role, _)| {
                    let (part, bytes) = (&packed.tensor.parts[&role], &packed.bytes[&role]);
                    (role, apply(part, bytes, cut.steps(role)).unwrap())
                });
                values(cut, &parts.collect())
            };
            let (low, high) = (of(&low), of(&high));
            let together: Vec<u32> = low
                .chunks((at * inner) as usize)
                .zip(high.chunks(((len - at) * inner) as usize))
                .flat_map(|(low, high)| low.iter().chain(high).copied())
                .collect();
            assert!(
                together == all,
                "{} axis {axis} at {at}",
                packed.tensor.preset()
            );
        }
    }
}

/// Every form that a tensor becomes without a loss.
fn repacks(seen: &mut Seen, packed: &Packed) {
    let own = packed.tensor.preset();
    for form in FORMS.iter().map(|form| form.name).chain([
        "q4_0",
        "q4_1",
        "q8_0",
        "ggml/MXFP4",
        "ggml/NVFP4",
    ]) {
        let target = Target::parse(form).unwrap();
        let Ok((made, report)) = repack(packed, &target, false) else {
            continue;
        };
        assert_eq!(
            (
                report.difference.changed,
                packed.difference(&made).unwrap().changed
            ),
            (0, 0),
            "{own} to {form}"
        );
        if made.tensor.preset() != own {
            seen.repacked.insert(form);
        }
    }
}

/// Values rounded to a form, and how far they are from what they were.
fn rounds(target: &Target, name: &str) -> Option<String> {
    let mut state = 7_u64;
    let values: Vec<f32> = (0..64 * 256)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            ((state >> 33) as f32 / (1_u64 << 31) as f32 - 0.5) * 0.2
        })
        .collect();
    let made = quantize("m.weight", &values, &[64, 256], Float::F32, target).ok()?;
    let again = made.all_values().unwrap();
    let square = |one: f32| f64::from(one) * f64::from(one);
    let (all, off) = values
        .iter()
        .zip(&again)
        .fold((0.0, 0.0), |(all, off), (&a, &b)| {
            (all + square(a), off + square(a - b))
        });
    assert!(off < all * 0.3, "{name}: {off} of {all}");
    Some(made.tensor.preset())
}

fn schemes() -> BTreeMap<&'static str, Seen> {
    let mut seen = BTreeMap::<&str, Seen>::new();
    for case in &cases() {
        if NO_ROW.contains(&case["scheme"].as_str().unwrap()) {
            continue;
        }
        let folder = corpus().join(case["path"].as_str().unwrap());
        let file = File::open(&folder.join("model.safetensors"));
        let expected = File::open(&folder.join("expected.safetensors"));
        for name in case["tensors"].as_object().unwrap().keys() {
            let told = tensor(case, &file, &expected, name).unwrap();
            compare(case, &told).unwrap();
            let Told { tensor, bytes, .. } = told;
            let preset = tensor.preset();
            let row = seen.entry(Scheme::find(&preset).unwrap().name).or_default();
            let library = case["library"].as_str().unwrap().to_owned();
            *row.decoded.entry(library).or_default() += 1;
            let packed = Packed::new(tensor, bytes).unwrap();
            cut(row, &packed);
            repacks(row, &packed);
        }
    }
    for form in FORMS {
        if rounds(&Target::of(To::Form(form)), form.name).is_some() {
            let row = Scheme::find(form.scheme).unwrap().name;
            seen.entry(row).or_default().made.insert(form.name);
        }
    }
    seen
}

fn ggml() -> BTreeMap<&'static str, Seen> {
    let vectors = Vectors::open("blocks.safetensors");
    let mut seen = BTreeMap::new();
    for ty in dequantised().filter(|ty| !ty.is_plain()) {
        let row: &mut Seen = seen.entry(ty.name()).or_default();
        let blocks = vectors.bytes(&format!("{ty}.blocks")).unwrap();
        let wanted = vectors.floats(&format!("{ty}.values")).unwrap();
        // Two rows of all the blocks.
        let part = Part {
            name: "m.weight".to_owned(),
            dtype: Dtype::U8,
            shape: vec![2, blocks.len() as u64],
        };
        let tensor = QTensor::ggml_of("m.weight", ty, part).unwrap();
        let codes = BTreeMap::from([(Role::Codes, blocks.repeat(2))]);
        let packed = Packed::new(tensor, codes).unwrap();
        let found = values(&Cut::whole(&packed.tensor).unwrap(), &packed.bytes);
        assert!(found == bits(&wanted.repeat(2)), "{ty}");
        row.decoded.insert("gguf".to_owned(), 1);
        cut(row, &packed);
        if rounds(&Target::of(To::Ggml(ty)), ty.name()).is_some() {
            row.made.insert(ty.name());
        }
        if ty != GgmlType::NVFP4 {
            repacks(row, &packed);
        }
    }
    seen
}

fn page(schemes: &BTreeMap<&str, Seen>, ggml: &BTreeMap<&str, Seen>) -> String {
    let mut text = String::from(
        "# What can be done with each quantised scheme\n\n\
         This page is made by `crates/quant/tests/capabilities.rs`, which does each of these things and compares values; a cell \
         says what it saw. Dequantised: tensors of checkpoints that the library wrote, bit for bit the library's own values. \
         Cut: where a rank's part may begin and end; along the rows (`out`), the columns (`in`), or whole experts, between \
         blocks (clean), or within them by smaller groups or begun blocks, never with another value. Repacked: without a loss, \
         for some tensors of the corpus at least.\n\n",
    );
    let header = "| scheme | what it is | dequantised | quantised to | cut for ranks | repacked to |\n|---|---|---|---|---|---|\n";
    let joined = |of: &BTreeSet<&str>| match of.is_empty() {
        true => "–".to_owned(),
        false => of.iter().copied().collect::<Vec<_>>().join(", "),
    };
    let mut rows = |names: Vec<(String, &str, Option<&Seen>)>| {
        text.push_str(header);
        for (name, title, seen) in names {
            let nothing = Seen::default();
            let seen = seen.unwrap_or(&nothing);
            let decoded: Vec<String> = seen
                .decoded
                .iter()
                .map(|(library, count)| format!("{count} of {library}"))
                .collect();
            let cuts: Vec<String> = seen
                .cuts
                .iter()
                .map(|(axis, how)| format!("{axis}: {}", joined(how)))
                .collect();
            let cell = |cells: Vec<String>| {
                if cells.is_empty() {
                    "–".to_owned()
                } else {
                    cells.join("; ")
                }
            };
            // Writing to a string never fails.
            let _ = writeln!(
                text,
                "| `{name}` | {title} | {} | {} | {} | {} |",
                cell(decoded),
                joined(&seen.made),
                cell(cuts),
                joined(&seen.repacked)
            );
        }
        text.push('\n');
    };
    rows(
        Scheme::all()
            .map(|row| (row.preset(), row.title, schemes.get(row.name)))
            .collect(),
    );
    rows(
        ggml.iter()
            .map(|(name, seen)| (format!("ggml/{name}@1"), "blocks of GGUF files", Some(seen)))
            .collect(),
    );
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

#[test]
fn the_page_says_what_was_seen() {
    let (schemes, ggml) = (schemes(), ggml());
    for row in Scheme::all() {
        let seen = schemes
            .get(row.name)
            .unwrap_or_else(|| panic!("nothing was seen of {}", row.name));
        assert!(
            !seen.decoded.is_empty() && !seen.cuts.is_empty(),
            "{} is decoded or cut by no test",
            row.name
        );
    }
    let page = page(&schemes, &ggml);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/quantized-schemes.md");
    if std::env::var_os("TONNAGE_WRITE_DOCS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    for (line, (found, wanted)) in there.lines().zip(page.lines()).enumerate() {
        assert_eq!(
            found,
            wanted,
            "line {} of the page; TONNAGE_WRITE_DOCS=1 writes it anew",
            line + 1
        );
    }
    assert_eq!(there.lines().count(), page.lines().count());
}
