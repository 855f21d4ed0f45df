"""TensorFlow tensors."""

from pathlib import Path

import claims
import numpy as np
import tensorflow as tf
import tonnage.numpy
import tonnage.tensorflow

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "int32",
    "uint32", "int64", "uint64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2",
    "float4_e2m1fn",
)  # fmt: skip


def to_numpy(tensor: tf.Tensor) -> np.ndarray:
    return np.asarray(tensor.numpy())


def test_round_trip(tmp_path: Path) -> None:
    base = np.arange(8).reshape(2, 4) % 2
    tensors = {name: tf.convert_to_tensor(base.astype(np.dtype(name))) for name in DTYPES}
    tensors |= {"scalar": tf.constant(3.0), "empty": tf.zeros((2, 0))}
    claims.round_trip(tonnage.tensorflow, "tf", tensors, to_numpy, tmp_path / "a")


def test_variables_are_saved() -> None:
    content = tonnage.tensorflow.save({"v": tf.Variable([1.0, 2.0])})
    assert tonnage.numpy.load(content)["v"].tolist() == [1, 2]


def test_slices_bounds_devices_and_dtypes(tmp_path: Path) -> None:
    claims.slices("tf", to_numpy, tmp_path / "a")
    claims.checks_bounds("tensorflow", tmp_path / "a")
    claims.has_no_devices("tf", "tensorflow", tmp_path / "a")
    claims.lacks("tf", "float8_e8m0fnu", tmp_path / "a")


def test_private_names() -> None:
    given = {"a": np.ones(2, np.float32)}
    tensors = tonnage.tensorflow._np2tf(given)
    assert tonnage.tensorflow._tf2np(tensors)["a"].tolist() == [1, 1]
    assert isinstance(given["a"], np.ndarray)
    assert isinstance(tensors["a"], tf.Tensor)
