"""Which rank has which expert."""

from __future__ import annotations

from collections.abc import Sequence

from tonnage import _errors
from tonnage._expr import Expr, pick
from tonnage._placements import Shard

#: `"linear"`, `"round_robin"`, or the experts of each rank.
Order = str | Sequence[Sequence[int]]


def table(count: int, size: int, order: Order) -> list[list[int]]:
    """The experts of each rank.

    `"linear"` gives the first ranks one more where they do not come out even; `"round_robin"` gives
    rank `r` the experts `r`, `r + size`, … An expert may be listed for several ranks.
    """
    if order == "linear":
        each, rest = divmod(count, size)
        starts = [rank * each + min(rank, rest) for rank in range(size + 1)]
        return [list(range(starts[rank], starts[rank + 1])) for rank in range(size)]
    if order == "round_robin":
        return [list(range(rank, count, size)) for rank in range(size)]
    if isinstance(order, str):
        text = f"experts must be 'linear', 'round_robin' or a list for each rank, not {order!r}"
        raise _errors.usage(text, "EXPERTS")
    if len(order) != size:
        raise _errors.usage(f"{len(order)} lists of experts for ep={size}", "EXPERTS")
    for expert in (one for owned in order for one in owned):
        if not 0 <= expert < count:
            raise _errors.usage(f"expert {expert} is not one of the {count}", "EXPERTS")
    return [list(owned) for owned in order]


def stacked(
    name: str, expr: Expr, dim: int, count: int, size: int, order: Order
) -> tuple[Expr, Shard]:
    """A tensor of all experts along `dim`: in the order that puts each rank's together, and cut.

    Raises `UsageError` for a table that gives ranks different numbers of experts: they are parts
    of one tensor.
    """
    if order == "linear":
        return expr, Shard(dim, "balanced" if count % size else "torch")
    owned = table(count, size, order)
    if len({len(one) for one in owned}) > 1 and order != "round_robin":
        text = f"{name}: every rank must have as many experts as the others, in one tensor"
        raise _errors.usage(text, "EXPERTS", tensor=name)
    return pick(expr, dim, [one for own in owned for one in own]), Shard(dim, "balanced")
