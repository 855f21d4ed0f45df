"""`python -m bench host`: loading a large file to host memory, beside the machine's limits and
other loaders.

Each side loads the same file in a process of its own and then sums every byte by the same code;
sides take turns, rounds go on while the time lasts, medians are compared. *Cold*: the file was
dropped from the page cache, and is seen to be gone. The limits are measured in the same rounds by
`examples/host_limits.rs`: `O_DIRECT` reads by four threads into buffers that are used again, one
`pread` into fresh huge pages, and reads with every processor into memory of three kinds.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import peers
from .measure import ROOT, evict, warm

#: Sides whose tensors own their memory; views, and what the first are compared with.
OWNED = ["reference load", "reference clone", "fastsafetensors", "Run:ai", "tensorizer", "MLX"]
VIEWS = ["reference load_file", "safetensors 0.9"]
LIMITS = {"cold": "limit: O_DIRECT", "warm": "limit: pread into huge pages"}
#: What reading a cached file takes with every processor, by the memory that it goes to: modes of
#: `examples/host_limits.rs`.
MEMORY = {
    "limit: all processors, fresh small pages": "small",
    "limit: all processors, fresh huge pages": "huge",
    "limit: all processors, pages taken before": "taken",
}
MADV_POPULATE_WRITE = 23


@dataclass
class Side:
    load: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    failed: str = ""


def settle(size: int) -> None:
    """Equal conditions: nothing dirty, and free memory for a load that the host has in hand."""
    os.sync()
    with mmap.mmap(-1, size + (1 << 30)) as pool:
        pool.madvise(mmap.MADV_HUGEPAGE)
        pool.madvise(MADV_POPULATE_WRITE)


def command(name: str, path: Path, small: Path) -> tuple[list[str], dict[str, str]]:
    environment = dict(os.environ)
    if name.startswith("limit"):
        target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
        program = str(target / "release/examples/host_limits")
        mode = MEMORY.get(name, "direct" if "DIRECT" in name else "pread")
        return [program, mode, str(path)], environment
    if name in peers.PACKAGES or name == "make tensorizer":
        home = peers.folder("tensorizer" if name == "make tensorizer" else name)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(home), *filter(None, [environment.get("PYTHONPATH")])]
        )
    return [sys.executable, "-m", "bench.peers", name, str(path), str(small)], environment


def once(name: str, state: str, path: Path, small: Path) -> dict[str, Any]:
    arguments, environment = command(name, path, small)
    files = [path]
    if name == "tensorizer":
        files = [path.with_name(path.name + ".tensors")]
    with subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stderr is not None
        if worker.stdout.readline() != "ready\n":
            lines = worker.stderr.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "it did not start")
        settle(path.stat().st_size)
        for file in files:
            (evict if state == "cold" else warm)(file)
        print("go", file=worker.stdin, flush=True)
        line = worker.stdout.readline()
        if not line:
            lines = worker.stderr.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "it died")
        print("end", file=worker.stdin, flush=True)
    found: dict[str, Any] = json.loads(line)
    return found


def measure(
    state: str, path: Path, small: Path, seconds: float, rounds: int, names: list[str]
) -> dict[str, Side]:
    sides = {name: Side() for name in names}
    deadline = time.monotonic() + seconds
    sums: set[int] = set()
    for number in range(rounds):
        began = time.monotonic()
        for name in names if number % 2 == 0 else reversed(names):
            side = sides[name]
            if side.failed:
                continue
            try:
                found = once(name, state, path, small)
            except RuntimeError as error:
                side.failed = str(error)
                continue
            side.load.append(found["load"])
            side.all.append(found["all"])
            if found["sum"] is not None:
                sums.add(found["sum"])
        print(f"{state}, round {number + 1}: {time.monotonic() - began:.0f} s", flush=True)
        if time.monotonic() + (time.monotonic() - began) > deadline:
            break
    if sides["tonnage"].failed:
        raise RuntimeError(f"Tonnage did not run: {sides['tonnage'].failed}")
    if len(sums) > 1:
        raise RuntimeError(f"the sides do not have the same bytes: {sums}")
    return sides


def table(state: str, sides: dict[str, Side], size: int) -> str:
    ours = statistics.median(sides["tonnage"].all)
    lines = [
        f"| {state} | load | load and sum | GiB/s of the load | its time / Tonnage's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, side in sides.items():
        if side.failed:
            lines.append(f"| {name} | did not run: {side.failed} | – | – | – |")
            continue
        load, all_ = statistics.median(side.load), statistics.median(side.all)
        rate = f"{size / load / 2**30:.2f}"
        # A view is loaded when it is read.
        if "load_file" in name or name == "safetensors 0.9":
            rate = f"({size / all_ / 2**30:.2f})"
        lines.append(f"| {name} | {load:.3f} s | {all_:.3f} s | {rate} | {all_ / ours:.2f} × |")
    return "\n".join(lines)


def verdicts(state: str, sides: dict[str, Side]) -> list[str]:
    """The claims, each with the number that holds it up or not."""

    def time_of(name: str, what: str = "all") -> float:
        side = sides.get(name)
        samples = getattr(side, what) if side and not side.failed else []
        return statistics.median(samples) if samples else float("inf")

    def line(text: str, found: float, wanted: float) -> str:
        verdict = "holds" if found >= wanted else "DOES NOT HOLD"
        return f"{verdict}: {text}: {found:.2f}, wanted {wanted:.2f}"

    ours, limit = time_of("tonnage"), LIMITS[state]
    found = []
    if state == "cold":
        found.append(
            line("rate / O_DIRECT", time_of(limit, "load") / time_of("tonnage", "load"), 0.9)
        )
        reference = time_of("reference load_file") / ours
        found.append(line("time of the reference's load_file / ours", reference, 2.0))
        best = min(map(time_of, [*OWNED[2:], "safetensors 0.9"])) / ours
        found.append(line("time of the best other loader / ours", best, 1.2))
    else:
        rate = time_of(limit, "load") / time_of("tonnage", "load")
        found.append(line("rate / one pread into fresh huge pages", rate, 0.85))
        best = min(map(time_of, OWNED)) / ours
        found.append(line("time of the best loader of owned tensors / ours", best, 1.7))
        # Whoever hands out memory of its own has to take it and to copy into it.
        least = min(map(time_of, list(MEMORY)[:2])) / ours
        found.append(line("time of all processors into fresh memory / ours", least, 0.85))
        views = time_of("reference load_file") / time_of("tonnage load_file")
        # Equal work measured twice differs by this much.
        found.append(line("time of the reference's load_file / ours, views", views, 1.00))
    return found


def run(folder: Path, rounds: int, size: int, seconds: float) -> dict[str, Any]:
    from .suites import write_file

    count = max(size >> 23, 1)
    shapes = {f"layers.{i}.weight": [1024, 2048] for i in range(count)}
    path = write_file(folder / "host.safetensors", shapes)
    small = write_file(folder / "small.safetensors", {"one": [64, 64]})
    cargo = ["cargo", "build", "--release", "--locked", "--quiet", "-p", "tonnage"]
    subprocess.run([*cargo, "--example", "host_limits"], check=True, cwd=ROOT)
    arguments, environment = command("make tensorizer", path, small)
    # If it can't, its own row says so.
    subprocess.run(arguments, check=False, cwd=ROOT, env=environment, capture_output=True)
    record: dict[str, Any] = {}
    for state in ("cold", "warm"):
        owned = OWNED if state == "warm" else OWNED[2:]
        memory = MEMORY if state == "warm" else ()
        names = [LIMITS[state], *memory, "tonnage", "tonnage load_file", *VIEWS, *owned]
        sides = measure(state, path, small, seconds / 2, rounds, names)
        print(f"\n{table(state, sides, path.stat().st_size)}\n", flush=True)
        claims = verdicts(state, sides)
        print("\n".join(claims) + "\n", flush=True)
        record[state] = {"sides": {n: vars(s) for n, s in sides.items()}, "claims": claims}
    return record
