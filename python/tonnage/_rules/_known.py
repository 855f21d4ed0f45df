"""What we know of the main kinds of models without transformers: their plans, by `model_type`.

The names are those of the tensors in published checkpoints, and of the models of transformers,
which stack the experts of a layer into one tensor; a test holds both ways to the same request.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tonnage import _errors
from tonnage._expr import Concat, Expr, Source, Stack
from tonnage._rules import hf

_LAYER = "model.layers.*"
_ENDS = {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
_ATTENTION = {
    f"{_LAYER}.self_attn.q_proj": "colwise",
    f"{_LAYER}.self_attn.k_proj": "colwise",
    f"{_LAYER}.self_attn.v_proj": "colwise",
    f"{_LAYER}.self_attn.o_proj": "rowwise",
}
_EXPERTS = f"{_LAYER}.mlp.experts"
_STACKED = {f"{_EXPERTS}.gate_up_proj": "packed_colwise", f"{_EXPERTS}.down_proj": "rowwise"}
_SINGLE = {
    f"{_EXPERTS}.*.gate_proj": "colwise",
    f"{_EXPERTS}.*.up_proj": "colwise",
    f"{_EXPERTS}.*.down_proj": "rowwise",
}


def _mlp(under: str) -> dict[str, str]:
    """A gated network, cut between its inner features."""
    return {
        f"{_LAYER}.{under}.gate_proj": "colwise",
        f"{_LAYER}.{under}.up_proj": "colwise",
        f"{_LAYER}.{under}.down_proj": "rowwise",
    }


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    tp: Mapping[str, str]
    #: Parameters of the stacked experts, for expert parallelism; empty for a model without.
    experts: tuple[str, ...] = ()
    #: How a layer names an expert's gate, up and down projections, where it stores them apart.
    apart: tuple[str, str, str] | None = None
    #: Parts of names that differ in the model: what is stored, and what the model has.
    renamed: tuple[tuple[str, str], ...] = ()
    #: Names that hold no parameters.
    buffers: tuple[str, ...] = ()
    #: What a configuration says where it says nothing.
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GATED = ("gate_proj", "up_proj", "down_proj")
_TWO = ("gate_up_proj", "down_proj")
_DENSE = Kind({**_ENDS, **_ATTENTION, **_mlp("mlp")})
_FUSED = Kind(
    {
        **_ENDS,
        f"{_LAYER}.self_attn.qkv_proj": "colwise_gather_output",
        f"{_LAYER}.self_attn.o_proj": "rowwise_split_input",
        f"{_LAYER}.mlp.gate_up_proj": "colwise_gather_output",
        f"{_LAYER}.mlp.down_proj": "rowwise_split_input",
    }
)
_MIXTRAL = Kind(
    {
        **_ENDS,
        **_ATTENTION,
        **_STACKED,
        f"{_EXPERTS}.*.w1": "colwise",
        f"{_EXPERTS}.*.w3": "colwise",
        f"{_EXPERTS}.*.w2": "rowwise",
    },
    experts=_TWO,
    apart=("w1", "w3", "w2"),
    renamed=((".block_sparse_moe.", ".mlp."),),
)
_QWEN_MOE = Kind(
    {**_ENDS, **_ATTENTION, **_mlp("mlp"), **_STACKED, **_SINGLE}, experts=_TWO, apart=_GATED
)
_SHARED = _mlp("mlp.shared_expert")
_DEEPSEEK = Kind(
    {**_ENDS, **_mlp("mlp"), **_mlp("mlp.shared_experts"), **_STACKED, **_SINGLE},
    experts=_TWO,
    apart=_GATED,
    buffers=("e_score_correction_bias",),
)
_FORMS = ("", "_bias", "_blocks", "_scales")
_GPT_OSS = Kind(_ENDS, experts=tuple(f"{one}{form}" for one in _TWO for form in _FORMS))
_TIED = {"tie_word_embeddings": True}

KINDS: dict[str, Kind] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma": Kind(_DENSE.tp, defaults=_TIED),
    "gemma2": Kind(_DENSE.tp, defaults=_TIED),
    "phi3": _FUSED,
    "mixtral": _MIXTRAL,
    "qwen2_moe": Kind({**_QWEN_MOE.tp, **_SHARED}, experts=_TWO, apart=_GATED),
    "qwen3_moe": _QWEN_MOE,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": _GPT_OSS,
}


def described(catalog: Mapping[str, Any], config: Mapping[str, Any]) -> hf.Model:
    """A model by its configuration, and how a checkpoint becomes its tensors.

    Raises `UsageError` for a kind that the table lacks.
    """
    name = config.get("model_type")
    kind = KINDS.get(str(name))
    if kind is None:
        known = ", ".join(sorted(KINDS))
        text = (
            f"model_type {name!r} is not one that Tonnage knows by itself ({known}): install "
            "transformers, give tp_plan= with model=, or rules={pattern: placement}"
        )
        raise _errors.usage(text, "MODEL_TYPE", found=str(name))
    quantised = config.get("quantization_config")
    block = _block(quantised) if quantised is not None else None
    if quantised is not None and block is None and name != "gpt_oss":
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        text = f"no rule cuts tensors quantised by {method!r}: give rules={{pattern: placement}}"
        raise _errors.make("Unsupported", text, code="QUANTISED", found=str(method))
    exprs = _exprs(catalog, kind, stack=quantised is None)
    shapes = {one: _shape(expr, catalog) for one, expr in exprs.items()}
    if config.get("tie_word_embeddings", kind.defaults.get("tie_word_embeddings", False)):
        _tie(exprs, shapes)
    last = _number(config, "num_hidden_layers")
    beyond = _beyond(exprs, last) if name == "deepseek_v3" else []
    for one in beyond:
        del exprs[one]
    return hf.Model(
        exprs=exprs,
        shapes=shapes,
        buffers=frozenset(one for one in exprs if one.rpartition(".")[2] in kind.buffers),
        tp=dict(kind.tp),
        ep=dict.fromkeys((f"{_EXPERTS}.{one}" for one in kind.experts), "grouped_gemm")
        | ({_EXPERTS: "ep_dispatch_experts"} if kind.experts else {}),
        first=("model.embed_tokens",),
        layers="model.layers",
        last=("model.norm", "lm_head"),
        heads=_number(config, "num_attention_heads"),
        kv_heads=_number(config, "num_key_value_heads") or _number(config, "num_attention_heads"),
        label=f"model_type {name!r}",
        unexpected=tuple(beyond),
        ignored=tuple(beyond),
        scales=_scales(exprs, block) if block else {},
    )


def _number(config: Mapping[str, Any], name: str) -> int | None:
    found = config.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _shape(expr: Expr, catalog: Mapping[str, Any]) -> tuple[int, ...]:
    return expr.shape({name: catalog[name].shape for name in expr.sources()})


def _exprs(catalog: Mapping[str, Any], kind: Kind, *, stack: bool) -> dict[str, Expr]:
    """The model's tensors: experts that are stored apart in one, unless they are quantised."""
    made: dict[str, Expr] = {}
    parts = kind.apart or () if stack else ()
    apart: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    pattern = re.compile(r"(.*\.experts)\.(\d{1,6})\.([a-z0-9_]+)\.weight")
    for name in catalog:
        target = name
        for stored, ours in kind.renamed:
            target = target.replace(stored, ours)
        found = pattern.fullmatch(target)
        if found and found[3] in parts:
            apart[found[1]][int(found[2])][found[3]] = name
            if f"{found[1]}.down_proj" not in made:
                # The place of the first decides the order.
                made[f"{found[1]}.gate_up_proj"] = made[f"{found[1]}.down_proj"] = Source(name)
        else:
            made[target] = Source(name)
    for where, experts in apart.items():
        gate, up, down = (_stack(where, experts, one) for one in parts)
        made[f"{where}.gate_up_proj"] = Concat((gate, up), 1)
        made[f"{where}.down_proj"] = down
    return made


def _stack(where: str, experts: Mapping[int, Mapping[str, str]], part: str) -> Expr:
    names = []
    for at in range(len(experts)):
        name = experts.get(at, {}).get(part)
        if name is None:
            text = f"{where} has {len(experts)} experts, and no {part} of expert {at}"
            raise _errors.usage(text, "MISSING", tensor=f"{where}.{at}.{part}.weight")
        names.append(name)
    return Stack(tuple(Source(name) for name in names), 0)


def _tie(exprs: dict[str, Expr], shapes: dict[str, tuple[int, ...]]) -> None:
    """One tensor under two names, of which a checkpoint may have one."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for name, other in (names, names[::-1]):
        if name not in exprs and other in exprs:
            exprs[name], shapes[name] = exprs[other], shapes[other]


def _beyond(exprs: Mapping[str, Expr], layers: int | None) -> list[str]:
    """Layers after the last: they predict further tokens and are no part of the model."""
    pattern = re.compile(r"model\.layers\.(\d{1,6})\.")
    return [
        name
        for name in exprs
        if layers is not None and (found := pattern.match(name)) and int(found[1]) >= layers
    ]


def _block(quantised: Any) -> tuple[int, ...] | None:
    """The extents of a block that has one scale, for the scheme whose scales we can place."""
    if not isinstance(quantised, Mapping) or quantised.get("quant_method") != "fp8":
        return None
    found = quantised.get("weight_block_size")
    if not isinstance(found, list) or len(found) != 2:
        return None
    return tuple(found) if all(isinstance(one, int) and one > 0 for one in found) else None


def _scales(
    exprs: Mapping[str, Expr], block: tuple[int, ...]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for name in exprs:
        weight = name.removesuffix("_scale_inv")
        if weight != name and weight in exprs:
            found[name] = (weight, block)
    return found
