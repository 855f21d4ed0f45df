"""`tonnage.save` and `tonnage.Writer`: tensors of any framework into one file or several."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from tonnage import _arrays, _checkpoint, _errors, _progress
from tonnage._native import DeviceTensor, TensorSpec, _parse_size, _save, _Writer

#: What `checksums=` takes.
Checksums = bool | Literal["blake3"]
Fetch = Callable[[str], tuple[TensorSpec, object]]
Entries = tuple[dict[str, TensorSpec], Fetch]

#: Packages of tensors and the adapter that knows each.
_ADAPTERS = {
    "torch": "torch",
    "jax": "jax",
    "jaxlib": "jax",
    "tensorflow": "tensorflow",
    "mlx": "mlx",
    "paddle": "paddle",
}


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        files: the files with tensors, in order.
        index: the index file; `None` where one file holds all.
        total_size: bytes of all tensors.
        seconds: wall-clock time of writing.
    """

    files: tuple[str, ...]
    index: str | None
    total_size: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (10^9 bytes) of tensors written a second."""
        return self.total_size / self.seconds / 1e9 if self.seconds > 0 else 0.0


def save(
    tensors: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    fsync: bool = True,
    dedupe: bool = False,
    threads: int | None = None,
    progress: _progress.ProgressLike = None,
    checksums: Checksums = False,
) -> Saved:
    """Writes a checkpoint that replaces the old one whole or not at all.

    Args:
        tensors: by name: of PyTorch, NumPy (with `ml_dtypes`), JAX, TensorFlow, MLX or Paddle,
            `DeviceTensor`s, mixed as you like, or the `TensorRef`s of an open checkpoint. They may
            be on any device and need not be contiguous. Large ones on a GPU are written from there
            block by block; others whose bytes are not at hand are fetched one at a time, so the
            host never holds a second model.
        path: where to: a name that ends in `.safetensors` is the file (with shards beside it where
            one file is not enough), anything else a folder that gets `model.safetensors` or its
            shards; it is made if it is not there.
        metadata: strings by name, for `__metadata__`. (For models that `transformers` loads, it
            wants `{"format": "pt"}`.)
        max_shard_size: bytes of tensors a file holds at most, as a number or as `"5GB"` (10^9) or
            `"5GiB"` (2^30). Larger checkpoints become `model-00001-of-0000N.safetensors` and
            `model.safetensors.index.json`, as the Hugging Face Hub writes them. Default: one file.
        fsync: the checkpoint survives a power cut once this has returned. `False` leaves that to
            the system; it is replaced as a whole all the same.
        dedupe: PyTorch tensors that are the very same memory are written once, under the first of
            their names in alphabetical order, and `metadata[other] = first` says so, as
            `save_model` does. Without it, tensors that share memory are refused. Tensors that
            overlap in part are refused in any case.
        threads: how many threads write. Default: one a core, at most 8.
        progress: as for `Checkpoint.load`.
        checksums: `True` stores the CRC-64/NVME of every 8 MiB of data in the file's metadata
            (chapter 13 of the specification), for `load(verify=True)` and `tonnage.verify`. It is
            computed while the data is written. `"blake3"` also puts the BLAKE3 hash of each file
            beside it, as `NAME.b3`, which `b3sum -c` reads; for it, files are read once more.

    Returns:
        The names of the files, and how long it took.

    Raises:
        TypeError: something that is no tensor, or metadata that is not text.
        UsageError: a name or a shape that the format cannot hold.
        RuntimeError: PyTorch tensors that share memory.
        StorageError: a failed write, such as a full disk (`errno`). What was there before is whole.
    """
    chosen = dict(tensors)
    extra: dict[str, str] = {}
    if dedupe:
        chosen, extra = _without_twins(chosen)
    text = _check_metadata(metadata, extra)
    specs, fetch = _entries(chosen)
    total = sum(spec.data_len for spec in specs.values())
    bar = _progress.start(progress, total, "save")
    try:
        limit = None if max_shard_size is None else size(max_shard_size)
        where = os.fsdecode(path)
        files, index, total, seconds = _save(
            list(specs.items()),
            fetch,
            where,
            text,
            limit,
            fsync,
            threads,
            bar,
            _sums(checksums),
        )
    finally:
        if bar is not None:
            bar.close()
    return _saved(files, index, total, seconds)


def _sums_of_copy(checksums: Checksums | None) -> tuple[bool, bool] | None:
    """The same for copies, which by default have those of their source."""
    return None if checksums is None else _sums(checksums)


def _sums(checksums: Checksums) -> tuple[bool, bool]:
    """Whether sums go into the metadata, and hashes beside the files."""
    if checksums in (True, False):
        return checksums is True, False
    if checksums == "blake3":
        return True, True
    raise _errors.usage(f'checksums takes True, False or "blake3", not {checksums!r}')


def _saved(files: list[Any], index: Any, total: int, seconds: float) -> Saved:
    names = tuple(os.fsdecode(file) for file in files)
    return Saved(names, None if index is None else os.fsdecode(index), total, seconds)


def size(value: int | str) -> int:
    """A number of bytes, given as such or as text like `"5GB"`; `UsageError` for anything else."""
    found = _parse_size(value) if isinstance(value, str) else int(value)
    if found <= 0:
        raise _errors.usage(f"a size must be positive, not {value!r}", "SIZE")
    return found


def _check_metadata(
    metadata: Mapping[str, str] | None, extra: dict[str, str]
) -> dict[str, str] | None:
    if metadata is None:
        return extra or None
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata maps text to text, but has {key!r}: {value!r}")
    return {**extra, **metadata}


def _without_twins(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Without the PyTorch tensors that are the same memory as one before them by name."""
    first: dict[tuple[Any, ...], str] = {}
    alias: dict[str, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if _package(tensor) != "torch" or not tensor.nbytes or tensor.device.type == "meta":
            continue
        lazy = (tensor.is_conj(), tensor.is_neg())
        place = (
            tensor.device,
            tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            lazy,
        )
        kept = first.setdefault(place, name)
        if kept != name:
            alias[name] = kept
    return {name: tensor for name, tensor in tensors.items() if name not in alias}, alias


def _package(tensor: Any) -> str:
    return (
        "torch"
        if hasattr(tensor, "data_ptr") and hasattr(tensor, "is_conj")
        else (type(tensor).__module__.partition(".")[0])
    )


def _entries(tensors: Mapping[str, Any]) -> Entries:
    """Specs of all tensors, and what fetches the bytes of those that are not at hand."""
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"names are text, not {type(name).__name__}")
        groups.setdefault(_adapter_of(name, tensor), {})[name] = tensor
    specs: dict[str, TensorSpec] = {}
    fetches: dict[str, Fetch] = {}
    for adapter, group in groups.items():
        found, fetch = _GROUPS.get(adapter, _adapted)(adapter, group)
        specs.update(found)
        fetches.update(dict.fromkeys(group, fetch))
    # The order of the caller's dict, for writers that keep it.
    return {name: specs[name] for name in tensors}, lambda name: fetches[name](name)


def _adapter_of(name: str, tensor: Any) -> str:
    kind = type(tensor)
    found = _BY_TYPE.get(kind)
    if found is None:
        found = _find_adapter(tensor)
        if found is None:
            text = f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(f"{name} is a {text}, which is not a tensor of a known framework")
        _BY_TYPE[kind] = found
    return found


#: Adapters by the type of the tensors they take, as they were found.
_BY_TYPE: dict[type, str] = {}


def _find_adapter(tensor: Any) -> str | None:
    if isinstance(tensor, _checkpoint.TensorRef):
        return "checkpoint"
    if isinstance(tensor, DeviceTensor):
        return "device"
    package = _package(tensor)
    if package in _ADAPTERS:
        return _ADAPTERS[package]
    return "numpy" if hasattr(tensor, "__array_interface__") else None


def _adapted(adapter: str, tensors: dict[str, Any]) -> Entries:
    module = importlib.import_module(f"tonnage._adapters.{adapter}")
    found: Entries = module.entries(tensors)
    return found


def _of_torch(_: str, tensors: dict[str, Any]) -> Entries:
    """PyTorch: as the drop-in checks and writes them, and views of any strides besides."""
    adapter = importlib.import_module("tonnage._adapters.torch")
    dropin = importlib.import_module("tonnage.torch")
    dropin._evaluate_tensors_for_save(tensors)
    specs, fetch = adapter.entries(tensors)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            specs[name] = adapter.spec(tensor, 0)
    return specs, fetch


def _of_checkpoint(_: str, tensors: dict[str, Any]) -> Entries:
    """Tensors of an open checkpoint, read when their turn comes."""
    specs: dict[str, TensorSpec] = {}
    for name, ref in tensors.items():
        row = _arrays.row_of(ref.dtype, name)
        dtype = row.ml_dtypes or row.numpy or row.name
        specs[name] = TensorSpec(dtype=dtype, shape=ref.shape, data_ptr=0, data_len=ref.nbytes)

    def fetch(name: str) -> tuple[TensorSpec, object]:
        ref = tensors[name]
        return specs[name], ref._checkpoint._handle.raw(ref._index)

    return specs, fetch


def _of_device(_: str, tensors: dict[str, Any]) -> Entries:
    """`DeviceTensor`s, written from their device block by block."""
    specs: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        row = _arrays.row_of(tensor.dtype, name)
        dtype = row.ml_dtypes or row.numpy or row.name
        nbytes = tensor.nbytes
        specs[name] = TensorSpec(dtype=dtype, shape=tensor.shape, data_ptr=0, data_len=nbytes)
    return specs, lambda name: (specs[name], tensors[name])


_GROUPS: dict[str, Callable[[str, dict[str, Any]], Entries]] = {
    "torch": _of_torch,
    "checkpoint": _of_checkpoint,
    "device": _of_device,
}


class Writer:
    """Writes a checkpoint tensor by tensor: it may be larger than memory.

    As a context manager it finishes at the end of the block; if the block raises, nothing is left
    behind and an older checkpoint at the same place is as it was.

    ```python
    with tonnage.Writer("out/", max_shard_size="5GB") as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
    print(writer.saved.files)
    ```

    Args:
        path, metadata, max_shard_size, fsync, checksums: as for `save`. Tensors stand in each file
            in the order of `save`, and a file is closed when the next tensor does not fit.

    Attributes:
        saved: what was written; `None` until `finish`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_size: int | str | None = None,
        fsync: bool = True,
        checksums: Checksums = False,
    ) -> None:
        limit = None if max_shard_size is None else size(max_shard_size)
        text = _check_metadata(metadata, {})
        self._native = _Writer(os.fsdecode(path), text, limit, fsync, _sums(checksums))
        self.saved: Saved | None = None

    def add(self, name: str, tensor: Any) -> None:
        """Writes one tensor; its memory is free again when this returns.

        Raises as `save`; after an error the writer can only be closed.
        """
        specs, fetch = _entries({name: tensor})
        spec, owner = specs[name], None
        if spec.data_ptr == 0 and spec.data_len:
            spec, owner = fetch(name)
        self._native.add(name, spec, owner)

    def finish(self) -> Saved:
        """Makes the checkpoint appear in its place."""
        if self.saved is None:
            files, index, total, seconds = self._native.finish()
            self.saved = _saved(files, index, total, seconds)
        return self.saved

    def abort(self) -> None:
        """Leaves nothing behind. Does nothing after `finish`."""
        self._native.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()
