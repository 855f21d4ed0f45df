"""What holds for every framework that is reached through host memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401 - names its dtypes to NumPy
import numpy as np
import pytest
import tonnage.numpy
from tonnage import SafetensorError, safe_open


def round_trip(
    module: ModuleType,
    framework: str,
    tensors: dict[str, Any],
    to_numpy: Callable[[Any], np.ndarray],
    path: Path,
) -> None:
    """Every way of saving and loading gives the same tensors; the caller's dict stays as it is."""
    before = dict(tensors)
    content = module.save(tensors, metadata={"by": framework})
    module.save_file(tensors, path, metadata={"by": framework})
    assert path.read_bytes() == content
    assert list(tensors) == list(before)
    assert all(tensors[name] is before[name] for name in before)
    ways = [module.load(content), module.load_file(path), module.load_file(path, backend="pread")]
    with safe_open(path, framework) as file:
        assert file.metadata() == {"by": framework}
        ways.append({name: file.get_tensor(name) for name in sorted(before)})
        assert file.keys() == sorted(before)
    for loaded in ways:
        assert loaded.keys() == before.keys()
        for name, tensor in before.items():
            assert loaded[name].dtype == tensor.dtype, name
            assert type(loaded[name]) is type(tensor)
            got, wanted = to_numpy(loaded[name]), to_numpy(tensor)
            assert got.shape == wanted.shape, name
            assert got.tobytes() == wanted.tobytes(), name


def slices(framework: str, to_numpy: Callable[[Any], np.ndarray], path: Path) -> None:
    """Slices are NumPy's, on both backends."""
    array = np.arange(50, dtype=np.float32).reshape(10, 5)
    tonnage.numpy.save_file({"a": array}, path)
    for backend in ("mmap", "pread"):
        with safe_open(path, framework, backend=backend) as file:
            taken = file.get_slice("a")
            for key in (
                np.s_[:], np.s_[2:, -1], np.s_[5:3], np.s_[-2:], np.s_[::3, ::2], np.s_[..., 1:2],
                np.s_[3], np.s_[3, 4], np.s_[:, 5:], (),
            ):  # fmt: skip
                got = to_numpy(taken[key])
                assert got.shape == array[key].shape, key
                assert np.array_equal(got, array[key]), key


def checks_bounds(framework: str, path: Path) -> None:
    """Past the end is an error, with the reference's text."""
    tonnage.numpy.save_file({"a": np.zeros((10, 5), np.float32)}, path)
    with safe_open(path, framework) as file:
        text = r"Error during slicing \[:20\] with shape \[10, 5\]: index 19 out of bounds for"
        with pytest.raises(SafetensorError, match=text) as caught:
            file.get_slice("a")[:20]
        assert isinstance(caught.value, IndexError)


def has_no_devices(framework: str, name: str, path: Path) -> None:
    """Only torch and paddle take a device."""
    tonnage.numpy.save_file({"a": np.zeros(1, np.float32)}, path)
    text = f"Device cuda:0 is not supported for framework {name}"
    with pytest.raises(SafetensorError, match=text):
        safe_open(path, framework, device="cuda")


def lacks(framework: str, dtype: str, path: Path) -> None:
    """A dtype that the framework lacks is an error of that tensor; the others load."""
    arrays = {"odd": np.zeros(8, np.dtype(dtype)), "plain": np.zeros(2, np.float32)}
    tonnage.numpy.save_file(arrays, path)
    with safe_open(path, framework) as file:
        assert tuple(file.get_tensor("plain").shape) == (2,)
        with pytest.raises(SafetensorError, match="Dtype not understood") as caught:
            file.get_tensor("odd")
        assert caught.value.code == "UNSUPPORTED_DTYPE"
