"""`python -m bench save4` and `python -m bench verify`: saving beside what the disk takes, and
loading with checksums compared beside loading without.

`save4`: every side writes as much to a new file, in a process of its own, by turns. *Disk*: room
made by `fallocate`, blocks of 4 MiB written past the page cache by two threads, then `fsync`: what
this disk takes at most. *Durable*: file and folder are on the disk when the call returns; the
reference's save is followed by `fsync` of both. *Plain*: nobody waits for the disk. Memory is the
peak above what the process had before the save, tensors included.

`verify`: cold loads of a file that has checksums, with `verify=True` and without.
"""

from __future__ import annotations

import mmap
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .measure import ROOT, evict, memory

#: Bytes of a tensor, and of a block that goes to the disk.
TENSOR = 8 << 20
BLOCK = 4 << 20

SAVES = {
    "disk": "fallocate, O_DIRECT, fsync",
    "reference durable": "reference, then fsync",
    "reference plain": "reference, plain",
    "tonnage durable": "Tonnage, durable",
    "tonnage checksums": "Tonnage, durable, with checksums",
    "tonnage plain": "Tonnage, plain",
}
LOADS = {"load": "load", "verify": "load, verified"}


def sync(path: Path) -> None:
    """Brings a file and its folder to the disk."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def disk(path: Path, size: int) -> Callable[[], object]:
    """What the disk takes: two threads, each with a block of its own."""
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(2)]
    for buffer in buffers:
        buffer.write(os.urandom(BLOCK))

    def half(file: int, which: int) -> None:
        for offset in range(which * BLOCK, size, 2 * BLOCK):
            if os.pwrite(file, buffers[which], offset) != BLOCK:
                raise OSError(f"a short write at {offset}")

    def job() -> None:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT, 0o666)
        os.posix_fallocate(file, 0, size)
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(half, file, which) for which in range(2)]:
                done.result()
        os.fsync(file)
        os.close(file)
        sync(path)

    return job


def saving(side: str, path: Path, size: int) -> Callable[[], object]:
    """A save by one of the sides."""
    if side == "disk":
        return disk(path, size)
    import numpy as np

    block = np.random.default_rng(0).random((1024, TENSOR // 4096), dtype=np.float32)
    tensors = {f"layers.{i}.weight": block.copy() for i in range(size // TENSOR)}
    if side.startswith("tonnage"):
        import tonnage

        durable, checksums = side != "tonnage plain", side == "tonnage checksums"
        return lambda: tonnage.save(tensors, path, fsync=durable, checksums=checksums)
    import safetensors.numpy

    def job() -> None:
        safetensors.numpy.save_file(tensors, path)
        if side == "reference durable":
            sync(path)

    return job


def loading(side: str, path: Path) -> Callable[[], object]:
    """A load with or without verification."""
    import tonnage

    return lambda: tonnage.open(path).load(framework="numpy", verify=side == "verify")


def work(side: str, path: Path, size: int) -> None:
    """The process of one measurement."""
    job = loading(side, path) if side in LOADS else saving(side, path, size)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    result = job()
    print(time.perf_counter() - start, flush=True)
    sys.stdin.readline()
    del result


def once(side: str, path: Path, size: int, before: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and peak anonymous memory above the start."""
    command = [sys.executable, "-m", "bench.durable", side, str(path), str(size)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError(f"{side} did not start")
        before()
        base = peak = memory(worker.pid)[0]
        print("go", file=worker.stdin, flush=True)
        while not select.select([worker.stdout], [], [], 0.005)[0]:
            peak = max(peak, memory(worker.pid)[0])
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"{side} died")
        print("end", file=worker.stdin, flush=True)
    return float(line), peak - base


def rounds_of(
    sides: dict[str, str],
    path: Path,
    size: int,
    rounds: int,
    limit: float,
    before: Callable[[], None],
) -> dict[str, dict[str, list[float]]]:
    """Samples by side: all sides take turns, in one order and the other, while the time lasts."""
    found: dict[str, dict[str, list[float]]] = {s: {"seconds": [], "memory": []} for s in sides}
    began = time.perf_counter()
    for number in range(rounds):
        spent = time.perf_counter() - began
        if number and spent + spent / number > limit:
            break
        for side in list(sides) if number % 2 == 0 else list(reversed(sides)):
            seconds, peak = once(side, path, size, before)
            found[side]["seconds"].append(seconds)
            found[side]["memory"].append(peak)
    return found


def table(sides: dict[str, str], found: dict[str, Any], size: int) -> str:
    """Markdown: median, rate, spread, and memory of each side."""
    lines = ["| what | median | GiB/s | fastest to slowest | memory above the start |"]
    lines.append("|---|---:|---:|---:|---:|")
    for side, title in sides.items():
        seconds = found[side]["seconds"]
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f} s"
        peak = max(found[side]["memory"]) / 2**20
        rate = size / 2**30 / median
        lines.append(f"| {title} | {median:.2f} s | {rate:.2f} | {spread} | {peak:,.0f} MiB |")
    return "\n".join(lines)


def save4(folder: Path, rounds: int, size: int, limit: float) -> dict[str, Any]:
    """Saves by all sides; the verdicts beside their targets."""
    path = folder / "saved.safetensors"
    size -= size % TENSOR

    def clear() -> None:
        path.unlink(missing_ok=True)
        os.sync()

    found = rounds_of(SAVES, path, size, rounds, limit, clear)
    clear()
    median = {side: statistics.median(found[side]["seconds"]) for side in SAVES}
    ours = median["tonnage durable"]
    peak = max(found["tonnage durable"]["memory"] + found["tonnage checksums"]["memory"])
    print(f"\n{table(SAVES, found, size)}\n")
    print(f"of the disk's rate: {median['disk'] / ours:.2f} (target 0.85)")
    print(f"faster than reference and fsync: {median['reference durable'] / ours:.2f} × (1.5)")
    print(f"faster than reference, plain: {median['reference plain'] / ours:.2f} × (1)")
    print(f"plain beside plain: {median['reference plain'] / median['tonnage plain']:.2f} × faster")
    print(f"checksums cost {median['tonnage checksums'] / ours - 1:+.1%}")
    print(f"memory above the tensors: {peak / 2**20:.0f} MiB (target 64)", flush=True)
    return {"size": size, "sides": found}


def verify(folder: Path, rounds: int, size: int, limit: float) -> dict[str, Any]:
    """Cold loads, verified and not."""
    path = folder / "checked.safetensors"
    size -= size % TENSOR
    saving("tonnage checksums", path, size)()

    def cold() -> None:
        os.sync()
        evict(path)

    found = rounds_of(LOADS, path, size, rounds, limit, cold)
    median = {side: statistics.median(found[side]["seconds"]) for side in LOADS}
    print(f"\n{table(LOADS, found, size)}\n")
    cost = median["verify"] / median["load"] - 1
    print(f"verify=True costs {cost:+.1%} of a cold load (target +10 %)", flush=True)
    return {"size": size, "sides": found}


SUITES: dict[str, Callable[[Path, int, int, float], dict[str, Any]]] = {
    "save4": save4,
    "verify": verify,
}


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
