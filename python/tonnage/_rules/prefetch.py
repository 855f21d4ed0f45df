"""The plan of `prefetch` as a request: parts of tensors, for one rank.

The reference's plans say `None` or a slice of rows for each tensor. Here a value may be a tuple
with a part for each dimension, and each of these a slice with any positive step, an integer, or a
list of these, whose parts lie one behind the other; lists may stand in several dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tonnage import _prefetch
from tonnage._expr import Expr, Reshape, Slice, Source, concat
from tonnage._placements import Mesh
from tonnage._rules import targets
from tonnage._rules.pieces import RANKS
from tonnage._rules.targets import Target


def request(
    catalog: Mapping[str, Any], plan: Mapping[str, _prefetch.Part] | None = None
) -> targets.Request:
    """The request for what a plan names; everything, without one.

    Raises `SafetensorError` for a plan that does not fit, as `prefetch` does.
    """
    given = dict.fromkeys(catalog) if plan is None else plan
    made = []
    for name, value in given.items():
        if name not in catalog:
            raise targets.missing(name, catalog)
        made.append(Target(name, part(name, value, tuple(catalog[name].shape))))
    # A part of a tensor is what was asked for, and so is a row that was asked for twice.
    return targets.request(Mesh({RANKS: 1}), made, "allow", "allow")


def part(name: str, value: _prefetch.Part, shape: tuple[int, ...]) -> Expr:
    """What a plan's value takes of a tensor."""
    made: Expr = Source(name)
    if value is None:
        return made
    if not isinstance(value, list | tuple):
        # A plain slice of rows keeps to the reference's rules, and its messages.
        chosen = _prefetch.choose(name, value, shape, 8)
        ranges = [] if chosen is None else [[one] for one in chosen.boxes[0][0]]
        return _taken(made, ranges, shape)
    keys: list[Any] = [value] if isinstance(value, list) else list(value)
    if len(keys) > len(shape):
        _prefetch.choose(name, tuple(keys), shape, 8)
    keys += [slice(None)] * (len(shape) - len(keys))
    along = [_prefetch._along(name, key, extent) for key, extent in zip(keys, shape, strict=True)]
    made = _taken(made, along, shape)
    if any(isinstance(key, int) for key in keys):
        counts = [sum(len(range(*one)) for one in found) for found in along]
        kept = [count for count, key in zip(counts, keys, strict=True) if not isinstance(key, int)]
        made = Reshape(made, tuple(kept))
    return made


def _taken(made: Expr, along: list[list[tuple[int, int, int]]], shape: tuple[int, ...]) -> Expr:
    for dim, (ranges, extent) in enumerate(zip(along, shape, strict=False)):
        if ranges != [(0, extent, 1)]:
            made = concat([Slice(made, dim, *one) for one in ranges], dim)
    return made
