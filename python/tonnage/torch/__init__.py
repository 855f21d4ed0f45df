"""PyTorch tensors in safetensors files; modules too, with their shared tensors."""

import importlib
from typing import TYPE_CHECKING, Any

# The reference has these names here too, and others import them.
from .._native import (  # noqa: F401
    SafetensorError,
    TensorSpec,
    deserialize,
    safe_open,
    serialize,
    serialize_file,
)
from ._files import load_file, save_file
from ._front import load, save
from ._install import Installed, install, uninstall
from ._model import load_model, save_model

# Private ones that PyTorch, vLLM and others import.
from ._names import (  # noqa: F401
    _SIZE,
    _TYPES,
    _end_ptr,
    _evaluate_tensors_for_save,
    _filter_shared_not_shared,
    _find_shared_tensors,
    _flatten,
    _flatten_as_ptr,
    _getdtype,
    _is_complete,
    _remove_duplicate_names,
    _to_ndarray,
    _tobytes,
    _view2torch,
    storage_ptr,
    storage_size,
)
from ._sharded import save_sharded

if TYPE_CHECKING:
    from . import dcp


def __getattr__(name: str) -> Any:
    # Most programs that load tensors have no use for PyTorch's checkpoints.
    if name == "dcp":
        return importlib.import_module(".dcp", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Installed",
    "dcp",
    "install",
    "load",
    "load_file",
    "load_model",
    "save",
    "save_file",
    "save_model",
    "save_sharded",
    "storage_ptr",
    "storage_size",
    "uninstall",
]
