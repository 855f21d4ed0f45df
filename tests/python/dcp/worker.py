"""What ranks do in the tests of this folder. Each function runs on every rank."""

from __future__ import annotations

import gc
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

PLACEMENTS = {
    "S0": Shard(0),
    "S1": Shard(1),
    "R": Replicate(),
    "_S0/2": _StridedShard(0, split_factor=2),
    "_S0/3": _StridedShard(0, split_factor=3),
    "_S1/2": _StridedShard(1, split_factor=2),
}


def mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape)


def rank() -> int:
    return dist.get_rank()


def whole() -> dict[str, torch.Tensor]:
    """A state that every rank can make: every kind of dtype, uneven sizes, no elements."""
    torch.manual_seed(7)
    state = {
        "embed": torch.randn(131, 24),
        "rows": torch.randn(96, 40).to(torch.bfloat16),
        "columns": torch.randn(96, 40),
        "deep": torch.randn(12, 6, 5),
        "vector": torch.arange(97, dtype=torch.int64),
        "short": torch.randint(-999, 999, (24, 16), dtype=torch.int16),
        "unsigned": torch.arange(48).to(torch.uint16).reshape(12, 4),
        "words": torch.arange(48).to(torch.uint32),
        "long": torch.arange(48).to(torch.uint64),
        "flags": torch.rand(36, 3) > 0.5,
        "eight": torch.randn(24, 32).to(torch.float8_e4m3fn),
        "five": torch.randn(24, 32).to(torch.float8_e5m2),
        "complex": torch.randn(12, 6, dtype=torch.complex64),
        "step": torch.tensor(7.5),
        "none": torch.zeros(0, 3),
        "few": torch.arange(2.0),
    }
    if hasattr(torch, "float4_e2m1fn_x2"):
        bytes_ = torch.randint(0, 255, (24, 8), dtype=torch.uint8)
        state["four"] = bytes_.view(torch.float4_e2m1fn_x2)
    return state


def local_part(value: torch.Tensor, device_mesh: Any, placements: list[Any]) -> DTensor:
    """A DTensor without communication, for dtypes that gloo has no form for."""
    local = value
    coordinate = device_mesh.get_coordinate()
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        bytes_ = local.view(torch.uint8) if local.element_size() == 1 else local
        parts, _ = placement._split_tensor(
            bytes_, device_mesh.size(axis), with_padding=False, contiguous=True
        )
        local = parts[coordinate[axis]].view(value.dtype)
    return DTensor.from_local(
        local,
        device_mesh,
        placements,
        run_check=False,
        shape=value.shape,
        stride=torch.empty(value.shape, device="meta").stride(),
    )


def fitting(value: torch.Tensor, names: list[str]) -> list[Any]:
    """Placements that make sense for a tensor: scalars are replicated, vectors have one axis."""
    found = []
    for name in names:
        placement = PLACEMENTS[name]
        dim = getattr(placement, "dim", 0)
        strided = getattr(placement, "split_factor", 1)
        fits = dim < value.dim() and (strided == 1 or value.shape[dim] >= 8)
        found.append(placement if fits else Replicate())
    return found


def placed(state: dict[str, torch.Tensor], shape: list[int], names: list[str]) -> dict[str, Any]:
    device_mesh = mesh(*shape)
    return {
        name: value if not value.dim() else local_part(value, device_mesh, fitting(value, names))
        for name, value in state.items()
    }


def same(found: Any, value: torch.Tensor) -> bool:
    """Whether a tensor, or this rank's part of it, is what it should be, bit for bit."""
    if isinstance(found, DTensor):
        value = local_part(value, found.device_mesh, list(found.placements)).to_local()
        found = found.to_local()
    if found.dtype != value.dtype or found.shape != value.shape:
        return False
    if not found.numel():
        return True
    return torch.equal(
        found.contiguous().reshape(-1).view(torch.uint8),
        value.contiguous().reshape(-1).view(torch.uint8),
    )


def zeros(state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, to be filled."""

    def zero(value: torch.Tensor) -> torch.Tensor:
        return (
            torch.zeros(value.shape, dtype=torch.uint8).view(value.dtype)
            if (value.element_size() == 1)
            else torch.zeros_like(value)
        )

    return {
        name: DTensor.from_local(
            zero(value.to_local()), value.device_mesh, value.placements, run_check=False,
            shape=value.shape, stride=value.stride(),
        )
        if isinstance(value, DTensor)
        else zero(value)
        for name, value in state.items()
    }  # fmt: skip


# save_sharded


def save(folder: Path, to: str, shape: list[int], names: list[str], **options: Any) -> Any:
    import tonnage.torch

    saved = tonnage.torch.save_sharded(placed(whole(), shape, names), folder / to, **options)
    return [list(saved.files), saved.index, saved.total_size]


def save_load(
    folder: Path, to: str, shape: list[int], names: list[str], again: list[str], **options: Any
) -> None:
    """Saves with some placements, loads with others."""
    from tonnage.torch.dcp import StorageReader

    save(folder, to, shape, names, **options)
    dist.barrier()
    state = whole()
    target = zeros(placed(state, shape, again))
    dcp.load(target, storage_reader=StorageReader(folder / to))
    for name, value in state.items():
        assert same(target[name], value), name


def chunks(count: int) -> Any:
    """Rank r has every `count`-th pair of rows, each a box of its own, behind a row of padding."""
    value = torch.arange(96.0).reshape(24, 4)
    mine = [begin for begin in range(0, 24, 2) if begin // 2 % count == rank()]
    local = torch.full((1 + 2 * len(mine), 4), -1.0)
    for at, begin in enumerate(mine):
        local[1 + 2 * at : 3 + 2 * at] = value[begin : begin + 2]
    local.global_shape = (24, 4)
    local.global_offsets = tuple((begin, 0) for begin in mine)
    local.local_offsets = tuple((1 + 2 * at, 0) for at in range(len(mine)))
    local.local_sizes = ((2, 4),) * len(mine)
    return local, value


def checkpointable(folder: Path, layout: str) -> None:
    import tonnage.torch
    from tonnage.torch.dcp import StorageReader, StorageWriter

    local, value = chunks(dist.get_world_size())
    tonnage.torch.save_sharded({"w": local}, folder / "a", layout=layout)
    dcp.save({"w": local}, storage_writer=StorageWriter(folder / "b", layout))
    dist.barrier()
    for name in ("a", "b"):
        target = torch.zeros(24, 4)
        dcp.load({"w": target}, storage_reader=StorageReader(folder / name))
        assert torch.equal(target, value)
        again, _ = chunks(dist.get_world_size())
        again[1:] = 0
        dcp.load({"w": again}, storage_reader=StorageReader(folder / name))
        assert torch.equal(again, local)


def stages(folder: Path) -> None:
    """Each rank has layers of its own; what is no tensor, all have or one."""
    import tonnage.torch

    tied = torch.full((3,), 9.0)
    state = {
        "model": {f"layers.{rank()}.w": torch.full((4, 4), float(rank())), "tied": tied},
        "again": tied,
        "optim": [{"lr": 0.5, "betas": (0.9, 0.99), f"only.{rank()}": None}],
    }
    tonnage.torch.save_sharded(state, folder / "out")
    dist.barrier()
    if rank() == 0:
        found = tonnage.torch.load(folder / "out")
        assert found["model"]["layers.1.w"].tolist() == [[1.0] * 4] * 4
        assert found["optim"][0] == {
            "lr": 0.5, "betas": (0.9, 0.99), "only.0": None, "only.1": None,
        }  # fmt: skip
        assert found["again"] is found["model"]["tied"]


def refused(folder: Path, how: str) -> None:
    """One way to be wrong, on one rank or on both."""
    import tonnage.torch

    value = torch.arange(32.0).reshape(8, 4)
    options: dict[str, Any] = {}
    state: dict[str, Any] = {"w": value}
    if how in ("hole", "overlap"):
        begin, rows = ((0, 4), (5, 3)) if how == "hole" else ((0, 5), (4, 4))
        first, count = (begin, rows)[rank()]
        part = value[first : first + count].clone()
        part.global_shape = (8, 4)
        part.global_offsets, part.local_offsets = ((first, 0),), ((0, 0),)
        part.local_sizes = ((count, 4),)
        state = {"w": part}
    elif how == "dtype":
        state = {"w": value.to((torch.float32, torch.float64)[rank()])}
    elif how == "settings":
        options = {"layout": ("single", "hf")[rank()]}
    elif how == "leaf" and rank() == 1:
        state = {"w": value, "bad": object()}
    elif how == "leaves":
        state = {"w": value, "lr": 0.1 * rank()}
    elif how == "partial":
        from torch.distributed.tensor import Partial

        state = {"w": DTensor.from_local(value, mesh(2), [Partial()], run_check=False)}
    elif how == "write" and rank() == 1:
        # The rank's file is gone when it is to be written to.
        from tonnage.torch import _sharded

        real = _sharded._SharedFile
        _sharded._SharedFile = lambda path, *rest: real(path + ".gone", *rest)
    if how in ("write",):
        state = {"w": local_part(value, mesh(2), [Shard(0)])}
    tonnage.torch.save_sharded(state, folder / "out", **options)


def absent(folder: Path) -> Any:
    """Rank 1 never comes."""
    import tonnage.torch

    if rank() == 1:
        time.sleep(20)
        return None
    begun = time.monotonic()
    try:
        tonnage.torch.save_sharded({"w": torch.zeros(4)}, folder / "out")
    except Exception:
        return time.monotonic() - begun
    raise AssertionError("nobody missed rank 1")


def big(version: int) -> dict[str, Any]:
    """8 MiB a rank, of one number."""
    device_mesh = mesh(dist.get_world_size())
    number = float(version)
    return {
        "rows": local_part(torch.full((1024, 2048), number), device_mesh, [Shard(0)]),
        "columns": local_part(torch.full((1024, 2048), number), device_mesh, [Shard(1)]),
        "step": torch.tensor(number),
    }


def save_version(folder: Path, version: int, layout: str) -> float:
    import tonnage.torch

    state = big(version)
    dist.barrier()
    (folder / f"begun-{rank()}").touch()
    begun = time.monotonic()
    options = {"max_shard_size": 9 << 20} if layout == "hf" else {}
    tonnage.torch.save_sharded(state, folder / "out", layout=layout, **options)
    return time.monotonic() - begun


def anonymous() -> int:
    """Bytes of memory of this process's own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


def memory(folder: Path, layout: str, how: str) -> int:
    """Extra memory, at its peak, of saving 256 MiB a rank that lie in every inconvenient way."""
    import threading

    import tonnage.torch
    from tonnage.torch.dcp import StorageWriter

    device_mesh = mesh(dist.get_world_size())
    size = dist.get_world_size()
    tensors = {
        "rows": (torch.ones(8192, 2048), Shard(0), (8192 * size, 2048)),
        "columns": (torch.ones(8192, 2048), Shard(1), (8192, 2048 * size)),
        "turned": (torch.ones(2048, 8192).t(), Shard(0), (8192 * size, 2048)),
        "parts": (torch.ones(16384, 1024), Shard(1), (16384, 1024 * size)),
    }
    state = {
        name: DTensor.from_local(
            local, device_mesh, [placement], run_check=False, shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )
        for name, (local, placement, shape) in tensors.items()
    }  # fmt: skip
    # What is imported and made once, with a small save.
    tonnage.torch.save_sharded({"w": torch.zeros(4)}, folder / "warm", layout=layout)
    dcp.save({"w": torch.zeros(4)}, storage_writer=StorageWriter(folder / "warm2", layout))
    gc.collect()
    before, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], anonymous() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if how == "dcp":
        dcp.save(state, storage_writer=StorageWriter(folder / "out", layout))
    else:
        tonnage.torch.save_sharded(state, folder / "out", layout=layout)
    over.set()
    watcher.join()
    return peak[0]


# dcp


def optimiser(folder: Path, layout: str, planner: str) -> None:
    """A model and its optimiser: steps without dimensions, numbers, tuples, flags, text."""
    from tonnage.torch.dcp import SavePlanner, StorageReader, StorageWriter

    state = whole()
    names = ["S0"] if planner == "default" else ["_S0/2"]
    tensors = placed(state, [dist.get_world_size()], names)

    def nested(values: dict[str, Any], step: float, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": values,
            "optim": {
                "state": {"embed": {"step": torch.tensor(step), "exp_avg": values["embed"]}},
                "param_groups": [group],
            },
            "epoch": group["epoch"],
        }

    group = {
        "lr": 1e-3, "betas": (0.9, 0.999), "epoch": 3, "amsgrad": False, "name": "adam",
        "nan": math.nan, "none": None, "params": ["embed", "rows"],
    }  # fmt: skip
    blank = dict.fromkeys(group, 0)
    blank["params"] = []
    maker = {"default": None, "ours": SavePlanner()}[planner]
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert before >= 0
    dcp.save(
        nested(tensors, 5.0, group),
        storage_writer=StorageWriter(folder / "out", layout),
        planner=maker,
    )
    dist.barrier()
    target = nested(zeros(tensors), 0.0, blank)
    dcp.load(target, storage_reader=StorageReader(folder / "out"))
    for name, value in state.items():
        assert same(target["model"][name], value), name
    found = target["optim"]["param_groups"][0]
    assert math.isnan(found.pop("nan"))
    group.pop("nan")
    assert found == group, found
    assert type(found["betas"]) is tuple
    assert target["optim"]["state"]["embed"]["step"].item() == 5.0
    assert target["epoch"] == 3
    pickled = [
        path.name
        for path in (folder / "out").rglob("*")
        if path.is_file() and path.read_bytes()[:4] in (b"PK\x03\x04", b"\x80\x02}q")
    ]
    assert not pickled


def asynchronous(folder: Path) -> None:
    from tonnage.torch.dcp import StorageReader, StorageWriter

    state = {name: whole()[name] for name in ("embed", "columns", "step")}
    device_mesh = mesh(dist.get_world_size())
    # PyTorch's stager takes tensors with memory of their own.
    part = {
        name: distribute_tensor(value, device_mesh, [Shard(0)]) if value.dim() else value
        for name, value in state.items()
    }
    saving = dcp.async_save(part, storage_writer=StorageWriter(folder / "out"))
    saving.result()
    dist.barrier()
    target = zeros(part)
    dcp.load(target, storage_reader=StorageReader(folder / "out"))
    assert all(same(target[name], value) for name, value in state.items())


def torch_writes(folder: Path, consolidate: bool) -> None:
    """What PyTorch's own writer writes, ours reads."""
    from tonnage.torch.dcp import StorageReader
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    device_mesh = mesh(dist.get_world_size())
    state = {name: whole()[name] for name in ("embed", "rows", "columns")}
    tensors = {
        "embed": local_part(state["embed"], device_mesh, [Shard(0)]),
        "rows": local_part(state["rows"], device_mesh, [Shard(1)]),
        "columns": local_part(state["columns"], device_mesh, [Shard(0)]),
    }
    path = str(folder / "out")
    writer = HuggingFaceStorageWriter(path, save_distributed=True, enable_consolidation=consolidate)
    dcp.save(tensors, storage_writer=writer)
    dist.barrier()
    for names in (["S1"], ["_S0/2"], ["R"]):
        target = zeros({n: local_part(v, device_mesh, fitting(v, names)) for n, v in state.items()})
        dcp.load(target, storage_reader=StorageReader(path))
        assert all(same(target[name], value) for name, value in state.items()), names


def torch_reads(folder: Path) -> None:
    """What ours writes, PyTorch's own reader reads."""
    import tonnage.torch
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    device_mesh = mesh(dist.get_world_size())
    state = {name: whole()[name] for name in ("embed", "rows", "columns")}
    tensors = {n: local_part(v, device_mesh, [Shard(0)]) for n, v in state.items()}
    for layout in ("single", "hf", "per_rank"):
        path = str(folder / layout)
        tonnage.torch.save_sharded(tensors, path, layout=layout)
        dist.barrier()
        target = {n: torch.zeros_like(v) for n, v in state.items()}
        dcp.load(target, storage_reader=HuggingFaceStorageReader(path))
        assert all(same(target[name], value) for name, value in state.items()), layout


# The defects of PyTorch's own classes, with ours in their place.


def strided(folder: Path) -> Any:
    """D5, D6: saves and loads `_StridedShard`."""
    from tonnage.torch.dcp import SavePlanner, StorageReader, StorageWriter
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    value = torch.arange(8.0)
    device_mesh = mesh(2)
    part = local_part(value, device_mesh, [_StridedShard(0, split_factor=2)])
    refusal = ""
    try:
        dcp.save({"w": part}, storage_writer=StorageWriter(folder / "default"))
    except BaseException as error:
        refusal = str(error)
    dcp.save({"w": part}, storage_writer=StorageWriter(folder / "out"), planner=SavePlanner())
    dist.barrier()
    found = {}
    for name, reader in (("ours", StorageReader), ("torch", HuggingFaceStorageReader)):
        target = zeros({"w": part})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(target, storage_reader=reader(str(folder / "out")))
        found[name] = target["w"].to_local().tolist()
    return [refusal, found["ours"], found["torch"], part.to_local().tolist()]


def load_into(folder: Path, path: str, shape: list[int], **options: Any) -> Any:
    """Loads one tensor, each rank its rows."""
    from tonnage.torch.dcp import StorageReader

    group = dist.group.WORLD if options.pop("together", False) else None
    target = zeros({"w": local_part(torch.zeros(shape), mesh(dist.get_world_size()), [Shard(0)])})
    reader = StorageReader(folder / path, group=group)
    dcp.load(target, storage_reader=reader)
    return [target["w"].to_local().tolist(), reader.opened]


def save_parts(folder: Path) -> None:
    """Two ranks' rows in files of their own."""
    import tonnage.torch

    value = torch.arange(32.0).reshape(8, 4)
    part = local_part(value, mesh(2), [Shard(0)])
    tonnage.torch.save_sharded({"w": part}, folder / "out", layout="per_rank")


def environment() -> dict[str, str]:
    return dict(os.environ)
