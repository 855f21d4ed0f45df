"""A file of every dtype, with shapes and placements that are hard to load together."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import tonnage
from tonnage._dtypes import ROWS

#: Dtypes that PyTorch and NumPy both have.
DTYPES = (
    *("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"),
    *("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"),
)


def tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor."""
    made: dict[str, tuple[str, tuple[int, ...]]] = {}
    for dtype in DTYPES:
        made[dtype] = (dtype, (37, 30))
        made[f"{dtype}.columns"] = (dtype, (41, 26) if dtype != "F4" else (41, 32))
        made[f"{dtype}.whole"] = (dtype, (6, 4))
    made |= {
        "scalar": ("F32", ()),
        "nothing": ("F16", (0, 5)),
        "strided": ("BF16", (48, 20)),
        "kv.heads": ("F32", (16, 10)),
        "stage": ("F32", (200, 33)),
        "deep": ("BF16", (3, 22, 18)),
        "large.columns": ("F16", (700, 900)),
        "large.whole": ("BF16", (500, 700)),
    }
    return made


def rules(world: int) -> dict[str, Any]:
    """Placements; with more than two ranks the mesh has pipeline stages too."""
    stages: dict[str, Any] = {"pp": tonnage.Owner(1)} if world > 2 else {}
    return {
        "*.whole": tonnage.Replicate(),
        "scalar": tonnage.Replicate(),
        "norm": tonnage.Replicate(),
        "stage": {**stages, "tp": tonnage.Shard(1)},
        "strided": {"tp": tonnage.StridedShard(0, 3)},
        "kv.heads": {"tp": tonnage.Heads(0, heads=1, head_dim=16)},
        "deep": {"tp": tonnage.Shard(1)},
        "*.columns": {"tp": tonnage.Shard(1)},
        "nothing": {"tp": tonnage.Shard(1)},
        "*": {"tp": tonnage.Shard(0)},
    }


def write(path: Path, made: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Writes the file with bytes that differ everywhere; gives how many bytes tensors have."""
    bits = {row.name: row.bits for row in ROWS.values()}
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in made.items():
        size = bits[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size // 8]}
        at += size // 8
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = bytearray(random.Random(7).randbytes(at))
    for name, (dtype, _) in made.items():
        if dtype == "BOOL":
            begin, end = header[name]["data_offsets"]
            data[begin:end] = bytes(byte & 1 for byte in data[begin:end])
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return at
