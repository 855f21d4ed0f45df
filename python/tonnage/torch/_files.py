"""The reference's functions for a dict of tensors in a file."""

from __future__ import annotations

import torch

from .. import _dropin
from .._dropin import Path
from ._names import _entries


def save_file(
    tensors: dict[str, torch.Tensor],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None:
    """Writes a file of these tensors, replacing what was there whole or not at all.

    Tensors on other devices come to the host one at a time. Nothing keeps other threads from
    changing a tensor meanwhile. With `fsync`, the file survives a power cut once this has returned.
    """
    _dropin.save_file(_entries(tensors), filename, metadata, fsync)


def load_file(
    filename: Path, device: str | int = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """The tensors of a file, on `device`.

    On the CPU, `backend="mmap"` gives tensors that view the file: they are read when used, and
    writing to them changes memory, never the file. `backend="pread"` reads them now.
    """
    return _dropin.load_file(filename, "torch", device, backend)
