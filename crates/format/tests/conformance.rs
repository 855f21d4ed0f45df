//! The conformance corpus (`conformance/`), read by this crate in both profiles: every verdict, code,
//! clause, tensor name and every piece of content is the manifest's. The folder cases need files
//! and are run by the crates above.

// The room itself reads no files; its tests do: the corpus is files.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tonnage_format::{
    Align, Class, Dtype, Error, Header, Index, Limits, Order, Quirks, ReadOptions, Reason, Step,
    TensorSpec, WriteOptions, layout, probe,
};

fn corpus() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../conformance"))
}

fn read(path: &str) -> Vec<u8> {
    fs::read(corpus().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&read(path)).unwrap()
}

fn cases(kind: &str) -> Vec<Value> {
    let manifest = json("manifest.json");
    let all = manifest["cases"].as_array().unwrap();
    let found: Vec<Value> = all
        .iter()
        .filter(|case| case["kind"] == kind)
        .cloned()
        .collect();
    assert!(!found.is_empty(), "no case of kind {kind}");
    found
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key]
        .as_str()
        .unwrap_or_else(|| panic!("{key} in {case}"))
}

/// An integer of the manifest, which writes those above 2^53-1 as strings.
fn integer(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| value.as_str().unwrap().parse().unwrap())
}

fn integers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(integer).collect()
}

/// The case's budgets on top of the defaults.
fn limits(case: &Value) -> Limits {
    let mut limits = Limits::default();
    for (name, value) in case["limits"].as_object().into_iter().flatten() {
        let value = integer(value);
        match name.as_str() {
            "header_bytes" => limits.header_bytes = value,
            "tensors" => limits.tensors = value,
            "rank" => limits.rank = value,
            "dims" => limits.dims = value,
            "metadata_entries" => limits.metadata_entries = value,
            "index_bytes" => limits.index_bytes = value,
            "shards" => limits.shards = value,
            other => panic!("unknown limit {other}"),
        }
    }
    limits
}

fn parse<'a>(file: &'a [u8], options: &ReadOptions) -> Result<Header<&'a [u8]>, Error> {
    Header::parse(file, Some(file.len() as u64), options)
}

/// What is wrong with an error, seen from its case; `None` if nothing is.
fn misjudged(case: &Value, error: &Error) -> Option<String> {
    let id = text(case, "id");
    let code = case["code"]
        .as_str()
        .unwrap_or("none: the case is accepted");
    if error.code() != code || error.clause() != case["clause"] {
        return Some(format!("{id}: {error:?}, needed {code} {}", case["clause"]));
    }
    match case["tensor"].as_str() {
        Some(name) if error.tensor_name() != Some(name) => Some(format!(
            "{id}: names {:?}, needed {name:?}",
            error.tensor_name()
        )),
        _ => None,
    }
}

/// The header as the manifest writes content, tensors by name.
fn content(header: &Header<&[u8]>) -> (BTreeMap<String, Value>, Value) {
    let tensors = header.iter().map(|tensor| {
        let row = serde_json::json!([
            tensor.dtype.name(),
            tensor.shape,
            [tensor.begin, tensor.end]
        ]);
        (tensor.name.to_owned(), row)
    });
    let metadata = header.metadata().map(|metadata| {
        let pairs = metadata
            .iter()
            .map(|(key, value)| (key.to_owned(), value.into()));
        Value::Object(pairs.collect())
    });
    (tensors.collect(), metadata.unwrap_or(Value::Null))
}

fn expected(expect: &Value) -> (BTreeMap<String, Value>, Value) {
    let rows = expect["tensors"].as_array().unwrap().iter().map(|row| {
        let parts = serde_json::json!([
            row["dtype"],
            integers(&row["shape"]),
            integers(&row["data_offsets"])
        ]);
        (text(row, "name").to_owned(), parts)
    });
    (rows.collect(), expect["metadata"].clone())
}

/// Names in the order of the header: the manifest lists tensors in it.
fn order_holds(header: &Header<&[u8]>, expect: &Value) -> bool {
    let rows = expect["tensors"].as_array().unwrap();
    header.len() == rows.len()
        && header
            .iter()
            .zip(rows)
            .all(|(tensor, row)| row["name"] == tensor.name)
}

fn strict_verdict(case: &Value, file: &[u8]) -> Option<String> {
    let id = text(case, "id");
    let options = ReadOptions {
        limits: limits(case),
        ..ReadOptions::strict()
    };
    match (parse(file, &options), text(case, "verdict")) {
        (Err(error), "reject") => misjudged(case, &error),
        (Ok(header), verdict @ ("accept" | "unsupported")) => {
            let expect = &case["expect"];
            if content(&header) != expected(expect) || !order_holds(&header, expect) {
                return Some(format!("{id}: read {:?}", content(&header)));
            }
            let refused = header.iter().find_map(|tensor| {
                let error = tensor.dtype.known().err()?;
                Some(error.tensor(tensor.name))
            });
            match (refused, verdict) {
                (None, "accept") => None,
                (Some(error), "unsupported") => misjudged(case, &error),
                (refused, _) => Some(format!("{id}: a tensor refused: {refused:?}")),
            }
        }
        (Ok(_), verdict) => Some(format!("{id}: accepted, needed {verdict} {}", case["code"])),
        (Err(error), verdict) => Some(format!("{id}: {error:?}, needed {verdict}")),
    }
}

fn compat_verdict(case: &Value, file: &[u8]) -> Option<String> {
    let id = text(case, "id");
    let compat = &case["compat"];
    match (parse(file, &ReadOptions::compat()), text(compat, "verdict")) {
        (Err(_), "reject") => None,
        (Ok(header), "accept") => {
            let expect = if compat["expect"].is_null() {
                &case["expect"]
            } else {
                &compat["expect"]
            };
            let same = content(&header) == expected(expect);
            (!same).then(|| format!("{id}: compat read {:?}", content(&header)))
        }
        (Ok(_), _) => Some(format!("{id}: compat accepted it")),
        (Err(error), _) => Some(format!("{id}: compat refused it: {error:?}")),
    }
}

fn none_wrong(checked: usize, wrong: Vec<String>) {
    assert!(
        wrong.is_empty(),
        "{} of {checked} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn headers_in_the_strict_profile() {
    let cases = cases("header");
    let wrong = cases
        .iter()
        .filter_map(|case| strict_verdict(case, &read(text(case, "file"))));
    none_wrong(cases.len(), wrong.collect());
}

#[test]
fn headers_in_the_compat_profile() {
    let cases = cases("header");
    let wrong = cases
        .iter()
        .filter_map(|case| compat_verdict(case, &read(text(case, "file"))));
    none_wrong(cases.len(), wrong.collect());
}

/// A case's quirk is what makes the difference: without it, compat judges as strict does.
#[test]
fn each_quirk_is_needed_where_the_manifest_names_it() {
    let mut used = BTreeMap::new();
    let mut wrong = Vec::new();
    let cases = cases("header");
    for case in &cases {
        let Some(name) = case["compat"]["quirk"].as_str() else {
            continue;
        };
        let &(_, quirk) = Quirks::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .expect(name);
        *used.entry(name.to_owned()).or_insert(0) += 1;
        let options = ReadOptions {
            quirks: Quirks::REFERENCE.without(quirk),
            ..ReadOptions::compat()
        };
        let accepted = parse(&read(text(case, "file")), &options).is_ok();
        if accepted != (case["verdict"] != "reject") {
            wrong.push(format!("{}: {name} makes no difference", case["id"]));
        }
    }
    let unused = Quirks::NAMES
        .iter()
        .filter(|(name, _)| !used.contains_key(*name));
    wrong.extend(unused.map(|(name, _)| format!("no case for {name}")));
    none_wrong(cases.len(), wrong);
}

/// Without its lowered budget a `limits` case is a good file.
#[test]
fn limits_are_budgets_and_not_rules() {
    let limited: Vec<Value> = cases("header")
        .into_iter()
        .filter(|case| case.get("limits").is_some())
        .collect();
    assert!(limited.len() >= 5);
    for case in &limited {
        let file = read(text(case, "file"));
        let header = parse(&file, &ReadOptions::strict()).unwrap();
        assert_eq!(
            content(&header),
            expected(&case["expect"]),
            "{}",
            case["id"]
        );
        let Err(error) = parse(
            &file,
            &ReadOptions {
                limits: limits(case),
                ..ReadOptions::strict()
            },
        ) else {
            panic!("{} accepted", case["id"])
        };
        assert_eq!(error.class(), Class::Limit);
    }
}

/// Fed byte by byte, the step function asks for what it needs and judges as the parser does.
#[test]
fn probing_asks_for_the_header_and_no_more() {
    let strict = ReadOptions::strict();
    for case in cases("header") {
        let file = read(text(&case, "file"));
        let len = Some(file.len() as u64);
        let mut have = 0;
        let outcome = loop {
            match probe(&file[..have], len, &strict) {
                Ok(Step::Need { offset, len }) => {
                    assert_eq!(offset, have as u64, "{}", case["id"]);
                    have += len as usize;
                    assert!(len > 0 && have <= file.len(), "{}", case["id"]);
                }
                Ok(Step::Done(end)) => break Ok(end),
                Err(error) => break Err(error.reason()),
            }
        };
        match outcome {
            Ok(end) => assert_eq!(end, have as u64, "{}", case["id"]),
            Err(reason) => assert_eq!(case["code"], reason.code(), "{}", case["id"]),
        }
    }
}

fn index_verdict(case: &Value, text_of_index: &[u8], limits: Limits) -> Option<String> {
    let id = text(case, "id");
    let options = ReadOptions {
        limits,
        ..ReadOptions::strict()
    };
    match (Index::parse(text_of_index, &options), text(case, "verdict")) {
        (Err(error), "reject") => misjudged(case, &error),
        (Ok(index), "accept") => {
            let pairs = index
                .iter()
                .map(|(name, file)| (name.to_owned(), file.into()));
            let map = Value::Object(pairs.collect());
            let same = map == case["expect"]["weight_map"]
                && *index.files() == *strings(&case["expect"]["files"])
                && index
                    .iter()
                    .all(|(name, file)| index.get(name) == Some(file));
            (!same).then(|| format!("{id}: read {map} in {:?}", index.files()))
        }
        (outcome, _) => Some(format!("{id}: {:?}", outcome.map(|index| index.len()))),
    }
}

fn strings(value: &Value) -> Vec<String> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn index_files() {
    let cases = cases("index");
    let wrong = cases
        .iter()
        .filter_map(|case| index_verdict(case, &read(text(case, "file")), limits(case)))
        .collect();
    none_wrong(cases.len(), wrong);
    for case in cases.iter().filter(|case| case.get("limits").is_some()) {
        let index = Index::parse(&read(text(case, "file")), &ReadOptions::strict()).unwrap();
        assert_eq!(
            index.len(),
            case["expect"]["weight_map"].as_object().unwrap().len()
        );
    }
}

/// Every reason that a reader can give has a case; what only writers and callers meet is tested there.
#[test]
fn every_reader_reason_has_a_case() {
    let manifest = json("manifest.json");
    let all = manifest["cases"].as_array().unwrap();
    assert!(all.len() >= 500, "the corpus shrank to {}", all.len());
    let of_readers = Reason::ALL
        .iter()
        .filter(|reason| reason.class() != Class::Usage);
    for reason in of_readers {
        assert!(
            all.iter().any(|case| case["code"] == reason.code()),
            "no case for {}",
            reason.code()
        );
    }
    for case in all.iter().filter(|case| case.get("code").is_some()) {
        let reason = Reason::ALL
            .iter()
            .find(|reason| case["code"] == reason.code());
        assert_eq!(
            case["clause"],
            reason.expect("a known code").clause(),
            "{}",
            case["id"]
        );
    }
}

/// The writer's bytes, per profile, for inputs that are frozen with them.
#[test]
fn the_writer_gives_the_frozen_bytes() {
    let rows = json("frozen/writer.json");
    assert!(rows.as_array().unwrap().len() >= 13);
    for row in rows.as_array().unwrap() {
        let given = row["tensors"].as_array().unwrap();
        let shapes: Vec<Vec<u64>> = given
            .iter()
            .map(|tensor| integers(&tensor["shape"]))
            .collect();
        let specs: Vec<TensorSpec<'_>> = given
            .iter()
            .zip(&shapes)
            .map(|(tensor, shape)| TensorSpec {
                name: text(tensor, "name"),
                dtype: text(tensor, "dtype").parse::<Dtype>().unwrap(),
                shape,
            })
            .collect();
        let metadata: Option<Vec<(&str, &str)>> = row["metadata"].as_object().map(|object| {
            object
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str().unwrap()))
                .collect()
        });
        let options = &row["options"];
        let options = WriteOptions {
            order: if options["order"] == "given" {
                Order::Given
            } else {
                Order::Canonical
            },
            align: if options["align"] == 4096 {
                Align::Page
            } else {
                Align::Eight
            },
            reserve: integer(&options["reserve"]),
        };
        let layout = layout(&specs, metadata.as_deref(), &options).unwrap();
        let mut file = layout.header;
        for at in layout.order {
            file.extend(hex(text(&given[at], "data")));
        }
        assert_eq!(file.len() as u64, layout.file_len, "{}", row["id"]);
        assert!(
            file == read(&format!("frozen/{}", text(row, "file"))),
            "{}: other bytes",
            row["id"]
        );
        parse(&file, &ReadOptions::strict()).unwrap();
    }
}

fn hex(digits: &str) -> Vec<u8> {
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// Frozen files are read forever: all dtypes, and a sharded checkpoint that agrees with its index.
#[test]
fn frozen_files_are_read() {
    let table = json("frozen/dtypes.json");
    assert_eq!(table.as_object().unwrap().len(), Dtype::ALL.len());
    for &dtype in Dtype::ALL {
        let row = &table[dtype.name()];
        let file = read(&format!("frozen/{}", text(row, "file")));
        let header = parse(&file, &ReadOptions::strict()).unwrap();
        let tensor = header.get(text(row, "tensor")).unwrap();
        assert_eq!(tensor.dtype.known().unwrap(), dtype);
        assert_eq!(tensor.shape, integers(&row["shape"]));
    }
    let index = read("frozen/sharded/model.safetensors.index.json");
    let index = Index::parse(&index, &ReadOptions::strict()).unwrap();
    let mut total = 0;
    for (name, file) in index.iter() {
        let file = read(&format!("frozen/sharded/{file}"));
        total += parse(&file, &ReadOptions::strict())
            .unwrap()
            .get(name)
            .unwrap()
            .byte_len();
    }
    assert_eq!(index.total_size, Some(total));
}
