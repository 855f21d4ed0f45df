"""Loading in bulk: what is selected, in which portions it is read, and what is told afterwards."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from tonnage import _arrays, _device, _dtypes, _errors, _into, _progress
from tonnage._native import _Cancel, _castable, _matches, _parse_size

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tonnage._checkpoint import Checkpoint

#: What `select=` takes.
Select = str | Iterable[str] | Callable[[str], object] | None

#: Host memory that tensors on their way to a device take at most (or the largest tensor).
STAGING = 256 << 20
#: Small tensors are read this many bytes, or this many tensors, at a time.
PORTION = 8 << 20
PORTION_TENSORS = 256


@dataclass
class Report:
    """What a load did.

    Attributes:
        seconds: wall-clock time, from the call to the last tensor.
        bytes: bytes read from storage.
        threads: threads that read.
        strategy: how bytes came: `"read"` …
        loaded: how many tensors were loaded.
        missing: names that were asked for — of `into`, or patterns of `select` — and are not in the
            checkpoint.
        unexpected: names in the checkpoint that `into` has no place for.
        mismatched: names whose shape or dtype does not fit their place, with the reason.
        suggestions: for each missing name, near names that the checkpoint has.
        peak_staging: bytes of host memory that tensors passed through, at most at a time.
        reason: why that strategy.
        peak_host: bytes of host memory that the process had more than before, at most, as far as
            was seen; for loads to devices.
        needed: bytes of the files that the tensors are made of, where a plan says what is read:
            `bytes` may be more, where short runs are read in whole blocks.
        mode: how ranks loaded, where a plan says what is read: `"direct"`, `"shm"`, `"collective"`.
        mode_reason: why that mode.
    """

    seconds: float = 0.0
    bytes: int = 0
    threads: int = 0
    strategy: str = "none"
    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, str]] = field(default_factory=list)
    suggestions: dict[str, list[str]] = field(default_factory=dict)
    peak_staging: int = 0
    reason: str = ""
    peak_host: int = 0
    needed: int = 0
    mode: str = ""
    mode_reason: str = ""

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (10^9 bytes) read a second; 0 for a load too short to time."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def add(self, done: _device.Done) -> None:
        """Counts one run of the engine in."""
        _, read, threads, strategy, staging, reason, host = done
        self.bytes += read
        self.reason = reason or self.reason
        self.peak_host = max(self.peak_host, host)
        self.threads = max(self.threads, threads)
        self.strategy = strategy
        self.peak_staging = max(self.peak_staging, staging)

    def __str__(self) -> str:
        lines = [
            f"{self.loaded} tensors, {self.bytes / 1e9:.3f} GB in {self.seconds:.3f} s "
            f"({self.gb_per_s:.2f} GB/s, {self.threads} threads, {self.strategy})"
        ]
        for name in self.missing:
            near = self.suggestions.get(name)
            lines.append(f"missing: {name}" + (f" (near: {', '.join(near)})" if near else ""))
        lines += [f"unexpected: {name}" for name in self.unexpected]
        lines += [f"mismatched: {name}: {why}" for name, why in self.mismatched]
        return "\n".join(lines)


class Options(NamedTuple):
    """Arguments that `load` and `stream` share."""

    framework: str | None
    device: object
    dtype: object
    threads: int | None
    staging: int | str = "256MiB"
    strategy: str = "auto"
    verify: bool = False
    gds: bool = False

    @property
    def settings(self) -> _device.Settings:
        """How the engine runs."""
        return _device.Settings(bytes_of(self.staging), self.threads, self.strategy, self.gds)


def bytes_of(size: int | str) -> int:
    """A number of bytes, given as such or as `"256MiB"`."""
    return _parse_size(size) if isinstance(size, str) else int(size)


class Item(NamedTuple):
    """A tensor to be loaded."""

    position: int
    name: str
    #: As it lies in the file, and as it is wanted.
    stored: _dtypes.Row
    wanted: _dtypes.Row
    shape: tuple[int, ...]
    nbytes: int

    @property
    def memory(self) -> int:
        """Bytes that it takes once loaded, about."""
        return self.nbytes * self.wanted.bits // self.stored.bits


def chosen(checkpoint: Checkpoint, select: Select) -> tuple[list[int], list[str]]:
    """Positions of the selected tensors, ascending, and the names and patterns that match none."""
    handle = checkpoint._handle
    if select is None:
        return list(range(len(handle))), []
    if isinstance(select, str):
        select = [select]
    if callable(select):
        return [at for at, name in enumerate(handle.names()) if select(name)], []
    patterns = list(select)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"select takes names and patterns, not {type(pattern).__name__}")
    return handle.select(patterns)


def selects(select: Select, name: str) -> bool:
    """Whether a selection is about a name, whether or not the checkpoint has it."""
    if select is None:
        return True
    if isinstance(select, str):
        return name == select or _matches(select, name)
    if callable(select):
        return bool(select(name))
    return any(name == pattern or _matches(pattern, name) for pattern in select)


def select_positions(checkpoint: Checkpoint, select: Select, report: Report) -> list[int]:
    """Positions of the tensors that a load is about, in file order."""
    handle = checkpoint._handle
    positions, missing = chosen(checkpoint, select)
    for pattern in missing:
        if not any(mark in pattern for mark in "*?["):
            handle.find(pattern)  # raises, with near names
    if select is not None and not positions:
        text = f"nothing in {checkpoint.label} matches {select!r}"
        raise _errors.make("Usage", text, code="UNKNOWN_TENSOR", file=checkpoint.label)
    report.missing.extend(missing)
    return positions


def select_items(
    checkpoint: Checkpoint, select: Select, dtype: object, report: Report
) -> list[Item]:
    """The tensors that a load is about, in file order."""
    handle = checkpoint._handle
    positions = select_positions(checkpoint, select, report)
    target = None if dtype is None else cast_target(dtype)
    with _without_collection(len(positions)):
        return [item(handle.row(at), at, target) for at in positions]


@contextmanager
def _without_collection(objects: int) -> Iterator[None]:
    """Holds the garbage collector off while many objects are made that all stay.

    It would go through all of them again and again and find nothing: more than half of the time of
    loading 100,000 tensors.
    """
    if objects < 1000 or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def cast_target(dtype: object) -> _dtypes.Row:
    """The dtype that a `dtype=` argument casts to."""
    row = _dtypes.parse(dtype)
    if not _castable("F64", row.name):
        text = f"floats can be cast to a float dtype of 8 bits or more, not to {row.name}"
        raise _errors.usage(text, "CAST", found=row.name)
    return row


def item(row: tuple[Any, ...], index: int, target: _dtypes.Row | None) -> Item:
    """The item of a row of the catalog."""
    name, dtype, shape, nbytes = row[:4]
    stored = _arrays.row_of(dtype, name)
    wanted = stored
    if target is not None and _castable(stored.name, target.name):
        wanted = target
    return Item(index, name, stored, wanted, shape, nbytes)


def job(item: Item, target: Any, spread: bool) -> tuple[Any, ...]:
    """What the native side is told: where the tensor goes, and how."""
    cast = None if item.wanted is item.stored else item.wanted.name
    return (item.position, target, None, spread, cast)


def portions(items: Iterable[Item], limit: int, count: int | None = None) -> Iterator[list[Item]]:
    """Items in portions of at most `limit` bytes of memory (or one item) and `count` items."""
    portion: list[Item] = []
    held = 0
    for one in items:
        if portion and (held + one.memory > limit or len(portion) == count):
            yield portion
            portion, held = [], 0
        portion.append(one)
        held += one.memory
    if portion:
        yield portion


def read_portion(
    checkpoint: Checkpoint,
    items: Sequence[Item],
    arrays: _arrays.Arrays,
    options: Options,
    report: Report,
    progress: Callable[[int, int], None] | None = None,
    cancel: _Cancel | None = None,
) -> dict[str, Any]:
    """Reads some tensors at once, into memory of their own."""
    with _without_collection(len(items)):
        slots = [arrays.empty(one.wanted, one.shape) for one in items]
        jobs = [job(one, slot.target, slot.spread) for one, slot in zip(items, slots, strict=True)]
    run = checkpoint._handle.read(
        jobs, options.threads, progress, cancel, options.verify, options.strategy
    )
    report.add(_device.Done(*run))
    finished = {
        one.name: arrays.finish(slot, one.wanted, one.shape)
        for one, slot in zip(items, slots, strict=True)
    }
    if str(options.device) == "cpu":
        return finished
    report.peak_staging = max(report.peak_staging, sum(one.memory for one in items))
    return {name: arrays.put(tensor, options.device) for name, tensor in finished.items()}


def load(
    checkpoint: Checkpoint,
    select: Select,
    options: Options,
    progress: _progress.ProgressLike,
) -> dict[str, Any]:
    """`Checkpoint.load` into new tensors."""
    began, report = perf_counter(), Report()
    handle = checkpoint._handle
    positions = select_positions(checkpoint, select, report)
    wanted = None if options.dtype is None else cast_target(options.dtype)
    names: list[str] = []
    if isinstance(options.device, Mapping):
        names = [handle.row(at)[0] for at in positions]
    targets, goes = _device.targets_of(options.device, options.framework, names)
    if len(targets) == 1 and targets[0].way == "host":
        with _without_collection(len(positions)):
            items = [item(handle.row(at), at, wanted) for at in positions]
        arrays = _arrays.arrays(options.framework)
        options = options._replace(device="cpu")
        total = sum(one.nbytes for one in items)
        with _Bar(progress, total, "load") as bar:
            loaded = read_portion(checkpoint, items, arrays, options, report, bar.at(0))
    else:
        goes = goes if len(targets) > 1 else [0] * len(positions)
        with _without_collection(len(positions)):
            where = zip(positions, goes, strict=True)
            loaded = load_to(checkpoint, list(where), targets, wanted, options, report, progress)
    report.loaded = len(loaded)
    report.seconds = perf_counter() - began
    checkpoint.report = report
    return loaded


def load_to(
    checkpoint: Checkpoint,
    goes: Sequence[tuple[int, int]],
    targets: Sequence[_device.Target],
    wanted: _dtypes.Row | None,
    options: Options,
    report: Report,
    progress: _progress.ProgressLike,
) -> dict[str, Any]:
    """Tensors by position, each to the target of its own: those that the engine reaches in one
    pass, the rest through host memory.
    """
    handle = checkpoint._handle
    positions = [position for position, _ in goes]
    total, _ = handle.totals(positions, wanted and wanted.name)
    reached = [at for at, where in enumerate(targets) if where.way in ("engine", "host")]
    found: dict[str, Any] = {}
    with _Bar(progress, total, "load") as bar:
        mine = [(position, reached.index(at)) for position, at in goes if at in reached]
        if mine:
            places = [targets[at] for at in reached]
            found = _load_reached(checkpoint, mine, places, wanted, options, report, bar)
        if len(reached) == len(targets):
            return found
        for at, where in enumerate(targets):
            if at not in reached:
                items = [
                    item(handle.row(position), position, wanted)
                    for position, goes_to in goes
                    if goes_to == at
                ]
                found |= _load_beyond(checkpoint, items, where, options, report, bar)
    return {name: found[name] for name in (handle.row(position)[0] for position in positions)}


def _load_reached(
    checkpoint: Checkpoint,
    goes: Sequence[tuple[int, int]],
    targets: Sequence[_device.Target],
    wanted: _dtypes.Row | None,
    options: Options,
    report: Report,
    bar: _Bar,
) -> dict[str, Any]:
    """The tensors that the engine brings, all in one pass."""
    handle = checkpoint._handle
    positions = [position for position, _ in goes]
    total, _ = handle.totals(positions, wanted and wanted.name)
    verify = positions if options.verify else None
    run = _device.Run(handle, targets, options.settings, total, bar.at(0), verify)
    try:
        several = [where for _, where in goes] if len(targets) > 1 else None
        bulk = run.submit_all(positions, several, wanted)
        loaded = run.everything(bulk)
        run.verify()
        report.add(run.report())
    finally:
        run.close()
    return loaded


def _load_beyond(
    checkpoint: Checkpoint,
    items: Sequence[Item],
    target: _device.Target,
    options: Options,
    report: Report,
    bar: _Bar,
) -> dict[str, Any]:
    """Tensors for a device that only their framework reaches: through host memory, in portions."""
    arrays = _arrays.arrays(target.framework)
    if not items:
        return {}
    if target.way == "meta":
        return {one.name: arrays.shadow(one.wanted, one.shape) for one in items}
    options = options._replace(device=target.device)
    # A device that is not there is told of before anything is read.
    first = items[0]
    arrays.put(arrays.empty(first.wanted, (0,)).holder, target.device)
    loaded: dict[str, Any] = {}
    for portion in portions(items, options.settings.staging):
        before = report.bytes
        loaded |= read_portion(checkpoint, portion, arrays, options, report, bar.at(before))
    return loaded


class _Bar:
    """A progress that several runs of the engine share."""

    def __init__(self, progress: _progress.ProgressLike, total: int, label: str) -> None:
        self._total = total
        self._progress = _progress.start(progress, total, label)

    def at(self, before: int) -> Callable[[int, int], None] | None:
        """What the next run calls, `before` bytes having been read already."""
        progress, total = self._progress, self._total
        if progress is None:
            return None
        return lambda done, _: progress(before + done, total)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()


def load_into(
    checkpoint: Checkpoint,
    select: Select,
    into: object,
    strict: bool | None,
    options: Options,
    progress: _progress.ProgressLike,
) -> dict[str, Any]:
    """`Checkpoint.load` into tensors that are there already."""
    given = (options.framework, options.dtype, str(options.device))
    if given != (None, None, "cpu"):
        raise _errors.usage("with into=, the tensors themselves say framework, dtype and device")
    began, report = perf_counter(), Report()
    places = _places(into)
    if select is not None and not isinstance(select, str) and not callable(select):
        select = list(select)
    items = select_items(checkpoint, select, None, report)
    fits = _into.match(places, items, report)
    absent = [name for name in places if name not in checkpoint and selects(select, name)]
    report.missing.extend(name for name in absent if name not in report.missing)
    report.suggestions = {name: checkpoint._handle.near(name) for name in absent}
    _complain(report, strict)
    total = sum(fit.item.nbytes for fit in fits)
    with _Bar(progress, total, "load") as bar:
        direct = [job(fit.item, fit.target, False) for fit in fits if fit.target is not None]
        if direct:
            run = checkpoint._handle.read(
                direct, options.threads, bar.at(0), None, options.verify, options.strategy
            )
            report.add(_device.Done(*run))
        reached = [fit for fit in fits if fit.target is None and fit.device is not None]
        _fill(checkpoint, reached, options, report, bar)
        through = {fit.item.name: fit for fit in fits if fit.target is None and fit.device is None}
        for portion in portions((fit.item for fit in through.values()), STAGING):
            held = sum(one.memory for one in portion)
            report.peak_staging = max(report.peak_staging, held)
            arrays = through[portion[0].name].arrays
            same = [one for one in portion if through[one.name].arrays is arrays]
            rest = [one for one in portion if through[one.name].arrays is not arrays]
            for group in (same, rest):
                if group:
                    arrays = through[group[0].name].arrays
                    part = read_portion(
                        checkpoint, group, arrays, options, report, bar.at(report.bytes)
                    )
                    for name, tensor in part.items():
                        _into.copy(through[name].place, tensor)
    report.loaded = len(fits)
    report.seconds = perf_counter() - began
    checkpoint.report = report
    return {fit.item.name: fit.place for fit in sorted(fits, key=lambda fit: fit.item.position)}


def _fill(
    checkpoint: Checkpoint,
    fits: Sequence[_into.Fit],
    options: Options,
    report: Report,
    bar: _Bar,
) -> None:
    """Reads into tensors that lie on devices, in place."""
    where = {
        fit.device.id: fit.device for fit in fits if fit.device is not None and fit.item.nbytes
    }
    if not where:
        return
    targets = [_device.Target("engine", name, name, _device.PLAIN) for name in where]
    total = sum(fit.item.nbytes for fit in fits)
    verify = [fit.item.position for fit in fits] if options.verify else None
    at = bar.at(report.bytes)
    run = _device.Run(checkpoint._handle, targets, options.settings, total, at, verify)
    try:
        for tag, fit in enumerate(fits):
            if fit.device is not None and fit.item.nbytes:
                run.submit_into(_device.part_of(tag, fit.item), fit.device, fit.place)
        while run.landed() is not None:
            pass
        run.verify()
        report.add(run.report())
    finally:
        run.close()


def _places(into: object) -> Mapping[str, Any]:
    if isinstance(into, Mapping):
        return into
    state_dict = getattr(into, "state_dict", None)
    if callable(state_dict):
        state = state_dict()
        if isinstance(state, Mapping):
            return state
    raise TypeError(f"into takes a dict of tensors or a module, not {type(into).__name__}")


def _complain(report: Report, strict: bool | None) -> None:
    """Raises or warns, before anything is read, where a load would be incomplete."""
    serious = report.missing or report.mismatched
    if strict is False or not (serious or (strict and report.unexpected)):
        return
    shown = str(report).split("\n")[1:]
    more = f"\n… and {len(shown) - 20} more" if len(shown) > 20 else ""
    text = "the checkpoint does not fit the tensors to load into:\n" + "\n".join(shown[:20]) + more
    if strict:
        raise _errors.usage(text, "INCOMPLETE_LOAD")
    warnings.warn(text, _errors.IncompleteLoadWarning, stacklevel=4)


def stream(
    checkpoint: Checkpoint,
    order: Iterable[str] | None,
    select: Select,
    options: Options,
    budget: int | str,
) -> Iterator[tuple[str, Any]]:
    """`Checkpoint.stream`. What is wrong with the arguments is told at once, not at the first
    tensor.
    """
    report = Report()
    if order is None:
        items = select_items(checkpoint, select, options.dtype, report)
    elif select is not None:
        raise _errors.usage("order and select exclude each other")
    else:
        target = None if options.dtype is None else cast_target(options.dtype)
        handle = checkpoint._handle
        found = [handle.find(name) for name in order]
        items = [item(handle.row(at), at, target) for at in found]
    limit = max(bytes_of(budget), 1)
    names = [one.name for one in items]
    targets, goes = _device.targets_of(options.device, options.framework, names)
    if any(where.way == "engine" for where in targets):
        if not all(where.way in ("engine", "host") for where in targets):
            raise _errors.usage("stream goes to devices that the engine reaches, or to one other")
        ordered = order is not None
        return _stream_to(checkpoint, items, targets, goes, options, limit, ordered, report)
    if len(targets) > 1:
        raise _errors.usage("stream goes to devices that the engine reaches, or to one other")
    arrays = _arrays.arrays(targets[0].framework)
    options = options._replace(device=targets[0].device)
    return _stream(checkpoint, items, arrays, options, limit, report)


def _stream_to(
    checkpoint: Checkpoint,
    items: Sequence[Item],
    targets: Sequence[_device.Target],
    goes: Sequence[int],
    options: Options,
    budget: int,
    ordered: bool,
    report: Report,
) -> Iterator[tuple[str, Any]]:
    """A stream to devices: what lies there and was not yielded yet stays within the budget."""
    began, total = perf_counter(), sum(one.nbytes for one in items)
    run = _device.Run(checkpoint._handle, targets, options.settings, total)
    try:
        run.check_sizes((_device.part_of(0, one), at) for one, at in zip(items, goes, strict=True))
        for tag in _flow(run, items, goes, budget, ordered):
            report.loaded += 1
            yield items[tag].name, run.tensor(tag)
        report.add(run.report())
        report.seconds = perf_counter() - began
        checkpoint.report = report
    finally:
        run.close()


def _flow(
    run: _device.Run, items: Sequence[Item], goes: Sequence[int], budget: int, ordered: bool
) -> Iterator[int]:
    """Submits tensors as the budget allows, and yields their tags once they have landed."""
    waiting = portions_of([one.memory for one in items], min(budget // 4, _device.REGION))
    following, held = next(waiting, None), 0
    landed: deque[int] = deque()
    early: set[int] = set()
    upcoming, under_way = 0, 0
    while following is not None or under_way or landed or early:
        while following is not None:
            memory = sum(items[tag].memory for tag in following)
            if held and held + memory > budget:
                break
            run.submit([(_device.part_of(tag, items[tag]), goes[tag]) for tag in following])
            held += memory
            under_way += len(following)
            following = next(waiting, None)
        if not landed and under_way:
            tags = run.landed() or []
            under_way -= len(tags)
            landed.extend(tags if not ordered else ())
            early.update(tags if ordered else ())
        while upcoming in early:
            early.remove(upcoming)
            landed.append(upcoming)
            upcoming += 1
        if landed:
            tag = landed.popleft()
            yield tag
            held -= items[tag].memory


def portions_of(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Positions in portions of at most `limit` bytes (or one) and `PORTION_TENSORS` of them."""
    begin, held = 0, 0
    for at, one in enumerate(sizes):
        if at > begin and (held + one > limit or at - begin >= PORTION_TENSORS):
            yield range(begin, at)
            begin, held = at, 0
        held += one
    if begin < len(sizes):
        yield range(begin, len(sizes))


def _stream(
    checkpoint: Checkpoint,
    items: Sequence[Item],
    arrays: _arrays.Arrays,
    options: Options,
    budget: int,
    report: Report,
) -> Iterator[tuple[str, Any]]:
    from concurrent.futures import ThreadPoolExecutor

    began, cancel = perf_counter(), _Cancel()
    # One portion is handed out while others, up to the budget, are being read.
    waiting = portions(items, min(PORTION, max(budget // 4, 1)), PORTION_TENSORS)
    coming: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    held, following = 0, next(waiting, None)
    on_host = options._replace(device="cpu")
    pool = ThreadPoolExecutor(1, "tonnage-stream")
    try:
        while following is not None or coming:
            while following is not None:
                memory = sum(one.memory for one in following)
                if coming and held + memory > budget:
                    break
                task = pool.submit(
                    read_portion, checkpoint, following, arrays, on_host, report, None, cancel
                )
                coming.append((memory, task))
                held += memory
                following = next(waiting, None)
            memory, task = coming.popleft()
            part = task.result()
            report.loaded += len(part)
            report.peak_staging = max(report.peak_staging, held)
            for name in list(part):
                yield name, arrays.put(part.pop(name), options.device)
            held -= memory
        report.seconds = perf_counter() - began
        checkpoint.report = report
    finally:
        cancel.cancel()
        pool.shutdown(wait=True, cancel_futures=True)
