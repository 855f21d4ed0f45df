"""Checkpoints that exist as arrays only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Ref(NamedTuple):
    """What is known of a tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str = "F32"


def catalog_of(arrays: dict[str, Any]) -> dict[str, Ref]:
    """What a checkpoint of these arrays would say of them."""
    return {name: Ref(tuple(one.shape)) for name, one in arrays.items()}


def random(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """Arrays of these shapes, no two of whose elements are the same."""
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
