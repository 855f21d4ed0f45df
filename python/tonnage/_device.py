"""Tensors on devices: whose memory they lie in, and the way there.

A load to a device is one run of the engine (`_Transfer`): jobs go in, and tensors come out as their
bytes land. This module decides where tensors lie. PyTorch's are in memory of PyTorch's own caching
allocator, written to by address, in the order of its current stream; those of other frameworks, and
of none, are `DeviceTensor`s in memory of ours, handed over by DLPack. Large tensors get memory of
their own, small ones share some.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tonnage import _arrays, _errors, _gds
from tonnage._dtypes import ROWS, Row
from tonnage._native import (
    DeviceTensor,
    _arrange,
    _check_size,
    _matches,
    _Region,
    _Transfer,
)

if TYPE_CHECKING:
    from tonnage._into import OnDevice
    from tonnage._load import Item
    from tonnage._native import _Bulk, _Handle, _Maker

#: Bytes of staging memory by default.
STAGING = 256 << 20
#: Bytes that small tensors of a stream share, at most.
REGION = 32 << 20
#: Kinds of devices that the engine brings bytes to, by their names here.
ENGINE_KINDS = ("cuda", "rocm", "vulkan", "metal")
#: `framework=` for tensors of nobody's: `DeviceTensor`.
PLAIN = "tonnage"
#: Jobs are handed over in portions of about so many bytes, so that reading begins at once.
PORTION = 64 << 20
PORTION_TENSORS = 2048

Progress = Callable[[int, int], object]


class Part(NamedTuple):
    """A tensor, or a slice of one, that goes to a device."""

    tag: int
    position: int
    name: str
    stored: Row
    wanted: Row
    #: Of what is taken.
    shape: tuple[int, ...]
    #: Bytes it takes in the file.
    nbytes: int

    @property
    def memory(self) -> int:
        """Bytes that it takes on the device."""
        return self.nbytes * self.wanted.bits // self.stored.bits


class Box(NamedTuple):
    """A part of what is taken of a tensor, and where it lies in the result."""

    #: Its ranges, one a dimension; `None` for everything.
    ranges: Sequence[tuple[int, int, int]] | None
    #: Its first byte in the result.
    at: int
    #: Bytes of the file that make a row, and bytes from one row to the next in the result; `None`
    #: where it has no gaps.
    rows: tuple[int, int] | None


WHOLE = (Box(None, 0, None),)


class Makes(Protocol):
    """Where tensors of a target lie and what they are."""

    def region(self, nbytes: int) -> tuple[_Region, Any]:
        """Memory that several tensors share: as the engine takes it, and as `within` does."""

    def own(self, part: Part) -> tuple[_Region, Any] | None:
        """Memory for one tensor alone; what `within` takes. `None` where `region` does it."""

    def within(self, holder: Any, at: int, part: Part) -> Any:
        """The tensor whose bytes begin there, now that they have landed."""

    def empty(self, part: Part) -> Any:
        """A tensor without a byte."""

    def table(self) -> object | None:
        """The framework's table of C functions, by which its tensors are made without Python."""

    def fits(self, dtype: str, tensor: Any) -> bool:
        """Whether what that made of a dtype is what the framework calls it."""

    def check(self, dtype: str) -> None:
        """Refuses a dtype that the framework lacks."""


@dataclass(frozen=True)
class Target:
    """Where tensors go: a device's name, as the engine and as a framework call it."""

    #: `"engine"`, `"host"`, `"framework"` (its own way from host memory) or `"meta"`.
    way: str
    #: The engine's name for it, such as `"cuda:0"`; empty where the engine does not reach it.
    id: str
    #: The framework's: what was asked for.
    device: object
    #: Whose tensors; `None` for the default.
    framework: str | None

    def makes(self) -> Makes:
        """Who makes its tensors."""
        if self.way == "host":
            return _HostMakes(_arrays.arrays(self.framework))
        if self.framework == "torch":
            return _TorchMakes(self.id, self.device)
        return _PlainMakes(self.id, _consumer(self.framework, self.id))


def name_of(device: object) -> str:
    """A device's name: `"cuda:1"` for itself, a `torch.device`, or a number."""
    if isinstance(device, bool) or device is None:
        raise TypeError(f"device takes a name, a number or a torch.device, not {device!r}")
    if isinstance(device, int):
        torch = sys.modules.get("torch")
        accelerator = getattr(torch, "accelerator", None)
        current = accelerator.current_accelerator() if accelerator is not None else None
        return f"{current.type if current is not None else 'cuda'}:{device}"
    return str(device)


def _split(name: str) -> tuple[str, str]:
    kind, _, index = name.partition(":")
    return {"hip": "rocm", "host": "cpu"}.get(kind, kind), index


def _torch_has(kind: str) -> bool:
    """Whether this process's PyTorch has GPUs of this kind, under the name `cuda`."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    return kind == ("rocm" if torch.version.hip else "cuda")


def target(device: object, framework: str | None) -> Target:
    """What a `device=` and a `framework=` mean together."""
    name = name_of(device)
    kind, index = _split(name)
    chosen = _arrays.canonical(framework)
    if kind == "cpu" and not index:
        return Target("host", "cpu", "cpu", chosen)
    if kind == "meta":
        return Target("meta", "", "meta", chosen or "torch")
    torch_hip = "torch" in sys.modules and bool(sys.modules["torch"].version.hip)
    if kind == "cuda" and torch_hip and chosen in (None, "torch"):
        kind = "rocm"
    if kind not in ENGINE_KINDS:
        return Target("framework", "", device, chosen)
    if chosen is None:
        chosen = "torch" if _torch_has(kind) else PLAIN
    if chosen == "torch":
        return _torch_target(kind, index, device)
    if chosen in (PLAIN, "jax", "cupy"):
        return Target("engine", f"{kind}:{index or 0}", name, chosen)
    return Target("framework", "", device, chosen)


def _torch_target(kind: str, index: str, device: object) -> Target:
    torch = importlib.import_module("torch")
    if kind not in ("cuda", "rocm"):
        # PyTorch has no such device; its tensors can be made of nothing but a copy.
        return Target("engine", f"{kind}:{index or 0}", device, PLAIN)
    if not _torch_has(kind):
        return Target("framework", "", device, "torch")
    number = int(index) if index.isdigit() else torch.cuda.current_device()
    return Target("engine", f"{kind}:{number}", f"cuda:{number}", "torch")


def _consumer(framework: str | None, device: str) -> Callable[[Any], Any] | None:
    """What turns a `DeviceTensor` into a framework's tensor; `None` where it stays one."""
    if framework == "cupy":
        return importlib.import_module("cupy").from_dlpack  # type: ignore[no-any-return]
    if framework == "jax":
        jax = importlib.import_module("jax")
        backend = _split(device)[0]
        try:
            jax.devices(backend)
        except RuntimeError as error:
            text = f"this JAX has no {backend} devices; framework='tonnage' gives a DeviceTensor"
            raise _errors.make("Device", text, code="DEVICE") from error
        return importlib.import_module("jax.dlpack").from_dlpack  # type: ignore[no-any-return]
    return None


class _TorchMakes:
    """PyTorch tensors on a GPU, in memory of PyTorch's caching allocator."""

    def __init__(self, device: str, name: object) -> None:
        self._torch = importlib.import_module("torch")
        self._device, self._name = device, name
        arrays = _arrays.arrays("torch")
        assert isinstance(arrays, _arrays.TorchArrays)
        self._arrays = arrays

    @property
    def stream(self) -> int:
        """The stream in whose order memory is allocated."""
        return int(self._torch.cuda.current_stream(self._name).cuda_stream)

    def _adopted(self, tensor: Any) -> tuple[_Region, Any]:
        return _Region.adopt(self._device, tensor.data_ptr(), tensor.nbytes, tensor), tensor

    def region(self, nbytes: int) -> tuple[_Region, Any]:
        torch = self._torch
        with _room(torch, self._name, nbytes):
            tensor = torch.empty(nbytes, dtype=torch.uint8, device=self._name)
        return self._adopted(tensor)

    def own(self, part: Part) -> tuple[_Region, Any] | None:
        if part.wanted.bits < 8:
            return None
        dtype = self._arrays.dtype(part.wanted)
        with _room(self._torch, self._name, part.memory):
            tensor = self._torch.empty(part.shape, dtype=dtype, device=self._name)
        return self._adopted(tensor)

    def within(self, holder: Any, at: int, part: Part) -> Any:
        dtype = self._arrays.dtype(part.wanted)
        extents = self._arrays.extents(part.wanted, part.shape)
        # A tensor over the same storage, no view: nothing ties it to the region in autograd.
        unit = dtype.itemsize
        made = self._torch.empty(0, dtype=dtype, device=self._name)
        return made.set_(holder.untyped_storage(), at // unit, extents, _strides(extents))

    def empty(self, part: Part) -> Any:
        extents = self._arrays.extents(part.wanted, part.shape)
        dtype = self._arrays.dtype(part.wanted)
        return self._torch.empty(extents, dtype=dtype, device=self._name)

    def table(self) -> object | None:
        return _exchange(self._torch)

    def fits(self, dtype: str, tensor: Any) -> bool:
        return bool(tensor.dtype == self._arrays.dtype(ROWS[dtype]))

    def check(self, dtype: str) -> None:
        self._arrays.dtype(ROWS[dtype])


def _exchange(torch: Any) -> object | None:
    # Of 2.10 and later.
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


@contextmanager
def _room(torch: Any, device: object, nbytes: int) -> Iterator[None]:
    """Tells of memory that PyTorch does not have as the engine does."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(device)
        text = (
            f"{device}: cannot hold the tensors: out of memory: {nbytes} bytes needed, {free} free"
        )
        found, needed = f"{free} bytes", f"{nbytes} bytes"
        raise _errors.make(
            "Device", text, code="DEVICE_MEMORY", found=found, needed=needed
        ) from error


class _PlainMakes:
    """`DeviceTensor`s in memory of ours, and what other frameworks make of them."""

    def __init__(self, device: str, consumer: Callable[[Any], Any] | None) -> None:
        self._device, self._consumer = device, consumer

    def region(self, nbytes: int) -> tuple[_Region, Any]:
        region = _Region.allocate(self._device, nbytes)
        return region, region

    def own(self, part: Part) -> tuple[_Region, Any] | None:
        return None

    def within(self, holder: Any, at: int, part: Part) -> Any:
        tensor = DeviceTensor(holder, at, part.wanted.name, part.shape)
        return tensor if self._consumer is None else self._consumer(tensor)

    def empty(self, part: Part) -> Any:
        return self.within(_Region.allocate(self._device, 0), 0, part)

    def table(self) -> object | None:
        return None

    def fits(self, dtype: str, tensor: Any) -> bool:
        return True

    def check(self, dtype: str) -> None:
        pass

    @property
    def plain(self) -> bool:
        """Whether its tensors are `DeviceTensor`s."""
        return self._consumer is None


class _HostMakes:
    """Any framework's tensors in host memory."""

    def __init__(self, arrays: _arrays.Arrays) -> None:
        self._arrays = arrays

    def region(self, nbytes: int) -> tuple[_Region, Any]:
        region: Any = _Region.allocate("cpu", nbytes)
        return region, memoryview(region)

    def own(self, part: Part) -> tuple[_Region, Any] | None:
        return None

    def within(self, holder: Any, at: int, part: Part) -> Any:
        return self._arrays.of_memory(holder[at : at + part.memory], part.wanted, part.shape)

    def empty(self, part: Part) -> Any:
        return self._arrays.finish(
            self._arrays.empty(part.wanted, part.shape), part.wanted, part.shape
        )

    def table(self) -> object | None:
        torch = self._arrays.name == "torch"
        return _exchange(importlib.import_module("torch")) if torch else None

    def fits(self, dtype: str, tensor: Any) -> bool:
        assert isinstance(self._arrays, _arrays.TorchArrays)
        return bool(tensor.dtype == self._arrays.dtype(ROWS[dtype]))

    def check(self, dtype: str) -> None:
        if isinstance(self._arrays, _arrays.TorchArrays | _arrays.NumpyArrays):
            self._arrays.dtype(ROWS[dtype])


@dataclass
class Settings:
    """How a run goes."""

    staging: int = STAGING
    threads: int | None = None
    strategy: str = "auto"
    gds: bool = False


class _Place(NamedTuple):
    part: Part
    target: int
    #: Memory that it lies in; the tensor itself, where that has its own.
    holder: Any
    #: Its first byte there; `None` where the holder is the tensor.
    at: int | None


class Run:
    """One pass over a checkpoint's files to one device or several.

    `landed` gives tags of tensors as their bytes arrive, `tensor` the tensors. However it ends,
    `close` has to be called; when it returns, nothing is under way, and memory of tensors that were
    not handed out is free.
    """

    def __init__(
        self,
        handle: _Handle,
        targets: Sequence[Target],
        settings: Settings,
        total: int,
        progress: Progress | None = None,
        verify: Sequence[int] | None = None,
    ) -> None:
        self._handle, self._targets, self._progress = handle, targets, progress
        self._makes = [one.makes() for one in targets]
        self._places: dict[int, _Place] = {}
        self._ready: list[int] = []
        names = list(dict.fromkeys(one.id for one in targets))
        checked = None if verify is None else (handle, verify)
        more = {"gds": _gds.program()} if settings.gds else {}
        self._transfer = _Transfer(
            names, settings.staging, settings.threads, settings.strategy, total, checked, **more
        )
        self._host = HostPeak()

    def submit(self, parts: Sequence[tuple[Part, int]]) -> None:
        """Gives whole tensors, each with its target's position; they come in this order."""
        self.submit_boxes([(part, at, WHOLE) for part, at in parts])

    def submit_all(
        self, positions: Sequence[int], goes: Sequence[int] | None, wanted: Row | None
    ) -> Bulk:
        """Gives all of many tensors: each by its position in the checkpoint, with its target's
        where there are several; floats to be cast. Nothing else may be given to this run.
        """
        if len(self._makes) == 1:
            # What the framework has no name for is told before anything is read.
            _, dtypes = self._handle.totals(positions, wanted and wanted.name)
            for name in dtypes:
                self._makes[0].check(name)
        bulk = Bulk(self._handle, wanted, self._targets, self._makes, self._transfer.after)
        names = [one.id for one in self._targets]
        bulk.given = self._transfer.submit_all(
            self._handle, positions, goes, wanted and wanted.name, names, bulk.allocate
        )
        return bulk

    def everything(self, bulk: Bulk) -> dict[str, Any]:
        """The tensors of a bulk by name, once all have landed."""
        while self._transfer.wait(self._progress):
            self._host.look()
        return bulk.tensors()

    def check_sizes(self, parts: Iterable[tuple[Part, int]]) -> None:
        """Refuses a tensor that no allocation of its device holds: before anything is read."""
        largest: dict[int, Part] = {}
        for part, at in parts:
            if at not in largest or part.memory > largest[at].memory:
                largest[at] = part
        for at, part in largest.items():
            _check_size(part.name, part.memory, self._targets[at].id)

    def submit_boxes(self, parts: Sequence[tuple[Part, int, Sequence[Box]]]) -> None:
        """Gives tensors, each with its target's position and what is taken of it."""
        self.check_sizes((part, at) for part, at, _ in parts)
        for portion in _portions(parts):
            for at in range(len(self._targets)):
                mine = [(part, boxes) for part, goes, boxes in portion if goes == at]
                if mine:
                    self._submit(at, mine)

    def _submit(self, at: int, parts: Sequence[tuple[Part, Sequence[Box]]]) -> None:
        where, makes = self._targets[at], self._makes[at]
        for part, _ in parts:
            if not part.memory:
                self._places[part.tag] = _Place(part, at, None, 0)
                self._ready.append(part.tag)
        parts = [one for one in parts if one[0].memory]
        regions, places = _arrange([part.memory for part, _ in parts], where.id)
        sharing = [0] * len(regions)
        for region, _, _ in places:
            sharing[region] += 1
        made: dict[int, tuple[_Region, Any]] = {}
        jobs: list[tuple[Any, ...]] = []
        for (part, boxes), (region, offset, slack) in zip(parts, places, strict=True):
            own = makes.own(part) if sharing[region] == 1 else None
            if own is None and region not in made:
                made[region] = makes.region(regions[region])
            memory, holder = own or made[region]
            self._places[part.tag] = _Place(part, at, holder, None if own else offset)
            jobs += _jobs(part, memory, offset, boxes, slack)
        if jobs:
            if isinstance(makes, _TorchMakes):
                self._transfer.after(where.id, makes.stream)
            self._give(jobs)

    def _give(self, jobs: Sequence[tuple[Any, ...]]) -> None:
        """Hands jobs of whole tensors, or of parts of them, to the engine."""
        self._transfer.submit(self._handle, jobs)

    def submit_into(self, part: Part, place: OnDevice, owner: Any) -> None:
        """Gives a tensor that goes to memory that is there, and that `owner` keeps."""
        memory = _Region.adopt(place.id, place.address, place.nbytes, owner)
        if place.stream is not None:
            self._transfer.after(place.id, place.stream)
        rows = None
        if place.rows is not None:
            rows = (part.nbytes // place.rows[0], place.rows[1])
        self._transfer.submit(self._handle, _jobs(part, memory, 0, [Box(None, 0, rows)], 0))

    def landed(self) -> list[int] | None:
        """Waits for the next tags; `None` where nothing is under way."""
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        tags = self._transfer.landed(self._progress)
        self._host.look()
        return tags

    def tensor(self, tag: int) -> Any:
        """The tensor of a tag that has landed, once."""
        part, at, holder, offset = self._places.pop(tag)
        if offset is None:
            return holder
        makes = self._makes[at]
        return makes.empty(part) if holder is None else makes.within(holder, offset, part)

    def verify(self) -> None:
        """Compares what no tensor covers of the chunks that were read, where `verify` was given."""
        self._transfer.rest()

    def report(self) -> Done:
        """What was done so far."""
        seconds, read, threads, strategy, reason, staging = self._transfer.report()
        return Done(seconds, read, threads, strategy, staging, reason, self._host.peak)

    def cancel(self) -> None:
        """Ends it soon: whoever waits hears of it."""
        self._transfer.cancel()

    def close(self) -> None:
        """Ends it."""
        self._transfer.close()
        self._places.clear()
        self._ready.clear()


def whole(handle: _Handle, target: Target) -> dict[str, Any]:
    """Every tensor of a checkpoint on one device."""
    positions = range(len(handle))
    run = Run(handle, [target], Settings(), handle.total_bytes)
    try:
        return run.everything(run.submit_all(positions, None, None))
    finally:
        run.close()


class Bulk:
    """Many whole tensors on their way. The native half knows what they are and where they lie; here
    is what it asks for: memory, and tensors that it can't make.
    """

    given: _Bulk

    def __init__(
        self,
        handle: _Handle,
        wanted: Row | None,
        targets: Sequence[Target],
        makes: Sequence[Makes],
        after: Callable[[str, int], None],
    ) -> None:
        self._handle, self._wanted, self._after = handle, wanted, after
        self._targets, self._makes = targets, makes

    def allocate(self, at: int, nbytes: int, position: int | None) -> tuple[_Region, Any, bool]:
        """Memory of a target, for the tensor at a position alone if one is given; what keeps it;
        and whether that is the tensor.
        """
        makes = self._makes[at]
        own = None if position is None else makes.own(self._part(position))
        region, holder = own or makes.region(nbytes)
        if isinstance(makes, _TorchMakes):
            self._after(self._targets[at].id, makes.stream)
        return region, holder, own is not None

    def tensors(self) -> dict[str, Any]:
        """All of them by name."""
        return self.given.tensors([self._maker(makes) for makes in self._makes])

    def _maker(self, makes: Makes) -> _Maker:
        def within(holder: Any, at: int, position: int) -> Any:
            part = self._part(position)
            return makes.empty(part) if holder is None else makes.within(holder, at, part)

        plain = isinstance(makes, _PlainMakes) and makes.plain
        return makes.table(), plain, within, makes.fits

    def _part(self, position: int) -> Part:
        from tonnage import _load

        return part_of(0, _load.item(self._handle.row(position), position, self._wanted))


def _jobs(
    part: Part, memory: _Region, offset: int, boxes: Sequence[Box], slack: int
) -> list[tuple[Any, ...]]:
    cast = None if part.wanted is part.stored else part.wanted.name
    return [
        (part.position, part.tag, memory, offset + at, ranges, cast, rows, slack)
        for ranges, at, rows in boxes
    ]


class Done(NamedTuple):
    """What a run of the engine did."""

    seconds: float
    bytes: int
    threads: int
    strategy: str
    #: Bytes of staging memory at most.
    staging: int
    #: Why that strategy.
    reason: str = ""
    #: Bytes of host memory that the process took more than before, at most, where that is known.
    host: int = 0


class HostPeak:
    """How much more host memory than before the process had at most, as often as it is looked at.

    Anonymous and shared memory count; pages of files that are mapped do not.
    """

    #: Seconds from one look to the next.
    PAUSE = 0.01

    def __init__(self) -> None:
        self._before, self._seen, self.peak = _host_memory(), 0.0, 0

    def look(self) -> None:
        """Looks, unless it has just done so."""
        now = perf_counter()
        if now - self._seen >= self.PAUSE:
            self._seen = now
            self.peak = max(self.peak, _host_memory() - self._before)


def _host_memory() -> int:
    try:
        with open("/proc/self/status", "rb") as status:
            lines = status.read().split(b"\n")
    except OSError:
        return 0
    kinds = (b"RssAnon:", b"RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


def _portions(parts: Sequence[_Given]) -> Iterator[Sequence[_Given]]:
    begin, held = 0, 0
    for at, (part, *_) in enumerate(parts):
        if at > begin and (held >= PORTION or at - begin >= PORTION_TENSORS):
            yield parts[begin:at]
            begin, held = at, 0
        held += part.memory
    if begin < len(parts):
        yield parts[begin:]


_Given = tuple[Part, int, Sequence[Box]]


def part_of(tag: int, item: Item, shape: tuple[int, ...] | None = None) -> Part:
    """A tensor that goes to a device; of it what has this shape."""
    if shape is None:
        return Part(
            tag, item.position, item.name, item.stored, item.wanted, item.shape, item.nbytes
        )
    nbytes = prod(shape) * item.stored.bits // 8
    return Part(tag, item.position, item.name, item.stored, item.wanted, shape, nbytes)


def targets_of(
    device: object, framework: str | None, names: Sequence[str]
) -> tuple[list[Target], list[int]]:
    """The targets that `device=` means, and for each name the position of its own.

    A dict maps names and patterns to devices; the first that fits counts, as written.
    """
    if not isinstance(device, Mapping):
        return [target(device, framework)], [0] * len(names)
    made: dict[Target, int] = {}
    rules = [(pattern, target(where, framework)) for pattern, where in device.items()]
    exact = dict(rules)
    chosen = []
    for name in names:
        where = exact.get(name) or next(
            (where for pattern, where in rules if _fits(pattern, name)), None
        )
        if where is None:
            text = f"no device is given for tensor {name}; add a pattern '*' for the rest"
            raise _errors.usage(text, "DEVICE_MAP", tensor=name)
        chosen.append(made.setdefault(where, len(made)))
    return list(made), chosen


def _fits(pattern: str, name: str) -> bool:
    # As `device_map` of the Hugging Face libraries has it: a module's name is all below it.
    return pattern == "" or name.startswith(f"{pattern}.") or _matches(pattern, name)
