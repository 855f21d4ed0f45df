"""One measurement, in its own process: `python -m bench.worker SIDE TASK JSON`.

Imports and warms up, prints `ready`, waits for a line, does the task once, prints its seconds.
Waiting lets the parent note the memory in use before the task, and drop or fill the page cache.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = Callable[[], object]


def module(side: str, framework: str) -> Any:
    """`safetensors.torch`, `tonnage.numpy`, …"""
    home = "safetensors" if side == "reference" else "tonnage"
    return __import__(f"{home}.{framework}", fromlist=["load_file"])


def opener(side: str) -> Any:
    if side == "reference":
        from safetensors import safe_open
    else:
        from tonnage import safe_open
    return safe_open


def read_some(side: str, path: str, framework: str, names: list[str]) -> Job:
    """Open a file and read the tensors `names`; all of them where `names` is empty."""
    safe_open = opener(side)

    def job() -> object:
        with safe_open(path, framework=framework) as file:
            return [file.get_tensor(name) for name in names or file.keys()]

    return job


def at_once(side: str, path: str, device: str) -> Job:
    """All tensors of a file: in one run of the engine, or one by one to host memory."""
    if side == "reference":
        import torch

        return read_some(side, path, "pt", [])
    import tonnage

    if device != "cpu":
        return lambda: tonnage.open(path).load(device=device, framework="tonnage")
    # Before the clock starts.
    import torch  # noqa: F401
    from tonnage import _device

    target = _device.Target("host", "cpu", "cpu", "torch")
    return lambda: _device.whole(tonnage.open(path)._handle, target)


def touch(tensors: dict[str, Any]) -> int:
    """Read every byte of every tensor, as a use of them would."""
    import numpy as np

    total = 0
    for tensor in tensors.values():
        array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        total += int(array.reshape(-1).view(np.uint64).sum(dtype=np.uint64))
    return total


def load(side: str, path: str, framework: str, use: bool) -> Job:
    load_file = module(side, framework).load_file

    def job() -> object:
        tensors = load_file(path)
        return (tensors, touch(tensors)) if use else tensors

    return job


def load_owned(side: str, path: str, framework: str) -> Job:
    """Tensors that own their memory and no longer need the file, every byte read."""
    load_file = module(side, framework).load_file  # and the framework, which is not the subject
    if side == "tonnage":
        import tonnage

        def job() -> object:
            tensors = tonnage.open(path).load(framework=framework)
            return tensors, touch(tensors)

        return job

    def job() -> object:
        views = load_file(path)
        copy = {name: t.clone() for name, t in views.items()} if framework == "torch" else views
        return copy, touch(copy)

    return job


def save(side: str, path: str, framework: str, durable: bool) -> Job:
    """Save 1 GiB. Durable: on the disk when the call returns, file and folder."""
    import numpy as np

    block = np.random.default_rng(0).random((1024, 2048), dtype=np.float32)
    arrays = {f"layers.{i}.weight": block.copy() for i in range(128)}
    tensors: dict[str, Any] = arrays
    if framework == "torch":
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    save_file = module(side, framework).save_file
    if side == "tonnage":
        return lambda: save_file(tensors, path, fsync=durable)

    def job() -> None:
        save_file(tensors, path)
        if durable:
            for target in (path, str(Path(path).parent)):
                descriptor = os.open(target, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    return job


TASKS: dict[str, Callable[..., Job]] = {
    "read_some": read_some,
    "at_once": at_once,
    "load": load,
    "load_owned": load_owned,
    "save": save,
}


def main(side: str, task: str, arguments: dict[str, Any]) -> None:
    warm_up = arguments.pop("warm_up", None)
    job = TASKS[task](side, **arguments)
    if warm_up is not None:
        TASKS[task](side, **warm_up)()  # lazy imports and first-use costs are not the subject
    ctypes.CDLL(None).malloc_trim(0)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    result = job()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}), flush=True)
    sys.stdin.readline()
    del result


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
