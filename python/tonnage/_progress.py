"""Progress of a load or a save: a bar, a callback, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

#: What the `progress=` arguments take: `None` or `False` for nothing; `True` for a bar where
#: someone can see it (a terminal or a notebook); `"always"` for a bar in any case; a function
#: `(done, total)` in bytes; a `tqdm` class or bar.
ProgressLike = bool | str | Callable[[int, int], object] | Any | None


class Progress:
    """Takes `(done, total)` in bytes, any number of times, from the thread that called."""

    def __init__(self, update: Callable[[int, int], object], close: Callable[[], object]) -> None:
        self._update = update
        self._close = close

    def __call__(self, done: int, total: int) -> None:
        self._update(done, total)

    def close(self) -> None:
        """Takes a bar off the screen's books. A callback needs none."""
        self._close()


def start(progress: ProgressLike, total: int, label: str) -> Progress | None:
    """A progress for `total` bytes, or `None` where none is wanted.

    Raises `TypeError` for something that is none of what `progress=` takes.
    """
    if progress is None or progress is False:
        return None
    always = isinstance(progress, str) and progress == "always"
    if always or progress is True:
        return _bar(total, label) if always or _is_watched() else None
    if hasattr(progress, "update"):
        bar: Any = progress
        own = isinstance(progress, type)
        if own:
            bar = bar(total=total, desc=label, unit="B", unit_scale=True)
        return _of_tqdm(bar, own)
    if callable(progress):
        return Progress(progress, lambda: None)
    raise TypeError(
        "progress must be True, False, 'always', a function (done, total) or a tqdm bar, "
        f"not {type(progress).__name__}"
    )


def _of_tqdm(bar: Any, own: bool) -> Progress:
    before = 0

    def update(done: int, total: int) -> None:
        nonlocal before
        bar.update(done - before)
        before = done

    return Progress(update, bar.close if own else lambda: None)


def _bar(total: int, label: str) -> Progress:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        line = _Line(total, label, sys.stderr)
        return Progress(line.update, line.close)
    return _of_tqdm(tqdm(total=total, desc=label, unit="B", unit_scale=True), own=True)


def _is_watched() -> bool:
    """Whether someone would see a bar: stderr is a terminal, or this is a notebook."""
    shell = sys.modules.get("IPython")
    if shell is not None:
        running = shell.get_ipython()
        if running is not None and running.__class__.__name__ == "ZMQInteractiveShell":
            return True
    # Under pythonw and some servers there is no stderr at all.
    return sys.stderr is not None and sys.stderr.isatty()


class _Line:
    """One line of text, rewritten at most ten times a second: the bar where tqdm is not
    installed.
    """

    def __init__(self, total: int, label: str, out: TextIO) -> None:
        self._total = total
        self._label = label
        self._out = out
        self._began = time.monotonic()
        self._shown = float("-inf")

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown < 0.1 and done < total:
            return
        self._shown = now
        speed = done / max(now - self._began, 1e-9)
        share = done * 100 // total if total else 100
        text = f"{self._label}: {share:3d} %  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        self._out.write(f"\r{text}  {speed / 1e9:.2f} GB/s ")
        self._out.flush()

    def close(self) -> None:
        self._out.write("\n")
        self._out.flush()
