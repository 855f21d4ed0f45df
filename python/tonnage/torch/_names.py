"""What other packages take from the reference's module besides its functions, under its names: the
dtype tables, and which tensors of a state share memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import _dropin
from .._adapters import torch as _adapter
from .._native import TensorSpec
from ._refuse import wrapper

_TYPES: dict[str, torch.dtype] = _adapter.TYPES
_SIZE: dict[torch.dtype, int] = _adapter.SIZE


def storage_ptr(tensor: torch.Tensor) -> int:
    """Address of a tensor's storage; 0 where there is none."""
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):
        return 0


def storage_size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's storage."""
    try:
        return int(tensor.untyped_storage().nbytes())
    except (NotImplementedError, RuntimeError):
        return int(tensor.nelement()) * _SIZE[tensor.dtype]


def _entries(tensors: dict[str, torch.Tensor]) -> _dropin.Entries:
    _evaluate_tensors_for_save(tensors)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(_dropin.not_contiguous(name))
    return _adapter.entries(tensors)


def _getdtype(dtype_str: str) -> torch.dtype:
    return _TYPES[dtype_str]


def _view2torch(safeview: list[tuple[str, dict[str, Any]]]) -> dict[str, torch.Tensor]:
    result = {}
    for name, view in safeview:
        dtype, shape, data = _getdtype(view["dtype"]), list(view["shape"]), view["data"]
        if view["dtype"] == "F4":
            shape[-1] //= 2
        result[name] = _adapter.view(data, dtype, tuple(shape), 0, len(data))
    return result


def _to_ndarray(tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
    host = _adapter.plain(tensor)
    return host.reshape(-1).view(torch.uint8).numpy(), host


def _tobytes(tensor: torch.Tensor, name: str = "") -> bytes:
    _evaluate_tensors_for_save({name: tensor})
    if not tensor.is_contiguous():
        raise ValueError(_dropin.not_contiguous(name))
    return bytes(_to_ndarray(tensor)[0].tobytes())


def _flatten(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    _evaluate_tensors_for_save(tensors)
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": tensor.shape,
            "data": _tobytes(tensor, name),
        }
        for name, tensor in tensors.items()
    }


def _flatten_as_ptr(
    tensors: dict[str, torch.Tensor], keep_alive_buffer: list[Any]
) -> dict[str, TensorSpec]:
    keep_alive_buffer.append(list(tensors.values()))
    return _dropin.fetched(_entries(tensors), keep_alive_buffer)


def _end_ptr(tensor: torch.Tensor) -> int:
    start = int(tensor.data_ptr())
    if not tensor.nelement():
        return start
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum(int(extent - 1) * int(stride) for extent, stride in steps)
    return start + (last + 1) * _SIZE[tensor.dtype]


def _filter_shared_not_shared(
    tensors: list[set[str]], state_dict: Mapping[str, torch.Tensor]
) -> list[set[str]]:
    """Splits names that share a storage into those whose bytes really overlap."""
    groups: list[set[str]] = []
    for shared in tensors:
        if len(shared) < 2:
            groups.append(shared)
            continue
        areas = sorted(
            (int(state_dict[name].data_ptr()), _end_ptr(state_dict[name]), name) for name in shared
        )
        reach = -1
        for start, stop, name in areas:
            if start >= reach:
                groups.append({name})
            else:
                groups[-1].add(name)
            reach = max(reach, stop)
    return groups


def _find_shared_tensors(state_dict: Mapping[str, torch.Tensor]) -> list[set[str]]:
    """Groups names by the memory they share; tensors without memory belong to no group."""
    storages: dict[Any, set[str]] = defaultdict(set)
    for name, tensor in state_dict.items():
        if tensor.device.type == "meta":
            continue
        address, size = storage_ptr(tensor), storage_size(tensor)
        if address and size:
            storages[tensor.device, address, size].add(name)
    return _filter_shared_not_shared(list(storages.values()), state_dict)


def _is_complete(tensor: torch.Tensor) -> bool:
    """Whether a tensor covers its whole storage."""
    whole = tensor.nelement() * _SIZE[tensor.dtype] == storage_size(tensor)
    return whole and int(tensor.data_ptr()) == storage_ptr(tensor)


def _remove_duplicate_names(
    state_dict: Mapping[str, torch.Tensor],
    *,
    preferred_names: Iterable[str] | None = None,
    discard_names: Iterable[str] | None = None,
) -> dict[str, list[str]]:
    """For tensors that share memory: which name to keep, and which names it stands for."""
    preferred, discard = set(preferred_names or ()), set(discard_names or ())
    to_remove: dict[str, list[str]] = {}
    for shared in _find_shared_tensors(state_dict):
        complete = {name for name in shared if _is_complete(state_dict[name])}
        if not complete:
            raise RuntimeError(
                "Error while trying to find names to remove to save state dict, but found no"
                f" suitable name to keep for saving amongst: {shared}. None is covering the entire"
                " storage.Refusing to save/load the model since you could be storing much more"
                " memory than needed. Please refer to"
                " https://huggingface.co/docs/safetensors/torch_shared_tensors for more"
                " information. Or open an issue."
            )
        kept = min((complete & preferred) or (complete - discard) or complete)
        if others := sorted(shared - {kept}):
            to_remove[kept] = others
    return to_remove


def _evaluate_tensors_for_save(tensors: dict[str, torch.Tensor]) -> None:
    """Refuses what cannot be saved: no dict, no tensors, sparse tensors, tensors that overlap."""
    _dropin.check_types(tensors, torch.Tensor, "torch.Tensor")
    sparse = [name for name, tensor in tensors.items() if tensor.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"You are trying to save a sparse tensors: `{sparse}` which this library does not"
            " support. You can make it a dense tensor before saving with `.to_dense()` but be aware"
            " this might make a much larger file than needed."
        )
    for name, tensor in tensors.items():
        if reason := wrapper(tensor):
            raise TypeError(f"{name}: {reason}")
    failing = [names for names in _find_shared_tensors(tensors) if len(names) > 1]
    if failing:
        raise RuntimeError(
            "\n            Some tensors share memory, this will lead to duplicate memory on disk"
            f" and potential differences when loading them again: {failing}."
            "\n            A potential way to correctly save your model is to use `save_model`."
            "\n            More information at"
            " https://huggingface.co/docs/safetensors/torch_shared_tensors\n            "
        )
