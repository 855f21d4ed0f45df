"""Meshes and placements: which rank holds which part of a tensor.

A `Mesh` names the axes along which ranks are arranged; a placement says what one axis does to a
tensor. They are plain values; `to_json()` gives what the planner takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from tonnage import _errors

#: Sizes of named axes, outermost first.
Axes = tuple[tuple[str, int], ...]
AxesLike = Mapping[str, int] | Iterable[tuple[str, int]]


def _count(value: object, what: str, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, not {type(value).__name__}")
    if value < least:
        raise _errors.usage(f"{what} must be {least} or more, not {value}", found=str(value))
    return value


def _dim(value: object) -> None:
    """A dimension may count from the end, so it may be negative."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"dim must be an integer, not {type(value).__name__}")


def _axes(given: AxesLike) -> Axes:
    pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple(given)
    for name, size in pairs:
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of an axis must be a string, not {name!r}")
        _count(size, f"axis {name!r}", 1)
    if len({name for name, _ in pairs}) != len(pairs):
        raise _errors.usage(f"two axes of one name in Mesh({_text(pairs)})", "MESH")
    return pairs


@dataclass(frozen=True, init=False, repr=False)
class Mesh:
    """Ranks, arranged along named axes; the last axis is the one whose neighbours have consecutive
    ranks.

    ```python
    Mesh(pp=2, tp=4)                                 # 8 ranks; rank 5 is pp 1, tp 1
    Mesh(fsdp=2, tp=2, alt={"efsdp": 1, "ep": 4})    # 4 ranks, which experts see in another way
    ```

    Args:
        axes: pairs of a name and a size, for names that are not Python identifiers.
        alt: another factorisation of the same ranks, or a list of them. An axis that two
            factorisations share must mean the same ranks in both.
        sizes: the axes, as keywords.
    """

    axes: Axes
    alt: tuple[Axes, ...]

    def __init__(
        self,
        axes: AxesLike = (),
        /,
        *,
        alt: AxesLike | Sequence[AxesLike] = (),
        **sizes: int,
    ) -> None:
        made = _axes([*(axes.items() if isinstance(axes, Mapping) else axes), *sizes.items()])
        object.__setattr__(self, "axes", made)
        object.__setattr__(self, "alt", tuple(_axes(one) for one in _several(alt)))
        for other in self.alt:
            if prod(size for _, size in other) != self.size:
                text = f"{_text(other)} is not another view of the {self.size} ranks of {self!r}"
                raise _errors.usage(text, "MESH")
        strides: dict[str, tuple[int, int]] = {}
        for form in (self.axes, *self.alt):
            for name, found in _strides(form).items():
                if strides.setdefault(name, found) != found:
                    text = f"axis {name!r} means other ranks in each view of {self!r}"
                    raise _errors.usage(text, "MESH")

    @property
    def size(self) -> int:
        """How many ranks."""
        return prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all axes: the mesh's own, then those of its other views."""
        forms = (self.axes, *self.alt)
        return tuple(dict.fromkeys(name for form in forms for name, _ in form))

    def extent(self, axis: str) -> int:
        """How many coordinates an axis has."""
        return self._find(axis)[1]

    def coordinate(self, rank: int, axis: str) -> int:
        """Where a rank stands on an axis."""
        if not 0 <= rank < self.size:
            text = f"rank {rank} is not one of the {self.size} of {self!r}"
            raise _errors.usage(text, "RANK")
        stride, size = self._find(axis)
        return rank // stride % size

    def _find(self, axis: str) -> tuple[int, int]:
        for form in (self.axes, *self.alt):
            found = _strides(form).get(axis)
            if found is not None:
                return found
        text = f"{self!r} has no axis {axis!r}; it has {', '.join(self.names) or 'none'}"
        raise _errors.usage(text, "AXIS")

    def to_json(self) -> dict[str, Any]:
        """`{"mesh": [[name, size], …], "alt": [[[name, size], …], …]}`."""
        return {
            "mesh": [list(pair) for pair in self.axes],
            "alt": [[list(pair) for pair in form] for form in self.alt],
        }

    def __repr__(self) -> str:
        other = "".join(f", alt=({_text(form)})" for form in self.alt)
        return f"Mesh({_text(self.axes)}{other})"


def _several(alt: AxesLike | Sequence[AxesLike]) -> list[AxesLike]:
    """One factorisation or a list of them, as a list."""
    if isinstance(alt, Mapping):
        return [alt]
    found: list[Any] = list(alt)
    if found and isinstance(found[0], tuple | list) and len(found[0]) == 2:
        name, size = found[0]
        if isinstance(name, str) and isinstance(size, int):
            return [found]
    return found


def _strides(form: Axes) -> dict[str, tuple[int, int]]:
    """For each axis, how far apart its neighbours' ranks are, and its size."""
    found: dict[str, tuple[int, int]] = {}
    stride = 1
    for name, size in reversed(form):
        found[name] = (stride, size)
        stride *= size
    return found


def _text(form: Axes) -> str:
    return ", ".join(f"{name}={size}" for name, size in form)


@dataclass(frozen=True)
class PadTo:
    """Uneven division: the dimension is padded with zeros to a multiple of `multiple`, then divided
    evenly; saving strips the padding.
    """

    multiple: int

    def __post_init__(self) -> None:
        _count(self.multiple, "PadTo", 1)

    def to_json(self) -> dict[str, int]:
        """`{"pad_to": multiple}`."""
        return {"pad_to": self.multiple}


@dataclass(frozen=True)
class Granular:
    """Uneven division: ranks get whole units of `unit` elements, the first ranks one more where
    they do not come out even. For heads, blocks of scales, and packed elements.
    """

    unit: int

    def __post_init__(self) -> None:
        _count(self.unit, "Granular", 1)

    def to_json(self) -> dict[str, int]:
        """`{"granular": unit}`."""
        return {"granular": self.unit}


#: What happens where a dimension does not divide by the ranks: `"torch"` gives each rank the
#: rounded-up part, so the last ranks get less or nothing (131 over 4 is 33, 33, 33, 32; 5 over 4 is
#: 2, 2, 1, 0); `"balanced"` gives the first ranks one more (2, 1, 1, 1); `"error"` refuses.
Uneven = Literal["torch", "balanced", "error"] | PadTo | Granular


def _uneven(value: Uneven) -> Any:
    if isinstance(value, PadTo | Granular):
        return value.to_json()
    if value not in ("torch", "balanced", "error"):
        text = (
            f"uneven must be 'torch', 'balanced', 'error', PadTo(…) or Granular(…), not {value!r}"
        )
        raise _errors.usage(text, "PLACEMENT")
    return value


@dataclass(frozen=True)
class Placement:
    """What an axis of the mesh does to a tensor. One of the classes below."""

    def to_json(self) -> Any:
        """What the planner takes."""
        raise TypeError("Placement itself says nothing; use Replicate, Shard and their kin")


@dataclass(frozen=True)
class Replicate(Placement):
    """Every rank along the axis has all of the tensor."""

    def to_json(self) -> str:
        """`"replicate"`."""
        return "replicate"


@dataclass(frozen=True)
class Shard(Placement):
    """Each rank along the axis has one part of dimension `dim`, in order."""

    dim: int = 0
    uneven: Uneven = "torch"

    def __post_init__(self) -> None:
        _dim(self.dim)
        _uneven(self.uneven)

    def to_json(self) -> dict[str, Any]:
        """`{"shard": {"dim": …, "uneven": …}}`."""
        return {"shard": {"dim": self.dim, "uneven": _uneven(self.uneven)}}


@dataclass(frozen=True)
class StridedShard(Placement):
    """Dimension `dim` is cut into `groups`, and each rank has one part of every group.

    PyTorch's `_StridedShard(dim, split_factor=groups)`: how FSDP lies outside of tensor
    parallelism, and fused tensors whose parts are equally large.
    """

    dim: int
    groups: int
    uneven: Uneven = "torch"

    def __post_init__(self) -> None:
        _dim(self.dim)
        _count(self.groups, "groups", 1)
        _uneven(self.uneven)

    def to_json(self) -> dict[str, Any]:
        """`{"strided": {"dim": …, "groups": …, "uneven": …}}`."""
        uneven = _uneven(self.uneven)
        return {"strided": {"dim": self.dim, "groups": self.groups, "uneven": uneven}}


@dataclass(frozen=True, init=False)
class Segments(Placement):
    """Dimension `dim` is made of parts of the given sizes, each with a placement of its own; what a
    rank has of them lies one behind the other. For fused tensors: `[q|k|v]`, `[gate|up]`.

    ```python
    Segments([4096, 1024, 1024])                                   # q, k, v, each sharded
    Segments([512, 64], each=[Shard(0), Replicate()])              # the second on every rank
    ```

    Args:
        sizes: extents of the parts along `dim`, in order.
        dim: the dimension that they divide.
        each: one placement for all, or one a part. Default: `Shard(dim)`.
    """

    dim: int
    sizes: tuple[int, ...]
    each: tuple[Placement, ...]

    def __init__(
        self,
        sizes: Iterable[int],
        dim: int = 0,
        each: Placement | Iterable[Placement] | None = None,
    ) -> None:
        _dim(dim)
        extents = tuple(_count(size, "a segment", 0) for size in sizes)
        placed = Shard(dim) if each is None else each
        parts = (placed,) * len(extents) if isinstance(placed, Placement) else tuple(placed)
        if not extents or len(parts) != len(extents):
            text = f"Segments of {len(extents)} sizes cannot have {len(parts)} placements"
            raise _errors.usage(text, "PLACEMENT")
        for part in parts:
            if isinstance(part, Owner | OnlyRank):
                text = (
                    f"a segment cannot be placed by {type(part).__name__}: it is part of a tensor"
                )
                raise _errors.usage(text, "PLACEMENT")
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "sizes", extents)
        object.__setattr__(self, "each", parts)

    def to_json(self) -> dict[str, Any]:
        """`{"segments": {"dim": …, "sizes": […], "each": […]}}`."""
        each = [part.to_json() for part in self.each]
        return {"segments": {"dim": self.dim, "sizes": list(self.sizes), "each": each}}


@dataclass(frozen=True)
class Heads(Placement):
    """Dimension `dim` is `heads` heads of `head_dim`; ranks get whole heads. Where there are fewer
    heads than ranks, several ranks have the same head: `rank // (ranks / heads)`. Where neither
    divides the other, `uneven="balanced"` gives some ranks one head more than others.
    """

    dim: int
    heads: int
    head_dim: int
    uneven: Literal["error", "balanced"] = "error"

    def __post_init__(self) -> None:
        _dim(self.dim)
        _count(self.heads, "heads", 1)
        _count(self.head_dim, "head_dim", 1)
        if self.uneven not in ("error", "balanced"):
            text = f"uneven must be 'error' or 'balanced' for heads, not {self.uneven!r}"
            raise _errors.usage(text, "PLACEMENT")

    def to_json(self) -> dict[str, Any]:
        """`{"heads": {"dim": …, "heads": …, "head_dim": …, "uneven"?: …}}`."""
        made: dict[str, Any] = {"dim": self.dim, "heads": self.heads, "head_dim": self.head_dim}
        return {"heads": made if self.uneven == "error" else {**made, "uneven": self.uneven}}


@dataclass(frozen=True, init=False)
class Owner(Placement):
    """The whole tensor, on these coordinates of the axis and on no others: pipeline stages,
    experts, and tied copies, which have several owners.
    """

    coords: tuple[int, ...]

    def __init__(self, *coords: int) -> None:
        found = tuple(sorted({_count(one, "an owner", 0) for one in coords}))
        if not found:
            raise _errors.usage("Owner needs a coordinate: nobody would have the tensor")
        object.__setattr__(self, "coords", found)

    def to_json(self) -> dict[str, list[int]]:
        """`{"owner": [coordinate, …]}`."""
        return {"owner": list(self.coords)}


@dataclass(frozen=True)
class OnlyRank(Placement):
    """One coordinate has the tensor; on the others it is absent, or all zeros: a bias that is added
    once.
    """

    coord: int = 0
    others: Literal["absent", "zeros"] = "absent"

    def __post_init__(self) -> None:
        _count(self.coord, "coord", 0)
        if self.others not in ("absent", "zeros"):
            text = f"others must be 'absent' or 'zeros', not {self.others!r}"
            raise _errors.usage(text, "PLACEMENT")

    def to_json(self) -> dict[str, Any]:
        """`{"only": {"coord": …, "others": …}}`."""
        return {"only": {"coord": self.coord, "others": self.others}}


@dataclass(frozen=True)
class Blocks(Placement):
    """The scales of a weight that is sharded along a dimension of `extent` elements, one scale a
    `block`: each rank has the scales of every block that its part of the weight touches, so two
    ranks may have the same one.
    """

    dim: int
    block: int
    extent: int
    uneven: Uneven = "torch"

    def __post_init__(self) -> None:
        _dim(self.dim)
        _count(self.block, "block", 1)
        _count(self.extent, "extent", 0)
        _uneven(self.uneven)

    def to_json(self) -> dict[str, Any]:
        """`{"blocks": {"dim": …, "block": …, "extent": …, "uneven": …}}`."""
        return {
            "blocks": {
                "dim": self.dim,
                "block": self.block,
                "extent": self.extent,
                "uneven": _uneven(self.uneven),
            }
        }
