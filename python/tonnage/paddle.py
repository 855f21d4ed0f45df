"""Paddle tensors in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle

from . import _dropin, numpy  # noqa: F401
from ._adapters import paddle as _adapter
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


def save(tensors: dict[str, paddle.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a file of these tensors, which must be contiguous."""
    return _dropin.save(_entries(tensors), metadata)


def save_file(
    tensors: dict[str, paddle.Tensor],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None:
    """Writes a file of these tensors, replacing what was there whole or not at all.

    With `fsync`, the file survives a power cut once this has returned.
    """
    _dropin.save_file(_entries(tensors), filename, metadata, fsync)


def load(data: bytes, device: str = "cpu") -> dict[str, paddle.Tensor]:
    """The tensors of a file's content."""
    return _dropin.load(data, "paddle", device)


def load_file(
    filename: Path, device: str = "cpu", *, backend: str = "mmap"
) -> dict[str, paddle.Tensor]:
    """The tensors of a file, each with memory of its own."""
    return _dropin.load_file(filename, "paddle", device, backend)


def _check(tensors: dict[str, paddle.Tensor]) -> None:
    _dropin.check_types(tensors, paddle.Tensor, "paddle.Tensor")
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(_dropin.not_contiguous(name))


def _entries(tensors: dict[str, paddle.Tensor]) -> _dropin.Entries:
    _check(tensors)
    return _adapter.entries(tensors)


# Names that other packages take from the reference's module. No argument is changed.

_TYPES: dict[str, Any] = _adapter.TYPES
_SIZE: dict[Any, int] = _adapter.SIZE
NPDTYPES: dict[Any, Any] = {
    dtype: np.dtype(ROWS[name].numpy or ("uint16" if ROWS[name].bits == 16 else "uint8"))
    for name, dtype in _TYPES.items()
}


def _getdtype(dtype_str: str) -> Any:
    return _TYPES[dtype_str]


def _np2paddle(
    numpy_dict: Mapping[str, np.ndarray], device: str = "cpu"
) -> dict[str, paddle.Tensor]:
    return {name: paddle.to_tensor(value, place=device) for name, value in numpy_dict.items()}


def _paddle2np(paddle_dict: Mapping[str, paddle.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in paddle_dict.items()}


def _view2paddle(
    safeview: list[tuple[str, dict[str, Any]]], device: str
) -> dict[str, paddle.Tensor]:
    adapter = _adapter.Adapter(device)
    return {
        name: adapter.tensor(
            view["data"], _getdtype(view["dtype"]), view["shape"], 0, len(view["data"])
        )
        for name, view in safeview
    }


def _to_ndarray(tensor: paddle.Tensor, name: str) -> tuple[np.ndarray, paddle.Tensor]:
    _check({name: tensor})
    host = _adapter.plain(tensor)
    return host.view("uint8").numpy().reshape(-1), host


def _flatten(
    tensors: dict[str, paddle.Tensor], keep_alive_buffer: list[Any]
) -> dict[str, TensorSpec]:
    keep_alive_buffer.append(list(tensors.values()))
    return _dropin.fetched(_entries(tensors), keep_alive_buffer)
