"""One rank of `test_torch_placed.py`: a model over a mesh, loaded by `load_model`, beside the parts
that `distribute_tensor` cuts of the single process' parameters.

    torchrun … placed_worker.py FILE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tonnage
import torch
import torch.distributed as dist
from tonnage.torch import load_model, save, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

VOCABULARY, WIDTH, INNER = 131, 24, 46


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, hidden: torch.Tensor) -> Any:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class Model(nn.Module):
    """Tied, with biases, a buffer, and extents that no mesh divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens: torch.Tensor) -> Any:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden * self.scale)


def spread(model: Model, mesh: DeviceMesh, way: str) -> None:
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
    data = tuple(name for name in names if name != "tp")
    if not data:
        return
    part: dict[str, Any] = {"mesh": mesh[data if len(data) > 1 else data[0]]}
    if way == "columns":
        part["shard_placement_fn"] = lambda parameter: Shard(parameter.ndim - 1)
    for block in model.blocks:
        fully_shard(block, **part)
    fully_shard(model, **part)


def check(model: Model, single: Model, dtype: torch.dtype) -> list[str]:
    """Compares every parameter with its cut; says how each is placed."""
    own, placed = dict(single.named_parameters()), []
    for name, parameter in model.named_parameters():
        want = own[name].detach()
        found = parameter.detach()
        if isinstance(found, DTensor):
            # Every rank has the whole, and PyTorch can't scatter uneven strided shards.
            want = distribute_tensor(
                want, found.device_mesh, found.placements, src_data_rank=None
            ).to_local()
            found = found.to_local()
            placed.append(f"{name} {parameter.placements}")
        assert found.dtype == dtype, (name, found.dtype)
        assert found.device.type == "cpu"
        assert parameter.requires_grad
        assert torch.equal(found, want.to(dtype)), name
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.scale.float(), single.scale)
    return placed


def loads(file: str, folder: str, single: Model, mesh: DeviceMesh, way: str) -> dict[str, Any]:
    placed: list[str] = []
    for source in (file, folder):
        for device in ("meta", "cpu"):
            for dtype in (None, torch.bfloat16) if device == "meta" else (None,):
                with torch.device(device):
                    model = Model()
                spread(model, mesh, way)
                assert load_model(model, source, dtype=dtype) == ([], [])
                placed = check(model, single, dtype or torch.float32)
    tokens = torch.arange(VOCABULARY).view(1, -1)
    model = Model()
    spread(model, mesh, way)
    load_model(model, file)
    found = model(tokens)
    found.sum().backward()
    error = (found - single(tokens)).abs().max().item()
    return {"placed": placed, "error": error}


def refusals(file: str, mesh: DeviceMesh) -> None:
    """What does not fit says the same on every rank, and saving a part is refused."""
    with torch.device("meta"):
        model = Model()
        model.blocks[0].up = nn.Linear(WIDTH, INNER + 1)
    spread(model, mesh, "rows")
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.0\.up\.weight") as refusal:
        load_model(model, file)
    shapes = f"torch.Size([{INNER}, {WIDTH}]) from checkpoint, the shape in current model is"
    assert f"{shapes} torch.Size([{INNER + 1}, {WIDTH}])" in str(refusal.value)
    part = distribute_tensor(torch.ones(8), mesh, [Shard(0)] * mesh.ndim)
    for function in (
        lambda: save({"state": [part]}, "/dev/null"),
        lambda: save({"part": part}),
        lambda: save_file({"part": part}, "/dev/null"),
        lambda: tonnage.save({"part": part}, "/dev/null"),
    ):
        with pytest.raises(TypeError, match="save_sharded"):
            function()


def read_bytes() -> int:
    fields = Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("rchar:") + 1])


def counts(mesh: DeviceMesh, path: str) -> dict[str, float]:
    """Bytes read for a large row shard, for each that the rank needs."""
    with torch.device("meta"):
        model = nn.Linear(1024, 4096, bias=False)
    fully_shard(model, mesh=mesh)
    load_model(model, path)  # what the first call imports is read as well
    before = read_bytes()
    load_model(model, path)
    needed = model.weight.to_local().nbytes
    return {"amplification": (read_bytes() - before) / needed}


def main(file: str, folder: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    single = Model()
    meshes: list[tuple[tuple[int, ...], tuple[str, ...], str]]
    if world == 2:
        meshes = [((2,), ("dp",), "rows"), ((2,), ("dp",), "columns"), ((2,), ("tp",), "rows")]
    else:
        meshes = [
            ((2, 2), ("dp", "tp"), "rows"),
            ((2, 2), ("replicate", "dp"), "rows"),
        ]
    # (FSDP cuts dimensions other than the first evenly only.)
    results: dict[str, Any] = {}
    for shape, names, way in meshes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        results[f"{' '.join(names)} {way}"] = loads(file, folder, single, mesh, way)
        refusals(file, mesh)
    large = str(Path(file).with_name("large.safetensors"))
    results["bytes"] = counts(init_device_mesh("cpu", (world,)), large)
    Path(file).with_name(f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
