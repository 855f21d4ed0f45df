"""One measurement in a process of its own: `python -m bench.gpu.worker JSON`.

Speaks with its parent in lines. It says `base` when the framework and its GPU context are up, then
waits; warms up on a tiny checkpoint and says `ready`, then waits; does the task, and says what it
took. The waits let the parent note the memory in use, and drop or fill the page cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import files, limits

Tensors = dict[str, Any]
Job = Callable[[], dict[str, Any]]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


# ---- loading everything ------------------------------------------------------------------------


def tonnage_load(folder: str, device: str, **options: Any) -> tuple[Tensors, object]:
    import tonnage

    checkpoint = tonnage.open(folder)
    tensors = checkpoint.load(device=device, framework="torch", **options)
    report = checkpoint.report
    return tensors, f"{report}; {report.reason}; staging {report.peak_staging >> 20} MiB"


def reference_load(folder: str, device: str) -> tuple[Tensors, object]:
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in files.shards(Path(folder)):
        tensors.update(load_file(path, device=device))
    return tensors, None


def get_tensor_load(folder: str, device: str) -> tuple[Tensors, object]:
    """One tensor after the other, as a caller of the reference does who wants some of them."""
    from safetensors import safe_open

    tensors: Tensors = {}
    for path in files.shards(Path(folder)):
        with safe_open(path, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118 (it has no other way to iterate)
                tensors[name] = file.get_tensor(name)
    return tensors, None


def prefetch_load(folder: str, device: str, at_once: bool) -> tuple[Tensors, object]:
    """The pre-release's engine: all files at once, or one after the other."""
    from safetensors import safe_open

    paths = files.shards(Path(folder))
    tensors: Tensors = {}
    for group in [paths] if at_once else [[path] for path in paths]:
        opened = [safe_open(path, framework="pt") for path in group]
        for loader in [file.prefetch(device=device) for file in opened]:
            with loader:
                tensors.update(loader)
    return tensors, None


def fast_load(folder: str, device: str, buffered: bool) -> tuple[Tensors, object]:
    if buffered:
        os.environ["FASTSAFETENSORS_ODIRECT"] = "0"
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, device=device, nogds=True)
    loader.add_filenames({0: files.shards(Path(folder))})
    buffers = loader.copy_files_to_device()
    return {name: buffers.get_tensor(name) for name in loader.get_keys()}, (loader, buffers)


def instant_load(folder: str, device: str, buffered: bool) -> tuple[Tensors, object]:
    from instanttensor import BackendPolicy, safe_open

    paths = files.shards(Path(folder))
    backend = BackendPolicy.BUFFERED if buffered else None
    with safe_open(paths, framework="pt", device=device, backend=backend) as file:
        return dict(file.tensors()), None


LOADERS: dict[str, Callable[..., tuple[Tensors, object]]] = {
    "tonnage": tonnage_load,
    "reference": reference_load,
    "get_tensor": get_tensor_load,
    "prefetch": lambda folder, device: prefetch_load(folder, device, at_once=True),
    "prefetch_in_turn": lambda folder, device: prefetch_load(folder, device, at_once=False),
    "fastsafetensors": lambda folder, device: fast_load(folder, device, False),
    "fastsafetensors_buffered": lambda folder, device: fast_load(folder, device, True),
    "instanttensor": lambda folder, device: instant_load(folder, device, False),
    "instanttensor_buffered": lambda folder, device: instant_load(folder, device, True),
}


# ---- the first tensor ---------------------------------------------------------------------------


def first(side: str, folder: str, device: str) -> tuple[Tensors, object]:
    """Only the first tensor that comes; what comes after it is given up."""
    paths = files.shards(Path(folder))
    if side == "tonnage":
        import tonnage

        stream: Any = tonnage.open(folder).stream(device=device, framework="torch")
    elif side == "instanttensor_buffered":
        from instanttensor import BackendPolicy
        from instanttensor import safe_open as instant_open

        # Closed when the process ends: what is timed is the first tensor.
        opened = instant_open(paths, framework="pt", device=device, backend=BackendPolicy.BUFFERED)
        stream = opened.__enter__().tensors()
    else:
        from safetensors import safe_open

        file = safe_open(paths[0], framework="pt", device=device)
        if side == "prefetch":
            stream = iter(file.prefetch(device=device))
        else:
            stream = ((name, file.get_tensor(name)) for name in file.offset_keys())
    name, tensor = next(stream)
    return {name: tensor}, stream


# ---- a tensor-parallel rank's part --------------------------------------------------------------

RANKS = 4
#: Layers whose columns are dealt to the ranks; of the others it is the rows, and vectors are whole.
BY_COLUMN = ("o_proj.weight", "down_proj.weight")


def part(name: str, shape: list[int]) -> tuple[slice, ...] | None:
    """What rank 1 of 4 has of a tensor."""
    if len(shape) < 2:
        return None
    dimension = 1 if name.endswith(BY_COLUMN) else 0
    size = shape[dimension] // RANKS
    mine = slice(size, 2 * size)
    return (mine,) if dimension == 0 else (slice(None), mine)


def parts_of(path: str) -> dict[str, tuple[slice, ...] | None]:
    return {name: part(name, entry["shape"]) for name, entry in files.header(path)[0].items()}


def sliced(side: str, folder: str, device: str) -> tuple[Tensors, object]:
    tensors: Tensors = {}
    paths = files.shards(Path(folder))
    if side == "tonnage":
        import tonnage

        plan: dict[str, Any] = {}
        for path in paths:
            plan.update(parts_of(path))
        checkpoint = tonnage.open(folder)
        with checkpoint.prefetch(plan, device=device, framework="torch") as loader:
            tensors.update(loader)
        return tensors, None
    from safetensors import safe_open

    opened = [safe_open(path, framework="pt", device=device) for path in paths]
    if side == "get_slice":
        for path, file in zip(paths, opened, strict=True):
            for name, mine in parts_of(path).items():
                whole = file.get_tensor if mine is None else file.get_slice
                tensors[name] = whole(name) if mine is None else whole(name)[mine]
        return tensors, None
    # The pre-release knows rows only: what has columns taken comes whole, and is cut on the device.
    loaders, cuts = [], {}
    for path, file in zip(paths, opened, strict=True):
        parts = parts_of(path)
        cuts.update({n: m for n, m in parts.items() if m is not None and len(m) > 1})
        rows = {n: m[0] if m is not None and len(m) == 1 else None for n, m in parts.items()}
        loaders.append(file.prefetch(rows, device=device))
    for loader in loaders:
        with loader:
            for name, tensor in loader:
                cut = cuts.get(name)
                tensors[name] = tensor if cut is None else tensor[cut].contiguous()
    return tensors, None


# ---- was it right? ------------------------------------------------------------------------------


def wrong(folder: str, tensors: Tensors, device: str, cut: bool, every: int) -> list[str]:
    """Names of tensors that are not what the file has: each `every`-th is looked at."""
    data = torch.from_numpy(files.pool()).to(device)
    found, expected = [], {}
    for path in files.shards(Path(folder)):
        expected.update(files.header(path)[0])
    for name in list(tensors)[::every]:
        entry = expected[name]
        begin, end = entry["data_offsets"]
        at = files.place(name, end - begin)
        tensor = tensors[name]
        want = data[at : at + end - begin].view(tensor.dtype).view(entry["shape"])
        mine = part(name, entry["shape"]) if cut else None
        if mine is not None:
            want = want[mine].contiguous()
        same = want.shape == tensor.shape and torch.equal(
            want.view(torch.uint8), tensor.contiguous().view(torch.uint8)
        )
        if not same:
            found.append(name)
    return found


# ---- saving -------------------------------------------------------------------------------------


DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def save(
    side: str, target: str, device: str, entries: list[files.Entry], durable: bool
) -> tuple[Job, Job]:
    """The job saves these tensors from the device; its check reads them back."""
    data = torch.from_numpy(files.pool()).to(device)
    tensors = {}
    for entry in entries:
        name, dtype, shape = entry
        at = files.place(name, files.length(entry))
        raw = data[at : at + files.length(entry)].clone()
        tensors[name] = raw.view(DTYPES[dtype]).view(shape)
    del data
    synchronize(device)
    Path(target).parent.mkdir(parents=True, exist_ok=True)

    def job() -> dict[str, Any]:
        if side == "tonnage":
            import tonnage

            said = str(tonnage.save(tensors, target, fsync=durable))
        else:
            from safetensors.torch import save_file

            said = str(save_file(tensors, target))
            for path in (target, str(Path(target).parent)) if durable else ():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        return {"bytes": sum(map(files.length, entries)), "said": said}

    def check() -> dict[str, Any]:
        (header, start), data = files.header(target), files.pool()
        bad = [entry[0] for entry in entries if entry[0] not in header]
        with open(target, "rb") as file:
            for entry in entries[::4]:
                begin, end = header[entry[0]]["data_offsets"]
                at = files.place(entry[0], end - begin)
                got = np.frombuffer(os.pread(file.fileno(), end - begin, start + begin), np.uint8)
                if not np.array_equal(got, data[at : at + end - begin]):
                    bad.append(entry[0])
        return {"wrong": bad}

    return job, check


# ---- the conversation ---------------------------------------------------------------------------


def load_job(
    task: str, side: str, folder: str, device: str, options: dict[str, Any]
) -> tuple[Job, Job]:
    kept: list[Any] = []

    def job() -> dict[str, Any]:
        if task == "load":
            tensors, more = LOADERS[side](folder, device, **options)
        elif task == "first":
            tensors, more = first(side, folder, device)
        else:
            tensors, more = sliced(side, folder, device)
        synchronize(device)
        kept.extend((tensors, more))
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return {"bytes": total, "said": more if isinstance(more, str) else None}

    def check() -> dict[str, Any]:
        tensors = kept[0]
        every = max(1, len(tensors) // 2000)
        where = next(iter(tensors.values())).device
        if str(where) != device and where.type != torch.device(device).type:
            return {"wrong": [f"tensors are on {where}"]}
        return {"wrong": wrong(folder, tensors, device, task == "sliced", every)}

    return job, check


def say(word: str) -> None:
    print(f"#{word}", flush=True)
    sys.stdin.readline()


def main(request: dict[str, Any]) -> None:
    device, task, side = request["device"], request["task"], request["side"]
    if device.startswith("cuda"):
        torch.zeros(1, device=device)
        torch.cuda.set_device(device)
    synchronize(device)
    say("base")
    if task == "limits":
        job, check = limits.job(device, request["folder"]), dict
    elif task == "save":
        small = str(Path(request["target"]).with_name("warm-up.safetensors"))
        save(side, small, device, files.small(16), request["durable"])[0]()
        entries = files.transformer(int(request["gib"] * 2**30))
        job, check = save(side, request["target"], device, entries, request["durable"])
    else:
        options = request.get("options", {})
        load_job(task, side, request["warm_up"], device, options)[0]()
        job, check = load_job(task, side, request["folder"], device, options)
    say("ready")
    start = time.perf_counter()
    result = job()
    result.setdefault("seconds", time.perf_counter() - start)
    say(json.dumps(result))
    print("#" + json.dumps(check()), flush=True)
    # Some peers' threads do not end with the interpreter, and nothing is left to be lost.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
