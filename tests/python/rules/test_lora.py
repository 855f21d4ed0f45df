"""Adapters: on every rank, the product of the factors is that rank's part of the whole product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loading
import numpy as np
import pytest
import tonnage
from catalogs import catalog_of, random
from tonnage._rules import hf, lora

RANK = 8
LAYER = "model.layers.0"
MODULES = {"q_proj": "self_attn", "k_proj": "self_attn", "o_proj": "self_attn", "down_proj": "mlp"}


@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_adapts_its_own_part(folder: Path, tp: int) -> None:
    base = tonnage.open(folder / "llama")
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf, under in MODULES.items():
        out, inner = base[f"{LAYER}.{under}.{leaf}.weight"].shape
        prefix = f"base_model.model.{LAYER}.{under}.{leaf}"
        shapes[f"{prefix}.lora_A.weight"] = (RANK, inner)
        shapes[f"{prefix}.lora_B.weight"] = (out, RANK)
    arrays = random(**shapes)
    request = lora.request(catalog_of(arrays), tonnage.Mesh(tp=tp), base)
    weights = hf.request(base, tonnage.Mesh(tp=tp))
    for leaf, under in MODULES.items():
        name = f"{LAYER}.{under}.{leaf}.weight"
        prefix = f"base_model.model.{LAYER}.{under}.{leaf}"
        one, two = arrays[f"{prefix}.lora_B.weight"], arrays[f"{prefix}.lora_A.weight"]
        only: dict[str, Any] = {
            "mesh": weights["mesh"],
            "targets": [at for at in weights["targets"] if at["name"] == name],
        }
        for rank in range(tp):
            found = loading.load(request, arrays, rank)
            part = found[f"{prefix}.lora_B.weight"] @ found[f"{prefix}.lora_A.weight"]
            wanted = loading.load(only, {name: one @ two}, rank)[name]
            assert part.shape == wanted.shape
            assert np.allclose(part, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        (f"{LAYER}.self_attn.z_proj.lora_A.weight", (8, 64), "adapts no matrix"),
        (f"{LAYER}.self_attn.q_proj.weight", (64, 64), "adapts no matrix"),
        (f"{LAYER}.self_attn.q_proj.lora_A.weight", (8, 63), r"its matrix is \[64, 64\]"),
    ],
)
def test_what_adapts_nothing_is_named(
    folder: Path, name: str, shape: tuple[int, ...], says: str
) -> None:
    base = tonnage.open(folder / "llama")
    arrays = random(**{f"base_model.model.{name}": shape})
    with pytest.raises(tonnage.UsageError, match=says):
        lora.request(catalog_of(arrays), tonnage.Mesh(tp=2), base)
