"""Tonnage: model-weight files — open, look, load, save, verify. safetensors first.

`import tonnage` imports no framework; `tonnage.torch`, `tonnage.numpy` and so on import theirs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._native import (
    DeviceTensor,
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

if TYPE_CHECKING:
    from ._checkpoint import Checkpoint, FileInfo, Note, TensorRef, open
    from ._compat import as_safetensors
    from ._convert import convert
    from ._devices import DeviceInfo, DeviceKind, devices
    from ._errors import (
        CancelledError,
        DeviceError,
        FormatError,
        IncompleteLoadWarning,
        LimitError,
        MissingShardError,
        RankError,
        SliceError,
        StorageError,
        TonnageError,
        UnknownTensorError,
        UnsupportedError,
        UsageError,
    )
    from ._gguf import GgufInfo, GgufTensor
    from ._load import Report
    from ._placements import (
        Blocks,
        Granular,
        Heads,
        Mesh,
        OnlyRank,
        Owner,
        PadTo,
        Placement,
        Replicate,
        Segments,
        Shard,
        StridedShard,
    )
    from ._plan import LocalTensor, Plan, Proof, RankBytes, TensorBytes
    from ._prefetch import PrefetchLoader, prefetch
    from ._quantization import Quantization, QuantTensor
    from ._quantize import (
        GgufSaved,
        PackedTensor,
        QuantizedCheckpoint,
        RepackReport,
        quantize,
        quantize_checkpoint,
        repack,
        save_gguf,
        schemes,
    )
    from ._reshard import Resharded, reshard
    from ._save import Saved, Writer, save
    from ._verify import Finding, Verification, VerifiedFile, verify

# Imported when first used: a program that only wants `tonnage.torch` should start as fast as it
# can.
_LAZY = {
    "Blocks": "_placements",
    "CancelledError": "_errors",
    "Checkpoint": "_checkpoint",
    "DeviceError": "_errors",
    "DeviceInfo": "_devices",
    "DeviceKind": "_devices",
    "FileInfo": "_checkpoint",
    "Finding": "_verify",
    "FormatError": "_errors",
    "GgufInfo": "_gguf",
    "GgufSaved": "_quantize",
    "GgufTensor": "_gguf",
    "Granular": "_placements",
    "Heads": "_placements",
    "IncompleteLoadWarning": "_errors",
    "LimitError": "_errors",
    "LocalTensor": "_plan",
    "Mesh": "_placements",
    "MissingShardError": "_errors",
    "Note": "_checkpoint",
    "OnlyRank": "_placements",
    "Owner": "_placements",
    "PackedTensor": "_quantize",
    "QuantTensor": "_quantization",
    "Quantization": "_quantization",
    "PadTo": "_placements",
    "Placement": "_placements",
    "Plan": "_plan",
    "PrefetchLoader": "_prefetch",
    "Proof": "_plan",
    "QuantizedCheckpoint": "_quantize",
    "RankBytes": "_plan",
    "RankError": "_errors",
    "RepackReport": "_quantize",
    "Replicate": "_placements",
    "Report": "_load",
    "Resharded": "_reshard",
    "Saved": "_save",
    "Segments": "_placements",
    "Shard": "_placements",
    "SliceError": "_errors",
    "StorageError": "_errors",
    "StridedShard": "_placements",
    "TensorBytes": "_plan",
    "TensorRef": "_checkpoint",
    "TonnageError": "_errors",
    "UnknownTensorError": "_errors",
    "UnsupportedError": "_errors",
    "UsageError": "_errors",
    "Verification": "_verify",
    "VerifiedFile": "_verify",
    "Writer": "_save",
    "as_safetensors": "_compat",
    "convert": "_convert",
    "devices": "_devices",
    "open": "_checkpoint",
    "prefetch": "_prefetch",
    "quantize": "_quantize",
    "quantize_checkpoint": "_quantize",
    "repack": "_quantize",
    "reshard": "_reshard",
    "save": "_save",
    "save_gguf": "_quantize",
    "schemes": "_quantize",
    "verify": "_verify",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "Blocks",
    "CancelledError",
    "Checkpoint",
    "DeviceError",
    "DeviceInfo",
    "DeviceKind",
    "DeviceTensor",
    "FileInfo",
    "Finding",
    "FormatError",
    "GgufInfo",
    "GgufSaved",
    "GgufTensor",
    "Granular",
    "Heads",
    "IncompleteLoadWarning",
    "LimitError",
    "LocalTensor",
    "Mesh",
    "MissingShardError",
    "Note",
    "OnlyRank",
    "Owner",
    "PackedTensor",
    "PadTo",
    "Placement",
    "Plan",
    "PrefetchLoader",
    "Proof",
    "PySafeSlice",
    "QuantTensor",
    "Quantization",
    "QuantizedCheckpoint",
    "RankBytes",
    "RankError",
    "RepackReport",
    "Replicate",
    "Report",
    "Resharded",
    "SafetensorError",
    "Saved",
    "Segments",
    "Shard",
    "SliceError",
    "StorageError",
    "StridedShard",
    "TensorBytes",
    "TensorMeta",
    "TensorRef",
    "TensorSpec",
    "TonnageError",
    "UnknownTensorError",
    "UnsupportedError",
    "UsageError",
    "Verification",
    "VerifiedFile",
    "Writer",
    "__version__",
    "_safe_open_handle",
    "as_safetensors",
    "convert",
    "deserialize",
    "devices",
    "open",
    "prefetch",
    "quantize",
    "quantize_checkpoint",
    "repack",
    "reshard",
    "safe_open",
    "save",
    "save_gguf",
    "schemes",
    "serialize",
    "serialize_file",
    "verify",
]
