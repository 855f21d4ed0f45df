"""What a request means, in NumPy: the plainest reading of it, for one rank at a time.

It shares nothing with the planner but the JSON, and evaluates whole tensors before it cuts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tonnage import _expr


class Absent(Exception):
    """This rank does not have the tensor."""


def coordinates(request: Mapping[str, Any], rank: int) -> dict[str, tuple[int, int]]:
    """For each axis, the rank's coordinate and the axis's size, outermost axis first."""
    made: dict[str, tuple[int, int]] = {}
    for form in (request["mesh"], *request.get("alt", ())):
        inside = 1
        for _, size in form:
            inside *= size
        for name, size in form:
            inside //= size
            made[name] = (rank // inside % size, size)
    return made


def load(request: Mapping[str, Any], arrays: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The tensors of a rank."""
    where = coordinates(request, rank)
    made = {}
    for target in request["targets"]:
        name = target["name"]
        expr = target.get("expr", {"source": name})
        value = _expr.from_json(expr).evaluate(arrays)
        try:
            for axis, (at, size) in where.items():
                if axis in target["place"]:
                    value = place(value, target["place"][axis], at, size)
        except Absent:
            continue
        local = target.get("local", name)
        assert local not in made, f"rank {rank} has two tensors {local}"
        made[local] = value
    return made


def place(value: Any, placement: Any, at: int, size: int) -> Any:
    """The part of an array that the `at`-th of `size` ranks has."""
    if placement == "replicate":
        return value
    ((kind, how),) = placement.items()
    return _KINDS[kind](value, how, at, size)


def _shard(value: Any, how: Any, at: int, size: int) -> Any:
    dim = how["dim"] % value.ndim
    value, ranges = _ranges(value, dim, how.get("uneven", "torch"), size)
    return value[(slice(None),) * dim + (slice(*ranges[at]),)]


def _ranges(value: Any, dim: int, uneven: Any, size: int) -> tuple[Any, list[tuple[int, int]]]:
    extent = value.shape[dim]
    if isinstance(uneven, dict) and "pad_to" in uneven:
        width = [(0, 0)] * value.ndim
        width[dim] = (0, -extent % uneven["pad_to"])
        value = np.pad(value, width)
        extent, uneven = value.shape[dim], "error"
    if uneven == "error":
        assert extent % size == 0
    unit = uneven["granular"] if isinstance(uneven, dict) else 1
    if uneven in ("balanced",) or unit > 1:
        assert extent % unit == 0
        counts = [part.size * unit for part in np.array_split(np.arange(extent // unit), size)]
        ends = np.cumsum([0, *counts])
    else:
        ends = np.minimum(np.arange(size + 1) * -(-extent // size), extent)
    return value, [(int(ends[one]), int(ends[one + 1])) for one in range(size)]


def _chunks(value: Any, dim: int, count: int) -> list[Any]:
    """`torch.chunk`, with empty parts where it gives fewer."""
    each = -(-value.shape[dim] // count)
    key = (slice(None),) * dim
    return [value[(*key, slice(one * each, (one + 1) * each))] for one in range(count)]


def _strided(value: Any, how: Any, at: int, size: int) -> Any:
    dim = how["dim"] % value.ndim
    inner = {"dim": dim, "uneven": how.get("uneven", "torch")}
    groups = _chunks(value, dim, how["groups"])
    return np.concatenate([_shard(group, inner, at, size) for group in groups], axis=dim)


def _segments(value: Any, how: Any, at: int, size: int) -> Any:
    dim = how["dim"] % value.ndim
    assert sum(how["sizes"]) == value.shape[dim]
    parts = np.split(value, np.cumsum(how["sizes"])[:-1], axis=dim)
    placed = [place(part, one, at, size) for part, one in zip(parts, how["each"], strict=True)]
    return np.concatenate(placed, axis=dim)


def _heads(value: Any, how: Any, at: int, size: int) -> Any:
    dim, heads, width = how["dim"] % value.ndim, how["heads"], how["head_dim"]
    assert heads * width == value.shape[dim]
    if heads >= size:
        assert heads % size == 0
        first, count = at * (heads // size), heads // size
    else:
        assert size % heads == 0
        first, count = at // (size // heads), 1
    return value[(slice(None),) * dim + (slice(first * width, (first + count) * width),)]


def _owner(value: Any, how: Any, at: int, size: int) -> Any:
    assert how
    assert max(how) < size
    if at not in how:
        raise Absent
    return value


def _only(value: Any, how: Any, at: int, size: int) -> Any:
    if at == how["coord"]:
        return value
    if how.get("others", "absent") == "absent":
        raise Absent
    return np.zeros_like(value)


def _blocks(value: Any, how: Any, at: int, size: int) -> Any:
    dim, block = how["dim"] % value.ndim, how["block"]
    assert -(-how["extent"] // block) == value.shape[dim]
    _, ranges = _ranges(np.empty(how["extent"], np.uint8), 0, how.get("uneven", "torch"), size)
    start, stop = ranges[at]
    key = slice(start // block, -(-stop // block)) if stop > start else slice(0, 0)
    return value[(slice(None),) * dim + (key,)]


_KINDS = {
    "shard": _shard,
    "strided": _strided,
    "segments": _segments,
    "heads": _heads,
    "owner": _owner,
    "only": _only,
    "blocks": _blocks,
}
