"""Tensors of ranks as boxes of global ones: what each rank says that it has.

Where placements are not known, only what a rank holds, every different tensor becomes a target of
its own that the ranks which hold it own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tonnage import _errors
from tonnage._expr import Concat, Expr, Pad, Shape, narrow
from tonnage._placements import Mesh, Owner
from tonnage._rules.targets import Target

#: The axis along which ranks that say what they hold are counted.
RANKS = "rank"


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, and where it lies in the rank's."""

    start: Shape
    local: Shape
    size: Shape


@dataclass(frozen=True)
class Held:
    """A tensor of a rank: how it is made, in the dtype that it wants."""

    expr: Expr
    dtype: str | None = None


def box(of: Expr, shape: Sequence[int], start: Sequence[int], size: Sequence[int]) -> Expr:
    """A box of a tensor."""
    for dim, (extent, first, count) in enumerate(zip(shape, start, size, strict=True)):
        of = narrow(of, dim, first, first + count, extent)
    return of


def assemble(
    name: str, of: Expr, shape: Sequence[int], pieces: Sequence[Piece], local: Sequence[int]
) -> Expr:
    """A rank's tensor of shape `local` from boxes of a global one; zeros where there is none.

    Raises `UsageError` for boxes that leave one of the tensors, overlap, or lie such that no cut
    through the whole tensor separates them.
    """
    for one in pieces:
        for whole, at, what in ((shape, one.start, "global"), (local, one.local, "local")):
            inside = len(whole) == len(at) == len(one.size) and all(
                0 <= first <= first + count <= extent
                for first, count, extent in zip(at, one.size, whole, strict=True)
            )
            if not inside:
                text = f"{name}: {one} is not inside of the {what} shape {list(whole)}"
                raise _errors.usage(text, "PIECES", tensor=name)
    solid = [one for one in pieces if prod(one.size)]
    if not solid:
        return box(of, shape, [0] * len(shape), local) if not prod(local) else _nothing(name)
    return _assemble(name, of, shape, solid, [0] * len(local), list(local))


def _nothing(name: str) -> Any:
    raise _errors.usage(f"{name}: nothing of the checkpoint is in it", "PIECES", tensor=name)


def _assemble(
    name: str,
    of: Expr,
    shape: Sequence[int],
    pieces: Sequence[Piece],
    low: Sequence[int],
    high: Sequence[int],
) -> Expr:
    if len(pieces) == 1:
        (one,) = pieces
        made = box(of, shape, one.start, one.size)
        for dim, (first, count) in enumerate(zip(one.local, one.size, strict=True)):
            before, after = first - low[dim], high[dim] - first - count
            made = Pad(made, dim, before, after) if before or after else made
        return made
    for dim in range(len(low)):
        groups = _apart(pieces, dim)
        if len(groups) == 1:
            continue
        # A gap belongs to what lies before it.
        starts = [low[dim], *(min(one.local[dim] for one in group) for group in groups[1:])]
        parts = []
        for group, start, stop in zip(groups, starts, [*starts[1:], high[dim]], strict=True):
            under, over = list(low), list(high)
            under[dim], over[dim] = start, stop
            parts.append(_assemble(name, of, shape, group, under, over))
        return Concat(tuple(parts), dim)
    text = f"{name}: its pieces overlap, or no cut separates them"
    raise _errors.usage(text, "PIECES", tensor=name)


def _apart(pieces: Sequence[Piece], dim: int) -> list[list[Piece]]:
    """Pieces in groups that do not overlap in a dimension, in order."""
    groups: list[list[Piece]] = []
    end = -1
    for one in sorted(pieces, key=lambda one: one.local[dim]):
        if one.local[dim] >= end or not groups:
            groups.append([])
        groups[-1].append(one)
        end = max(end, one.local[dim] + one.size[dim])
    return groups


def targets_of(ranks: Sequence[Mapping[str, Held]]) -> tuple[Mesh, list[Target]]:
    """The mesh and the targets of ranks that say what they hold."""
    mesh = Mesh({RANKS: len(ranks)})
    owners: dict[str, dict[Held, list[int]]] = {}
    for rank, held in enumerate(ranks):
        for name, one in held.items():
            owners.setdefault(name, {}).setdefault(one, []).append(rank)
    made = []
    for name, forms in owners.items():
        for one, where in forms.items():
            everywhere = len(where) == len(ranks)
            made.append(
                Target(
                    name if everywhere else f"{name}@{where[0]}",
                    one.expr,
                    {} if everywhere else {RANKS: Owner(*where)},
                    local=name,
                    dtype=one.dtype,
                )
            )
    return mesh, made
