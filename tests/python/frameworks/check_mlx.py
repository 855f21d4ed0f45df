"""MLX arrays."""

from pathlib import Path

import claims
import mlx.core as mx
import numpy as np
import tonnage
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


def test_files_of_mlx_itself(tmp_path: Path) -> None:
    """MLX gives every file without metadata `"__metadata__":null`."""
    path = tmp_path / "mlx.safetensors"
    mx.save_safetensors(str(path), {"a": mx.arange(6).reshape(2, 3)})
    assert b'"__metadata__":null' in path.read_bytes()
    expected = [[0, 1, 2], [3, 4, 5]]
    assert tonnage.mlx.load_file(path)["a"].tolist() == expected
    assert tonnage.numpy.load(path.read_bytes())["a"].tolist() == expected
    with tonnage.safe_open(path, framework="np") as file:
        assert file.metadata() is None
        assert file.get_tensor("a").tolist() == expected
    with tonnage.open(path) as checkpoint:
        assert dict(checkpoint.metadata) == {}
        assert checkpoint["a"].numpy().tolist() == expected
    assert tonnage.verify(path).ok
    tonnage.save(dict(tonnage.open(path).load(framework="numpy")), tmp_path / "copy.safetensors")
    assert b"__metadata__" not in (tmp_path / "copy.safetensors").read_bytes()
