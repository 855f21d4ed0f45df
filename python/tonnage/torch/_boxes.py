"""Which boxes of a tensor a rank has: of DTensors, of tensors with the four attributes of PyTorch's
`CheckpointableTensor`, of sharded tensors, and of plain ones, which are whole.

A DTensor's placements are applied mesh axis by mesh axis. What `_StridedShard` leaves of a
dimension is several ranges, and the local tensor holds them one behind the other: several boxes.
"""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any, NamedTuple

import torch

from .. import _errors
from . import _refuse

Extents = tuple[int, ...]
#: The first index and the one behind the last.
Range = tuple[int, int]


class Piece(NamedTuple):
    """A box of a tensor."""

    #: Its first index in the whole tensor.
    offset: Extents
    #: Its first index in the local tensor.
    local: Extents
    #: Its extents, the same in both.
    size: Extents


class Held(NamedTuple):
    """What a rank has of a tensor."""

    tensor: torch.Tensor
    shape: Extents
    pieces: tuple[Piece, ...]


def held(value: torch.Tensor, name: str) -> Held:
    """What this rank has of a tensor."""
    value = value.detach() if not is_checkpointable(value) else value
    if _refuse.is_dtensor(value):
        return _of_dtensor(value, name)
    if _is_sharded(value):
        return _of_sharded(value)
    if is_checkpointable(value):
        return _of_checkpointable(value, name)
    shape = tuple(value.shape)
    return Held(value, shape, (Piece((0,) * len(shape), (0,) * len(shape), shape),))


def view(found: Held, piece: Piece) -> torch.Tensor:
    """A piece of the local tensor; no copy."""
    part = found.tensor
    for dim, (begin, extent) in enumerate(zip(piece.local, piece.size, strict=True)):
        part = part.narrow(dim, begin, extent)
    return part


def is_checkpointable(value: object) -> bool:
    """Whether a plain tensor says of which part of a larger one it is."""
    names = ("global_shape", "global_offsets", "local_offsets", "local_sizes")
    return isinstance(value, torch.Tensor) and all(hasattr(value, name) for name in names)


def _wrong(name: str, text: str) -> Exception:
    return _errors.usage(f"{name}: {text}", "PLACEMENT", tensor=name)


def _of_dtensor(value: Any, name: str) -> Held:
    local = value.to_local()
    if hasattr(local, "wait"):
        local = local.wait()
    shape = tuple(int(extent) for extent in value.shape)
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:
        return Held(local, shape, ())
    if not elements(shape):
        zeros = (0,) * len(shape)
        return Held(local.new_empty(shape), shape, (Piece(zeros, zeros, shape),))
    ranges: list[list[Range]] = [[(0, extent)] for extent in shape]
    for axis, placement in enumerate(value.placements):
        if placement.is_partial():
            raise _wrong(
                name, f"it is {placement} on mesh axis {axis}: reduce it first (redistribute)"
            )
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim"):
            raise _wrong(name, f"a placement of type {type(placement).__qualname__} is not known")
        dim = placement.dim % max(len(shape), 1)
        groups = int(getattr(placement, "split_factor", 1))
        parts = value.device_mesh.size(axis)
        ranges[dim] = _taken(ranges[dim], groups, parts, coordinate[axis])
    extents = tuple(sum(end - begin for begin, end in part) for part in ranges)
    if extents != tuple(local.shape):
        raise _wrong(name, f"its local shape is {tuple(local.shape)}, its placements say {extents}")
    return Held(local, shape, _product(ranges))


def _taken(ranges: list[Range], groups: int, parts: int, index: int) -> list[Range]:
    """What one of `parts` ranks gets of a dimension's ranges: its chunk of each of `groups`."""
    taken: list[Range] = []
    length = sum(end - begin for begin, end in ranges)
    for group in range(groups):
        first, last = _chunk(length, groups, group)
        begin, end = _chunk(last - first, parts, index)
        for found in _inside(ranges, first + begin, first + end):
            if taken and taken[-1][1] == found[0]:
                taken[-1] = (taken[-1][0], found[1])
            else:
                taken.append(found)
    return taken


def _chunk(length: int, chunks: int, index: int) -> Range:
    """As `torch.chunk` cuts, with empty chunks at the end."""
    each = -(-length // chunks)
    return min(index * each, length), min((index + 1) * each, length)


def _inside(ranges: list[Range], begin: int, end: int) -> list[Range]:
    """The indices from `begin` to `end`, counted along the ranges."""
    found, at = [], 0
    for first, last in ranges:
        low, high = max(begin - at, 0), min(end - at, last - first)
        if low < high:
            found.append((first + low, first + high))
        at += last - first
    return found


def _product(ranges: list[list[Range]]) -> tuple[Piece, ...]:
    """The boxes of some ranges of each dimension."""
    along: list[list[tuple[int, int, int]]] = []
    for part in ranges:
        starts = itertools.accumulate((end - begin for begin, end in part), initial=0)
        # The last of the starts is where all of them end.
        pairs = zip(part, starts, strict=False)
        sizes = [(begin, start, end - begin) for (begin, end), start in pairs]
        along.append(sizes)
    return tuple(
        Piece(
            tuple(begin for begin, _, _ in box),
            tuple(start for _, start, _ in box),
            tuple(extent for _, _, extent in box),
        )
        for box in itertools.product(*along)
    )


def _of_checkpointable(value: Any, name: str) -> Held:
    shape = tuple(int(extent) for extent in value.global_shape)
    lists = (value.global_offsets, value.local_offsets, value.local_sizes)
    if len({len(part) for part in lists}) != 1:
        raise _wrong(name, "global_offsets, local_offsets and local_sizes differ in length")
    pieces = []
    for offset, local, size in zip(*lists, strict=True):
        piece = Piece(tuple(offset), tuple(local), tuple(size))
        if {len(part) for part in piece} != {len(shape)} or value.dim() != len(shape):
            raise _wrong(name, f"the box {piece} does not have {len(shape)} dimensions")
        rows = zip(*piece, shape, value.shape, strict=True)
        for begin, at, extent, whole, here in rows:
            if begin < 0 or at < 0 or extent < 0 or begin + extent > whole or at + extent > here:
                raise _wrong(name, f"the box {piece} does not lie in {shape} and in its tensor")
        pieces.append(piece)
    return Held(value.detach(), shape, tuple(pieces))


def _is_sharded(value: object) -> bool:
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")
    return module is not None and isinstance(value, module.ShardedTensor)


def _of_sharded(value: Any) -> Held:
    """A `ShardedTensor`, of which a rank has at most one shard in all uses that are left."""
    shape = tuple(value.metadata().size)
    shards = value.local_shards()
    if len(shards) > 1:
        raise _wrong("ShardedTensor", "more than one shard on a rank")
    if not shards:
        return Held(torch.empty(0, dtype=value.metadata().tensor_properties.dtype), shape, ())
    offset, size = shards[0].metadata.shard_offsets, shards[0].metadata.shard_sizes
    piece = Piece(tuple(offset), (0,) * len(shape), tuple(size))
    return Held(shards[0].tensor, shape, (piece,))


def elements(size: Extents) -> int:
    """How many elements a box has."""
    return math.prod(size)


def missing(shape: Extents, boxes: list[tuple[Extents, Extents]]) -> tuple[Extents, Extents] | None:
    """A box of a tensor that none of these covers, as offset and size; `None` if they cover it."""
    left = [((0,) * len(shape), shape)] if math.prod(shape) else []
    for box in boxes:
        left = [rest for piece in left for rest in _cut(piece, box)]
    return left[0] if left else None


def _cut(
    piece: tuple[Extents, Extents], part: tuple[Extents, Extents]
) -> list[tuple[Extents, Extents]]:
    """What is left of a box outside of another one."""
    common = intersection(piece, part)
    if common is None:
        return [piece]
    rest = []
    offset, size = list(piece[0]), list(piece[1])
    for dim, (begin, extent) in enumerate(zip(*common, strict=True)):
        for low, high in ((offset[dim], begin), (begin + extent, offset[dim] + size[dim])):
            if low < high:
                side = (list(offset), list(size))
                side[0][dim], side[1][dim] = low, high - low
                rest.append((tuple(side[0]), tuple(side[1])))
        offset[dim], size[dim] = begin, extent
    return rest


def intersection(
    one: tuple[Extents, Extents], other: tuple[Extents, Extents]
) -> tuple[Extents, Extents] | None:
    """The elements that two boxes share, as offset and size."""
    offset, size = [], []
    for a, b, m, n in zip(one[0], other[0], one[1], other[1], strict=True):
        begin, end = max(a, b), min(a + m, b + n)
        if begin >= end:
            return None
        offset.append(begin)
        size.append(end - begin)
    return tuple(offset), tuple(size)


def text(offset: Extents, size: Extents) -> str:
    """A box as a slice is written."""
    ranges = zip(offset, size, strict=True)
    return "[" + ", ".join(f"{begin}:{begin + extent}" for begin, extent in ranges) + "]"
