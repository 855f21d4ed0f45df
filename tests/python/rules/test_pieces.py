"""State dicts that say which pieces their ranks hold, and those that hold all."""

from __future__ import annotations

from typing import Any

import loading
import numpy as np
import pytest
import tonnage
import torch
from catalogs import Ref, catalog_of, random
from tonnage import _rules
from tonnage._expr import Source
from tonnage._rules import dtensor
from tonnage._rules.pieces import Piece, assemble


def stamped(whole: Any, shape: tuple[int, ...], pieces: list[tuple[Any, Any, Any]]) -> Any:
    """A local tensor with the attributes of `CheckpointableTensor`, and what should be in it."""
    local = torch.zeros(shape)
    for start, at, size in pieces:
        key = tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))
        source = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        local[key] = torch.from_numpy(whole[source].copy())
    named: Any = torch.empty(shape)
    named.global_shape = tuple(whole.shape)
    named.global_offsets, named.local_offsets, named.local_sizes = (
        tuple(map(tuple, one)) for one in zip(*pieces, strict=True)
    )
    return named, local


def test_ranks_that_say_which_pieces_they_hold() -> None:
    arrays = random(w=(8, 6), norm=(6,))
    states, wanted = [], []
    layouts: list[tuple[tuple[int, ...], list[Any]]] = [
        # Rows that are apart, out of order.
        ((4, 6), [((6, 0), (0, 0), (2, 6)), ((0, 0), (2, 0), (2, 6))]),
        # One box of columns.
        ((8, 3), [((0, 3), (0, 0), (8, 3))]),
        # Four boxes, with a row of padding at the end.
        (
            (5, 4),
            [
                ((0, 0), (0, 0), (2, 2)),
                ((0, 4), (0, 2), (2, 2)),
                ((6, 0), (2, 0), (2, 2)),
                ((6, 4), (2, 2), (2, 2)),
            ],
        ),
        ((4, 6), [((6, 0), (0, 0), (2, 6)), ((0, 0), (2, 0), (2, 6))]),
    ]
    for shape, pieces in layouts:
        named, local = stamped(arrays["w"], shape, pieces)
        states.append({"w": named, "norm": torch.empty(6)})
        wanted.append(local.numpy())
    with pytest.raises(tonnage.UsageError, match="read by nobody"):
        loading.load(_rules.request(catalog_of(arrays), states), arrays, 0)
    loose = {"unread": ["w"], "repeated": ["w"]}
    request = _rules.request(catalog_of(arrays), states, **loose)
    for rank in range(4):
        found = loading.load(request, arrays, rank)
        assert np.array_equal(found["w"], wanted[rank])
        assert np.array_equal(found["norm"], arrays["norm"])
    # Two ranks that hold the same have one target.
    assert [one["name"] for one in request["targets"]] == ["w@0", "w@1", "w@2", "norm"]


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([((7, 0), (0, 0), (2, 6))], "not inside of the global"),
        ([((0, 0), (3, 0), (2, 6))], "not inside of the local"),
        ([((0, 0), (0, 0), (2, 6)), ((2, 0), (1, 0), (2, 6))], "overlap"),
        ([((0, 0), (0, 0), (0, 6))], "nothing of the checkpoint"),
        # A pinwheel: no cut through the whole separates the boxes.
        (
            [
                ((0, 0), (0, 0), (1, 3)),
                ((0, 0), (1, 0), (3, 1)),
                ((0, 0), (3, 1), (1, 3)),
                ((0, 0), (0, 3), (3, 1)),
            ],
            "no cut separates",
        ),
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces: list[Any], says: str) -> None:
    made = [Piece(*one) for one in pieces]
    with pytest.raises(tonnage.UsageError, match=says):
        assemble("w", Source("w"), (8, 6), made, (4, 6))


def test_one_rank_cannot_speak_for_the_others() -> None:
    named, _ = stamped(np.zeros((4, 2), np.float32), (2, 2), [((0, 0), (0, 0), (2, 2))])
    with pytest.raises(tonnage.UsageError, match="state dicts of all ranks"):
        _rules.request({"w": Ref((4, 2))}, {"w": named})


def test_plain_tensors_are_on_the_only_rank_and_ties_are_followed() -> None:
    arrays = random(a=(3, 2))
    tensor = torch.empty(3, 2, dtype=torch.bfloat16)
    request = _rules.request(catalog_of(arrays), {"a": tensor, "head": tensor})
    assert request["mesh"] == [["rank", 1]]
    found = {one["name"]: one for one in request["targets"]}
    assert found["head"]["expr"] == {"source": "a"}
    # The state dict's dtype is wanted, not the file's.
    assert found["a"]["dtype"] == found["head"]["dtype"] == "BF16"


def test_a_module_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(4, 2)
    request = _rules.request({"weight": Ref((2, 4)), "bias": Ref((2,))}, module)
    assert [one["name"] for one in request["targets"]] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"w": torch.empty(3)}, r"gives \[4\] and the state dict has \[3\]"),
        ({"ww": torch.empty(4)}, "no tensor ww"),
        ({"w": 3}, "w is int, not a tensor"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(state: dict[str, Any], says: str) -> None:
    with pytest.raises(tonnage.TonnageError, match=says):
        _rules.request({"w": Ref((4,))}, state)


def test_a_sum_cannot_be_loaded() -> None:
    from torch.distributed.tensor import Partial

    with pytest.raises(tonnage.UsageError, match="hold summands of"):
        dtensor.placement(Partial(), "w")
