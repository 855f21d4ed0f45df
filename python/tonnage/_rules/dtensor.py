"""Targets from a state dict: `DTensor`s say how they are placed, other tensors what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard

from tonnage import _dtypes, _errors
from tonnage._expr import Expr, Source
from tonnage._placements import Axes, Mesh, Placement, Replicate, Shard, StridedShard
from tonnage._rules import targets
from tonnage._rules.pieces import Held, Piece, assemble, targets_of
from tonnage._rules.targets import Target

_FIELDS = ("global_shape", "global_offsets", "local_offsets", "local_sizes")
State = Mapping[str, Any]


def placement(found: Any, name: str) -> Placement:
    """A placement of PyTorch as one of ours.

    Raises `UsageError` for `Partial`: its ranks hold summands, which no checkpoint has.
    """
    if isinstance(found, _StridedShard):
        return StridedShard(found.dim, int(found.split_factor))
    if isinstance(found, TorchShard):
        return Shard(found.dim)
    if isinstance(found, TorchReplicate):
        return Replicate()
    what = "a sum that ranks hold summands of" if isinstance(found, Partial) else "not known"
    text = f"{name} is placed by {found}, which is {what}: redistribute it before it is loaded"
    raise _errors.usage(text, "PLACEMENT", tensor=name, found=str(found))


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor says itself which part of a global one it holds."""
    return isinstance(tensor, DTensor) or is_checkpointable(tensor)


def is_checkpointable(tensor: Any) -> bool:
    """Whether it has the attributes of PyTorch's `CheckpointableTensor`."""
    return isinstance(tensor, torch.Tensor) and all(hasattr(tensor, one) for one in _FIELDS)


def state_of(found: Any) -> dict[str, Any]:
    """The tensors of a module or a state dict, by name.

    Raises `UsageError` for a leaf that is no tensor, since a plan only loads tensors.
    """
    state = found.state_dict(keep_vars=True) if isinstance(found, torch.nn.Module) else found
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            text = f"{name} is {type(value).__name__}, not a tensor: leave it out of the plan"
            raise _errors.usage(text, "NOT_A_TENSOR", tensor=str(name))
    return dict(state)


class _Meshes:
    """The device meshes of a state dict as one mesh of ours."""

    def __init__(self, given: Mesh | None) -> None:
        self._given = given
        self._main: Axes = ()
        self._axes: dict[str, tuple[int, int]] = {}

    def names(self, mesh: Any, tensor: str) -> list[str]:
        """Our names for the dimensions of a device mesh."""
        if self._given is None and not self._main:
            self._adopt(_root(mesh), tensor)
        named = mesh.mesh_dim_names or tuple(f"dim{dim}" for dim in range(mesh.ndim))
        for dim, name in enumerate(named):
            found = (_stride(mesh, dim, tensor), int(mesh.mesh.shape[dim]))
            # An axis of one coordinate has no stride.
            if found[1] > 1 and self._axes.setdefault(name, found) != found:
                text = f"{tensor}: the axis {name!r} means other ranks than for tensors before it"
                raise _errors.usage(text, "MESH", tensor=tensor)
        return list(named)

    def _adopt(self, root: Any, tensor: str) -> None:
        ranks = root.mesh.flatten().tolist()
        if ranks != list(range(len(ranks))):
            text = f"{tensor}: the ranks of its mesh, {ranks}, are not in order from 0"
            raise _errors.make("Unsupported", text, code="MESH", tensor=tensor)
        named = root.mesh_dim_names or tuple(f"dim{dim}" for dim in range(root.ndim))
        self._main = tuple(
            (name, int(size)) for name, size in zip(named, root.mesh.shape, strict=True)
        )

    def mesh(self) -> Mesh:
        """A mesh that has all axes seen: those of the root, and the others in views of it."""
        if self._given is not None:
            for name, (stride, size) in self._axes.items():
                self._check(self._given, name, stride, size)
            return self._given
        main = Mesh(self._main or {"rank": 1})
        alt: list[Axes] = []
        # Outer axes cut first.
        for name, (stride, size) in sorted(self._axes.items(), key=lambda item: -item[1][0]):
            if name in main.names:
                self._check(main, name, stride, size)
                continue
            outer = main.size // (stride * size)
            form = ((f"outside {name}", outer), (name, size), (f"inside {name}", stride))
            alt.append(form)
        return Mesh(main.axes, alt=alt)

    @staticmethod
    def _check(mesh: Mesh, name: str, stride: int, size: int) -> None:
        found = mesh._find(name)
        if found != (stride, size):
            text = f"the axis {name!r} of {size} ranks, {stride} apart, is not that of {mesh!r}"
            raise _errors.usage(text, "MESH")


def _root(mesh: Any) -> Any:
    find = getattr(mesh, "_get_root_mesh", None)
    return find() if find is not None else mesh


def _stride(mesh: Any, dim: int, tensor: str) -> int:
    """How far apart the ranks along a dimension are."""
    line = mesh.mesh
    for other in reversed(range(line.ndim)):
        if other != dim:
            line = line.select(other, 0)
    ranks = line.tolist()
    apart = {two - one for one, two in pairwise(ranks)}
    if len(apart) > 1 or min(apart, default=1) < 1:
        text = f"{tensor}: the ranks {ranks} of its mesh are not evenly apart"
        raise _errors.make("Unsupported", text, code="MESH", tensor=tensor)
    return int(apart.pop()) if apart else 1


def request(
    state: Any,
    catalog: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    exprs: Mapping[str, Expr] | None = None,
    unread: targets.Unread = "error",
) -> targets.Request:
    """The request that fills a state dict whose sharded tensors are `DTensor`s.

    Args:
        state: a module or a dict; on the meta device is enough. Every rank has the same, but for
            what it holds.
        catalog: the checkpoint.
        mesh: the mesh of all ranks. Default: the root of the tensors' meshes.
        exprs: how tensors are made that the checkpoint does not have as they are.
        unread: tensors of the checkpoint that may stay unread.

    Tensors that are no `DTensor`s are on every rank. Tensors that share their memory are one: it is
    enough if the checkpoint has one of them.
    """
    tensors = state_of(state)
    known = _with_aliases(tensors, catalog, dict(exprs or {}))
    meshes = _Meshes(mesh)
    made = []
    for name, tensor in tensors.items():
        if is_checkpointable(tensor):
            text = (
                f"{name} says which part this rank has, and nothing of other ranks: give the state "
                "dicts of all ranks"
            )
            raise _errors.usage(text, "PIECES", tensor=name)
        place: dict[str, Placement] = {}
        if isinstance(tensor, DTensor):
            names = meshes.names(tensor.device_mesh, name)
            cuts = [placement(one, name) for one in tensor.placements]
            place = {
                axis: cut
                for axis, cut, size in zip(names, cuts, tensor.device_mesh.shape, strict=True)
                if size > 1
            }
        expr = _expr(name, tuple(tensor.shape), catalog, known)
        made.append(Target(name, expr, place, dtype=_cast(tensor, expr, catalog)))
    return targets.request(meshes.mesh(), made, unread)


def request_of_ranks(
    states: Sequence[Any],
    catalog: Mapping[str, Any],
    *,
    exprs: Mapping[str, Expr] | None = None,
    unread: targets.Unread = "error",
    repeated: targets.Unread = "error",
) -> targets.Request:
    """The request that fills the state dicts of all ranks, whose tensors have the attributes of
    `CheckpointableTensor` or are whole.

    Ranks may hold the same; pieces that overlap and are not the same are `repeated`.
    """
    ranks = [_held(state_of(state), catalog, dict(exprs or {})) for state in states]
    mesh, made = targets_of(ranks)
    return targets.request(mesh, made, unread, repeated)


def _held(
    tensors: Mapping[str, Any], catalog: Mapping[str, Any], exprs: dict[str, Expr]
) -> dict[str, Held]:
    exprs = _with_aliases(tensors, catalog, exprs)
    made = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            text = f"{name} is a DTensor, which says how all ranks hold it: plan it by itself"
            raise _errors.usage(text, "PIECES", tensor=name)
        if is_checkpointable(tensor):
            shape = tuple(int(one) for one in tensor.global_shape)
            whole = _expr(name, shape, catalog, exprs)
            given = (tensor.global_offsets, tensor.local_offsets, tensor.local_sizes)
            pieces = [Piece(*map(tuple, one)) for one in zip(*given, strict=True)]
            expr = assemble(name, whole, shape, pieces, tuple(tensor.shape))
        else:
            expr = _expr(name, tuple(tensor.shape), catalog, exprs)
        made[name] = Held(expr, _cast(tensor, expr, catalog))
    return made


def _with_aliases(
    tensors: Mapping[str, Any], catalog: Mapping[str, Any], exprs: dict[str, Expr]
) -> dict[str, Expr]:
    """Tied tensors: those that the checkpoint lacks are made as those that it has."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_identity(tensor), []).append(name)
    for names in groups.values():
        found = next((one for one in names if one in exprs or one in catalog), None)
        for name in names if found is not None else ():
            if name not in exprs and name not in catalog and found is not None:
                exprs[name] = exprs.get(found, Source(found))
    return exprs


def _identity(tensor: Any) -> Any:
    """The same for tensors that are one; by object where there is no memory to compare."""
    inner = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if inner.device.type == "meta" or not inner.numel():
        return id(tensor)
    return (inner.data_ptr(), tuple(tensor.shape), tuple(inner.stride()))


def _expr(
    name: str, shape: tuple[int, ...], catalog: Mapping[str, Any], exprs: Mapping[str, Expr]
) -> Expr:
    expr = exprs.get(name, Source(name))
    for one in expr.sources():
        if one not in catalog:
            raise targets.missing(one, catalog)
    found = expr.shape({one: catalog[one].shape for one in expr.sources()})
    if found != shape:
        text = f"{name}: the checkpoint gives {list(found)} and the state dict has {list(shape)}"
        needed = str(list(shape))
        raise _errors.usage(text, "SHAPE", tensor=name, found=str(list(found)), needed=needed)
    return expr


def _cast(tensor: Any, expr: Expr, catalog: Mapping[str, Any]) -> str | None:
    """The dtype to cast to; none where the checkpoint has the tensor's."""
    row = _dtypes.of_torch(tensor.dtype)
    stored = {catalog[one].dtype for one in expr.sources()}
    if row is None or stored == {row.name}:
        return None
    return row.name
