"""What the machine itself can do, by the plainest means: copies, and reads of the same files."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import files

COPY = 512 << 20
READ = 2 << 30
BLOCK = 4 << 20


def job(device: str, folder: str) -> Callable[[], dict[str, Any]]:
    """GB/s by name."""
    return lambda: {"gb_per_s": {**copies(device), **reads(folder)}}


def rate(size: int, work: Callable[[], object], rounds: int = 5) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds) / 1e9


def copies(device: str) -> dict[str, float]:
    if not device.startswith("cuda"):
        return {}
    pageable, on_device = (
        torch.ones(COPY, dtype=torch.uint8),
        torch.empty(COPY, dtype=torch.uint8, device=device),
    )
    pinned = pageable.pin_memory()

    def copy(to: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        def work() -> None:
            to.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)

        work()
        return work

    found = {
        "host to device, pinned": rate(COPY, copy(on_device, pinned)),
        "host to device, pageable": rate(COPY, copy(on_device, pageable)),
        "device to host, pinned": rate(COPY, copy(pinned, on_device)),
    }
    slices = 8 << 20

    def in_slots() -> None:
        for at in range(0, COPY, slices):
            on_device[at : at + slices].copy_(pinned[at : at + slices], non_blocking=True)
        torch.cuda.synchronize(device)

    found["host to device, pinned, 8 MiB a copy"] = rate(COPY, in_slots)
    return found


def reads(folder: str) -> dict[str, float]:
    found = {}
    for threads in (1, 4, 16):
        files.evict(Path(folder))
        found[f"disk, O_DIRECT, {threads} threads of 4 MiB"] = read(folder, threads, os.O_DIRECT)
    files.evict(Path(folder))
    found["disk, buffered, 8 threads of 4 MiB"] = read(folder, 8, 0)
    files.warm(Path(folder))
    for threads in (1, 4, 8, 16):
        read(folder, threads, 0)
        found[f"page cache, {threads} threads of 4 MiB"] = read(folder, threads, 0)
    return found


def read(folder: str, threads: int, flags: int) -> float:
    """Reads 2 GiB of the files, each thread into one buffer of its own, over and over."""
    work, left = [], READ
    descriptors = []
    for path in files.shards(Path(folder)):
        descriptor = os.open(path, os.O_RDONLY | flags)
        descriptors.append(descriptor)
        whole = min(os.path.getsize(path), left) // BLOCK
        work += [(descriptor, block * BLOCK) for block in range(whole)]
        left -= whole * BLOCK

    def some(number: int) -> int:
        with mmap.mmap(-1, BLOCK) as buffer:
            buffer.write(bytes(BLOCK))
            return sum(os.preadv(d, [buffer], at) for d, at in work[number::threads])

    with ThreadPoolExecutor(threads) as workers:
        start = time.perf_counter()
        done = sum(workers.map(some, range(threads)))
        seconds = time.perf_counter() - start
    for descriptor in descriptors:
        os.close(descriptor)
    return done / seconds / 1e9
