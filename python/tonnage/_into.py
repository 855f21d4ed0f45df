"""Loading into tensors that exist: which fit, and which can be read into directly."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tonnage import _arrays, _dtypes
from tonnage._native import _castable

if TYPE_CHECKING:
    from tonnage._load import Item, Report


class Fit(NamedTuple):
    """A tensor of the checkpoint and the place that takes it."""

    item: Item
    place: Any
    #: The place's memory, to be read into; `None` where the tensor must be copied there.
    target: Any
    #: Who makes the tensor that is copied.
    arrays: _arrays.Arrays
    #: Its memory on a device that the engine writes to; `None` for others.
    device: OnDevice | None = None


class OnDevice(NamedTuple):
    """Memory on a device that a place lies in."""

    #: The engine's name for the device.
    id: str
    address: int
    #: From its first byte to its last, with gaps.
    nbytes: int
    #: How many rows lie apart, and bytes from one to the next; `None` where it has no gaps.
    rows: tuple[int, int] | None
    #: The stream in whose order the framework uses it; `None` where nobody says.
    stream: int | None


class _Place(NamedTuple):
    row: _dtypes.Row | None
    shape: tuple[int, ...]
    arrays: _arrays.Arrays
    #: Address and length of its memory where that can be read into, else `None`.
    memory: tuple[int, int] | None
    device: OnDevice | None = None


def match(places: Mapping[str, Any], items: Sequence[Item], report: Report) -> list[Fit]:
    """The tensors that have a fitting place. The others go into the report."""
    found: list[tuple[Item, Any, _Place]] = []
    for item in items:
        if item.name not in places:
            report.unexpected.append(item.name)
            continue
        value = places[item.name]
        place = _describe(item.name, value, item)
        why = _mismatch(item, place)
        if why is None:
            wanted = place.row or item.stored
            found.append((item._replace(wanted=wanted), value, place))
        else:
            report.mismatched.append((item.name, why))
    alone = _without_overlap([place.memory for *_, place in found])
    return [
        Fit(item, value, _target(value) if direct else None, place.arrays, place.device)
        for (item, value, place), direct in zip(found, alone, strict=True)
    ]


def _describe(name: str, value: Any, item: Item) -> _Place:
    kind = type(value).__module__.partition(".")[0]
    if kind == "torch" or hasattr(value, "data_ptr"):
        arrays = _arrays.arrays("torch")
        row = _dtypes.of_torch(value.dtype)
        plain = (
            value.device.type == "cpu"
            and value.is_contiguous()
            and str(value.layout).endswith("strided")
        )
        lazy = value.is_conj() or value.is_neg()
        memory = (value.data_ptr(), value.nbytes) if plain and not lazy else None
        shape = tuple(value.shape)
        if row is not None and row.name == "F4" and shape:
            shape = (*shape[:-1], shape[-1] * 2)
        return _Place(row, shape, arrays, memory, None if lazy else _of_torch(value))
    if hasattr(value, "__cuda_array_interface__"):
        return _of_cuda(value)
    if hasattr(value, "__array_interface__") and hasattr(value, "flags"):
        if not value.flags.writeable:
            raise TypeError(f"the array for {name} is read-only, so it cannot be loaded into")
        arrays = _arrays.arrays("numpy")
        row = _dtypes.of_numpy(value.dtype)
        plain = value.flags.c_contiguous and value.dtype.isnative and (row is None or row.bits >= 8)
        address = value.__array_interface__["data"][0]
        return _Place(row, tuple(value.shape), arrays, (address, value.nbytes) if plain else None)
    raise TypeError(
        f"the tensor for {name} is a {kind} {type(value).__name__}, which cannot be loaded into; "
        "PyTorch tensors and NumPy arrays can"
    )


def _of_torch(value: Any) -> OnDevice | None:
    """A PyTorch tensor's memory, where the engine can write to it."""
    if value.device.type != "cuda" or not str(value.layout).endswith("strided"):
        return None
    torch = importlib.import_module("torch")
    index = value.device.index
    kind = "rocm" if torch.version.hip else "cuda"
    found = _rows(tuple(value.shape), value.stride(), value.itemsize)
    if found is None or not value.nbytes:
        return None
    extent, rows = found
    stream = int(torch.cuda.current_stream(value.device).cuda_stream)
    return OnDevice(f"{kind}:{index}", value.data_ptr(), extent, rows, stream)


def _rows(
    shape: tuple[int, ...], strides: Sequence[int], unit: int
) -> tuple[int, tuple[int, int] | None] | None:
    """Bytes from the first to the last, and rows with the distance between them, of memory that has
    gaps in one dimension at most; `None` for any other.
    """
    step, inner = 1, 1
    rows: tuple[int, int] | None = None
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent == 1:
            continue
        if stride != step:
            if rows is not None or stride < step:
                return None
            rows = (1, stride * unit)
            inner = step
        if rows is not None:
            rows = (rows[0] * extent, rows[1])
        step = stride * extent
    if rows is None:
        return step * unit, None
    return (rows[0] - 1) * rows[1] + inner * unit, rows


def _of_cuda(value: Any) -> _Place:
    """An array of CuPy's or another's with `__cuda_array_interface__`."""
    interface = value.__cuda_array_interface__
    numpy = importlib.import_module("numpy")
    shape, dtype = tuple(interface["shape"]), numpy.dtype(interface["typestr"])
    address, readonly = interface["data"]
    strides = interface.get("strides") or contiguous(shape, dtype.itemsize)
    found = _rows(shape, [stride // dtype.itemsize for stride in strides], dtype.itemsize)
    if readonly or found is None:
        why = "is read-only" if readonly else "has gaps in several dimensions"
        raise TypeError(f"the {type(value).__name__} {why}, so it cannot be loaded into")
    index = getattr(getattr(value, "device", None), "id", 0)
    extent, rows = found
    memory = OnDevice(f"cuda:{index}", address, extent, rows, interface.get("stream"))
    return _Place(_dtypes.of_numpy(dtype), shape, _arrays.arrays("numpy"), None, memory)


def contiguous(shape: Sequence[int], unit: int) -> tuple[int, ...]:
    """Row-major strides."""
    strides, step = [], unit
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _mismatch(item: Item, place: _Place) -> str | None:
    if place.shape != item.shape:
        return f"shape {list(item.shape)} in the checkpoint, {list(place.shape)} in its place"
    if place.row is None:
        return "its place has a dtype that the format lacks"
    if place.row is item.stored or _castable(item.stored.name, place.row.name):
        return None
    return f"dtype {item.stored.name} in the checkpoint, {place.row.name} in its place"


def _without_overlap(memory: Sequence[tuple[int, int] | None]) -> list[bool]:
    """Which ranges of memory can be written by several threads: those that meet no other."""
    alone = [part is not None for part in memory]
    order = sorted((part[0], part[1], at) for at, part in enumerate(memory) if part and part[1])
    end, owner = -1, -1
    for start, length, at in order:
        if start < end:
            alone[at] = alone[owner] = False
        if start + length > end:
            end, owner = start + length, at
    return alone


def _target(value: Any) -> Any:
    return _arrays.memory_of(value) if hasattr(value, "data_ptr") else _arrays.bytes_of(value)


def copy(place: Any, tensor: Any) -> None:
    """Copies a tensor into its place, whatever its device and strides."""
    if hasattr(place, "data_ptr"):
        # Parameters take no part in autograd here.
        place.detach().copy_(tensor)
    else:
        place[...] = tensor
