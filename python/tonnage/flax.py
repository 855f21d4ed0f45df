"""JAX arrays in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _dropin, numpy  # noqa: F401
from ._adapters import jax as _adapter
from ._dropin import Path
from ._native import safe_open  # noqa: F401

__all__ = ["load", "load_file", "save", "save_file"]


def save(tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a file of these tensors."""
    return _dropin.save(_adapter.entries(tensors), metadata)


def save_file(
    tensors: Mapping[str, Array],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None:
    """Writes a file of these tensors, replacing what was there whole or not at all.

    With `fsync`, the file survives a power cut once this has returned.
    """
    _dropin.save_file(_adapter.entries(tensors), filename, metadata, fsync)


def load(data: bytes) -> dict[str, Array]:
    """The tensors of a file's content."""
    return _dropin.load(data, "jax")


def load_file(filename: Path, *, backend: str = "mmap") -> dict[str, Array]:
    """The tensors of a file."""
    return _dropin.load_file(filename, "jax", backend=backend)


# Names that other packages take from the reference's module. No argument is changed.


def _np2jnp(numpy_dict: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {name: jnp.array(value) for name, value in numpy_dict.items()}


def _jnp2np(jnp_dict: Mapping[str, Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in jnp_dict.items()}
