"""`install`: `torch.load` and `torch.save` that know safetensors, until `uninstall`.

Wrappers stand where PyTorch's functions stood. What is not about a safetensors file goes to what
stood there before, with the same arguments. Where another package has since put a wrapper of its
own on top, it holds on to ours: then ours stays below, passes everything on, and a warning says so.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch

from . import _front

_LOCK = threading.RLock()
_SUFFIX = ".safetensors"
#: Where the functions are found; `torch.load` is bound to the one of `torch.serialization`.
_HOMES = (torch, torch.serialization)


class _Hook:
    """One of our functions, what stood in its place, and where."""

    def __init__(self, name: str, before: Any) -> None:
        self.active = True
        self.name = name
        self.before = before
        self.homes: list[Any] = []
        self.wrapper = functools.wraps(before)(self._load() if name == "load" else self._save())

    def _load(self) -> Any:
        def load(f: Any, map_location: Any = None, *args: Any, **options: Any) -> Any:
            before = self.before
            if self.active and _is_ours(f):
                # `weights_only` and what is for a pickle mean nothing here.
                return _front.load(f, map_location, mmap=_mmap(f, options))
            if self.active and _is_misnamed(f):
                with open(f, "rb") as file:
                    return before(file, map_location, *args, **options)
            return before(f, map_location, *args, **options)

        return load

    def _save(self) -> Any:
        def save(obj: Any, f: Any, *args: Any, **options: Any) -> Any:
            if self.active and _is_path(f) and os.fspath(f).endswith(_SUFFIX):
                return _front.save(obj, f)
            return self.before(obj, f, *args, **options)

        return save

    def stands(self) -> bool:
        return all(getattr(home, self.name) is self.wrapper for home in self.homes)

    def take_away(self, others: Iterable[_Hook]) -> list[str]:
        """Puts back what stood there; names the places where somebody else's function is now."""
        self.active = False
        above = [hook for hook in others if hook.before is self.wrapper]
        for hook in above:
            hook.before = self.before
        covered = []
        for home in self.homes:
            if getattr(home, self.name) is self.wrapper:
                setattr(home, self.name, self.before)
            elif not any(home in hook.homes for hook in above):
                covered.append(f"{home.__name__}.{self.name}")
        return covered


class _Patch:
    """The hooks of one installation."""

    def __init__(self) -> None:
        self.installs = 0
        self.hooks: list[_Hook] = []
        for name in ("load", "save"):
            made: dict[int, _Hook] = {}
            for home in _HOMES:
                before = getattr(home, name)
                hook = made.setdefault(id(before), _Hook(name, before))
                hook.homes.append(home)
            self.hooks += made.values()
        for hook in self.hooks:
            for home in hook.homes:
                setattr(home, hook.name, hook.wrapper)

    def stands(self) -> bool:
        """Whether every function is where it was put."""
        return all(hook.stands() for hook in self.hooks)

    def take_away(self) -> list[str]:
        others = [hook for patch in _patches if patch is not self for hook in patch.hooks]
        return [where for hook in self.hooks for where in hook.take_away(others)]


def _is_path(f: Any) -> bool:
    return isinstance(f, str | os.PathLike) and isinstance(os.fspath(f), str)


def _begin(f: Any) -> bytes:
    """The first bytes of what `torch.load` was given; none where they can't be had unnoticed."""
    if _is_path(f):
        return _front.sniff(f)
    if not all(hasattr(f, name) for name in ("read", "seek", "tell")):
        return b""
    try:
        return _front.sniff(f)
    except (OSError, ValueError, TypeError):
        return b""


def _is_ours(f: Any) -> bool:
    begin = _begin(f)
    if _front.is_safetensors(begin):
        return True
    # By its name it should be one: then our reader says what is wrong with it.
    return _is_path(f) and os.fspath(f).endswith(_SUFFIX) and not _front.is_pickle(begin)


def _is_misnamed(f: Any) -> bool:
    """Whether a file has our suffix and is a pickle, which PyTorch reads by content only."""
    return _is_path(f) and os.fspath(f).endswith(_SUFFIX)


def _mmap(f: Any, options: dict[str, Any]) -> bool | None:
    mmap = options.get("mmap")
    if mmap and not _is_path(f):
        raise ValueError("f must be a file path in order to use the mmap argument")
    return None if mmap is None else bool(mmap)


#: Those in place, the latest last.
_patches: list[_Patch] = []


class Installed:
    """One `install`: until `undo`, or the end of a `with` block."""

    def __init__(self) -> None:
        with _LOCK:
            if not (_patches and _patches[-1].stands()):
                _patches.append(_Patch())
            _patches[-1].installs += 1
            self._patch: _Patch | None = _patches[-1]
            _open.append(self)

    def undo(self) -> None:
        """Takes this installation back. More than once does nothing."""
        with _LOCK:
            patch, self._patch = self._patch, None
            if patch is None:
                return
            _open.remove(self)
            patch.installs -= 1
            if patch.installs:
                return
            _patches.remove(patch)
            covered = patch.take_away()
        if covered:
            warnings.warn(
                f"{' and '.join(covered)} were replaced after tonnage.torch.install(), so that what"
                " stood there before cannot be put back; tonnage's wrapper stays below, and passes"
                " everything on",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


_open: list[Installed] = []


def install() -> Installed:
    """Lets `torch.load` and `torch.save` read and write safetensors files.

    ```python
    tonnage.torch.install()             # until uninstall()
    with tonnage.torch.install():       # for a while
        torch.save({"model": model.state_dict(), "step": 3}, "checkpoint.safetensors")
        state = torch.load("checkpoint.safetensors", map_location="meta")
    ```

    `torch.load` then is `tonnage.torch.load` for whatever begins as a safetensors file does, by
    path, file object or `BytesIO`, and for paths that end with `.safetensors`. `torch.save` is
    `tonnage.torch.save` for paths that end so; what it can't write there is a `TypeError`, never a
    pickle. Everything else is as before, `weights_only` for pickles included: also those that lie
    under a `.safetensors` name, which PyTorch alone refuses.

    It counts: as many `uninstall()`s, or ends of blocks, as there were `install()`s bring back what
    was there. It is for the whole process, and threads may call it at any time. Modules that
    imported the functions themselves (`from torch import load`) before keep what they have.
    """
    return Installed()


def uninstall() -> None:
    """Takes the last `install()` back; does nothing where there is none.

    Warns (`RuntimeWarning`) where another package has replaced the functions since, and holds on to
    ours: then they stay in its chain, and pass everything on as if they were not there.
    """
    with _LOCK:
        last = _open[-1] if _open else None
    if last is not None:
        last.undo()
