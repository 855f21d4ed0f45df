"""A rank's tensors by way of a request."""

from __future__ import annotations

from typing import Any

import reference
import tonnage
import torch
from tonnage import _rules


def load_rank(
    checkpoint: tonnage.Checkpoint, what: Any, rank: int, **options: Any
) -> dict[str, torch.Tensor]:
    """What a rank gets: by `rules="auto"` on a mesh, or by a model of DTensors."""
    request = _rules.request(checkpoint, what, **options)
    arrays = checkpoint.load(framework="numpy")
    found = reference.load(request, arrays, rank)
    return {name: torch.from_numpy(value.copy()) for name, value in found.items()}
