"""Checkpoints in which each rank has files of its own, with parts of tensors in them.

A file says which parts in PyTorch's own words: `DCP_SHARDING_INFO` in its metadata, with the first
index of each part, and, which PyTorch's files lack, the whole tensor's extents. A file holds one
part of a tensor at most; a rank with several has several files. Which files are the checkpoint says
a record beside them: it is what makes a save a checkpoint, and it is replaced as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any, NamedTuple

from .. import _errors
from .._native import _SharedFile, _SharedFiles, _write_record
from . import _boxes, _patches

#: The record's name and version.
RECORD = "tonnage.shards.json"
VERSION = 1
#: The key of a file's metadata that says which parts are in it, and its fields.
SHARDING = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"
SHAPE = "global_shape"
#: Longest record that is read.
_LONGEST = 64 << 20

_NAME = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.[0-9a-f]{16}\.safetensors")
_OLD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")


class OwnFile:
    """A file of one rank's own, under way."""

    def __init__(
        self, files: _SharedFiles, puts: list[_patches.Put], path: str, fsync: bool
    ) -> None:
        self.files, self.puts, self.path, self.fsync = files, puts, path, fsync
        self.named = False

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def write(self, threads: int | None) -> None:
        """Writes all that belongs in it, and gives it its name, under which nobody looks for it
        before the record has it.
        """
        ((place, length, _),) = self.files.places
        file = _SharedFile(os.fspath(place), length, self.fsync)
        _patches.write(file, self.puts, threads)
        self.files.commit()
        self.named = True

    def abort(self, keep: bool = False) -> None:
        """Removes it; with `keep` only if it has no name yet."""
        self.files.abort()
        if self.named and not keep:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def create(
    folder: str,
    parts: list[tuple[Any, _boxes.Piece]],
    order: Any,
    most: int | None,
    fsync: bool,
) -> list[OwnFile]:
    """Makes a rank's files for its parts: tensors as `save_sharded` offers them, and a box each."""
    groups = _groups(parts, most)
    if not groups and order["rank"] == 0:
        # What says of the whole state needs a file.
        groups = [[]]
    made: list[OwnFile] = []
    try:
        for number, group in enumerate(groups, start=1):
            shard = order["rank"] + 1
            name = f"shard-{shard:05}-model-{number:05}-of-{len(groups):05}.{order['number']}"
            path = os.path.join(folder, f"{name}.safetensors")
            extra = order["metadata"] if number == 1 else {}
            made.append(_create(path, group, extra, fsync))
    except BaseException:
        for file in made:
            file.abort()
        raise
    return made


def _groups(
    parts: list[tuple[Any, _boxes.Piece]], most: int | None
) -> list[list[tuple[Any, _boxes.Piece]]]:
    """Which parts share a file: none of one tensor, and no more bytes than a file may have."""
    groups: list[list[tuple[Any, _boxes.Piece]]] = []
    names: list[set[str]] = []
    sizes: list[int] = []
    first: dict[str, int] = {}
    for part, piece in parts:
        size = _boxes.elements(piece.size) * part.held.tensor.element_size()
        at = first.get(part.name, 0)
        while at < len(groups) and (
            part.name in names[at] or (most is not None and sizes[at] and sizes[at] + size > most)
        ):
            at += 1
        if at == len(groups):
            groups.append([])
            names.append(set())
            sizes.append(0)
        groups[at].append((part, piece))
        names[at].add(part.name)
        sizes[at] += size
        first[part.name] = at + 1
    return groups


def _create(
    path: str, group: list[tuple[Any, _boxes.Piece]], extra: dict[str, str], fsync: bool
) -> OwnFile:
    def scaled(part: Any, extents: _boxes.Extents) -> list[int]:
        return [*extents[:-1], extents[-1] * part.pack] if extents else []

    sharding = {
        part.name: {
            OFFSETS: scaled(part, piece.offset),
            SHAPE: scaled(part, part.held.shape),
        }
        for part, piece in group
    }
    metadata = {
        **extra,
        "format": extra.get("format", "pt"),
        "DCP_VERSION": "1.0",
        SHARDING: json.dumps(sharding, separators=(",", ":")),
    }
    files = _SharedFiles(
        path,
        [[(part.name, part.dtype, scaled(part, piece.size)) for part, piece in group]],
        metadata=metadata,
        fsync=fsync,
        checksums=False,
        room=0,
        stem="model",
    )
    puts = [
        _patches.Put(_boxes.view(part.held, piece), (0,) * len(piece.size), piece.size, at)
        for (part, piece), at in zip(group, files.tensors(0), strict=True)
    ]
    return OwnFile(files, puts, path, fsync)


def publish(
    folder: str, names: list[str], total: int, fsync: bool, more: dict[str, str] | None = None
) -> dict[str, Any]:
    """Makes these files the folder's checkpoint, and removes those of the one before. `more` is
    metadata that was not known when the files were made.
    """
    record = {"version": VERSION, "files": names, "metadata": more or {}}
    _write_record(os.path.join(folder, RECORD), json.dumps(record, indent=1).encode(), fsync)
    for name in os.listdir(folder):
        stale = _NAME.fullmatch(name) and name not in names
        if stale or _OLD.fullmatch(name):
            _remove(folder, name)
    return {
        "files": [os.path.join(folder, name) for name in names],
        "index": os.path.join(folder, RECORD),
        "total": total,
    }


def forget(path: str) -> None:
    """Removes a checkpoint of ranks' own files where another one took its place."""
    if not os.path.isdir(path) or not os.path.lexists(os.path.join(path, RECORD)):
        return
    _remove(path, RECORD)
    for name in os.listdir(path):
        if _NAME.fullmatch(name):
            _remove(path, name)


def _remove(folder: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, name))


class Record(NamedTuple):
    """What a folder's record says."""

    files: list[str]
    metadata: dict[str, str]


def read(folder: str) -> Record | None:
    """The record of a folder; `None` where there is none."""
    path = os.path.join(folder, RECORD)
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if len(content) > _LONGEST:
            raise ValueError("it is too long")
        found = json.loads(content)
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']!r} is not known")
        names = found["files"]
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise ValueError("a name in it is no file's of the folder")
        more = found["metadata"]
        if not isinstance(more, dict) or not all(isinstance(text, str) for text in more.values()):
            raise ValueError("its metadata is not of strings")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _errors.make("Format", f"{path}: {error}", code="RECORD", file=path) from None
    return Record(names, more)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
