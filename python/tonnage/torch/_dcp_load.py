"""The reading side of `tonnage.torch.dcp`."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as _StorageReader
from torch.futures import Future

from .. import _errors
from .._adapters import torch as _adapter
from .._native import _Handle
from . import _boxes, _decode, _encode, _patches, _ranks, _shards, _structures

#: Bytes that are read before they are copied, where they cannot be read into their place.
STAGED = _patches.STAGED


class Chunk(NamedTuple):
    """A box of a tensor, and where it is stored. Extents as PyTorch counts them."""

    offset: _boxes.Extents
    size: _boxes.Extents
    #: Position of the file, and of the tensor in it.
    file: int
    row: int


class Entry(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: str
    shape: _boxes.Extents
    chunks: list[Chunk]


class Table(NamedTuple):
    """What a checkpoint has."""

    files: list[str]
    tensors: dict[str, Entry]
    metadata: dict[str, str]


class StorageReader(_StorageReader):  # type: ignore[misc]
    """Reads checkpoints for `torch.distributed.checkpoint`.

    ```python
    dcp.load(state, storage_reader=tonnage.torch.dcp.StorageReader("Qwen3-8B/"))
    ```

    It opens what `StorageWriter` and `save_sharded` write, what PyTorch's own
    `HuggingFaceStorageWriter` writes (consolidated, or the parts of all ranks), and any checkpoint
    of safetensors files. Where there is an index file, it decides which file has a tensor. Each
    rank reads its own bytes straight into its tensors; nothing is unpickled. Placements with
    `_StridedShard` get the rows that are theirs, with any planner that keeps its tensors in
    `state_dict`, as PyTorch's does.

    Args:
        path: a folder, an index file, or a file.
        group: ranks that read headers once: the first reads them and tells the others. Then all of
            them must call `dcp.load` together. Default: every rank reads the headers it needs.
        threads: how many threads read on each rank.

    Before anything is read it is checked that the files have all of each tensor: a hole is an error
    that names the tensor and the range, and so is a file that is not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        group: Any = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self.group, self.threads = group, threads
        #: How many files this rank has opened for their headers.
        self.opened = 0
        self.load_id = ""
        self._table: Table | None = None
        self._handles: dict[int, _Handle] = {}
        self._leaves: dict[str, Any] = {}

    @property
    def checkpoint_id(self) -> str:
        """The path, under PyTorch's name for it."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins a new load."""
        if checkpoint_id is not None:
            self.path = os.fspath(checkpoint_id)
        self._table, self._handles = None, {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path."""
        return "://" not in os.fspath(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors and values of the checkpoint, from the files' headers."""
        table = self._read_table()
        self._table = table
        paths, self._leaves = _tree(table)
        entries: dict[str, Any] = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=_adapter.TYPES[entry.dtype]),
                size=torch.Size(entry.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size))
                    for c in entry.chunks
                ],
            )
            for name, entry in table.tensors.items()
        }
        entries |= {name: BytesStorageMetadata() for name in self._leaves}
        storage = {
            MetadataIndex(name, chunk.offset): chunk
            for name, entry in table.tensors.items()
            for chunk in entry.chunks
        }
        found = StorageMeta(checkpoint_id=self.path, load_id=self.load_id)
        return Metadata(entries, planner_data=paths, storage_data=storage, storage_meta=found)

    def _read_table(self) -> Table:
        if self.group is None:
            return self._open()
        ranks = _ranks.Ranks(self.group)
        replies: list[bytes] = []
        own: BaseException | None = None
        if ranks.leads:
            try:
                head: Any = self._open()._asdict()
            except Exception as error:
                own, head = error, {"rank": 0, **_ranks.failure(error)}
            replies = [_ranks.pack(head)] * ranks.size
        head, _ = _ranks.unpack(ranks.scatter(replies))
        if own is not None:
            raise own
        _ranks.raise_for(head)
        tensors = {
            name: Entry(dtype, tuple(shape), [_chunk(*chunk) for chunk in chunks])
            for name, (dtype, shape, chunks) in head["tensors"].items()
        }
        return Table(head["files"], tensors, head["metadata"])

    def _open(self) -> Table:
        record = _shards.read(self.path) if os.path.isdir(self.path) else None
        if record is not None:
            files = [os.path.join(self.path, name) for name in record.files]
            table = self._parts(files)
            return table._replace(metadata={**table.metadata, **record.metadata})
        if files := parts_of(self.path):
            return self._parts(files)
        handle = _Handle.open(self.path, False)
        self.opened += len(handle.files())
        tensors: dict[str, Entry] = {}
        for row in range(len(handle)):
            name, dtype, shape, *_ = handle.row(row)
            extents = _extents(name, dtype, shape)
            # One handle has them all.
            tensors[name] = Entry(dtype, extents, [Chunk((0,) * len(extents), extents, 0, row)])
        return Table([self.path], tensors, handle.metadata())

    def _parts(self, files: list[str]) -> Table:
        """Files that hold parts of tensors, and say so."""
        tensors: dict[str, Entry] = {}
        metadata: dict[str, str] = {}
        for number, path in enumerate(files):
            handle = _Handle.open_files([path], False)
            self.opened += 1
            found = handle.metadata()
            parts = sharding_of(found, path)
            metadata = {**found, **metadata}
            for row in range(len(handle)):
                name, dtype, shape, *_ = handle.row(row)
                size = _extents(name, dtype, shape)
                offset, whole = parts.get(name, ((0,) * len(shape), None))
                offset = _extents(name, dtype, offset)
                if len(offset) != len(size):
                    raise _sharding(
                        path, f"{name}: {len(offset)} offsets for {len(size)} dimensions"
                    )
                chunk = Chunk(offset, size, number, row)
                reach = tuple(begin + extent for begin, extent in zip(offset, size, strict=True))
                extents = reach if whole is None else _extents(name, dtype, whole)
                tensors[name] = _joined(tensors.get(name), name, dtype, extents, chunk, path)
        metadata.pop(_shards.SHARDING, None)
        return Table(files, tensors, metadata)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is to be set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leaves the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leaves the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what the plan asks for into the planner's tensors."""
        table = self._table
        if table is None:
            table = self._table = self._read_table()
            self._leaves = _tree(table)[1]
        strided = self._strided(plan, planner)
        items = [item for item in plan.items if item.dest_index.fqn not in strided]
        names = {item.storage_index.fqn for item in items if item.type == LoadItemType.TENSOR}
        for name in names | strided.keys():
            check_whole(name, table)
        reads = _Reads(self)
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                self._leaf(item, planner)
            else:
                reads.item(item, planner, table)
        for name, found in strided.items():
            reads.strided(found, table.tensors[name])
        reads.run()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _strided(self, plan: LoadPlan, planner: LoadPlanner) -> dict[str, _boxes.Held]:
        """The planner's tensors that are several boxes here. A plan takes each for one."""
        state = getattr(planner, "state_dict", None)
        if not isinstance(state, Mapping) or self._table is None:
            return {}
        found = {}
        for name, value in state.items():
            if name not in self._table.tensors or not hasattr(value, "placements"):
                continue
            held = _boxes.held(value, name)
            if len(held.pieces) > 1:
                found[name] = held
        return found

    def _leaf(self, item: ReadItem, planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        if name not in self._leaves:
            raise _errors.usage(
                f"{name}: the checkpoint has no value of this name", "UNKNOWN_TENSOR"
            )
        value = _decode.build(self._leaves[name], {})
        if type(planner).load_bytes is DefaultLoadPlanner.load_bytes:
            # It would unpickle what we would have to pickle for it.
            if planner.flatten_state_dict:
                path = planner.mappings[item.dest_index.fqn]
                set_element(planner.original_state_dict, path, value)
            else:
                planner.state_dict[item.dest_index.fqn] = value
            return
        content = io.BytesIO()
        torch.save(value, content)
        content.seek(0)
        planner.load_bytes(item, content)

    def handle(self, file: int) -> _Handle:
        """A file of the table, open."""
        if file not in self._handles:
            assert self._table is not None
            path = self._table.files[file]
            one = len(self._table.files) == 1
            self._handles[file] = (
                _Handle.open(path, False) if one else _Handle.open_files([path], False)
            )
        return self._handles[file]


def _chunk(offset: list[int], size: list[int], file: int, row: int) -> Chunk:
    return Chunk(tuple(offset), tuple(size), file, row)


def _extents(name: str, dtype: str, shape: Iterable[int]) -> _boxes.Extents:
    """Extents as PyTorch counts them."""
    found = tuple(shape)
    if dtype not in _adapter.TYPES:
        raise _errors.make(
            "Unsupported", f"{name}: this version of torch has no dtype {dtype}",
            code="UNSUPPORTED_DTYPE", tensor=name,
        )  # fmt: skip
    return (*found[:-1], found[-1] // 2) if dtype == "F4" and found else found


def _tree(table: Table) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each name its path in the nested state, and the nodes of what is no tensor."""
    text = table.metadata.get(_encode.KEY)
    if text is None:
        return {name: (name,) for name in table.tensors}, {}
    paths, leaves = _structures.flatten(_decode.parse(text))
    return {**{name: (name,) for name in table.tensors}, **paths}, leaves


def parts_of(path: str) -> list[str]:
    """The files of a folder that holds parts of tensors in PyTorch's way: no index, and files that
    say which parts they have.
    """
    if not os.path.isdir(path):
        return []
    names = sorted(os.listdir(path))
    if any(name.endswith(".safetensors.index.json") for name in names):
        return []
    files = [
        os.path.join(path, name)
        for name in names
        if name.endswith(".safetensors") and not name.startswith(".")
    ]
    if len(files) == 1 or not files:
        return files if files and _is_part(files[0]) else []
    return files if any(map(_is_part, files)) else []


def _is_part(path: str) -> bool:
    return _shards.SHARDING in _Handle.open_files([path], False).metadata()


def sharding_of(metadata: Mapping[str, str], path: str) -> dict[str, tuple[Any, Any]]:
    """Of each tensor of a file where it begins in the whole one, and, if that is said, the whole
    one's extents.
    """
    text = metadata.get(_shards.SHARDING)
    if text is None:
        return {}
    try:
        found = json.loads(text)
        return {
            name: (_numbers(row[_shards.OFFSETS]), _numbers(row.get(_shards.SHAPE)))
            for name, row in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _sharding(path, f"{type(error).__name__}: {error}") from None


def _numbers(found: Any) -> _boxes.Extents | None:
    if found is None:
        return None
    if not isinstance(found, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in found):
        raise ValueError(f"{found!r} is no list of extents")
    return tuple(found)


def _sharding(path: str, text: str) -> Exception:
    return _errors.make("Format", f"{path}: {_shards.SHARDING}: {text}", code="SHARDING", file=path)


def _joined(
    entry: Entry | None, name: str, dtype: str, extents: _boxes.Extents, chunk: Chunk, path: str
) -> Entry:
    if entry is None:
        return Entry(dtype, extents, [chunk])
    if entry.dtype != dtype or len(entry.shape) != len(extents):
        raise _sharding(path, f"{name}: {dtype} {extents} here, {entry.dtype} {entry.shape} before")
    shape = tuple(map(max, entry.shape, extents))
    same = [c for c in entry.chunks if (c.offset, c.size) == (chunk.offset, chunk.size)]
    # A replica: one copy is enough.
    return entry._replace(shape=shape, chunks=entry.chunks if same else [*entry.chunks, chunk])


def check_whole(name: str, table: Table) -> None:
    """Checks that the chunks of a tensor tile it."""
    entry = table.tensors.get(name)
    if entry is None:
        raise _errors.usage(f"{name}: the checkpoint has no such tensor", "UNKNOWN_TENSOR")
    boxes = [(chunk.offset, chunk.size) for chunk in entry.chunks]
    count = sum(_boxes.elements(size) for _, size in boxes)
    whole = _boxes.elements(entry.shape)
    if count < whole or len(boxes) > 1:
        hole = _boxes.missing(entry.shape, boxes) if count < whole or count > whole else None
        hole = hole or (_boxes.missing(entry.shape, boxes) if _overlap(entry.chunks) else None)
        if hole is not None:
            raise _errors.make(
                "Format",
                f"{name}: no file of the checkpoint has {_boxes.text(*hole)}"
                f" of {list(entry.shape)}",
                code="HOLE", tensor=name, found="no file", needed=_boxes.text(*hole),
            )  # fmt: skip
    if len(boxes) > 1 and (pair := _overlap(entry.chunks)) is not None:
        one, other = (table.files[chunk.file] for chunk in pair)
        raise _errors.make(
            "Format",
            f"{name}: {one} and {other} both have part of"
            f" {_boxes.text(pair[0].offset, pair[0].size)}",
            code="OVERLAP", tensor=name, file=one,
        )  # fmt: skip


def _overlap(chunks: list[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two chunks that share elements, if there are such. Along one dimension, most are apart."""
    if not chunks or not chunks[0].offset:
        return (chunks[0], chunks[1]) if len(chunks) > 1 else None
    spread = [len({chunk.offset[dim] for chunk in chunks}) for dim in range(len(chunks[0].offset))]
    dim = spread.index(max(spread))
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset[dim]):
        active = [c for c in active if c.offset[dim] + c.size[dim] > chunk.offset[dim]]
        for other in active:
            if _boxes.intersection((chunk.offset, chunk.size), (other.offset, other.size)):
                return other, chunk
        if math.prod(chunk.size):
            active.append(chunk)
    return None


class _Reads:
    """Boxes of stored tensors on their way into tensors."""

    def __init__(self, reader: StorageReader) -> None:
        self.reader = reader
        #: Of each file what can be read straight into its place.
        self.jobs: dict[int, list[Any]] = {}
        self.staged: list[tuple[Chunk, str, Any, torch.Tensor]] = []
        self.commits: list[tuple[LoadPlanner, ReadItem, torch.Tensor]] = []

    def item(self, item: ReadItem, planner: LoadPlanner, table: Table) -> None:
        name = item.storage_index.fqn
        entry = table.tensors[name]
        chunk = _of(entry, item.storage_index, name)
        tensor = planner.resolve_tensor(item).detach()
        lengths = tuple(item.lengths)
        if tuple(tensor.shape) != lengths:
            found = f"{name}: the planner gave {tuple(tensor.shape)} where it planned {lengths}"
            raise _errors.usage(found, "PLAN_FORM", tensor=name)
        self.add(chunk, entry.dtype, tuple(item.storage_offsets), tensor)
        self.commits.append((planner, item, tensor))

    def strided(self, found: _boxes.Held, entry: Entry) -> None:
        """All boxes of a tensor that a planner takes for one."""
        for piece in found.pieces:
            local = _boxes.view(found, piece)
            for chunk in entry.chunks:
                common = _boxes.intersection((chunk.offset, chunk.size), (piece.offset, piece.size))
                if common is None:
                    continue
                offset, size = common
                there = tuple(a - b for a, b in zip(offset, chunk.offset, strict=True))
                here = tuple(a - b for a, b in zip(offset, piece.offset, strict=True))
                self.add(chunk, entry.dtype, there, _patches.narrow(local, here, size))

    def add(self, chunk: Chunk, dtype: str, offset: _boxes.Extents, into: torch.Tensor) -> None:
        """Reads a box of a chunk, from this index of it on, into a tensor."""
        if not into.numel():
            return
        straight = (
            into.device.type == "cpu"
            and into.is_contiguous()
            and into.dtype == _adapter.TYPES[dtype]
            and not into.is_conj()
            and not into.is_neg()
        )
        if not straight:
            self.staged.append((chunk, dtype, offset, into))
            return
        buffer = _bytes_of(into)
        ranges = self.ranges(chunk, dtype, offset, tuple(into.shape))
        job = (chunk.row, buffer, ranges, False, None)
        self.jobs.setdefault(chunk.file, []).append((into.data_ptr(), into.nbytes, job))

    def ranges(
        self, chunk: Chunk, dtype: str, offset: _boxes.Extents, size: _boxes.Extents
    ) -> list[tuple[int, int, int]] | None:
        """The box as the native side takes it; `None` for all of the chunk."""
        if size == chunk.size:
            return None
        pack = 2 if dtype == "F4" else 1
        ranges = [(a, a + n, 1) for a, n in zip(offset, size, strict=True)]
        begin, end, _ = ranges[-1]
        return [*ranges[:-1], (begin * pack, end * pack, 1)]

    def run(self) -> None:
        """Reads everything."""
        for file, jobs in self.jobs.items():
            for apart in _rounds(jobs):
                self.reader.handle(file).read(apart, self.reader.threads)
        for chunk, dtype, offset, into in self.staged:
            self.stage(chunk, dtype, offset, into)
        for planner, item, tensor in self.commits:
            planner.commit_tensor(item, tensor)

    def stage(self, chunk: Chunk, dtype: str, offset: _boxes.Extents, into: torch.Tensor) -> None:
        """Reads a box part by part, and copies each to where, and as what, it is wanted."""
        stored = _adapter.TYPES[dtype]
        handle = self.reader.handle(chunk.file)
        for begin, size in _patches.parts(tuple(into.shape), stored.itemsize, STAGED):
            there = tuple(a + b for a, b in zip(offset, begin, strict=True))
            host = torch.empty(size, dtype=stored)
            buffer = _bytes_of(host)
            ranges = self.ranges(chunk, dtype, there, size)
            handle.read([(chunk.row, buffer, ranges, False, None)], self.reader.threads)
            target = _patches.narrow(into, begin, size)
            if stored == target.dtype and stored.itemsize == 1:
                # Not every dtype of one byte can be copied as what it is.
                host, target = host.view(torch.uint8), target.view(torch.uint8)
            target.copy_(host)


def _rounds(jobs: list[Any]) -> list[list[Any]]:
    """Jobs in as few rounds as there can be, none of which fills the same memory twice: tensors of
    a state may be tied.
    """
    rounds: list[list[Any]] = []
    ends: list[int] = []
    for begin, length, job in sorted(jobs, key=lambda row: row[:2]):
        at = next((at for at, end in enumerate(ends) if end <= begin), len(rounds))
        if at == len(rounds):
            rounds.append([])
            ends.append(0)
        rounds[at].append(job)
        ends[at] = begin + length
    return rounds


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _of(entry: Entry, index: MetadataIndex, name: str) -> Chunk:
    """The chunk that a plan means: by its number, if that fits, or by its offset."""
    if index.index is not None and index.index < len(entry.chunks):
        chunk: Chunk = entry.chunks[index.index]
        if index.offset is None or tuple(index.offset) == chunk.offset:
            return chunk
    for chunk in entry.chunks:
        if index.offset is not None and tuple(index.offset) == chunk.offset:
            return chunk
    raise _errors.usage(
        f"{name}: the checkpoint has no part at {index.offset}", "PLAN_FORM", tensor=name
    )
