"""`tonnage.convert`: a checkpoint in another container."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tonnage import _checkpoint, _progress, _save
from tonnage._native import _convert


def convert(
    source: Any,
    target: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    fsync: bool = True,
    threads: int | None = None,
    progress: _progress.ProgressLike = None,
    checksums: _save.Checksums | None = None,
) -> _save.Saved:
    """Writes a checkpoint in another container, block by block: memory does not depend on its size.

    * GGUF to safetensors: tensors as they are, blocks of quantised ones as `uint8` of shape
      `[.., rows, bytes of a row]`, and what is needed to make the GGUF file again
      (`docs/gguf.md`).
    * Such safetensors to GGUF: the file that they were made of, byte for byte. A split model
      becomes its files again, `NAME-00001-of-0000N.gguf`.
    * GGUF to GGUF: a copy; a split model becomes one file.

    Args:
        source: an open `Checkpoint`, or whatever `tonnage.open` takes.
        target: a name that ends in `.gguf` is a GGUF file; any other means what it means for
            `tonnage.save`.
        metadata: strings on top of the checkpoint's; for safetensors.
        max_shard_size: as for `tonnage.save`; for safetensors.
        fsync: as for `tonnage.save`.
        threads: as for `tonnage.save`.
        progress: as for `Checkpoint.load`.
        checksums: by default the copy has the kinds that the source has, and what is read is
            compared with those. `True` and `"blake3"`: as for `tonnage.save`, besides those.
            `False`: none, and nothing is compared. GGUF has no place but for the hash beside it.

    Raises:
        UsageError: to GGUF, from files that carry no GGUF header (`GGUF_NO_HEADER`).
        FormatError: what they carry does not fit the tensors beside it (`GGUF_CARRIED`); the
            source is not what its checksums say (`CHECKSUM_MISMATCH`).
        StorageError: a failed write. What was there before is whole.
    """
    opened = source if isinstance(source, _checkpoint.Checkpoint) else _checkpoint.open(source)
    bar = _progress.start(progress, opened.nbytes, "convert")
    try:
        limit = None if max_shard_size is None else _save.size(max_shard_size)
        text = None if metadata is None else dict(metadata)
        sums = _save._sums_of_copy(checksums)
        handle, where = opened._handle, os.fsdecode(target)
        written = _convert(handle, where, text, limit, fsync, threads, bar, sums)
    finally:
        if bar is not None:
            bar.close()
        if opened is not source:
            opened.close()
    return _save._saved(*written)
