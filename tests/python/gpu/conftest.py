"""Tests on a real GPU: PyTorch with CUDA or ROCm, and CuPy and JAX where they are installed.

They need no network and no Rust, only the installed package. `TONNAGE_EXPECT_GPU=1` makes a
missing GPU a failure; elsewhere they are not collected at all, since the suite for every machine
runs what it can on drivers that need no card.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpu_data import DEVICE, ENGINE, MIB, values  # noqa: E402

EXPECTED = os.environ.get("TONNAGE_EXPECT_GPU", "") not in ("", "0")
if not (EXPECTED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "no GPU, although TONNAGE_EXPECT_GPU says that there is one"
    # Contexts, and what libraries keep for good, are there before anything is counted.
    torch.zeros(1, device=DEVICE)
    import tonnage

    kinds = {kind.kind: kind for kind in tonnage.devices()}
    assert kinds[ENGINE.split(":")[0]].devices, kinds[ENGINE.split(":")[0]].missing


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing of other tests is left on the device."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of several files, and what is in it."""
    import tonnage

    folder = tmp_path_factory.mktemp("gpu") / "model"
    tensors = values()
    tonnage.save(tensors, folder, max_shard_size=8 * MIB)
    return folder, tensors


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One file of 1 GiB."""
    import tonnage

    path = tmp_path_factory.mktemp("gpu") / "big.safetensors"
    generator = torch.Generator().manual_seed(8)
    tensors = {
        f"layer.{at}.weight": torch.randint(
            0, 1 << 31, (16 * MIB,), generator=generator, dtype=torch.int32
        )
        for at in range(16)
    }
    tonnage.save(tensors, path)
    return path, tensors
