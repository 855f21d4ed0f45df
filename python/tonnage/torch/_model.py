"""The reference's functions for a module in a file, and `load_model` for what modules have become:
without memory yet, in many files, sharded over a mesh of devices.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from .. import _checkpoint, _errors, _load
from .._checkpoint import Checkpoint
from .._dropin import Path
from .._native import SafetensorError
from . import _placed
from ._files import load_file, save_file
from ._names import _remove_duplicate_names
from ._refuse import is_dtensor


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
    filename: Path | Checkpoint,
    strict: bool = True,
    device: str | int = "cpu",
    *,
    backend: str = "mmap",
    assign: bool | None = None,
    dtype: object = None,
) -> tuple[list[str], list[str]]:
    """Loads a checkpoint into a module and returns `(missing, unexpected)` names.

    ```python
    with torch.device("meta"):
        model = Model()
    tonnage.torch.load_model(model, "Model-8B/", device="cuda:0", dtype=torch.bfloat16)
    ```

    Args:
        model: its state may lie anywhere, or on the meta device. Of a `DTensor` (FSDP2, tensor
            parallelism) each rank reads the part that its placements give it, by a plan of all
            ranks that is proven before a byte is read, with no communication.
        filename: a file; a folder or an index file of a checkpoint of many; or what
            `tonnage.open` gave.
        strict: names that are missing or unexpected are a `RuntimeError`; shapes that do not fit
            are one in any case.
        device: where tensors are read to. Assigned ones stay there; of a `DTensor` its mesh says
            where.
        backend: `"mmap"` reads pages of files when they are used, which for assigned tensors on the
            CPU is when the module does; `"pread"` reads at once. For folders and `DTensor`s alike.
        assign: whether tensors take the places of the module's own, or are copied into them.
            Default: those on the meta device, where there is nothing to copy into, are replaced.
            `requires_grad` stays as it was. An optimiser of replaced parameters must be made anew.
        dtype: of assigned floats. Default: the file's. Copies take the dtype of where they go, so
            that it can't be given for them.

    A name whose memory another name fills is not missing: tied parameters stay tied, replaced or
    not. Buffers that a module keeps out of its state are in no file; a warning names those that are
    still without memory afterwards.

    Raises `RuntimeError`, which lists everything that is missing, unexpected and of another shape.
    """
    own = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    plan = _Plan.of(own, assign)
    if dtype is not None and not plan.assigned:
        raise _errors.usage(
            "dtype= is for tensors that are assigned, and this module's are there to be copied"
            " into: give assign=True, or cast the module"
        )
    ties = _ties(model) if plan.assigned else []
    state = _read(own, filename, _device_of(device), backend, plan, dtype)
    names = set(state)
    shared = _shared(model, own, names)
    refused = _misplaced(own, state)
    if refused:
        missing, unexpected = own.keys() - names, sorted(names - own.keys())
    else:
        _share(own, state, plan, shared)
        missing, unexpected, refused = _put(model, state, plan)
        _tie(ties)
        if refused:
            missing, unexpected = own.keys() - names, sorted(names - own.keys())
    for name in (name for others in shared.values() for name in others):
        missing.discard(name)
        if name in names:
            unexpected.append(name)
    if not strict and refused:
        raise RuntimeError(_complaint(model, (), (), refused))
    if strict and (missing or unexpected or refused):
        raise RuntimeError(_complaint(model, missing, unexpected, refused))
    if plan.assigned:
        _warn_of_memoryless(model)
    return sorted(missing), unexpected


class _Plan(NamedTuple):
    """Which tensors of a state are replaced; the others are copied into."""

    assigned: frozenset[str]
    copied: frozenset[str]

    @classmethod
    def of(cls, own: Mapping[str, Any], assign: bool | None) -> _Plan:
        chosen = {name for name, tensor in own.items() if tensor.device.type == "meta"}
        if assign is False and chosen:
            raise _errors.usage(
                f"{min(chosen)} is on the meta device, where there is nothing to copy into:"
                " assign=False cannot load it"
            )
        chosen = set(own) if assign else chosen
        return cls(frozenset(chosen), frozenset(own.keys() - chosen))


def _device_of(device: Any) -> str:
    """A device as the readers of this package take it."""
    return str(torch.device(device)) if isinstance(device, int | torch.device) else device


def _read(
    own: Mapping[str, Any],
    filename: Path | Checkpoint,
    device: str,
    backend: str,
    plan: _Plan,
    dtype: object,
) -> dict[str, Any]:
    """What the checkpoint has, as the module wants it: whole tensors, or this rank's parts."""
    parts = {name for name, tensor in own.items() if is_dtensor(tensor)}
    if not parts and dtype is None and not isinstance(filename, _checkpoint.Checkpoint):
        path = os.fspath(filename)
        if not os.path.isdir(path) and not path.endswith(".json"):
            return load_file(path, device=device, backend=backend)
    if backend not in ("mmap", "pread"):
        raise ValueError(f"backend is 'mmap' or 'pread', not {backend!r}")
    if isinstance(filename, _checkpoint.Checkpoint):
        return _read_from(filename, own, parts, device, backend, plan, dtype)
    with _checkpoint.open(filename) as checkpoint:
        return _read_from(checkpoint, own, parts, device, backend, plan, dtype)


def _read_from(
    checkpoint: Checkpoint,
    own: Mapping[str, Any],
    parts: set[str],
    device: str,
    backend: str,
    plan: _Plan,
    dtype: object,
) -> dict[str, Any]:
    whole = [name for name in checkpoint if name not in parts]
    state: dict[str, Any] = {}
    if backend == "mmap" and device == "cpu" and dtype is None:
        state = {name: checkpoint[name].view("torch") for name in whole}
    else:
        # What is copied into is cast there, once.
        kept = {name for name in whole if name in plan.copied}
        cast = set(whole) - kept
        for chosen, wanted in ((kept, None), (cast, dtype)):
            if chosen:
                state |= checkpoint.load(
                    chosen.__contains__, framework="torch", device=device, dtype=wanted
                )
    return state | _parts(checkpoint, own, parts & checkpoint.keys(), plan, dtype)


def _parts(
    checkpoint: Checkpoint, own: Mapping[str, Any], names: set[str], plan: _Plan, dtype: object
) -> dict[str, Any]:
    """This rank's parts of tensors, as DTensors; of those with another shape the shape alone."""
    fits = {
        name: own[name]
        for name in sorted(names)
        if tuple(checkpoint[name].shape) == tuple(own[name].shape)
    }
    casts: dict[str, str] = {}
    if dtype is not None:
        casts = dict.fromkeys(plan.assigned, _load.cast_target(dtype).name)
    found = {
        name: _placed.distributed(local, own[name])
        for name, local in _placed.read(checkpoint, fits, casts).items()
    }
    for name in names - fits.keys():
        found[name] = torch.empty(checkpoint[name].shape, device="meta")
    return found


def _shared(
    model: torch.nn.Module, own: Mapping[str, Any], names: Iterable[str]
) -> dict[str, list[str]]:
    """For tensors that share memory: the name that fills it, and those that it stands for."""
    plain = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in own and tensor.device.type != "meta" and not is_dtensor(tensor)
    }
    shared = _remove_duplicate_names(plain, preferred_names=names)
    # Without memory, or with it elsewhere, what is shared is the parameter itself.
    objects: dict[int, list[str]] = {}
    for name, tensor in own.items():
        if name not in plain:
            objects.setdefault(id(tensor), []).append(name)
    for group in objects.values():
        if len(group) > 1:
            kept = min(set(group) & set(names) or group)
            shared[kept] = sorted(set(group) - {kept})
    return shared


def _misplaced(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """What PyTorch says of a tensor with another shape; of those that are not parts it says so
    itself.
    """
    return [
        f"size mismatch for {name}: copying a param with shape {state[name].shape} from"
        f" checkpoint, the shape in current model is {tensor.shape}."
        for name, tensor in own.items()
        if name in state and is_dtensor(tensor) and not is_dtensor(state[name])
    ]


def _put(
    model: torch.nn.Module, state: dict[str, Any], plan: _Plan
) -> tuple[set[str], list[str], list[str]]:
    """Puts a state into a module: names missing and unexpected, and what PyTorch refused."""
    rounds = [(False, plan.assigned), (True, plan.copied)]
    if not plan.assigned or not plan.copied:
        rounds = [(bool(plan.assigned), frozenset())]
    missing: set[str] = set()
    unexpected: list[str] = []
    refused: list[str] = []
    for at, (assign, apart) in enumerate(rounds):
        part = {name: tensor for name, tensor in state.items() if name not in apart}
        try:
            with warnings.catch_warnings():
                if apart and not assign:
                    # What a module adds of its own accord for what the next round brings.
                    warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
                found = model.load_state_dict(part, strict=False, assign=assign)
        except RuntimeError as error:
            if not str(error).startswith(_REFUSAL):
                raise
            refused += str(error).split("\n\t")[1:]
            continue
        # What one round has no tensor for, the other may have.
        absent, unknown = set(found.missing_keys), list(found.unexpected_keys)
        missing = missing & absent if at else absent
        unexpected = [name for name in unknown if name in unexpected] if at else unknown
    return missing, unexpected, refused


#: How PyTorch begins what it says of a state that does not fit.
_REFUSAL = "Error(s) in loading state_dict for "


def _complaint(
    model: torch.nn.Module, missing: Iterable[str], unexpected: Iterable[str], refused: list[str]
) -> str:
    text = f"{_REFUSAL}{type(model).__name__}:"
    for kind, names in (("Missing", missing), ("Unexpected", unexpected)):
        if quoted := ", ".join(f'"{name}"' for name in sorted(names)):
            text += f"\n    {kind} key(s) in state_dict: {quoted}"
    return text + "".join(f"\n    {line}" for line in refused)


# ---- tied parameters, replaced ---------------------------------------------------------------

#: Where one parameter or buffer hangs: the module's dict, and its name there.
_Places = list[tuple[dict[str, Any], str]]


def _ties(model: torch.nn.Module) -> list[tuple[Any, _Places]]:
    """Parameters and buffers that hang in several places."""
    found: dict[int, tuple[Any, _Places]] = {}
    for module in model.modules():
        for home in (module._parameters, module._buffers):
            for name, tensor in home.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (tensor, []))[1].append((home, name))
    return [tie for tie in found.values() if len(tie[1]) > 1]


def _share(
    own: Mapping[str, Any], state: dict[str, Any], plan: _Plan, shared: Mapping[str, list[str]]
) -> None:
    """Gives names that other names stand for the same tensor: what is replaced shares memory with
    nothing any more, unless it is replaced by the same.
    """
    for kept, others in shared.items():
        for name in plan.assigned.intersection(others).difference(state):
            if kept not in state:
                continue
            if own[name].shape != own[kept].shape or own[name].stride() != own[kept].stride():
                raise _errors.usage(
                    f"{name} is a view of {kept}, which replacing them would end: give assign=False"
                )
            state[name] = state[kept]


def _tie(ties: list[tuple[Any, _Places]]) -> None:
    for before, places in ties:
        now = next((home[name] for home, name in places if home[name] is not before), before)
        for home, name in places:
            home[name] = now


def _warn_of_memoryless(model: torch.nn.Module) -> None:
    saved = model.state_dict().keys()
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved]
    if left:
        warnings.warn(
            f"buffers that are in no state are still on the meta device: {', '.join(left)}",
            _errors.IncompleteLoadWarning,
            stacklevel=3,
        )
