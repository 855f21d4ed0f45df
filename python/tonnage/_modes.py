"""Ways in which the ranks of a plan load: each by itself, through memory that all processes of a
machine see, or by messages through `torch.distributed`.

The way is settled once, from numbers that all ranks have told each other, so that all take the
same.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from tonnage import _arrays, _device, _errors, _load, _native, _ranks

if TYPE_CHECKING:
    from tonnage._checkpoint import Checkpoint
    from tonnage._native import _Cancel, _Together
    from tonnage._planned import Rank

#: What `mode=` takes.
MODES = ("auto", "direct", "shm", "collective")
#: Bytes of each of the two halves of a window: both fit in the 64 MiB that containers give to
#: shared memory.
HALF = 24 << 20
#: Profiles from the fastest to the slowest: ranks that see different ones go by the slowest.
_SLOWER = ("page_cache", "nvme", "nfs", "s3")
#: Bytes a second by messages: on one machine, and between machines.
_FABRIC = (1.5e9, 10e9)
#: Bytes of what ranks tell each other: node, token, profile, whether there is room for a window.
_RECORD = 34

Job = tuple[int, Any, bool, str | None]


class Way(NamedTuple):
    """How this rank loads together with others."""

    mode: str
    #: Why, as a phrase.
    reason: str
    #: The ranks of the plan that load together, and this one's position among them.
    ranks: tuple[int, ...]
    member: int
    group: Any
    #: The name of the window.
    path: str
    half: int
    timeout: float


def check(mode: str) -> None:
    """Refuses a mode that is none."""
    if mode not in MODES:
        names = ", ".join(map(repr, MODES))
        raise _errors.usage(f"mode must be one of {names}, not {mode!r}", "MODE")


def digest(plan: str, mode: str, *told: object) -> str:
    """What ranks compare before anything else: the plan, and what decides who does what."""
    if mode == "direct":
        return plan
    text = "\n".join([plan, mode, *map(repr, told)])
    return hashlib.sha256(text.encode()).hexdigest()


def settle(
    rank: Rank,
    who: _ranks.Member,
    size: int,
    mode: str,
    window: str | os.PathLike[str] | None,
    timeout: float | None,
    together: bool,
) -> Way:
    """The way that all ranks take. `together`: whether this load can be one of several ranks'."""
    limit = _ranks.TIMEOUT if timeout is None else timeout
    alone = Way(
        "direct", "each rank was told to read for itself", (who.rank,), 0, None, "", 0, limit
    )
    if mode == "direct":
        return alone
    if mode == "auto" and not together:
        return alone._replace(reason="a part of the tensors, or tensors that are there already")
    if not together:
        text = f"mode={mode!r} loads all of a rank's tensors, into new ones, without verify=True"
        raise _errors.usage(text, "MODE")
    if who.group is None and who.alone:
        return _by_name(alone, size, mode, window)
    if window is not None:
        raise _errors.usage("a group finds a name for its window by itself", "WINDOW")
    told = _tell(rank, who, limit)
    return _choose(rank, who, mode, told, alone)


def _by_name(alone: Way, size: int, mode: str, window: str | os.PathLike[str] | None) -> Way:
    """Without a group: a window of a name that all ranks were given."""
    if mode == "collective":
        text = "mode='collective' needs a process group of torch.distributed"
        raise _errors.usage(text, "MODE")
    if window is None and mode == "auto":
        return alone._replace(reason="no group of ranks")
    if window is None:
        text = "mode='shm' without a process group needs window=, the same new path for all ranks"
        raise _errors.usage(text, "WINDOW")
    ranks = tuple(range(size))
    return alone._replace(
        mode="shm",
        reason="a window was named",
        ranks=ranks,
        member=alone.ranks[0],
        path=os.fspath(window),
        half=HALF,
    )


class _Told(NamedTuple):
    """What one rank told."""

    node: bytes
    token: bytes
    profile: str
    room: bool


def _tell(rank: Rank, who: _ranks.Member, limit: float) -> list[_Told]:
    """Tells the others where this rank is and what it sees, and hears it of them."""
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    found = rank.profile or _native._plan_profile(rank.native, rank.checkpoint._handle, rank.rank)
    folder = _folder()
    record = _node(folder) + os.urandom(16)
    record += bytes([_SLOWER.index(found), _has_room(folder)])
    device = _wire(who.group)
    mine = torch.tensor(list(record), dtype=torch.uint8, device=device)
    heard = [torch.empty_like(mine) for _ in range(dist.get_world_size(who.group))]
    with _within(limit):
        work = dist.all_gather(heard, mine, group=who.group, async_op=True)
        work.wait(timedelta(seconds=limit))
        raw = [bytes(one.cpu().tolist()) for one in heard]
    return [
        _Told(one[:16], one[16:32], _SLOWER[one[32]], bool(one[33]))
        for one in raw
        if len(one) == _RECORD
    ]


@contextlib.contextmanager
def _within(limit: float) -> Any:
    """Turns what `torch.distributed` raises for ranks that are late or gone into our own."""
    try:
        yield
    except RuntimeError as error:
        text = f"a rank did not take part within {limit:g} s, or is gone: {error}"
        raise _errors.make("Io", text, code="RANK_LOST") from error


def _folder() -> str:
    """Where windows lie: in memory, where the system has a place for files there."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def _has_room(folder: str) -> bool:
    if not hasattr(os, "statvfs"):
        return False
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize > 2 * HALF + (1 << 20)


def _node(folder: str) -> bytes:
    """What processes have in common that see the same memory: the machine since it was started, and
    the folder's file system, of which each container may have its own.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            machine = file.read()
    except OSError:
        machine = socket.gethostname()
    device = os.stat(folder).st_dev
    return hashlib.sha256(f"{machine}\n{device}".encode()).digest()[:16]


def _wire(group: Any) -> Any:
    """The device whose memory the group's backend sends."""
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _choose(rank: Rank, who: _ranks.Member, mode: str, told: list[_Told], alone: Way) -> Way:
    """The same on all ranks: everything in it was told by all to all."""
    nodes = [one.node for one in told]
    numbers = [nodes.index(node) for node in nodes]
    reason = "it was asked for"
    if mode == "auto":
        profile = max((one.profile for one in told), key=_SLOWER.index)
        local = profile in ("page_cache", "nvme")
        mode, *_, reason = _native._plan_choose(
            rank.native,
            list(range(len(told))),
            numbers,
            profile,
            local,
            not local,
            _FABRIC[len(set(numbers)) > 1],
        )
        if mode == "shm" and not all(one.room for one in told):
            mode, reason = "collective", "shared memory has no room for a window"
    if mode == "direct":
        return alone._replace(reason=reason)
    everyone = tuple(range(len(told)))
    if mode == "collective":
        return alone._replace(
            mode=mode, reason=reason, ranks=everyone, member=who.rank, group=who.group
        )
    here = tuple(at for at in everyone if numbers[at] == numbers[who.rank])
    name = f"tonnage-{told[here[0]].token.hex()}"
    return alone._replace(
        mode=mode,
        reason=reason,
        ranks=here,
        member=here.index(who.rank),
        path=os.path.join(_folder(), name),
        half=HALF,
    )


def profile_of(native: Any, checkpoint: Checkpoint | None, rank: int) -> str:
    """The profile of what a rank reads; that of a local disk without a checkpoint."""
    if checkpoint is None:
        return "nvme"
    return _native._plan_profile(native, checkpoint._handle, rank)


def predicted(native: Any, ranks: int, profile: str) -> tuple[str, str]:
    """The mode that `auto` takes where all ranks are on one machine and have a group, and why."""
    local = profile in ("page_cache", "nvme")
    everyone = list(range(ranks))
    mode, *_, reason = _native._plan_choose(
        native, everyone, [0] * ranks, profile, local, not local, _FABRIC[0]
    )
    return mode, reason


def read(
    rank: Rank,
    way: Way,
    jobs: Sequence[Job],
    options: _load.Options,
    report: _load.Report,
    progress: Callable[[int, int], None] | None = None,
    cancel: _Cancel | None = None,
) -> None:
    """Reads all of a rank's tensors into host memory, together with the other ranks of the way."""
    together = _together(rank, way, jobs, options, False)
    reading = _reading(rank, options)
    if way.mode == "shm":
        _add(report, together.shm(way.path, way.timeout, reading, progress, cancel))
        return
    _add(report, together.direct(reading))
    _Messages(together, way, reading, report, _Host(together)).run()
    together.finish()


def read_to(
    rank: Rank,
    way: Way,
    items: Sequence[_load.Item],
    device: Any,
    options: _load.Options,
    report: _load.Report,
) -> dict[str, Any]:
    """Reads all of a rank's tensors into a device's memory, by messages of its own backend.

    The host holds blocks that it has read, and what is to be sent of them, and nothing else.
    """
    torch = importlib.import_module("torch")
    arrays = _arrays.TorchArrays()
    together = _together(rank, way, (), options, True)
    tensors = []
    for one in items:
        extents, dtype = arrays.extents(one.stored, one.shape), arrays.dtype(one.stored)
        nbytes = _size(extents) * dtype.itemsize
        # Zeros, since no message brings padding.
        flat = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        tensors.append((flat, extents, dtype))
    apart = _Apart(together, [flat for flat, _, _ in tensors])
    _Messages(together, way, _reading(rank, options), report, apart).run()
    loaded = {}
    for one, (flat, extents, dtype) in zip(items, tensors, strict=True):
        tensor = flat.view(dtype).reshape(extents)
        wanted = arrays.dtype(one.wanted)
        loaded[one.name] = tensor if wanted == dtype else tensor.to(wanted)
    return loaded


def _size(extents: Sequence[int]) -> int:
    size = 1
    for extent in extents:
        size *= extent
    return size


def _together(
    rank: Rank, way: Way, jobs: Sequence[Job], options: _load.Options, own: bool
) -> _Together:
    window = way.half if way.mode == "shm" else None
    handle = rank.checkpoint._handle
    ranks, staging = list(way.ranks), max(options.settings.staging, 1 << 20)
    return _native._Together(
        rank.native, handle, ranks, way.member, list(jobs), staging, window, own
    )


def _reading(rank: Rank, options: _load.Options) -> tuple[int, int | None, str, str | None]:
    staging = max(options.settings.staging, 1 << 20)
    return (staging, options.threads, options.strategy, rank.profile)


def _add(report: _load.Report, run: Any) -> None:
    report.add(_device.Done(*run[:6]))


class _Host:
    """Tensors in host memory, which the native side fills."""

    def __init__(self, together: _Together) -> None:
        self._together = together

    def take(self, turn: int, received: Any, position: int | None) -> None:
        memory = _arrays.memory_of(received.cpu())
        self._together.take(turn, memory, position)


class _Apart:
    """Tensors that only PyTorch reaches, as flat bytes; they are filled by strided copies there."""

    def __init__(self, together: _Together, tensors: Sequence[Any]) -> None:
        self._together = together
        self._tensors = tensors

    def take(self, turn: int, received: Any, position: int | None) -> None:
        for local, src, dst, run, axes in self._together.copies(turn, position):
            _copy(received, src, self._tensors[local], dst, run, axes)


def _copy(
    source: Any, src: int, target: Any, dst: int, run: int, axes: Sequence[tuple[int, int, int]]
) -> None:
    """One strided copy of bytes, in the largest elements that all its numbers are multiples of."""
    torch = importlib.import_module("torch")
    numbers = [src, dst, run, *(step for _, *steps in axes for step in steps)]
    numbers += [source.data_ptr(), target.data_ptr(), source.numel(), target.numel()]
    sizes = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
    width, dtype = next(one for one in sizes if all(number % one[0] == 0 for number in numbers))
    extents = [extent for extent, _, _ in axes] + [run // width]
    come = [step // width for _, step, _ in axes] + [1]
    go = [step // width for _, _, step in axes] + [1]
    # An offset counts from where the storage begins.
    views = source.view(dtype), target.view(dtype)
    begin, end = (one.storage_offset() for one in views)
    taken = torch.as_strided(views[0], extents, come, begin + src // width)
    torch.as_strided(views[1], extents, go, end + dst // width).copy_(taken)


class _Messages:
    """The rounds of a load by messages."""

    def __init__(
        self,
        together: _Together,
        way: Way,
        reading: tuple[int, int | None, str, str | None],
        report: _load.Report,
        tensors: _Host | _Apart,
    ) -> None:
        torch = importlib.import_module("torch")
        self._dist = importlib.import_module("torch.distributed")
        self._together, self._way, self._reading = together, way, reading
        self._report, self._tensors = report, tensors
        self._device = _wire(way.group)
        # Bytes throughout: gloo refuses fp8, fp4, int16 and unsigned types. What goes out lies
        # first and what comes in behind it, in one piece of memory where both are the host's:
        # rounds are large in different ways, and the budget bounds each as a whole.
        sizes = [(0, 0), *map(self._sizes, range(together.rounds))]
        here, there = zip(*sizes, strict=True)
        apart = self._device.type != "cpu"
        most = max(map(sum, sizes))
        host = max(here) if apart else most
        self._out = torch.empty(host, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._in = (
            torch.empty(max(there), dtype=torch.uint8, device=self._device) if apart else None
        )
        self._staged = 0
        self._held = host + (max(there) if apart else 0)

    def _sizes(self, turn: int) -> tuple[int, int]:
        """Bytes of a round that go out, and that come in."""
        send, receive, broadcasts, own = self._together.sizes(turn)
        heard = (size for reader, size in broadcasts if reader != self._way.member)
        return sum(send) + own, sum(receive) + max(heard, default=0)

    def run(self) -> None:
        for turn in range(self._together.rounds):
            self._round(turn)
        self._report.peak_staging = max(self._report.peak_staging, self._staged + self._held)

    def _round(self, turn: int) -> None:
        send, receive, broadcasts, own = self._together.sizes(turn)
        out = sum(send)
        sent, said = self._out[:out], self._out[out : out + own]
        come = self._out[out + own :] if self._in is None else self._in
        memory = _arrays.memory_of
        done = self._together.read_round(turn, memory(sent), memory(said), self._reading)
        self._staged = max(self._staged, done[4])
        _add(self._report, done)
        if self._together.exchanged(turn):
            received = come[: sum(receive)]
            self._wait(
                self._dist.all_to_all_single(
                    received,
                    sent.to(self._device),
                    list(receive),
                    list(send),
                    group=self._way.group,
                    async_op=True,
                )
            )
            self._tensors.take(turn, received, None)
        begin, heard = 0, come[sum(receive) :]
        for position, (reader, size) in enumerate(broadcasts):
            if reader == self._way.member:
                bytes_ = said[begin : begin + size].to(self._device)
                begin += size
            else:
                bytes_ = heard[:size]
            self._wait(
                self._dist.broadcast(bytes_, group=self._way.group, group_src=reader, async_op=True)
            )
            self._tensors.take(turn, bytes_, position)

    def _wait(self, work: Any) -> None:
        with _within(self._way.timeout):
            work.wait(timedelta(seconds=self._way.timeout))
