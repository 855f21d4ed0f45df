"""Tiny models by configuration, and the meshes that they are cut on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tonnage

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2}

#: Name to `model_type` and what differs from the base.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_uneven": ("llama", {"vocab_size": 131, "intermediate_size": 130}),
    "llama_kv1": ("llama", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, **_EXPERTS}),
    "qwen3_moe": (
        "qwen3_moe",
        # The first layer is dense, the others have experts.
        {"num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [0], "head_dim": 16}
        | _EXPERTS,
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "head_dim": 16, **_EXPERTS}),
    "deepseek_v3": (
        "deepseek_v3",
        {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4, **_EXPERTS},
    ),
    "phi3": ("phi3", {}),
    # Its tensors are stored fused (gate, q, k and v in one; gate and up in one), and split at load.
    "hrm_text": ("hrm_text", {"head_dim": 16, "num_hidden_layers": 2}),
}


class Layout(NamedTuple):
    """A mesh, as we and as transformers name it."""

    mesh: tonnage.Mesh
    tp: int = 1
    pp: int = 1
    ep: int = 1
    fsdp: int = 1


LAYOUTS: dict[str, Layout] = {
    "tp2": Layout(tonnage.Mesh(tp=2), tp=2),
    "tp4": Layout(tonnage.Mesh(tp=4), tp=4),
    # Expert parallelism over the ranks that are tensor parallel elsewhere, as transformers has it.
    "ep2": Layout(tonnage.Mesh(tp=2, alt={"ep": 2}), tp=2, ep=2),
    "fsdp2_tp2": Layout(tonnage.Mesh(fsdp=2, tp=2), tp=2, fsdp=2),
    "pp2": Layout(tonnage.Mesh(pp=2), pp=2),
    "pp2_tp2": Layout(tonnage.Mesh(pp=2, tp=2), pp=2, tp=2),
}

_DENSE = "it has no experts, so there is nothing for ep to place"
#: Combinations that mean nothing, and why; asking for one is an error that says so.
MEANINGLESS: dict[tuple[str, str], str] = {
    **{
        (model, "ep2"): _DENSE
        for model in ("llama", "llama_tied", "llama_bias", "llama_uneven", "llama_kv1")
    },
    ("qwen3", "ep2"): _DENSE,
    ("phi3", "ep2"): _DENSE,
    ("hrm_text", "ep2"): _DENSE,
    ("hrm_text", "pp2"): "its two stacks of layers run in turns, several times: no stage is first",
    ("hrm_text", "pp2_tp2"): "as with pp2",
}
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS]
MEANT = [case for case in CASES if case not in MEANINGLESS]


def config(model: str) -> Any:
    """The configuration of a tiny model."""
    from transformers import AutoConfig

    kind, differs = MODELS[model]
    return AutoConfig.for_model(kind, **{**_BASE, **differs})


def save(model: str, folder: Path) -> None:
    """Writes a model with random numbers everywhere, in several files."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    made = AutoModelForCausalLM.from_config(config(model))
    with torch.no_grad():
        for tensor in made.state_dict().values():
            # Ones and zeros of an initialised model would hide rows that change places.
            tensor.copy_(torch.randn(tensor.shape))
    made.save_pretrained(folder, max_shard_size="60KB")
