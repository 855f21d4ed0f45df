"""A rank's tensors, read as its plan says: into the host's memory, or brought to a device."""

from __future__ import annotations

import importlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from tonnage import _arrays, _device, _errors, _into, _load, _modes
from tonnage._native import (
    _Cancel,
    _castable,
    _plan_dequantize,
    _plan_pieces,
    _plan_read,
    _plan_submit,
)
from tonnage._progress import ProgressLike

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tonnage._checkpoint import Checkpoint
    from tonnage._native import _Plan, _Region

#: The kinds of tensors that `out=` takes.
OUT = ("tensor", "checkpointable", "dtensor")


class Rank(NamedTuple):
    """A rank of a plan, and the checkpoint that it reads."""

    checkpoint: Checkpoint
    native: _Plan
    rank: int
    profile: str | None

    @property
    def verified(self) -> list[int]:
        """Positions of the tensors whose files are compared with their checksums."""
        handle = self.checkpoint._handle
        return [handle.find(name) for name in self.native.sources(self.rank)]


@dataclass(frozen=True)
class Output:
    """What `load` hands out."""

    kind: str
    mesh: Any = None

    def check(self, framework: str | None) -> None:
        """Refuses what cannot be, before anything is read."""
        if self.kind not in OUT:
            text = f"out must be one of {', '.join(OUT)}, not {self.kind!r}"
            raise _errors.usage(text, "OUT")
        if self.kind == "tensor":
            return
        chosen = _arrays.canonical(framework)
        if chosen not in (None, "torch"):
            raise _errors.usage(f"out={self.kind!r} is for PyTorch, not {framework}", "OUT")
        importlib.import_module("torch")


def items_of(rank: Rank, select: _load.Select, dtype: object) -> list[_load.Item]:
    """What is to be read, in the order of the plan. `position` counts the rank's tensors."""
    target = None if dtype is None else _load.cast_target(dtype)
    items = []
    for at, row in enumerate(rank.native.locals(rank.rank)):
        name, _, stored_name, cast, shape, _, _, nbytes, _, _ = row
        stored = _arrays.row_of(stored_name, name)
        wanted = stored
        if cast is not None:
            wanted = _arrays.row_of(cast, name)
        elif target is not None and _castable(stored.name, target.name):
            wanted = target
        items.append(_load.Item(at, name, stored, wanted, tuple(shape), nbytes))
    if select is None:
        return items
    if not callable(select):
        patterns = [select] if isinstance(select, str) else list(select)
        chosen = [one for one in items if _load.selects(patterns, one.name)]
    else:
        chosen = [one for one in items if select(one.name)]
    if not chosen:
        text = f"rank {rank.rank} has nothing that matches {select!r}"
        raise _errors.make("Usage", text, code="UNKNOWN_TENSOR")
    return chosen


def load(
    rank: Rank,
    select: _load.Select,
    options: _load.Options,
    into: Mapping[str, Any] | None,
    output: Output,
    progress: ProgressLike,
    way: _modes.Way,
) -> dict[str, Any]:
    """`Plan.load`."""
    output.check(options.framework)
    if output.kind != "tensor":
        options = options._replace(framework="torch")
    began, report = perf_counter(), _load.Report()
    items = items_of(rank, select, options.dtype)
    total = sum(one.nbytes for one in items)
    with _load._Bar(progress, total, "load") as bar:
        if into is not None:
            loaded = _load_into(rank, items, into, options, report, bar)
        else:
            loaded = _load_new(rank, items, options, report, bar, way)
    if output.kind != "tensor":
        rows = {row[0]: row for row in rank.native.locals(rank.rank)}
        loaded = {name: _given(one, rows[name], rank, output) for name, one in loaded.items()}
    report.mode, report.mode_reason = way.mode, way.reason
    report.loaded = len(loaded)
    report.seconds = perf_counter() - began
    rank.checkpoint.report = report
    return loaded


def load_numbers(
    rank: Rank,
    select: _load.Select,
    options: _load.Options,
    progress: ProgressLike,
    way: _modes.Way,
) -> dict[str, Any]:
    """`Plan.load(dequantize=True)`: pieces of quantised tensors under their logical names, one
    after the other, and the rank's plain tensors.
    """
    began, report = perf_counter(), _load.Report()
    pieces = _plan_pieces(rank.native, rank.rank)
    parts = {part for piece in pieces for part in piece[4]}
    plain = [one for one in items_of(rank, None, options.dtype) if one.name not in parts]
    chosen = _chosen(rank, select, [one.name for one in plain] + [piece[0] for piece in pieces])
    plain = [one for one in plain if one.name in chosen]
    targets, goes = _device.targets_of(
        options.device, options.framework, [piece[0] for piece in pieces]
    )
    with _load._Bar(progress, sum(one.nbytes for one in plain), "load") as bar:
        loaded = _load_new(rank, plain, options, report, bar, way) if plain else {}
    wanted = None if options.dtype is None else _load.cast_target(options.dtype)
    for at, (name, dtype, shape, _, _) in enumerate(pieces):
        if name not in chosen:
            continue
        row = wanted or _arrays.row_of(dtype, name)
        target = targets[goes[at]]
        arrays = _arrays.arrays(target.framework or options.framework)
        slot = arrays.empty(row, tuple(shape))
        run = _plan_dequantize(
            rank.native,
            rank.checkpoint._handle,
            rank.rank,
            at,
            slot.target,
            row.name,
            max(options.settings.staging, 1 << 20),
            options.threads,
            None,
            options.verify,
            options.strategy,
            rank.profile,
        )
        report.add(_device.Done(*run[:6]))
        report.needed += run[6]
        tensor = arrays.finish(slot, row, tuple(shape))
        loaded[name] = tensor if target.way == "host" else arrays.put(tensor, options.device)
    report.mode, report.mode_reason = way.mode, way.reason
    report.loaded = len(loaded)
    report.seconds = perf_counter() - began
    rank.checkpoint.report = report
    return loaded


def _chosen(rank: Rank, select: _load.Select, names: Sequence[str]) -> set[str]:
    if select is None:
        return set(names)
    if callable(select):
        raise _errors.usage("with dequantize=True, select is names and patterns", "SELECT")
    patterns = [select] if isinstance(select, str) else list(select)
    chosen = {name for name in names if _load.selects(patterns, name)}
    if not chosen:
        text = f"rank {rank.rank} has nothing that matches {select!r}"
        raise _errors.make("Usage", text, code="UNKNOWN_TENSOR")
    return chosen


def _load_new(
    rank: Rank,
    items: Sequence[_load.Item],
    options: _load.Options,
    report: _load.Report,
    bar: _load._Bar,
    way: _modes.Way,
) -> dict[str, Any]:
    names = [one.name for one in items]
    targets, goes = _device.targets_of(options.device, options.framework, names)
    if way.mode != "direct":
        return _load_together(rank, items, targets, options, report, bar, way)
    if len(targets) == 1 and targets[0].way == "host":
        arrays = _arrays.arrays(options.framework)
        return read(rank, items, arrays, options, report, bar.at(0))
    found: dict[str, Any] = {}
    for at, target in enumerate(targets):
        mine = [one for one, where in zip(items, goes, strict=True) if where == at]
        before = report.bytes
        if target.way in ("engine", "host"):
            found |= _load_to(rank, mine, target, options, report, bar.at(before))
            continue
        arrays = _arrays.arrays(target.framework)
        if target.way == "meta":
            found |= {one.name: arrays.shadow(one.wanted, one.shape) for one in mine}
            continue
        for portion in _load.portions(mine, options.settings.staging):
            there = read(rank, portion, arrays, options, report, bar.at(report.bytes))
            found |= {name: arrays.put(one, target.device) for name, one in there.items()}
    return {name: found[name] for name in names}


def _load_together(
    rank: Rank,
    items: Sequence[_load.Item],
    targets: Sequence[_device.Target],
    options: _load.Options,
    report: _load.Report,
    bar: _load._Bar,
    way: _modes.Way,
) -> dict[str, Any]:
    if len(targets) != 1:
        raise _errors.usage(f"mode={way.mode!r} brings a rank's tensors to one device", "MODE")
    (target,) = targets
    arrays = _arrays.arrays(target.framework or options.framework)
    report.needed = sum(one.nbytes for one in items)
    if target.way == "meta":
        raise _errors.usage(f"mode={way.mode!r} reads, and device='meta' does not", "MODE")
    if (
        target.way != "host"
        and way.mode == "collective"
        and isinstance(arrays, _arrays.TorchArrays)
    ):
        return _modes.read_to(rank, way, items, target.device, options, report)
    there = read(rank, items, arrays, options, report, bar.at(0), None, way)
    if target.way == "host":
        return there
    # One by one, so that the host is rid of each as soon as the device has it.
    return {one.name: arrays.put(there.pop(one.name), options.device) for one in items}


def read(
    rank: Rank,
    items: Sequence[_load.Item],
    arrays: _arrays.Arrays,
    options: _load.Options,
    report: _load.Report,
    progress: Callable[[int, int], None] | None = None,
    cancel: _Cancel | None = None,
    way: _modes.Way | None = None,
) -> dict[str, Any]:
    """Reads tensors into host memory of their own."""
    slots = [arrays.empty(one.wanted, one.shape) for one in items]
    jobs = [_job(one, slot.target, slot.spread) for one, slot in zip(items, slots, strict=True)]
    if way is None:
        _read(rank, jobs, options, report, progress, cancel)
    else:
        _modes.read(rank, way, jobs, options, report, progress, cancel)
    return {
        one.name: arrays.finish(slot, one.wanted, one.shape)
        for one, slot in zip(items, slots, strict=True)
    }


def _job(item: _load.Item, target: Any, spread: bool) -> tuple[int, Any, bool, str | None]:
    cast = None if item.wanted is item.stored else item.wanted.name
    return (item.position, target, spread, cast)


def _read(
    rank: Rank,
    jobs: Sequence[tuple[int, Any, bool, str | None]],
    options: _load.Options,
    report: _load.Report,
    progress: Callable[[int, int], None] | None,
    cancel: _Cancel | None = None,
) -> None:
    run = _plan_read(
        rank.native,
        rank.checkpoint._handle,
        rank.rank,
        jobs,
        max(options.settings.staging, 1 << 20),
        options.threads,
        progress,
        cancel,
        options.verify,
        options.strategy,
        rank.profile,
    )
    report.add(_device.Done(*run[:6]))
    report.needed += run[6]


class _PlanRun(_device.Run):
    """One pass to a device, of what a plan says."""

    def __init__(self, rank: Rank, *given: Any) -> None:
        super().__init__(rank.checkpoint._handle, *given)
        self._rank = rank

    def report(self) -> _device.Done:
        """What was done so far: of the bytes, those that were read."""
        return super().report()._replace(bytes=self._transfer.bytes_read())

    def _give(self, jobs: Sequence[tuple[Any, ...]]) -> None:
        mine: list[tuple[int, int, _Region, int, str | None]] = [
            (position, tag, region, at, cast) for position, tag, region, at, _, cast, _, _ in jobs
        ]
        _plan_submit(self._rank.native, self._transfer, self._handle, self._rank.rank, mine)


def _load_to(
    rank: Rank,
    items: Sequence[_load.Item],
    target: _device.Target,
    options: _load.Options,
    report: _load.Report,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    if not items:
        return {}
    total = sum(one.nbytes for one in items)
    verify = rank.verified if options.verify else None
    run = _PlanRun(rank, [target], options.settings, total, progress, verify)
    loaded: dict[str, Any] = {}
    try:
        run.submit([(_device.part_of(tag, one), 0) for tag, one in enumerate(items)])
        while (tags := run.landed()) is not None:
            for tag in tags:
                loaded[items[tag].name] = run.tensor(tag)
        run.verify()
        report.add(run.report())
        report.needed += total
    finally:
        run.close()
    return loaded


def _load_into(
    rank: Rank,
    items: Sequence[_load.Item],
    into: Mapping[str, Any],
    options: _load.Options,
    report: _load.Report,
    bar: _load._Bar,
) -> dict[str, Any]:
    given = (options.dtype, str(options.device))
    if given != (None, "cpu"):
        raise _errors.usage("with into=, the tensors themselves say dtype and device")
    places = {name: _local(one) for name, one in into.items()}
    fits = _into.match(places, items, report)
    names = {one.name for one in items}
    report.missing.extend(name for name in into if name not in names)
    if report.missing or report.mismatched:
        text = "the plan does not fit the tensors to load into:\n" + "\n".join(
            str(report).split("\n")[1:21]
        )
        raise _errors.usage(text, "INCOMPLETE_LOAD")
    direct = [_job(fit.item, fit.target, False) for fit in fits if fit.target is not None]
    if direct:
        _read(rank, direct, options, report, bar.at(0))
    for fit in fits:
        if fit.target is not None:
            continue
        made = read(rank, [fit.item], fit.arrays, options, report, bar.at(report.bytes))
        _into.copy(fit.place, made[fit.item.name])
    return {fit.item.name: into[fit.item.name] for fit in fits}


def _local(tensor: Any) -> Any:
    """A `DTensor`'s own part; other tensors as they are."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _given(tensor: Any, row: Any, rank: Rank, output: Output) -> Any:
    """The tensor with what PyTorch wants to know of it."""
    _, target, _, _, _, whole, boxes, _, _, place = row
    if output.kind == "checkpointable":
        tensor.global_shape = tuple(whole)
        tensor.global_offsets = tuple(tuple(box[0]) for box in boxes)
        tensor.local_offsets = tuple(tuple(box[1]) for box in boxes)
        tensor.local_sizes = tuple(tuple(box[2]) for box in boxes)
        return tensor
    from torch.distributed.tensor import DTensor

    mesh = output.mesh if output.mesh is not None else _device_mesh(rank, tensor.device.type)
    placements = _placements(json.loads(place), mesh, target, len(whole))
    strides = _device._strides(whole)
    return DTensor.from_local(
        tensor, mesh, placements, run_check=False, shape=tuple(whole), stride=strides
    )


def _device_mesh(rank: Rank, device: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    axes = rank.native.mesh()
    key = (tuple(axes), device)
    if key not in _MESHES:
        names = tuple(name for name, _ in axes)
        sizes = tuple(size for _, size in axes)
        _MESHES[key] = init_device_mesh(device, sizes, mesh_dim_names=names)
    return _MESHES[key]


_MESHES: dict[Any, Any] = {}


def _placements(place: Mapping[str, Any], mesh: Any, name: str, ndim: int) -> list[Any]:
    """PyTorch's placements. Raises `UnsupportedError` for one that it does not have."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    names = mesh.mesh_dim_names or ()
    lost = [axis for axis in place if axis not in names]
    if lost:
        text = f"{name} is placed on the axis {lost[0]!r}, which the device mesh {names} lacks"
        raise _errors.make("Unsupported", text, code="PLACEMENT", tensor=name)
    made: list[Any] = []
    for axis in names:
        told = place.get(axis, "replicate")
        if told == "replicate":
            made.append(Replicate())
            continue
        kind, fields = next(iter(told.items()))
        if kind in ("shard", "strided") and fields.get("uneven", "torch") == "torch":
            dim = fields["dim"] % ndim
            made.append(
                Shard(dim) if kind == "shard" else _StridedShard(dim, split_factor=fields["groups"])
            )
            continue
        text = f"{name} is placed by {kind}, which no DTensor is; out='checkpointable' says it"
        raise _errors.make("Unsupported", text, code="PLACEMENT", tensor=name)
    return made


def stream(
    rank: Rank, select: _load.Select, options: _load.Options, budget: int
) -> Iterator[tuple[str, Any]]:
    """`Plan.stream`. What is wrong with the arguments is told at once."""
    items = items_of(rank, select, options.dtype)
    budget = max(budget, 1)
    names = [one.name for one in items]
    targets, goes = _device.targets_of(options.device, options.framework, names)
    if any(where.way == "engine" for where in targets):
        if not all(where.way in ("engine", "host") for where in targets):
            raise _errors.usage("stream goes to devices that the engine reaches, or to one other")
        return _stream_to(rank, items, targets, goes, options, budget)
    if len(targets) > 1:
        raise _errors.usage("stream goes to devices that the engine reaches, or to one other")
    arrays = _arrays.arrays(targets[0].framework)
    return _stream(rank, items, arrays, options._replace(device=targets[0].device), budget)


def _stream_to(
    rank: Rank,
    items: Sequence[_load.Item],
    targets: Sequence[_device.Target],
    goes: Sequence[int],
    options: _load.Options,
    budget: int,
) -> Iterator[tuple[str, Any]]:
    report, began = _load.Report(), perf_counter()
    total = sum(one.nbytes for one in items)
    run = _PlanRun(rank, targets, options.settings, total)
    try:
        for tag in _load._flow(run, items, goes, budget, True):
            report.loaded += 1
            yield items[tag].name, run.tensor(tag)
        report.add(run.report())
        report.needed = total
        report.seconds = perf_counter() - began
        rank.checkpoint.report = report
    finally:
        run.close()


def _stream(
    rank: Rank,
    items: Sequence[_load.Item],
    arrays: _arrays.Arrays,
    options: _load.Options,
    budget: int,
) -> Iterator[tuple[str, Any]]:
    from concurrent.futures import ThreadPoolExecutor

    report, began, cancel = _load.Report(), perf_counter(), _Cancel()
    size = min(_load.PORTION * 4, max(budget // 4, 1))
    waiting = _load.portions(items, size, _load.PORTION_TENSORS)
    coming: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    held, following = 0, next(waiting, None)
    pool = ThreadPoolExecutor(1, "tonnage-stream")
    try:
        while following is not None or coming:
            while following is not None:
                memory = sum(one.memory for one in following)
                if coming and held + memory > budget:
                    break
                task = pool.submit(read, rank, following, arrays, options, report, None, cancel)
                coming.append((memory, task))
                held += memory
                following = next(waiting, None)
            memory, task = coming.popleft()
            part = task.result()
            report.loaded += len(part)
            for name in list(part):
                yield name, arrays.put(part.pop(name), options.device)
            held -= memory
        report.seconds = perf_counter() - began
        rank.checkpoint.report = report
    finally:
        cancel.cancel()
        pool.shutdown(wait=True, cancel_futures=True)
