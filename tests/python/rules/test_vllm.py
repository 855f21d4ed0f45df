"""Mappings of the vLLM kind: parameters are what its own loaders would make."""

from __future__ import annotations

from typing import Any

import loading
import numpy as np
import pytest
import tonnage
from catalogs import Ref, catalog_of, random
from tonnage._rules import vllm

CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "hidden_size": 16}
LAYER = "model.layers.0"
STACKED: list[Any] = [
    # `orig_to_new_stacked` of a mapper.
    {
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".gate_proj": (".gate_up_proj", 0),
        ".up_proj": (".gate_up_proj", 1),
    },
    # `packed_modules_mapping` of a model.
    {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]},
    # `stacked_params_mapping` of an older one.
    [
        ("qkv_proj", "q_proj", "q"),
        ("qkv_proj", "k_proj", "k"),
        ("qkv_proj", "v_proj", "v"),
        ("gate_up_proj", "gate_proj", 0),
        ("gate_up_proj", "up_proj", 1),
    ],
]


def dense() -> dict[str, Any]:
    shapes = {
        "model.embed_tokens.weight": (100, 16),
        f"{LAYER}.self_attn.q_proj.weight": (32, 16),
        f"{LAYER}.self_attn.q_proj.bias": (32,),
        f"{LAYER}.self_attn.k_proj.weight": (8, 16),
        f"{LAYER}.self_attn.k_proj.bias": (8,),
        f"{LAYER}.self_attn.v_proj.weight": (8, 16),
        f"{LAYER}.self_attn.v_proj.bias": (8,),
        f"{LAYER}.self_attn.o_proj.weight": (16, 32),
        f"{LAYER}.mlp.gate_proj.weight": (24, 16),
        f"{LAYER}.mlp.up_proj.weight": (24, 16),
        f"{LAYER}.mlp.down_proj.weight": (16, 24),
        f"{LAYER}.input_layernorm.weight": (16,),
        "model.norm.weight": (16,),
        "lm_head.weight": (100, 16),
    }
    return random(**shapes)


def narrow(array: Any, dim: int, rank: int, size: int) -> Any:
    """What vLLM's loaders take of a tensor: `narrow(dim, rank * each, each)`."""
    each = array.shape[dim] // size
    return np.take(array, range(rank * each, (rank + 1) * each), dim)


@pytest.mark.parametrize("stacked", STACKED)
@pytest.mark.parametrize("tp", [2, 4])
def test_stacked_parameters_are_what_vllms_loaders_make(stacked: Any, tp: int) -> None:
    arrays = dense()
    request = vllm.request(
        catalog_of(arrays), tonnage.Mesh(tp=tp), stacked_params=stacked, config=CONFIG
    )
    for rank in range(tp):
        found = loading.load(request, arrays, rank)
        for end in ("weight", "bias"):
            q, k, v = (arrays[f"{LAYER}.self_attn.{one}_proj.{end}"] for one in "qkv")
            # Heads of keys and values are fewer than four ranks: two ranks have the same one.
            copies = max(1, tp // 2)
            kv_rank, kv_size = rank // copies, tp // copies
            parts = [narrow(q, 0, rank, tp)]
            parts += [narrow(one, 0, kv_rank, kv_size) for one in (k, v)]
            assert np.array_equal(found[f"{LAYER}.self_attn.qkv_proj.{end}"], np.concatenate(parts))
        gate, up = (arrays[f"{LAYER}.mlp.{one}_proj.weight"] for one in ("gate", "up"))
        wanted = np.concatenate([narrow(gate, 0, rank, tp), narrow(up, 0, rank, tp)])
        assert np.array_equal(found[f"{LAYER}.mlp.gate_up_proj.weight"], wanted)
        down = narrow(arrays[f"{LAYER}.mlp.down_proj.weight"], 1, rank, tp)
        assert np.array_equal(found[f"{LAYER}.mlp.down_proj.weight"], down)
        padded = np.pad(arrays["lm_head.weight"], [(0, 28), (0, 0)])
        assert np.array_equal(found["lm_head.weight"], narrow(padded, 0, rank, tp))
        assert np.array_equal(found["model.norm.weight"], arrays["model.norm.weight"])


def test_parameters_that_are_stored_fused_are_cut_part_by_part() -> None:
    arrays = dense()
    q, k, v = (arrays.pop(f"{LAYER}.self_attn.{one}_proj.weight") for one in "qkv")
    for one in "qkv":
        del arrays[f"{LAYER}.self_attn.{one}_proj.bias"]
    gate, up = (arrays.pop(f"{LAYER}.mlp.{one}_proj.weight") for one in ("gate", "up"))
    arrays[f"{LAYER}.self_attn.qkv_proj.weight"] = np.concatenate([q, k, v])
    arrays[f"{LAYER}.mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
    request = vllm.request(catalog_of(arrays), tonnage.Mesh(tp=2), config=CONFIG)
    for rank in range(2):
        found = loading.load(request, arrays, rank)
        wanted = np.concatenate([narrow(one, 0, rank, 2) for one in (q, k, v)])
        assert np.array_equal(found[f"{LAYER}.self_attn.qkv_proj.weight"], wanted)
        wanted = np.concatenate([narrow(one, 0, rank, 2) for one in (gate, up)])
        assert np.array_equal(found[f"{LAYER}.mlp.gate_up_proj.weight"], wanted)


def expert_params(count: int) -> list[tuple[str, str, int, str]]:
    """What `make_expert_params_mapping("gate_proj", "down_proj", "up_proj", count)` gives."""
    names = [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")]
    return [
        (
            "experts.w13_" if part in ("w1", "w3") else "experts.w2_",
            f"experts.{expert}.{name}.",
            expert,
            part,
        )
        for expert in range(count)
        for part, name in names
    ]


@pytest.mark.parametrize("axis", ["tp", "ep"])
def test_experts_are_what_vllms_loaders_make(axis: str) -> None:
    where = f"{LAYER}.mlp.experts"
    shapes: dict[str, tuple[int, ...]] = {f"{LAYER}.mlp.gate.weight": (4, 16)}
    for expert in range(4):
        shapes[f"{where}.{expert}.gate_proj.weight"] = (12, 16)
        shapes[f"{where}.{expert}.up_proj.weight"] = (12, 16)
        shapes[f"{where}.{expert}.down_proj.weight"] = (16, 12)
    arrays = random(**shapes)
    request = vllm.request(
        catalog_of(arrays),
        tonnage.Mesh({axis: 2}),
        stacked_params=STACKED[0],
        expert_params=expert_params(4),
        config=CONFIG,
        experts="round_robin",
    )
    for rank in range(2):
        found = loading.load(request, arrays, rank)
        owned = range(4) if axis == "tp" else range(rank, 4, 2)
        size, at = (2, rank) if axis == "tp" else (1, 0)
        w13, w2 = [], []
        for expert in owned:
            gate, up, down = (
                arrays[f"{where}.{expert}.{one}_proj.weight"] for one in ("gate", "up", "down")
            )
            w13.append(np.concatenate([narrow(gate, 0, at, size), narrow(up, 0, at, size)]))
            w2.append(narrow(down, 1, at, size))
        assert np.array_equal(found[f"{where}.w13_weight"], np.stack(w13))
        assert np.array_equal(found[f"{where}.w2_weight"], np.stack(w2))


def test_pipeline_stages_as_vllm_cuts_them() -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 4)}
    shapes |= {f"model.layers.{at}.input_layernorm.weight": (4,) for at in range(7)}
    shapes["model.norm.weight"] = (4,)
    config = {**CONFIG, "tie_word_embeddings": True}
    request = vllm.request(catalog_of(random(**shapes)), tonnage.Mesh(pp=3), config=config)
    owners = {one["name"]: one["place"]["pp"]["owner"] for one in request["targets"]}
    stages = [owners[f"model.layers.{at}.input_layernorm.weight"] for at in range(7)]
    assert stages == [[0], [0], [1], [1], [1], [2], [2]]
    assert owners["model.embed_tokens.weight"] == [0]
    assert owners["lm_head.weight"] == [2]


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"model.layers.0.mixer.in_proj.weight": (8, 4)}, {}, "nothing says how .*in_proj"),
        ({f"{LAYER}.mlp.up_proj.weight_scale": (24,)}, {}, "quantised"),
        ({}, {"stacked_params": {"x": ["y"], "z": [("a", "b")]}}, "is no name of a module"),
        ({}, {"stacked_params": {"gate_up_proj": ["gate_proj", "x_proj"]}}, r"lacks parts \[1\]"),
        (
            {},
            {"stacked_params": {"qkv_proj": ["q_proj", "o_proj", "k_proj", "x_proj"]}},
            "lacks parts",
        ),
        ({}, {"shapes": {"model.norm.weight": (8,)}}, r"\[8\] on each rank, and its rule gives"),
        ({}, {"shapes": {"model.nom.weight": (8,)}}, "nothing of the checkpoint makes"),
        ({}, {"stacked_params": [("qkv_proj", "q_proj", "query")]}, "parts are 'q', 'k', 'v'"),
    ],
)
def test_what_no_rule_fits_is_refused(
    change: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    catalog = {**catalog_of(dense()), **{name: Ref(shape) for name, shape in change.items()}}
    with pytest.raises(tonnage.TonnageError, match=says):
        vllm.request(catalog, tonnage.Mesh(tp=2), config=CONFIG, **options)


def test_rules_of_ones_own_come_first_and_shapes_are_checked() -> None:
    catalog = {**catalog_of(dense()), "model.layers.0.mixer.in_proj.weight": Ref((8, 4))}
    request = vllm.request(
        catalog,
        tonnage.Mesh(tp=2),
        stacked_params=STACKED[1],
        config=CONFIG,
        rules={"*.in_proj.weight": tonnage.Shard(0)},
        shapes={
            "model.layers.0.mixer.in_proj.weight": (4, 4),
            f"{LAYER}.self_attn.qkv_proj.weight": (24, 16),
            f"{LAYER}.mlp.gate_up_proj.weight": (24, 16),
            f"{LAYER}.mlp.down_proj.weight": (16, 12),
            "lm_head.weight": (64, 16),
        },
    )
    place = {one["name"]: one["place"] for one in request["targets"]}
    assert place["model.layers.0.mixer.in_proj.weight"] == {"tp": tonnage.Shard(0).to_json()}
