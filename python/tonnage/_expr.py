"""How a tensor is made of tensors of a checkpoint: slices, concatenations, permutations.

An `Expr` moves elements and never computes with them. `to_json()` is what the planner takes;
`evaluate` does the same with NumPy arrays, and so says what every expression means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tonnage import _errors

Shape = tuple[int, ...]


def _refuse(text: str) -> Any:
    raise _errors.usage(text, "EXPR")


def axis(dim: int, ndim: int, what: str) -> int:
    """A dimension counted from the front, from one that may count from the end."""
    if not -ndim <= dim < ndim:
        _refuse(f"{what}: there is no dimension {dim} in a tensor of {ndim}")
    return dim % ndim


@dataclass(frozen=True)
class Expr:
    """A tensor, by how it is made. One of the classes below."""

    def parts(self) -> tuple[Expr, ...]:
        """The expressions that it is made of."""
        return ()

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> Shape:
        """Its shape, from the shapes of the sources. Raises `UsageError` where they do not fit."""
        return self._shape(tuple(part.shape(shapes) for part in self.parts()), shapes)

    def evaluate(self, arrays: Mapping[str, Any]) -> Any:
        """The tensor itself, from NumPy arrays of the sources."""
        made = tuple(part.evaluate(arrays) for part in self.parts())
        self._shape(tuple(one.shape for one in made), {})
        return self._evaluate(made)

    def sources(self) -> Iterator[str]:
        """The names of the sources, each as often as it is used."""
        for part in self.parts():
            yield from part.sources()

    def to_json(self) -> dict[str, Any]:
        """What the planner takes."""
        raise TypeError("Expr itself makes nothing; use Source, Slice and their kin")

    # Every expression but `Source`, which overrides what calls these, has its own.

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        raise NotImplementedError

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Source(Expr):
    """A tensor of the checkpoint."""

    name: str

    def sources(self) -> Iterator[str]:
        """Its own name."""
        yield self.name

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> Shape:
        """The shape it has in the checkpoint."""
        found = shapes.get(self.name)
        if found is None:
            raise _errors.usage(
                f"there is no tensor {self.name}", "UNKNOWN_TENSOR", tensor=self.name
            )
        return tuple(found)

    def evaluate(self, arrays: Mapping[str, Any]) -> Any:
        """The array of its name."""
        return arrays[self.name]

    def to_json(self) -> dict[str, Any]:
        """`{"source": name}`."""
        return {"source": self.name}


@dataclass(frozen=True)
class Slice(Expr):
    """Elements `start`, `start + step`, … before `stop` of one dimension."""

    of: Expr
    dim: int
    start: int
    stop: int
    step: int = 1

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        (shape,) = of
        dim = axis(self.dim, len(shape), "slice")
        if self.step < 1 or not 0 <= self.start <= self.stop <= shape[dim]:
            text = f"{self.start}:{self.stop}:{self.step} of {shape[dim]} elements is no slice"
            _refuse(text)
        count = len(range(self.start, self.stop, self.step))
        return (*shape[:dim], count, *shape[dim + 1 :])

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        key = [slice(None)] * of[0].ndim
        key[self.dim] = slice(self.start, self.stop, self.step)
        return of[0][tuple(key)]

    def to_json(self) -> dict[str, Any]:
        """`{"slice": {"of": …, "dim": …, "start": …, "stop": …, "step": …}}`."""
        inner = {"of": self.of.to_json(), "dim": self.dim, "start": self.start}
        return {"slice": {**inner, "stop": self.stop, "step": self.step}}


def _alike(of: tuple[Shape, ...], dim: int, what: str) -> Shape:
    """The first of several shapes, which may differ in `dim` only; -1 for in none."""
    if not of:
        _refuse(f"{what} of nothing")
    first = of[0]
    for other in of[1:]:
        if other == first:
            continue
        same = len(other) == len(first) and all(
            at == dim or a == b for at, (a, b) in enumerate(zip(first, other, strict=True))
        )
        if not same:
            _refuse(f"{what}: the shapes {list(first)} and {list(other)} do not fit")
    return first


@dataclass(frozen=True)
class Concat(Expr):
    """Tensors one behind the other along a dimension."""

    of: tuple[Expr, ...]
    dim: int = 0

    def parts(self) -> tuple[Expr, ...]:
        return self.of

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        dim = axis(self.dim, len(of[0]) if of else 0, "concat")
        first = _alike(of, dim, "concat")
        return (*first[:dim], sum(one[dim] for one in of), *first[dim + 1 :])

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        import numpy as np

        return np.concatenate(of, axis=self.dim)

    def to_json(self) -> dict[str, Any]:
        """`{"concat": {"of": […], "dim": …}}`."""
        return {"concat": {"of": [one.to_json() for one in self.of], "dim": self.dim}}


@dataclass(frozen=True)
class Stack(Expr):
    """Tensors of one shape along a new dimension."""

    of: tuple[Expr, ...]
    dim: int = 0

    def parts(self) -> tuple[Expr, ...]:
        return self.of

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        first = _alike(of, -1, "stack")
        dim = axis(self.dim, len(first) + 1, "stack")
        return (*first[:dim], len(of), *first[dim:])

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        import numpy as np

        return np.stack(of, axis=self.dim)

    def to_json(self) -> dict[str, Any]:
        """`{"stack": {"of": […], "dim": …}}`."""
        return {"stack": {"of": [one.to_json() for one in self.of], "dim": self.dim}}


@dataclass(frozen=True)
class Permute(Expr):
    """Dimensions in another order: dimension `i` is dimension `dims[i]` of `of`."""

    of: Expr
    dims: tuple[int, ...]

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        (shape,) = of
        if sorted(self.dims) != list(range(len(shape))):
            _refuse(f"{list(self.dims)} is not an order of {len(shape)} dimensions")
        return tuple(shape[dim] for dim in self.dims)

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        return of[0].transpose(self.dims)

    def to_json(self) -> dict[str, Any]:
        """`{"permute": {"of": …, "dims": […]}}`."""
        return {"permute": {"of": self.of.to_json(), "dims": list(self.dims)}}


@dataclass(frozen=True)
class Reshape(Expr):
    """The same elements in the same order, in another shape."""

    of: Expr
    to: tuple[int, ...]

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        if min(self.to, default=0) < 0 or prod(of[0]) != prod(self.to):
            _refuse(f"a tensor of shape {list(of[0])} has no shape {list(self.to)}")
        return self.to

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        return of[0].reshape(self.to)

    def to_json(self) -> dict[str, Any]:
        """`{"reshape": {"of": …, "shape": […]}}`."""
        return {"reshape": {"of": self.of.to_json(), "shape": list(self.to)}}


@dataclass(frozen=True)
class Interleave(Expr):
    """The first element of each along a dimension, then the second of each, and so on."""

    of: tuple[Expr, ...]
    dim: int = 0

    def parts(self) -> tuple[Expr, ...]:
        return self.of

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        first = _alike(of, -1, "interleave")
        dim = axis(self.dim, len(first), "interleave")
        return (*first[:dim], first[dim] * len(of), *first[dim + 1 :])

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        import numpy as np

        dim = self.dim % of[0].ndim
        shape = list(of[0].shape)
        shape[dim] *= len(of)
        return np.stack(of, axis=dim + 1).reshape(shape)

    def to_json(self) -> dict[str, Any]:
        """`{"interleave": {"of": […], "dim": …}}`."""
        return {"interleave": {"of": [one.to_json() for one in self.of], "dim": self.dim}}


@dataclass(frozen=True)
class Repeat(Expr):
    """The tensor `times` times along a dimension, whole each time."""

    of: Expr
    dim: int
    times: int

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        (shape,) = of
        dim = axis(self.dim, len(shape), "repeat")
        if self.times < 0:
            _refuse(f"a tensor cannot be repeated {self.times} times")
        return (*shape[:dim], shape[dim] * self.times, *shape[dim + 1 :])

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        import numpy as np

        return np.tile(
            of[0], [self.times if at == self.dim % of[0].ndim else 1 for at in range(of[0].ndim)]
        )

    def to_json(self) -> dict[str, Any]:
        """`{"repeat": {"of": …, "dim": …, "times": …}}`."""
        inner = {"of": self.of.to_json(), "dim": self.dim, "times": self.times}
        return {"repeat": inner}


@dataclass(frozen=True)
class Pad(Expr):
    """The tensor with zeros before and after it along a dimension."""

    of: Expr
    dim: int
    before: int
    after: int

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)

    def _shape(self, of: tuple[Shape, ...], shapes: Mapping[str, Sequence[int]]) -> Shape:
        (shape,) = of
        dim = axis(self.dim, len(shape), "pad")
        if self.before < 0 or self.after < 0:
            _refuse(f"a tensor cannot be padded by {self.before} and {self.after} elements")
        return (*shape[:dim], shape[dim] + self.before + self.after, *shape[dim + 1 :])

    def _evaluate(self, of: tuple[Any, ...]) -> Any:
        import numpy as np

        dim = self.dim % of[0].ndim
        width = [(self.before, self.after) if at == dim else (0, 0) for at in range(of[0].ndim)]
        return np.pad(of[0], width)

    def to_json(self) -> dict[str, Any]:
        """`{"pad": {"of": …, "dim": …, "before": …, "after": …}}`."""
        inner = {"of": self.of.to_json(), "dim": self.dim}
        return {"pad": {**inner, "before": self.before, "after": self.after}}


def narrow(of: Expr, dim: int, start: int, stop: int, extent: int) -> Expr:
    """A slice, or the tensor itself where that is all of the dimension."""
    return of if (start, stop) == (0, extent) else Slice(of, dim, start, stop)


def concat(of: Iterable[Expr], dim: int) -> Expr:
    """Tensors one behind the other; one alone stays as it is."""
    parts = tuple(of)
    return parts[0] if len(parts) == 1 else Concat(parts, dim)


def pick(of: Expr, dim: int, rows: Sequence[int]) -> Expr:
    """Elements of one dimension in a given order, in as few slices as that takes."""
    runs: list[tuple[int, int, int]] = []
    at = 0
    while at < len(rows):
        step = rows[at + 1] - rows[at] if at + 1 < len(rows) else 1
        end = at + 1
        # A step must go forward, or the elements come one by one.
        if step >= 1:
            while end < len(rows) and rows[end] - rows[end - 1] == step:
                end += 1
        else:
            step = 1
        runs.append((rows[at], rows[end - 1] + 1, step))
        at = end
    if not runs:
        return Slice(of, dim, 0, 0)
    return concat([Slice(of, dim, *run) for run in runs], dim)


def from_json(found: Mapping[str, Any]) -> Expr:
    """The expression that `to_json` gave. Raises `UsageError` for anything else."""
    try:
        ((kind, body),) = found.items()
        return _from_json(kind, body)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, _errors.TonnageError):
            raise
        raise _errors.usage(f"{found!r} is not an expression", "EXPR") from None


def _from_json(kind: str, body: Any) -> Expr:
    if kind == "source":
        return Source(str(body))
    if kind in ("concat", "stack", "interleave"):
        made = {"concat": Concat, "stack": Stack, "interleave": Interleave}[kind]
        return made(tuple(from_json(one) for one in body["of"]), body["dim"])
    of = from_json(body["of"])
    if kind == "permute":
        return Permute(of, tuple(body["dims"]))
    if kind == "reshape":
        return Reshape(of, tuple(body["shape"]))
    if kind == "slice":
        return Slice(of, body["dim"], body["start"], body["stop"], body.get("step", 1))
    if kind == "repeat":
        return Repeat(of, body["dim"], body["times"])
    if kind == "pad":
        return Pad(of, body["dim"], body.get("before", 0), body.get("after", 0))
    raise _errors.usage(f"{kind!r} is not an expression", "EXPR")
