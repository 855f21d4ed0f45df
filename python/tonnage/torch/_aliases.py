"""Which tensors of a state are views of the same memory, and how each is found in it again.

What is written is one tensor for memory that several share: the one that holds all of it, if there
is one, else the memory itself. The others are windows: an offset into its bytes, a shape, strides.
Tensors that share a storage and no byte of it are written each for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._names import _find_shared_tensors

#: Memory that tensors of different dtypes view is written from a multiple of this many bytes on, so
#: that each begins at a whole element of it. No element is larger.
ALIGNMENT = 16


class Window(NamedTuple):
    """A view of the bytes of a tensor of the file."""

    #: A torch dtype's name.
    dtype: str
    #: Bytes from the base's first one to the view's first element.
    offset: int
    #: Extents and strides, in elements of `dtype`.
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    #: Bytes of the base, so that a window onto something else is noticed.
    length: int


class Place(NamedTuple):
    """Where a tensor's values stand in the file."""

    #: Position of the written tensor.
    base: int
    #: `None` where it is that tensor, dtype and shape.
    window: Window | None


def arrange(tensors: Sequence[Any]) -> tuple[list[Any], list[Place], dict[int, int]]:
    """What is written for these tensors, which are different objects.

    Returns the written tensors, the place of each given one among them, and for each written one
    that is no given tensor but the memory of several the position of the first that it stands for.
    """
    written: list[Any] = list(tensors)
    places = [Place(at, None) for at in range(len(tensors))]
    stands: dict[int, int] = {}
    named = {str(at): tensor for at, tensor in enumerate(tensors) if tensor.numel()}
    for names in _find_shared_tensors(named):
        if len(names) < 2:
            continue
        group = sorted(int(name) for name in names)
        start = min(tensors[at].data_ptr() for at in group)
        stop = max(_stop(tensors[at]) for at in group)
        whole = next((at for at in group if _covers(tensors[at], start, stop)), None)
        if whole is None or any(_odd(tensors[at], start) for at in group):
            whole = len(written)
            storage = tensors[group[0]].untyped_storage()
            start -= (start - storage.data_ptr()) % ALIGNMENT
            written.append(_memory(storage, tensors[group[0]].dtype, start, stop))
            stands[whole] = group[0]
        for at in group:
            if at != whole:
                places[at] = Place(whole, _window(tensors[at], written[whole], start))
    return written, places, stands


def _stop(tensor: Any) -> int:
    """One past the address of a tensor's last byte; it has one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum(int(extent - 1) * int(stride) for extent, stride in steps)
    return int(tensor.data_ptr()) + (last + 1) * int(tensor.element_size())


def _covers(tensor: Any, start: int, stop: int) -> bool:
    plain = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    return plain and int(tensor.data_ptr()) == start and _stop(tensor) == stop


def _odd(tensor: Any, start: int) -> bool:
    """Whether a tensor begins inside one of its elements, counted from there."""
    return bool((tensor.data_ptr() - start) % tensor.element_size())


def _memory(storage: Any, dtype: Any, start: int, stop: int) -> Any:
    """Bytes of a storage, as a tensor: elements where they are whole ones."""
    offset, length = start - storage.data_ptr(), stop - start
    if offset % dtype.itemsize or length % dtype.itemsize:
        dtype = torch.uint8
    unit = int(dtype.itemsize)
    return _viewing(storage, dtype, offset // unit, (length // unit,), (1,))


def _window(tensor: Any, base: Any, start: int) -> Window | None:
    lazy = tensor.is_conj() or tensor.is_neg()
    same = tensor.dtype == base.dtype and tensor.shape == base.shape and tensor.is_contiguous()
    if same and not lazy:
        # It begins where the base does: both are as long, and the base holds all of it.
        return None
    return Window(
        str(tensor.dtype).removeprefix("torch."),
        int(tensor.data_ptr()) - start,
        tuple(int(extent) for extent in tensor.shape),
        tuple(int(stride) for stride in tensor.stride()),
        int(base.nbytes),
    )


def look_through(base: Any, window: Window, dtype: Any) -> Any:
    """The view of a tensor's bytes; `misfit` was asked before."""
    size = int(dtype.itemsize)
    offset = base.storage_offset() * base.element_size() + window.offset
    if offset % size:
        raise ValueError("the bytes of the base begin between two elements of the view")
    storage = base.untyped_storage()
    return _viewing(storage, dtype, offset // size, window.shape, window.stride)


def _viewing(
    storage: Any, dtype: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Any:
    device = storage.device
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, shape, stride)


#: More dimensions than PyTorch's operations take.
MAX_DIMENSIONS = 64


def misfit(window: Window, size: int, base: int) -> str | None:
    """Why a window is not one onto a base of `base` bytes, with elements of `size` bytes."""
    if window.length != base:
        return f"it looks onto {window.length} bytes, and the tensor has {base}"
    if len(window.shape) != len(window.stride):
        return f"it has {len(window.shape)} extents and {len(window.stride)} strides"
    if len(window.shape) > MAX_DIMENSIONS:
        return f"it has {len(window.shape)} dimensions, more than {MAX_DIMENSIONS}"
    if window.offset < 0 or min((*window.shape, *window.stride), default=0) < 0:
        return "an offset, extent or stride is below zero"
    if window.offset % size:
        return f"its offset of {window.offset} bytes is no multiple of its element of {size}"
    count, last = 1, 0
    for extent, stride in zip(window.shape, window.stride, strict=True):
        count *= max(extent, 1)
        last += max(extent - 1, 0) * stride
    if count * size >= 1 << 63 or last * size >= 1 << 63:
        return "it has more elements than can be counted"
    needed = 0 if 0 in window.shape else (last + 1) * size
    if window.offset + needed > base:
        return f"it reaches to byte {window.offset + needed} of a tensor of {base}"
    return None
