"""Where the generators of this folder put what the libraries write, and the list that names it.

A generator calls `case(...)` once for each small checkpoint and `finish()` at its end, which writes
`cases.json` (the list) and `SHA256SUMS` (a hash a file) anew and leaves other generators' entries.
Nothing here knows what a quantised byte means: that is the libraries' part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "cases.json"
SUMS = ROOT / "SHA256SUMS"
# Rooms with their own lists and their own tests.
ELSEWHERE = ("generate", "ggml", "map", "rounded")

_made: dict[str, dict[str, Any]] = {}


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, without `__metadata__`."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(size))
    found.pop("__metadata__", None)
    return found


def steady(path: Path) -> None:
    """Sorts the keys of `__metadata__`, which the writer has in an order drawn anew each time."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + size])
    found["__metadata__"] = dict(sorted(found["__metadata__"].items()))
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    if len(text) != size:
        raise ValueError(f"{path}: the header is not written as compactly as it could be")
    path.write_bytes(data[:8] + text + data[8 + size :])


def folder(path: str) -> Path:
    """An empty folder for the case `<scheme>/<name>`."""
    where = ROOT / path
    if where.exists():
        shutil.rmtree(where)
    where.mkdir(parents=True)
    return where


def case(
    path: str,
    *,
    library: str,
    version: str,
    scheme: str,
    bits: int | float,
    group: int | list[int] | None,
    how: str,
    writer: str,
    notes: str = "",
    **more: Any,
) -> None:
    """Lists a folder that holds `model.safetensors` and `expected.safetensors`.

    `writer` and `how` name the library's functions that wrote the one and computed the other.
    `group` is the number of inputs that share a scale, `[rows, columns]` for blocks, 0 for a whole
    row, `None` for a whole tensor.
    """
    where = ROOT / path
    stored = header(where / "model.safetensors")
    tensors = {
        name: {"shape": row["shape"], "dtype": row["dtype"]}
        for name, row in sorted(header(where / "expected.safetensors").items())
    }
    _made[path] = {
        "path": path,
        "library": library,
        "version": version,
        "scheme": scheme,
        "bits": bits,
        "group": group,
        "made_by": "library",
        "writer": writer,
        "how": how,
        "notes": notes,
        **more,
        "files": sorted(file.name for file in where.iterdir()),
        "stored": len(stored),
        "tensors": tensors,
    }


def finish() -> None:
    """Writes the list and the hashes anew."""
    old = json.loads(LIST.read_text())["cases"] if LIST.exists() else []
    rows = {row["path"]: row for row in old if (ROOT / row["path"]).is_dir()} | _made
    # One case, one line.
    lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
    LIST.write_text(f'{{"v": 1, "cases": [\n{lines}\n]}}\n')
    sums = []
    for file in sorted(ROOT.rglob("*")):
        inside = file.relative_to(ROOT)
        if file.is_file() and len(inside.parts) > 1 and inside.parts[0] not in ELSEWHERE:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            sums.append(f"{digest}  {inside.as_posix()}\n")
    SUMS.write_text("".join(sums))
    total = sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file())
    print(f"{len(_made)} cases made, {len(rows)} listed, {total} bytes in all")
