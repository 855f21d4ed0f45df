"""Ranks for tests: a process that has imported PyTorch once and forks them.

It reads one request a line (JSON): the name of a function of `worker`, how many ranks, a folder,
and arguments. Each rank is a child with a gloo group of its own; what its function returns, or
raises, is in `result-<rank>.json` of the folder when the child has ended. The request ends with
a line that says how each child ended.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

# Imported for those that are forked from here.
import numpy  # noqa: F401
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

sys.path.insert(0, str(Path(__file__).parent))

import worker

torch.set_num_threads(1)


def child(request: dict, rank: int) -> int:
    folder = Path(request["folder"])
    log = os.open(folder / f"log-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        store = dist.FileStore(str(folder / f"store-{request['number']}"), request["ranks"])
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=request["ranks"],
            timeout=timedelta(seconds=request["group_timeout"]),
        )
        value = getattr(worker, request["function"])(folder, **request["arguments"])
        result = {"value": value}
    except BaseException as error:
        traceback.print_exc()
        result = {
            "error": type(error).__name__,
            "bases": [base.__name__ for base in type(error).__mro__],
            "text": str(error),
            "code": getattr(error, "code", None),
            "tensor": getattr(error, "tensor", None),
        }
    temp = folder / f".result-{rank}"
    temp.write_text(json.dumps(result))
    temp.rename(folder / f"result-{rank}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def serve(request: dict) -> list[int]:
    folder = Path(request["folder"])
    for stale in folder.glob("result-*.json"):
        stale.unlink()
    for stale in folder.glob("begun-*"):
        stale.unlink()
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os._exit(child(request, rank))
        pids.append(pid)
    end = time.monotonic() + request["timeout"]
    if request["kill_within"] is not None:
        while len(list(folder.glob("begun-*"))) < len(pids) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(random.random() * request["kill_within"])
        os.kill(random.choice(pids), signal.SIGKILL)
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank in codes:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGABRT)
        time.sleep(0.005)
    return [codes[rank] for rank in range(len(pids))]


print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(serve(json.loads(line))), flush=True)
