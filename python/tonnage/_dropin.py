"""The one implementation of `save`, `save_file`, `load` and `load_file` behind every module.

A framework differs in two things only, both in its adapter (`tonnage._adapters`): how a buffer
becomes a tensor, and how a tensor becomes a buffer. The latter is `entries`: a spec a tensor, and
`fetch` for those whose bytes are not at hand — on another device, in another byte order, not
contiguous. `fetch` is called for one tensor at a time while the file is written, so the host never
holds a second model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

from ._native import SafetensorError, TensorSpec, _load_bytes, _write_tensors, safe_open

Path: TypeAlias = str | os.PathLike[str]
Specs: TypeAlias = dict[str, TensorSpec]
Fetch: TypeAlias = Callable[[str], tuple[TensorSpec, object]]
Entries: TypeAlias = tuple[Specs, Fetch]


def refusal(code: str, text: str) -> SafetensorError:
    """A `SafetensorError` with its code."""
    error = SafetensorError(text)
    error.code = code
    return error


def fetched(entries: Entries, keep_alive: list[Any]) -> Specs:
    """What is to be written, every tensor's bytes in host memory, which `keep_alive` is given."""
    specs, fetch = entries
    for name, spec in specs.items():
        if spec.data_len and not spec.data_ptr:
            specs[name], owner = fetch(name)
            keep_alive.append(owner)
    return specs


def save(entries: Entries, metadata: dict[str, str] | None) -> bytes:
    """The bytes of a file."""
    specs, fetch = entries
    content = _write_tensors(specs, fetch, None, metadata, False)
    assert content is not None
    return content


def save_file(
    entries: Entries, filename: Path, metadata: dict[str, str] | None, fsync: bool
) -> None:
    """Replaces a file whole or not at all."""
    specs, fetch = entries
    _write_tensors(specs, fetch, os.fspath(filename), metadata, fsync)


def load(data: bytes, framework: str, device: str | int = "cpu") -> dict[str, Any]:
    """Every tensor of a file's content."""
    return _load_bytes(data, framework, device)


def load_file(
    filename: Path, framework: str, device: str | int = "cpu", backend: str = "mmap"
) -> dict[str, Any]:
    """Every tensor of a file."""
    with safe_open(filename, framework, device, backend=backend) as file:
        return file.get_tensors()


def check_types(tensors: object, kind: type, called: str) -> None:
    """Refuses what is not a dict of one framework's tensors."""
    if not isinstance(tensors, dict):
        # A ValueError, not a TypeError: that is what callers of the reference catch.
        raise ValueError(  # noqa: TRY004
            f"Expected a dict of [str, {called}] but received {type(tensors)}"
        )
    for name, tensor in tensors.items():
        if not isinstance(tensor, kind):
            raise ValueError(  # noqa: TRY004
                f"Key `{name}` is invalid, expected {called} but received {type(tensor)}"
            )


def not_contiguous(name: str) -> str:
    """The text for a tensor with gaps, which the framework's users are told to pack themselves."""
    return (
        f"You are trying to save a non contiguous tensor: `{name}` which is not allowed. It either"
        " means you are trying to save tensors which are reference of each other in which case it's"
        " recommended to save only the full tensors, and reslice at load time, or simply call"
        " `.contiguous()` on your tensor to pack it before saving."
    )
