"""`python -m bench sharded`: one checkpoint of 1 GiB, saved by two ranks that have half of it each.

*DCP* is PyTorch's `HuggingFaceStorageWriter` with consolidation, which ends in one file as the
others do, and then `fsync` of that file and its folder, which it leaves out. *save_sharded* and
*StorageWriter* are Tonnage's, durable. Two thirds of the tensors are sharded by rows, one by
columns, as in a model under tensor parallelism. Both ranks begin together and the slower one
counts; sides take turns within the same two processes, each save to a new folder. Memory is the
peak of a rank's own (anonymous) memory above what it had before the save.

    python -m bench sharded --size 1 --rounds 5
    python -m bench.sharded RANK FOLDER BYTES ROUNDS SECONDS     a rank, as the command starts it
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .measure import ROOT

RANKS = 2
SIDES = {
    "dcp": "DCP with consolidation, fsync",
    "save_sharded": "save_sharded",
    "writer": "dcp.save with StorageWriter",
}
#: Rows and columns of a matrix: 32 MiB in bf16.
ROWS = COLUMNS = 4096


def state(size: int, rank: int) -> dict[str, Any]:
    import torch
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    tensors = {}
    for at in range(max(size // (ROWS * COLUMNS * 2), 1)):
        by_rows = at % 3 < 2
        shape = (ROWS // RANKS, COLUMNS) if by_rows else (ROWS, COLUMNS // RANKS)
        bits = torch.randint(0, 1 << 15, shape, dtype=torch.int16)
        tensors[f"layers.{at}.weight"] = DTensor.from_local(
            bits.view(torch.bfloat16), mesh, [Shard(0 if by_rows else 1)], run_check=False
        )
    return tensors


def sync(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save(side: str, tensors: dict[str, Any], folder: Path, rank: int) -> None:
    import torch.distributed.checkpoint as dcp
    from tonnage.torch import save_sharded
    from tonnage.torch.dcp import StorageWriter

    if side == "save_sharded":
        save_sharded(tensors, folder)
    elif side == "writer":
        dcp.save(tensors, storage_writer=StorageWriter(folder, "single"))
    else:
        writer = dcp.HuggingFaceStorageWriter(
            str(folder), save_distributed=True, enable_consolidation=True
        )
        dcp.save(tensors, storage_writer=writer)
        if rank == 0:
            sync(folder)


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def watched(work: Callable[[], None]) -> int:
    """Peak of own memory above what there was before."""
    before, peak, over = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    over.set()
    watcher.join()
    return peak


def rank_main(rank: int, folder: Path, size: int, rounds: int, limit: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    tensors = state(size, rank)
    samples: list[Any] = []
    begun = time.monotonic()
    for number in range(rounds + 1):
        # What is imported and made once costs the first, small round, which does not count.
        some = dict(list(tensors.items())[:3]) if number == 0 else tensors
        for side in SIDES:
            os.sync()
            dist.barrier()
            start = time.perf_counter()
            out = folder / f"{side}-{number}"
            peak = watched(lambda side=side, some=some, out=out: save(side, some, out, rank))
            mine = time.perf_counter() - start
            found: list[Any] = [None] * RANKS
            dist.all_gather_object(found, (mine, peak))
            if rank == 0:
                check(out, some)
                shutil.rmtree(out)
                if number:
                    seconds, peaks = (max(column) for column in zip(*found, strict=True))
                    samples.append({"side": side, "seconds": seconds, "memory": peaks})
        enough = torch.tensor(time.monotonic() - begun > limit)
        dist.broadcast(enough, 0)
        if enough:
            break
    if rank == 0:
        (folder / "samples.json").write_text(json.dumps(samples))
    dist.destroy_process_group()


def check(folder: Path, tensors: dict[str, Any]) -> None:
    """One of this rank's parts, as it was written."""
    import tonnage
    import torch

    name, tensor = list(tensors.items())[-1]
    local, stored = tensor.to_local(), tonnage.open(folder)[name]
    rows, columns = local.shape
    found = stored.slice((slice(0, rows), slice(0, columns)), "torch")
    # Some of the bits are no numbers, which equal nothing.
    if not torch.equal(found.view(torch.int16), local.view(torch.int16)):
        raise SystemExit(f"{folder}: {name} is not what was saved")


def run(folder: Path, rounds: int, size: int, limit: float) -> dict[str, Any]:
    """All rounds; prints the table."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.sharded"]
    arguments = [str(folder), str(size), str(rounds), str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), *arguments], cwd=ROOT, env=environment)
        for rank in range(RANKS)
    ]
    if any(rank.wait() for rank in ranks):
        raise SystemExit("a rank failed")
    samples = json.loads((folder / "samples.json").read_text())
    times = {s: [row["seconds"] for row in samples if row["side"] == s] for s in SIDES}
    peaks = {s: max(row["memory"] for row in samples if row["side"] == s) for s in SIDES}
    ratios = [dcp / ours for dcp, ours in zip(times["dcp"], times["save_sharded"], strict=True)]
    print("\n| what | median | GB/s | memory of a rank | DCP takes |\n|---|---:|---:|---:|---:|")
    middle = {side: statistics.median(times[side]) for side in SIDES}
    for side, title in SIDES.items():
        print(
            f"| {title} | {middle[side]:.2f} s | {size / middle[side] / 1e9:.2f} "
            f"| {peaks[side] / 2**20:.0f} MiB | {middle['dcp'] / middle[side]:.2f} × |"
        )
    print(f"\nround by round, DCP takes {', '.join(f'{ratio:.2f}' for ratio in ratios)} ×")
    return {"samples": samples, "ratios": ratios}


if __name__ == "__main__":
    number, where, nbytes, count, most = sys.argv[1:]
    rank_main(int(number), Path(where), int(nbytes), int(count), float(most))
