"""The writing side of `tonnage.torch.dcp`."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import secrets
import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner import (
    SavePlanner as AnySavePlanner,
)
from torch.distributed.checkpoint.storage import StorageWriter as _StorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .. import _errors
from .._native import _SavePlan, _SharedFile, _SharedFiles, _sum_part
from . import _boxes, _encode, _patches, _ranks, _refuse, _sharded, _shards, _structures

#: Bytes of header kept free for a leaf whose value is not known when the file is made.
ROOM = 512
#: Tensors that a planner makes anew are written when so many bytes have come together.
BATCH = 32 << 20


class SavePlanner(DefaultSavePlanner):  # type: ignore[misc]
    """PyTorch's default planner, which also knows what `_StridedShard` leaves to a rank.

    The default planner takes such a shard for one box, which overlaps those of other ranks, and
    refuses to save it. This one plans each of its boxes.
    """

    state_dict: dict[str, Any]

    def create_local_plan(self) -> SavePlan:
        """Plans this rank's boxes."""
        everything: dict[str, Any] = self.state_dict
        strided = {
            name: found for name, value in everything.items() if (found := _strided(value, name))
        }
        self.state_dict = {name: value for name, value in everything.items() if name not in strided}
        try:
            plan = super().create_local_plan()
        finally:
            self.state_dict = everything
        if not strided:
            return plan
        items = [*plan.items]
        for name, found in strided.items():
            properties = TensorProperties.create_from_tensor(found.tensor)
            for piece in found.pieces:
                chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))
                data = TensorWriteData(chunk, properties, torch.Size(found.shape))
                index = MetadataIndex(name, chunk.offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor, or this rank's box of it, or the value, that an index means."""
        value = self.state_dict.get(index.fqn)
        found = _strided(value, index.fqn)
        if found is None:
            return super().lookup_object(index)
        for piece in found.pieces:
            if torch.Size(piece.offset) == index.offset:
                return _boxes.view(found, piece)
        raise ValueError(f"{index.fqn}: this rank has no box at {index.offset}")


def _strided(value: object, name: str) -> _boxes.Held | None:
    """What this rank has of a DTensor that is several boxes here."""
    if not _refuse.is_dtensor(value):
        return None
    found = _boxes.held(value, name)
    return found if len(found.pieces) > 1 else None


class StorageWriter(_StorageWriter):  # type: ignore[misc]
    """Writes checkpoints of `torch.distributed.checkpoint` as safetensors.

    ```python
    dcp.save(state, storage_writer=tonnage.torch.dcp.StorageWriter("out/"))
    ```

    Every rank writes its own bytes of the same files, as `tonnage.torch.save_sharded` does: there
    is nothing to consolidate, and what comes out is a checkpoint like any other. What is no tensor
    (the learning rate, a tuple of betas) becomes JSON in the metadata; `tonnage.torch.load` gives
    the nested state back. Nothing is pickled, and a value that has no such form is refused.

    Args:
        path: the folder, or a name that ends in `.safetensors`.
        layout: `"hf"`, `"single"` or `"per_rank"`, as for `save_sharded`.
        max_shard_size: as for `save_sharded`.
        fqn_to_index_mapping: in which file each tensor is, from 1 on, instead of `max_shard_size`.
        metadata: strings for the files' metadata. Default: `{"format": "pt"}`.
        checksums: as for `save_sharded`; the coordinator computes them.
        fsync: the checkpoint survives a power cut once `dcp.save` has returned.
        threads: how many threads write on each rank.

    State with `_StridedShard` placements needs `planner=tonnage.torch.dcp.SavePlanner()`; PyTorch's
    own planner refuses it.
    """

    #: Whether a single file is named as one of several is, and has an index.
    _numbered = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Literal["single", "hf", "per_rank"] = "hf",
        *,
        max_shard_size: int | str | None = None,
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        metadata: Mapping[str, str] | None = None,
        checksums: bool = False,
        fsync: bool = True,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if fqn_to_index_mapping is not None and (layout != "hf" or max_shard_size is not None):
            text = "fqn_to_index_mapping goes with layout='hf' and without max_shard_size"
            raise _errors.usage(text, "LAYOUT")
        self.settings = _sharded._Settings.of(
            path, layout, max_shard_size, metadata, checksums, fsync
        )
        self.numbers = None if fqn_to_index_mapping is None else dict(fqn_to_index_mapping)
        self.threads = threads
        self.save_id = ""
        self._files: _SharedFiles | None = None
        self._nbytes = 0

    def __getstate__(self) -> dict[str, Any]:
        # Another process saves: nothing of a save under way goes there.
        return {**self.__dict__, "_files": None}

    @property
    def path(self) -> str:
        """Where the checkpoint goes."""
        return self.settings.path

    @property
    def checkpoint_id(self) -> str:
        """The same, under PyTorch's name for it."""
        return self.settings.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins a new save; one that was not completed leaves nothing behind."""
        self._abort()
        if checkpoint_id is not None:
            self.settings = self.settings._replace(path=os.fspath(checkpoint_id))
        self.save_id = secrets.token_hex(8)

    def _abort(self) -> None:
        if self._files is not None:
            self._files.abort()
            self._files = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be set up, but that the ranks must plan together."""
        if kwargs.get("use_collectives") is False:
            raise _errors.usage(
                "use_collectives=False: ranks that do not plan together cannot share files", "GROUP"
            )

    def storage_meta(self) -> StorageMeta:
        """What a planner may want to know."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path."""
        return "://" not in os.fspath(checkpoint_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Adds which machine this is."""
        if not plan.usable:
            text = "a planner with enable_plan_caching: each save has files of its own to plan for"
            raise _errors.usage(text, "PLAN_CACHE")
        return dataclasses.replace(plan, storage_data=_ranks.host())

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Proves that every byte is written once, makes the files, and tells each rank its part."""
        self._abort()
        settings = self.settings
        if not all(plan.usable for plan in plans):
            text = "a planner with enable_plan_caching: each save has files of its own to plan for"
            raise _errors.usage(text, "PLAN_CACHE")
        rows = [_rows(plan) for plan in plans]
        per_rank = settings.layout == "per_rank"
        plan = _SavePlan([_offer(found) for found in rows], settings.most, self.numbers, per_rank)
        self._nbytes = plan.nbytes
        if per_rank:
            return self._own(plans, plan, rows)
        hosts = {each.storage_data for each in plans}
        _sharded.check_coherent(settings.path, hosts)
        tensors, groups = plan.tensors, plan.files
        leaves = sum(item.type == WriteItemType.BYTE_IO for each in plans for item in each.items)
        names = sum(2 * len(item.index.fqn) for each in plans for item in each.items)
        nested = any(
            steps != (name,) for each in plans for name, steps in (each.planner_data or {}).items()
        )
        self._files = files = _SharedFiles(
            settings.path,
            [[tensors[at] for at in group] for group in groups],
            metadata=settings.metadata,
            fsync=settings.fsync,
            checksums=settings.checksums,
            room=leaves * ROOM + names + 64 * len(tensors) if leaves or nested else 0,
            stem="model",
            numbered=self._numbered,
        )
        weakref.finalize(self, files.abort)
        places = [(os.fspath(place), length) for place, length, _ in files.places]
        home = _sharded.places_of(files, groups)
        orders = []
        for rank, each in enumerate(plans):
            writes = {}
            for at, part, piece in plan.writes(rank):
                writes[rows[rank][part][2][piece]] = home[at]
            orders.append(
                dataclasses.replace(each, storage_data={"files": places, "writes": writes})
            )
        return orders

    def _own(self, plans: list[SavePlan], plan: _SavePlan, rows: list[list[Any]]) -> list[SavePlan]:
        os.makedirs(self.settings.path, exist_ok=True)
        number = secrets.token_hex(8)
        orders = []
        for rank, each in enumerate(plans):
            items = [rows[rank][part][2][piece] for _, part, piece in plan.writes(rank)]
            order = {"number": number, "rank": rank, "metadata": self.settings.metadata}
            orders.append(dataclasses.replace(each, storage_data={**order, "items": items}))
        return orders

    def write_data(self, plan: SavePlan, planner: AnySavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's part, and encodes what is no tensor."""
        try:
            return self._write(plan, planner)
        except BaseException:
            # PyTorch asks a writer that failed for nothing more.
            self._abort()
            raise

    def _write(self, plan: SavePlan, planner: AnySavePlanner) -> Future[list[WriteResult]]:
        order = plan.storage_data
        results = [
            WriteResult(item.index, 0, {"leaf": leaf(item, planner)})
            for item in plan.items
            if item.type == WriteItemType.BYTE_IO
        ]
        if self.settings.layout == "per_rank":
            results += self._write_own(plan, planner, order)
        else:
            results += self._write_shared(plan, planner, order)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_shared(
        self, plan: SavePlan, planner: AnySavePlanner, order: Any
    ) -> list[WriteResult]:
        files = [_SharedFile(path, length, self.settings.fsync) for path, length in order["files"]]
        batch = _Batch(files, self.threads, BATCH if _makes_anew(planner) else None)
        results, touched = [], set()
        for at, (file, begin) in order["writes"].items():
            item = plan.items[at]
            data = item.tensor_data
            assert data is not None
            tensor = resolved(item, planner)
            batch.add(
                file, _patches.Put(tensor, tuple(data.chunk.offsets), tuple(data.size), begin)
            )
            results.append(WriteResult(item.index, tensor.nbytes, {}))
            touched.add(file)
        batch.flush()
        if self.settings.fsync:
            for file in touched:
                files[file].sync()
        return results

    def _write_own(self, plan: SavePlan, planner: AnySavePlanner, order: Any) -> list[WriteResult]:
        parts, results = [], []
        for at in order["items"]:
            item = plan.items[at]
            data = item.tensor_data
            assert data is not None
            tensor = resolved(item, planner)
            size = tuple(tensor.shape)
            piece = _boxes.Piece(tuple(data.chunk.offsets), (0,) * len(size), size)
            dtype, pack = _patches.header_dtype(tensor, item.index.fqn)
            found = _boxes.Held(tensor, tuple(data.size), (piece,))
            parts.append((_sharded._Part(item.index.fqn, dtype, pack, found), piece))
            results.append(WriteResult(item.index, tensor.nbytes, {}))
        made = _shards.create(
            self.settings.path, parts, order, self.settings.most, self.settings.fsync
        )
        try:
            for file in made:
                file.write(self.threads)
        except BaseException:
            for file in made:
                file.abort()
            raise
        own = WriteResult(MetadataIndex(""), 0, {"own": [file.name for file in made]})
        return [*results, own]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Makes what all ranks have written the checkpoint."""
        settings = self.settings
        each = [result for found in results for result in found]
        leaves = {r.index.fqn: r.storage_data["leaf"] for r in each if "leaf" in r.storage_data}
        names = metadata.state_dict_metadata
        paths = {name: (metadata.planner_data or {}).get(name, (name,)) for name in names}
        root = _structures.of_paths(paths, leaves)
        structure = {} if root is None else {_encode.KEY: _structures.text(root)}
        if settings.layout == "per_rank":
            own = [name for r in each for name in r.storage_data.get("own", ())]
            _shards.publish(settings.path, own, self._nbytes, settings.fsync, structure)
            return
        files, self._files = self._files, None
        if files is None:
            raise _errors.usage("no save is under way on this rank", "WRITER")
        try:
            for number, (path, length, start) in enumerate(files.places):
                extra = structure if number == 0 else {}
                sums = None
                if settings.checksums:
                    sums = _sum_part(os.fspath(path), start, 0, length - start)
                if extra or settings.checksums:
                    files.seal(number, {**settings.metadata, **extra}, sums)
            files.commit()
        finally:
            files.abort()
        _shards.forget(settings.path)


class _Batch:
    """Boxes on their way into files: all together, or as soon as they are many bytes."""

    def __init__(self, files: list[_SharedFile], threads: int | None, most: int | None) -> None:
        self.files, self.threads, self.most = files, threads, most
        self.puts: dict[int, list[_patches.Put]] = {}
        self.bytes = 0

    def add(self, file: int, put: _patches.Put) -> None:
        self.puts.setdefault(file, []).append(put)
        self.bytes += put.tensor.nbytes
        if self.most is not None and self.bytes >= self.most:
            self.flush()

    def flush(self) -> None:
        for file, puts in self.puts.items():
            _patches.write(self.files[file], puts, self.threads)
        self.puts, self.bytes = {}, 0


def _rows(plan: SavePlan) -> list[Any]:
    """A rank's tensors: name, what its items say of it, and the positions of its items."""
    rows: dict[str, Any] = {}
    for at, item in enumerate(plan.items):
        if item.type == WriteItemType.BYTE_IO:
            continue
        if item.tensor_data is None:
            raise _errors.usage(f"{item.index.fqn}: its plan has no extents", "PLAN_FORM")
        row = rows.setdefault(item.index.fqn, (item.index.fqn, [], []))
        row[1].append(item.tensor_data)
        row[2].append(at)
    return list(rows.values())


def _offer(rows: list[Any]) -> bytes:
    tensors = []
    for name, data, _ in rows:
        dtype, pack = _patches.named_dtype(data[0].properties.dtype, name)
        boxes = [
            [
                _sharded.scaled(tuple(d.chunk.offsets), pack),
                _sharded.scaled(tuple(d.chunk.sizes), pack),
            ]
            for d in data
        ]
        shape = _sharded.scaled(tuple(data[0].size), pack)
        tensors.append({"name": name, "dtype": dtype, "shape": shape, "boxes": boxes})
    return json.dumps({"tensors": tensors}, separators=(",", ":")).encode()


def _makes_anew(planner: AnySavePlanner) -> bool:
    """Whether a planner may give tensors of their own memory, which must not pile up."""
    kind = type(planner)
    same = (
        getattr(kind, name, None) is getattr(DefaultSavePlanner, name)
        for name in ("resolve_data", "transform_object")
    )
    return not all(same)


def resolved(item: WriteItem, planner: AnySavePlanner) -> torch.Tensor:
    """The tensor of an item, which must be what its plan says."""
    name, data = item.index.fqn, item.tensor_data
    tensor = planner.resolve_data(item)
    if not isinstance(tensor, torch.Tensor) or data is None:
        raise TypeError(f"{name}: the planner gave {type(tensor).__qualname__} for a tensor")
    tensor = tensor.detach()
    if reason := _refuse.reason(tensor):
        raise TypeError(f"{name}: {reason}")
    found, needed = (
        (tensor.dtype, tuple(tensor.shape)),
        (
            data.properties.dtype,
            tuple(data.chunk.sizes),
        ),
    )
    if found != needed:
        raise _errors.usage(
            f"{name}: the planner gave {found} where it planned {needed}", "PLAN_FORM"
        )
    return tensor


def leaf(item: WriteItem, planner: AnySavePlanner) -> Any:
    """The JSON form of a value that is no tensor.

    The planner keeps values as they are and pickles them when it is asked for bytes; it is not
    asked. One that cannot give the value itself has its bytes read as PyTorch reads what it does
    not trust.
    """
    name = item.index.fqn
    lookup = getattr(planner, "lookup_object", None)
    if lookup is not None and not _transforms(planner):
        value = lookup(item.index)
    else:
        content = planner.resolve_data(item)
        if not isinstance(content, io.BytesIO):
            raise TypeError(f"{name}: the planner gave {type(content).__qualname__} for bytes")
        content.seek(0)
        value = torch.load(content, weights_only=True)
    return _Leaves().node(value, (f"[{name!r}]",))


def _transforms(planner: AnySavePlanner) -> bool:
    kind = type(planner)
    return getattr(kind, "transform_object", None) is not DefaultSavePlanner.transform_object


class _Leaves(_encode._Encoder):
    """The encoder of values without tensors."""

    def tensor(self, value: Any, path: _encode.Path, name: str) -> Any:
        raise TypeError(
            f"state{''.join(path)}: a tensor inside of a value that the planner does not take apart"
        )
