"""Paddle tensors."""

from pathlib import Path

import claims
import numpy as np
import paddle
import pytest
import tonnage.numpy
import tonnage.paddle
from tonnage import SafetensorError, safe_open

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool",
    "complex64",
)  # fmt: skip


def to_numpy(tensor: paddle.Tensor) -> np.ndarray:
    return tensor.numpy()


def test_round_trip(tmp_path: Path) -> None:
    tensors = {name: paddle.arange(8).reshape([2, 4]).astype(name) for name in DTYPES}
    tensors |= {"scalar": paddle.to_tensor(3.0), "empty": paddle.zeros([2, 0])}
    claims.round_trip(tonnage.paddle, "paddle", tensors, to_numpy, tmp_path / "a")


def test_float8(tmp_path: Path) -> None:
    raw = np.arange(8, dtype=np.uint8)
    for name in ("float8_e4m3fn", "float8_e5m2"):
        tensor = paddle.base.core.frombuffer(bytearray(raw.tobytes()), getattr(paddle, name))
        loaded = tonnage.paddle.load(tonnage.paddle.save({"a": tensor}))["a"]
        assert loaded.dtype == tensor.dtype
        assert (loaded.view("uint8").numpy() == raw).all()


def test_tensors_outlive_the_file_and_its_dict(tmp_path: Path) -> None:
    path = tmp_path / "a"
    array = np.arange(1 << 16, dtype=np.float32)
    tonnage.numpy.save_file({"a": array, "b": array}, path)
    tensor = tonnage.paddle.load_file(path)["a"]
    path.write_bytes(b"")
    assert (tensor.numpy() == array).all()


def test_slices_do_not_end_the_process(tmp_path: Path) -> None:
    claims.slices("paddle", to_numpy, tmp_path / "a")
    with safe_open(tmp_path / "a", "paddle") as file:
        assert file.get_slice("a")[:20].shape == [10, 5]


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a dict of \[str, paddle.Tensor\]"):
        tonnage.paddle.save([1])
    with pytest.raises(ValueError, match=r"Key `a` is invalid, expected paddle\.Tensor"):
        tonnage.paddle.save({"a": np.zeros(1)})
    with pytest.raises(ValueError, match="non contiguous tensor: `a`"):
        tonnage.paddle.save({"a": paddle.zeros([4, 4]).transpose([1, 0])})
    tonnage.numpy.save_file({"a": np.zeros(1)}, tmp_path / "a")
    with pytest.raises(SafetensorError, match="device nowhere is invalid"):
        safe_open(tmp_path / "a", "paddle", device="nowhere")


def test_dtypes_that_paddle_lacks(tmp_path: Path) -> None:
    claims.lacks("paddle", "float8_e8m0fnu", tmp_path / "a")
    claims.lacks("paddle", "uint64", tmp_path / "a")


def test_private_names() -> None:
    module = tonnage.paddle
    given = {"a": np.ones(2, np.float32)}
    tensors = module._np2paddle(given)
    assert module._paddle2np(tensors)["a"].tolist() == [1, 1]
    assert isinstance(given["a"], np.ndarray)
    keep: list[object] = []
    assert module._flatten(tensors, keep)["a"].data_len == 8
    assert keep
    assert module._to_ndarray(tensors["a"], "a")[0].nbytes == 8
    assert module._SIZE[paddle.bfloat16] == 2
    assert module._getdtype("BF16") == paddle.bfloat16
    assert module.NPDTYPES[paddle.float32] == np.float32
    view = [("a", {"dtype": "F32", "shape": [2], "data": bytearray(8)})]
    assert module._view2paddle(view, "cpu")["a"].shape == [2]
