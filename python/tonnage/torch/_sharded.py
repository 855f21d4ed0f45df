"""`save_sharded`: every rank writes its own bytes of one checkpoint.

1. Every rank tells the coordinator which boxes of which tensors it has. The coordinator decides who
   writes what: of replicas the rank with the least to write. It proves that every byte of every
   file is written once, before there is a file.
2. It makes the files beside the old ones, of their final size, with their headers, and tells every
   rank where its boxes go.
3. Every rank writes, brings its bytes to the disk, and says so.
4. The coordinator gives the files their names, the index last, and says so.

What goes wrong on one rank is an error on all of them, and the old checkpoint is still there. A
rank that is killed breaks the next exchange: the others get the group's error, at its timeout at
the latest, and the coordinator removes what was begun.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from .. import _errors
from .._native import _incoherent, _parse_size, _SavePlan, _SharedFile, _SharedFiles, _sum_part
from .._save import Saved
from . import _boxes, _encode, _patches, _ranks, _refuse, _shards, _structures

#: Bytes of data that a checksum is of (spec 13.3).
CHUNK = 8 << 20


def save_sharded(
    state: object,
    path: str | os.PathLike[str],
    *,
    group: Any = None,
    layout: Literal["single", "hf", "per_rank"] = "single",
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    checksums: bool = False,
    fsync: bool = True,
    threads: int | None = None,
) -> Saved:
    """Writes one checkpoint of what all ranks of a group have; each rank writes its own bytes.

    ```python
    tonnage.torch.save_sharded(model.state_dict(), "out/", layout="hf")
    ```

    Every rank of the group calls it with its own part of the state. The result is what one process
    would have saved that had all of it: `layout="single"` gives the same bytes.

    Args:
        state: tensors in dicts, lists and tuples, however nested, with any leaf that
            `tonnage.torch.save` takes. DTensors with any placements but `Partial`, tensors with the
            attributes of PyTorch's `CheckpointableTensor`, and plain tensors, which all ranks that
            have them have alike, and one writes. Ranks may have different tensors, as pipeline
            stages do.
        path: what it is for `tonnage.save`. All ranks must see the same folder there.
        group: the ranks. Default: all; without a group, this process alone.
        layout: `"single"` for one file, `"hf"` for files of at most `max_shard_size` with an index,
            as the Hugging Face Hub has them, `"per_rank"` for files of each rank's own, which hold
            parts of tensors and say which (`tonnage.torch.dcp.StorageReader` and PyTorch's
            `HuggingFaceStorageReader` read them).
        max_shard_size: as for `tonnage.save`; for `"hf"`, `"5GB"` if it is not given.
        metadata: strings for the files' metadata. Default: `{"format": "pt"}`.
        checksums: as for `tonnage.save`: the CRC-64/NVME of every 8 MiB. What was written is read
            once more for them, by all ranks together.
        fsync: the checkpoint survives a power cut once this has returned.
        threads: how many threads write on each rank.

    A rank needs at most 64 MiB of memory besides its tensors. Nothing of the old checkpoint is lost
    before the new one is complete, whatever happens to a rank.

    On NFS, SMB, FUSE and other file systems without locks for what they cache, ranks on several
    machines may not write to one file: there `"single"` and `"hf"` are refused, and `"per_rank"` is
    what to use. Lustre, GPFS, Ceph, BeeGFS, GFS2 and OCFS2 have such locks.

    Raises on every rank what went wrong on any of them; `UsageError` where the ranks' boxes leave a
    hole in a tensor or overlap, with the tensor and the range.
    """
    begun = time.perf_counter()
    ranks = _ranks.Ranks(group)
    settings = _Settings.of(path, layout, max_shard_size, metadata, checksums, fsync)
    save = _Save(ranks, settings, threads)
    try:
        files, index, total = save.run(state)
    finally:
        save.close()
    return Saved(files, index, total, time.perf_counter() - begun)


class _Settings(NamedTuple):
    """What all ranks have to say alike."""

    path: str
    layout: str
    most: int | None
    metadata: dict[str, str]
    checksums: bool
    fsync: bool

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        layout: str,
        most: int | str | None,
        metadata: Mapping[str, str] | None,
        checksums: bool,
        fsync: bool,
    ) -> _Settings:
        if layout not in ("single", "hf", "per_rank"):
            text = f"layout={layout!r}: it is 'single', 'hf' or 'per_rank'"
            raise _errors.usage(text, "LAYOUT")
        if layout == "per_rank" and checksums:
            raise _errors.usage("checksums: layout='per_rank' has none", "LAYOUT")
        if layout == "single" and most is not None:
            raise _errors.usage("max_shard_size: layout='single' is one file", "LAYOUT")
        if most is None and layout == "hf":
            most = "5GB"
        size = _parse_size(str(most)) if most is not None else None
        found = {"format": "pt"} if metadata is None else dict(metadata)
        return cls(os.fspath(path), layout, size, found, bool(checksums), bool(fsync))


class _Part(NamedTuple):
    """A tensor of this rank's, as it offers it."""

    name: str
    dtype: str
    #: Elements of the dtype that PyTorch counts as one.
    pack: int
    held: _boxes.Held


class _Save:
    """One save of one rank."""

    def __init__(self, ranks: _ranks.Ranks, settings: _Settings, threads: int | None) -> None:
        self.ranks, self.settings, self.threads = ranks, settings, threads
        #: The coordinator's files, until they have their names.
        self.files: _SharedFiles | None = None
        self.own: list[_shards.OwnFile] = []
        #: Whether the coordinator may make this rank's own files part of a checkpoint: they were
        #: told to it, and it has not said that the save failed.
        self.promised = False
        self.total = 0
        self.metadata: dict[str, str] = {}
        #: What went wrong here, to be raised when all have heard of it.
        self.error: BaseException | None = None

    def close(self) -> None:
        """Removes what did not become a checkpoint."""
        if self.files is not None:
            self.files.abort()
        for file in self.own:
            # A rank that has lost the others cannot know whether they made a checkpoint of what it
            # has written. If not, the next save removes it.
            file.abort(keep=self.promised)

    def run(self, state: object) -> tuple[tuple[str, ...], str | None, int]:
        parts, order = self.agree(state)
        heads = self.told(lambda: self.write(parts, order))
        if self.settings.checksums and self.settings.layout != "per_rank":
            heads = self.sum(heads)
        outcome = self.finish(heads)
        return tuple(outcome["files"]), outcome["index"], outcome["total"]

    # 1. and 2.

    def agree(self, state: object) -> tuple[list[_Part], Any]:
        """Tells the coordinator what is here, and hears what to do with it."""
        own: BaseException | None = None
        parts: list[_Part] = []
        try:
            parts, root = offered(state)
            head = {"settings": self.settings._asdict(), "host": _ranks.host(), "root": root}
            message = _ranks.pack(head, offer(parts))
        except Exception as error:
            own, message = error, _ranks.pack(_ranks.failure(error))
        replies: list[bytes] = []
        messages = self.ranks.gather(message)
        if self.ranks.leads:
            try:
                replies = self.decide([_ranks.unpack(message) for message in messages])
            except _OtherRank as error:
                replies = [_ranks.pack(error.head)] * self.ranks.size
            except Exception as error:
                own = own or error
                replies = [_ranks.pack({"rank": 0, **_ranks.failure(error)})] * self.ranks.size
        order, _ = _ranks.unpack(self.ranks.scatter(replies))
        if own is not None:
            raise own
        _ranks.raise_for(order)
        return parts, order

    def decide(self, messages: list[tuple[Any, bytes]]) -> list[bytes]:
        """The coordinator's answer to each rank, when all is proven and the files are made."""
        heads = [head for head, _ in messages]
        if failed := _ranks.failed(heads):
            raise _OtherRank(failed)
        settings = self.settings
        for rank, head in enumerate(heads):
            if head["settings"] != json.loads(json.dumps(settings._asdict())):
                raise _errors.usage(
                    f"rank {rank} was given {head['settings']}, rank 0 {settings._asdict()}",
                    "GROUP",
                )
        per_rank = settings.layout == "per_rank"
        offers = [body for _, body in messages]
        plan = _SavePlan(offers, settings.most, None, per_rank)
        names = [[part["name"] for part in json.loads(body)["tensors"]] for body in offers]
        root = _structures.merge([(h["root"], n) for h, n in zip(heads, names, strict=True)])
        metadata = dict(settings.metadata)
        if root is not None:
            metadata[_encode.KEY] = _structures.text(root)
        if per_rank:
            return self.decide_own(plan, metadata)
        check_coherent(settings.path, {head["host"] for head in heads})
        tensors = plan.tensors
        groups = plan.files
        self.files = _SharedFiles(
            settings.path,
            [[tensors[at] for at in group] for group in groups],
            metadata=metadata,
            fsync=settings.fsync,
            checksums=settings.checksums,
            room=0,
            stem="model",
        )
        self.metadata = metadata
        places = [(os.fspath(place), length) for place, length, _ in self.files.places]
        home = places_of(self.files, groups)
        return [
            _ranks.pack({
                "files": places,
                "writes": [[part, piece, *home[at]] for at, part, piece in plan.writes(rank)],
                "digest": bytes(plan.digest()).hex(),
            })
            for rank in range(self.ranks.size)
        ]  # fmt: skip

    def decide_own(self, plan: _SavePlan, metadata: dict[str, str]) -> list[bytes]:
        """The answer where each rank has files of its own."""
        os.makedirs(self.settings.path, exist_ok=True)
        self.total = plan.nbytes
        number = secrets.token_hex(8)
        # What says of the whole state is kept once.
        each = {key: text for key, text in metadata.items() if key != _encode.KEY}
        return [
            _ranks.pack({
                "number": number,
                "rank": rank,
                "metadata": metadata if rank == 0 else each,
                "writes": [[part, piece] for _, part, piece in plan.writes(rank)],
            })
            for rank in range(self.ranks.size)
        ]  # fmt: skip

    # 3.

    def told(self, work: Callable[[], Any]) -> list[Any]:
        """Does this rank's part, and tells the coordinator how it went. There, what all ranks told.

        A rank that failed goes on with the others to the end, where all hear of it.
        """
        try:
            head = {} if self.error is not None else work()
        except BaseException as error:
            self.error, head = error, _ranks.failure(error)
        self.promised = self.error is None
        return [_ranks.unpack(message)[0] for message in self.ranks.gather(_ranks.pack(head))]

    def write(self, parts: list[_Part], order: Any) -> Any:
        writes = order["writes"]
        if self.settings.layout == "per_rank":
            self.own = _shards.create(
                self.settings.path,
                [(parts[part], parts[part].held.pieces[piece]) for part, piece in writes],
                order,
                self.settings.most,
                self.settings.fsync,
            )
            for own in self.own:
                own.write(self.threads)
            return {"own": [own.name for own in self.own]}
        files: dict[int, list[_patches.Put]] = {}
        for part, piece, file, at in writes:
            found = parts[part].held
            box = found.pieces[piece]
            put = _patches.Put(_boxes.view(found, box), box.offset, found.shape, at)
            files.setdefault(file, []).append(put)
        for number, puts in files.items():
            path, length = order["files"][number]
            file = _SharedFile(path, length, self.settings.fsync)
            _patches.write(file, puts, self.threads)
            if self.settings.fsync:
                file.sync()
        return {}

    # The checksums of what was written, each rank those of its share.

    def sum(self, heads: list[Any]) -> list[Any]:
        orders: list[bytes] = []
        failed = _ranks.failed(heads)
        if self.ranks.leads:
            shares = self.shares() if failed is None else [[]] * self.ranks.size
            orders = [_ranks.pack(share) for share in shares]
        share, _ = _ranks.unpack(self.ranks.scatter(orders))
        sums = self.told(
            lambda: {"sums": [[file, at, _sum_part(*row)] for file, at, *row in share]}
        )
        return sums if failed is None else heads

    def shares(self) -> list[list[Any]]:
        """For each rank its share of the chunks: file, first chunk, and where they lie."""
        rows: list[Any] = []
        assert self.files is not None
        for number, (path, length, start) in enumerate(self.files.places):
            chunks = math.ceil((length - start) / CHUNK)
            each = max(math.ceil(chunks / self.ranks.size), 1)
            for first in range(0, chunks, each):
                begin = first * CHUNK
                count = min(each * CHUNK, length - start - begin)
                rows.append([number, first, os.fspath(path), start, begin, count])
        return [rows[rank :: self.ranks.size] for rank in range(self.ranks.size)]

    # 4.

    def finish(self, heads: list[Any]) -> Any:
        """Makes the files the checkpoint if all ranks could write, and tells them all."""
        replies: list[bytes] = []
        if self.ranks.leads:
            try:
                if failed := _ranks.failed(heads):
                    raise _OtherRank(failed)
                outcome = self.commit(heads)
            except _OtherRank as error:
                outcome = error.head
            except Exception as error:
                # What failed may have been a step after the record was written.
                self.error = error
                outcome = {"rank": 0, "unsure": True, **_ranks.failure(error)}
            replies = [_ranks.pack(outcome)] * self.ranks.size
        outcome, _ = _ranks.unpack(self.ranks.scatter(replies))
        if "error" in outcome and not outcome.get("unsure"):
            self.promised = False
        if self.error is not None:
            raise self.error
        _ranks.raise_for(outcome)
        # Files of this rank's own are no longer to be removed.
        self.own = []
        return outcome

    def commit(self, heads: list[Any]) -> Any:
        settings = self.settings
        if settings.layout == "per_rank":
            names = [name for head in heads for name in head["own"]]
            return _shards.publish(settings.path, names, self.total, settings.fsync)
        assert self.files is not None
        if settings.checksums:
            for number in range(len(self.files.places)):
                found = sorted(
                    (at, sums)
                    for head in heads
                    for file, at, sums in head["sums"]
                    if file == number
                )
                sums = [crc for _, part in found for crc in part]
                self.files.seal(number, self.metadata, sums)
        files, index, total, _ = self.files.commit()
        _shards.forget(settings.path)
        return {
            "files": [os.fspath(file) for file in files],
            "index": None if index is None else os.fspath(index),
            "total": total,
        }


class _OtherRank(Exception):
    """What another rank told, on its way to all."""

    def __init__(self, head: dict[str, Any]) -> None:
        super().__init__(head["error"])
        self.head = head


def offered(state: object) -> tuple[list[_Part], Any]:
    """What this rank has of each tensor, and the structure that holds them."""
    tensors, root = _structures.encode(state)
    parts = []
    for name, tensor in tensors.items():
        found = _boxes.held(tensor, name)
        if reason := _refuse.reason(found.tensor):
            raise TypeError(f"{name}: {reason}")
        dtype, pack = _patches.header_dtype(found.tensor, name)
        parts.append(_Part(name, dtype, pack, found))
    return parts, root


def offer(parts: list[_Part]) -> bytes:
    """The same in the planner's form, with extents in elements of the dtype."""
    tensors = [
        {
            "name": part.name,
            "dtype": part.dtype,
            "shape": scaled(part.held.shape, part.pack),
            "boxes": [
                [scaled(piece.offset, part.pack), scaled(piece.size, part.pack)]
                for piece in part.held.pieces
            ],
        }
        for part in parts
    ]
    return json.dumps({"tensors": tensors}, separators=(",", ":")).encode()


def scaled(extents: _boxes.Extents, pack: int) -> list[int]:
    """Extents with the last one in elements of the dtype."""
    return [*extents[:-1], extents[-1] * pack] if extents else []


def places_of(files: _SharedFiles, groups: list[list[int]]) -> dict[int, tuple[int, int]]:
    """For each tensor its file and its first byte there."""
    return {
        tensor: (number, at)
        for number, group in enumerate(groups)
        for tensor, at in zip(group, files.tensors(number), strict=True)
    }


def check_coherent(path: str, hosts: set[str]) -> None:
    """Refuses one file for ranks on several machines where they could lose each other's bytes."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if len(hosts) < 2:
        return
    if name := _incoherent(folder if os.path.isdir(folder) else os.path.dirname(folder) or "."):
        raise _errors.usage(
            f"{path}: {name} does not keep apart what {len(hosts)} machines write to one page of a"
            " file; layout='per_rank' gives each rank files of its own",
            "LAYOUT",
            file=path,
        )
