"""Paddle tensors, over buffers that they keep alive."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle

from .._dropin import Entries, Specs
from .._native import TensorSpec
from ._rows import ROWS, not_understood

# Paddle has no kernels for these.
_LACKING = ("U32", "U64", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# Header name → paddle dtype. Paddle calls bfloat16 uint16 where it meets NumPy; files hold both.
TYPES: dict[str, Any] = {
    row.name: getattr(paddle, row.torch)
    for row in ROWS.values()
    if row.torch is not None and row.name not in _LACKING and hasattr(paddle, row.torch)
}
TYPES["U16"] = paddle.bfloat16
SIZE: dict[Any, int] = {
    TYPES[row.name]: row.bits // 8 for row in ROWS.values() if row.name in TYPES
}


class Adapter:
    """Tensors on one device."""

    maps = False
    reads = True
    packed = True
    indexes = True
    ndarray = None
    empty = None
    placed = None

    def __init__(self, device: str | int) -> None:
        device = str(device)
        self.device = "gpu:0" if device == "cuda" else device.replace("cuda:", "gpu:")

    def dtype(self, name: str) -> Any:
        if name not in TYPES:
            raise not_understood(name, "this version of paddle has no such dtype")
        return TYPES[name]

    def tensor(
        self, buffer: Any, dtype: Any, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> Any:
        if nbytes:
            tensor = paddle.base.core.frombuffer(buffer, dtype).reshape(shape)
        else:
            tensor = paddle.empty(shape, dtype=dtype)
        return tensor if self.device == "cpu" else tensor.to(self.device)


def spec(tensor: Any, address: int) -> TensorSpec:
    """What is to be written for a tensor, its bytes at `address`."""
    name = str(tensor.dtype).rpartition(".")[2]
    nbytes = tensor.element_size() * int(np.prod(tensor.shape))
    return TensorSpec(dtype=name, shape=tensor.shape, data_ptr=address, data_len=nbytes)


def plain(tensor: Any) -> Any:
    """The tensor on the host, and its bytes' owner."""
    host = tensor.detach().cpu().contiguous()
    if sys.byteorder == "big":
        words = host.view("uint8").reshape([-1, host.element_size()])
        host = paddle.flip(words, axis=[1]).contiguous()
    return host


def entries(tensors: Mapping[str, Any]) -> Entries:
    """The tensors to be written; they were checked before."""
    little = sys.byteorder == "little"
    specs: Specs = {
        name: spec(tensor, tensor.data_ptr() if little and tensor.place.is_cpu_place() else 0)
        for name, tensor in tensors.items()
    }

    def fetch(name: str) -> tuple[TensorSpec, object]:
        host = plain(tensors[name])
        return spec(tensors[name], host.data_ptr()), host

    return specs, fetch
