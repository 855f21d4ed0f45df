"""NumPy arrays; dtypes that NumPy lacks come from `ml_dtypes`, which keeps one element a byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._dropin import Entries, Specs
from .._native import TensorSpec, _pack
from ._rows import ROWS, not_understood

_SUB_BYTE = {row.ml_dtypes: row.bits for row in ROWS.values() if row.bits < 8}


def dtype_of(name: str) -> Any:
    """NumPy's dtype for a header's dtype name."""
    row = ROWS[name]
    try:
        # `ml_dtypes` registers its names with NumPy once anything imported it.
        return np.dtype(row.numpy or row.ml_dtypes)
    except TypeError:
        pass
    try:
        import ml_dtypes
    except ImportError:
        raise not_understood(name, "numpy needs the package ml_dtypes for it") from None
    if not hasattr(ml_dtypes, row.ml_dtypes or ""):
        raise not_understood(name, "this version of ml_dtypes has no such dtype")
    return np.dtype(getattr(ml_dtypes, row.ml_dtypes or ""))


def array(buffer: Any, dtype: Any, shape: tuple[int, ...], offset: int, nbytes: int) -> Any:
    """An array over a buffer's memory, which it keeps alive."""
    return np.ndarray(shape, dtype, buffer, offset)


class Adapter:
    """Arrays in host memory."""

    maps = False
    reads = True
    packed = False
    indexes = False
    # No call of Python code for an array: files of small tensors feel it.
    ndarray: Any = np.ndarray
    empty = None
    placed = None

    def __init__(self, device: str | int) -> None:
        """The host is the only device."""

    def dtype(self, name: str) -> Any:
        return dtype_of(name)

    def tensor(self, *parts: Any) -> Any:
        """`array` of the same arguments; other frameworks go on from it."""
        return array(*parts)


def plain(value: Any) -> Any:
    """The array as its bytes should be written: contiguous, little-endian."""
    little = value.dtype.newbyteorder("<")
    return np.array(value, dtype=little, order="C", copy=None)


def address(value: Any) -> int:
    """Where a contiguous array's bytes are."""
    return int(value.__array_interface__["data"][0]) if value.nbytes else 0


_KINDS: dict[Any, tuple[str, bool]] = {}


def kind(dtype: Any) -> tuple[str, bool]:
    """A dtype's name and whether it is little-endian. NumPy makes the name anew each time."""
    found = _KINDS.get(dtype)
    if found is None:
        found = (dtype.name, dtype.newbyteorder("<") == dtype)
        # Structured dtypes, of which there could be any number, are never saved.
        if dtype.fields is None:
            _KINDS[dtype] = found
    return found


def spec(value: Any, at: int) -> TensorSpec:
    """What is to be written for an array, its bytes at `at`."""
    name, _ = kind(value.dtype)
    bits = _SUB_BYTE.get(name)
    nbytes = value.nbytes if bits is None else value.size * bits // 8
    return TensorSpec(dtype=name, shape=value.shape, data_ptr=at, data_len=nbytes)


def fetched(value: Any) -> tuple[TensorSpec, object]:
    """The spec of an array with its bytes at hand, and what keeps them."""
    host = plain(value)
    bits = _SUB_BYTE.get(host.dtype.name)
    if bits is not None:
        host = np.frombuffer(_pack(host.tobytes(), bits), np.uint8)
    return spec(value, address(host)), host


def entries(tensors: Mapping[str, Any]) -> Entries:
    """The arrays to be written."""
    specs: Specs = {}
    for name, value in tensors.items():
        if not isinstance(value, np.ndarray | np.generic):
            found = type(value)
            raise TypeError(f"Key `{name}` is invalid, expected numpy.ndarray but received {found}")
        dtype, little = kind(value.dtype)
        direct = isinstance(value, np.ndarray) and value.flags.c_contiguous and little
        at_hand = direct and dtype not in _SUB_BYTE
        specs[name] = spec(value, address(value) if at_hand else 0)
    return specs, lambda name: fetched(tensors[name])


def entries_of(tensors: Mapping[str, Any], to_numpy: Callable[[Any], Any]) -> Entries:
    """Another framework's tensors to be written, each converted when its turn comes."""
    specs: Specs = {}
    for name, value in tensors.items():
        known = isinstance(getattr(value, "dtype", None), np.dtype) and hasattr(value, "nbytes")
        specs[name] = spec(value if known else to_numpy(value), 0)
    return specs, lambda name: fetched(to_numpy(tensors[name]))
