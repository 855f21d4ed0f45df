"""The style strings of transformers' parallel plans, as placements.

| style | matrix | stacked experts, 3-D | vector |
|---|---|---|---|
| `colwise` and its kin | `Shard(0)` | `Shard(1)` | `Shard(0)` |
| `rowwise` and its kin | `Shard(1)` | `Shard(2)` | a bias `Replicate()`, else `Shard(0)` |
| `packed_colwise` | `StridedShard(0, 2)` | `StridedShard(1, 2)` | `Shard(0)` |
| `packed_rowwise` | `StridedShard(1, 2)` | `StridedShard(2, 2)` | `Replicate()` |
| `embedding_rowwise`, `embedding_colwise` | `Shard(0)`, `Shard(1)` | | |
| `grouped_gemm` | | `Shard(0)` | `Shard(0)` |
| the others | `Replicate()` | `Replicate()` | `Replicate()` |

The others change only how a module computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tonnage import _errors
from tonnage._placements import Placement, Replicate, Shard, StridedShard, Uneven

COLWISE = frozenset(("colwise", "colwise_gather_output", "colwise_rep"))
ROWWISE = frozenset(("rowwise", "rowwise_split_input", "rowwise_rep"))
PACKED = frozenset(("packed_colwise", "packed_rowwise"))
EMBEDDING = frozenset(("embedding_rowwise", "embedding_colwise"))
EXPERTS = frozenset(("grouped_gemm",))
#: Styles that leave weights whole.
WHOLE = frozenset(
    (
        "replicate",
        "replicated_with_grad_allreduce",
        "mla_kv_a_proj",
        "all_reduce",
        "moe_tp_experts",
        "moe_identity_expert",
        "ep_dispatch_experts",
        "ep_router",
        "local_params",
        "local",
        "sequence_parallel",
    )
)
ALL = COLWISE | ROWWISE | PACKED | EMBEDDING | EXPERTS | WHOLE
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def wildcard(name: str) -> str:
    """The name with `*` for every number that stands between dots."""
    return _NUMBER.sub(".*", name)


def style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """The style that a plan gives a parameter: by its own name, else by that of its module."""
    general = wildcard(name)
    return plan.get(general) or plan.get(general.rpartition(".")[0])


def under(name: str, plan: Mapping[str, str]) -> bool:
    """Whether a plan has a rule for the parameter or for a module that it lies in."""
    general = wildcard(name)
    while general:
        if general in plan:
            return True
        general = general.rpartition(".")[0]
    return False


def placement(style: str, name: str, ndim: int, uneven: Uneven = "torch") -> Placement:
    """What a style does to a parameter of `ndim` dimensions.

    Raises `UsageError` for a style that is not known: it might shard.
    """
    if style not in ALL:
        text = f"{name}: the style {style!r} is not known; known are {', '.join(sorted(ALL))}"
        raise _errors.usage(text, "STYLE", tensor=name, found=style)
    if style in WHOLE or ndim == 0:
        return Replicate()
    rows, columns = max(ndim - 2, 0), ndim - 1
    if style in COLWISE:
        return Shard(rows, uneven)
    if style in ROWWISE:
        is_bias = name.rpartition(".")[2] == "bias"
        return Replicate() if is_bias else Shard(columns, uneven)
    if style in EMBEDDING:
        return Shard(0 if style == "embedding_rowwise" else min(1, columns), uneven)
    if style in EXPERTS:
        return Shard(0, uneven)
    if ndim == 1:
        return Shard(0, uneven) if style == "packed_colwise" else Replicate()
    return StridedShard(rows if style == "packed_colwise" else columns, 2, uneven)
