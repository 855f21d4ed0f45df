"""What every edge sends to the planner: targets on a mesh."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    def placed(self, axis: str, placement: Placement) -> Target:
        """The same, with a placement on one more axis."""
        return replace(self, place={**self.place, axis: placement})

    def to_json(self) -> dict[str, Any]:
        """`{"name", "expr"?, "place", "local"?}`."""
        kept = {
            axis: one.to_json()
            for axis, one in self.place.items()
            if not isinstance(one, Replicate)
        }
        made: dict[str, Any] = {"name": self.name, "place": kept}
        if self.expr is not None and self.expr != Source(self.name):
            made["expr"] = self.expr.to_json()
        if self.local is not None and self.local != self.name:
            made["local"] = self.local
        return made


def request(mesh: Mesh, targets: Iterable[Target], unread: Unread = "error") -> Request:
    """The request of these targets. Raises `UsageError` for an axis that the mesh lacks."""
    made = list(targets)
    axes = set(mesh.names)
    for target in made:
        if not axes.issuperset(target.place):
            missing = sorted(set(target.place) - axes)[0]
            text = f"{target.name} is placed on the axis {missing!r}, which {mesh!r} lacks"
            raise _errors.usage(text, "AXIS", tensor=target.name)
    allowed = unread if isinstance(unread, str) else list(unread)
    return {**mesh.to_json(), "targets": [one.to_json() for one in made], "unread": allowed}


def literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
