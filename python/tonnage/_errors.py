"""The exceptions of the paved path.

Every one is a `SafetensorError`, so code written against the drop-in catches them, and where Python
programmers expect a builtin, it is that builtin as well: a missing file is a `FileNotFoundError`,
an unknown name a `KeyError`, a malformed file a `ValueError`.

The classes say who must act: `FormatError` the one who wrote the file, `LimitError` the one who set
the limit, `UnsupportedError` whoever maintains this package, `UsageError` the caller,
`StorageError` the one who looks after the disk, `DeviceError` the one who looks after the device,
`RankError` whoever looks after another rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tonnage._native import SafetensorError

_FIELDS = ("code", "clause", "file", "tensor", "found", "needed", "suggestions", "errno")


class TonnageError(SafetensorError):
    """Anything that is wrong with a checkpoint or a request.

    Attributes, each `None` where it does not apply:
        code: stable name of what is wrong, such as `"HOLE"`.
        clause: clause of the specification that it breaks, such as `"6.4"`.
        file: the file concerned, as the caller named it.
        tensor: name of the tensor concerned.
        found: what was there.
        needed: what should have been.
        suggestions: names that are near the one asked for.
    """

    code: str | None = None
    clause: str | None = None
    file: str | None = None
    tensor: str | None = None
    found: str | None = None
    needed: str | None = None
    suggestions: tuple[str, ...] = ()

    def __str__(self) -> str:
        # `KeyError` would show the repr of its text, `OSError` may add the number a second time.
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: getattr(self, name, None) for name in _FIELDS}
        return (_restore, (type(self), self.args[:1], state))


class FormatError(TonnageError, ValueError):
    """The file does not keep to the format; `clause` says which rule it breaks."""


class LimitError(TonnageError, ValueError):
    """The file may be sound, but is larger than a limit allows."""


class UnsupportedError(TonnageError, NotImplementedError):
    """The file is sound, but holds something that this version or this framework lacks."""


class UsageError(TonnageError, ValueError):
    """The request makes no sense for this checkpoint."""


class UnknownTensorError(TonnageError, KeyError):
    """No tensor has this name; `suggestions` lists near ones."""


class SliceError(UsageError, IndexError):
    """The slice does not fit the tensor."""


class DeviceError(TonnageError, RuntimeError):
    """A device refused."""


class CancelledError(TonnageError, RuntimeError):
    """The work was cancelled before it was done."""


class RankError(TonnageError, RuntimeError):
    """Another rank of a save or a load failed; the text says which, and how."""


class StorageError(TonnageError, OSError):
    """Reading or writing failed; `errno` is the system's number."""


class StorageFileNotFoundError(StorageError, FileNotFoundError):
    """A file is not there."""


class StoragePermissionError(StorageError, PermissionError):
    """The system does not allow it."""


class StorageIsADirectoryError(StorageError, IsADirectoryError):
    """A folder where a file is needed."""


class StorageNotADirectoryError(StorageError, NotADirectoryError):
    """A file where a folder is needed."""


class StorageFileExistsError(StorageError, FileExistsError):
    """Something is there already."""


class MissingShardError(FormatError, FileNotFoundError):
    """A file of a sharded checkpoint is not there."""


class IncompleteLoadWarning(UserWarning):
    """A load into existing tensors left some of them as they were; `Checkpoint.report` lists
    them.
    """


_CLASSES: dict[str, type[TonnageError]] = {
    "Format": FormatError,
    "Limit": LimitError,
    "Unsupported": UnsupportedError,
    "Usage": UsageError,
    "Device": DeviceError,
    "Cancelled": CancelledError,
    "Rank": RankError,
    "Io": StorageError,
    "Io.NotFound": StorageFileNotFoundError,
    "Io.PermissionDenied": StoragePermissionError,
    "Io.IsADirectory": StorageIsADirectoryError,
    "Io.NotADirectory": StorageNotADirectoryError,
    "Io.AlreadyExists": StorageFileExistsError,
}
_BY_CODE: dict[str, type[TonnageError]] = {
    "UNKNOWN_TENSOR": UnknownTensorError,
    "SLICE": SliceError,
    "PARTIAL_SLICE": SliceError,
    "INDEX_FILE_MISSING": MissingShardError,
    "INDEX_SHARD_MISSING": MissingShardError,
}


def make(
    kind: str,
    message: str,
    *,
    code: str | None = None,
    clause: str | None = None,
    file: str | None = None,
    tensor: str | None = None,
    found: str | None = None,
    needed: str | None = None,
    suggestions: Sequence[str] = (),
    errno: int | None = None,
) -> TonnageError:
    """The exception for an error of this kind; the native side and this package raise what it
    gives.
    """
    chosen = _BY_CODE.get(code or "") or _CLASSES.get(kind) or TonnageError
    state = {
        "code": code,
        "clause": clause or None,
        "file": file,
        "tensor": tensor,
        "found": found or None,
        "needed": needed or None,
        "suggestions": tuple(suggestions),
        "errno": errno,
    }
    return _restore(chosen, (message,), state)


def _restore(
    cls: type[TonnageError], args: tuple[object, ...], state: dict[str, Any]
) -> TonnageError:
    error = cls(*args)
    for name, value in state.items():
        if name != "errno" or (value is not None and isinstance(error, OSError)):
            setattr(error, name, value)
    return error


def usage(message: str, code: str = "USAGE", **fields: Any) -> TonnageError:
    """A request that makes no sense: `UsageError`."""
    return make("Usage", message, code=code, **fields)
