#!/usr/bin/env python3
"""Runs the reference package over the header cases and lists every disagreement.

Needs `safetensors==0.8.0`. Writes docs/disagreements.md; with `--check` it only says whether that
table is still true. It fails where the manifest's compat verdict is not the reference's own.
"""

import argparse
import json
import sys
from pathlib import Path

import safetensors

ROOT = Path(__file__).resolve().parent
TABLE = ROOT.parent / "docs" / "disagreements.md"
VERSION = "0.8.0"

GROUPS = {
    "DUPLICATE_TENSOR_LAST_WINS": (
        "One name twice",
        "The reference keeps the entry that comes last and never looks at the layout of the"
        " other. Its own documentation disallows duplicate keys, and other readers keep the"
        " first, so that one file means two things. We refuse the file (clause 3.12).",
    ),
    "DUPLICATE_METADATA_KEY_LAST_WINS": (
        "One metadata key twice",
        "The same within `__metadata__` (clause 3.15).",
    ),
    "UNKNOWN_FIELD_REPEATS": (
        "A skipped key twice",
        "Keys that the reference does not know may repeat, within an entry or within a "
        "value that is skipped. We hold every object of the header to one rule (clause "
        "3.13), so that an extension's fields cannot mean two things.",
    ),
    "ENTRY_AS_ARRAY": (
        "An entry as an array",
        "The reference's derived deserialiser also takes the fields of an entry by "
        "position. Nothing documents this and no writer makes it; we refuse it (clause "
        "4.1).",
    ),
    "DTYPE_AS_ENUM_MAP": (
        "A dtype as an object",
        "The same deserialiser takes a dtype as an object with one key. We take strings "
        "(clause 4.3).",
    ),
    "METADATA_NULL": (
        "Null metadata",
        'The reference takes `"__metadata__":null` for absent metadata. The strict profile takes '
        "an object (clause 7.1). Since MLX writes null where a file has no metadata, our readers "
        "take it too unless they are asked to be strict (clause 10.1), and `verify` remarks on it.",
    ),
    "ORDERED_ZERO_OVERFLOW": (
        "Overflow excused by a zero",
        "The reference multiplies the extents from left to right and then by the bits of an"
        " element, so a zero excuses an overflow that would come after it, but not one that"
        " came before: `[0,2^62,8]` loads and `[2^62,8,0]` does not. We refuse both: the "
        "extents that are not zero must not overflow (clause 6.2).",
    ),
    "FULL_U64": (
        "Integers above 2^63-1",
        "The reference reads integers up to 2^64-1; beside a zero extent such a size loads."
        " We stop at 2^63-1, which every language has (clause 3.10).",
    ),
    "DEPTH_127": (
        "Deep nesting in skipped fields",
        "The reference skips values down to level 127, the limit of its JSON library. We "
        "stop at 32, so that a reader that recurses is safe too (clause 3.11).",
    ),
    "UNKNOWN_DTYPE_REFUSED": (
        "Unknown dtypes",
        "One unknown dtype makes the whole file unreadable for the reference. We list the "
        "file and every other tensor of it; only the tensor itself is refused, with "
        "`UNSUPPORTED_DTYPE` (clause 5.2).",
    ),
    "NUMBER_RANGE_IN_SKIPPED": (
        "Huge numbers in skipped fields",
        "The reference converts numbers that it then skips, and fails where a double would "
        "be infinite. Such a number is valid JSON and nobody looks at it; we skip it "
        "(clause 4.6).",
    ),
}


def portable(value):
    return value if value <= 2**53 - 1 else str(value)


def verdict(path):
    """What the reference says of one file: ("accept", content) or ("reject", message)."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118 (no iterator)
                part = file.get_slice(name)
                tensors[name] = {
                    "dtype": part.get_dtype(),
                    "shape": [portable(n) for n in part.get_shape()],
                }
            return "accept", {"tensors": tensors, "metadata": file.metadata()}
    except safetensors.SafetensorError as error:
        return "reject", str(error)
    except OSError as error:  # an empty file cannot be mapped
        return "reject", str(error)


def content(expect):
    rows = {
        row["name"]: {"dtype": row["dtype"], "shape": row["shape"]} for row in expect["tensors"]
    }
    return {"tensors": rows, "metadata": expect["metadata"]}


def judge(cases):
    """The reference's verdict on each case, and where the manifest's compat verdict is wrong."""
    found, wrong = {}, []
    for case in cases:
        got, detail = verdict(ROOT / case["file"])
        found[case["id"]] = (got, detail)
        compat = case["compat"]
        if got != compat["verdict"]:
            wrong.append(
                f"{case['id']}: the manifest says {compat['verdict']}, the reference {got}: "
                f"{detail}"
            )
        elif got == "accept" and detail != content(compat.get("expect") or case["expect"]):
            wrong.append(f"{case['id']}: the reference reads other content: {detail}")
    return found, wrong


def table(cases, found):
    """The document: every case on which the strict profile and the reference part."""
    rows = {name: [] for name in GROUPS}
    for case in cases:
        ours = "accept" if "limits" in case else case["verdict"]
        theirs, detail = found[case["id"]]
        if ours == theirs:
            continue
        said = "accepted" if theirs == "accept" else f"refused: {detail}"
        mine = case.get("code", "accepted")
        rows[case["compat"]["quirk"]].append(
            f"| `{case['id']}` | {mine} | {cell(said)} | {case['why']} |"
        )
    total = sum(map(len, rows.values()))
    out = [
        "# Where we and the reference disagree",
        "",
        f"The reference package, `safetensors` {VERSION} from PyPI, over every header case of",
        f"`conformance/`: {len(cases)} files, and on {total} of them our default, the strict",
        "profile, gives another verdict. On every other case the two agree, and where both",
        "accept a file they read the same names, dtypes, shapes and metadata. The compat profile",
        "(clause 10.9) gives the reference's verdict on all of them; each group below is one of",
        "its quirks.",
        "",
        "This file is written by `conformance/run_reference.py`; a test holds it true.",
    ]
    for name, (title, why) in GROUPS.items():
        out += [
            "",
            f"## {title} (`{name}`)",
            "",
            why,
            "",
            "| case | we say | the reference says | what the case is |",
            "|---|---|---|---|",
            *rows[name],
        ]
    return "\n".join(out) + "\n"


def cell(text):
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    text = text if len(text) <= 160 else text[:157] + "..."
    return text.replace("|", "\\|")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where the table is stale"
    )
    check = parser.parse_args().check
    if safetensors.__version__ != VERSION:
        print(f"needs safetensors {VERSION}, found {safetensors.__version__}")
        return 2
    manifest = json.loads((ROOT / "manifest.json").read_bytes())
    cases = [case for case in manifest["cases"] if case["kind"] == "header"]
    found, wrong = judge(cases)
    for line in wrong:
        print(line)
    if wrong:
        return 1
    text = table(cases, found)
    if check:
        same = TABLE.is_file() and TABLE.read_text(encoding="utf-8") == text
        print("the table is true" if same else "docs/disagreements.md is stale")
        return 0 if same else 1
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text, encoding="utf-8")
    print(f"{len(cases)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
