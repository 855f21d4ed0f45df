"""Rules from mappings of the vLLM kind: which stored tensors fuse into which parameter.

All their shapes are taken: `orig_to_new_stacked` of a `WeightsMapper`, `packed_modules_mapping` of
a model, `stacked_params_mapping` of an older one, and what `make_expert_params_mapping` gives. The
fused parameter of a rank is its part of each stored tensor, one behind the other; heads of keys and
values that are fewer than the ranks lie on several of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from tonnage import _errors
from tonnage._expr import Concat, Expr, Source, Stack
from tonnage._native import _matches
from tonnage._placements import Heads, Mesh, PadTo, Placement, Replicate, Segments, Shard
from tonnage._rules import _found, targets
from tonnage._rules import experts as moe
from tonnage._rules import stages as pipelines
from tonnage._rules.targets import Target

#: Parameters and what fuses into them, in any of the shapes that vLLM has for it.
Stacked = Mapping[str, Any] | Iterable[tuple[str, str, Any]]
#: `(parameter, stored, expert, "w1" | "w2" | "w3")`.
Experts = Iterable[tuple[str, str, int, str]]

#: The place of a tensor that is a parameter by itself.
_STORED = -1
_PARTS = {"q": 0, "k": 1, "v": 2, "w1": 0, "w3": 1, "w2": 0}
_KEYS = frozenset(("k_proj", "v_proj"))
_MERGED = frozenset(("gate_up_proj",))
_COLUMNS = frozenset(("q_proj", "gate_proj", "up_proj", "fc1", "c_fc", "q_b_proj", "kv_b_proj"))
_ROWS = frozenset(("o_proj", "out_proj", "down_proj", "fc2", "c_proj", "dense_4h_to_h", "wo"))
_VOCABULARY = frozenset(("embed_tokens", "lm_head", "wte", "word_embeddings"))
_WHOLE = frozenset(("gate", "router", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa"))
_QUANTISED = ("scale", "scales", "scale_inv", "qweight", "qzeros", "zeros", "g_idx", "absmax")
_EXPERT = re.compile(r"[a-z_]*experts?\.\d+\.\w+\.")


@dataclass
class _Parameter:
    """A parameter of the runtime, while it is put together."""

    #: By position, the stored tensors that lie one behind the other.
    parts: dict[int, Expr] = field(default_factory=dict)
    #: By expert, the same.
    experts: dict[int, dict[int, Expr]] = field(default_factory=dict)


def stacked(given: Stacked) -> dict[str, tuple[str, int]]:
    """For each stored module its parameter's and its place in it, from any of the shapes.

    Raises `UsageError` for something else.
    """
    rows: list[tuple[Any, Any, Any]] = []
    if isinstance(given, Mapping):
        for key, value in given.items():
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
                rows.append((value[0], key, value[1]))
            else:
                rows.extend((key, one, at) for at, one in enumerate(value))
    else:
        rows.extend(given)
    made = {}
    for parameter, stored, part in rows:
        if not isinstance(stored, str) or not isinstance(parameter, str):
            text = f"{stored!r} of {parameter!r} is no name of a module"
            raise _errors.usage(text, "STACKED", found=repr(stored))
        at = _PARTS.get(part, part)
        if isinstance(at, bool) or not isinstance(at, int):
            text = f"{stored} is part {part!r} of {parameter}: parts are 'q', 'k', 'v' or numbers"
            raise _errors.usage(text, "STACKED", found=str(part))
        made[stored.strip(".")] = (parameter.strip("."), at)
    return made


def request(
    catalog: Mapping[str, Any],
    mesh: Mesh,
    *,
    stacked_params: Stacked = (),
    expert_params: Experts = (),
    prefixes: Mapping[str, str] | None = None,
    config: Any = None,
    rules: Mapping[str, Placement] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    vocab_padding: int = 64,
    experts: moe.Order = "linear",
    stages: pipelines.Cut = "vllm",
    unread: targets.Unread = "error",
) -> targets.Request:
    """The request for the parameters of a vLLM-like runtime.

    Args:
        catalog: the checkpoint.
        mesh: axes `pp`, `tp`, `ep`; with `ep`, experts are whole and on its ranks.
        stacked_params: see `stacked`.
        expert_params: as `make_expert_params_mapping` gives it.
        prefixes: prefixes of stored names, and what the runtime has for them.
        config: where the numbers of heads are said; as for `hf.request`.
        rules: for parameters by pattern, what tensor parallelism does to them, before all else.
        shapes: the shapes that a rank's parameters have; a plan that gives others is refused.
        vocab_padding: rows of embeddings are padded to a multiple of it, and of `tp`.
        experts: as for `hf.request`.
        stages: as for `hf.request`.
        unread: tensors of the checkpoint that may stay unread.

    Raises `UsageError` for a parameter that nothing says how to place.
    """
    about = _found.as_dict(config if config is not None else _found.beside(catalog))
    made = _parameters(catalog, stacked(stacked_params), list(expert_params), prefixes or {})
    if about.get("tie_word_embeddings") and "lm_head.weight" not in made:
        made["lm_head.weight"] = made["model.embed_tokens.weight"]
    placing = _Placing(catalog, mesh, about, dict(rules or {}), vocab_padding, experts)
    done = [placing.target(name, one) for name, one in made.items()]
    if "pp" in mesh.names and mesh.extent("pp") > 1:
        ends = pipelines.Ends(
            ("model.embed_tokens",), "model.layers", ("model.norm", "lm_head"), "the checkpoint"
        )
        cut = pipelines.Stages(made, ends, mesh.extent("pp"), pipelines.Pipeline(stages))
        done = [cut.placed(one) for one in done]
    for name, shape in (shapes or {}).items():
        placing.check(name, shape, next((one for one in done if one.name == name), None))
    return targets.request(mesh, done, unread)


def _parameters(
    catalog: Mapping[str, Any],
    fused: Mapping[str, tuple[str, int]],
    rows: Sequence[tuple[str, str, int, str]],
    prefixes: Mapping[str, str],
) -> dict[str, _Parameter]:
    """The runtime's parameters, in the order of their first stored tensors."""
    of_expert = {stored: (parameter, at, part) for parameter, stored, at, part in rows}
    made: dict[str, _Parameter] = {}
    for stored in catalog:
        name = stored
        for old, new in prefixes.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        found = _EXPERT.search(name)
        row = of_expert.get(found[0]) if found else None
        if found is not None and row is not None:
            target = name.replace(found[0], row[0], 1)
            experts = made.setdefault(target, _Parameter()).experts
            experts.setdefault(row[1], {})[_PARTS[row[2]]] = Source(stored)
            continue
        target, at = _fused(name, fused)
        parts = made.setdefault(target, _Parameter()).parts
        if at in parts:
            text = f"{target}: the checkpoint has part {at} of it twice"
            raise _errors.usage(text, "STACKED", tensor=target)
        parts[at] = Source(stored)
    _check_whole(made, fused)
    return made


def _fused(name: str, fused: Mapping[str, tuple[str, int]]) -> tuple[str, int]:
    modules = name.split(".")
    for at, module in enumerate(modules):
        row = fused.get(module)
        if row is not None:
            return ".".join([*modules[:at], row[0], *modules[at + 1 :]]), row[1]
    # As it is stored, whatever it is made of.
    return name, _STORED


def _check_whole(made: Mapping[str, _Parameter], fused: Mapping[str, tuple[str, int]]) -> None:
    """Every part of a fused parameter must be there: its rows have no other place."""
    needed: dict[str, set[int]] = {}
    for parameter, at in fused.values():
        needed.setdefault(parameter, set()).add(at)
    for name, one in made.items():
        wanted = needed.get(_leaf(name), set())
        if one.parts.keys() - {_STORED} and one.parts.keys() != wanted:
            lacks = sorted(wanted - one.parts.keys())
            text = f"{name}: the checkpoint lacks parts {lacks}, or has others"
            raise _errors.usage(text, "MISSING", tensor=name)
        counts = {len(parts) for parts in one.experts.values()}
        if one.experts and (
            len(counts) > 1 or sorted(one.experts) != list(range(len(one.experts)))
        ):
            raise _errors.usage(f"{name}: the checkpoint lacks some of its experts", "MISSING")


def _leaf(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else parts[0]


class _Placing:
    """What each parameter is made of, and where it goes."""

    def __init__(
        self,
        catalog: Mapping[str, Any],
        mesh: Mesh,
        about: Mapping[str, Any],
        rules: Mapping[str, Placement],
        padding: int,
        order: moe.Order,
    ) -> None:
        text = about.get("text_config")
        self._about = {**about, **text} if isinstance(text, Mapping) else about
        self._catalog = catalog
        self._rules = rules
        self._order = order
        self._tp = mesh.extent("tp") if "tp" in mesh.names else 1
        self._ep = mesh.extent("ep") if "ep" in mesh.names else 1
        self._padding = lcm(padding, self._tp)

    def target(self, name: str, one: _Parameter) -> Target:
        """A parameter, placed."""
        if one.experts:
            return self._experts(name, one)
        parts = [one.parts[at] for at in sorted(one.parts)]
        sizes = [self._shape(part) for part in parts]
        expr = parts[0] if len(parts) == 1 else Concat(tuple(parts), 0)
        target = Target(name, expr)
        if self._tp == 1:
            return target
        return target.placed("tp", self._given(name) or self._linear(name, sizes))

    def _shape(self, expr: Expr) -> tuple[int, ...]:
        return expr.shape({one: self._catalog[one].shape for one in expr.sources()})

    def _given(self, name: str) -> Placement | None:
        return next((one for like, one in self._rules.items() if _matches(like, name)), None)

    def _number(self, name: str) -> int:
        found = self._about.get(name)
        if isinstance(found, int) and not isinstance(found, bool):
            return found
        raise _errors.usage(f"the configuration does not say {name}", "CONFIG", needed=name)

    def _heads(self) -> tuple[int, int, int]:
        heads = self._number("num_attention_heads")
        kv = self._number("num_key_value_heads") if "num_key_value_heads" in self._about else heads
        width = self._about.get("head_dim") or self._number("hidden_size") // heads
        return heads, kv, int(width)

    def _linear(self, name: str, parts: Sequence[tuple[int, ...]]) -> Placement:
        leaf, ndim = _leaf(name), len(parts[0])
        if name.endswith(_QUANTISED):
            text = f"{name} belongs to a quantised tensor: say in rules= how it is cut"
            raise _errors.make("Unsupported", text, code="QUANTISED", tensor=name)
        if leaf == "qkv_proj":
            heads, kv, width = self._heads()
            keys = Heads(0, kv, width)
            return Segments(
                [heads * width, kv * width, kv * width], 0, [Shard(0, "error"), keys, keys]
            )
        if leaf in _KEYS:
            _, kv, width = self._heads()
            return Heads(0, kv, width)
        if len(parts) > 1:
            return Segments([one[0] for one in parts], 0, Shard(0, "error"))
        if leaf in _MERGED:
            half = parts[0][0] // 2
            return Segments([half, parts[0][0] - half], 0, Shard(0, "error"))
        if leaf in _VOCABULARY:
            return Shard(0, PadTo(self._padding))
        if leaf in _COLUMNS:
            return Shard(0, "error")
        if leaf in _ROWS and ndim > 1:
            return Shard(1, "error")
        if leaf in _WHOLE or ndim < 2:
            return Replicate()
        text = f"nothing says how tensor parallelism cuts {name}: give rules={{pattern: placement}}"
        raise _errors.usage(text, "NO_RULE", tensor=name)

    def _experts(self, name: str, one: _Parameter) -> Target:
        made = []
        for expert in sorted(one.experts):
            parts = tuple(one.experts[expert][at] for at in sorted(one.experts[expert]))
            joined = Stack if len(parts) > 1 and not self._shape(parts[0]) else Concat
            made.append(parts[0] if len(parts) == 1 else joined(parts, 0))
        expr: Expr = Stack(tuple(made), 0)
        shape = self._shape(expr)
        if self._ep > 1:
            expr, placed = moe.stacked(name, expr, 0, shape[0], self._ep, self._order)
            return Target(name, expr, {"ep": placed})
        target = Target(name, expr)
        if self._tp == 1:
            return target
        return target.placed("tp", self._given(name) or self._inner(name, one, shape))

    def _inner(self, name: str, one: _Parameter, shape: Sequence[int]) -> Placement:
        """Tensor parallelism inside of experts."""
        if any(f"_{word}" in name for word in _QUANTISED):
            text = f"{name} belongs to a quantised tensor: say in rules= how it is cut"
            raise _errors.make("Unsupported", text, code="QUANTISED", tensor=name)
        parts = [self._shape(part)[0] for _, part in sorted(one.experts[0].items())]
        if len(parts) > 1:
            return Segments(parts, 1, Shard(1, "error"))
        return Shard(2, "error") if len(shape) > 2 else Replicate()

    def check(self, name: str, wanted: Sequence[int], target: Target | None) -> None:
        """Holds a parameter to the shape that the runtime has for it on every rank."""
        if target is None or target.expr is None:
            raise _errors.usage(f"nothing of the checkpoint makes {name}", "MISSING", tensor=name)
        shape = list(self._shape(target.expr))
        for axis, size in (("tp", self._tp), ("ep", self._ep)):
            shape = _extents(shape, target.place.get(axis, Replicate()), size)
        if shape != list(wanted):
            text = f"{name} is {list(wanted)} on each rank, and its rule gives {shape}"
            found, needed = str(shape), str(list(wanted))
            raise _errors.usage(text, "SHAPE", tensor=name, found=found, needed=needed)


def _extents(shape: list[int], placed: Placement, size: int) -> list[int]:
    """The shape of the first rank's part."""
    made = list(shape)
    if isinstance(placed, Shard):
        extent = made[placed.dim]
        if isinstance(placed.uneven, PadTo):
            extent += -extent % placed.uneven.multiple
        made[placed.dim] = -(-extent // size)
    elif isinstance(placed, Heads):
        made[placed.dim] = max(1, placed.heads // size) * placed.head_dim
    elif isinstance(placed, Segments):
        parts = [
            _extents(_with(shape, placed.dim, extent), one, size)[placed.dim]
            for extent, one in zip(placed.sizes, placed.each, strict=True)
        ]
        made[placed.dim] = sum(parts)
    return made


def _with(shape: Sequence[int], dim: int, extent: int) -> list[int]:
    return [extent if at == dim else one for at, one in enumerate(shape)]
