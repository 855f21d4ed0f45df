"""`tonnage.quantize`, `repack`, `quantize_checkpoint` and `save_gguf`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tonnage import _arrays, _checkpoint, _progress, _save
from tonnage._native import (
    _export_gguf,
    _Packed,
    _quantize,
    _quantize_checkpoint,
    _schemes,
)


@dataclass(frozen=True)
class RepackReport:
    """What a conversion did.

    Attributes:
        how: `"rearranged"` (codes, scales and zero points are the same: the way back gives the same
            bytes), `"same values"` (said in another way), `"changed"` (codes were kept, some values
            changed) or `"requantised"` (values were rounded to new codes).
        elements: how many elements there are.
        changed: how many of them have another value.
        max_error: the largest difference of two values.
        notes: what was written although readers differ, or what was given up.
    """

    how: str
    elements: int
    changed: int
    max_error: float
    notes: tuple[str, ...]


class PackedTensor:
    """A quantised tensor in memory.

    Attributes:
        name: its logical name.
        scheme: the scheme with its version, such as `"gptq@1"` or `"ggml/Q4_K@1"`.
        shape: the logical shape.
        dtype: the dtype of its values, such as `"BF16"`.
        params: what the scheme is told: bits, group.
        framework: what its parts are tensors of.
        report: how it was made of another scheme; `None` where it was not.
    """

    def __init__(self, packed: _Packed, framework: str, report: RepackReport | None = None) -> None:
        self._packed = packed
        self.name, self.scheme = packed.name, packed.scheme
        self.shape, self.dtype = tuple(packed.shape), packed.dtype
        self.params: dict[str, Any] = packed.params()
        self.framework, self.report = framework, report

    @property
    def parts(self) -> dict[str, Any]:
        """The tensors of a checkpoint that it is made of, by name: `tonnage.save` takes them."""
        made = _arrays.arrays(self.framework)
        parts = {}
        for name, dtype, shape, data in self._packed.parts():
            row = _arrays.row_of(dtype, name)
            parts[name] = made.of_memory(memoryview(bytearray(data)), row, tuple(shape))
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(len(data) for *_, data in self._packed.parts())

    def dequantize(self) -> Any:
        """The values as 32-bit floats, each rounded to `dtype` as the scheme says."""
        row = _arrays.row_of("F32", self.name)
        memory = memoryview(bytearray(self._packed.values()))
        return _arrays.arrays(self.framework).of_memory(memory, row, self.shape)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"<PackedTensor {self.name} {self.scheme} {self.dtype} {shape}, {self.nbytes} bytes>"


def schemes() -> dict[str, list[str]]:
    """The schemes that tensors are quantised to, with other names, beside ggml's types."""
    return dict(_schemes())


def quantize(
    tensor: Any,
    scheme: str,
    *,
    name: str = "weight",
    framework: str | None = None,
    **options: int | bool | str,
) -> PackedTensor:
    """Quantises a tensor by rounding to nearest: nothing is calibrated or searched.

    Args:
        tensor: floats of any framework that `tonnage.save` takes, at least two axes.
        scheme: one of `tonnage.schemes()`, or a type of ggml such as `"q4_k"`. Options may follow
            behind a colon: `"gptq:bits=4,group=128,symmetric=false"`.
        name: the tensor's logical name; parts are called after it.
        framework: what parts are tensors of. Default: PyTorch if `tensor` is, else NumPy.
        **options: `bits`, `group` (-1: one a row), `symmetric`, `block` (`"128x128"`), `scale` (a
            dtype), `element` (`"e4m3"`, `"e5m2"`).

    Raises:
        UsageError: a scheme or an option that is not known (`QUANT_UNSUPPORTED`, `QUANT_OPTION`), a
            value that is not finite (`QUANT_VALUE`), a shape that the scheme can't have.
    """
    specs, fetch = _save._entries({name: tensor})
    spec: Any = specs[name]
    owner: object = None
    if not getattr(spec, "data_ptr", 0):
        spec, owner = fetch(name)
    packed = _quantize(name, spec, owner, _with(scheme, options))
    return PackedTensor(packed, framework or _framework_of(tensor))


def repack(
    tensor: PackedTensor,
    scheme: str,
    *,
    lossy: bool = False,
    **options: int | bool | str,
) -> PackedTensor:
    """A quantised tensor in another scheme.

    What both schemes can say goes over bit by bit: codes, scales and zero points are the same, or
    all values were compared and are. Anything else is refused, with what would be lost and how
    often; `lossy=True` does it all the same, and `report` of what comes back counts what changed.

    Raises:
        UsageError: `QUANT_LOSSY` where something would be lost; `QUANT_UNSUPPORTED` and
            `QUANT_OPTION` for what is not known.
    """
    packed, row = tensor._packed.repack(_with(scheme, options), lossy)
    how, elements, changed, largest, notes = row
    report = RepackReport(how, elements, changed, largest, tuple(notes))
    return PackedTensor(packed, tensor.framework, report)


def _with(scheme: str, options: Mapping[str, int | bool | str]) -> str:
    def word(value: int | bool | str) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    said = ",".join(f"{key}={word(value)}" for key, value in options.items())
    if not said:
        return scheme
    return f"{scheme},{said}" if ":" in scheme else f"{scheme}:{said}"


def _framework_of(tensor: Any) -> str:
    return "torch" if type(tensor).__module__.partition(".")[0] == "torch" else "numpy"


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What `quantize_checkpoint` wrote.

    Attributes:
        saved: the files.
        config: the `config.json` that was written beside them; `None` where the source has none.
        tensors: logical names of what was quantised.
        kept: tensors that were chosen and stay as they are, with the reason.
    """

    saved: _save.Saved
    config: str | None
    tensors: tuple[str, ...]
    kept: dict[str, str]


def quantize_checkpoint(
    source: Any,
    target: str | os.PathLike[str],
    scheme: str,
    *,
    select: str | Sequence[str] = (),
    max_shard_size: int | str | None = None,
    fsync: bool = True,
    progress: _progress.ProgressLike = None,
    checksums: _save.Checksums = False,
    **options: int | bool | str,
) -> QuantizedCheckpoint:
    """Writes a copy of a checkpoint with its weights quantised, one tensor in memory at a time.

    Args:
        source: an open `Checkpoint`, or whatever `tonnage.open` takes.
        target: as for `tonnage.save`. A folder gets the source's `config.json` too, with the
            `quantization_config` that the scheme's libraries read.
        scheme: as for `tonnage.quantize`.
        select: patterns of names. Default: matrices called `*.weight`, without embeddings,
            `lm_head`, norms and routers.
        max_shard_size: as for `tonnage.save`.
        fsync: as for `tonnage.save`.
        progress: as for `Checkpoint.load`.
        checksums: as for `tonnage.save`.
        **options: as for `tonnage.quantize`.
    """
    patterns = [select] if isinstance(select, str) else list(select)
    limit = None if max_shard_size is None else _save.size(max_shard_size)
    with _Opened(source, progress, "quantize") as (handle, bar):
        where, sums = os.fsdecode(target), _save._sums(checksums)
        text = _with(scheme, options)
        written, config, tensors, kept = _quantize_checkpoint(
            handle, where, text, patterns, limit, fsync, bar, sums
        )
    path = None if config is None else os.fsdecode(config)
    return QuantizedCheckpoint(_save._saved(*written), path, tuple(tensors), dict(kept))


@dataclass(frozen=True)
class GgufSaved:
    """What `save_gguf` wrote.

    Attributes:
        saved: the file.
        tensors: ggml's type of each tensor, by its name in the file.
        notes: what the file lacks that a runtime may want, and what was done in another way than
            asked.
    """

    saved: _save.Saved
    tensors: dict[str, str]
    notes: tuple[str, ...]


def save_gguf(
    source: Any,
    target: str | os.PathLike[str],
    type: str | None = None,
    *,
    types: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    keep_names: bool = False,
    fsync: bool = True,
    progress: _progress.ProgressLike = None,
) -> GgufSaved:
    """Writes plain tensors as a GGUF file: names, rows and metadata as llama.cpp has them.

    Architecture and numbers come from the `config.json` beside the checkpoint, a byte-level
    tokenizer from `tokenizer.json`; what they don't say is among the notes, and `metadata` says it.

    Args:
        source: an open `Checkpoint` of floats, or whatever `tonnage.open` takes.
        target: the file.
        type: ggml's type of matrices, such as `"q4_k"`, `"q8_0"`, `"f16"`. Default: what they are.
            Rows that are no whole blocks get the type that llama.cpp takes then; vectors are F32.
        types: types by patterns over names, in the file or in the source; the first that matches
            holds.
        metadata: keys and values on top: text, numbers, truth values, and lists of them. Whole
            numbers are U32 where they fit, others F32.
        keep_names: names and values as they are, for architectures that are not known.
        fsync: as for `tonnage.save`.
        progress: as for `Checkpoint.load`.

    Raises:
        UsageError: `GGUF_EXPORT` for an architecture or a name that is not known.
    """
    with _Opened(source, progress, "save_gguf") as (handle, bar):
        rules, kv = list((types or {}).items()), dict(metadata or {})
        where = os.fsdecode(target)
        written, tensors, notes = _export_gguf(
            handle, where, type, rules, kv, keep_names, fsync, bar
        )
    return GgufSaved(_save._saved(*written), dict(tensors), tuple(notes))


class _Opened:
    """An open checkpoint and a bar, closed again where they were made here."""

    def __init__(self, source: Any, progress: _progress.ProgressLike, what: str) -> None:
        self._source, self._progress, self._what = source, progress, what

    def __enter__(self) -> tuple[Any, Any]:
        source = self._source
        mine = not isinstance(source, _checkpoint.Checkpoint)
        self._opened = _checkpoint.open(source) if mine else source
        self._mine = mine
        self._bar = _progress.start(self._progress, self._opened.nbytes, self._what)
        return self._opened._handle, self._bar

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._mine:
            self._opened.close()
