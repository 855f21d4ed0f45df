"""TensorFlow tensors in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from . import _dropin, numpy  # noqa: F401
from ._adapters import tensorflow as _adapter
from ._dropin import Path
from ._native import safe_open  # noqa: F401

__all__ = ["load", "load_file", "save", "save_file"]


def save(tensors: Mapping[str, tf.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a file of these tensors."""
    return _dropin.save(_adapter.entries(tensors), metadata)


def save_file(
    tensors: Mapping[str, tf.Tensor],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None:
    """Writes a file of these tensors, replacing what was there whole or not at all.

    With `fsync`, the file survives a power cut once this has returned.
    """
    _dropin.save_file(_adapter.entries(tensors), filename, metadata, fsync)


def load(data: bytes) -> dict[str, tf.Tensor]:
    """The tensors of a file's content."""
    return _dropin.load(data, "tensorflow")


def load_file(filename: Path, *, backend: str = "mmap") -> dict[str, tf.Tensor]:
    """The tensors of a file."""
    return _dropin.load_file(filename, "tensorflow", backend=backend)


# Names that other packages take from the reference's module. No argument is changed.


def _np2tf(numpy_dict: Mapping[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.convert_to_tensor(value) for name, value in numpy_dict.items()}


def _tf2np(tf_dict: Mapping[str, tf.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tf_dict.items()}
