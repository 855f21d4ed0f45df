"""What `tonnage.open` was given, as something the native side reads from."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from typing import Any

from tonnage import _errors
from tonnage._native import _Handle

#: `(kind, object, label)` as the native side takes it: a path, `bytes`, a file descriptor, or an
#: object with `read_at(offset, length)` and `length`.
Source = tuple[str, Any, str]


def open_handle(source: Any, allow_symlinks: bool) -> tuple[_Handle, str]:
    """The native checkpoint and what messages call it."""
    if isinstance(source, list | tuple):
        return _of_list(source, allow_symlinks)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not isinstance(path, str):
            path = os.fsdecode(path)
        return _Handle.open(path, allow_symlinks), path
    one = _source(source, "")
    return _Handle.open_sources([one]), one[2]


def _of_list(sources: Sequence[Any], allow_symlinks: bool) -> tuple[_Handle, str]:
    if not sources:
        raise _errors.usage("no files were given", "NO_FILES")
    label = f"{len(sources)} files"
    if all(isinstance(source, str | os.PathLike) for source in sources):
        paths = [os.fsdecode(source) for source in sources]
        return _Handle.open_files(paths, allow_symlinks), label
    made = [_source(source, f" {at + 1}") for at, source in enumerate(sources)]
    return _Handle.open_sources(made), label


def _source(source: Any, number: str) -> Source:
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return ("path", path, path)
    if isinstance(source, bytes):
        return ("bytes", source, f"<bytes{number}>")
    view = _memory(source)
    if view is not None:
        return ("object", _Memory(view), f"<{type(source).__name__}{number}>")
    if hasattr(source, "read") or hasattr(source, "fileno"):
        return _of_file(source, number)
    raise TypeError(
        "open takes a path, a list of them, bytes or a file object, "
        f"not {type(source).__module__}.{type(source).__qualname__}"
    )


def _memory(source: Any) -> memoryview | None:
    if isinstance(source, io.IOBase):
        return None
    try:
        view = memoryview(source)
    except TypeError:
        return None
    if not view.c_contiguous:
        raise _errors.usage("a buffer must be contiguous to be opened", "BUFFER")
    return view.cast("B")


def _of_file(file: Any, number: str) -> Source:
    if isinstance(file, io.TextIOBase):
        # The bytes below the text are what the file is made of.
        file = getattr(file, "buffer", None)
        if file is None:
            raise TypeError("a file object must be open for reading bytes, not text")
    readable = getattr(file, "readable", None)
    if readable is not None and not readable():
        raise _errors.usage("the file object is not open for reading", "NOT_READABLE")
    name = getattr(file, "name", None)
    label = name if isinstance(name, str) else f"<{type(file).__name__}{number}>"
    descriptor = _descriptor(file)
    if descriptor is not None:
        return ("fd", descriptor, label)
    if not hasattr(file, "read"):
        raise TypeError(f"{label} is neither a plain file nor readable")
    if _can_seek(file):
        return ("object", _Seekable(file, label), label)
    # Nothing can be read twice from a pipe: it is kept.
    return ("bytes", bytes(file.read()), label)


def _descriptor(file: Any) -> int | None:
    """The descriptor whose bytes are the object's bytes, if it is a plain file.

    A `fileno` alone does not say so: that of a `gzip.GzipFile` is its compressed file. So only the
    classes of `io` and the wrappers of `tempfile` are taken by descriptor.
    """
    inner = getattr(file, "file", file) if type(file).__module__ == "tempfile" else file
    if isinstance(inner, io.BufferedReader | io.BufferedRandom):
        inner = inner.raw
    if not isinstance(inner, io.FileIO) and hasattr(inner, "read"):
        return None
    try:
        descriptor = inner.fileno()
    except (OSError, AttributeError):
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return None
    if hasattr(file, "flush"):
        # What was written through the object is part of the file.
        file.flush()
    return int(descriptor)


def _can_seek(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    return bool(seekable()) if seekable is not None else hasattr(file, "seek")


class _Memory:
    """Memory that may change or go away: each read copies out of it."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.length = view.nbytes

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self._view[offset : offset + length])


class _Seekable:
    """A file object that can only `seek` and `read`. The native side makes one call at a time."""

    def __init__(self, file: Any, label: str) -> None:
        self._file = file
        self._label = label
        # Some `seek`s return nothing.
        file.seek(0, os.SEEK_END)
        self.length = int(file.tell())

    def read_at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        parts: list[bytes] = []
        missing = length
        while missing:
            part = self._file.read(missing)
            if not isinstance(part, bytes | bytearray | memoryview):
                raise TypeError(f"{self._label}: read() gave {type(part).__name__}, not bytes")
            if not part:
                break
            parts.append(bytes(part))
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
