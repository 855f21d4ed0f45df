"""Tensors whose bytes are not where a plain tensor's are, and what to do with them instead."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor, without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def wrapper(tensor: Any) -> str | None:
    """Why a tensor of a class that keeps its values elsewhere is not written; `None` for others.

    None of these classes is taken apart on the way: which parts, and how they become the tensor
    again, is known to its own code only, and a file says nothing that runs code.
    """
    if is_dtensor(tensor):
        return (
            "a DTensor has only this rank's part of its values here; tonnage.torch.save_sharded"
            " writes the parts of all ranks, and .full_tensor() brings them together"
        )
    if is_traceable_wrapper_subclass(tensor):
        return (
            f"{_named(tensor)} keeps its values in other tensors; save those that its"
            " __tensor_flatten__() names, or a plain tensor made of it, such as .dequantize()"
        )
    return None


def reason(tensor: Any) -> str | None:
    """Why the values of a tensor have no form in a file; `None` where they have one."""
    if found := wrapper(tensor):
        return found
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return (
            f"{_named(tensor)} is a class of its own, of which a file would keep nothing; save"
            " .as_subclass(torch.Tensor)"
        )
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout} has no form in a file; save .to_dense()"
    if tensor.device.type == "meta":
        return "a tensor on the meta device has no values"
    if tensor.is_quantized:
        return "a quantized tensor has no form in a file; save .int_repr() and its scales"
    return None


def _named(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
