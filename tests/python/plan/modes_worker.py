"""One rank of a group that loads in several modes: modes_worker.py FILE FOLDER CASE …

Writes what it found, or the errors that it got, as JSON beside the others'.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import modes_data
import tonnage
import torch
import torch.distributed as dist
from tonnage import _arrays, _load, _modes, _planned, _ranks


def plan_of(checkpoint: tonnage.Checkpoint) -> tonnage.Plan:
    world = dist.get_world_size()
    mesh = tonnage.Mesh(pp=2, tp=world // 2) if world > 2 else tonnage.Mesh(tp=world)
    return checkpoint.plan(mesh, rules=modes_data.rules(world))


def raw(tensor: Any) -> bytes:
    if isinstance(tensor, torch.Tensor):
        return bytes(_arrays.memory_of(tensor.contiguous()))
    return bytes(tensor.tobytes())


def compare(loaded: dict[str, Any], alone: dict[str, Any]) -> list[str]:
    """Names of tensors that differ from what a load of this rank alone brings."""
    if list(loaded) != list(alone):
        return [f"{list(loaded)} are not {list(alone)}"]
    return [
        name
        for name, one in loaded.items()
        if one.shape != alone[name].shape
        or one.dtype != alone[name].dtype
        or raw(one) != raw(alone[name])
    ]


def all_modes(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """Each mode brings what the rank alone would load, in both frameworks, and cast."""
    plan, rank = plan_of(checkpoint), dist.get_rank()
    told: dict[str, Any] = {}
    for mode in ("shm", "collective", "auto"):
        for framework, dtype in (("torch", None), ("numpy", None), ("torch", "float64")):
            alone = plan.load(rank=rank, framework=framework, dtype=dtype)
            loaded = plan.load(mode=mode, framework=framework, dtype=dtype, staging="1MiB")
            report = checkpoint.report
            told[f"{mode} {framework} {dtype}"] = {
                "wrong": compare(loaded, alone),
                "bytes": report.bytes,
                "needed": report.needed,
                "mode": report.mode,
                "staging": report.peak_staging,
            }
    return told


def apart(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """Tensors that PyTorch alone reaches, as those of a device: here its own processor's."""
    plan, rank = plan_of(checkpoint), dist.get_rank()
    who = _ranks.member(plan.ranks, None, None)
    start = _planned.Rank(checkpoint, plan._native, rank, None)
    way = _modes.settle(start, who, plan.ranks, "collective", None, 60.0, True)
    items = _planned.items_of(start, None, None)
    report = _load.Report()
    options = _load.Options("torch", "cpu", None, None, "1MiB")
    loaded = _modes.read_to(start, way, items, "cpu", options, report)
    return {
        "wrong": compare(loaded, plan.load(rank=rank, framework="torch")),
        "bytes": report.bytes,
    }


def other_plan(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    world = dist.get_world_size()
    rules = {"F32": tonnage.Shard(dist.get_rank() % 2), **modes_data.rules(world)}
    plan = checkpoint.plan(tonnage.Mesh(tp=world), rules=rules)
    return {"loaded": len(plan.load(mode="collective"))}


def other_mode(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    mode = ("shm", "collective")[dist.get_rank() % 2]
    return {"loaded": len(plan_of(checkpoint).load(mode=mode))}


def late(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """A rank that agreed and then does not come to the window."""
    plan = plan_of(checkpoint)
    if dist.get_rank() == 1:
        _modes.read = lambda *_: time.sleep(12)  # type: ignore[assignment]
    dist.barrier()
    return {"loaded": len(plan.load(mode="shm", timeout=4))}


class Deadly(io.BytesIO):
    """A file whose reader is killed, once it is armed."""

    armed = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.armed:
            _die()
        return super().read(size)

    def readinto(self, buffer: Any, /) -> int:
        if self.armed:
            _die()
        return super().readinto(buffer)


def killed_shm(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """A rank that dies while it fills a window."""
    if dist.get_rank() != 1:
        return {"loaded": len(plan_of(checkpoint).load(mode="shm"))}
    content = Deadly(Path(sys.argv[1]).read_bytes())
    plan = plan_of(tonnage.open(content))
    content.armed = True
    return {"loaded": len(plan.load(mode="shm"))}


def killed_collective(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """A rank that dies between two rounds."""
    if dist.get_rank() == 1:
        _modes._Messages._round = _die  # type: ignore[assignment, method-assign]
    return {"loaded": len(plan_of(checkpoint).load(mode="collective", staging="1MiB", timeout=20))}


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def memory(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """Anonymous memory while a rank loads, above what it had before."""
    plan, told = plan_of(checkpoint), {}
    plan.load(rank=dist.get_rank(), framework="torch", threads=1, select="norm")
    for mode in ("collective", "shm"):
        dist.barrier()
        before, most, over = anonymous(), [0], threading.Event()

        def look(most: list[int] = most, over: threading.Event = over) -> None:
            while not over.wait(0.002):
                most[0] = max(most[0], anonymous())

        watcher = threading.Thread(target=look)
        watcher.start()
        loaded = plan.load(mode=mode, framework="torch", threads=2, staging="16MiB")
        most[0] = max(most[0], anonymous())
        over.set()
        watcher.join()
        told[mode] = {
            "tensors": sum(one.nbytes for one in loaded.values()),
            "more": most[0] - before,
            "bytes": checkpoint.report.bytes,
            "staging": checkpoint.report.peak_staging,
        }
        del loaded
    return told


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


CASES: dict[str, Callable[[tonnage.Checkpoint], dict[str, Any]]] = {
    case.__name__: case
    for case in (
        all_modes, apart, other_plan, other_mode, late, killed_shm, killed_collective, memory,
    )
}  # fmt: skip


def main(path: str, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{folder}/store"
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    for case in cases:
        began = time.monotonic()
        found: dict[str, Any]
        try:
            found = CASES[case](tonnage.open(path))
        except tonnage.TonnageError as error:
            found = {"error": str(error), "code": error.code}
        found["seconds"] = time.monotonic() - began
        (folder / f"{case}.{rank}.json").write_text(json.dumps(found))
    # A group that lost a rank, or time, cannot be taken down in order.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
