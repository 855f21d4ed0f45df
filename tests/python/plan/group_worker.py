"""One rank of a process group that loads by a plan: torchrun … group_worker.py FILE FOLDER CASE

Writes what it found, or the error that it got, as JSON beside the others'.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import tonnage
import torch
import torch.distributed as dist


def same(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """Rank and group are torch's; DTensors come out whole again, and DCP's attributes are there."""
    plan = checkpoint.plan(tonnage.Mesh(tp=2), rules=RULES)
    local = plan.load(out="dtensor")
    marked = plan.load(out="checkpointable")
    whole = checkpoint.load(framework="torch")
    return {
        "whole": all(torch.equal(local[name].full_tensor(), whole[name]) for name in whole),
        "placements": {name: str(one.placements) for name, one in local.items()},
        "offsets": {name: one.global_offsets for name, one in marked.items()},
        "sizes": {name: one.local_sizes for name, one in marked.items()},
    }


def mismatch(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """Each rank makes another plan."""
    rules = {**RULES, "wide": tonnage.Shard(dist.get_rank())}
    return {"loaded": len(checkpoint.plan(tonnage.Mesh(tp=2), rules=rules).load())}


def missing(checkpoint: tonnage.Checkpoint) -> dict[str, Any]:
    """One rank never comes."""
    if dist.get_rank() == 1:
        time.sleep(8)
        return {"slept": True}
    plan = checkpoint.plan(tonnage.Mesh(tp=2), rules=RULES)
    return {"loaded": len(plan.load(timeout=2))}


RULES: dict[str, Any] = {
    "wide": tonnage.Shard(1),
    "tall": tonnage.Shard(0),
    "*": tonnage.Replicate(),
}


def main(path: str, folder: Path, case: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    began, found = time.monotonic(), {}
    try:
        found = {"same": same, "mismatch": mismatch, "missing": missing}[case](tonnage.open(path))
    except tonnage.TonnageError as error:
        found = {"error": str(error), "code": error.code}
    found["seconds"] = time.monotonic() - began
    (folder / f"{case}.{dist.get_rank()}.json").write_text(json.dumps(found))
    if case == "same":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
