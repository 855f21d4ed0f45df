"""Sharded state dicts of the Megatron kind: what its ranks hold is what they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import loading
import numpy as np
import pytest
import tonnage
import torch
from catalogs import Ref, catalog_of, random
from tonnage._expr import Source
from tonnage._rules import megatron


@dataclass
class ShardedTensor:
    """The attributes that Megatron's has."""

    key: str
    data: Any
    dtype: Any
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    axis_fragmentations: tuple[int, ...] | None = None
    replica_id: Any = 0
    prepend_axis_num: int = 0
    allow_shape_mismatch: bool = False
    flattened_range: slice | None = None


@dataclass
class ShardedTensorFactory:
    """The attributes that Megatron's has."""

    key: str
    data: Any
    build_fn: Any
    merge_fn: Any

    def build(self) -> Any:
        return self.build_fn(self.key, self.data)


def sharded(
    key: str, local: tuple[int, ...], whole: tuple[int, ...], at: tuple[int, ...], **more: Any
) -> ShardedTensor:
    return ShardedTensor(key, None, torch.float32, local, whole, at, **more)


def test_megatrons_fused_projection_is_a_permutation_by_groups() -> None:
    heads, groups, width, hidden = 4, 2, 3, 5
    arrays = random(
        q=(heads * width, hidden), k=(groups * width, hidden), v=(groups * width, hidden)
    )
    whole = ((heads + 2 * groups) * width, hidden)
    fused = megatron.qkv(
        Source("q"), Source("k"), Source("v"), heads=heads, groups=groups, rest=(width, hidden)
    )
    states = [
        {"layer": {"qkv": sharded("qkv", (12, 5), whole, (12 * rank, 0))}} for rank in range(2)
    ]
    request = megatron.request(states, catalog_of(arrays), sources={"qkv": fused})
    for rank in range(2):
        # A rank has one group: its two query heads, its key, its value.
        wanted = np.concatenate(
            [
                arrays["q"][rank * 6 : rank * 6 + 6],
                arrays["k"][rank * 3 : rank * 3 + 3],
                arrays["v"][rank * 3 : rank * 3 + 3],
            ]
        )
        found = loading.load(request, arrays, rank)
        assert np.array_equal(found["layer.qkv"], wanted)


def test_megatrons_gated_network_is_merged_by_its_own_code() -> None:
    arrays = random(gate=(8, 3), up=(8, 3))
    states = []
    for rank in range(2):

        def build(key: str, data: Any, rank: int = rank) -> list[ShardedTensor]:
            one, two = torch.chunk(data, 2)
            # Of four fragments, the first half are of the gate.
            return [
                sharded(key, tuple(one.shape), (16, 3), (4 * rank, 0)),
                sharded(key, tuple(two.shape), (16, 3), (8 + 4 * rank, 0)),
            ]

        factory = ShardedTensorFactory("fc1", torch.empty(8, 3), build, torch.cat)
        states.append({"fc1": factory, "_extra_state": b"", "iteration": 7})
    sources = {"fc1": megatron.gated(Source("gate"), Source("up"))}
    request = megatron.request(states, catalog_of(arrays), sources=sources)
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        wanted = np.concatenate([arrays["gate"][rows], arrays["up"][rows]])
        assert np.array_equal(loading.load(request, arrays, rank)["fc1"], wanted)


def test_a_factory_that_computes_is_refused() -> None:
    factory = ShardedTensorFactory(
        "w",
        torch.empty(2),
        lambda key, data: [sharded(key, (2,), (2,), (0,))],
        lambda parts: parts[0] * 2,
    )
    with pytest.raises(tonnage.UnsupportedError, match="mul"):
        megatron.request([{"w": factory}], {"w": Ref((2,))})


def test_layers_that_megatron_stacks_into_one_tensor() -> None:
    arrays = random(w=(4, 6, 3))
    states = [
        {
            f"layers.{at}": sharded(
                "w", (3, 3), (4, 6, 3), (2 * pp + at, 3 * tp, 0), prepend_axis_num=1
            )
            for at in range(2)
        }
        for pp in range(2)
        for tp in range(2)
    ]
    request = megatron.request(states, catalog_of(arrays))
    for rank, (pp, tp) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        found = loading.load(request, arrays, rank)
        for at in range(2):
            wanted = arrays["w"][2 * pp + at, 3 * tp : 3 * tp + 3]
            assert np.array_equal(found[f"layers.{at}"], wanted)


def test_a_vocabulary_that_was_padded_for_other_ranks() -> None:
    arrays = random(embedding=(10, 2))
    for rows in (12, 8):
        half = rows // 2
        states = [
            {
                "e": sharded(
                    "embedding", (half, 2), (rows, 2), (half * r, 0), allow_shape_mismatch=True
                )
            }
            for r in range(2)
        ]
        request = megatron.request(states, catalog_of(arrays), unread="allow")
        joined = np.concatenate([loading.load(request, arrays, r)["e"] for r in range(2)])
        kept = min(rows, 10)
        assert np.array_equal(joined[:kept], arrays["embedding"][:kept])
        assert not joined[kept:].any()
    strict = [{"e": sharded("embedding", (6, 2), (6, 2), (0, 0))}]
    with pytest.raises(tonnage.UsageError, match=r"\[10, 2\] in the checkpoint, and \[6, 2\] here"):
        megatron.request(strict, catalog_of(arrays))


def test_a_flat_range_of_an_optimisers_tensor() -> None:
    arrays = random(w=(4, 6))
    states = [
        {"w": sharded("w", (2, 6), (4, 6), (2, 0), flattened_range=slice(3, 9))},
        {"w": sharded("w", (2, 6), (4, 6), (2, 0), flattened_range=slice(9, 12))},
    ]
    request = megatron.request(states, catalog_of(arrays), unread="allow")
    flat = arrays["w"][2:].reshape(-1)
    assert np.array_equal(loading.load(request, arrays, 0)["w"], flat[3:9])
    assert np.array_equal(loading.load(request, arrays, 1)["w"], flat[9:12])


def test_a_key_that_is_not_there_is_named() -> None:
    with pytest.raises(tonnage.TonnageError, match="no tensor weightt; did you mean weight"):
        megatron.request([{"w": sharded("weightt", (2,), (2,), (0,))}], {"weight": Ref((2,))})


def test_megatrons_own_classes() -> None:
    try:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor as Real
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    except ImportError:
        # Held to the attributes alone, then; the tests above do so in any case.
        return
    arrays = random(gate=(8, 3), up=(8, 3), w=(2, 4))
    states = []
    for rank in range(2):
        fc1 = Real.from_rank_offsets("fc1", torch.empty(8, 3), (0, rank, 2))
        states.append(
            {
                "fc1": apply_swiglu_sharded_factory(fc1, ()),
                "w": Real.from_rank_offsets("w", torch.empty(2, 2), (1, rank, 2)),
            }
        )
    sources = {"fc1": megatron.gated(Source("gate"), Source("up"))}
    request = megatron.request(states, catalog_of(arrays), sources=sources)
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        found = loading.load(request, arrays, rank)
        wanted = np.concatenate([arrays["gate"][rows], arrays["up"][rows]])
        assert np.array_equal(found["fc1"], wanted)
        assert np.array_equal(found["w"], arrays["w"][:, 2 * rank : 2 * rank + 2])
