"""PyTorch tensors."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .._dropin import Entries, Specs
from .._native import TensorSpec, _Region
from ._rows import ROWS, not_understood

# Header name → torch dtype, for the dtypes that this torch has.
TYPES: dict[str, Any] = {
    row.name: getattr(torch, row.torch)
    for row in ROWS.values()
    if row.torch is not None and hasattr(torch, row.torch)
}
# torch dtype → bytes of one unit; float4_e2m1fn_x2 holds two elements in its byte.
SIZE: dict[Any, int] = {dtype: max(ROWS[name].bits // 8, 1) for name, dtype in TYPES.items()}

_LITTLE = sys.byteorder == "little"


def view(buffer: Any, dtype: Any, shape: tuple[int, ...], offset: int, nbytes: int) -> Any:
    """A tensor over a buffer's memory, which it keeps alive."""
    if not nbytes:
        return torch.empty(shape, dtype=dtype, device="cpu")
    count = nbytes // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)


class Adapter:
    """Tensors on one device."""

    packed = True
    indexes = True
    ndarray = None

    def __init__(self, device: str | int) -> None:
        self.maps = device == "cpu"
        self.reads = device != "meta"
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        self.device = device
        # Page-locked memory, from which a GPU copies at full speed.
        self.pinned = isinstance(device, str) and device.startswith("cuda")
        self.placed = None if self.maps else self.place
        self.tensor = view if self.maps else self.elsewhere

    def dtype(self, name: str) -> Any:
        if name not in TYPES:
            raise not_understood(name, "this version of torch has no such dtype")
        return TYPES[name]

    def empty(self, dtype: Any, shape: tuple[int, ...]) -> tuple[Any, int]:
        """A tensor in host memory to read into, and its address."""
        tensor = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self.pinned)
        return tensor, tensor.data_ptr()

    def place(self, tensor: Any) -> Any:
        """A tensor that was filled in host memory, on its device."""
        return tensor.to(self.device)

    def elsewhere(
        self, buffer: Any, dtype: Any, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> Any:
        """A tensor without bytes, on another device."""
        return torch.empty(shape, dtype=dtype, device=self.device)


def plain(tensor: Any) -> Any:
    """The tensor as its bytes should be written: on the host, nothing lazy about it."""
    tensor = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    if not _LITTLE:
        swapped = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        unit = swapped.element_size()
        tensor = swapped.contiguous().view(torch.uint8).reshape(-1, unit).flip(1).contiguous()
    return tensor


def reachable(tensor: Any) -> bool:
    """Whether its elements lie in the host's memory as they should be written, by its strides."""
    lazy = tensor.is_conj() or tensor.is_neg()
    return _LITTLE and tensor.device.type == "cpu" and not lazy


def _at_hand(tensor: Any) -> bool:
    return reachable(tensor) and tensor.is_contiguous()


def spec(tensor: Any, address: int) -> TensorSpec:
    """What is to be written for a tensor, its bytes at `address`."""
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(dtype=name, shape=tensor.shape, data_ptr=address, data_len=tensor.nbytes)


#: Smaller tensors of a device come to the host whole.
STREAMED = 1 << 20


def on_device(tensor: Any) -> Any:
    """A large tensor's memory on a GPU, from which it is written block by block; `None` where it
    has to come to the host first.
    """
    plain_there = tensor.device.type == "cuda" and tensor.is_contiguous() and _LITTLE
    if not plain_there or tensor.nbytes < STREAMED or tensor.is_conj() or tensor.is_neg():
        return None
    kind = "rocm" if torch.version.hip else "cuda"
    stream = int(torch.cuda.current_stream(tensor.device).cuda_stream)
    device = f"{kind}:{tensor.device.index}"
    return _Region.adopt(device, tensor.data_ptr(), tensor.nbytes, tensor, stream)


def entries(tensors: dict[str, Any]) -> Entries:
    """The tensors to be written; they were checked before."""
    specs: Specs = {
        name: spec(tensor, tensor.data_ptr() if _at_hand(tensor) else 0)
        for name, tensor in tensors.items()
    }

    def fetch(name: str) -> tuple[TensorSpec, object]:
        region = on_device(tensors[name])
        if region is not None:
            return spec(tensors[name], 0), region
        host = plain(tensors[name])
        return spec(tensors[name], host.data_ptr()), host

    return specs, fetch
