"""MLX arrays."""

from pathlib import Path

import claims
import mlx.core as mx
import numpy as np
import tonnage.mlx
import tonnage.numpy
from tonnage._adapters import mlx as adapter

DTYPES = (
    "float32", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "int32", "uint32",
    "int64", "uint64", "bool_", "complex64",
)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    tensors = {name: mx.arange(8).reshape(2, 4).astype(getattr(mx, name)) for name in DTYPES}
    tensors |= {"scalar": mx.array(3.0), "empty": mx.zeros((2, 0))}
    tensors["transposed"] = mx.arange(6).reshape(2, 3).T
    claims.round_trip(tonnage.mlx, "mlx", tensors, adapter.to_numpy, tmp_path / "a")


def test_slices_bounds_devices_and_dtypes(tmp_path: Path) -> None:
    claims.slices("mlx", np.asarray, tmp_path / "a")
    claims.checks_bounds("mlx", tmp_path / "a")
    claims.has_no_devices("mlx", "mlx", tmp_path / "a")
    claims.lacks("mlx", "float8_e4m3fn", tmp_path / "a")


def test_private_names() -> None:
    given = {"a": np.ones(2, np.float32)}
    arrays = tonnage.mlx._np2mx(given)
    assert tonnage.mlx._mx2np(arrays)["a"].tolist() == [1, 1]
    assert isinstance(given["a"], np.ndarray)
