"""Rules of a model of the Hugging Face kind: what its tensors are, and how it wants them cut.

`request` finds the model by its `config.json`, or takes the model; `described` says what is known
of it, from transformers where that is installed (`_model.py`), else from a table of our own
(`_known.py`). From there on it does not matter where the knowledge came from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tonnage import _errors
from tonnage._expr import Expr
from tonnage._placements import (
    Blocks,
    Granular,
    Heads,
    Mesh,
    Owner,
    Placement,
    Replicate,
    Segments,
    Shard,
    StridedShard,
    Uneven,
)
from tonnage._rules import experts as moe
from tonnage._rules import stages as pipelines
from tonnage._rules import styles, targets
from tonnage._rules.targets import Target


@dataclass(frozen=True)
class Model:
    """What placing a model's tensors takes."""

    #: How each tensor is made of those of the checkpoint.
    exprs: dict[str, Expr]
    shapes: dict[str, tuple[int, ...]]
    #: Tensors that are no parameters: no plan shards them.
    buffers: frozenset[str]
    #: Names, with `*` for numbers, to styles.
    tp: dict[str, str]
    ep: dict[str, str]
    #: What the pipeline's first stage has, then the list of layers, then what the last stage has.
    first: tuple[str, ...]
    layers: str | None
    last: tuple[str, ...]
    #: How many heads attention has, and how many of them have keys and values of their own.
    heads: int | None
    kv_heads: int | None
    #: What to call it in errors.
    label: str
    #: Tensors of the checkpoint that the model does not want, and those of them that it says it
    #: does not.
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    #: Tensors of scales, each with its weight and the extents of a block.
    scales: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How to cut, where a plan leaves it open. See `request`."""

    pipeline: pipelines.Pipeline = field(default_factory=pipelines.Pipeline)
    experts: moe.Order = "linear"
    vocab: Uneven = "torch"
    row_bias: Placement = field(default_factory=Replicate)
    uneven_heads: bool = False


#: Axes along which every rank has the same weights.
_COPIES = frozenset(("dp", "dp_replicate", "replicate", "ddp", "cp", "sp"))
_AXES = frozenset(("pp", "tp", "ep", "fsdp", "dp_shard", "efsdp")) | _COPIES
_ATTENTION = frozenset(("self_attn", "attn", "attention", "self_attention", "cross_attn"))
_KEYS_AND_VALUES = frozenset(("k_proj", "v_proj", "key", "value"))
_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")


def place(model: Model, mesh: Mesh, options: Options) -> list[Target]:
    """The model's tensors as targets on the mesh.

    Raises `UsageError` for what the model has no rule for, naming the tensor.
    """
    for axis in mesh.names:
        if axis not in _AXES and mesh.extent(axis) > 1:
            text = f"no rule says what the axis {axis!r} does; known are {', '.join(sorted(_AXES))}"
            raise _errors.usage(text, "AXIS", found=axis)
    _check_plans(model, mesh)
    stage = None
    if _size(mesh, "pp") > 1:
        ends = pipelines.Ends(model.first, model.layers, model.last, model.label)
        stage = pipelines.Stages(model.exprs, ends, _size(mesh, "pp"), options.pipeline)
    made = []
    for name, expr in model.exprs.items():
        target = _sharded(model, mesh, options, Target(name, expr))
        made.append(stage.placed(target) if stage else target)
    return made


def _size(mesh: Mesh, axis: str) -> int:
    return mesh.extent(axis) if axis in mesh.names else 1


def _check_plans(model: Model, mesh: Mesh) -> None:
    for axis, plan in (("tp", model.tp), ("ep", model.ep)):
        if _size(mesh, axis) > 1 and not plan:
            text = (
                f"{model.label} has no {axis}_plan: pass {axis}_plan={{name: style}}, or "
                "rules={pattern: placement} for every tensor"
            )
            raise _errors.usage(text, "NO_PLAN", needed=f"{axis}_plan")


def _sharded(model: Model, mesh: Mesh, options: Options, target: Target) -> Target:
    """What tensor and expert parallelism, then FSDP make of it."""
    name = target.name
    weight, block = model.scales.get(name, (name, None))
    expert = _size(mesh, "ep") > 1 and styles.under(weight, model.ep)
    placed: Placement = Replicate()
    if name not in model.buffers:
        if expert:
            target, placed = _expert(model, _size(mesh, "ep"), options, target)
            target = target.placed("ep", placed)
        elif _size(mesh, "tp") > 1:
            placed = tensor_parallel(model, _size(mesh, "tp"), options, weight)
            if block is not None:
                placed = _scaled(placed, model.shapes[weight], block)
            target = target.placed("tp", placed)
        target = _fully_sharded(model, mesh, target, placed, "efsdp" if expert else "fsdp")
    return target


def tensor_parallel(model: Model, size: int, options: Options, name: str) -> Placement:
    """What the model's plan does to a parameter on `size` ranks."""
    style = styles.style_of(name, model.tp)
    shape = model.shapes[name]
    if style is None:
        return Replicate()
    leaf = _leaf(name)
    vocabulary = style in styles.EMBEDDING or leaf in ("lm_head", "embed_out")
    placed = styles.placement(style, name, len(shape), options.vocab if vocabulary else "torch")
    if style in styles.ROWWISE and isinstance(placed, Replicate) and len(shape) == 1:
        return options.row_bias
    if isinstance(placed, Shard) and style in ("colwise", "rowwise") and _in_attention(name):
        return _by_heads(model, size, options, name, placed)
    return placed


def _leaf(name: str) -> str:
    """The last module of a parameter's name: `q_proj` of `self_attn.q_proj.weight`."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def _in_attention(name: str) -> bool:
    return not _ATTENTION.isdisjoint(name.split("."))


def _by_heads(model: Model, size: int, options: Options, name: str, placed: Shard) -> Shard | Heads:
    """Attention is cut between heads and never inside one: half a head attends to nothing."""
    heads, kv_heads, extent = model.heads, model.kv_heads, model.shapes[name][placed.dim]
    if not heads or not kv_heads:
        return placed
    own = kv_heads if _leaf(name) in _KEYS_AND_VALUES else heads
    if extent % own or (heads % size == 0 and kv_heads % size == 0):
        # Not made of heads, or made of as many on every rank.
        return placed
    if size % kv_heads == 0 and heads % size == 0:
        return Heads(placed.dim, own, extent // own) if own == kv_heads else placed
    if kv_heads >= size and heads % kv_heads == 0:
        if options.uneven_heads:
            # A rank has whole groups: heads, and the keys and values that they attend to.
            return replace(placed, uneven=Granular(extent // kv_heads))
        hint = "pass uneven_heads=True to give some ranks one more than others"
    else:
        hint = "choose a tp that divides the query heads, and divides or is divided by the others"
    text = (
        f"{name}: {heads} heads with {kv_heads} of keys and values do not divide by tp={size} "
        f"without cutting a head; {hint}"
    )
    raise _errors.usage(text, "HEADS", tensor=name, found=str(kv_heads), needed=str(size))


def _scaled(placed: Placement, shape: Sequence[int], block: Sequence[int]) -> Placement:
    """The scales of a weight that is placed so: those of every block that a rank has a part of."""
    if not isinstance(placed, Shard):
        if isinstance(placed, Replicate):
            return placed
        text = f"{placed} of a weight with scales per block has no rule: give rules of your own"
        raise _errors.make("Unsupported", text, code="SCALES")
    return Blocks(placed.dim, block[placed.dim], shape[placed.dim], placed.uneven)


def _expert(model: Model, size: int, options: Options, target: Target) -> tuple[Target, Placement]:
    """Whole experts per rank, in the order asked for."""
    name = target.name
    single = _EXPERT.search(name)
    if single:
        found = [one for one in map(_EXPERT.search, model.exprs) if one is not None]
        table = moe.table(1 + max(int(one[1]) for one in found), size, options.experts)
        return target, Owner(*(rank for rank, own in enumerate(table) if int(single[1]) in own))
    style = styles.style_of(name, model.ep)
    placed = styles.placement(style, name, len(model.shapes[name])) if style else Replicate()
    if not isinstance(placed, Shard) or target.expr is None:
        return target, placed
    count = model.shapes[name][placed.dim]
    expr, placed = moe.stacked(name, target.expr, placed.dim, count, size, options.experts)
    return replace(target, expr=expr), placed


def _fully_sharded(model: Model, mesh: Mesh, target: Target, inner: Placement, axis: str) -> Target:
    """FSDP cuts the first dimension of what the rank has; outside of another cut of it, that is
    a part of each of that cut's parts.
    """
    axis = "dp_shard" if axis == "fsdp" and "dp_shard" in mesh.names else axis
    shape = model.shapes[target.name]
    if _size(mesh, axis) == 1 or not shape:
        return target
    if isinstance(inner, Shard) and inner.dim == 0:
        groups = _size(mesh, "ep" if axis == "efsdp" else "tp")
        if inner.uneven != "torch" and shape[0] % groups:
            raise _no_fsdp(target, inner)
        return target.placed(axis, StridedShard(0, groups))
    if isinstance(inner, Heads) and inner.dim == 0 and inner.head_dim % _size(mesh, axis) == 0:
        # Each head is cut, then a rank has that part of the heads that are its own.
        part = Heads(0, inner.heads, inner.head_dim // _size(mesh, axis))
        return target.placed(axis, StridedShard(0, inner.heads)).placed("tp", part)
    on_rows = isinstance(inner, StridedShard | Segments | Heads | Blocks) and inner.dim == 0
    if on_rows or isinstance(inner, Owner):
        raise _no_fsdp(target, inner)
    return target.placed(axis, Shard(0))


def _no_fsdp(target: Target, inner: Placement) -> Exception:
    text = f"{target.name}: FSDP outside of {inner} has no rule: give a placement of your own"
    return _errors.make("Unsupported", text, code="FSDP", tensor=target.name)


#: A placement that a signature can have as its default.
_WHOLE = Replicate()


def request(
    catalog: Mapping[str, Any],
    mesh: Mesh,
    *,
    config: Any = None,
    model: Any = None,
    tp_plan: Mapping[str, str] | None = None,
    ep_plan: Mapping[str, str] | None = None,
    unread: targets.Unread | None = None,
    stages: pipelines.Cut = "hf",
    virtual: int = 1,
    renumber: bool = False,
    stage_of: Mapping[str, int] | None = None,
    experts: moe.Order = "linear",
    vocab: Uneven = "torch",
    row_bias: Placement = _WHOLE,
    uneven_heads: bool = False,
) -> targets.Request:
    """The request that places a model on a mesh as its own parallel plans say.

    Args:
        catalog: the checkpoint; anything that maps names to objects with `shape` and `dtype`.
        mesh: axes `pp`, `tp`, `ep`, `fsdp` (or `dp_shard`), `efsdp`; along `dp`, `dp_replicate`,
            `cp` and `sp` all ranks have the same.
        config: a path to a `config.json`, its contents, or a configuration of transformers.
            Default: the `config.json` beside the checkpoint.
        model: a model of transformers, on the meta device or not.
        tp_plan, ep_plan: styles that are added to the model's own, and replace those of the same
            name.
        unread: tensors of the checkpoint that may stay unread: patterns, `"allow"`, or `"error"`.
            Default: those that the model says it ignores.
        stages: `"hf"`, `"vllm"`, layers per stage, or lists of layers (`stages.owners`).
        virtual: chunks of layers per stage.
        renumber: whether a stage counts its layers from 0.
        stage_of: stages of tensors that the model's plan does not mention, by pattern.
        experts: `"linear"`, `"round_robin"`, or the experts of each rank; one that several ranks
            have is on all of them.
        vocab: what happens to a vocabulary that does not divide: `"torch"`, `PadTo(64)`, …
        row_bias: where the bias of a row-parallel layer goes: `Replicate()`, `OnlyRank(0, …)`.
        uneven_heads: whether ranks may differ in how many heads they have.

    Raises `UsageError` where no rule fits, with what to do about it.
    """
    from tonnage._rules import _found

    known = _found.described(catalog, config, model)
    known = replace(
        known, tp={**known.tp, **dict(tp_plan or {})}, ep={**known.ep, **dict(ep_plan or {})}
    )
    pipeline = pipelines.Pipeline(stages, virtual, renumber, dict(stage_of or {}))
    chosen = Options(pipeline, experts, vocab, row_bias, uneven_heads)
    made = place(known, mesh, chosen)
    allowed = unread
    if allowed is None:
        allowed = [targets.literal(name) for name in known.ignored] or "error"
    return targets.request(mesh, made, allowed, _repeated(known, mesh, chosen))


def _repeated(model: Model, mesh: Mesh, options: Options) -> targets.Unread:
    """Experts that several ranks have are read for each of them."""
    if _size(mesh, "ep") == 1 or isinstance(options.experts, str):
        return "error"
    listed = [one for owned in options.experts for one in owned]
    if len(listed) == len(set(listed)):
        return "error"
    copied = [name for name in model.exprs if styles.under(name, model.ep)]
    names = {one for name in copied for one in model.exprs[name].sources()}
    return [targets.literal(name) for name in sorted(names)]
