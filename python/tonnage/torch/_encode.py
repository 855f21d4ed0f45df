"""From a state of nested containers to tensors by name and the text that says how they belong
together: chapter 14 of the specification, the writing side.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .. import _errors
from .._adapters import torch as _adapter
from . import _aliases, _refuse

#: The key of the metadata (clause 14.1), and what this module writes and reads.
KEY = "safetensors.structure"
VERSION = 1
#: Clause 14.6: containers in containers, and what a text may ask of its reader's memory.
MAX_DEPTH = 64
MAX_LENGTH = 32 << 20
MAX_MARKS = 4_000_000
#: Decimal digits of an integer.
MAX_DIGITS = 1000

Path = tuple[str, ...]


class Encoded(NamedTuple):
    """A state as it is written."""

    tensors: dict[str, Any]
    #: `None` where the tensors' names say all of it.
    structure: str | None


def encode(state: object) -> Encoded:
    """The tensors of a state and its structure.

    Raises `TypeError` for a leaf that has no form in a file, `ValueError` for one that is too large
    or for containers that hold themselves; both name the path to it.
    """
    if (flat := _flat(state)) is not None:
        return Encoded(flat, None)
    encoder = _Encoder()
    root = encoder.node(state, ())
    names = encoder.settle()
    text = json.dumps({"version": VERSION, "root": root}, separators=(",", ":"), ensure_ascii=False)
    if len(text.encode()) > MAX_LENGTH or marks(text) > MAX_MARKS:
        raise _errors.make(
            "Limit", "the state has too many containers and leaves for one file (spec 14.6)",
            code="STRUCTURE", clause="14.6",
        )  # fmt: skip
    return Encoded(names, text)


def marks(text: str) -> int:
    """About how many values a text holds, without parsing it; never fewer."""
    return text.count(",") + text.count("[") + text.count("{")


def _flat(state: object) -> dict[str, Any] | None:
    """The state itself if it is a dict of tensors of which a file keeps all there is to know."""
    if not isinstance(state, dict) or "__metadata__" in state:
        return None
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return None
    plain = True
    for name, tensor in state.items():
        check_tensor(tensor, (_step(name),))
        plain = plain and type(tensor) is torch.Tensor and not tensor.requires_grad
    tensors = list(state.values())
    if not plain or len({id(tensor) for tensor in tensors}) < len(tensors):
        return None
    _, places, _ = _aliases.arrange(tensors)
    alone = all(place.base == at for at, place in enumerate(places))
    return dict(state) if alone else None


def check_tensor(tensor: Any, path: Path) -> None:
    """Refuses a tensor that a file cannot hold as it is."""
    if reason := _refuse.reason(tensor):
        raise TypeError(f"{_show(path)}: {reason}")
    if tensor.dtype not in _adapter.SIZE:
        raise TypeError(f"{_show(path)}: a file has no form for {tensor.dtype}")


def _show(path: Path) -> str:
    return "state" + "".join(path)


def _step(key: object) -> str:
    return f"[{key!r}]"


class _Encoder:
    """One pass over a state. Tensors get their names afterwards, when all are known."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.names: list[str] = []
        self.known: dict[int, int] = {}
        self.nodes: list[list[dict[str, Any]]] = []
        self.open: set[int] = set()
        self.count = 0

    def node(self, value: Any, path: Path, name: str = "") -> Any:
        """The node of a value."""
        self.count += 1
        if self.count > MAX_MARKS:
            raise ValueError(f"{_show(path)}: the state has more than {MAX_MARKS} values")
        if isinstance(value, torch.Tensor):
            return self.tensor(value, path, name)
        kind = type(value)
        if kind in (list, tuple, dict, OrderedDict):
            return self.container(value, path, name)
        if kind is torch.Size:
            return {"size": [int(extent) for extent in value]}
        return leaf(value, path)

    def container(self, value: Any, path: Path, name: str) -> Any:
        if id(value) in self.open:
            raise ValueError(f"{_show(path)}: a container that holds itself has no form in a file")
        if len(path) >= MAX_DEPTH:
            raise ValueError(f"{_show(path)}: containers are nested deeper than {MAX_DEPTH}")
        self.open.add(id(value))
        try:
            if isinstance(value, dict):
                return self.mapping(value, path, name)
            items = [
                self.node(item, (*path, _step(at)), _join(name, str(at)))
                for at, item in enumerate(value)
            ]
            return items if type(value) is list else {"tuple": items}
        finally:
            self.open.discard(id(value))

    def mapping(self, value: Mapping[Any, Any], path: Path, name: str) -> Any:
        pairs = []
        for key, item in value.items():
            step = (*path, _step(key))
            node = key_node(key, step, len(step))
            pairs.append([node, self.node(item, step, _join(name, str(key)))])
        if type(value) is dict:
            return {"dict": pairs}
        # What a module's `state_dict` says of its versions.
        versions = getattr(value, "_metadata", None)
        if versions is None:
            return {"ordered": pairs}
        return {"state_dict": [pairs, self.node(versions, (*path, "._metadata"))]}

    def tensor(self, value: Any, path: Path, name: str) -> Any:
        check_tensor(value, path)
        at = self.known.get(id(value))
        if at is None:
            at = self.known[id(value)] = len(self.objects)
            self.objects.append(value)
            self.names.append(name or "tensor")
            self.nodes.append([])
        node: dict[str, Any] = {"tensor": None}
        self.nodes[at].append(node)
        return node

    def settle(self) -> dict[str, Any]:
        """Decides what is written and under which names, and completes the nodes."""
        written, places, stands = _aliases.arrange(self.objects)
        names = _unique([
            f"{self.names[stands[at]]}.storage" if at in stands else self.names[at]
            for at in range(len(written))
        ])  # fmt: skip
        used = sorted({place.base for place in places})
        seen: dict[Any, int] = {}
        for at, place in enumerate(places):
            form = self.form(self.objects[at], names[place.base], place.window)
            same = (form,) if isinstance(form, str) else json.dumps(form, sort_keys=True)
            number = seen[same] = seen.get(same, -1) + 1
            if number:
                form = form if isinstance(form, dict) else {"of": form}
                form["alias"] = number
            for node in self.nodes[at]:
                node["tensor"] = form
        return {names[at]: written[at].detach() for at in used}

    def form(self, tensor: Any, of: str, window: _aliases.Window | None) -> Any:
        """What a node says of a tensor; its name alone where that is all."""
        more: dict[str, Any] = {}
        if isinstance(tensor, torch.nn.Parameter):
            more["parameter"] = True
        if tensor.requires_grad:
            more["requires_grad"] = True
        if window is not None:
            more["view"] = {
                "dtype": window.dtype,
                "offset": window.offset,
                "shape": list(window.shape),
                "stride": list(window.stride),
                "length": window.length,
            }
            # Lazy views are written out where they stand alone.
            more |= {"conj": True} if tensor.is_conj() else {}
            more |= {"neg": True} if tensor.is_neg() else {}
        return {"of": of, **more} if more else of


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _unique(names: list[str]) -> list[str]:
    """The names, those that occurred before or mean something else with a number behind them."""
    taken, found = {"__metadata__"}, []
    wanted = set(names)
    numbers: dict[str, int] = {}
    for name in names:
        given = name
        while given in taken or (given != name and given in wanted):
            numbers[name] = numbers.get(name, 1) + 1
            given = f"{name}#{numbers[name]}"
        taken.add(given)
        found.append(given)
    return found


def key_node(key: object, path: Path, depth: int) -> Any:
    """The node of a dict's key: a leaf that can be one, or a tuple of such."""
    if type(key) is tuple:
        if depth >= MAX_DEPTH:
            raise ValueError(f"{_show(path)}: a key is nested deeper than {MAX_DEPTH}")
        return {"tuple": [key_node(item, path, depth + 1) for item in key]}
    if type(key) in (bool, int, float, str, bytes, type(None)):
        return leaf(key, path)
    raise TypeError(f"{_show(path)}: a file has no form for a key of type {_named(key)}")


def leaf(value: Any, path: Path) -> Any:
    """The node of a value that holds no others."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        if abs(value) >= 10**MAX_DIGITS:
            raise ValueError(f"{_show(path)}: an integer of more than {MAX_DIGITS} digits")
        return value
    if kind is float:
        if math.isfinite(value):
            return value
        return {"float": struct.pack(">d", value).hex()}
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{_show(path)}: the text holds half of a surrogate pair") from None
        return value
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"device": str(value)}
    raise TypeError(
        f"{_show(path)}: a file has no form for {_named(value)}; it takes tensors, dict,"
        " OrderedDict, list, tuple, int, float, bool, None, str, bytes, torch.dtype, torch.device"
        " and torch.Size, and nothing is pickled"
    )


def _named(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
