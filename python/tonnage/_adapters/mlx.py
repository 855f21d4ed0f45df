"""MLX arrays, made of NumPy's. No buffer can say bfloat16, so it crosses as 16-bit words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from .._dropin import Entries
from . import numpy as host
from ._rows import ROWS, not_understood


class Adapter(host.Adapter):
    """Arrays in unified memory."""

    ndarray = None

    def dtype(self, name: str) -> Any:
        row = ROWS[name]
        if name == "BF16":
            return np.dtype(np.uint16), mx.bfloat16
        if row.numpy is None or not (hasattr(mx, row.numpy) or name == "BOOL"):
            raise not_understood(name, "this version of mlx has no such dtype")
        return np.dtype(row.numpy), None

    def tensor(self, *parts: Any) -> Any:
        buffer, (words, real), *place = parts
        array = mx.array(host.array(buffer, words, *place))
        return array if real is None else array.view(real)


def to_numpy(array: Any) -> Any:
    """An array's values."""
    if getattr(array, "dtype", None) == mx.bfloat16:
        return np.asarray(array.view(mx.uint16)).view(host.dtype_of("BF16"))
    return np.asarray(array)


def entries(tensors: Mapping[str, Any]) -> Entries:
    """The arrays to be written."""
    return host.entries_of(tensors, to_numpy)
