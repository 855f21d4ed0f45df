"""JAX arrays."""

from pathlib import Path

import claims
import jax.numpy as jnp
import numpy as np
import tonnage.flax
import tonnage.numpy

DTYPES = (
    "float32", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "uint32", "bool",
    "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn",
)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    tensors = {name: jnp.arange(8).reshape(2, 4).astype(name) for name in DTYPES}
    tensors |= {"scalar": jnp.float32(3), "empty": jnp.zeros((2, 0))}
    claims.round_trip(tonnage.flax, "flax", tensors, np.asarray, tmp_path / "a")


def test_slices_bounds_devices_and_dtypes(tmp_path: Path) -> None:
    claims.slices("jax", np.asarray, tmp_path / "a")
    claims.checks_bounds("jax", tmp_path / "a")
    claims.has_no_devices("flax", "flax", tmp_path / "a")


def test_transposed_arrays_are_saved_right() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    content = tonnage.flax.save({"a": jnp.asarray(array).T, "numpy": array.T})
    assert all((a == array.T).all() for a in tonnage.numpy.load(content).values())


def test_private_names() -> None:
    given = {"a": np.ones(2, np.float32)}
    assert tonnage.flax._jnp2np(tonnage.flax._np2jnp(given))["a"].tolist() == [1, 1]
    assert isinstance(given["a"], np.ndarray)
