"""NumPy arrays in safetensors files, in any memory order.

Dtypes that NumPy lacks need the package `ml_dtypes`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _dropin
from ._adapters import numpy as _adapter
from ._adapters._rows import ROWS
from ._dropin import Path
from ._native import (  # noqa: F401
    TensorSpec,
    deserialize,
    safe_open,
    serialize,
    serialize_file,
)

__all__ = ["load", "load_file", "save", "save_file"]

_TYPES: dict[str, Any] = {
    name: np.dtype(row.numpy).type for name, row in ROWS.items() if row.numpy is not None
}


def save(tensor_dict: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a file of these arrays.

    ```python
    content = tonnage.numpy.save({"weight": np.zeros((512, 1024))}, metadata={"step": "1"})
    ```
    """
    return _dropin.save(_adapter.entries(tensor_dict), metadata)


def save_file(
    tensor_dict: dict[str, np.ndarray],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None:
    """Writes a file of these arrays, replacing what was there whole or not at all.

    With `fsync`, the file survives a power cut once this has returned.
    """
    _dropin.save_file(_adapter.entries(tensor_dict), filename, metadata, fsync)


def load(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file's content."""
    return _dropin.load(data, "numpy")


def load_file(filename: Path, *, backend: str = "mmap") -> dict[str, np.ndarray]:
    """The arrays of a file, each with memory of its own."""
    return _dropin.load_file(filename, "numpy", backend=backend)


# Names that other packages take from the reference's module.


def _getdtype(dtype_str: str) -> Any:
    return _TYPES[dtype_str] if dtype_str in _TYPES else _adapter.dtype_of(dtype_str)


def _view2np(safeview: list[tuple[str, dict[str, Any]]]) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(view["data"], dtype=_getdtype(view["dtype"])).reshape(view["shape"])
        for name, view in safeview
    }


def _is_little_endian(tensor: np.ndarray) -> bool:
    order = tensor.dtype.byteorder
    return order in ("<", "|") or (order == "=" and sys.byteorder == "little")


def _flatten(
    tensor_dict: dict[str, np.ndarray], keep_alive_buffer: list[Any]
) -> dict[str, TensorSpec]:
    return _dropin.fetched(_adapter.entries(tensor_dict), keep_alive_buffer)
