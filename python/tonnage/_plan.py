"""`Plan`: what each of many ranks reads of a checkpoint, proven before a byte is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tonnage import _errors, _load, _modes, _planned, _ranks
from tonnage._native import (
    _Plan,
    _plan_bytes,
    _plan_explain,
    _plan_fits,
    _plan_html,
    _plan_pieces,
    _plan_request,
    _plan_rules,
)
from tonnage._placements import Mesh
from tonnage._progress import ProgressLike

if TYPE_CHECKING:
    from tonnage._checkpoint import Checkpoint

#: Where files lie, for those who know better than what is found out.
PROFILES = ("nvme", "nfs", "s3", "page_cache")

#: How quantised tensors may be cut where scales don't allow it.
CUTS = ("lossless", "aligned")


@dataclass(frozen=True)
class Proof:
    """What was checked of a plan.

    Attributes:
        sources: tensors of the checkpoint of which every element is read, as often as was said.
        targets: tensors that are wanted, each wholly on some ranks.
        layouts: different local tensors, each filled exactly once.
        nests: strided copies, each inside of its file.
        points: elements that were compared with a reference of the tensors' algebra.
        unread: tensors of which a part stays unread, as the request allows.
        repeated: tensors of which a part goes to several targets, as the request allows.
    """

    sources: int
    targets: int
    layouts: int
    nests: int
    points: int
    unread: tuple[str, ...]
    repeated: tuple[str, ...]


class LocalTensor(NamedTuple):
    """What one rank has of a tensor."""

    #: What the rank calls it.
    name: str
    #: The tensor of the plan that it is a part of.
    target: str
    #: As it is stored, and what it is cast to.
    dtype: str
    cast: str | None
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    #: Its parts: first index in the whole tensor, first index here, extents.
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]
    #: Bytes it takes as it is stored.
    nbytes: int
    #: Of scales of blocks: how many elements of the first block, in each dimension, are of ranks
    #: before this one.
    block_phase: tuple[int, ...]
    #: Placements by axis, as JSON.
    place: str


class Piece(NamedTuple):
    """What one rank has of a quantised tensor: its parts, and where in the tensor they lie."""

    #: The tensor's logical name.
    name: str
    #: The dtype of its values.
    dtype: str
    shape: tuple[int, ...]
    #: Its first index in the whole tensor.
    start: tuple[int, ...]
    #: The rank's tensors that it is made of.
    parts: tuple[str, ...]


class TensorBytes(NamedTuple):
    """What reading a rank's tensor comes to."""

    name: str
    #: Bytes of the files that it is made of.
    needed: int
    #: Bytes that are read for it.
    read: int
    #: Runs of consecutive bytes that it is made of.
    runs: int
    #: How: `"ranges"` straight into the tensor, `"runs"` each for itself, `"blocks"` that are read
    #: whole and copied from, `"nothing"`.
    way: str

    @property
    def amplification(self) -> float:
        """Bytes read for each byte needed."""
        return self.read / self.needed if self.needed else 1.0


class RankBytes(NamedTuple):
    """What reading a rank's tensors comes to."""

    rank: int
    needed: int
    read: int
    #: How many ranges are asked for.
    requests: int
    tensors: tuple[TensorBytes, ...]
    #: What `mode="auto"` takes where all ranks are on one machine, and why.
    mode: str
    mode_reason: str

    @property
    def amplification(self) -> float:
        """Bytes read for each byte needed."""
        return self.read / self.needed if self.needed else 1.0


class Plan:
    """Which bytes of a checkpoint each rank reads, and where they go. `Checkpoint.plan` makes one.

    A plan is checked when it is made, or read from JSON: every local tensor is filled exactly once,
    every byte of the checkpoint is read as often as was declared, nothing reaches past its file,
    and elements are those that a second, slower way finds.
    """

    def __init__(self, native: _Plan, checkpoint: Checkpoint | None) -> None:
        self._native = native
        self._checkpoint = checkpoint
        self._digest: str | None = None
        self._predicted: dict[str, tuple[str, str]] = {}

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return Mesh(self._native.mesh(), alt=self._native.alt())

    @property
    def ranks(self) -> int:
        """How many ranks."""
        return self.mesh.size

    @property
    def digest(self) -> str:
        """BLAKE3 of the plan: equal on all ranks that made it alike."""
        if self._digest is None:
            self._digest = self._native.digest()
        return self._digest

    @property
    def proof(self) -> Proof:
        """What was checked when it was made."""
        return _proof(self._native.proof())

    def verify(self) -> Proof:
        """Checks everything once more. Raises `UsageError` with the tensor and the range."""
        return _proof(self._native.verify())

    def targets(self) -> list[str]:
        """The names of all tensors that some rank has."""
        return self._native.targets()

    def tensors(self, rank: int) -> list[LocalTensor]:
        """What a rank has, in the order of its first use."""
        return [_local(row) for row in self._native.locals(rank)]

    def pieces(self, rank: int) -> list[Piece]:
        """What a rank has of quantised tensors that rules placed by their logical names."""
        return [
            Piece(name, dtype, tuple(shape), tuple(start), tuple(parts))
            for name, dtype, shape, start, parts in _plan_pieces(self._native, rank)
        ]

    def bytes(self, rank: int, *, profile: str | None = None) -> RankBytes:
        """What a rank reads: needed, read, and how, tensor by tensor. `profile` is `"nvme"`,
        `"nfs"`, `"s3"` or `"page_cache"`; by default it is found out where the files lie.
        """
        needed, read, requests, rows = _plan_bytes(self._native, self._handle(), rank, profile)
        names = [row[0] for row in self._native.locals(rank)]
        tensors = tuple(TensorBytes(name, *row) for name, row in zip(names, rows, strict=True))
        mode, reason = "direct", "there is one rank"
        if self.ranks > 1:
            known = profile or _modes.profile_of(self._native, self._checkpoint, rank)
            if known not in self._predicted:
                self._predicted[known] = _modes.predicted(self._native, self.ranks, known)
            mode, reason = self._predicted[known]
        return RankBytes(rank, needed, read, requests, tensors, mode, reason)

    def explain(self, rank: int, *, profile: str | None = None) -> str:
        """What a rank reads, as text for people."""
        return _plan_explain(self._native, self._handle(), rank, profile)

    def to_html(self, path: str | PathLike[str] | None = None, *, profile: str = "nvme") -> str:
        """A page that shows tensors by ranks, and who reads which part of what; written to `path`,
        if there is one. It needs nothing else to be looked at.
        """
        page = _plan_html(self._native, profile)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(page)
        return page

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The plan as JSON; written to `path`, if there is one."""
        text = self._native.to_json()
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    @classmethod
    def from_json(cls, source: str | PathLike[str], checkpoint: Checkpoint | None = None) -> Self:
        """A plan from its JSON, or from a file of it, and the checkpoint that it is about.

        Everything is checked as if it were made anew. Raises `UsageError` for a text that is no
        plan, or one that does not hold.
        """
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else None
        if text is None:
            with open(os.fspath(source), encoding="utf-8") as file:
                text = file.read()
        plan = cls(_Plan.from_json(text), None)
        return plan if checkpoint is None else plan.of(checkpoint)

    def of(self, checkpoint: Checkpoint) -> Self:
        """The same plan for a checkpoint, which must have its tensors where the plan says."""
        _plan_fits(self._native, checkpoint._handle)
        return type(self)(self._native, checkpoint)

    def load(
        self,
        rank: int | None = None,
        *,
        device: object = "cpu",
        framework: str | None = None,
        dtype: object = None,
        into: Mapping[str, Any] | None = None,
        select: _load.Select = None,
        out: str = "tensor",
        group: Any = None,
        device_mesh: Any = None,
        mode: str = "direct",
        window: str | PathLike[str] | None = None,
        staging: int | str = "256MiB",
        threads: int | None = None,
        strategy: str = "auto",
        profile: str | None = None,
        progress: ProgressLike = None,
        verify: bool = False,
        timeout: float | None = None,
        dequantize: bool = False,
    ) -> dict[str, Any]:
        """Reads what a rank needs, and no more.

        Args:
            rank: which. Default: this process's in `torch.distributed`, whose ranks first make sure
                that their plans are the same.
            device, framework, dtype: as for `Checkpoint.load`. What the plan casts stays so.
            into: existing tensors to fill, by the rank's names; each keeps its dtype and device.
            select: names and patterns; default: all that the rank has.
            out: `"tensor"`; `"checkpointable"`, for PyTorch tensors that carry the attributes of
                `torch.distributed.checkpoint.CheckpointableTensor`, so that DCP saves them as the
                parts that they are; or `"dtensor"`.
            group: a process group; default: that of all ranks.
            device_mesh: for `"dtensor"`; default: one of the plan's axes.
            mode: `"direct"`: each rank reads for itself. `"shm"`: the ranks of a machine read each
                byte once, into a window of memory that all see. `"collective"`: the ranks of the
                group read each byte once, and send it to those that need it. `"auto"`: what costs
                least, as all ranks reckon alike; `Checkpoint.report` tells which and why.
            window: for `"shm"` without a group: a path that is not there yet, best in a file system
                that lies in memory, and the same for all ranks of the plan.
            staging: host memory that bytes pass through, at most.
            threads, strategy, progress, verify: as for `Checkpoint.load`.
            profile: as for `bytes`.
            timeout: seconds that ranks wait for each other.
            dequantize: pieces of quantised tensors as numbers under their logical names, instead of
                their parts. In mode `"direct"`, without `into`.

        Returns:
            The rank's tensors by its names, in the order of the plan.

        Raises:
            UsageError: the plans of two ranks differ, a rank is missing, or the group has another
                number of ranks; the plan is about another checkpoint.
            And what `Checkpoint.load` raises.

        `Checkpoint.report` tells what was done; its `needed` says how many bytes had to be read.
        """
        _modes.check(mode)
        options = _load.Options(framework, device, dtype, threads, staging, strategy, verify)
        together = into is None and select is None and not verify
        # Ranks may have devices of their own, but not of different kinds.
        kind = str(device).partition(":")[0]
        told = (options.settings.staging, together, str(dtype), kind)
        who, start = self._start(rank, group, timeout, profile, mode, told)
        way = _modes.settle(start, who, self.ranks, mode, window, timeout, together)
        output = _planned.Output(out, device_mesh)
        if dequantize:
            if into is not None or way.mode != "direct" or out != "tensor":
                text = "dequantize=True is for new tensors, each rank reading for itself"
                raise _errors.usage(text, "PLAN_QUANTIZED")
            return _planned.load_numbers(start, select, options, progress, way)
        return _planned.load(start, select, options, into, output, progress, way)

    def stream(
        self,
        rank: int | None = None,
        *,
        device: object = "cpu",
        framework: str | None = None,
        dtype: object = None,
        select: _load.Select = None,
        group: Any = None,
        mode: str = "direct",
        budget: int | str = "1GiB",
        staging: int | str = "256MiB",
        threads: int | None = None,
        strategy: str = "auto",
        profile: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Yields what a rank needs, tensor by tensor in the order of the plan, while the next ones
        are read; no more than `budget` bytes that were not yielded. Arguments are those of `load`.

        Each rank reads for itself, at the pace of whoever takes its tensors: `mode` is `"direct"`,
        or `"auto"`, which comes to the same. `"shm"` and `"collective"` are a `UsageError`, since
        there ranks go in step.
        """
        _modes.check(mode)
        if mode not in ("direct", "auto"):
            text = f"ranks go in step with mode={mode!r}, and a stream at its own pace: use load"
            raise _errors.usage(text, "MODE", found=mode)
        options = _load.Options(framework, device, dtype, threads, staging, strategy, False)
        _, start = self._start(rank, group, timeout, profile)
        return _planned.stream(start, select, options, _load.bytes_of(budget))

    def _handle(self) -> Any:
        return None if self._checkpoint is None else self._checkpoint._handle

    def _start(
        self,
        rank: int | None,
        group: Any,
        timeout: float | None,
        profile: str | None,
        mode: str = "direct",
        told: tuple[object, ...] = (),
    ) -> tuple[_ranks.Member, _planned.Rank]:
        if self._checkpoint is None:
            raise _errors.usage("the plan has no checkpoint to read: say plan.of(checkpoint)")
        who = _ranks.member(self.ranks, rank, group)
        _ranks.agree(_modes.digest(self.digest, mode, *told), who, timeout)
        return who, _planned.Rank(self._checkpoint, self._native, who.rank, profile)

    def __repr__(self) -> str:
        label = "no checkpoint" if self._checkpoint is None else self._checkpoint.label
        return f"<tonnage plan of {label}: {len(self.targets())} tensors on {self.mesh!r}>"


def _proof(told: Mapping[str, Any]) -> Proof:
    names = {name: tuple(told[name]) for name in ("unread", "repeated")}
    return Proof(**{**told, **names})


def _local(row: Any) -> LocalTensor:
    name, target, dtype, cast, shape, whole, boxes, nbytes, phase, place = row
    found = tuple((tuple(begin), tuple(here), tuple(size)) for begin, here, size in boxes)
    return LocalTensor(
        name, target, dtype, cast, tuple(shape), tuple(whole), found, nbytes, tuple(phase), place
    )


def make(checkpoint: Checkpoint, what: Any, rules: Any, options: Mapping[str, Any]) -> Plan:
    """`Checkpoint.plan`."""
    if isinstance(what, Mapping) and "mesh" in what and ("targets" in what or "rules" in what):
        if rules is not None or options:
            raise _errors.usage("a request says everything itself")
        request = dict(what)
    else:
        from tonnage import _rules

        request = _rules.request(checkpoint, what, rules, **options)
    by_rule = request.pop("rules", None)
    quantized, cuts = request.pop("quantized", None), request.pop("cuts", "lossless")
    if cuts not in CUTS:
        raise _errors.usage(f"cuts must be one of {', '.join(CUTS)}, not {cuts!r}", "CUTS")
    if by_rule is None:
        if quantized is not None:
            raise _errors.usage("quantized= goes with rules", "PLAN_FORM")
        return Plan(_plan_request(checkpoint._handle, json.dumps(request)), checkpoint)
    if request.get("targets"):
        raise _errors.usage("a request has targets or rules, not both", "PLAN_FORM")
    of = json.dumps({**request, "targets": []})
    said = None if quantized is None else json.dumps(dict(quantized))
    native = _plan_rules(checkpoint._handle, of, json.dumps(by_rule), said, cuts)
    return Plan(native, checkpoint)
