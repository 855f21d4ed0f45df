"""The reference's functions: a dict of tensors or a module, to a file and back."""

from __future__ import annotations

import torch

from .. import _dropin
from .._dropin import Path
from .._native import SafetensorError
from ._names import _entries, _remove_duplicate_names


def save(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a file of these tensors, which must be dense, contiguous and not overlap.

    ```python
    content = tonnage.torch.save({"weight": torch.zeros(512, 1024)}, metadata={"format": "pt"})
    ```
    """
    return _dropin.save(_entries(tensors), metadata)


def save_file(
    tensors: dict[str, torch.Tensor],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    fsync: bool = True,
) -> None:
    """Writes a file of these tensors, replacing what was there whole or not at all.

    Tensors on other devices come to the host one at a time. Nothing keeps other threads from
    changing a tensor meanwhile. With `fsync`, the file survives a power cut once this has returned.
    """
    _dropin.save_file(_entries(tensors), filename, metadata, fsync)


def load(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a file's content, on the CPU."""
    return _dropin.load(data, "torch")


def load_file(
    filename: Path, device: str | int = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """The tensors of a file, on `device`.

    On the CPU, `backend="mmap"` gives tensors that view the file: they are read when used, and
    writing to them changes memory, never the file. `backend="pread"` reads them now.
    """
    return _dropin.load_file(filename, "torch", device, backend)


def save_model(
    model: torch.nn.Module,
    filename: str,
    metadata: dict[str, str] | None = None,
    force_contiguous: bool = True,
    *,
    fsync: bool = True,
) -> None:
    """Writes a module's state. Of tensors that share memory one is written, and the metadata says
    which names it stands for.

    With `force_contiguous=False` a tensor with gaps is refused instead of packed.
    """
    state = model.state_dict()
    noted = None if metadata is None else dict(metadata)
    for kept, dropped in _remove_duplicate_names(state).items():
        for name in dropped:
            noted = {} if noted is None else noted
            noted.setdefault(name, kept)
            del state[name]
    if force_contiguous:
        state = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(state, filename, metadata=noted, fsync=fsync)
    except SafetensorError:
        raise
    except ValueError as error:
        hint = "Or use save_model(..., force_contiguous=True), read the docs for potential caveats."
        raise ValueError(f"{error} {hint}") from None


def load_model(
    model: torch.nn.Module,
    filename: Path,
    strict: bool = True,
    device: str | int = "cpu",
    *,
    backend: str = "mmap",
) -> tuple[list[str], list[str]]:
    """Loads a file into a module and returns `(missing, unexpected)` names.

    A name whose memory another name fills is not missing. With `strict`, names on either list are a
    `RuntimeError`.
    """
    state = load_file(filename, device=device, backend=backend)
    shared = _remove_duplicate_names(model.state_dict(), preferred_names=state.keys())
    incompatible = model.load_state_dict(state, strict=False)
    missing, unexpected = set(incompatible.missing_keys), list(incompatible.unexpected_keys)
    for name in (name for names in shared.values() for name in names):
        if name in missing:
            missing.remove(name)
        else:
            unexpected.append(name)
    if strict and (missing or unexpected):
        text = f"Error(s) in loading state_dict for {type(model).__name__}:"
        for kind, names in (("Missing", missing), ("Unexpected", unexpected)):
            if names:
                quoted = ", ".join(f'"{name}"' for name in sorted(names))
                text += f"\n    {kind} key(s) in state_dict: {quoted}"
        raise RuntimeError(text)
    return sorted(missing), unexpected
