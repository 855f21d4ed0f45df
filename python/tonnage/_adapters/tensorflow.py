"""TensorFlow tensors, made of NumPy's arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from .._dropin import Entries
from . import numpy as host
from ._rows import not_understood


class Adapter(host.Adapter):
    """Tensors on TensorFlow's default device."""

    ndarray = None

    def dtype(self, name: str) -> Any:
        dtype = host.dtype_of(name)
        try:
            tf.as_dtype(dtype)
        except TypeError:
            raise not_understood(name, "this version of tensorflow has no such dtype") from None
        return dtype

    def tensor(self, *parts: Any) -> Any:
        return tf.convert_to_tensor(host.array(*parts))


def to_numpy(tensor: Any) -> Any:
    """A tensor's or variable's values."""
    return np.asarray(tensor.numpy())


def entries(tensors: Mapping[str, Any]) -> Entries:
    """The tensors to be written."""
    return host.entries_of(tensors, to_numpy)
