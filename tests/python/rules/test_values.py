"""Meshes, placements and expressions: what they refuse, their JSON, and what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import tonnage
from hypothesis import given, settings
from hypothesis import strategies as st
from tonnage import _expr
from tonnage._expr import (
    Concat,
    Expr,
    Interleave,
    Pad,
    Permute,
    Repeat,
    Reshape,
    Slice,
    Source,
    Stack,
)


def test_a_mesh_counts_ranks_row_by_row() -> None:
    mesh = tonnage.Mesh(pp=2, tp=4)
    assert mesh.size == 8
    assert [mesh.coordinate(5, axis) for axis in ("pp", "tp")] == [1, 1]
    assert mesh.to_json() == {"mesh": [["pp", 2], ["tp", 4]], "alt": []}
    assert tonnage.Mesh({"a-b": 2}) == tonnage.Mesh([("a-b", 2)])


def test_another_view_of_the_same_ranks() -> None:
    mesh = tonnage.Mesh(fsdp=2, tp=2, alt={"efsdp": 1, "ep": 4})
    assert [mesh.coordinate(3, axis) for axis in mesh.names] == [1, 1, 0, 3]
    assert mesh.to_json()["alt"] == [[["efsdp", 1], ["ep", 4]]]
    shared = tonnage.Mesh(pp=2, tp=4, alt=[("pp", 2), ("efsdp", 2), ("ep", 2)])
    assert shared.extent("ep") == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tonnage.Mesh(tp=0), "axis 'tp' must be 1 or more"),
        (lambda: tonnage.Mesh(tp=4, alt={"ep": 3}), "not another view of the 4 ranks"),
        (lambda: tonnage.Mesh(pp=2, tp=2, alt={"ep": 2, "pp": 2}), "other ranks"),
        (lambda: tonnage.Mesh([("tp", 2)], tp=2), "two axes of one name"),
        (lambda: tonnage.Mesh(tp=2).extent("pp"), "has no axis 'pp'"),
        (lambda: tonnage.Mesh(tp=2).coordinate(2, "tp"), "rank 2 is not one of the 2"),
        (lambda: tonnage.Shard(0, "halves"), "uneven must be"),  # type: ignore[arg-type]
        (lambda: tonnage.Heads(0, 2, 8, "torch"), "for heads"),  # type: ignore[arg-type]
        (lambda: tonnage.Owner(), "nobody would have the tensor"),
        (lambda: tonnage.Segments([2, 2], each=[tonnage.Shard(0)]), "2 sizes cannot have 1"),
        (lambda: tonnage.Segments([2], each=tonnage.Owner(0)), "cannot be placed by Owner"),
        (lambda: tonnage.OnlyRank(0, "ones"), "others must be"),  # type: ignore[arg-type]
        (lambda: tonnage.PadTo(0), "PadTo must be 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, says: str) -> None:
    with pytest.raises(tonnage.UsageError, match=says):
        make()


def test_a_bool_is_no_dimension() -> None:
    with pytest.raises(TypeError, match="dim must be an integer"):
        tonnage.Shard(True)


@pytest.mark.parametrize(
    ("placement", "json"),
    [
        (tonnage.Replicate(), "replicate"),
        (tonnage.Shard(-1), {"shard": {"dim": -1, "uneven": "torch"}}),
        (tonnage.Shard(0, tonnage.PadTo(64)), {"shard": {"dim": 0, "uneven": {"pad_to": 64}}}),
        (tonnage.Shard(0, tonnage.Granular(8)), {"shard": {"dim": 0, "uneven": {"granular": 8}}}),
        (
            tonnage.StridedShard(1, 2, "balanced"),
            {"strided": {"dim": 1, "groups": 2, "uneven": "balanced"}},
        ),
        (
            tonnage.Segments([4, 2], each=[tonnage.Shard(0, "error"), tonnage.Replicate()]),
            {
                "segments": {
                    "dim": 0,
                    "sizes": [4, 2],
                    "each": [{"shard": {"dim": 0, "uneven": "error"}}, "replicate"],
                }
            },
        ),
        (tonnage.Heads(0, 2, 8), {"heads": {"dim": 0, "heads": 2, "head_dim": 8}}),
        (tonnage.Owner(3, 1, 1), {"owner": [1, 3]}),
        (tonnage.OnlyRank(0, "zeros"), {"only": {"coord": 0, "others": "zeros"}}),
        (
            tonnage.Blocks(0, 128, 300),
            {"blocks": {"dim": 0, "block": 128, "extent": 300, "uneven": "torch"}},
        ),
    ],
)
def test_placements_as_json(placement: tonnage.Placement, json: Any) -> None:
    assert placement.to_json() == json
    assert hash(placement) == hash(placement)


A, B = Source("a"), Source("b")
ARRAYS = {"a": np.arange(24).reshape(2, 3, 4), "b": np.arange(100, 124).reshape(2, 3, 4)}


@pytest.mark.parametrize(
    ("expr", "wanted"),
    [
        (Slice(A, -1, 1, 4, 2), ARRAYS["a"][..., 1:4:2]),
        (Concat((A, B), 1), np.concatenate([ARRAYS["a"], ARRAYS["b"]], 1)),
        (Stack((A, B), -1), np.stack([ARRAYS["a"], ARRAYS["b"]], -1)),
        (Permute(A, (2, 0, 1)), ARRAYS["a"].transpose(2, 0, 1)),
        (Reshape(A, (6, 4)), ARRAYS["a"].reshape(6, 4)),
        (Repeat(A, 0, 2), np.concatenate([ARRAYS["a"]] * 2)),
        (Pad(A, 1, 1, 2), np.pad(ARRAYS["a"], [(0, 0), (1, 2), (0, 0)])),
    ],
)
def test_what_an_expression_means(expr: Expr, wanted: Any) -> None:
    assert np.array_equal(expr.evaluate(ARRAYS), wanted)
    assert expr.shape({name: one.shape for name, one in ARRAYS.items()}) == wanted.shape
    assert _expr.from_json(expr.to_json()) == expr


def test_interleaving_takes_turns() -> None:
    made = Interleave((A, B), 1).evaluate(ARRAYS)
    assert made.shape == (2, 6, 4)
    assert np.array_equal(made[:, 0::2], ARRAYS["a"])
    assert np.array_equal(made[:, 1::2], ARRAYS["b"])


@pytest.mark.parametrize(
    ("expr", "says"),
    [
        (Slice(A, 0, 1, 3), "no slice"),
        (Slice(A, 3, 0, 1), "no dimension 3"),
        (Slice(A, 0, 0, 1, 0), "no slice"),
        (Concat((), 0), "concat"),
        (Concat((A, Reshape(A, (6, 4))), 0), "do not fit"),
        (Stack((A, Slice(A, 0, 0, 1)), 0), "do not fit"),
        (Permute(A, (0, 0, 1)), "not an order"),
        (Reshape(A, (5, 5)), "has no shape"),
        (Repeat(A, 0, -1), "cannot be repeated"),
        (Pad(A, 0, -1, 0), "cannot be padded"),
    ],
)
def test_expressions_that_do_not_fit_are_refused(expr: Expr, says: str) -> None:
    with pytest.raises(tonnage.UsageError, match=says):
        expr.shape({"a": (2, 3, 4)})
    with pytest.raises(tonnage.UsageError, match=says):
        expr.evaluate(ARRAYS)


@pytest.mark.parametrize("wrong", [{}, {"source": "a", "of": 1}, {"slice": {"of": 1}}, {"new": {}}])
def test_json_that_is_no_expression_is_refused(wrong: Any) -> None:
    with pytest.raises(tonnage.UsageError, match="not an expression"):
        _expr.from_json(wrong)


@given(rows=st.lists(st.integers(0, 9), min_size=0, max_size=12))
@settings(max_examples=200, deadline=None)
def test_rows_are_picked_in_order(rows: list[int]) -> None:
    array = np.arange(30).reshape(10, 3)
    made = _expr.pick(Source("w"), 0, rows)
    assert np.array_equal(made.evaluate({"w": array}), array[rows])


def test_round_robin_takes_as_many_slices_as_ranks() -> None:
    order = [expert for rank in range(4) for expert in range(rank, 64, 4)]
    made = _expr.pick(Source("w"), 0, order)
    assert isinstance(made, Concat)
    assert len(made.of) == 4


@given(
    extent=st.integers(1, 40),
    size=st.integers(1, 7),
    uneven=st.sampled_from(["torch", "balanced", tonnage.PadTo(3), tonnage.Granular(1)]),
)
@settings(max_examples=200, deadline=None)
def test_the_reference_cuts_all_of_a_tensor(extent: int, size: int, uneven: Any) -> None:
    if isinstance(uneven, tonnage.PadTo):
        uneven = tonnage.PadTo(3 * size)
    array = np.arange(1, extent + 1)
    json = tonnage.Shard(0, uneven).to_json()
    parts = [reference.place(array, json, at, size) for at in range(size)]
    joined = np.concatenate(parts)
    assert np.array_equal(joined[:extent], array)
    assert not joined[extent:].any()
