"""The checkpoints that are loaded, and what the page cache holds of them.

Neither side writes them. Every tensor's bytes are a stretch of one pool of random bytes, so that
whoever has the pool can say whether what was loaded is what was written.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

POOL = 768 << 20
ITEM = {"BF16": 2, "F32": 4}
#: Bytes that one write or read moves.
BLOCK = 8 << 20

Entry = tuple[str, str, list[int]]


def pool(size: int = POOL) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The random bytes, the same in every process."""
    return np.random.default_rng(5).integers(0, 2**64, size // 8, dtype=np.uint64).view(np.uint8)


def length(entry: Entry) -> int:
    _, dtype, shape = entry
    return int(np.prod(shape, dtype=np.int64)) * ITEM[dtype]


def place(name: str, size: int) -> int:
    """Where a tensor's bytes begin in the pool: anywhere, but always there for this name."""
    return zlib.crc32(name.encode()) % (POOL - size + 1) & ~63


def transformer(size: int) -> list[Entry]:
    """A decoder of about this many bytes with the shapes of an 8-billion-parameter one, in BF16."""
    hidden, inner, keys, vocabulary = 4096, 14336, 1024, 64 << 10
    layer = {
        "input_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "post_attention_layernorm": [hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    entries: list[Entry] = [("model.embed_tokens.weight", "BF16", [vocabulary, hidden])]
    ends: list[Entry] = [
        ("model.norm.weight", "BF16", [hidden]),
        ("lm_head.weight", "BF16", [vocabulary, hidden]),
    ]
    if size < 4 << 30:
        # A small one for trying things out: the same layers, no large vocabulary.
        entries, ends = [], ends[:1]
    left = size - sum(map(length, entries + ends))
    number = 0
    while left > 0:
        of_layer: list[Entry] = [
            (f"model.layers.{number}.{name}.weight", "BF16", shape) for name, shape in layer.items()
        ]
        entries += of_layer
        left -= sum(map(length, of_layer))
        number += 1
    return entries + ends


def small(count: int) -> list[Entry]:
    """Many tensors of 1 KiB, as adapters and experts have them."""
    return [(f"model.layers.{i // 500}.experts.{i % 500}.bias", "F32", [256]) for i in range(count)]


def split(entries: list[Entry], parts: int) -> list[list[Entry]]:
    """Consecutive entries in so many file shards of about the same size."""
    total, done = sum(map(length, entries)), 0
    shards: list[list[Entry]] = [[] for _ in range(parts)]
    for entry in entries:
        shards[min(done * parts // total, parts - 1)].append(entry)
        done += length(entry)
    return [shard for shard in shards if shard]


def write(folder: Path, entries: list[Entry], parts: int) -> Path:
    """Writes a folder with file shards and an index, on the disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(entries, parts)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    data = memoryview(pool())
    with ThreadPoolExecutor(8) as workers:
        for name, shard in zip(names, shards, strict=True):
            write_file(folder / name, shard, data, workers)
    places = {e[0]: n for n, shard in zip(names, shards, strict=True) for e in shard}
    total = sum(map(length, entries))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_file(
    path: Path, shard: list[Entry], data: memoryview, workers: ThreadPoolExecutor
) -> None:
    offset, header = 0, {}
    for entry in shard:
        end = offset + length(entry)
        header[entry[0]] = {"dtype": entry[1], "shape": entry[2], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        start = 8 + len(text)
        os.posix_fallocate(file.fileno(), 0, start + offset)

        def put(entries: list[Entry]) -> None:
            joined = b"".join(
                data[place(e[0], length(e)) : place(e[0], length(e)) + length(e)] for e in entries
            )
            os.pwrite(file.fileno(), joined, start + header[entries[0][0]]["data_offsets"][0])

        for _ in workers.map(put, list(batches(shard))):
            pass
        os.fsync(file.fileno())


def batches(shard: list[Entry]) -> Iterator[list[Entry]]:
    """Consecutive entries, at least 64 MiB of them together."""
    batch: list[Entry] = []
    size = 0
    for entry in shard:
        batch.append(entry)
        size += length(entry)
        if size >= 64 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def shards(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.safetensors"))


def header(path: str) -> tuple[dict[str, dict[str, Any]], int]:
    """The header's entries without metadata, and where the data begin."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


def resident(path: str) -> float:
    """Which part of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        pages = (len(view) + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        found = (ctypes.c_ubyte * pages)()
        array = np.frombuffer(view, np.uint8)
        code = libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(view)), found)
        del array  # a map that something points into cannot be closed
        if code != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return float((np.frombuffer(found, np.uint8) & 1).mean())


def evict(folder: Path) -> None:
    """Drops these files, and nothing else, from the page cache, and makes sure of it."""
    for path in shards(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        part = resident(path)
        if part > 0.01:
            raise RuntimeError(f"{path}: {part:.0%} of it stays in the page cache")


def warm(folder: Path) -> None:
    """Brings these files into the page cache."""

    def read(path: str, offset: int) -> None:
        with open(path, "rb", buffering=0) as file:
            os.preadv(file.fileno(), [bytearray(BLOCK)], offset)

    with ThreadPoolExecutor(8) as workers:
        for path in shards(folder):
            offsets = range(0, os.path.getsize(path), BLOCK)
            for _ in workers.map(read, [path] * len(offsets), offsets):
                pass
