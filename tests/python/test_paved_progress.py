"""Progress of loads and saves, and how Ctrl-C ends them."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
from paved_data import content, write_model
from tqdm import tqdm

SIZE = 24 << 20
#: Seconds until Ctrl-C must be answered: a nap of 50 ms, a block of 40 ms, a busy machine.
LATE = 0.5


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    tonnage.save({f"t{i}": np.full(SIZE // 4, i, np.uint8) for i in range(4)}, path, fsync=False)
    return path


def test_a_callback_hears_of_loads_and_saves(big: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    threads: set[int] = set()

    def hear(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.get_ident())

    loaded = tonnage.open(big).load(framework="numpy", progress=hear)
    assert calls[0] == (0, SIZE)
    assert calls[-1] == (SIZE, SIZE)
    assert calls == sorted(calls)
    assert threads == {threading.get_ident()}
    calls.clear()
    tonnage.save(loaded, tmp_path / "m.safetensors", progress=hear, fsync=False)
    assert calls[-1] == (SIZE, SIZE)
    calls.clear()
    turned = {name: array.reshape(-1, 4).T for name, array in loaded.items()}
    tonnage.save(turned, tmp_path / "m.safetensors", progress=hear, fsync=False)
    assert [done for done, _ in calls] == [SIZE // 4, SIZE // 2, SIZE // 4 * 3, SIZE]
    calls.clear()
    tonnage.open(big).load(into=loaded, progress=hear)
    assert calls[-1] == (SIZE, SIZE)


def test_tqdm_classes_and_bars(big: Path) -> None:
    screen = io.StringIO()

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(file=screen, **options)

    tonnage.open(big).load(framework="numpy", progress=Bar)
    assert "load" in screen.getvalue()
    assert "100%" in screen.getvalue()
    with tqdm(total=2 * SIZE, file=io.StringIO()) as bar:
        tonnage.open(big).load(framework="numpy", progress=bar)
        tonnage.open(big).load(framework="numpy", progress=bar)
        assert bar.n == 2 * SIZE


def test_true_shows_nothing_where_nobody_looks(big: Path, capfd: Any) -> None:
    tonnage.open(big).load(framework="numpy", progress=True)
    assert capfd.readouterr() == ("", "")
    tonnage.open(big).load(framework="numpy", progress="always")
    assert "100%" in capfd.readouterr().err


SHOWN = """
import sys
if sys.argv[2] == "plain":
    sys.modules["tqdm"] = sys.modules["tqdm.auto"] = None
import tonnage
tonnage.open(sys.argv[1]).load(framework="numpy", progress=True)
"""


def everything(descriptor: int) -> str:
    """All that was written to a terminal whose other end is closed."""
    shown = b""
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:
            part = b""
        if not part:
            return shown.decode()
        shown += part


@pytest.mark.parametrize("kind", ["tqdm", "plain"])
def test_true_shows_a_bar_on_a_terminal(big: Path, kind: str) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", SHOWN, str(big), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    shown = everything(ours)
    os.close(ours)
    assert done.returncode == 0, shown
    assert "load" in shown
    assert ("100 %" if kind == "plain" else "100%") in shown


def test_what_is_no_progress(big: Path) -> None:
    for wrong in (3, "sometimes", [1]):
        with pytest.raises(TypeError, match="progress"):
            tonnage.open(big).load(progress=wrong)


def test_what_a_callback_raises_ends_the_load_and_comes_back(big: Path, tmp_path: Path) -> None:
    def refuse(done: int, total: int) -> None:
        raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        tonnage.open(big).load(framework="numpy", progress=refuse)
    with pytest.raises(ZeroDivisionError, match="enough"):
        tonnage.save({"a": np.zeros(SIZE)}, tmp_path / "m.safetensors", progress=refuse)
    with pytest.raises(ZeroDivisionError, match="enough"):
        tonnage.save({"a": np.zeros((8, 8)).T}, tmp_path / "m.safetensors", progress=refuse)
    assert list(tmp_path.iterdir()) == []


class Slow(io.RawIOBase):
    """A file object that takes 20 ms for each piece of 64 KiB, as a bad network would."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)
        self.reads = 0
        self.slow = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.slow:
            time.sleep(0.02)
            size = min(size, 1 << 16)
        return self._inner.read(size)


def answered_after(work: Any) -> float:
    """Runs `work`, sends SIGINT half a second later, and tells how long the answer took.

    A busy machine adds to it what it likes: the soonest of a few shows what the work takes.
    """
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    soonest = 60.0
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(3):
            timer = threading.Timer(0.5, press)
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                work()
            soonest = min(soonest, time.monotonic() - pressed[-1])
            timer.join()
            if soonest < LATE:
                break
    finally:
        signal.signal(signal.SIGINT, previous)
    return soonest


class Turns(Slow):
    """A file object whose reads each wait until another thread has had its turn."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.turn = threading.Semaphore(0)
        self.waited = 0

    def read(self, size: int = -1) -> bytes:
        if self.slow:
            if not self.turn.acquire(timeout=60):
                raise OSError("no other thread had a turn for a minute")
            self.waited += 1
            size = min(size, 1 << 16)
        return self._inner.read(size)


def slow_checkpoint(tensors: int) -> tonnage.Checkpoint:
    data = content({f"t{i}": ("U8", [1 << 16], bytes(1 << 16)) for i in range(tensors)})
    source = Slow(data)
    checkpoint = tonnage.open(source)
    source.slow = True
    return checkpoint


def test_ctrl_c_ends_a_load() -> None:
    checkpoint = slow_checkpoint(500)
    late = answered_after(lambda: checkpoint.load(framework="numpy"))
    assert late < LATE
    # The checkpoint is as good as before.
    assert checkpoint["t3"].numpy().sum() == 0


def test_ctrl_c_ends_a_stream() -> None:
    checkpoint = slow_checkpoint(500)
    late = answered_after(lambda: list(checkpoint.stream(framework="numpy")))
    assert late < LATE


def test_ctrl_c_ends_a_save_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path)
    before = path.read_bytes()
    checkpoint = slow_checkpoint(500)
    late = answered_after(lambda: tonnage.save(checkpoint, path))
    assert late < LATE
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_threads_run_during_a_load() -> None:
    """Each read waits for a turn of another thread: a load that kept it out would never end."""
    source = Turns(content({f"t{i}": ("U8", [1 << 16], bytes(1 << 16)) for i in range(50)}))
    checkpoint = tonnage.open(source)
    source.slow = True
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            source.turn.release()
            time.sleep(0.001)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        loaded = checkpoint.load(framework="numpy")
    finally:
        over.set()
        worker.join()
    assert len(loaded) == 50
    assert source.waited > 0


def test_several_threads_load_from_one_checkpoint(big: Path) -> None:
    checkpoint = tonnage.open(big)
    sums: list[int] = []

    def work(i: int) -> None:
        sums.append(int(checkpoint.load(f"t{i}", framework="numpy")[f"t{i}"][:10].sum()))

    workers = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(sums) == [0, 0, 10, 10, 20, 20, 30, 30]
