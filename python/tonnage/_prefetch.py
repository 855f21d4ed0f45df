"""`safe_open.prefetch` and its kin: tensors that come in the background, each handed out once.

The interface is that of the reference's 0.9 release candidate, on every device and framework; a
plan may also name parts along any dimension, and files may be many.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tonnage import _arrays, _device, _dropin, _errors
from tonnage._native import SafetensorError, _parse_size

if TYPE_CHECKING:
    from tonnage._native import _Handle

#: What a plan says of a tensor: all of it, rows, or parts along each dimension.
Part = slice | Sequence[slice | int] | tuple[slice | int | Sequence[slice | int], ...] | None
Plan = Mapping[str, Part]
Range = tuple[int, int, int]


class Chosen(NamedTuple):
    """What is taken of a tensor."""

    #: The shape of it.
    shape: tuple[int, ...]
    #: For each part of it, in order: its ranges, one a dimension, and where it begins along `axis`.
    boxes: list[tuple[list[Range], int]]
    #: The dimension along which parts lie beside each other.
    axis: int


class PrefetchLoader:
    """Tensors that are on their way to a device.

    `take(name)` waits for one, iterating gives `(name, tensor)` pairs as their bytes land; each is
    handed out once. Memory of tensors that nobody took is free again after `close`.

    ```python
    with tonnage.safe_open("model.safetensors", framework="pt") as file:
        with file.prefetch(device="cuda:0") as loader:
            for name, tensor in loader:
                ...
    ```
    """

    def __init__(
        self,
        handle: _Handle,
        chosen: Sequence[tuple[_device.Part, Chosen | None, int]],
        targets: Sequence[_device.Target],
        settings: _device.Settings,
        progress: _device.Progress | None = None,
    ) -> None:
        self._lock = RLock()
        self._parts = [part for part, _, _ in chosen]
        self._tags = {part.name: part.tag for part in self._parts}
        self._landed: dict[int, None] = {}
        self._given: set[int] = set()
        total = sum(part.nbytes for part in self._parts)
        self._run: _device.Run | None = None
        if not self._parts:
            return
        self._run = _device.Run(handle, targets, settings, total, progress)
        try:
            self._run.submit_boxes([(part, at, _jobs(part, found)) for part, found, at in chosen])
        except BaseException:
            self._run.close()
            raise

    def names(self) -> list[str]:
        """The names that are handed out, in the order of the files."""
        return [part.name for part in self._parts]

    def __len__(self) -> int:
        return len(self._parts)

    def take(self, name: str) -> Any:
        """The tensor of this name, once its bytes have landed.

        Raises `SafetensorError` for one that is not in the plan or was handed out, after `close`,
        and where the bytes cannot be read.
        """
        tag = self._tags.get(name)
        if tag is None:
            text = f"tensor {name} is not in the prefetch plan"
            raise _refusal("UNKNOWN_TENSOR", text, name)
        with self._lock:
            run = self._running(f"{name}: ")
            if tag in self._given:
                text = (
                    f"{name}: tensor already delivered (prefetch hands each tensor out once, "
                    "via take or iteration)"
                )
                raise _refusal("DELIVERED", text, name)
            while tag not in self._landed:
                self._wait(run)
            return self._give(run, tag)

    def _running(self, before: str = "") -> _device.Run:
        if self._run is None:
            raise _refusal("CLOSED", f"{before}prefetch loader closed", None)
        return self._run

    def _wait(self, run: _device.Run) -> None:
        tags = run.landed()
        if tags is None:
            raise _refusal("CLOSED", "prefetch loader closed", None)
        self._landed.update(dict.fromkeys(tags))

    def _give(self, run: _device.Run, tag: int) -> Any:
        tensor = run.tensor(tag)
        del self._landed[tag]
        self._given.add(tag)
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        if not self._parts:
            return
        while True:
            with self._lock:
                run = self._running()
                if len(self._given) == len(self._parts):
                    return
                while not self._landed:
                    self._wait(run)
                tag = next(iter(self._landed))
                tensor = self._give(run, tag)
            yield self._parts[tag].name, tensor

    def close(self) -> None:
        """Ends what is under way and frees the tensors that nobody took. Those that were handed out
        stay.
        """
        # Whoever waits is woken by the end of the transfer, and then lets go of the lock.
        run = self._run
        if run is not None:
            run.cancel()
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._run is None and self._parts else ""
        return f"<tonnage prefetch of {len(self._parts)} tensors{state}>"


def _refusal(code: str, text: str, tensor: str | None) -> SafetensorError:
    error = _dropin.refusal(code, text)
    error.tensor = tensor
    return error


def _jobs(part: _device.Part, chosen: Chosen | None) -> list[_device.Box]:
    """Where the parts of a tensor lie in it."""
    if chosen is None:
        return [_device.Box(None, 0, None)]
    if len(chosen.boxes) == 1:
        return [_device.Box(chosen.boxes[0][0], 0, None)]
    bits, inner = part.stored.bits, 1
    for extent in chosen.shape[chosen.axis + 1 :]:
        inner *= extent
    boxes = []
    for ranges, begin in chosen.boxes:
        extent = len(range(*ranges[chosen.axis]))
        row = extent * inner * bits
        if not row:
            continue
        at, pitch = begin * inner * part.wanted.bits, chosen.shape[chosen.axis] * inner
        if row % 8 or at % 8 or pitch * part.wanted.bits % 8:
            raise _partial(part.name)
        boxes.append(_device.Box(ranges, at // 8, (row // 8, pitch * part.wanted.bits // 8)))
    return boxes


def _partial(name: str) -> SafetensorError:
    return _refusal(
        "PARTIAL_BYTE", f"cannot slice rows of {name}: a row is not a whole number of bytes", name
    )


def choose(name: str, value: Part, shape: tuple[int, ...], bits: int) -> Chosen | None:
    """What a plan's value takes of a tensor; `None` for all of it."""
    if value is None:
        return None
    if isinstance(value, slice):
        if not shape:
            raise _refusal("SLICE", f"cannot slice rows of the 0-d tensor {name}", name)
        start, stop = _rows(name, value, shape[0])
        per_row = bits
        for extent in shape[1:]:
            per_row *= extent
        if per_row % 8:
            raise _partial(name)
        ranges = [(start, stop, 1), *((0, extent, 1) for extent in shape[1:])]
        return Chosen((stop - start, *shape[1:]), [(ranges, 0)], 0)
    if isinstance(value, list):
        value = (value,)
    if not isinstance(value, tuple):
        text = f"prefetch plan values must be None or a slice, got {type(value)} for {name}"
        raise _refusal("PLAN", f"{text} (or a tuple of slices and lists, one a dimension)", name)
    return _parts(name, value, shape)


def _rows(name: str, rows: slice, count: int) -> tuple[int, int]:
    """The rows of a slice, which must lie within the tensor: a plan that misses it is a mistake."""
    for attribute in ("start", "stop"):
        bound = getattr(rows, attribute)
        if bound is None:
            continue
        try:
            at = operator.index(bound)
        except TypeError:
            text = f"prefetch plan slice bounds for {name} must be integers or None"
            raise _refusal("PLAN", text, name) from None
        if not -count <= at <= count:
            text = (
                f"prefetch plan slice {attribute} {at} for {name} is out of range for {count} rows"
            )
            raise _refusal("SLICE", text, name)
    try:
        start, stop, step = rows.indices(count)
    except (TypeError, ValueError) as error:
        text = f"invalid prefetch plan slice for {name}: {type(error).__name__}: {error}"
        raise _refusal("SLICE", text, name) from None
    if step != 1:
        text = f"prefetch plan slices must have step 1, got {step} for {name}"
        raise _refusal("SLICE", text, name)
    return start, max(start, stop)


def _parts(name: str, value: tuple[Any, ...], shape: tuple[int, ...]) -> Chosen:
    """Parts along each dimension: slices with any positive step, numbers, and lists of these, whose
    parts lie one behind the other.
    """
    if len(value) > len(shape):
        text = f"prefetch plan for {name} has {len(value)} dimensions, the tensor has {len(shape)}"
        raise _refusal("SLICE", text, name)
    keys = [*value, *[slice(None)] * (len(shape) - len(value))]
    along = [_along(name, key, extent) for key, extent in zip(keys, shape, strict=True)]
    lists = [axis for axis, found in enumerate(along) if len(found) != 1]
    if len(lists) > 1:
        text = f"prefetch plan for {name} has lists in {len(lists)} dimensions; one may have one"
        raise _refusal("PLAN", text, name)
    axis = lists[0] if lists else 0
    extents = tuple(sum(len(range(*one)) for one in found) for found in along)
    boxes, begin = [], 0
    for one in along[axis] if along else [(0, 1, 1)]:
        ranges = [one if at == axis else found[0] for at, found in enumerate(along)]
        boxes.append((ranges, begin))
        begin += len(range(*one))
    dropped = [isinstance(key, int) for key in keys]
    if not any(dropped):
        return Chosen(extents, boxes, axis)
    # A dimension of one element that an integer chose is dropped: bytes stay where they are.
    kept = tuple(extent for extent, drop in zip(extents, dropped, strict=True) if not drop)
    return Chosen(kept, boxes, axis - sum(dropped[:axis]))


def _along(name: str, key: Any, extent: int) -> list[Range]:
    if isinstance(key, list):
        found = [one for item in key for one in _along(name, item, extent)]
        return found or [(0, 0, 1)]
    if isinstance(key, slice):
        for attribute in ("start", "stop"):
            bound = getattr(key, attribute)
            if bound is not None and not -extent <= bound <= extent:
                text = (
                    f"prefetch plan slice {attribute} {bound} for {name} is out of range for "
                    f"{extent} elements"
                )
                raise _refusal("SLICE", text, name)
        try:
            start, stop, step = key.indices(extent)
        except (TypeError, ValueError) as error:
            text = f"invalid prefetch plan slice for {name}: {error}"
            raise _refusal("SLICE", text, name) from None
        if step < 1:
            text = f"prefetch plan slices must have a positive step, got {step} for {name}"
            raise _refusal("SLICE", text, name)
        return [(start, max(start, stop), step)]
    if isinstance(key, bool) or not hasattr(key, "__index__"):
        text = (
            f"prefetch plan parts are slices, numbers or lists of these, got {type(key)} for {name}"
        )
        raise _refusal("PLAN", text, name)
    at = operator.index(key)
    if not -extent <= at < extent:
        text = f"prefetch plan index {at} for {name} is out of range for {extent} elements"
        raise _refusal("SLICE", text, name)
    return [(at % extent, at % extent + 1, 1)]


def start(
    handle: _Handle,
    plan: Plan | None,
    device: object,
    framework: str | None,
    settings: _device.Settings,
    dtype: Any = None,
    progress: _device.Progress | None = None,
) -> PrefetchLoader:
    """Starts to load what a plan names; everything, without one."""
    from tonnage import _load

    positions: dict[int, Part] = {}
    if plan is None:
        positions = dict.fromkeys(range(len(handle)))
    else:
        for name, value in plan.items():
            if not isinstance(name, str):
                raise _refusal("PLAN", "prefetch plan keys must be tensor names", None)
            if not handle.contains(name):
                text = f"File does not contain tensor {name}"
                raise _refusal("UNKNOWN_TENSOR", text, name)
            positions[handle.find(name)] = value
    target = None if dtype is None else _load.cast_target(dtype)
    made = []
    for tag, at in enumerate(sorted(positions)):
        item = _load.item(handle.row(at), at, target)
        found = choose(item.name, positions[at], item.shape, item.stored.bits)
        made.append((tag, item, found))
    if plan is not None and not made:
        raise _refusal("PLAN", "prefetch plan selects no tensors", None)
    names = [item.name for _, item, _ in made]
    targets, goes = _device.targets_of(device, framework, names)
    for one in targets:
        _check_dtypes(one, [item.wanted for _, item, _ in made])
        if one.way not in ("engine", "host"):
            text = f"prefetch does not load to {one.device}: {one.framework} has no such device"
            raise _errors.make("Device", f"{text} here", code="DEVICE")
    chosen = [
        (_device.part_of(tag, item, None if found is None else found.shape), found, goes[at])
        for at, (tag, item, found) in enumerate(made)
    ]
    return PrefetchLoader(handle, chosen, targets, settings, progress)


def _check_dtypes(target: _device.Target, rows: Sequence[Any]) -> None:
    """Refuses a dtype that the framework lacks before anything is read."""
    if target.framework != "torch" and not (target.way == "host" and target.framework is None):
        return
    arrays = _arrays.arrays(target.framework)
    if not isinstance(arrays, _arrays.TorchArrays):
        return
    for row in set(rows):
        if row.torch is None:
            text = f"prefetch cannot hand out dtype {row.name}: torch has no matching dtype"
            raise _refusal("UNSUPPORTED_DTYPE", text, None)
        arrays.dtype(row)


def prefetch(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    plan: Plan | None = None,
    *,
    device: object = "cpu",
    framework: str | None = None,
    threads: int | None = None,
    staging: int | str = "256MiB",
    strategy: str = "auto",
) -> PrefetchLoader:
    """Starts to load a checkpoint, or files of one, in the background.

    The same as `tonnage.open(files).prefetch(...)`: see `Checkpoint.prefetch`.
    """
    from tonnage import _checkpoint

    opened = _checkpoint.open(files if isinstance(files, str | os.PathLike) else list(files))
    return opened.prefetch(
        plan,
        device=device,
        framework=framework,
        threads=threads,
        staging=staging,
        strategy=strategy,
    )


def size(value: int | str) -> int:
    """A number of bytes, given as such or as text."""
    return _parse_size(value) if isinstance(value, str) else int(value)


def of_file(
    handle: _Handle, plan: Plan | None, device: object, framework: str, threads: int
) -> PrefetchLoader:
    """What `safe_open.prefetch` is made of."""
    if plan is not None and not isinstance(plan, Mapping):
        raise TypeError(f"plan takes a dict, not {type(plan).__name__}")
    return start(handle, plan, device, framework, _device.Settings(threads=threads or 1))


#: Where there is less for PyTorch, and few tensors, each goes the short way: a run of the engine
#: takes a while to set up.
SMALL = 8 << 20
FEW = 16


def by_engine(
    handle: _Handle, name: str | None, nbytes: int, device: object, framework: str
) -> dict[str, Any] | None:
    """One tensor of a file, or all, on a device; `None` where that is for the framework to do."""
    target = _device.target(device, framework)
    if target.way != "engine":
        return None
    if name is None:
        nbytes = handle.total_bytes
    count = len(handle) if name is None else 1
    if target.framework == "torch" and nbytes < SMALL and count <= FEW:
        return None
    if name is None:
        return _device.whole(handle, target)
    with start(handle, {name: None}, device, framework, _device.Settings()) as loader:
        return dict(loader)


def slice_by_engine(
    handle: _Handle,
    name: str,
    nbytes: int,
    ranges: Sequence[Range],
    shape: tuple[int, ...],
    device: object,
    framework: str,
) -> Any:
    """A slice of a tensor on a device; `None` where that is for the framework to do."""
    from tonnage import _load

    target = _device.target(device, framework)
    if target.way != "engine" or (target.framework == "torch" and nbytes < SMALL):
        return None
    at = handle.find(name)
    item = _load.item(handle.row(at), at, None)
    part = _device.part_of(0, item, shape)
    run = _device.Run(handle, [target], _device.Settings(), nbytes)
    try:
        run.submit_boxes([(part, 0, [_device.Box(ranges, 0, None)])])
        while 0 not in (run.landed() or [0]):
            pass
        return run.tensor(0)
    finally:
        run.close()
