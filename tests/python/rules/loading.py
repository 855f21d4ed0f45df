"""A rank's tensors by way of a request."""

from __future__ import annotations

from typing import Any

import reference
import tonnage
import torch
from tonnage._rules import hf


def load_rank(
    checkpoint: tonnage.Checkpoint, mesh: tonnage.Mesh, rank: int, **options: Any
) -> dict[str, torch.Tensor]:
    """What `rules="auto"` gives a rank."""
    request = hf.request(checkpoint, mesh, **options)
    arrays = checkpoint.load(framework="numpy")
    found = reference.load(request, arrays, rank)
    return {name: torch.from_numpy(value.copy()) for name, value in found.items()}
