"""`load` and `save`: the reference's two functions, grown to what `torch.load` and `torch.save` do.

What a file is, its first bytes say and not its name. A pickle is never read here: where `load` is
given one, PyTorch reads it with `weights_only=True`.
"""

from __future__ import annotations

import importlib
import io
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import IO, Any, TypeAlias, overload

import torch

from .. import _checkpoint, _dropin, _errors
from .._adapters import torch as _adapter
from .._dropin import Path
from .._native import safe_open
from . import _decode, _encode
from ._names import _entries

#: What `map_location` takes, as `torch.load`'s does.
MapLocation: TypeAlias = (
    str | torch.device | Mapping[str, Any] | Callable[[torch.UntypedStorage, str], Any] | None
)

#: The longest header that the format allows, in bytes (clause 2.3).
_MAX_HEADER = 100_000_000
#: What stands in front of a header, and its first character.
_SNIFFED = 9
#: States up to this many bytes become one `bytes` on their way into a file object.
_IN_MEMORY = 64 << 20


def load(
    data: Path | bytes | IO[bytes],
    map_location: MapLocation = None,
    *,
    mmap: bool | None = None,
    weights_only: bool | None = None,
) -> Any:
    """The state in a file: of a safetensors file without a structure a dict of its tensors.

    ```python
    state = tonnage.torch.load("checkpoint.safetensors", map_location="cuda")
    state = tonnage.torch.load(io.BytesIO(content))
    shapes = tonnage.torch.load("checkpoint.safetensors", map_location="meta")
    ```

    Args:
        data: a path, with any suffix or none, to a file or to a folder or index file of a
            checkpoint; a file object open for reading bytes, read from where it stands; or the
            bytes themselves. The first bytes say what it is.
        map_location: where tensors go, as for `torch.load`: the name of a device or a
            `torch.device`; a dict of locations to locations; or a function of a storage on the host
            and the location `"cpu"`, which gives a storage, or `None` to leave it. A file keeps no
            locations: every one is `"cpu"`. `"meta"` gives shapes and dtypes and reads no tensor.
        mmap: `True` for tensors that view the pages of the file, which must be given by its path;
            otherwise they are read now.
        weights_only: nothing in a safetensors file is ever run, whatever this says.

    A file that `torch.save` wrote (a zip file, or a bare pickle) is given to `torch.load` with
    `weights_only=True`, and with `weights_only=False` it is refused: nothing is unpickled here.

    Tensors that shared memory when `save` was called share it again.

    Raises `SafetensorError` for a file that is malformed or has a structure that is,
    `FileNotFoundError`, and what `torch.load` raises for files of its own.
    """
    if not isinstance(data, bytes | str | os.PathLike) and not hasattr(data, "read"):
        # The words of the reference's own `load`.
        raise TypeError(f"{type(data).__name__!r} object is not an instance of 'bytes'")
    if mmap and not isinstance(data, str | os.PathLike):
        raise ValueError("data must be a path to a file in order to use the mmap argument")
    if not isinstance(data, bytes | str | os.PathLike):
        data = _rest_of(data)
    begin = sniff(data)
    if is_pickle(begin) and not is_safetensors(begin):
        return _by_torch(data, map_location, mmap, weights_only)
    if mmap is None:
        mmap = _mmap_by_default() and isinstance(data, str | os.PathLike)
    return _load(data, map_location, bool(mmap))


def _mmap_by_default() -> bool:
    """What PyTorch's own `load` does where it is not told."""
    config = getattr(importlib.import_module("torch.utils.serialization"), "config", None)
    return bool(config is not None and config.load.mmap)


def _load(data: Any, map_location: MapLocation, mmap: bool) -> Any:
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu")
    device, move = "cpu", None
    if isinstance(map_location, str | torch.device):
        device = str(map_location)
    elif callable(map_location):
        move = map_location
    elif map_location is not None:
        raise TypeError(
            "map_location takes a device, a dict of locations, or a function, not "
            f"{type(map_location).__name__}"
        )
    tensors, metadata = _tensors(data, device, mmap)
    if move is not None:
        tensors = {name: _moved(tensor, move) for name, tensor in tensors.items()}
    text = metadata.get(_encode.KEY)
    return tensors if text is None else _decode.build(_decode.parse(text), tensors)


def _tensors(data: Any, device: str, mmap: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata. A structure that cannot hold is refused before tensors are read."""
    if mmap and not os.path.isdir(data) and not os.fspath(data).endswith(".json"):
        with safe_open(data, "torch", device, backend="mmap") as file:
            metadata = file.metadata() or {}
            return file.get_tensors(), metadata
    if isinstance(data, bytes):
        # In the words of the reference's `load`, where something is wrong.
        tensors = _dropin.load(data, "torch", device)
        with _checkpoint.open(data) as checkpoint:
            return tensors, checkpoint.metadata
    with _checkpoint.open(data) as checkpoint:
        metadata = checkpoint.metadata
        if _encode.KEY in metadata:
            _decode.parse(metadata[_encode.KEY])
        if mmap and device == "cpu":
            return {name: ref.view("torch") for name, ref in checkpoint.items()}, metadata
        return checkpoint.load(framework="torch", device=device), metadata


# ---- what a file is --------------------------------------------------------------------------


def sniff(data: Path | bytes | IO[bytes]) -> bytes:
    """The first bytes; of a file object from where it stands, which it is left at."""
    if isinstance(data, bytes):
        return data[:_SNIFFED]
    if isinstance(data, str | os.PathLike):
        try:
            with open(data, "rb") as file:
                return file.read(_SNIFFED)
        except OSError:
            # A folder, or what opening it for good will say better.
            return b""
    at = data.tell()
    try:
        return bytes(data.read(_SNIFFED))
    finally:
        data.seek(at)


def is_safetensors(begin: bytes) -> bool:
    """Whether content with this beginning is a safetensors file, sound or not.

    No zip file and no pickle begins so: what they begin with makes a length beyond the format's
    cap, since neither has zeros there.
    """
    return begin[8:9] == b"{" and 2 <= int.from_bytes(begin[:8], "little") <= _MAX_HEADER


def is_pickle(begin: bytes) -> bool:
    """Whether content with this beginning is what `torch.save` writes: a zip file or a pickle."""
    zipped = begin.startswith(b"PK\x03\x04")
    return zipped or (len(begin) == _SNIFFED and begin[0] == 0x80 and 2 <= begin[1] <= 5)


def _rest_of(file: Any) -> Any:
    """A file object as something to open: itself where it stands at its beginning."""
    if isinstance(file, io.TextIOBase):
        raise TypeError("a file object must be open for reading bytes, not text")
    seekable = getattr(file, "seekable", None)
    can_seek = bool(seekable()) if seekable is not None else hasattr(file, "seek")
    if can_seek and hasattr(file, "tell") and file.tell() == 0:
        return file
    return bytes(file.read())


def _by_torch(
    data: Any, map_location: MapLocation, mmap: bool | None, weights_only: bool | None
) -> Any:
    if weights_only is False:
        raise _errors.usage(
            "this file is a pickle, which can run code when it is read; tonnage.torch.load reads"
            " such files with weights_only=True only: call torch.load yourself if you trust it",
            "PICKLE",
        )
    if isinstance(data, bytes):
        data = io.BytesIO(data)
    options = {"map_location": map_location, "weights_only": True}
    if isinstance(data, str | os.PathLike) and os.fspath(data).endswith(".safetensors"):
        # By this name PyTorch would take it for what it is not.
        with open(data, "rb") as file:
            return torch.load(file, mmap=mmap, **options)
    return torch.load(data, mmap=mmap, **options)


# ---- where tensors go ------------------------------------------------------------------------


def _moved(tensor: Any, move: Callable[[torch.UntypedStorage, str], Any]) -> Any:
    """A tensor whose storage went through a `map_location`, which sees its bytes alone."""
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        storage = tensor.untyped_storage()
    given = move(storage, "cpu")
    if given is None or given is storage:
        return tensor
    if isinstance(given, torch.Tensor):
        given = given.untyped_storage()
    if isinstance(given, torch.TypedStorage):
        given = given._untyped_storage
    if not isinstance(given, torch.UntypedStorage):
        raise TypeError(f"map_location gave a {type(given).__name__}, not a storage")
    if given.nbytes() < tensor.nbytes:
        raise ValueError(
            f"map_location gave a storage of {given.nbytes()} bytes for one of {tensor.nbytes}"
        )
    empty = torch.empty(0, dtype=tensor.dtype, device=given.device)
    return empty.set_(given, 0, tensor.shape, tensor.stride())


# ---- saving ----------------------------------------------------------------------------------


@overload
def save(
    tensors: dict[str, torch.Tensor],
    f: Mapping[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> bytes: ...
@overload
def save(
    tensors: object,
    f: Path | IO[bytes],
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None: ...
def save(
    tensors: Any,
    f: Any = None,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> bytes | None:
    """The bytes of a file of these tensors; with `f`, writes a file of a whole state.

    ```python
    content = tonnage.torch.save({"weight": torch.zeros(512, 1024)}, metadata={"format": "pt"})
    tonnage.torch.save({"model": model.state_dict(), "step": 1000}, "checkpoint.safetensors")
    ```

    Without `f` as the reference has it: a dict of tensors, which must be dense, contiguous and not
    overlap.

    Args:
        tensors: with `f`, a state: dicts, `OrderedDict`s, lists and tuples, nested as they like, of
            tensors, `int`, `float`, `bool`, `None`, `str`, `bytes`, `torch.dtype`, `torch.device`
            and `torch.Size`. Keys of dicts are such leaves or tuples of them.
        f: a path, replaced whole or not at all as by `save_file`; or a file object open for
            writing bytes, to which the content is written from where it stands.
        metadata: strings by name, for `__metadata__`. Also taken in the place of `f`, where the
            reference has it.
        fsync: with a path, the file survives a power cut once this has returned.

    A dict of tensors gives exactly the file that `save_file` gives. Everything else that is to be
    known (containers, leaves, which tensors are parameters, require gradients, or share memory) is
    in the metadata, as chapter 14 of the specification says; nothing is pickled, and any reader
    reads the tensors, under names joined by dots. Memory that several tensors share is written
    once. Strides are kept only there: other tensors are written contiguous. `load` puts everything
    back, tensors on the host unless told otherwise.

    Raises `TypeError` for anything else, naming the path to it: objects, NumPy scalars, subclasses
    of these types; sparse and quantised tensors; tensors that keep their values in others. A
    `DTensor` goes to `save_sharded`.
    """
    if isinstance(f, Mapping) and metadata is None:
        f, metadata = None, dict(f)
    if f is None:
        return _dropin.save(_entries(tensors), metadata)
    if not isinstance(f, str | os.PathLike) and not hasattr(f, "write"):
        raise TypeError(f"save takes a path or a file object to write to, not {type(f).__name__}")
    encoded = _encode.encode(tensors)
    if encoded.structure is not None:
        if metadata and _encode.KEY in metadata:
            raise _errors.usage(f"the key {_encode.KEY} says how the state is built", "METADATA")
        metadata = {**(metadata or {}), _encode.KEY: encoded.structure}
    entries = _adapter.entries(encoded.tensors)
    if isinstance(f, str | os.PathLike):
        _dropin.save_file(entries, f, metadata, fsync)
    elif sum(tensor.nbytes for tensor in encoded.tensors.values()) <= _IN_MEMORY:
        _write(f, io.BytesIO(_dropin.save(entries, metadata)))
    else:
        # A second copy in memory would be as large as the state.
        with tempfile.TemporaryDirectory(prefix="tonnage-") as folder:
            path = FilePath(folder, "state")
            _dropin.save_file(entries, path, metadata, False)
            with path.open("rb") as content:
                _write(f, content)
    return None


def _write(file: Any, content: IO[bytes]) -> None:
    """Copies content in portions; an unbuffered file may take less than it is given."""
    if isinstance(file, io.TextIOBase):
        raise TypeError("a file object must be open for writing bytes, not text")
    while portion := content.read(8 << 20):
        left = memoryview(portion)
        while left:
            taken = file.write(left)
            left = left[len(left) if taken is None else taken :]
