"""`python -m bench plan`: column shards of a file of 1 GiB, loaded by two ranks at the same time.

Each rank is a process of its own; both begin together, and the slower one counts. Sides take turns:
*blocks* is what the cost model chooses for a disk, *runs* reads each row's part for itself through
the same engine, *pread* does so with one call a run from one thread, and *get_slice* is what
loaders do that slice with the reference. *Limit* is no way to load: each rank reads its part of the
file's bytes from the disk, once, and keeps none. *Cold*: the file was dropped from the page cache.

    python -m bench plan --size 1 --rounds 5
    python -m bench.plan SIDE FILE RANK        a rank, as the command above starts it
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .measure import ROOT, evict, warm

RANKS = 2
SIDES = ("blocks", "runs", "pread", "get_slice")
#: What is measured: all sides in both states, and what the disk allows.
WAYS = [("cold", "limit"), *itertools.product(("cold", "warm"), SIDES)]
#: Bytes of a read of the limit.
BLOCK = 8 << 20
#: Rows and columns of a matrix of 64 MiB in bf16: a rank's part of a row is 8 KiB.
ROWS, COLUMNS = 4096, 8192


def make(path: Path, size: int) -> None:
    import tonnage
    import torch

    count = max(size // (ROWS * COLUMNS * 2), 1)
    with tonnage.Writer(path) as writer:
        for at in range(count):
            bits = torch.randint(0, 1 << 15, (ROWS, COLUMNS), dtype=torch.int16)
            writer.add(f"layers.{at}.down_proj.weight", bits.view(torch.bfloat16))
    os.sync()


def by_plan(path: Path, rank: int, side: str) -> dict[str, Any]:
    import tonnage

    checkpoint = tonnage.open(path)
    plan = checkpoint.plan(tonnage.Mesh(tp=RANKS), rules={"*": tonnage.Shard(1)})
    profile, strategy = ("page_cache", "buffered") if side == "runs" else (None, "auto")
    begin = time.perf_counter()
    loaded = plan.load(rank, framework="torch", profile=profile, strategy=strategy)
    seconds = time.perf_counter() - begin
    report = checkpoint.report
    assert report is not None
    return {
        "seconds": seconds,
        "needed": report.needed,
        "read": report.bytes,
        "how": report.strategy,
        "sum": checksum(loaded),
    }


def by_pread(path: Path, rank: int) -> dict[str, Any]:
    import tonnage
    import torch

    checkpoint = tonnage.open(path)
    begin = time.perf_counter()
    loaded = {}
    with path.open("rb", buffering=0) as file:
        for name, ref in checkpoint.items():
            rows, columns = ref.shape
            run = columns // RANKS * 2
            tensor = torch.empty((rows, columns // RANKS), dtype=torch.bfloat16)
            memory = memoryview(tensor.view(torch.uint8).numpy().reshape(-1))
            for row in range(rows):
                place = memory[row * run : (row + 1) * run]
                os.preadv(file.fileno(), [place], ref.offset + row * columns * 2 + rank * run)
            loaded[name] = tensor
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "how": "pread", "sum": checksum(loaded)}


def by_slices(path: Path, rank: int) -> dict[str, Any]:
    import safetensors

    begin = time.perf_counter()
    loaded = {}
    with safetensors.safe_open(path, "pt") as file:
        # What is open is not a mapping.
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            columns = part.get_shape()[1] // RANKS
            loaded[name] = part[:, rank * columns : (rank + 1) * columns].contiguous()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "how": "get_slice", "sum": checksum(loaded)}


def by_limit(path: Path, rank: int) -> dict[str, Any]:
    """What bounds every way that has all of the file from the disk: this rank reads its part of the
    bytes past the page cache, in large blocks by four threads, and keeps none.
    """
    size = path.stat().st_size
    begin, end = (BLOCK * (-(-size // BLOCK) * n // RANKS) for n in (rank, rank + 1))
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(offset: int) -> int:
        with mmap.mmap(-1, BLOCK) as memory, memoryview(memory) as view:
            return os.preadv(file, [view], offset)

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        count = sum(threads.map(read, range(begin, end, BLOCK)))
    seconds = time.perf_counter() - start
    os.close(file)
    return {"seconds": seconds, "needed": count, "read": count, "how": "direct", "sum": 0}


def checksum(loaded: dict[str, Any]) -> int:
    import torch

    return sum(int(one.view(torch.int16).sum(dtype=torch.int64)) for one in loaded.values())


def worker(side: str, path: Path, rank: int) -> None:
    # Before the clock starts.
    import tonnage  # noqa: F401
    import torch  # noqa: F401

    print("ready", flush=True)
    sys.stdin.readline()
    plain = {"get_slice": by_slices, "pread": by_pread, "limit": by_limit}.get(side)
    found = by_plan(path, rank, side) if plain is None else plain(path, rank)
    print(json.dumps(found), flush=True)


def both(side: str, path: Path) -> list[dict[str, Any]]:
    """What the ranks say, having begun at the same time."""
    command = [sys.executable, "-m", "bench.plan", side, str(path)]
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        for rank in range(RANKS)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n", f"{side}: a rank did not start"
    found: list[dict[str, Any]] = []
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("go\n")
        rank.stdin.flush()
    for rank in ranks:
        told, _ = rank.communicate()
        assert rank.returncode == 0, f"{side}: a rank failed"
        found.append(json.loads(told))
    return found


def run(folder: Path, rounds: int, size: int, limit: float) -> dict[str, Any]:
    path = folder / "columns.safetensors"
    make(path, size)
    began, samples = time.monotonic(), []
    sums: set[int] = set()
    for number in range(rounds):
        if number and time.monotonic() - began > limit:
            break
        for state, side in WAYS:
            (evict if state == "cold" else warm)(path)
            found = both(side, path)
            if side != "limit":
                sums.add(sum(one["sum"] for one in found))
            slowest = max(one["seconds"] for one in found)
            samples.append({"state": state, "side": side, "seconds": slowest, "ranks": found})
            print(f"{state} {side}: {slowest:.3f} s", flush=True)
    assert len(sums) == 1, "the sides loaded different tensors"
    medians = {
        f"{state} {side}": statistics.median(
            one["seconds"] for one in samples if (one["state"], one["side"]) == (state, side)
        )
        for state, side in WAYS
    }
    for name, seconds in medians.items():
        print(f"{name:>16}: {seconds:.3f} s", flush=True)
    ratios = {side: medians[f"cold {side}"] / medians["cold blocks"] for side in SIDES[1:]}
    for side, ratio in ratios.items():
        print(f"cold: blocks are {ratio:.2f} times as fast as {side}", flush=True)
    return {"bytes": path.stat().st_size, "medians": medians, "ratios": ratios, "samples": samples}


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
