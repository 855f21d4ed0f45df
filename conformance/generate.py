#!/usr/bin/env python3
"""Writes the conformance cases and their manifest. Standard library only, deterministic.

The committed files are the truth: without `--write` this only says where it would write something
else. Frozen files are written once, never again.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from generator import checksums, container, entries, frozen, grammar, index, layout  # noqa: E402
from generator.build import Corpus  # noqa: E402


def corpus():
    cases = Corpus()
    for chapter in (container, grammar, entries, layout, index, checksums):
        chapter.add(cases)
    return cases


def manifest(cases):
    head = {"format": "safetensors-conformance", "version": 1, "schema": "manifest.schema.json"}
    rows = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
    return (json.dumps(head)[:-1] + ', "cases": [\n' + rows + "\n]}\n").encode()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write what is missing or differs")
    write = parser.parse_args().write
    cases = corpus()
    wanted = {**cases.files, "manifest.json": manifest(cases.cases)}
    wanted.update(frozen.missing(ROOT))
    wanted.update(frozen.verdicts(ROOT, cases))
    stale = [path for path, blob in sorted(wanted.items()) if not same(ROOT / path, blob)]
    found = (path for path in (ROOT / "files").rglob("*") if path.is_file())
    stray = sorted({path.relative_to(ROOT).as_posix() for path in found} - set(cases.files))
    for path in stale:
        print(("writing " if write else "differs: ") + path)
        if write:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_bytes(wanted[path])
    for path in stray:
        print("no case for: " + path)
    print(f"{len(cases.cases)} cases, {len(stale)} files differ, {len(stray)} stray")
    return 0 if write or not (stale or stray) else 1


def same(path, blob):
    return path.is_file() and path.read_bytes() == blob


if __name__ == "__main__":
    sys.exit(main())
