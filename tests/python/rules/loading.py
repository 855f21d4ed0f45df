"""A rank's tensors by way of a request: planned, proven and read, and held to the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import reference
import safetensors.numpy
import tonnage
import torch


def load(request: Mapping[str, Any], arrays: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """What a rank reads of a checkpoint of these arrays; it is what the request means."""
    wanted = reference.load(request, arrays, rank)
    found = _plan(json.dumps(request), safetensors.numpy.save(dict(arrays))).load(
        rank, framework="numpy"
    )
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == one.dtype, name
        assert np.array_equal(found[name], one), name
    return dict(found)


@lru_cache(maxsize=4)
def _plan(request: str, file: bytes) -> tonnage.Plan:
    return tonnage.open(file).plan(json.loads(request))


def load_rank(
    checkpoint: tonnage.Checkpoint, what: Any, rank: int, **options: Any
) -> dict[str, torch.Tensor]:
    """What a rank gets: by `rules="auto"` on a mesh, or by a model of DTensors."""
    return dict(checkpoint.plan(what, **options).load(rank, framework="torch"))
