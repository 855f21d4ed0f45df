"""From tensors by name and the text of a structure to a state of nested containers: chapter 14 of
the specification, the reading side. The text is hostile until checked: it makes nothing but the
values that the chapter lists, and asks for no memory that the file has not.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from .. import _errors
from .._adapters import torch as _adapter
from . import _aliases
from ._encode import KEY, MAX_DEPTH, MAX_DIGITS, MAX_LENGTH, MAX_MARKS, VERSION, marks

_DTYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DEVICE = re.compile(r"[a-z]{1,32}(:[0-9]{1,4})?")
_BITS = re.compile(r"[0-9a-f]{16}")

#: What a text makes of itself before anything is built.
_Parsed = Any


def refused(clause: str, text: str) -> NoReturn:
    """A structure that does not keep to a clause."""
    raise _errors.make(
        "Format", f"{KEY}: {text} (spec {clause}); load_file reads the tensors without it",
        code="STRUCTURE", clause=clause,
    )  # fmt: skip


def parse(text: str) -> _Parsed:
    """The root node of a structure's text, its form checked as JSON and no further."""
    if len(text.encode(errors="surrogatepass")) > MAX_LENGTH or marks(text) > MAX_MARKS:
        refused("14.6", f"a text of {len(text)} characters holds too much")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except RecursionError:
        refused("14.6", "it is nested too deeply")
    except json.JSONDecodeError as error:
        refused("14.1", f"it is not JSON: {error.msg} at character {error.pos}")
    if not isinstance(value, dict) or "version" not in value:
        refused("14.1", "it is no object with a version")
    if type(value["version"]) is not int or value["version"] != VERSION:
        raise _errors.make(
            "Unsupported",
            f"{KEY} has version {value['version']!r}, and this reader knows {VERSION};"
            " load_file reads the tensors without it",
            code="STRUCTURE_VERSION", clause="14.1",
        )  # fmt: skip
    if value.keys() != {"version", "root"}:
        refused("14.1", f"it has the fields {sorted(value)}, not version and root")
    return value["root"]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        refused("14.1", "an object has the same key twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:
        refused("14.3", f"an integer has {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        refused("14.3", f"{digits[:40]} is larger than a float can be")
    return value


def _constant(name: str) -> NoReturn:
    refused("14.3", f"{name} is no number of JSON")


def build(root: _Parsed, tensors: Mapping[str, Any]) -> Any:
    """The state of a structure, with these tensors in it."""
    builder = _Builder(tensors)
    builder.viewed = _viewed(root)
    try:
        state = builder.node(root, 0)
    except RecursionError:
        refused("14.6", "it is nested too deeply")
    if rest := sorted(set(tensors) - builder.named):
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        refused("14.7", f"the file has {', '.join(map(repr, rest[:3]))}{more} besides")
    return state


class _Builder:
    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.named: set[str] = set()
        self.made: dict[Any, Any] = {}
        #: Tensors that some node has taken as they are.
        self.taken: set[str] = set()
        #: Those that views look at, and the tensors that they look at, begun where elements are.
        self.viewed: set[str] = set()
        self.bases: dict[str, Any] = {}

    def node(self, value: _Parsed, depth: int) -> Any:
        if depth > MAX_DEPTH:
            refused("14.6", f"containers are nested deeper than {MAX_DEPTH}")
        if isinstance(value, list):
            return [self.node(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return text(value) if isinstance(value, str) else value
        tag, body = _tagged(value)
        if tag == "tuple":
            return tuple(self.node(item, depth + 1) for item in _list(body, tag))
        if tag in ("dict", "ordered"):
            pairs = self.pairs(body, tag, depth)
            return pairs if tag == "dict" else OrderedDict(pairs)
        if tag == "state_dict":
            return self.state_dict(body, depth)
        if tag == "tensor":
            return self.tensor(body)
        return leaf(tag, body)

    def pairs(self, body: _Parsed, tag: str, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in _list(body, tag):
            if not isinstance(pair, list) or len(pair) != 2:
                refused("14.4", f"{tag} holds pairs of key and value")
            name = key(pair[0], depth + 1)
            size = len(found)
            found[name] = self.node(pair[1], depth + 1)
            if len(found) == size:
                refused("14.4", f"{tag} has the key {name!r} twice")
        return found

    def state_dict(self, body: _Parsed, depth: int) -> OrderedDict[Any, Any]:
        parts = _list(body, "state_dict")
        if len(parts) != 2:
            refused("14.4", "state_dict holds its pairs and its versions")
        state = OrderedDict(self.pairs(parts[0], "state_dict", depth))
        versions = self.node(parts[1], depth + 1)
        if not isinstance(versions, dict):
            refused("14.4", "the versions of a state_dict are a dict")
        # As `Module.state_dict` has it: an attribute that the class does not name.
        state._metadata = versions  # type: ignore[attr-defined]
        return state

    def tensor(self, body: _Parsed) -> Any:
        """The tensor of a node; the same object for the same text."""
        form = {"of": body} if isinstance(body, str) else body
        if not isinstance(form, dict) or not isinstance(form.get("of"), str):
            refused("14.5", "a tensor node does not say which tensor")
        if unknown := form.keys() - _FIELDS.keys():
            refused("14.5", f"a tensor node has the unknown field {min(unknown)!r}")
        for field, kind in _FIELDS.items():
            if field in form and type(form[field]) is not kind:
                refused("14.5", f"{field} of a tensor node is no {kind.__name__}")
        same = (body,) if isinstance(body, str) else json.dumps(form, sort_keys=True)
        if same not in self.made:
            self.made[same] = self.make(form)
        return self.made[same]

    def make(self, form: dict[str, Any]) -> Any:
        name = form["of"]
        if name not in self.tensors:
            refused("14.7", f"the file has no tensor {name!r}")
        self.named.add(name)
        if (view := form.get("view")) is not None:
            tensor = self.window(name, _window(view))
            tensor = torch.conj(tensor) if form.get("conj") else tensor
            tensor = torch._neg_view(tensor) if form.get("neg") else tensor
        elif "conj" in form or "neg" in form:
            refused("14.5", "conj and neg belong to a view")
        else:
            tensor = self.base(name)
            if name in self.taken:
                # Another object than the one before, over the same memory.
                shape, stride = tuple(tensor.shape), tuple(tensor.stride())
                whole = _aliases.Window("", 0, shape, stride, 0)
                tensor = _aliases.look_through(tensor, whole, tensor.dtype)
            self.taken.add(name)
        return _dressed(tensor, form)

    def base(self, name: str) -> Any:
        """A tensor of the file. One that views look at begins where an element of any dtype may,
        which is not so of every one that lies mapped.
        """
        if name not in self.bases:
            tensor = self.tensors[name]
            at = tensor.storage_offset() * tensor.element_size()
            odd = name in self.viewed and at % _aliases.ALIGNMENT
            self.bases[name] = tensor.clone() if odd else tensor
        return self.bases[name]

    def window(self, name: str, window: _aliases.Window) -> Any:
        dtype = dtype_of(window.dtype)
        base = self.base(name)
        if reason := _aliases.misfit(window, int(dtype.itemsize), int(base.nbytes)):
            refused("14.5", f"a view of {name!r}: {reason}")
        try:
            return _aliases.look_through(base, window, dtype)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            refused("14.5", f"a view of {name!r}: {error}")


def _viewed(root: _Parsed) -> set[str]:
    """Names that views look at; nothing is checked yet."""
    found, waiting = set(), [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
            if "view" in value and isinstance(value.get("of"), str):
                found.add(value["of"])
    return found


_FIELDS: dict[str, type] = {
    "of": str,
    "alias": int,
    "parameter": bool,
    "requires_grad": bool,
    "view": dict,
    "conj": bool,
    "neg": bool,
}
_VIEW = ("dtype", "offset", "shape", "stride", "length")


def _dressed(tensor: Any, form: dict[str, Any]) -> Any:
    grad = form.get("requires_grad", False)
    if grad and not (tensor.is_floating_point() or tensor.is_complex()):
        refused("14.5", f"{form['of']!r} requires gradients and is of {tensor.dtype}")
    if form.get("parameter"):
        return torch.nn.Parameter(tensor, requires_grad=grad)
    return tensor.requires_grad_() if grad else tensor


def _window(view: dict[str, Any]) -> _aliases.Window:
    if view.keys() != set(_VIEW):
        refused("14.5", f"a view has the fields {sorted(view)}, not {sorted(_VIEW)}")
    numbers = [view["offset"], view["length"]]
    for field in ("shape", "stride"):
        numbers += _list(view[field], field)
    if not isinstance(view["dtype"], str) or any(type(one) is not int for one in numbers):
        refused("14.5", "a view's numbers are integers and its dtype is a name")
    return _aliases.Window(
        view["dtype"], view["offset"], tuple(view["shape"]), tuple(view["stride"]), view["length"]
    )


def dtype_of(name: str) -> Any:
    """The torch dtype of a view."""
    dtype = leaf("dtype", name)
    if dtype not in _adapter.SIZE:
        refused("14.5", f"a file has no form for a view of {dtype}")
    return dtype


def _tagged(value: dict[str, Any]) -> tuple[str, Any]:
    if len(value) != 1:
        refused("14.2", f"an object has one member, its tag, not {len(value)}")
    return next(iter(value.items()))


def _list(value: Any, tag: str) -> list[Any]:
    if not isinstance(value, list):
        refused("14.4", f"{tag} holds an array")
    return value


def text(value: str) -> str:
    """A string of the text, which holds whole characters only."""
    try:
        value.encode()
    except UnicodeEncodeError:
        refused("14.3", "a string holds half of a surrogate pair")
    return value


def key(value: _Parsed, depth: int) -> Any:
    """A key of a dict."""
    if depth > MAX_DEPTH:
        refused("14.6", f"containers are nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        tag, body = _tagged(value)
        if tag == "tuple":
            return tuple(key(item, depth + 1) for item in _list(body, tag))
        if tag in ("bytes", "float"):
            return leaf(tag, body)
        refused("14.4", f"{tag!r} is no key of a dict")
    if isinstance(value, list):
        refused("14.4", "a list is no key of a dict")
    return value


def leaf(tag: str, body: _Parsed) -> Any:
    """A tagged value that holds no others."""
    if tag == "size":
        extents = _list(body, tag)
        if any(type(one) is not int or not 0 <= one < 1 << 63 for one in extents):
            refused("14.3", "size holds extents")
        return torch.Size(extents)
    if tag not in ("bytes", "float", "dtype", "device"):
        refused("14.2", f"the tag {tag!r} is not known")
    if not isinstance(body, str):
        refused("14.3", f"{tag} holds a string")
    if tag == "bytes":
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            refused("14.3", "bytes are not in base64")
    if tag == "float":
        if not _BITS.fullmatch(body):
            refused("14.3", "a float is 16 lower-case hexadecimal digits")
        return struct.unpack(">d", bytes.fromhex(body))[0]
    if tag == "dtype":
        dtype = getattr(torch, body, None) if _DTYPE.fullmatch(body) else None
        if not isinstance(dtype, torch.dtype):
            refused("14.3", f"{body!r} is no dtype of this PyTorch")
        return dtype
    try:
        if _DEVICE.fullmatch(body):
            return torch.device(body)
    except RuntimeError:
        pass
    refused("14.3", f"{body!r} is no device of this PyTorch")
