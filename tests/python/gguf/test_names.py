"""GGUF's and Hugging Face's names: our tables, tried against those of `gguf`, name by name."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import transformers
from tonnage import _native

#: What `general.architecture` says, and a configuration of the models whose names these are.
MODELS = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "phi3": "Phi3",
}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}


def hf_names(kind: str) -> list[str]:
    """The names that transformers gives the weights of a tiny model."""
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, f"{kind}{suffix}")(**SIZES)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


@pytest.mark.parametrize("architecture", MODELS)
def test_every_weight_of_a_model_has_ggufs_name(architecture: str) -> None:
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, 2)
    names = hf_names(MODELS[architecture])
    assert len(names) >= 15
    for name in names:
        wanted = table.get_name(name, try_suffixes=(".weight", ".bias"))
        found = _native._gguf_name(architecture, name, False)
        assert found == wanted, name
        # Gemma and Gemma 2 have no head of their own.
        assert found is not None or name == "lm_head.weight"
        assert found is None or _native._gguf_name(architecture, found, True) == name


def test_mistral_is_llama() -> None:
    config = transformers.MistralConfig(**SIZES)
    model = transformers.MistralForCausalLM(config)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) >= 15
    for name in names:
        found = _native._gguf_name("llama", name, False)
        assert found is not None
        assert _native._gguf_name("llama", found, True) == name


def test_what_is_not_in_the_table_has_no_name() -> None:
    assert _native._gguf_name("llama", "rope_freqs.weight", True) is None
    assert _native._gguf_name("mamba", "token_embd.weight", True) is None


@pytest.mark.parametrize(("rows", "heads"), [(8, 2), (64, 4), (256, 1), (24, 3)])
def test_rows_of_heads_are_ordered_as_the_converter_orders_them(rows: int, heads: int) -> None:
    values = np.arange(rows * 3).reshape(rows, 3)
    # `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py.
    there = values.reshape(heads, 2, rows // heads // 2, 3).swapaxes(1, 2).reshape(rows, 3)
    order = _native._gguf_rope_rows(rows, heads)
    assert np.array_equal(there[order], values)


def test_changes_are_named() -> None:
    change = _native._gguf_change
    kv_heads = "llama.attention.head_count_kv"
    assert change("llama", "blk.0.attn_k.weight") == ("rope_rows", kv_heads)
    assert change("qwen2", "blk.0.attn_k.weight") is None
    # What `gemma3` has in its file are norms plus one, the norms of queries and keys among them.
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.attn_q_norm", "blk.0.post_ffw_norm"):
        assert change("gemma3", f"{name}.weight") == ("plus_one", None)
        assert change("qwen3", f"{name}.weight") is None
