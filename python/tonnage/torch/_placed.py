"""The part of a tensor that this rank owns, by a DTensor's placements, read and nothing else.

Placements act one mesh axis after the other, left to right. Each cuts the index ranges that the
ones before have left of its dimension: `Shard` into one part a coordinate, as long as each other
but for the last ones (`torch.chunk`); `_StridedShard` first into `split_factor` such groups, and
then takes the coordinate's part of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _errors

if TYPE_CHECKING:
    from .._checkpoint import TensorRef

#: A range of indices of one dimension.
Range = tuple[int, int]
#: A rank's part of a tensor: what it has of each dimension, in order.
Part = list[list[Range]]
#: More pieces than this are cut out of whole rows instead of being read one by one.
_MAX_PIECES = 1024


def part_of(shape: Sequence[int], mesh: Any, placements: Sequence[Any], name: str) -> Part:
    """What this rank owns of a tensor of this (global) shape. A rank outside the mesh owns nothing.

    Raises `UnsupportedError` for a placement that gives a rank no values of its own, as `Partial`.
    """
    part: Part = [[(0, int(extent))] for extent in shape]
    coordinate = mesh.get_coordinate()
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim"):
            text = f"{name}: a tensor placed as {placement} cannot be loaded into"
            raise _errors.make("Unsupported", text, code="PLACEMENT", tensor=name)
        dim = placement.dim % len(part)
        if coordinate is None:
            part[dim] = []
            continue
        size, own = int(mesh.size(axis)), int(coordinate[axis])
        groups = int(getattr(placement, "split_factor", 1))
        total = sum(stop - start for start, stop in part[dim])
        mine = []
        for start, stop in (_chunk(0, total, groups, at) for at in range(groups)):
            mine += _within(part[dim], _chunk(start, stop, size, own))
        part[dim] = _joined(mine)
    if coordinate is None:
        return [[] for _ in part] or [[]]
    return part


def _chunk(start: int, stop: int, count: int, at: int) -> Range:
    """Part `at` of `count` of a range, as `torch.chunk` cuts it; the last ones may be empty."""
    length = -(-(stop - start) // count)
    return min(start + length * at, stop), min(start + length * (at + 1), stop)


def _within(ranges: Sequence[Range], wanted: Range) -> list[Range]:
    """The indices at the positions `wanted` of the ranges, strung together."""
    found, before = [], 0
    for start, stop in ranges:
        first = max(wanted[0] - before, 0)
        last = min(wanted[1] - before, stop - start)
        if first < last:
            found.append((start + first, start + last))
        before += stop - start
    return found


def _joined(ranges: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def extents(part: Part) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(sum(stop - start for start, stop in ranges) for ranges in part)


def read(ref: TensorRef, part: Part, dtype: Any, device: Any) -> Any:
    """This part of a tensor of a checkpoint. Of its bytes those are read that the part needs, and
    what lies in gaps too small to skip.

    `dtype` casts floats; `None` leaves them.
    """
    shape = extents(part)
    pieces = 1
    for ranges in part:
        pieces *= len(ranges)
    if 0 in shape:
        # Nothing is read, and what it is made of is the dtype alone.
        none = ref.slice(tuple(slice(0, 0) for _ in shape), "torch")
        return _finished(none.new_empty(shape), dtype, device)
    if pieces == 1:
        local = ref.slice(tuple(slice(*ranges[0]) for ranges in part), "torch")
        return _finished(local, dtype, device)
    if pieces > _MAX_PIECES:
        local = ref.slice(tuple(slice(one[0][0], one[-1][1]) for one in part), "torch")
        for dim, ranges in enumerate(part):
            first = ranges[0][0]
            at = [torch.arange(start - first, stop - first) for start, stop in ranges]
            local = local.index_select(dim, torch.cat(at))
        return _finished(local, dtype, device)
    made: Any = None
    starts = [list(itertools.accumulate((b - a for a, b in one), initial=0)) for one in part]
    for piece in itertools.product(*(range(len(ranges)) for ranges in part)):
        here = [part[dim][at] for dim, at in enumerate(piece)]
        values = ref.slice(tuple(slice(*one) for one in here), "torch")
        if made is None:
            made = values.new_empty(shape)
        target = tuple(slice(starts[dim][at], starts[dim][at + 1]) for dim, at in enumerate(piece))
        made[target] = values
    return _finished(made, dtype, device)


def _finished(local: Any, dtype: Any, device: Any) -> Any:
    cast = dtype if dtype is not None and local.is_floating_point() else local.dtype
    return local.to(device=device, dtype=cast)


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
