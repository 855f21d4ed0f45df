"""The small checkpoints of `conformance/quant`: listed, hashed, readable, nothing beside."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tonnage

ROOT = Path(__file__).resolve().parents[3] / "conformance" / "quant"
# Rooms with lists and tests of their own.
ELSEWHERE = {"generate", "ggml", "map", "rounded"}
BESIDE = {"README.md", "SHA256SUMS", "cases.json"}
LIMIT = 6_000_000

CASES: list[dict[str, Any]] = json.loads((ROOT / "cases.json").read_text())["cases"]
FIELDS = {
    "path": str,
    "library": str,
    "version": str,
    "scheme": str,
    "bits": (int, float),
    "made_by": str,
    "writer": str,
    "how": str,
    "notes": str,
    "files": list,
    "stored": int,
    "tensors": dict,
}
NUMBERS = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def files() -> set[str]:
    inside = (f.relative_to(ROOT) for f in ROOT.rglob("*") if f.is_file())
    return {f.as_posix() for f in inside if f.parts[0] not in ELSEWHERE}


def test_every_file_is_listed_and_no_other_is_there() -> None:
    listed = {f"{row['path']}/{name}" for row in CASES for name in row["files"]}
    assert files() == listed | BESIDE


def test_every_file_has_the_hash_that_is_written_down() -> None:
    lines = [line.split("  ", 1) for line in (ROOT / "SHA256SUMS").read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    assert len(sums) == len(lines)
    assert set(sums) == files() - BESIDE
    for name, digest in sums.items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest, name


def test_the_list_is_sorted_complete_and_names_each_case_once() -> None:
    paths = [row["path"] for row in CASES]
    assert paths == sorted(set(paths))
    for row in CASES:
        for field, kind in FIELDS.items():
            assert isinstance(row.get(field), kind), (row["path"], field)
        assert row["path"].split("/")[0] == row["scheme"], row["path"]
        assert row["made_by"] in ("library", "transcription")
        assert row["tensors"], row["path"]
        assert {"model.safetensors", "expected.safetensors"} <= set(row["files"])


def test_the_corpus_stays_small() -> None:
    assert sum((ROOT / name).stat().st_size for name in files()) < LIMIT


@pytest.mark.parametrize("row", CASES, ids=[row["path"] for row in CASES])
def test_a_case_is_read_as_it_is_listed(row: dict[str, Any]) -> None:
    where = ROOT / row["path"]
    with tonnage.open(where / "model.safetensors") as stored:
        assert len(stored.keys()) == row["stored"]
        for name in stored.keys():  # noqa: SIM118 - a checkpoint's own method is under test
            assert stored[name].numpy().nbytes == stored[name].nbytes
    with tonnage.open(where / "expected.safetensors") as expected:
        assert set(expected.keys()) == set(row["tensors"])
        for name, says in row["tensors"].items():
            tensor = expected[name]
            assert list(tensor.shape) == says["shape"]
            assert str(tensor.dtype) == says["dtype"]
            assert tensor.numpy().dtype == NUMBERS[says["dtype"]]
            values = tensor.numpy().astype(np.float32)
            assert np.isfinite(values).all(), name
            # A file of zeros would agree with many wrong decoders.
            assert len(np.unique(values)) > 2, name
    for name in row["files"]:
        if name.endswith(".json"):
            assert isinstance(json.loads((where / name).read_text()), dict | list)
