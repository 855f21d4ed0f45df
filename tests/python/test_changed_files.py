"""Files that change in the very moment of a load: to host memory and to a device.

A load reads the file that was opened. Where that was replaced by another, or lost its permissions,
the load has the old content, whole; where it became shorter, it fails and says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tonnage
from device_data import on_stub

MIB = 1 << 20
COUNT = 24


def saved(path: Path, first: int) -> Path:
    arrays = {f"t{at:02}": np.full(MIB // 4, first + at, "float32") for at in range(COUNT)}
    tonnage.save(arrays, path)
    return path


def replaced(path: Path) -> None:
    """Another file of the same size under the same name."""
    other = saved(path.with_name("other.safetensors"), 1000)
    assert other.stat().st_size == path.stat().st_size
    other.replace(path)


def forbidden(path: Path) -> None:
    path.chmod(0)


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


CHANGES = [replaced, forbidden, truncated]


@pytest.mark.parametrize("strategy", ["auto", "direct", "buffered"])
@pytest.mark.parametrize("change", CHANGES)
def test_to_host_memory(tmp_path: Path, change: Callable[[Path], None], strategy: str) -> None:
    path = saved(tmp_path / "m.safetensors", 0)
    checkpoint = tonnage.open(path)
    seen: list[str] = []

    def load() -> None:
        # Bounded: what is read after the first tensors comes after the change.
        stream = checkpoint.stream(framework="numpy", budget=2 * MIB, strategy=strategy)
        for name, tensor in stream:
            assert (tensor == int(name[1:])).all(), name
            if not seen:
                change(path)
            seen.append(name)

    if change is not truncated:
        load()
        assert len(seen) == COUNT
        return
    with pytest.raises(tonnage.TonnageError) as caught:
        load()
    assert caught.value.file == str(path)
    assert 0 < len(seen) < COUNT


@pytest.mark.parametrize("change", [one.__name__ for one in CHANGES])
def test_to_a_device(tmp_path: Path, change: str) -> None:
    path = saved(tmp_path / "m.safetensors", 0)
    script = """
        import test_changed_files as changes
        from pathlib import Path
        path, change = Path(sys.argv[1]), getattr(changes, sys.argv[2])
        for strategy in ("direct", "buffered"):
            checkpoint, seen = tonnage.open(path), 0
            try:
                stream = checkpoint.stream(
                    device="cuda:0", budget="2MiB", staging="1MiB", threads=1, strategy=strategy
                )
                for name, tensor in stream:
                    assert (tensor.numpy() == int(name[1:])).all(), name
                    if seen == 0:
                        change(path)
                    seen += 1
            except tonnage.TonnageError as error:
                assert sys.argv[2] == "truncated", error
                assert error.file == str(path), error.file
                assert error.tensor and 0 < seen < changes.COUNT
                tensor = None
            else:
                assert sys.argv[2] != "truncated" and seen == changes.COUNT
            path.unlink()
            changes.saved(path, 0)
            tensor = None
    """
    on_stub(script, path, change)


def test_a_file_that_is_opened_again_is_the_new_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", 0)
    checkpoint = tonnage.open(path)
    replaced(path)
    assert checkpoint.load("t03", framework="numpy")["t03"][0] == 3
    assert tonnage.open(path).load("t03", framework="numpy")["t03"][0] == 1003
    shutil.rmtree(tmp_path)
    assert checkpoint.load("t04", framework="numpy")["t04"][0] == 4
