"""From what stands between `[` and `]` to what must be read, and what is done to it afterwards."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from tonnage import _errors

Range = tuple[int, int, int]


class Selection(NamedTuple):
    """A slice of a tensor."""

    #: `(start, stop, step)` a dimension with `step >= 1`: what is read.
    ranges: list[Range]
    #: The shape of what is read.
    shape: tuple[int, ...]
    #: The key that, applied to what was read, gives the result: drops the dimensions that an
    #: integer selected and reverses those with a negative step. `None` where nothing is left to do.
    after: tuple[int | slice, ...] | None
    #: Which dimensions must be reversed.
    reversed: tuple[int, ...]


def select(key: object, shape: tuple[int, ...], tensor: str) -> Selection:
    """What `tensor[key]` means for this shape: integers, slices, `...`, or a tuple of them.

    Raises `SliceError` (an `IndexError`) for too many indices or one out of range, `TypeError` for
    a key of another kind.
    """
    keys = _expand(key if isinstance(key, tuple) else (key,), shape, tensor)
    ranges: list[Range] = []
    after: list[int | slice] = []
    backwards: list[int] = []
    for axis, (item, extent) in enumerate(zip(keys, shape, strict=True)):
        if isinstance(item, slice):
            start, stop, step = _indices(item, extent, tensor)
            count = len(range(start, stop, step))
            if step < 0:
                backwards.append(axis)
                last = start + (count - 1) * step if count else 0
                start, stop, step = (last, start + 1, -step) if count else (0, 0, 1)
            ranges.append((start, max(start, stop), step) if count else (0, 0, 1))
            after.append(slice(None))
        else:
            at = _integer(item, axis, extent, tensor)
            ranges.append((at, at + 1, 1))
            after.append(0)
    taken = tuple(len(range(*found)) for found in ranges)
    plain = all(isinstance(item, slice) for item in after)
    return Selection(ranges, taken, None if plain else tuple(after), tuple(backwards))


def _expand(keys: tuple[object, ...], shape: tuple[int, ...], tensor: str) -> list[object]:
    """One key a dimension."""
    dots = sum(1 for item in keys if item is Ellipsis)
    given = len(keys) - dots
    if dots > 1:
        raise _errors.usage("an index can have one '...' only", "SLICE", tensor=tensor)
    if given > len(shape):
        text = f"{tensor}: {given} indices for a tensor of {len(shape)} dimensions, {list(shape)}"
        raise _errors.usage(text, "SLICE", tensor=tensor)
    at = next((i for i, item in enumerate(keys) if item is Ellipsis), len(keys))
    rest = [slice(None)] * (len(shape) - given)
    return [*keys[:at], *rest, *keys[at + dots :]]


def _indices(item: slice, extent: int, tensor: str) -> Range:
    try:
        return item.indices(extent)
    except ValueError as error:
        raise _errors.usage(f"{tensor}: {error}", "SLICE", tensor=tensor) from None


def _integer(item: Any, axis: int, extent: int, tensor: str) -> int:
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise TypeError(
            f"{tensor} can be indexed by integers, slices and '...', not {type(item).__name__}; "
            "read it first for anything else, with .numpy() or .torch()"
        )
    at = operator.index(item)
    if not -extent <= at < extent:
        text = f"{tensor}: index {at} is out of range for dimension {axis} of {extent}"
        raise _errors.usage(text, "SLICE", tensor=tensor, found=str(at))
    return at % extent


def trim(tensor: Any, selection: Selection, flip: Any) -> Any:
    """The result, from what was read. `flip(tensor, axes)` reverses dimensions."""
    if selection.reversed:
        tensor = flip(tensor, selection.reversed)
    return tensor if selection.after is None else tensor[selection.after]
