"""`rules="auto"`: what a model's plans become, and what is refused, with and without transformers.

What ranks then have is the oracle's part (`test_oracle.py`); here it is the choices and the edges.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import loading
import models
import numpy as np
import pytest
import tonnage
from catalogs import Ref
from tonnage._rules import _known, hf, stages


def place_of(request: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one["place"] for one in request["targets"] if one["name"] == name)
    return dict(found)


def by_name(request: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one for one in request["targets"]}


@pytest.mark.parametrize(
    ("model", "layout"), [case for case in models.MEANT if models.MODELS[case[0]][0] != "hrm_text"]
)
def test_our_table_says_what_transformers_says(folder: Path, model: str, layout: str) -> None:
    checkpoint = tonnage.open(folder / model)
    config = json.loads((folder / model / "config.json").read_text())
    mesh = models.LAYOUTS[layout].mesh
    theirs = hf.request(checkpoint, mesh)
    ours = hf.place(_known.described(checkpoint, config), mesh, hf.Options())
    found = {one.name: one.to_json(mesh.names) for one in ours}
    assert found == by_name(theirs)


def test_without_transformers_the_table_is_used(folder: Path) -> None:
    # Neither torch nor transformers is imported for it.
    code = """
import importlib.util, json, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else real(name, *rest)
import tonnage
from tonnage._rules import hf
request = hf.request(tonnage.open(sys.argv[1]), tonnage.Mesh(tp=2))
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps(request))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "mixtral")],
        capture_output=True,
        text=True,
        check=True,
    )
    with_transformers = hf.request(tonnage.open(folder / "mixtral"), tonnage.Mesh(tp=2))
    assert by_name(json.loads(done.stdout)) == by_name(with_transformers)


def test_a_kind_of_model_that_nobody_knows_is_an_error_that_helps(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "llama")
    with pytest.raises(tonnage.UsageError, match=r"'novel'.*install transformers") as refused:
        hf.request(checkpoint, tonnage.Mesh(tp=2), config={"model_type": "novel"})
    assert refused.value.code == "MODEL_TYPE"


def test_no_configuration_is_an_error_that_helps(tmp_path: Path) -> None:
    tonnage.save({"w": np.zeros(4, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(tonnage.UsageError, match=r"no config.json beside"):
        hf.request(tonnage.open(tmp_path / "w.safetensors"), tonnage.Mesh(tp=2))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":' * 2000])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    tonnage.save({"w": np.zeros(4, np.float32)}, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(tonnage.FormatError, match="is no configuration"):
        hf.request(tonnage.open(tmp_path), tonnage.Mesh(tp=2))


def test_the_model_itself_may_be_given(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = tonnage.open(folder / "qwen3_moe")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config("qwen3_moe"))
    mesh = tonnage.Mesh(tp=2)
    assert hf.request(checkpoint, mesh, model=model) == hf.request(checkpoint, mesh)


def test_a_module_without_a_plan_is_refused() -> None:
    import torch

    with pytest.raises(tonnage.UsageError, match="Linear is no model of transformers"):
        hf.request({}, tonnage.Mesh(tp=2), model=torch.nn.Linear(2, 2))


def test_a_model_of_another_size_is_refused(folder: Path) -> None:
    config = json.loads((folder / "llama" / "config.json").read_text())
    wrong = {**config, "intermediate_size": 95}
    with pytest.raises(
        tonnage.UsageError, match=r"gives \[64, 96\] and the model wants \[64, 95\]"
    ):
        hf.request(tonnage.open(folder / "llama"), tonnage.Mesh(tp=2), config=wrong)


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "llama")
    partial = {name: checkpoint[name] for name in checkpoint if "layers.1.mlp.up" not in name}
    config = folder / "llama" / "config.json"
    with pytest.raises(tonnage.UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        hf.request(partial, tonnage.Mesh(tp=2), config=config)


# ---- grouped queries ---------------------------------------------------------------------------


def test_heads_that_are_fewer_than_ranks_are_copied_whole(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "llama")
    request = hf.request(checkpoint, tonnage.Mesh(tp=4))
    key = "model.layers.0.self_attn.k_proj.weight"
    assert place_of(request, key) == {"tp": tonnage.Heads(0, 2, 16).to_json()}
    assert place_of(request, key.replace("k_proj", "q_proj")) == {"tp": tonnage.Shard(0).to_json()}
    arrays = checkpoint.load(framework="numpy")
    for rank in range(4):
        found = loading.load(request, arrays, rank)[key]
        assert np.array_equal(found, arrays[key][rank // 2 * 16 : (rank // 2 + 1) * 16])


def _llama(heads: int, kv: int, width: int = 4) -> tuple[dict[str, Ref], dict[str, Any]]:
    """A one-layer checkpoint with these heads."""
    hidden, layer = heads * 4, "model.layers.0"
    catalog = {
        "model.embed_tokens.weight": Ref((32, hidden)),
        f"{layer}.self_attn.q_proj.weight": Ref((heads * width, hidden)),
        f"{layer}.self_attn.k_proj.weight": Ref((kv * width, hidden)),
        f"{layer}.self_attn.v_proj.weight": Ref((kv * width, hidden)),
        f"{layer}.self_attn.o_proj.weight": Ref((hidden, heads * width)),
        f"{layer}.mlp.gate_proj.weight": Ref((24, hidden)),
        f"{layer}.mlp.up_proj.weight": Ref((24, hidden)),
        f"{layer}.mlp.down_proj.weight": Ref((hidden, 24)),
        f"{layer}.input_layernorm.weight": Ref((hidden,)),
        f"{layer}.post_attention_layernorm.weight": Ref((hidden,)),
        "model.norm.weight": Ref((hidden,)),
        "lm_head.weight": Ref((32, hidden)),
    }
    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv}
    numbers = {"hidden_size": hidden, "intermediate_size": 24, "head_dim": width}
    return catalog, {**config, **numbers, "num_hidden_layers": 1, "vocab_size": 32}


@pytest.mark.parametrize(("heads", "kv", "tp"), [(12, 6, 4), (10, 5, 2), (12, 3, 2)])
def test_heads_that_do_not_divide_are_refused_or_given_out_in_groups(
    heads: int, kv: int, tp: int
) -> None:
    catalog, config = _llama(heads, kv)
    mesh = tonnage.Mesh(tp=tp)
    with pytest.raises(tonnage.UsageError, match="uneven_heads=True") as refused:
        hf.request(catalog, mesh, config=config)
    assert refused.value.code == "HEADS"
    request = hf.request(catalog, mesh, config=config, uneven_heads=True)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(one.shape) for name, one in catalog.items()}
    layer, each, seen = "model.layers.0.self_attn", heads // kv, 0
    for rank in range(tp):
        local = loading.load(request, arrays, rank)
        groups = local[f"{layer}.k_proj.weight"].shape[0] // 4
        assert local[f"{layer}.q_proj.weight"].shape[0] == groups * each * 4
        assert local[f"{layer}.o_proj.weight"].shape[1] == groups * each * 4
        whole = arrays[f"{layer}.q_proj.weight"][seen * each * 4 :][: groups * each * 4]
        assert np.array_equal(local[f"{layer}.q_proj.weight"], whole)
        seen += groups
    assert seen == kv


def test_ranks_that_no_cut_of_heads_fits_are_refused() -> None:
    catalog, config = _llama(6, 2)
    with pytest.raises(tonnage.UsageError, match="choose a tp"):
        hf.request(catalog, tonnage.Mesh(tp=4), config=config, uneven_heads=True)


# ---- vocabularies and biases ---------------------------------------------------------------------


def test_a_vocabulary_may_be_padded(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "llama_uneven")
    arrays = checkpoint.load(framework="numpy")
    request = hf.request(checkpoint, tonnage.Mesh(tp=4), vocab=tonnage.PadTo(64))
    found = [loading.load(request, arrays, rank)["lm_head.weight"] for rank in range(4)]
    assert [one.shape[0] for one in found] == [48] * 4
    joined = np.concatenate(found)
    assert np.array_equal(joined[:131], arrays["lm_head.weight"])
    assert not joined[131:].any()


def test_the_bias_of_a_row_parallel_layer_goes_where_it_is_wanted(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "llama_bias")
    name, mesh = "model.layers.0.self_attn.o_proj.bias", tonnage.Mesh(tp=2)
    assert place_of(hf.request(checkpoint, mesh), name) == {}
    once = tonnage.OnlyRank(0, "zeros")
    request = hf.request(checkpoint, mesh, row_bias=once)
    assert place_of(request, name) == {"tp": once.to_json()}
    assert place_of(request, name.replace("o_proj", "q_proj")) == {"tp": tonnage.Shard(0).to_json()}


def test_tied_embeddings_are_one_source_and_two_targets(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "llama_tied")
    assert "lm_head.weight" not in checkpoint
    request = by_name(hf.request(checkpoint, tonnage.Mesh(pp=2, tp=2)))
    assert request["lm_head.weight"]["expr"] == {"source": "model.embed_tokens.weight"}
    assert request["lm_head.weight"]["place"]["pp"] == {"owner": [1]}
    assert request["model.embed_tokens.weight"]["place"]["pp"] == {"owner": [0]}


# ---- pipelines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "size", "cut", "virtual", "wanted"),
    [
        (10, 4, "hf", 1, [3, 3, 2, 2]),
        (10, 4, "vllm", 1, [2, 3, 3, 2]),
        (11, 4, "vllm", 1, [3, 3, 3, 2]),
        (7, 2, "vllm", 1, [4, 3]),
        (10, 4, [1, 4, 4, 1], 1, [1, 4, 4, 1]),
        (8, 2, "hf", 2, [4, 4]),
        (9, 2, [3, 2, 2, 2], 2, [5, 4]),
        (6, 2, [[0, 3, 5], [1, 2, 4]], 1, [3, 3]),
    ],
)
def test_layers_per_stage(
    layers: int, size: int, cut: Any, virtual: int, wanted: list[int]
) -> None:
    owners = stages.owners(layers, size, cut, virtual)
    assert [Counter(owners)[stage] for stage in range(size)] == wanted


def test_virtual_stages_take_turns() -> None:
    assert stages.owners(8, 2, "hf", 2) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert stages.owners(6, 2, [[0, 3, 5], [1, 2, 4]]) == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ("even", "'hf', 'vllm'"),
        ([4, 4], "does not cut 10 layers"),
        ([5, 6, -1], "does not cut 10 layers"),
        ([[0, 1], [2]], "layer 3 has no stage"),
        ([[0, 1], [1]], "layer 1 has two stages"),
        ([[0, 99], [1]], "layer 99 is not one of the 10"),
        ([[0]], "1 lists of layers for 2 stages"),
    ],
)
def test_a_cut_that_loses_a_layer_is_refused(cut: Any, says: str) -> None:
    with pytest.raises(tonnage.UsageError, match=says):
        stages.owners(10, 2, cut)


def test_a_stage_may_count_its_layers_from_zero(folder: Path) -> None:
    request = hf.request(tonnage.open(folder / "llama"), tonnage.Mesh(pp=2), renumber=True)
    found = by_name(request)
    norm = "model.layers.{}.input_layernorm.weight"
    # Three layers: two on the first stage, the third on the second.
    assert "local" not in found[norm.format(1)]
    assert found[norm.format(2)]["local"] == norm.format(0)
    assert found[norm.format(2)]["place"] == {"pp": {"owner": [1]}}


def test_what_the_pipeline_plan_does_not_mention_is_named() -> None:
    catalog, config = _llama(4, 2)
    known = _known.described({**catalog, "model.extra.weight": Ref((4,))}, config)
    with pytest.raises(tonnage.UsageError, match=r"model\.extra\.weight is on no pipeline stage"):
        hf.place(known, tonnage.Mesh(pp=2), hf.Options())
    said = hf.Options(stages.Pipeline(cut=[1, 0], stage_of={"model.extra.*": 1}))
    made = {one.name: one for one in hf.place(known, tonnage.Mesh(pp=2), said)}
    assert made["model.extra.weight"].place == {"pp": tonnage.Owner(1)}


# ---- experts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        ("linear", [[0, 1], [2, 3]]),
        ("round_robin", [[0, 2], [1, 3]]),
        ([[3, 0], [1, 2]], [[3, 0], [1, 2]]),
        # Experts that are asked for often lie on both ranks.
        ([[0, 1, 2], [0, 3, 1]], [[0, 1, 2], [0, 3, 1]]),
    ],
)
@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_experts_in_any_order(
    folder: Path, model: str, order: Any, wanted: list[list[int]]
) -> None:
    checkpoint = tonnage.open(folder / model)
    arrays = checkpoint.load(framework="numpy")
    mesh = tonnage.Mesh(ep=2)
    linear = hf.request(checkpoint, mesh)
    request = hf.request(checkpoint, mesh, experts=order)
    name = "model.layers.1.mlp.experts.down_proj"
    whole = np.concatenate([loading.load(linear, arrays, rank)[name] for rank in range(2)])
    for rank, owned in enumerate(wanted):
        assert np.array_equal(loading.load(request, arrays, rank)[name], whole[owned])
    repeats = sum(map(len, wanted)) > 4
    assert (request["repeated"] != "error") == repeats


def test_experts_that_do_not_divide_go_to_the_first_ranks(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "mixtral")
    arrays = checkpoint.load(framework="numpy")
    for order in ("linear", "round_robin"):
        request = hf.request(checkpoint, tonnage.Mesh(ep=3), experts=order)
        name = "model.layers.1.mlp.experts.down_proj"
        counts = [loading.load(request, arrays, rank)[name].shape[0] for rank in range(3)]
        assert counts == [2, 1, 1]


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("sorted", "'linear', 'round_robin'"),
        ([[0, 1, 2, 3]], "1 lists of experts for ep=2"),
        ([[0, 1, 2], [3]], "as many experts"),
        ([[0, 1], [2, 4]], "expert 4 is not one of the 4"),
    ],
)
def test_tables_of_experts_that_do_not_fit_are_refused(folder: Path, order: Any, says: str) -> None:
    with pytest.raises(tonnage.UsageError, match=says):
        hf.request(tonnage.open(folder / "mixtral"), tonnage.Mesh(ep=2), experts=order)


def test_experts_over_all_ranks_and_fsdp_over_their_copies(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "mixtral")
    mesh = tonnage.Mesh(fsdp=2, tp=2, alt={"efsdp": 2, "ep": 2})
    place = place_of(hf.request(checkpoint, mesh), "model.layers.0.mlp.experts.gate_up_proj")
    assert place == {
        "efsdp": tonnage.StridedShard(0, 2).to_json(),
        "ep": tonnage.Shard(0).to_json(),
    }
    wide = tonnage.Mesh(fsdp=2, tp=2, alt={"efsdp": 1, "ep": 4})
    place = place_of(hf.request(checkpoint, wide), "model.layers.0.mlp.experts.gate_up_proj")
    assert place == {"ep": tonnage.Shard(0).to_json()}


# ---- scales of blocks --------------------------------------------------------------------------


def _deepseek() -> tuple[dict[str, Ref], dict[str, Any]]:
    """One layer with experts, in blocks of 128 by 128, and a layer that predicts further tokens."""
    made: dict[str, Ref] = {"model.embed_tokens.weight": Ref((256, 256))}
    for layer in (0, 1):
        for expert in range(4):
            for part, shape in (
                ("gate_proj", (320, 256)),
                ("up_proj", (320, 256)),
                ("down_proj", (256, 320)),
            ):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                made[name] = Ref(shape, "F8_E4M3")
                made[f"{name}_scale_inv"] = Ref((-(-shape[0] // 128), -(-shape[1] // 128)))
        made[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = Ref((4,))
    made["model.norm.weight"] = Ref((256,))
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1, "num_attention_heads": 4}
    return made, {**config, "quantization_config": quantised}


def test_scales_follow_the_blocks_of_their_weight() -> None:
    catalog, config = _deepseek()
    request = by_name(hf.request(catalog, tonnage.Mesh(tp=2), config=config))
    up = "model.layers.0.mlp.experts.1.up_proj.weight"
    down = up.replace("up_proj", "down_proj")
    # 160 rows a rank: the second block of 128 is touched by both.
    assert request[f"{up}_scale_inv"]["place"] == {"tp": tonnage.Blocks(0, 128, 320).to_json()}
    assert request[f"{down}_scale_inv"]["place"] == {"tp": tonnage.Blocks(1, 128, 320).to_json()}
    scales = {f"{up}_scale_inv": np.arange(6).reshape(3, 2)}
    only = {"mesh": [["tp", 2]], "targets": [request[f"{up}_scale_inv"]]}
    found = [loading.load(only, scales, rank)[f"{up}_scale_inv"] for rank in range(2)]
    assert [one[:, 0].tolist() for one in found] == [[0, 2], [2, 4]]


def test_quantised_experts_stay_apart_and_are_owned() -> None:
    catalog, config = _deepseek()
    request = hf.request(catalog, tonnage.Mesh(ep=2), config=config, experts="round_robin")
    found = by_name(request)
    for expert in range(4):
        for end in ("", "_scale_inv"):
            name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight{end}"
            assert found[name]["place"] == {"ep": {"owner": [expert % 2]}}
    # The layer beyond the last is no part of the model, and may stay unread.
    assert not any(".layers.1." in name for name in found)
    assert "model.layers.1.mlp.experts.0.up_proj.weight" in request["unread"]


def test_other_quantised_checkpoints_are_refused() -> None:
    catalog, config = _llama(4, 2)
    config = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(tonnage.UnsupportedError, match="'gptq'"):
        hf.request(catalog, tonnage.Mesh(tp=2), config=config)


# ---- plans -------------------------------------------------------------------------------------


def test_a_plan_can_be_amended(folder: Path) -> None:
    checkpoint = tonnage.open(folder / "llama")
    plan = {"model.layers.*.mlp.down_proj": "replicate"}
    request = hf.request(checkpoint, tonnage.Mesh(tp=2), tp_plan=plan)
    assert place_of(request, "model.layers.0.mlp.down_proj.weight") == {}
    with pytest.raises(tonnage.UsageError, match="the style 'diagonal' is not known"):
        hf.request(checkpoint, tonnage.Mesh(tp=2), tp_plan={"model.norm": "diagonal"})


def test_an_axis_without_a_rule_is_refused(folder: Path) -> None:
    with pytest.raises(tonnage.UsageError, match="no rule says what the axis 'x' does"):
        hf.request(tonnage.open(folder / "llama"), tonnage.Mesh(x=2))
    request = hf.request(tonnage.open(folder / "llama"), tonnage.Mesh(dp_replicate=2, tp=2))
    assert place_of(request, "model.norm.weight") == {}


def test_fsdp_outside_of_a_fused_matrix_is_refused() -> None:
    catalog, config = _llama(4, 2)
    plan = {"model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(tonnage.UnsupportedError, match="up_proj"):
        hf.request(catalog, tonnage.Mesh(fsdp=2, tp=2), config=config, tp_plan=plan)


def test_a_hundred_thousand_tensors_are_placed_in_seconds() -> None:
    import time

    catalog: dict[str, Ref] = {"model.embed_tokens.weight": Ref((1024, 64))}
    for layer in range(64):
        for expert in range(512):
            for part, shape in (
                ("gate_proj", (32, 64)),
                ("up_proj", (32, 64)),
                ("down_proj", (64, 32)),
            ):
                catalog[f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"] = Ref(shape)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 64, "num_attention_heads": 4}
    # The processor's time: others may use the machine meanwhile.
    start = time.process_time()
    known = _known.described(catalog, config)
    made = hf.place(known, tonnage.Mesh(tp=8), hf.Options())
    seconds = time.process_time() - start
    assert len(catalog) == 98_305
    assert len(made) == 129
    assert seconds < 10, f"{seconds:.1f} s"


def test_a_configuration_that_transformers_refuses_is_a_usage_error(folder: Path) -> None:
    config = json.loads((folder / "llama" / "config.json").read_text())
    with pytest.raises(tonnage.UsageError, match="transformers refuses"):
        hf.request({}, tonnage.Mesh(tp=2), config={**config, "num_attention_heads": 7})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "says 1000000000 layers"),
        ({"architectures": ["BertModel"]}, "transformers cannot make a model"),
        ({"architectures": [3, "pipeline"], "hidden_size": -64}, "transformers"),
    ],
)
def test_a_hostile_configuration_is_an_error(
    folder: Path, change: dict[str, Any], says: str
) -> None:
    config = json.loads((folder / "llama" / "config.json").read_text())
    with pytest.raises(tonnage.UsageError, match=says):
        hf.request(tonnage.open(folder / "llama"), tonnage.Mesh(tp=2), config={**config, **change})


@pytest.mark.parametrize("number", ["9" * 9, "9" * 5000])
def test_numbers_in_names_do_not_ask_for_memory(number: str) -> None:
    catalog, config = _llama(4, 2)
    catalog[f"model.layers.{number}.input_layernorm.weight"] = Ref((16,))
    known = _known.described(catalog, config)
    with pytest.raises(tonnage.UsageError, match="is on no pipeline stage"):
        hf.place(known, tonnage.Mesh(pp=2), hf.Options())
