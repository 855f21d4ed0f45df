"""Blocks of ggml's types with their values, and numbers with the blocks that ggml makes of them.

    pip install gguf==0.19.0 numpy safetensors
    python conformance/quant/generate/gguf_blocks.py GGML      # a checkout of ggml
    python conformance/quant/generate/gguf_blocks.py --grids   # crates/quant/src/ggml/grids.rs

`blocks.safetensors` holds, for each type, `<TYPE>.blocks` (U8 [n, bytes]) and `<TYPE>.values`
(F32 [n, elements]), the values as the `gguf` package dequantises them. For types with a grid,
`<TYPE>.points` are blocks that name every point of it and `<TYPE>.points_hash` is the 64-bit FNV-1a
of their values' bytes. Types that the package cannot dequantise (Q1_0, Q2_0) have their values from
ggml's C.

`quantized.safetensors` holds `input` (F32 [n, 256]) and `<TYPE>.blocks`, what ggml's
`quantize_row_*_ref` (of IQ4_NL: `quantize_iq4_nl`) makes of it. ggml is built here as it ships:
without instructions that would fuse multiplications.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent.parent / "ggml"

# Where a block keeps its binary16 scales: random bytes there would often be NaN or infinite.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ2_XXS": [0],
    "IQ2_XS": [0],
    "IQ2_S": [0],
    "IQ3_XXS": [0],
    "IQ3_S": [0],
    "IQ1_S": [0],
    "IQ1_M": [],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "MXFP4": [],
    "NVFP4": [],
    "Q1_0": [0],
    "Q2_0": [0],
}

SIZES = {name: gguf.GGML_QUANT_SIZES[Type[name]] for name in HALVES if name in Type.__members__} | {
    "Q2_0": (64, 18)
}

# A grid's points, and where a block keeps its indices' low bytes.
POINTS = {
    "IQ2_XXS": 256,
    "IQ2_XS": 512,
    "IQ2_S": 1024,
    "IQ3_XXS": 256,
    "IQ3_S": 512,
    "IQ1_S": 2048,
    "IQ1_M": 2048,
}

LEGACY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0", "Q2_0"]
QUANTIZED = [*LEGACY, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0"]

SHIM = """
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
void ggml_abort(const char * f, int l, const char * s, ...) { abort(); }
size_t ggml_row_size(int t, int64_t n) { abort(); }
size_t ggml_type_size(int t) { abort(); }
const char * ggml_type_name(int t) { return ""; }
"""


def random_blocks(rng: np.random.Generator, name: str, count: int) -> np.ndarray:
    blocks = rng.integers(0, 256, (count, SIZES[name][1]), dtype=np.uint8)
    for at in HALVES[name]:
        scales = (rng.normal(size=count) * 2.0 ** rng.integers(-20, 8, count)).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    if name == "IQ1_M":  # The top bits of four words are the binary16: a smaller exponent.
        blocks[:, 55] &= 0xBF
    if name == "MXFP4":
        blocks[:, 0] = [*rng.integers(100, 150, count - 4), 0, 1, 2, 254][-count:]
    if name == "NVFP4":
        blocks[-1, :4] = [0, 0x7F, 0xFF, 0x80]
    return blocks


def point_blocks(rng: np.random.Generator, name: str) -> np.ndarray:
    """Blocks whose indices, taken together, are all of the grid's, in order."""
    dims = 4 if name.startswith("IQ3") else 8
    index = np.arange(POINTS[name]).reshape(-1, 256 // dims)
    blocks = random_blocks(rng, name, len(index))
    low, high = (index & 255).astype(np.uint8), index >> 8
    rows = np.arange(len(index))[:, None]
    at = np.arange(index.shape[1])[None, :]
    if name == "IQ2_XXS":
        blocks[rows, 2 + 8 * (at // 4) + at % 4] = low
    elif name == "IQ2_XS":
        blocks[rows, 2 + 2 * at] = low
        blocks[rows, 3 + 2 * at] = blocks[rows, 3 + 2 * at] & 0xFE | high.astype(np.uint8)
    elif name == "IQ2_S":
        blocks[rows, 2 + at] = low
        pack(blocks, 66, high, 2)
    elif name == "IQ3_XXS":
        blocks[rows, 2 + at] = low
    elif name == "IQ3_S":
        blocks[rows, 2 + at] = low
        pack(blocks, 66, high, 1)
    elif name == "IQ1_S":
        blocks[rows, 2 + at] = low
        words = blocks[:, 34:50].copy().view("<u2")
        four = high.reshape(len(index), 8, 4)
        words = words & 0xF000 | (four << np.array([0, 3, 6, 9])).sum(-1).astype("<u2")
        blocks[:, 34:50] = words.astype("<u2").view(np.uint8)
    elif name == "IQ1_M":
        blocks[rows, at] = low
        nibbles = (high | rng.integers(0, 2, high.shape) << 3).reshape(len(index), 16, 2)
        blocks[:, 32:48] = (nibbles[..., 0] | nibbles[..., 1] << 4).astype(np.uint8)
    return blocks


def pack(blocks: np.ndarray, at: int, high: np.ndarray, bits: int) -> None:
    per = 8 // bits
    grouped = high.reshape(len(high), -1, per) << (bits * np.arange(per))
    packed = grouped.sum(-1).astype(np.uint8)
    blocks[:, at : at + packed.shape[1]] = packed


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def ggml_library(checkout: Path) -> ctypes.CDLL:
    """ggml's reference code by itself, without instructions that would fuse multiplications."""
    folder = Path(tempfile.mkdtemp())
    (folder / "shim.c").write_text(SHIM)
    source = checkout / "src"
    includes = [f"-I{checkout / 'include'}", f"-I{source}", f"-I{source / 'ggml-cpu'}"]
    files = [str(source / "ggml-quants.c"), str(folder / "shim.c")]
    out = folder / "ggml.so"
    flags = ["-O2", "-fPIC", "-shared"]
    subprocess.run(["gcc", *flags, *includes, *files, "-o", str(out), "-lm"], check=True)
    return ctypes.CDLL(str(out))


def call(function: Any, source: np.ndarray, target: np.ndarray, elements: int) -> None:
    pointer = ctypes.c_void_p
    function(pointer(source.ctypes.data), pointer(target.ctypes.data), ctypes.c_int64(elements))


def values_of(name: str, blocks: np.ndarray, library: ctypes.CDLL) -> np.ndarray:
    if name in Type.__members__ and Type[name] in quants._type_traits:
        return quants.dequantize(blocks, Type[name])
    values = np.empty((len(blocks), SIZES[name][0]), np.float32)
    call(getattr(library, f"dequantize_row_{name.lower()}"), blocks, values, values.size)
    return values


def write_blocks(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(20)
    tensors: dict[str, np.ndarray] = {}
    for name, (elements, _) in SIZES.items():
        blocks = random_blocks(rng, name, 16 if elements <= 64 else 3)
        with np.errstate(all="ignore"):
            values = values_of(name, blocks, library)
            assert np.isfinite(values).all() or name in ("MXFP4", "IQ1_M"), name
            tensors[f"{name}.blocks"], tensors[f"{name}.values"] = blocks, values
            if name in POINTS:
                points = point_blocks(rng, name)
                tensors[f"{name}.points"] = points
                hashed = fnv1a(quants.dequantize(points, Type[name]).astype("<f4").tobytes())
                tensors[f"{name}.points_hash"] = np.array([hashed], np.uint64)
    save_file(tensors, HERE / "blocks.safetensors", {"gguf": gguf_version(), "format": "np"})


def inputs() -> np.ndarray:
    """Rows of 256: what weights look like, and what breaks a quantiser."""
    rng = np.random.default_rng(5)
    rows = [rng.normal(size=256) * scale for scale in (1.0, 0.02, 30.0, 1e-4)]
    rows += [np.abs(rng.normal(size=256)) + 0.5, -np.abs(rng.normal(size=256)) - 0.5]
    rows += [np.zeros(256), np.full(256, 0.75), np.full(256, -2.0), rng.integers(-1, 2, 256) * 0.3]
    rows += [rng.integers(-8, 8, 256).astype(float), np.arange(256) / 7.0]
    rows += [rng.standard_t(1, 256).clip(-1e4, 1e4), np.tile([1.0, -0.0], 128)]
    outlier = rng.normal(size=256)
    outlier[[3, 77, 200]] = [60.0, -80.0, 1e-30]
    half_zero = rng.normal(size=256) * (np.arange(256) % 64 < 32)
    rows += [outlier, half_zero, rng.normal(size=256) * 1e-9, rng.uniform(-1, 1, 256)]
    return np.array(rows, np.float32)


def write_quantized(library: ctypes.CDLL) -> None:
    data = inputs()
    tensors = {"input": data}
    for name in QUANTIZED:
        elements, size = SIZES[name]
        blocks = np.zeros((data.size // elements, size), np.uint8)
        if name == "IQ4_NL":  # Files are made with this one; the other looks for no scale.
            rows, zero = ctypes.c_int64(1), ctypes.c_void_p(None)
            pointers = [ctypes.c_void_p(array.ctypes.data) for array in (data, blocks)]
            library.quantize_iq4_nl(*pointers, rows, ctypes.c_int64(data.size), zero)
        else:
            call(getattr(library, f"quantize_row_{reference(name)}_ref"), data, blocks, data.size)
        tensors[f"{name}.blocks"] = blocks
    save_file(tensors, HERE / "quantized.safetensors", {"ggml": "d99724f", "format": "np"})


def reference(name: str) -> str:
    return name.lower().replace("_k", "_K")


def gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def print_grids() -> None:
    for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ3_XXS", "IQ3_S"):
        label = name.replace("IQ1_S", "IQ1")
        points = np.frombuffer(bytes.fromhex(getattr(quants, name).grid_hex.decode()), "<u2")
        print(f"#[rustfmt::skip]\npub(super) static {label}: [u16; {len(points)}] = [")
        for i in range(0, len(points), 14):
            print("   ", " ".join(f"{point:#06x}," for point in points[i : i + 14]))
        print("];\n")


def main() -> None:
    if sys.argv[1:] == ["--grids"]:
        print_grids()
        return
    library = ggml_library(Path(sys.argv[1]))
    HERE.mkdir(parents=True, exist_ok=True)
    write_blocks(library)
    write_quantized(library)


if __name__ == "__main__":
    main()
