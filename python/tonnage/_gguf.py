"""What the headers of GGUF files say: `Checkpoint.gguf`."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

from tonnage._native import (
    _gguf_headers,
    _gguf_metadata,
    _gguf_name,
    _gguf_tensors,
    _Handle,
)


class GgufTensor(NamedTuple):
    """A tensor as its GGUF file describes it."""

    name: str
    #: ggml's type, such as `"Q4_K"`.
    type: str
    #: Extents in elements; the last is that of a row.
    shape: tuple[int, ...]
    #: Position of its file in `Checkpoint.files`.
    file: int
    #: First byte, counted from the start of the file.
    offset: int
    nbytes: int


class GgufInfo:
    """The headers of a checkpoint of GGUF files.

    Attributes:
        version: the version of the format, 2 or 3.
        byte_order: `"little"` or `"big"`. What is read is little-endian in any case.
        alignment: what offsets of tensors are multiples of.
    """

    def __init__(self, handle: _Handle) -> None:
        self._handle = handle
        headers = _gguf_headers(handle)
        self._files = len(headers)
        self.version, self.byte_order, self.alignment, _ = headers[0]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Keys and values with their types: `str` (`bytes` where it is not UTF-8), `int`, `float`,
        `bool`, and lists of them. Where two files of a split model have a key, the first counts.
        """
        merged: dict[str, Any] = {}
        for file in range(self._files):
            merged = {**_gguf_metadata(self._handle, file), **merged}
        return merged

    @cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        """The tensors by name, in the order of the headers."""
        rows = _gguf_tensors(self._handle)
        return {
            name: GgufTensor(name, kind, tuple(shape), file, offset, nbytes)
            for name, kind, shape, file, offset, nbytes in rows
        }

    @property
    def architecture(self) -> str | None:
        """What `general.architecture` says."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else None

    def to_hf(self, name: str) -> str | None:
        """The name that a tensor has in Hugging Face's checkpoints of this architecture.

        `None` where it has none there, or the architecture is not one of llama (and mistral),
        qwen2, qwen3, gemma, gemma2, gemma3, phi3.
        """
        return _gguf_name(self.architecture or "", name, True)

    def from_hf(self, name: str) -> str | None:
        """The name that a tensor of Hugging Face's has in GGUF."""
        return _gguf_name(self.architecture or "", name, False)

    def __repr__(self) -> str:
        files = f", {self._files} files" if self._files > 1 else ""
        order = "" if self.byte_order == "little" else ", big-endian"
        return f"<GGUF v{self.version}{order}, {len(self.tensors)} tensors{files}>"
