"""`reshard`: what every rank of a mesh has, in files of its own; and from there to other ranks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from tonnage import _errors, _progress, _save
from tonnage._native import _reshard
from tonnage._placements import Mesh, Replicate
from tonnage._plan import Plan
from tonnage._rules import Rules, patterns


@dataclass(frozen=True)
class Resharded:
    """What was written.

    Attributes:
        files: the files with tensors, in order of ranks.
        ranks: how many ranks they are of.
        tensors: how many tensors they are parts of.
        total_size: bytes of all ranks' tensors.
        seconds: wall-clock time.
    """

    files: tuple[str, ...]
    ranks: int
    tensors: int
    total_size: int
    seconds: float


def reshard(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Mesh | Plan | None = None,
    rules: Rules | str | None = None,
    *,
    max_shard_size: int | str | None = None,
    fsync: bool = True,
    checksums: _save.Checksums | None = None,
    threads: int | None = None,
    allow_symlinks: bool = False,
    progress: _progress.ProgressLike = None,
) -> Resharded:
    """Writes what every rank of a mesh has, file to file: no GPU, no model, and in memory a few
    portions at a time. Killed at any moment, it leaves what was there before, or all of the new.

    ```python
    tonnage.reshard("Qwen3-8B/", "tp4/", tonnage.Mesh(tp=4))
    tonnage.reshard("tp4/", "tp8/", tonnage.Mesh(tp=8), {"*.o_proj.weight": tonnage.Shard(1), ...})
    tonnage.reshard("tp8/", "model.safetensors")
    ```

    Args:
        source: a checkpoint, or a folder that this function wrote: all of its ranks are needed.
        target: a folder, which gets `rank-00000.safetensors` and so on; for one rank where `save`
            would write. It may be `source`.
        to: the ranks; or a `Plan` for the checkpoint `source`, which may be of a model's own rules.
            Default: one rank that has everything.
        rules: with a mesh: patterns and placements, of which the first that matches a name holds.
            Default, and `"auto"`: what the usual names of transformer weights say, with the heads
            of a `config.json` beside them; what those do not say is on every rank.
        max_shard_size, fsync, threads: as for `save`.
        checksums: as for `convert`.
        allow_symlinks: as for `open`.
        progress: as for `save`, in bytes of all ranks' tensors.

    Returns:
        The names of the files, and how much it was.

    Raises:
        UsageError: a rank's file is missing, is of another save, or says nothing of its parts; a
            tensor without a rule; parts that do not make up their tensor.
        And what `open` and `save` raise.
    """
    if isinstance(to, Plan) and rules is not None:
        raise _errors.usage("a plan has its rules")
    mesh = to if isinstance(to, Mesh) else Mesh()
    if to is None and rules is None:
        rules = {"*": Replicate()}
    if isinstance(rules, str) and rules != "auto":
        text = f"rules must be 'auto' or a dict of patterns and placements, not {rules!r}"
        raise _errors.usage(text, "RULES", found=rules)
    by_rule = None if rules is None or isinstance(rules, str) else json.dumps(patterns(rules))
    bar: _progress.Progress | None = None

    def watch(total: int) -> _progress.Progress | None:
        nonlocal bar
        bar = _progress.start(progress, total, "reshard")
        return bar

    try:
        files, ranks, tensors, total, seconds = _reshard(
            os.fspath(source),
            os.fspath(target),
            to._native if isinstance(to, Plan) else None,
            json.dumps({**mesh.to_json(), "targets": []}),
            by_rule,
            None if max_shard_size is None else _save.size(max_shard_size),
            fsync,
            _save._sums_of_copy(checksums),
            threads,
            allow_symlinks,
            watch,
        )
    finally:
        if bar is not None:
            bar.close()
    return Resharded(tuple(map(os.fsdecode, files)), ranks, tensors, total, seconds)
