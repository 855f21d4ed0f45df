"""What the tests of the paved path share: tensors of every dtype, files, and a header by hand."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

#: Header name → NumPy dtype, all of them.
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "F4": ml_dtypes.float4_e2m1fn,
    "F6_E2M3": ml_dtypes.float6_e2m3fn,
    "F6_E3M2": ml_dtypes.float6_e3m2fn,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Random bit patterns as an array of a header's dtype."""
    kind = np.dtype(DTYPES[dtype])
    random = np.random.default_rng(seed)
    top = 1 << BITS.get(dtype, 8)
    if dtype == "BOOL":
        top = 2
    patterns = random.integers(0, top, (*shape, kind.itemsize), np.uint8)
    return patterns.reshape(-1).view(kind).reshape(shape)


def same(a: Any, b: Any) -> bool:
    """Whether two arrays have dtype, shape and every bit in common."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def pack(array: Any, bits: int) -> bytes:
    """Sub-byte elements packed least significant bit first, the slow way."""
    total = 0
    patterns = array.reshape(-1).view(np.uint8)
    for at, element in enumerate(patterns):
        total |= int(element) << (at * bits)
    return total.to_bytes(len(patterns) * bits // 8, "little")


def content(tensors: dict[str, tuple[str, list[int], bytes]], **more: Any) -> bytes:
    """A file by hand, its tensors in the order given."""
    header: dict[str, Any] = dict(more)
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def model(seed: int = 0) -> dict[str, Any]:
    """Tensors of a small model, as NumPy arrays that the reference package can write."""
    return {
        "embed.weight": values("F32", (16, 8), seed),
        "layers.0.attn.weight": values("F16", (8, 8), seed + 1),
        "layers.0.attn.bias": values("F32", (8,), seed + 2),
        "layers.1.attn.weight": values("F16", (8, 8), seed + 3),
        "layers.1.attn.bias": values("F32", (8,), seed + 4),
        "step": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }


def write_model(path: Path, seed: int = 0, **metadata: str) -> dict[str, Any]:
    """Has the reference package write a file, and gives the arrays in it."""
    tensors = model(seed)
    safetensors.numpy.save_file(tensors, path, metadata=metadata or None)
    return tensors


class Counting(io.RawIOBase):
    """A file object without a descriptor that counts the bytes taken from it."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)
        self.taken = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def read(self, size: int = -1) -> bytes:
        part = self._inner.read(size)
        self.taken += len(part)
        return part
