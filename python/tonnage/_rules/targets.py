"""What every edge sends to the planner: targets on a mesh."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from tonnage import _errors
from tonnage._expr import Expr, Source
from tonnage._placements import Mesh, Placement, Replicate

#: A dict that the planner takes: `mesh`, `alt`, `targets`, `unread`.
Request = dict[str, Any]
#: Tensors of the checkpoint that nobody needs to read.
Unread = Literal["error", "allow"] | Sequence[str]


@dataclass(frozen=True)
class Target:
    """A tensor that ranks want, and where its parts go."""

    name: str
    #: How it is made; `None` for the tensor of this name as it is.
    expr: Expr | None = None
    #: Per axis of the mesh. An axis that is not named replicates.
    place: Mapping[str, Placement] = field(default_factory=dict)
    #: The name it has on the ranks that have it.
    local: str | None = None
    #: The dtype that it is cast to, as a header spells it.
    dtype: str | None = None

    def placed(self, axis: str, placement: Placement) -> Target:
        """The same, with a placement on one more axis."""
        return replace(self, place={**self.place, axis: placement})

    def to_json(self, order: Sequence[str]) -> dict[str, Any]:
        """`{"name", "expr"?, "place", "local"?}`, with the axes in the mesh's order: that in which
        they cut.
        """
        kept = {
            axis: self.place[axis].to_json()
            for axis in order
            if axis in self.place and not isinstance(self.place[axis], Replicate)
        }
        made: dict[str, Any] = {"name": self.name, "place": kept}
        if self.expr is not None and self.expr != Source(self.name):
            made["expr"] = self.expr.to_json()
        if self.local is not None and self.local != self.name:
            made["local"] = self.local
        if self.dtype is not None:
            made["dtype"] = self.dtype
        return made


def request(
    mesh: Mesh,
    targets: Iterable[Target],
    unread: Unread = "error",
    repeated: Unread = "error",
) -> Request:
    """The request of these targets. Raises `UsageError` for an axis that the mesh lacks.

    Args:
        mesh: the ranks.
        targets: in the order of their first use.
        unread: tensors of the checkpoint of which parts may stay unread.
        repeated: tensors of the checkpoint of which parts may go to several targets, or to one
            several times; one that targets have whole may in any case.
    """
    made = list(targets)
    axes = set(mesh.names)
    for target in made:
        if not axes.issuperset(target.place):
            missing = sorted(set(target.place) - axes)[0]
            text = f"{target.name} is placed on the axis {missing!r}, which {mesh!r} lacks"
            raise _errors.usage(text, "AXIS", tensor=target.name)
    request: Request = mesh.to_json()
    request["targets"] = [one.to_json(mesh.names) for one in made]
    for key, value in (("unread", unread), ("repeated", repeated)):
        request[key] = value if isinstance(value, str) else list(value)
    return request


def missing(name: str, known: Iterable[str]) -> Exception:
    """The error for a tensor that the checkpoint lacks, with names that are near."""
    near = get_close_matches(name, list(known), 3, 0.8)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    text = f"the checkpoint has no tensor {name}{hint}"
    return _errors.make("Usage", text, code="UNKNOWN_TENSOR", tensor=name, suggestions=near)


def literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
