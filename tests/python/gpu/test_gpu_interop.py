"""`DeviceTensor` on a GPU, and the frameworks that take it: PyTorch, CuPy, JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
import torch
from gpu_data import ENGINE, same

Saved = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def plain(saved: Saved) -> dict[str, Any]:
    return tonnage.open(saved[0]).load(device=ENGINE, framework="tonnage")


def test_device_tensors_have_the_bytes(saved: Saved, plain: dict[str, Any]) -> None:
    for name, tensor in saved[1].items():
        found = plain[name]
        assert (found.device, found.shape, found.nbytes) == (ENGINE, tensor.shape, tensor.nbytes)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
        assert found.tobytes() == raw.numpy().tobytes(), name
    assert np.array_equal(plain["large.f32"].numpy(), saved[1]["large.f32"].numpy())


def test_torch_takes_them(saved: Saved, plain: dict[str, Any]) -> None:
    for name, tensor in saved[1].items():
        if tensor.numel():
            found = torch.from_dlpack(plain[name])
            assert found.data_ptr() == plain[name].data_ptr
            assert same(found, tensor), name
    kept = torch.from_dlpack(
        tonnage.open(saved[0]).load("i64", framework="tonnage", device=ENGINE)["i64"]
    )
    # The memory lives as long as whoever took it.
    assert same(kept, saved[1]["i64"])


def test_cupy_takes_them(saved: Saved, plain: dict[str, Any]) -> None:
    cupy = pytest.importorskip("cupy")
    tensors = saved[1]
    for name in ("large.f32", "odd.f16", "i64", "bool", "c64", "u8"):
        wanted = tensors[name].numpy()
        assert np.array_equal(cupy.asnumpy(cupy.from_dlpack(plain[name])), wanted), name
        assert np.array_equal(cupy.asnumpy(cupy.asarray(plain[name])), wanted), name
    found = tonnage.open(saved[0]).load("large.f32", device=ENGINE, framework="cupy")
    assert isinstance(found["large.f32"], cupy.ndarray)
    assert np.array_equal(cupy.asnumpy(found["large.f32"]), tensors["large.f32"].numpy())


def test_loading_into_cupy(saved: Saved) -> None:
    cupy = pytest.importorskip("cupy")
    place = cupy.zeros((2048, 1536), dtype="float32")
    address = place.data.ptr
    tonnage.open(saved[0]).load("large.f32", into={"large.f32": place})
    assert place.data.ptr == address
    assert np.array_equal(cupy.asnumpy(place), saved[1]["large.f32"].numpy())


def test_jax_takes_them(saved: Saved) -> None:
    jax = pytest.importorskip("jax")
    try:
        jax.devices(ENGINE.split(":")[0])
    except RuntimeError:
        pytest.skip("this JAX has no GPU")
    names = ["large.f32", "large.bf16", "odd.f16", "u8"]
    found = tonnage.open(saved[0]).load(names, device=ENGINE, framework="jax")
    for name, array in found.items():
        assert next(iter(array.devices())).platform == "gpu"
        wanted = saved[1][name].float().numpy()
        assert np.array_equal(np.asarray(array, dtype=np.float32), wanted), name
