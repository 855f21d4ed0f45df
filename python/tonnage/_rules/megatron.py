"""Targets from sharded state dicts of the Megatron kind.

A `ShardedTensor` there says which box of which global tensor a rank holds: `key`, `global_shape`,
`global_offset`, `local_shape`, `prepend_axis_num`, `flattened_range`, `allow_shape_mismatch`. A
`ShardedTensorFactory` builds several of them, and merges what was loaded. Both are taken by these
attributes; Megatron need not be installed.

The global tensors are those of the checkpoint of the same key, or are made of those of another:
`qkv`, `gated` and `padded` say how Megatron's fused ones are made of the usual ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tonnage import _dtypes, _errors
from tonnage._expr import Concat, Expr, Pad, Reshape, Slice, Source
from tonnage._rules import targets
from tonnage._rules.pieces import Held, Piece, assemble, targets_of


def qkv(
    query: Expr, key: Expr, value: Expr, *, heads: int, groups: int, rest: Sequence[int] = ()
) -> Expr:
    """Megatron's fused projection: for every group its query heads, then its key, then its value.

    Args:
        query, key, value: projections, `[heads * head_dim, hidden]` and `[groups * head_dim,
            hidden]`, or their biases.
        heads: query heads.
        groups: heads of keys and values.
        rest: `(head_dim, hidden)`, or `(head_dim,)` for biases.
    """
    if not rest or groups < 1 or heads % groups:
        text = f"{heads} heads in {groups} groups of {list(rest)} is no projection of Megatron's"
        raise _errors.usage(text, "QKV")
    each = heads // groups
    parts = (
        Reshape(query, (groups, each, *rest)),
        Reshape(key, (groups, 1, *rest)),
        Reshape(value, (groups, 1, *rest)),
    )
    rows = groups * (each + 2) * rest[0]
    return Reshape(Concat(parts, 1), (rows, *rest[1:]))


def gated(gate: Expr, up: Expr) -> Expr:
    """Megatron's first projection of a gated network: all of the gate, then all of the other."""
    return Concat((gate, up), 0)


def padded(embedding: Expr, rows: int, padded_rows: int) -> Expr:
    """An embedding with rows of zeros up to a number that divides."""
    return Pad(embedding, 0, 0, padded_rows - rows) if padded_rows > rows else embedding


def request(
    states: Sequence[Mapping[str, Any]],
    catalog: Mapping[str, Any],
    *,
    sources: Mapping[str, Expr] | None = None,
    unread: targets.Unread = "error",
) -> targets.Request:
    """The request that fills the sharded state dicts of all ranks, in order.

    Args:
        states: nested dicts and lists of `ShardedTensor`s and factories. Objects that are neither
            are no tensors and are passed over.
        catalog: the checkpoint.
        sources: how global tensors are made, by their key, where the checkpoint lacks them.
        unread: tensors of the checkpoint that may stay unread.

    Tensors are named by their path in the state dict, with dots.
    """
    known = dict(sources or {})
    ranks = []
    for state in states:
        held = {}
        for name, one in _leaves(state, ()):
            if _is_factory(one) or _is_sharded(one):
                expr = _expr(name, one, catalog, known)
                held[name] = Held(expr, _cast(one, expr, catalog))
        ranks.append(held)
    mesh, made = targets_of(ranks)
    return targets.request(mesh, made, unread)


def _leaves(state: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(state, list | tuple):
        for at, value in enumerate(state):
            yield from _leaves(value, (*path, str(at)))
    else:
        yield ".".join(path), state


def _is_sharded(one: Any) -> bool:
    fields = ("key", "local_shape", "global_shape", "global_offset")
    return all(hasattr(one, field) for field in fields)


def _is_factory(one: Any) -> bool:
    return hasattr(one, "build") and hasattr(one, "merge_fn")


def _expr(name: str, one: Any, catalog: Mapping[str, Any], known: Mapping[str, Expr]) -> Expr:
    """How the tensor that a rank holds is made."""
    if _is_factory(one):
        return _merged(name, one, catalog, known)
    shape = tuple(int(extent) for extent in one.global_shape)
    prepended = int(getattr(one, "prepend_axis_num", 0) or 0)
    local = tuple(int(extent) for extent in one.local_shape)
    whole = _global(name, one, shape, catalog, known)
    start = tuple(int(at) for at in one.global_offset)
    size = (*[1] * prepended, *local)
    if len(start) != len(shape) or len(size) != len(shape):
        text = f"{name}: {len(start)} offsets and {len(size)} extents in {len(shape)} dimensions"
        raise _errors.usage(text, "PIECES", tensor=name)
    # What lies beyond the global tensor is padding of the last rank's.
    made = assemble(name, whole, shape, [Piece(start, (0,) * len(size), size)], size)
    if prepended:
        made = Reshape(made, local)
    flat = getattr(one, "flattened_range", None)
    if flat is not None:
        count = 1
        for extent in local:
            count *= extent
        first, last, step = flat.indices(count)
        made = Slice(Reshape(made, (count,)), 0, first, max(first, last), step)
    return made


def _global(
    name: str,
    one: Any,
    shape: tuple[int, ...],
    catalog: Mapping[str, Any],
    known: Mapping[str, Expr],
) -> Expr:
    """The global tensor, in the shape that the rank expects of it."""
    expr = known.get(one.key, Source(one.key))
    for source in expr.sources():
        if source not in catalog:
            raise targets.missing(source, catalog)
    found = expr.shape({source: catalog[source].shape for source in expr.sources()})
    if found == shape:
        return expr
    if not getattr(one, "allow_shape_mismatch", False) or len(found) != len(shape):
        text = f"{name}: {one.key} is {list(found)} in the checkpoint, and {list(shape)} here"
        needed = str(list(shape))
        raise _errors.usage(text, "SHAPE", tensor=name, found=str(list(found)), needed=needed)
    # A vocabulary that was padded for another number of ranks.
    for dim, (have, want) in enumerate(zip(found, shape, strict=True)):
        if have < want:
            expr = Pad(expr, dim, 0, want - have)
        elif have > want:
            expr = Slice(expr, dim, 0, want)
    return expr


def _merged(name: str, one: Any, catalog: Mapping[str, Any], known: Mapping[str, Expr]) -> Expr:
    """What the factory makes of the tensors that it asks for, by tracing its own code."""
    import torch

    from tonnage._rules.trace import Traced, refused

    def loaded(built: Any) -> Any:
        if isinstance(built, Mapping):
            return {key: loaded(value) for key, value in built.items()}
        if isinstance(built, list | tuple):
            return [loaded(value) for value in built]
        if not _is_sharded(built):
            return built
        made = _expr(name, built, catalog, known)
        shape = made.shape({source: catalog[source].shape for source in made.sources()})
        dtype = getattr(built, "dtype", None)
        return Traced.of(made, shape, dtype if isinstance(dtype, torch.dtype) else torch.uint8)

    merged = one.merge_fn(loaded(one.build()))
    if not isinstance(merged, Traced):
        raise refused(f"a merge_fn of {name} that gives {type(merged).__name__}")
    return merged.expr


def _cast(one: Any, expr: Expr, catalog: Mapping[str, Any]) -> str | None:
    """The dtype to cast to; none where the checkpoint has the one wanted."""
    dtype = getattr(one, "dtype", None) or getattr(getattr(one, "data", None), "dtype", None)
    if dtype is None:
        return None
    wanted = _dtypes.parse(dtype).name
    return None if {catalog[name].dtype for name in expr.sources()} == {wanted} else wanted
