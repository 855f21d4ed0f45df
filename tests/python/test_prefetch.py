"""`prefetch`: the reference's interface on every device and framework; here in host memory."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
from device_data import values

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prefetch") / "model.safetensors"
    tonnage.save(values(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prefetch") / "model"
    tonnage.save(values(), path, max_shard_size=1 << 20)
    return path


WANTED: dict[str, Any] = values()


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_every_tensor_comes_once(file: Path, framework: str, backend: str) -> None:
    with tonnage.safe_open(file, framework, backend=backend) as opened:
        loader = opened.prefetch()
        assert isinstance(loader, tonnage.PrefetchLoader)
        assert loader.names() == opened.offset_keys()
    # The loader outlives the handle.
    assert len(loader) == len(WANTED)
    first = loader.take("large")
    rest = dict(loader)
    assert set(rest) == set(WANTED) - {"large"}
    for name, tensor in {**rest, "large": first}.items():
        assert type(tensor).__module__ == {"pt": "torch", "np": "numpy"}[framework]
        assert np.array_equal(np.asarray(tensor), WANTED[name]), name
    assert dict(loader) == {}
    loader.close()
    # What was handed out is the caller's.
    first[:] = 0
    assert not np.asarray(first).any()


def test_rows_of_a_plan(file: Path) -> None:
    plan = {"large": slice(3, 40), "ints": slice(-5, None), "scalar": None, "halves": slice(2, 2)}
    with tonnage.safe_open(file, "np") as opened, opened.prefetch(plan) as loader:
        assert set(loader.names()) == set(plan)
        found = dict(loader)
    assert np.array_equal(found["large"], WANTED["large"][3:40])
    assert np.array_equal(found["ints"], WANTED["ints"][-5:])
    assert found["halves"].shape == (0, 777)
    assert found["scalar"] == 2.5


def test_parts_of_any_dimension(folder: Path) -> None:
    plan: dict[str, Any] = {
        "large": (slice(5, 1000, 3), [slice(0, 9), 500, slice(100, 120)]),
        "halves": [slice(0, 2), 7],
        "small.8": (slice(None), 1),
        "ints": ([3, 1],),
    }
    with tonnage.prefetch(folder, plan, framework="numpy", staging="1MiB") as loader:
        found = dict(loader)
    large = WANTED["large"][5:1000:3]
    parts = [large[:, 0:9], large[:, 500:501], large[:, 100:120]]
    assert np.array_equal(found["large"], np.concatenate(parts, axis=1))
    assert np.array_equal(found["halves"], WANTED["halves"][[0, 1, 7]])
    assert np.array_equal(found["small.8"], WANTED["small.8"][:, 1])
    assert np.array_equal(found["ints"], [3, 1])


def test_casts_on_the_way(file: Path) -> None:
    with tonnage.open(file).prefetch({"large": (slice(None), slice(9, 99))}, dtype="float16",
                                     framework="numpy") as loader:  # fmt: skip
        found = loader.take("large")
    assert found.dtype == np.float16
    assert np.array_equal(found, WANTED["large"][:, 9:99].astype("float16"))


REFUSED = [
    ({"nope": None}, "File does not contain tensor nope"),
    ({"large": slice(0, 3, 2)}, "prefetch plan slices must have step 1, got 2 for large"),
    ({"scalar": slice(0, 1)}, "cannot slice rows of the 0-d tensor scalar"),
    ({"large": 3}, "must be None or a slice, got <class 'int'> for large"),
    ({"large": slice(0, 5000)}, "slice stop 5000 for large is out of range for 1500 rows"),
    ({"large": slice(0, 3, 0)}, "invalid prefetch plan slice for large"),
    ({"large": slice("a", 3)}, "slice bounds for large must be integers or None"),
    ({}, "prefetch plan selects no tensors"),
    ({3: None}, "prefetch plan keys must be tensor names"),
    ({"large": (0, 0, 0)}, "has 3 dimensions, the tensor has 2"),
    ({"large": (slice(0, 9, -1),)}, "positive step"),
    ({"large": (slice(None), 700)}, "index 700 for large is out of range"),
    ({"large": ([0, 1], [0, 1])}, "lists in 2 dimensions"),
    ({"large": ("a",)}, "slices, numbers or lists"),
]


@pytest.mark.parametrize(("plan", "text"), REFUSED)
def test_plans_that_do_not_fit_are_refused_before_anything_is_read(
    file: Path, plan: dict[Any, Any], text: str
) -> None:
    with (
        tonnage.safe_open(file, "pt") as opened,
        pytest.raises(tonnage.SafetensorError) as raised,
    ):
        opened.prefetch(plan)
    assert text in str(raised.value)


def test_words_of_a_loader(file: Path) -> None:
    loader = tonnage.safe_open(file, "pt").prefetch({"large": None, "ints": None})
    with pytest.raises(
        tonnage.SafetensorError, match=r"tensor small\.1 is not in the prefetch plan"
    ):
        loader.take("small.1")
    loader.take("ints")
    text = "ints: tensor already delivered .prefetch hands each tensor out once, via take or iter"
    with pytest.raises(tonnage.SafetensorError, match=text):
        loader.take("ints")
    stream = iter(loader)
    loader.close()
    loader.close()
    with pytest.raises(tonnage.SafetensorError, match="prefetch loader closed"):
        next(stream)
    with pytest.raises(tonnage.SafetensorError, match="large: prefetch loader closed"):
        loader.take("large")
    assert "closed" in repr(loader)
    closed = tonnage.safe_open(file, "pt")
    closed.__exit__(None, None, None)
    with pytest.raises(tonnage.SafetensorError, match="File is closed"):
        closed.prefetch()


def test_dtypes_smaller_than_a_byte(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F4","shape":[4,8],"data_offsets":[0,16]}}'
    path = tmp_path / "f4.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(16)))
    with tonnage.safe_open(path, "pt") as opened, opened.prefetch({"x": slice(1, 3)}) as loader:
        found = loader.take("x")
    assert (found.dtype, found.shape) == (torch.float4_e2m1fn_x2, (2, 4))
    assert found.view(torch.uint8).flatten().tolist() == list(range(4, 12))
    with tonnage.safe_open(path, "np") as opened:
        with opened.prefetch() as loader:
            array = loader.take("x")
        assert np.array_equal(array.view("u1"), opened.get_tensor("x").view("u1"))


def test_a_dtype_that_the_framework_lacks(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "f6.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(3))
    with tonnage.safe_open(path, "pt") as opened:
        with pytest.raises(tonnage.SafetensorError, match="F6_E2M3: torch has no matching dtype"):
            opened.prefetch()


def test_a_file_that_is_cut_short(file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(file.read_bytes())
    opened = tonnage.safe_open(short, "np", backend="pread")
    os.truncate(short, 100_000)
    with pytest.raises(tonnage.SafetensorError, match="short"), opened.prefetch() as loader:
        dict(loader)


def test_several_threads_take(file: Path) -> None:
    loader = tonnage.open(file).prefetch(framework="numpy")
    found: dict[str, Any] = {}

    def work(names: list[str]) -> None:
        for name in names:
            found[name] = loader.take(name)

    names = loader.names()
    threads = [threading.Thread(target=work, args=(names[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loader.close()
    assert all(np.array_equal(found[name], WANTED[name]) for name in WANTED)


def test_under_the_reference_s_name_its_limits_hold(file: Path) -> None:
    with tonnage.as_safetensors():
        from safetensors import PrefetchLoader, safe_open

        assert PrefetchLoader is tonnage.PrefetchLoader
        with safe_open(file, "pt") as opened:
            with pytest.raises(tonnage.SafetensorError, match="cuda devices, not cpu"):
                opened.prefetch()
        with safe_open(file, "np") as opened:
            with pytest.raises(tonnage.SafetensorError, match='framework="pt"'):
                opened.prefetch()
    with tonnage.safe_open(file, "np") as opened:
        assert len(opened.prefetch()) == len(WANTED)
