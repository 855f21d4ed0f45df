//! Every crate that a build can contain has a licence compatible with Apache-2.0.
//!
//! Reads the licences of the whole dependency graph from `cargo metadata`, evaluates each SPDX
//! expression against an allow-list, and names what does not pass.

use std::path::Path;

use cargo_metadata::MetadataCommand;

/// Licences whose code may be part of an Apache-2.0 work without conditions beyond notices.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Does an SPDX expression (`OR`, `AND`, `WITH`, parentheses, and the old `A/B`) allow our use?
/// Anything that it does not understand counts as a refusal.
fn allows(expression: &str) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    any_of(&mut rest) == Some(true) && rest.is_empty()
}

fn any_of(words: &mut &[&str]) -> Option<bool> {
    let mut allowed = all_of(words)?;
    while words.first() == Some(&"OR") {
        *words = &words[1..];
        allowed |= all_of(words)?;
    }
    Some(allowed)
}

fn all_of(words: &mut &[&str]) -> Option<bool> {
    let mut allowed = one(words)?;
    while words.first() == Some(&"AND") {
        *words = &words[1..];
        allowed &= one(words)?;
    }
    Some(allowed)
}

fn one(words: &mut &[&str]) -> Option<bool> {
    let (first, rest) = words.split_first()?;
    *words = rest;
    if *first == "(" {
        let allowed = any_of(words)?;
        let (last, rest) = words.split_first()?;
        *words = rest;
        return (*last == ")").then_some(allowed);
    }
    let mut licence = (*first).to_owned();
    if words.first() == Some(&"WITH") {
        licence = format!("{licence} WITH {}", words.get(1)?);
        *words = &words[2..];
    }
    Some(ALLOWED.contains(&licence.as_str()))
}

#[test]
fn expressions_are_read_as_spdx_means_them() {
    for yes in [
        "MIT",
        "MIT OR GPL-3.0-only",
        "GPL-3.0-only OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR Apache-2.0) AND Unicode-3.0",
        "Apache-2.0 WITH LLVM-exception OR GPL-2.0-only",
    ] {
        assert!(allows(yes), "{yes}");
    }
    for no in [
        "",
        "GPL-3.0-only",
        "MIT AND GPL-3.0-only",
        "MIT OR",
        "(MIT",
        "MIT MIT",
        "GPL-2.0-only WITH Classpath-exception-2.0",
        "MIT AND (GPL-3.0-only OR LGPL-3.0-only)",
    ] {
        assert!(!allows(no), "{no}");
    }
}

#[test]
fn every_dependency_has_a_compatible_licence() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let metadata = MetadataCommand::new()
        .manifest_path(manifest)
        .exec()
        .expect("cargo metadata of the workspace and its dependencies");
    let refused: Vec<String> = metadata
        .packages
        .iter()
        .filter(|package| !allows(package.license.as_deref().unwrap_or("")))
        .map(|package| {
            format!(
                "{} {}: {:?}",
                package.name, package.version, package.license
            )
        })
        .collect();
    assert!(metadata.packages.len() > 10, "few packages found");
    assert!(refused.is_empty(), "\n{}\n", refused.join("\n"));
}
