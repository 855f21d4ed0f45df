"""From local tensors to bytes of shared files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .._adapters import torch as _adapter
from .._native import _SharedFile
from . import _boxes

#: Bytes of a tensor that come to the host at a time, where they are not there.
STAGED = 16 << 20
#: A box of a tensor of another device is cut into such parts: offset and size.
Part = tuple[tuple[int, ...], tuple[int, ...]]


class Put(NamedTuple):
    """A box of a local tensor, and where it belongs."""

    #: The box's elements, in memory or on a device.
    tensor: torch.Tensor
    #: Its first index in the whole tensor.
    offset: tuple[int, ...]
    #: The whole tensor's extents.
    shape: tuple[int, ...]
    #: The whole tensor's first byte in the file.
    at: int


def write(file: _SharedFile, puts: Iterable[Put], threads: int | None = None) -> int:
    """Writes boxes; those in the host's memory straight from there, others through a staging
    buffer. Says how many bytes.
    """
    here: list[Put] = []
    elsewhere: list[Put] = []
    for put in puts:
        (here if _adapter.reachable(put.tensor) else elsewhere).append(put)
    written = file.write([_patch(put) for put in here], threads) if here else 0
    buffer = None
    for put in elsewhere:
        if buffer is None:
            pinned = put.tensor.device.type == "cuda"
            buffer = torch.empty(STAGED, dtype=torch.uint8, pin_memory=pinned)
        for staged in _staged(put, buffer):
            written += file.write([_patch(staged)], threads)
    return written


def _patch(put: Put) -> Any:
    tensor, unit = put.tensor, put.tensor.element_size()
    size, strides = tuple(tensor.shape), [step * unit for step in tensor.stride()]
    nbytes = 0
    if tensor.numel():
        last = sum((extent - 1) * step for extent, step in zip(size, strides, strict=True))
        nbytes = last + unit
    address = tensor.data_ptr() if nbytes else 0
    return (address, nbytes, strides, put.offset, size, put.shape, unit, put.at)


def _staged(put: Put, buffer: torch.Tensor) -> Iterator[Put]:
    """The parts of a box, each brought to the host in its turn."""
    unit = put.tensor.element_size()
    for offset, size in parts(tuple(put.tensor.shape), unit, STAGED):
        part = narrow(put.tensor, offset, size)
        if unit == 1:
            # Not every dtype of one byte can be copied as what it is.
            part = part.view(torch.uint8)
        count = _boxes.elements(size)
        host = buffer[: count * unit].view(part.dtype).view(size)
        host.copy_(_adapter.plain(part) if part.device.type == "cpu" else part)
        at = tuple(a + b for a, b in zip(put.offset, offset, strict=True))
        yield Put(host, at, put.shape, put.at)


def parts(size: tuple[int, ...], unit: int, limit: int) -> Iterator[Part]:
    """Cuts a box into boxes of at most so many bytes, in the order of its rows."""
    if _boxes.elements(size) * unit <= limit:
        yield (0,) * len(size), size
        return
    row = _boxes.elements(size[1:]) * unit
    rows = max(limit // row, 1) if row else size[0]
    for begin in range(0, size[0], rows):
        count = min(rows, size[0] - begin)
        if row <= limit:
            yield (begin, *((0,) * (len(size) - 1))), (count, *size[1:])
            continue
        for offset, rest in parts(size[1:], unit, limit):
            yield (begin, *offset), (count, *rest)


def narrow(tensor: torch.Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    """A box of a tensor; no copy."""
    for dim, (begin, extent) in enumerate(zip(offset, size, strict=True)):
        if (begin, extent) != (0, tensor.shape[dim]):
            tensor = tensor.narrow(dim, begin, extent)
    return tensor


def header_dtype(tensor: torch.Tensor, name: str) -> tuple[str, int]:
    """The name of a tensor's dtype in a header, and how many of its elements PyTorch counts as
    one.
    """
    return named_dtype(tensor.dtype, name)


def named_dtype(dtype: torch.dtype, name: str) -> tuple[str, int]:
    """The same of a dtype."""
    known = _NAMES.get(dtype)
    if known is None:
        raise TypeError(f"{name}: a file has no form for {dtype}")
    return known, 2 if known == "F4" else 1


_NAMES = {dtype: name for name, dtype in _adapter.TYPES.items()}
