"""Adapters of low rank, cut as the matrices that they add to.

`B @ A` is added to a weight `[out, in]`, with `A` of `[r, in]` and `B` of `[out, r]`. Where the
weight is cut by rows, `B` is cut so and `A` is whole; where it is cut by columns, `A` is cut so and
`B` is whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tonnage import _errors
from tonnage._expr import Source
from tonnage._placements import Heads, Mesh, Placement, Replicate, Shard, StridedShard
from tonnage._rules import _found, hf, targets
from tonnage._rules.targets import Target

_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


def request(
    catalog: Mapping[str, Any],
    mesh: Mesh,
    base: Mapping[str, Any],
    *,
    config: Any = None,
    model: Any = None,
    unread: targets.Unread = "error",
) -> targets.Request:
    """The request for an adapter. Axes other than `tp` have the same on all ranks.

    Args:
        catalog: the adapter's tensors, named as PEFT names them.
        mesh: the ranks.
        base: the checkpoint that it adapts, whose model says how its matrices are cut.
        config: that model's configuration, as for `hf.request`.
        model: that model, as for `hf.request`.
        unread: tensors of the adapter that may stay unread.

    Raises `UsageError` for a tensor that is no part of a pair, or of a module that the model lacks.
    """
    known = _found.described(base, config, model)
    size = mesh.extent("tp") if "tp" in mesh.names else 1
    made = []
    for name in catalog:
        found = _NAME.fullmatch(name)
        weight = None if found is None else _weight(found[1], known)
        if found is None or weight is None:
            text = f"{name} adapts no matrix of {known.label}"
            raise _errors.usage(text, "NO_RULE", tensor=name)
        _check(name, found[2], tuple(catalog[name].shape), known.shapes[weight])
        placed = hf.tensor_parallel(known, size, hf.Options(), weight) if size > 1 else Replicate()
        made.append(Target(name, Source(name), {"tp": _part(found[2], placed)} if size > 1 else {}))
    return targets.request(mesh, made, unread)


def _weight(module: str, known: hf.Model) -> str | None:
    """The weight of a module, whichever of its prefixes the adapter has."""
    for name in (f"{module}.weight", f"model.{module}.weight", module):
        if len(known.shapes.get(name, ())) == 2:
            return name
    return None


def _check(name: str, part: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
    at = 1 if part == "A" else 0
    if len(shape) != 2 or shape[at] != weight[at]:
        text = f"{name} is {list(shape)}, and its matrix is {list(weight)}"
        raise _errors.usage(text, "SHAPE", tensor=name, found=str(list(shape)))


def _part(part: str, placed: Placement) -> Placement:
    """What a cut of the matrix is for its factor: of the dimension that it has, or none."""
    mine = 1 if part == "A" else 0
    if isinstance(placed, Shard | StridedShard | Heads) and placed.dim % 2 == mine:
        return replace(placed, dim=mine)
    return Replicate()
