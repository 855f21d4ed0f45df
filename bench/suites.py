"""The suites: which claims are measured, on which files, under which conditions."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .measure import ROOT, Row, compare, evict, settle, warm

SMALL = 100_000
#: 128 tensors of 8 MiB: 1 GiB.
LARGE = {f"layers.{i}.weight": [1024, 2048] for i in range(128)}


def write_file(path: Path, shapes: dict[str, list[int]]) -> Path:
    """An F32 file of these shapes, written by neither side."""
    offset, header = 0, {}
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, len(block)):
            file.write(block[: offset - start])
        os.fsync(file.fileno())
    return path


def tensors(folder: Path, rounds: int) -> list[Row]:
    """A file of 100,000 small tensors: open and read ten; read all."""
    names = [f"model.layers.{i // 50}.experts.{i % 50}.weight" for i in range(SMALL)]
    path = str(write_file(folder / "small.safetensors", {name: [4, 4] for name in names}))
    first = str(write_file(folder / "one.safetensors", {"one": [4, 4]}))
    cases = {"open, read 10": names[:: SMALL // 10], "open, get_tensor of all": []}
    rows = []
    for framework in ("torch", "numpy"):
        common = {"framework": framework}
        start = {**common, "path": first, "names": ["one"]}
        for title, some in cases.items():
            rows.append(
                compare(
                    f"{framework}: 100,000 tensors: {title}",
                    "read_some",
                    {**common, "path": path, "names": some, "warm_up": start},
                    rounds=rounds,
                )
            )
    return rows


def small(folder: Path, rounds: int) -> list[Row]:
    """100,000 small tensors to a device, at once, beside getting them one by one.

    One by one is the reference's `get_tensor` to host memory: to a device it would copy each, too.
    The device is the stub driver's (`cargo build --release -p tonnage-stubdriver`), whose memory is
    the host's, late; `TONNAGE_CUDA_DRIVER` names another. PyTorch's tensors are made in host memory
    as they are made on a GPU.
    """
    names = [f"model.layers.{i // 50}.experts.{i % 50}.weight" for i in range(SMALL)]
    path = str(write_file(folder / "small.safetensors", {name: [4, 4] for name in names}))
    first = str(write_file(folder / "one.safetensors", {"one": [4, 4]}))
    driver = ROOT / "target/release/libtonnage_stubdriver.so"
    os.environ.setdefault("TONNAGE_CUDA_DRIVER", str(driver))
    return [
        compare(
            f"100,000 tensors: {title}, beside get_tensor of each",
            "at_once",
            {"path": path, "device": device, "warm_up": {"path": first, "device": device}},
            rounds=rounds,
        )
        for device, title in (("cuda:0", "to a device"), ("cpu", "to PyTorch’s, by its table"))
    ]


def imports(folder: Path, rounds: int) -> list[Row]:
    """A process that imports the torch module and ends, and one that imports torch alone."""
    row = Row("a process that imports the .torch module")
    alone = Row("of these, `import torch` alone takes")
    statements = {
        "reference": "import safetensors.torch",
        "tonnage": "import tonnage.torch",
        "torch": "import torch",
    }
    for number in range(3 * rounds + 1):
        order = list(statements) if number % 2 else list(reversed(statements))
        for side in order:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statements[side]], check=True, cwd=folder)
            seconds = time.perf_counter() - start
            if number == 0:
                continue  # the first of each fills the page cache
            if side == "torch":
                for samples in alone.seconds.values():
                    samples.append(seconds)
            else:
                row.seconds[side].append(seconds)
    print(f"{row.title}: {row.ratio():.3f} ×", flush=True)
    return [row, alone]


def load(folder: Path, rounds: int) -> list[Row]:
    """1 GiB from the page cache and from the disk."""
    path = write_file(folder / "large.safetensors", LARGE)
    first = str(write_file(folder / "one.safetensors", {"one": [4, 4]}))

    def cold() -> None:
        settle()
        evict(path)

    def hot() -> None:
        settle()
        warm(path)

    def row(framework: str, state: str, title: str, task: str, **more: Any) -> Row:
        before = hot if state == "warm" else cold
        common = {"framework": framework, **more}
        arguments = {**common, "path": str(path), "warm_up": {**common, "path": first}}
        title = f"{framework}, {state}: {title}"
        return compare(title, task, arguments, rounds=rounds, before=before)

    views, owned = "load_file (views), every byte then read", "owned copies, every byte then read"
    rows = [row("torch", "warm", "load_file (views)", "load", use=False)]
    for state in ("warm", "cold"):
        rows.append(row("torch", state, views, "load", use=True))
        rows.append(row("torch", state, owned, "load_owned"))
        # Arrays always own their memory.
        rows.append(row("numpy", state, "load_file, every byte then read", "load", use=True))
        rows.append(row("numpy", state, "tonnage.open(…).load() beside load_file", "load_owned"))
    return rows


def save(folder: Path, rounds: int) -> list[Row]:
    """1 GiB to a new file: durable beside the reference plus fsync, plain beside plain."""
    path = folder / "saved.safetensors"

    def clear() -> None:
        """No old file, nothing dirty, and room in the page cache that the host has in hand."""
        path.unlink(missing_ok=True)
        os.sync()
        with tempfile.TemporaryFile(dir=folder) as file:
            block = bytes(1 << 24)
            for _ in range(80):
                file.write(block)

    return [
        compare(
            f"{framework}: save_file, {title}",
            "save",
            {"path": str(path), "framework": framework, "durable": durable},
            rounds=rounds,
            before=clear,
        )
        for framework in ("torch", "numpy")
        for durable, title in ((True, "durable (fsync of file and folder)"), (False, "plain"))
    ]


SUITES: dict[str, Callable[[Path, int], list[Row]]] = {
    "tensors": tensors,
    "small": small,
    "imports": imports,
    "load": load,
    "save": save,
}
