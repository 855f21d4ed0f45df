"""Parts of tensors by DTensor placements: against PyTorch's own cuts, and over real processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tonnage
import tonnage.torch
import torch
from tonnage.torch import _placed
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

WORKER = Path(__file__).with_name("placed_worker.py")


class Mesh:
    """What a placement asks of a mesh."""

    device_type = "cpu"

    def __init__(self, sizes: tuple[int, ...], coordinate: tuple[int, ...] | None) -> None:
        self._sizes, self._coordinate = sizes, coordinate

    def get_coordinate(self) -> tuple[int, ...] | None:
        return self._coordinate

    def size(self, axis: int) -> int:
        return self._sizes[axis]


def read(whole: torch.Tensor, mesh: Mesh, placements: list[Any]) -> torch.Tensor:
    """What `load_model` reads of a tensor that is placed so."""
    like = SimpleNamespace(
        shape=whole.shape, device=whole.device, device_mesh=mesh, placements=placements
    )
    with tonnage.open(tonnage.torch.save({"other": torch.ones(3), "t": whole})) as checkpoint:
        found: torch.Tensor = _placed.read(checkpoint, {"t": like}, {})["t"]
    return found


def cut(tensor: torch.Tensor, mesh: Mesh, placements: list[Any]) -> torch.Tensor:
    """PyTorch's own cut, axis by axis."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(placements):
        if not placement.is_replicate():
            parts, _ = placement._split_tensor(tensor, mesh.size(axis), with_padding=False)
            tensor = parts[coordinate[axis]]
    return tensor


def test_random_placements_are_cut_and_read_as_pytorch_cuts_them() -> None:
    shuffled, checked = random.Random(4), 0
    for _ in range(600):
        shape = [shuffled.randrange(14) for _ in range(shuffled.randrange(1, 4))]
        sizes = tuple(shuffled.randrange(1, 5) for _ in range(shuffled.randrange(1, 4)))
        placements: list[Any] = []
        for _axis in sizes:
            dim = shuffled.randrange(len(shape))
            kind = shuffled.randrange(4)
            strided = _StridedShard(dim, split_factor=shuffled.randrange(1, 5))
            placements.append([Replicate(), Shard(dim), strided, strided][kind])
        mesh = Mesh(sizes, tuple(shuffled.randrange(size) for size in sizes))
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        want = cut(whole, mesh, placements)
        found = read(whole, mesh, placements)
        assert found.shape == want.shape, (shape, sizes, placements)
        assert torch.equal(found, want), (shape, sizes, placements)
        checked += bool(want.numel())
    assert checked > 250


def test_many_pieces_negative_dimensions_scalars_and_ranks_outside() -> None:
    mesh, placements = Mesh((3, 2), (1, 1)), [_StridedShard(0, split_factor=8), Shard(1)]
    whole = torch.arange(50 * 7).reshape(50, 7)
    assert torch.equal(read(whole, mesh, placements), cut(whole, mesh, placements))
    last = read(whole, Mesh((2,), (1,)), [Shard(-1)])
    assert torch.equal(last, whole[:, 4:])
    scalar = torch.tensor(7)
    assert torch.equal(read(scalar, Mesh((2,), (1,)), [Replicate()]), scalar)
    outside = read(whole, Mesh((2,), None), [Shard(0)])
    assert (outside.shape, outside.dtype) == ((0, 0), whole.dtype)
    with pytest.raises(tonnage.UnsupportedError, match=r"t: .*P\(sum\)"):
        read(whole, Mesh((2,), (0,)), [Partial()])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_read_their_own_parts(world: int, tmp_path: Path) -> None:
    sys.path.insert(0, str(WORKER.parent))
    try:
        from placed_worker import Model
    finally:
        sys.path.remove(str(WORKER.parent))
    torch.manual_seed(0)
    file, folder = tmp_path / "model.safetensors", tmp_path / "model"
    tonnage.torch.save_model(Model(), str(file), fsync=False)
    tonnage.save(tonnage.torch.load_file(file), folder, max_shard_size="10KB", fsync=False)
    large = {"weight": torch.randn(4096, 1024)}
    tonnage.torch.save_file(large, tmp_path / "large.safetensors", fsync=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), str(WORKER), str(file), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, timeout=500, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(world):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found.pop("bytes")["amplification"] < 1.05
        assert len(found) == (3 if world == 2 else 2)
        for way, result in found.items():
            assert result["error"] < 1e-4, way
            assert result["placed"], way
        if world == 4:
            placed = " ".join(found["dp tp rows"]["placed"])
            assert "_StridedShard(dim=0, sf=2), Shard(dim=0)" in placed
            assert "Shard(dim=0), Shard(dim=1)" in placed
