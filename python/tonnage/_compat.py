"""`as_safetensors`: Tonnage under the name `safetensors`, in this process.

Libraries that `import safetensors` then run on Tonnage without a change. `sys.modules` is what
Python asks first, so it decides; modules that bound names of the reference before keep those.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from ._native import safe_open

if TYPE_CHECKING:
    from ._prefetch import PrefetchLoader

# The release of the reference whose interface this is; libraries compare it.
VERSION = "0.8.0"

_FRAMEWORKS = ("torch", "numpy", "flax", "mlx", "tensorflow", "paddle")
_NATIVE = "safetensors._safetensors_rust"
_LOCK = threading.RLock()


class _Alias(importlib.abc.Loader):
    """Loads `safetensors.<name>` as the module `tonnage.<name>`."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _copy(importlib.import_module(self.target), spec)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: `create_module` made the module whole."""


def _copy(target: ModuleType, spec: importlib.machinery.ModuleSpec) -> ModuleType:
    """A module of another name with the same contents, so that `tonnage`'s own stays as it is."""
    module = ModuleType(spec.name, target.__doc__)
    module.__dict__.update(
        (name, value)
        for name, value in target.__dict__.items()
        if name not in ("__name__", "__spec__", "__loader__", "__package__", "__path__")
    )
    if "safe_open" in module.__dict__:
        module.__dict__["safe_open"] = SafeOpen
    return module


class SafeOpen(safe_open):
    """`safe_open` whose `prefetch` has the reference's limits: for PyTorch and CUDA only.

    Libraries find out by its refusal where they have to load in another way.
    """

    __slots__ = ()

    def prefetch(
        self, plan: Any = None, *, device: str | int | None = None, threads: int = 8
    ) -> PrefetchLoader:
        """As the reference's 0.9 has it."""
        return self._prefetch_as_reference(plan, device=device, threads=threads)


SafeOpen.__name__ = SafeOpen.__qualname__ = "safe_open"
SafeOpen.__module__ = "builtins"


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for `safetensors` and what lies below it, before any other finder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "safetensors":
            return None
        if not name:
            spec = importlib.machinery.ModuleSpec(
                fullname, _Alias("tonnage"), origin=__file__, is_package=True
            )
            spec.submodule_search_locations = []
            return spec
        if name == "_safetensors_rust":
            return importlib.machinery.ModuleSpec(fullname, _Alias("tonnage._native"))
        if name in _FRAMEWORKS:
            return importlib.machinery.ModuleSpec(fullname, _Alias(f"tonnage.{name}"))
        return None


class _Distributions(importlib.metadata.DistributionFinder):
    """Answers `importlib.metadata.version("safetensors")` where the reference is not installed."""

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> list[importlib.metadata.Distribution]:
        name = getattr(context, "name", None)
        if name is None or name.replace("_", "-").lower() != "safetensors":
            return []
        return [_Distribution()]

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Finds no module: `_Finder` does."""


class _Distribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        if filename in ("METADATA", "PKG-INFO"):
            return f"Metadata-Version: 2.1\nName: safetensors\nVersion: {VERSION}\n"
        return None

    def locate_file(self, path: object) -> Any:
        raise FileNotFoundError(f"safetensors is provided by tonnage: there is no file {path}")


def _ours() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "safetensors"]


class InPlace:
    """Tonnage in the place of `safetensors`: until `undo`, or the end of a `with` block."""

    def __init__(self) -> None:
        self._before: dict[str, ModuleType] = {}
        self._finders: list[importlib.abc.MetaPathFinder] = []
        with _LOCK:
            self._before = {name: sys.modules.pop(name) for name in _ours()}
            # The distribution finder goes last: an installed reference speaks for itself.
            finder, distributions = _Finder(), _Distributions()
            sys.meta_path.insert(0, finder)
            sys.meta_path.append(distributions)
            self._finders = [finder, distributions]
            package = importlib.import_module("safetensors")
            package.__dict__["__version__"] = VERSION
            importlib.import_module(_NATIVE).__dict__["__version__"] = VERSION
            # Whoever imported a framework's module before finds ours there now.
            for name in self._before:
                if name.partition(".")[2] in _FRAMEWORKS:
                    importlib.import_module(name)

    def undo(self) -> None:
        """Puts back what was there. More than once does nothing."""
        with _LOCK:
            if not self._finders:
                return
            for finder in self._finders:
                sys.meta_path.remove(finder)
            self._finders = []
            for name in _ours():
                del sys.modules[name]
            sys.modules.update(self._before)
            self._before = {}

    def __enter__(self) -> InPlace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def as_safetensors() -> InPlace:
    """Puts Tonnage in the place of the package `safetensors`, installed or not.

    ```python
    tonnage.as_safetensors()            # for good
    with tonnage.as_safetensors():      # for a while
        from safetensors.torch import load_file
    ```

    Frameworks are imported when their module is. What other modules imported from the reference
    before this call stays what it was, so call it early.
    """
    return InPlace()
