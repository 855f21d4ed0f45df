"""Structures of states (spec chapter 14) of which each rank has a part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import _errors
from . import _encode

Node = Any
#: Names of keys and numbers of list items, from the root.
Steps = tuple[str | int, ...]


def encode(state: object) -> tuple[dict[str, torch.Tensor], Node | None]:
    """The tensors of a state by name, and its structure; none for a flat dict of tensors.

    A tensor that occurs several times, as the same object or as another one over the same memory
    with the same shape, is written once.
    """
    if _is_flat(state):
        # A flat state is a mapping of tensors, which its type does not say.
        return dict(state), None  # type: ignore[call-overload]
    known: dict[Any, torch.Tensor] = {}
    real: dict[int, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        key = _identity(tensor)
        if key not in known:
            # The encoder looks at a tensor's class and memory; this one has nothing to look at.
            known[key] = torch.empty(0, dtype=torch.uint8)
            real[id(known[key])] = tensor
        return known[key]

    encoder = _Encoder(stand_in)
    root = encoder.node(state, ())
    return {name: real[id(tensor)] for name, tensor in zip(*encoder.named(), strict=True)}, root


class _Encoder(_encode._Encoder):
    """The encoder of whole states, with tensors that are not looked at."""

    def __init__(self, stand_in: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stand_in = stand_in

    def tensor(self, value: Any, path: _encode.Path, name: str) -> Any:
        return super().tensor(self.stand_in(value), path, name)

    def named(self) -> tuple[list[str], list[torch.Tensor]]:
        """The tensors and their names, which go into the nodes."""
        names = _encode._unique(self.names)
        for name, nodes in zip(names, self.nodes, strict=True):
            for node in nodes:
                node["tensor"] = name
        return names, self.objects


def _is_flat(state: object) -> bool:
    if not isinstance(state, dict) or "__metadata__" in state:
        return False
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    plain = len(tensors) == len(state) and all(type(name) is str for name in state)
    return plain and len({_identity(tensor) for tensor in tensors}) == len(tensors)


def _identity(tensor: Any) -> Any:
    """The same for tensors that have the same elements in the same memory."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    try:
        address = local.data_ptr() if local.numel() else 0
    except (RuntimeError, NotImplementedError):
        address = 0
    if not address:
        return id(tensor)
    return address, local.device, local.dtype, tuple(tensor.shape), local.shape, local.stride()


def merge(structures: list[tuple[Node | None, list[str]]]) -> Node | None:
    """One structure out of those of all ranks, each with its tensors' names.

    Dicts are united; everything else has to be alike. `ValueError` names the path where it is not.
    """
    if all(root is None for root, _ in structures):
        return None
    merged: Node = None
    for rank, (root, names) in enumerate(structures):
        flat = {"dict": [[name, {"tensor": name}] for name in names]}
        node = flat if root is None else root
        merged = node if rank == 0 else _merged(merged, node, "state", rank)
    return merged


def _merged(one: Node, other: Node, path: str, rank: int) -> Node:
    if one == other and type(one) is type(other):
        return one
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        ((tag, mine),) = one.items()
        theirs = other[tag]
        if tag in ("dict", "ordered"):
            return {tag: _united(mine, theirs, path, rank)}
        if tag == "state_dict":
            pairs = _united(mine[0], theirs[0], path, rank)
            return {tag: [pairs, _merged(mine[1], theirs[1], f"{path}._metadata", rank)]}
        if tag == "tuple" and len(mine) == len(theirs):
            return {tag: _each(mine, theirs, path, rank)}
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return _each(one, other, path, rank)
    mine, theirs = (_short(node) for node in (one, other))
    text = f"{path}: rank {rank} has {theirs} where the ranks before it have {mine}"
    raise _errors.usage(text, "STRUCTURE")


def _each(one: list[Node], other: list[Node], path: str, rank: int) -> list[Node]:
    rows = enumerate(zip(one, other, strict=True))
    return [_merged(a, b, f"{path}[{at}]", rank) for at, (a, b) in rows]


def _united(one: list[Node], other: list[Node], path: str, rank: int) -> list[Node]:
    places = {json.dumps(key): at for at, (key, _) in enumerate(one)}
    pairs = list(one)
    for key, node in other:
        at = places.get(json.dumps(key))
        if at is None:
            pairs.append([key, node])
        else:
            pairs[at] = [key, _merged(pairs[at][1], node, f"{path}[{key!r}]", rank)]
    return pairs


def _short(node: Node) -> str:
    text = json.dumps(node)
    return text if len(text) <= 60 else text[:60] + "…"


def text(root: Node) -> str:
    """A structure as metadata keeps it."""
    return json.dumps(
        {"version": _encode.VERSION, "root": root}, separators=(",", ":"), ensure_ascii=False
    )


def of_paths(paths: Mapping[str, Steps], leaves: Mapping[str, Node]) -> Node | None:
    """The structure of a state that was flattened: of each name the steps to it from the root.

    `None` where all names are their own paths and tensors.
    """
    if not leaves and all(steps == (name,) for name, steps in paths.items()):
        return None
    root: dict[Any, Any] = {}
    for name, steps in paths.items():
        at = root
        for step in steps[:-1]:
            at = at.setdefault(step, {})
        at[steps[-1]] = _Leaf(leaves.get(name, {"tensor": name}))
    return _node(root)


class _Leaf:
    def __init__(self, node: Node) -> None:
        self.node = node


def _node(value: Any) -> Node:
    if isinstance(value, _Leaf):
        return value.node
    if value and all(type(step) is int for step in value):
        return [_node(value[at]) if at in value else None for at in range(max(value) + 1)]
    return {"dict": [[step, _node(item)] for step, item in value.items()]}


def flatten(root: Node) -> tuple[dict[str, Steps], dict[str, Node]]:
    """The other way: of each name the steps to it, and of the leaves that are no tensors the nodes.

    A list without tensors in it, and a tuple, is one leaf, as PyTorch's checkpoints have it.
    """
    paths: dict[str, Steps] = {}
    leaves: dict[str, Node] = {}

    def walk(node: Node, steps: Steps) -> None:
        tag = next(iter(node), "") if isinstance(node, dict) else ""
        if tag in ("dict", "ordered"):
            for key, item in node[tag]:
                walk(item, (*steps, str(key)))
        elif tag == "state_dict":
            for key, item in node[tag][0]:
                walk(item, (*steps, str(key)))
        elif isinstance(node, list) and _holds_tensors(node):
            for at, item in enumerate(node):
                walk(item, (*steps, at))
        elif tag == "tensor":
            form = node[tag]
            paths[form if isinstance(form, str) else form["of"]] = steps
        else:
            name = ".".join(map(str, steps))
            paths[name], leaves[name] = steps, node

    walk(root, ())
    return paths, leaves


def _holds_tensors(node: Node) -> bool:
    if isinstance(node, list):
        return any(map(_holds_tensors, node))
    return isinstance(node, dict) and next(iter(node), "") in ("tensor", "dict", "ordered")
