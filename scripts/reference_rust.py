"""Run the reference crate's own tests on `tonnage::compat`.

The sources come from cargo's registry at run time (the crate is a development dependency); nothing
of them is kept in this repository. A crate named `safetensors` is made in target/reference/rust
that says `pub use tonnage::compat::*;`, the way a program moves over with `[patch.crates-io]`, and
the reference's unit tests and documentation examples are compiled and run against it.

Unit tests reach into private fields. Each place where they do is rewritten to the public call that
means the same; `REWRITES` is the whole list, and a rewrite that no longer fits is an error, as is a
number of tests other than the reference's own.

    python scripts/reference_rust.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
HOME = TARGET / "reference" / "rust"
RELEASE = "0.8.0"

MANIFEST = f"""\
[package]
name = "safetensors"
version = "{RELEASE}"
edition = "2021"
publish = false

[features]
default = ["std"]
std = []
alloc = []

[dependencies]
tonnage = {{ path = "{ROOT}/crates/tonnage" }}

[dev-dependencies]
memmap2 = "0.9"
proptest = "1"
serde = {{ version = "1", features = ["derive"] }}
serde_json = "1"

[workspace]
"""

#: What the tests take from their module's private side, said with the public API.
PRELUDE = """\
#![allow(unused_imports, dead_code, deprecated)]
use safetensors::slice::*;
use safetensors::tensor::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Bound;

const MAX_HEADER_SIZE: usize = 100_000_000;

/// The header as it is before it is checked.
#[derive(serde::Serialize)]
struct HashMetadata {
    #[serde(rename = "__metadata__", skip_serializing_if = "Option::is_none")]
    metadata: Option<HashMap<String, String>>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorInfo>,
}

/// The file of a header and its data.
fn file(metadata: &Metadata, data: &[u8]) -> Vec<u8> {
    let mut header = serde_json::to_vec(metadata).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend_from_slice(data);
    file
}

trait New<'a>: Sized {
    fn new(view: &'a TensorView<'a>, slices: &[TensorIndexer]) -> Result<Self, InvalidSlice>;
}

impl<'a> New<'a> for SliceIterator<'a> {
    fn new(view: &'a TensorView<'a>, slices: &[TensorIndexer]) -> Result<Self, InvalidSlice> {
        view.sliced_data(slices)
    }
}
"""

#: Module → (pattern, replacement, how often it must apply).
REWRITES: dict[str, list[tuple[str, str, int]]] = {
    "tensor": [
        (r"use super::\*;", "use super::super::*;", 1),
        (r"use crate::slice::IndexOp;", "", 1),
        (r"#\[cfg\(not\(feature = \"std\"\)\)\]\s*extern crate std;", "", 1),
        # Metadata made of its parts.
        (r"let index_map = \(0\.\.tensors\.len\(\)\)\s*\.map\([^;]*\.collect\(\);", "", 1),
        (
            r"Some\(Metadata \{\s*metadata: None,\s*tensors,\s*index_map,\s*\}\)",
            "Some(Metadata::new(None, tensors.into_iter().enumerate()"
            '.map(|(i, t)| (format!("t.{i}"), t)).collect()).unwrap())',
            1,
        ),
        (r"metadata\.tensors\.last\(\)\.unwrap\(\)\.data_offsets\.1", "metadata.data_len()", 1),
        # A reader made of its parts.
        (
            r"SafeTensors \{ metadata, data: &data \};",
            "file(&metadata, &data); let file_ref = &FILE; let FILE = SafeTensors::deserialize"
            "(file_ref).unwrap();",
            2,
        ),
        # A view made of its parts.
        (
            r"TensorView \{\s*dtype: Dtype::F32,\s*shape: vec!\[1, 2, 3\],\s*data: &data,\s*\}",
            "TensorView::new(Dtype::F32, vec![1, 2, 3], &data).unwrap()",
            1,
        ),
        (r"#\[cfg\((?:feature = \"std\"|all\(feature = \"std\", unix\))\)\]", "", 2),
    ],
    "slice": [
        (r"use super::\*;", "use super::super::*;", 1),
        (r"use crate::tensor::\{[^}]*\};", "", 1),
    ],
}


def source() -> Path:
    """The folder of the reference crate's sources, as cargo resolved it."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    for package in json.loads(output)["packages"]:
        if package["name"] == "safetensors" and package["version"] == RELEASE:
            return Path(package["manifest_path"]).parent / "src"
    raise SystemExit(f"safetensors {RELEASE} is no dependency of the workspace")


def tests_of(module: str, text: str) -> str:
    """The module's tests as a module of their own, rewritten to the public API."""
    tests = text[text.index("#[cfg(test)]\nmod tests {") :].removeprefix("#[cfg(test)]\n")
    for pattern, replacement, times in REWRITES[module]:
        tests, found = re.subn(pattern, replacement, tests)
        if found != times:
            raise SystemExit(f"{module}: {pattern!r} fits {found} times, not {times}")
    # `let NAME = file(..); let file_ref = &FILE; let FILE = ..`: the name of the reader moves last.
    tests = re.sub(
        r"let (\w+) = (file\(&metadata, &data\);) let file_ref = &FILE; let FILE = ",
        r"let bytes = \2 let file_ref = &bytes; let \1 = ",
        tests,
    )
    return f"mod reference {{\n{tests}}}\n"


def examples_of(text: str) -> list[str]:
    """The code of the documentation's examples."""
    comments = re.findall(r"(?:^[ \t]*///.*\n)+", text, flags=re.MULTILINE)
    plain = [re.sub(r"^[ \t]*/// ?", "", block, flags=re.MULTILINE) for block in comments]
    return [
        code for block in plain for code in re.findall(r"```(?:rust)?\n(.*?)```", block, re.DOTALL)
    ]


def main() -> int:
    folder = source()
    texts = {module: (folder / f"{module}.rs").read_text("utf-8") for module in REWRITES}
    (HOME / "src").mkdir(parents=True, exist_ok=True)
    (HOME / "tests").mkdir(exist_ok=True)
    (HOME / "Cargo.toml").write_text(MANIFEST)

    expected = 0
    for module, text in texts.items():
        tests = tests_of(module, text)
        expected += len(re.findall(r"#\[test\]", tests))
        (HOME / "tests" / f"{module}.rs").write_text(f"{PRELUDE}\n{tests}")
    examples = [code for text in texts.values() for code in examples_of(text)]
    expected += len(examples)
    docs = [
        "".join(f"/// {line}\n" for line in ["```", *code.splitlines(), "```"])
        + f"mod example_{i} {{}}\n"
        for i, code in enumerate(examples)
    ]
    (HOME / "src" / "lib.rs").write_text("pub use tonnage::compat::*;\n" + "".join(docs))

    command = ["cargo", "test", "--target-dir", str(TARGET / "reference" / "rust-target")]
    run = subprocess.run(command, cwd=HOME, check=False, stdout=subprocess.PIPE, text=True)
    print(run.stdout)
    tally = re.findall(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", run.stdout)
    passed, failed = (sum(int(row[i]) for row in tally) for i in (0, 1))
    verdict = f"{passed} passed, {failed} failed, {expected} in all"
    print(f"the reference crate's tests on tonnage::compat: {verdict}")
    return 0 if run.returncode == 0 and passed == expected else 1


if __name__ == "__main__":
    sys.exit(main())
