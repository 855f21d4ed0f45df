"""Tensors of a framework that the paved path makes and fills: one small class a framework.

A class makes an empty tensor together with the memory behind it, which the native side fills in
place, so that a byte is copied once, from the file to where the user's tensor lies.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from math import prod
from typing import Any, NamedTuple

from tonnage import _errors
from tonnage._dtypes import ROWS, Row
from tonnage._native import _unpack

Shape = tuple[int, ...]


class Slot(NamedTuple):
    """A tensor to be filled."""

    #: What `Arrays.finish` turns into the tensor.
    holder: Any
    #: Its memory: writable, contiguous, in bytes.
    target: Any
    #: Whether sub-byte elements lie one a byte there.
    spread: bool


class Arrays:
    """How one framework's tensors are made."""

    name = ""
    #: Whether elements smaller than a byte take one each.
    spreads = False

    def empty(self, row: Row, shape: Shape) -> Slot:
        """An uninitialised tensor of `shape`, which counts elements."""
        raise NotImplementedError

    def finish(self, slot: Slot, row: Row, shape: Shape) -> Any:
        """The tensor of a slot that has been filled."""
        return slot.holder

    def of_buffer(self, buffer: Any, row: Row, shape: Shape) -> Any:
        """A tensor that views `buffer`, or `None` where this framework can't view it."""
        return None

    def of_memory(self, memory: memoryview, row: Row, shape: Shape) -> Any:
        """A tensor of filled memory, which is kept where this framework can view it."""
        tensor = None if row.bits < 8 and self.spreads else self.of_buffer(memory, row, shape)
        if tensor is not None:
            return tensor
        slot = self.empty(row, shape)
        filled = _unpack(bytes(memory), row.bits) if slot.spread else memory
        memoryview(slot.target).cast("B")[:] = filled
        return self.finish(slot, row, shape)

    def flip(self, tensor: Any, axes: tuple[int, ...]) -> Any:
        """The tensor with these dimensions reversed."""
        key = tuple(slice(None, None, -1 if axis in axes else 1) for axis in range(tensor.ndim))
        return tensor[key]

    def put(self, tensor: Any, device: object) -> Any:
        """The tensor on a device. Only PyTorch has devices other than the host here."""
        if str(device) == "cpu":
            return tensor
        raise _errors.make(
            "Device", f"{self.name} tensors can be put on 'cpu' only, not {device}", code="DEVICE"
        )

    def shadow(self, row: Row, shape: Shape) -> Any:
        """A tensor without memory: shape and dtype only."""
        return self.put(None, "meta")

    def lacks(self, row: Row) -> _errors.TonnageError:
        """The error for a dtype that this framework has no name for."""
        text = f"{self.name} has no dtype for {row.name}; framework='numpy' with ml_dtypes has"
        return _errors.make("Unsupported", text, code="UNSUPPORTED_DTYPE", found=row.name)


class NumpyArrays(Arrays):
    """NumPy, with `ml_dtypes` for the dtypes that it lacks. Sub-byte elements take one byte
    each.
    """

    name = "numpy"
    spreads = True

    def __init__(self) -> None:
        self._numpy = importlib.import_module("numpy")
        self._dtypes: dict[str, Any] = {}

    def dtype(self, row: Row) -> Any:
        """The NumPy dtype of a row."""
        found = self._dtypes.get(row.name)
        if found is None:
            if row.numpy:
                found = self._numpy.dtype(row.numpy)
            else:
                try:
                    module = importlib.import_module("ml_dtypes")
                    found = self._numpy.dtype(getattr(module, row.ml_dtypes or ""))
                except (ImportError, AttributeError) as error:
                    text = f"{row.name} as a NumPy array needs the ml_dtypes package"
                    raise _errors.make("Unsupported", text, code="UNSUPPORTED_DTYPE") from error
            self._dtypes[row.name] = found
        return found

    def empty(self, row: Row, shape: Shape) -> Slot:
        array = self._numpy.empty(shape, self.dtype(row))
        _small_pages(array.__array_interface__["data"][0], array.nbytes)
        return Slot(array, bytes_of(array), row.bits < 8)

    def of_buffer(self, buffer: Any, row: Row, shape: Shape) -> Any:
        if row.bits < 8:
            return None
        return self._numpy.frombuffer(buffer, self.dtype(row)).reshape(shape)


def bytes_of(array: Any) -> Any:
    """The memory of a C-contiguous NumPy array as bytes."""
    return array.reshape(-1).view("uint8")


class TorchArrays(Arrays):
    """PyTorch. `F4` is `float4_e2m1fn_x2`, which packs two elements: the last extent is halved."""

    name = "torch"

    def __init__(self) -> None:
        self._torch = importlib.import_module("torch")

    def dtype(self, row: Row) -> Any:
        """The `torch.dtype` of a row."""
        found = getattr(self._torch, row.torch, None) if row.torch else None
        if found is None:
            raise self.lacks(row)
        return found

    def extents(self, row: Row, shape: Shape) -> Shape:
        """The shape in PyTorch's count."""
        if row.name != "F4":
            return shape
        if not shape or shape[-1] % 2:
            text = (
                "f4_x2 dtype requires that the last dim be divisible by 2 in torch: "
                f"got {list(shape)}"
            )
            raise _errors.make("Unsupported", text, code="PARTIAL_BYTE")
        return (*shape[:-1], shape[-1] // 2)

    def empty(self, row: Row, shape: Shape) -> Slot:
        extents, dtype = self.extents(row, shape), self.dtype(row)
        if row.bits >= 8:
            tensor = self._torch.empty(extents, dtype=dtype)
        else:
            tensor = self._torch.empty(prod(extents), dtype=self._torch.uint8)
            tensor = tensor.view(dtype).reshape(extents)
        count = tensor.nbytes
        if not count:
            return Slot(tensor, bytearray(), False)
        address = tensor.data_ptr()
        # Without NumPy, which PyTorch can do without.
        return Slot(tensor, _memory_at(address, count, _WRITABLE), False)

    def of_buffer(self, buffer: Any, row: Row, shape: Shape) -> Any:
        extents, dtype = self.extents(row, shape), self.dtype(row)
        if memoryview(buffer).readonly:
            return None
        if not len(buffer):
            return self._torch.empty(extents, dtype=dtype)
        flat = self._torch.frombuffer(buffer, dtype=self._torch.uint8)
        if flat.data_ptr() % max(1, row.bits // 8):
            return None
        return flat.view(dtype).reshape(extents)

    def shadow(self, row: Row, shape: Shape) -> Any:
        return self._torch.empty(self.extents(row, shape), dtype=self.dtype(row), device="meta")

    def flip(self, tensor: Any, axes: tuple[int, ...]) -> Any:
        return tensor.flip(axes)

    def put(self, tensor: Any, device: object) -> Any:
        return tensor if str(device) == "cpu" else tensor.to(device)


_WRITABLE = 0x200  # PyBUF_WRITE
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.restype = ctypes.py_object
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


def memory_of(tensor: Any) -> Any:
    """The memory of a contiguous PyTorch tensor on the host, as bytes."""
    count = tensor.nbytes
    return _memory_at(tensor.data_ptr(), count, _WRITABLE) if count else bytearray()


#: From this size on NumPy asks for huge pages.
_LARGE = 4 << 20
_PAGE = 4096
_MADV_NOHUGEPAGE = 15


def _small_pages(address: int, count: int) -> None:
    """Takes back the wish for huge pages, which is only a hint.

    In a virtual machine whose host takes free memory back, the first touch of a huge page that was
    given back costs milliseconds: 1 GiB took 1.2 s in huge pages and 0.4 s in small ones.
    """
    if _madvise is not None and count >= _LARGE:
        start = -(-address // _PAGE) * _PAGE
        _madvise(start, (address + count - start) // _PAGE * _PAGE, _MADV_NOHUGEPAGE)


def _find_madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


_madvise = _find_madvise()


class AdaptedArrays(Arrays):
    """The other frameworks, through the drop-in's adapters: they make a tensor of filled memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._numpy = importlib.import_module("numpy")
        module = importlib.import_module(f"tonnage._adapters.{name}")
        self._adapter = module.Adapter("cpu")
        self.spreads = not self._adapter.packed
        self._dtypes: dict[str, Any] = {}

    def empty(self, row: Row, shape: Shape) -> Slot:
        if row.name not in self._dtypes:
            self._dtypes[row.name] = self._adapter.dtype(row.name)
        spread = row.bits < 8 and self.spreads
        count = prod(shape) if spread else prod(shape) * row.bits // 8
        memory = self._numpy.empty(count, "uint8")
        return Slot(memory, memory, spread)

    def finish(self, slot: Slot, row: Row, shape: Shape) -> Any:
        dtype = self._dtypes[row.name]
        return self._adapter.tensor(slot.holder, dtype, shape, 0, len(slot.holder))


_NAMES = {
    "pt": "torch",
    "pytorch": "torch",
    "np": "numpy",
    "tf": "tensorflow",
    "flax": "jax",
}
_MADE: dict[str, Arrays] = {}
_KNOWN = ("torch", "numpy", "jax", "tensorflow", "mlx", "paddle", "cupy", "tonnage")


def canonical(framework: str | None) -> str | None:
    """A framework's own name; `None` for the default. Raises `UsageError` for a name that is
    none.
    """
    if framework is None:
        return None
    name = _NAMES.get(framework, framework)
    if name not in _KNOWN:
        text = f"framework {framework!r} is not known; known are {', '.join(_KNOWN)}"
        raise _errors.usage(text, "FRAMEWORK")
    return name


def numpy_of(tensor: Any) -> Any:
    """A `DeviceTensor` as a NumPy array on the host."""
    made, row = arrays("numpy"), ROWS[tensor.dtype]
    return made.of_memory(memoryview(bytearray(tensor.tobytes())), row, tensor.shape)


def arrays(framework: str | None) -> Arrays:
    """The arrays of a framework; `None` means PyTorch if the process has imported it, else NumPy.

    Raises `UsageError` for a name that is none, `ImportError` where the framework is not installed.
    """
    if framework is None:
        framework = "torch" if "torch" in sys.modules else "numpy"
    name = _NAMES.get(framework, framework)
    made = _MADE.get(name)
    if made is None:
        if name == "torch":
            made = TorchArrays()
        elif name == "numpy":
            made = NumpyArrays()
        elif name in ("jax", "tensorflow", "mlx", "paddle"):
            made = AdaptedArrays(name)
        else:
            canonical(framework)
            text = f"{name} has no tensors in host memory; known there are {', '.join(_KNOWN[:-2])}"
            raise _errors.usage(text, "FRAMEWORK")
        _MADE[name] = made
    return made


def row_of(name: str, tensor: str | None = None) -> Row:
    """The row of a header's dtype name, or `UnsupportedError` for a dtype that is not in the
    table.
    """
    row = ROWS.get(name)
    if row is None:
        text = f"dtype {name} is not known to this version" + (
            f" (tensor {tensor})" if tensor else ""
        )
        raise _errors.make(
            "Unsupported", text, code="UNSUPPORTED_DTYPE", clause="5.2", tensor=tensor, found=name
        )
    return row
