"""MLX arrays in safetensors files, bfloat16 included."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from . import _dropin, numpy  # noqa: F401
from ._adapters import mlx as _adapter
from ._dropin import Path
from ._native import safe_open  # noqa: F401

__all__ = ["load", "load_file", "save", "save_file"]


def save(tensors: Mapping[str, mx.array], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a file of these tensors."""
    return _dropin.save(_adapter.entries(tensors), metadata)


def save_file(
    tensors: Mapping[str, mx.array],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None:
    """Writes a file of these tensors, replacing what was there whole or not at all.

    With `fsync`, the file survives a power cut once this has returned.
    """
    _dropin.save_file(_adapter.entries(tensors), filename, metadata, fsync)


def load(data: bytes) -> dict[str, mx.array]:
    """The tensors of a file's content."""
    return _dropin.load(data, "mlx")


def load_file(filename: Path, *, backend: str = "mmap") -> dict[str, mx.array]:
    """The tensors of a file."""
    return _dropin.load_file(filename, "mlx", backend=backend)


# Names that other packages take from the reference's module. No argument is changed.


def _np2mx(numpy_dict: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in numpy_dict.items()}


def _mx2np(mx_dict: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: _adapter.to_numpy(value) for name, value in mx_dict.items()}
