//! The specification's text and this crate hold each other: dtypes, reasons, quirks and clauses are
//! the same in both, and every clause that anything refers to exists.

// The room itself reads no files; its tests do: the text and the sources are files.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tonnage_format::{Class, Dtype, Kind, Limits, Quirks, Reason};

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn spec() -> String {
    fs::read_to_string(root().join("spec/safetensors-1.md")).unwrap()
}

/// The rows of the table whose header line is given, as cells.
fn table(text: &str, header: &str) -> Vec<Vec<String>> {
    let (_, rest) = text
        .split_once(header)
        .unwrap_or_else(|| panic!("no table {header}"));
    let rows = rest
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    rows.map(|line| {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect()
    })
    .collect()
}

/// Each numbered clause with its text, which reaches to the next clause or heading.
fn clauses(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut current: Option<String> = None;
    for line in text.lines() {
        let number = line
            .strip_prefix("**")
            .and_then(|rest| rest.split_once("**"));
        if let Some((number, _)) = number.filter(|(number, _)| is_clause(number)) {
            assert!(!found.contains_key(number), "clause {number} twice");
            current = Some(number.to_owned());
        } else if line.starts_with("## ") {
            current = None;
        }
        if let Some(number) = &current {
            let body: &mut String = found.entry(number.clone()).or_default();
            body.push_str(line);
            body.push('\n');
        }
    }
    found
}

fn is_clause(token: &str) -> bool {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    token.split_once('.').is_some_and(|(chapter, clause)| {
        number(chapter) && number(clause) && (1..=14).contains(&chapter.parse::<u32>().unwrap())
    })
}

/// Everything in a text that looks like the number of a clause.
fn references(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_digit() && c != '.')
        .map(|token| token.trim_matches('.'))
        .filter(|token| is_clause(token))
}

#[test]
fn dtypes_are_the_table_of_clause_5_1() {
    let kind = |kind| match kind {
        Kind::Bool => "bool",
        Kind::Int => "int",
        Kind::UInt => "uint",
        Kind::Float => "float",
        Kind::Complex => "complex",
    };
    let code: Vec<[String; 3]> = Dtype::ALL
        .iter()
        .map(|dtype| {
            [
                dtype.name().into(),
                dtype.bitsize().to_string(),
                kind(dtype.row().kind).into(),
            ]
        })
        .collect();
    let text: Vec<[String; 3]> = table(&spec(), "| dtype | bits | kind | element |")
        .into_iter()
        .map(|row| [row[0].clone(), row[1].clone(), row[2].clone()])
        .collect();
    assert_eq!(text, code);
}

#[test]
fn reasons_are_the_table_of_appendix_a() {
    let class = |class| match class {
        Class::Malformed => "M",
        Class::Limit => "L",
        Class::Unsupported => "U",
        Class::Usage => "C",
    };
    let code: Vec<[String; 4]> = Reason::ALL
        .iter()
        .map(|reason| {
            let clause = if reason.clause().is_empty() {
                "–"
            } else {
                reason.clause()
            };
            [
                reason.code(),
                clause,
                class(reason.class()),
                reason.phrase(),
            ]
            .map(String::from)
        })
        .collect();
    let text: Vec<[String; 4]> = table(&spec(), "| code | clause | class | meaning |")
        .into_iter()
        .map(|row| row.try_into().unwrap())
        .collect();
    assert_eq!(text, code);
}

#[test]
fn each_reason_is_named_by_its_clause() {
    let clauses = clauses(&spec());
    for reason in Reason::ALL
        .iter()
        .filter(|reason| !reason.clause().is_empty())
    {
        let body = clauses
            .get(reason.clause())
            .unwrap_or_else(|| panic!("no clause {}", reason.clause()));
        assert!(
            body.contains(&format!("`{}`", reason.code())),
            "{}: {body}",
            reason.code()
        );
    }
}

/// And no clause names a reason that the code does not have.
#[test]
fn no_clause_names_a_reason_that_is_not_there() {
    let known = |code: &str| Reason::ALL.iter().any(|reason| reason.code() == code);
    let quoted = |body: &str| -> Vec<String> {
        body.split('`')
            .skip(1)
            .step_by(2)
            .map(String::from)
            .collect()
    };
    let mut named = 0;
    for (number, body) in clauses(&spec()) {
        let codes = quoted(&body).into_iter().filter(|word| {
            let shape = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
            word.len() > 4 && word.chars().all(shape) && Dtype::from_name(word).is_none()
        });
        for code in codes {
            assert!(known(&code), "clause {number} names {code}");
            named += 1;
        }
    }
    assert!(named >= 50, "only {named} codes seen");
}

#[test]
fn quirks_are_the_table_of_clause_10_9() {
    let text: Vec<String> = table(&spec(), "| quirk | what changes |")
        .into_iter()
        .map(|row| row[0].clone())
        .collect();
    let code: Vec<&str> = Quirks::NAMES.iter().map(|(name, _)| *name).collect();
    assert_eq!(text, code);
}

#[test]
fn clauses_are_numbered_without_gaps() {
    let clauses = clauses(&spec());
    for chapter in 1..=14 {
        let of_chapter = clauses
            .keys()
            .filter(|number| number.starts_with(&format!("{chapter}.")))
            .count();
        assert!(of_chapter > 0, "chapter {chapter} is empty");
        for clause in 1..=of_chapter {
            assert!(
                clauses.contains_key(&format!("{chapter}.{clause}")),
                "no clause {chapter}.{clause}"
            );
        }
    }
}

#[test]
fn every_reference_leads_to_a_clause() {
    let text = spec();
    let clauses = clauses(&text);
    for number in references(&text) {
        assert!(clauses.contains_key(number), "the text refers to {number}");
    }
    let mut seen = 0;
    for file in sources(&root().join("crates")) {
        let source = fs::read_to_string(&file).unwrap();
        for line in source.lines() {
            for (at, _) in line.match_indices("spec ") {
                // The numbers right after the word: `spec 8.4, 8.5`, `spec 2.1 to 2.4`.
                let after = &line[at + 5..];
                let end = after.find([')', ';', ':', '(']).unwrap_or(after.len());
                for number in references(&after[..end]) {
                    assert!(
                        clauses.contains_key(number),
                        "{}: spec {number}",
                        file.display()
                    );
                    seen += 1;
                }
            }
        }
    }
    assert!(seen >= 20, "only {seen} references seen in the sources");
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The default budgets are no lower than chapter 10 asks.
#[test]
fn default_budgets_are_what_chapter_10_asks() {
    let limits = Limits::default();
    assert_eq!(limits.header_bytes, 100_000_000);
    assert!(limits.tensors >= 2_000_000 && limits.rank >= 64 && limits.dims >= 16_000_000);
    assert!(limits.metadata_entries >= 1_000_000 && limits.index_bytes >= 100_000_000);
    assert!(limits.shards >= 10_000 && limits.depth == 32);
}
