"""Tonnage: model-weight files — open, look, load, save, verify. safetensors first.

`import tonnage` imports no framework; `tonnage.torch`, `tonnage.numpy` and so on import theirs.
"""

from ._compat import as_safetensors
from ._native import (
    PySafeSlice,
    SafetensorError,
    TensorMeta,
    TensorSpec,
    __version__,
    _safe_open_handle,
    deserialize,
    safe_open,
    serialize,
    serialize_file,
)

__all__ = [
    "PySafeSlice",
    "SafetensorError",
    "TensorMeta",
    "TensorSpec",
    "__version__",
    "_safe_open_handle",
    "as_safetensors",
    "deserialize",
    "safe_open",
    "serialize",
    "serialize_file",
]
