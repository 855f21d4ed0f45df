"""Runs workers in alternation and keeps what they took: seconds, and peak memory over the start."""

from __future__ import annotations

import json
import mmap
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIDES = ("reference", "tonnage")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Sample:
    seconds: float
    #: Peak of anonymous memory, and of all resident memory (with mapped file pages), in bytes,
    #: each above what was in use before the task. Zero where memory was not watched.
    anonymous: int = 0
    resident: int = 0


@dataclass
class Row:
    """One line of a table: a task, and its samples by side."""

    title: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SIDES})
    anonymous: dict[str, list[int]] = field(default_factory=lambda: {s: [] for s in SIDES})
    resident: dict[str, list[int]] = field(default_factory=lambda: {s: [] for s in SIDES})

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self) -> float:
        return self.median("tonnage") / self.median("reference")


def memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process now."""
    found = {"RssAnon": 0, "VmRSS": 0}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["VmRSS"]


def settle() -> None:
    """Equal conditions for the next worker: nothing dirty, and free memory the host has in hand.

    A virtual machine gives free pages back to its host, and getting them again costs a factor; so
    some are touched here, where nothing is timed.
    """
    os.sync()
    with mmap.mmap(-1, 5 << 29) as pool:
        pool.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(pool), 4096):
            pool[offset] = 1


def evict(path: Path) -> None:
    """Drop a file from the page cache, and make sure that it is gone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    resident = subprocess.run(
        ["fincore", "-b", "-n", "-o", "RES", str(path)], capture_output=True, text=True, check=True
    )
    if int(resident.stdout) > path.stat().st_size // 100:
        raise RuntimeError(f"{path} stays in the page cache: {resident.stdout.strip()} bytes")


def warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def run(
    side: str,
    task: str,
    arguments: dict[str, Any],
    before: Callable[[], object],
    watch: bool,
) -> Sample:
    command = [sys.executable, "-m", "bench.worker", side, task, json.dumps(arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError(f"{side} {task} {arguments} did not start")
        before()
        base = peak = memory(worker.pid)
        print("go", file=worker.stdin, flush=True)
        while watch and not select.select([worker.stdout], [], [], 0.001)[0]:
            now = memory(worker.pid)
            peak = (max(peak[0], now[0]), max(peak[1], now[1]))
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"{side} {task} {arguments} died")
        now = memory(worker.pid)  # the result is still held
        peak = (max(peak[0], now[0]), max(peak[1], now[1]))
        print("end", file=worker.stdin, flush=True)
    seconds = json.loads(line)["seconds"]
    return Sample(seconds, peak[0] - base[0], peak[1] - base[1])


def compare(
    title: str,
    task: str,
    arguments: dict[str, Any],
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
    memory_rounds: int = 1,
) -> Row:
    """Both sides `rounds` times in alternating order; then again, watching their memory."""
    row = Row(title)
    for number in range(rounds + memory_rounds):
        watch = number >= rounds
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            sample = run(side, task, dict(arguments), before, watch)
            if watch:
                row.anonymous[side].append(sample.anonymous)
                row.resident[side].append(sample.resident)
            else:
                row.seconds[side].append(sample.seconds)
    print(
        f"{title:58} {row.median('reference'):9.4f} s {row.median('tonnage'):9.4f} s"
        f"  {row.ratio():6.2f} ×",
        flush=True,
    )
    return row
