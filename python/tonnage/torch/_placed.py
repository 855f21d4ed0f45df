"""The parts of tensors that this rank owns, by DTensors' placements, read by a plan and nothing
else.

For each mesh of devices there is one plan of all its ranks, which every rank makes alike from what
it knows: that each part of a tensor is on some rank, and that what a rank gets is filled exactly
once, is proven before a byte is read. Ranks don't talk for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .. import _arrays, _errors
from .._native import _castable
from .._placements import Mesh, Placement, Shard, StridedShard
from .._rules import targets

if TYPE_CHECKING:
    from .._checkpoint import Checkpoint


def read(
    checkpoint: Checkpoint, like: Mapping[str, Any], casts: Mapping[str, str]
) -> dict[str, Any]:
    """This rank's local tensors, for tensors of the checkpoint that are as long as these DTensors.

    Args:
        checkpoint: it has all of the names.
        like: the DTensors, by name.
        casts: dtypes that floats become.

    Raises `UnsupportedError` for a placement that gives a rank no values of its own, as `Partial`.
    """
    groups: dict[tuple[Any, torch.device], list[str]] = {}
    for name, tensor in like.items():
        groups.setdefault((tensor.device_mesh, device_of(tensor)), []).append(name)
    found: dict[str, Any] = {}
    for (mesh, device), names in groups.items():
        chosen = {name: like[name] for name in names}
        found |= _read_of_mesh(checkpoint, mesh, chosen, casts, device)
    return found


def _read_of_mesh(
    checkpoint: Checkpoint,
    mesh: Any,
    like: Mapping[str, Any],
    casts: Mapping[str, str],
    device: torch.device,
) -> dict[str, Any]:
    sizes: list[int] = []
    wanted = []
    for name, tensor in like.items():
        sizes = [int(mesh.size(axis)) for axis in range(len(tensor.placements))]
        place = {
            f"axis{axis}": cut
            for axis, one in enumerate(tensor.placements)
            if (cut := _placement(one, name)) is not None and sizes[axis] > 1
        }
        stored, cast = checkpoint[name].dtype, casts.get(name)
        cast = cast if cast is not None and _castable(stored, cast) else None
        wanted.append(targets.Target(name, place=place, dtype=cast))
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        # A rank outside the mesh owns nothing.
        return {one.name: _nothing(checkpoint, one, like[one.name], device) for one in wanted}
    ranks = Mesh({f"axis{axis}": size for axis, size in enumerate(sizes)})
    plan = checkpoint.plan(targets.request(ranks, wanted, unread="allow"))
    # Tensors that the module has no place for may stay unread, none of these.
    if left := set(plan.proof.unread).intersection(like):
        text = f"no rank of the mesh has all of {min(left)}"
        raise _errors.usage(text, "PLAN_UNREAD", tensor=min(left))
    rank = 0
    for size, at in zip(sizes, coordinate, strict=True):
        rank = rank * size + int(at)
    return plan.load(rank, framework="torch", device=str(device))


def _placement(found: Any, name: str) -> Placement | None:
    """A placement of PyTorch as one of ours; `None` for a replica."""
    if found.is_replicate():
        return None
    if not hasattr(found, "dim"):
        text = f"{name}: a tensor placed as {found} cannot be loaded into"
        raise _errors.make("Unsupported", text, code="PLACEMENT", tensor=name)
    groups = getattr(found, "split_factor", None)
    return Shard(found.dim) if groups is None else StridedShard(found.dim, int(groups))


def _nothing(
    checkpoint: Checkpoint, target: targets.Target, like: Any, device: torch.device
) -> torch.Tensor:
    row = _arrays.row_of(target.dtype or checkpoint[target.name].dtype, target.name)
    empty = [0] * max(len(like.shape), 1)
    return torch.empty(empty, dtype=getattr(torch, row.torch or ""), device=device)


def distributed(local: Any, like: Any) -> Any:
    """A DTensor of this rank's part, placed as another one is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=torch.empty(like.shape, device="meta").stride(),
    )


def device_of(like: Any) -> torch.device:
    """Where a DTensor's local part belongs: the device of its mesh."""
    kind = str(like.device_mesh.device_type)
    if like.device.type != "meta":
        return torch.device(like.device)
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())
