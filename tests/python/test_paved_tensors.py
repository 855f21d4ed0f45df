"""`TensorRef`: whole tensors, slices and views, of every dtype, against NumPy and ml_dtypes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
import torch
from paved_data import BITS, DTYPES, Counting, content, pack, same, values, write_model

SHAPE = (4, 6, 8)


def raw(dtype: str, array: Any) -> bytes:
    return pack(array, BITS[dtype]) if dtype in BITS else array.tobytes()


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    return {dtype: values(dtype, SHAPE, seed) for seed, dtype in enumerate(DTYPES)}


@pytest.fixture(scope="module")
def checkpoint(arrays: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tensors") / "all.safetensors"
    rows = {name: (name, list(SHAPE), raw(name, array)) for name, array in arrays.items()}
    path.write_bytes(content(rows))
    return tonnage.open(path)


def test_a_reference_knows_its_place(checkpoint: tonnage.Checkpoint) -> None:
    ref = checkpoint["F32"]
    assert (ref.name, ref.dtype, ref.shape, ref.nbytes) == ("F32", "F32", SHAPE, 768)
    assert (ref.ndim, ref.size, len(ref)) == (3, 192, 4)
    data = Path(ref.file).read_bytes()
    assert data[ref.offset : ref.offset + ref.nbytes] == ref.numpy().tobytes()
    assert repr(ref) == "TensorRef('F32', F32, [4, 6, 8], 768 B)"
    with pytest.raises(TypeError):
        len(tonnage.open(content({"s": ("U8", [], b"x")}))["s"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_numpy(checkpoint: Any, arrays: dict[str, Any], dtype: str) -> None:
    assert same(checkpoint[dtype].numpy(), arrays[dtype])
    assert same(np.asarray(checkpoint[dtype]), arrays[dtype])
    assert same(checkpoint[dtype].view("numpy"), arrays[dtype])
    assert same(checkpoint.load(dtype, framework="numpy")[dtype], arrays[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_torch(checkpoint: Any, arrays: dict[str, Any], dtype: str) -> None:
    if dtype.startswith("F6_"):
        with pytest.raises(tonnage.UnsupportedError) as caught:
            checkpoint[dtype].torch()
        assert isinstance(caught.value, NotImplementedError)
        return
    shape = (4, 6, 4) if dtype == "F4" else SHAPE
    for tensor in (checkpoint[dtype].torch(), checkpoint[dtype].view("torch")):
        assert tuple(tensor.shape) == shape
        flat = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert flat == raw(dtype, arrays[dtype])


KEYS: list[Any] = [
    0,
    -1,
    ...,
    (),
    slice(1, 3),
    slice(None, None, 2),
    slice(None, None, -1),
    slice(-3, None, -2),
    slice(5, 3),
    slice(3, 100),
    slice(-100, 2),
    (..., 0),
    (..., slice(0, 8, 3)),
    (slice(None), 2),
    (1, ..., slice(2, 4)),
    (slice(1, None), slice(4, 0, -2), slice(None, None, -3)),
    (np.int64(2), np.int32(-1), 3),
    (slice(None), slice(None), slice(1, 7)),
    (slice(0, 0), slice(0, 2)),
    (slice(2, 0, -1), 5, slice(7, None, -7)),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_numpys(checkpoint: Any, arrays: dict[str, Any], dtype: str) -> None:
    for key in KEYS:
        found = checkpoint[dtype].slice(key, "numpy")
        assert same(found, arrays[dtype][key]), key


def test_slices_at_random(checkpoint: Any, arrays: dict[str, Any]) -> None:
    random = np.random.default_rng(5)

    def one(extent: int) -> Any:
        if random.random() < 0.2:
            return int(random.integers(-extent, extent))
        bounds = [None if random.random() < 0.2 else int(random.integers(-9, 9)) for _ in "ab"]
        return slice(*bounds, int(random.choice([-3, -2, -1, 1, 2, 3])))

    for dtype, _ in itertools.product(("F32", "BF16", "F4", "F6_E3M2", "BOOL"), range(60)):
        key = tuple(one(extent) for extent in SHAPE[: random.integers(1, 4)])
        assert same(checkpoint[dtype].slice(key, "numpy"), arrays[dtype][key]), (dtype, key)


def test_torch_slices(checkpoint: Any) -> None:
    whole = checkpoint["BF16"].torch()
    for key in (0, slice(None, None, -2), (..., 1), (slice(1, 3), slice(None), slice(0, 8, 2))):
        expected = whole.float().numpy()[key]
        assert np.array_equal(checkpoint["BF16"].slice(key, "torch").float().numpy(), expected)
    assert isinstance(checkpoint["F32"][0], torch.Tensor)
    packed = checkpoint["F4"].torch().view(torch.uint8)
    part = checkpoint["F4"].slice((slice(1, 3), slice(None), slice(2, 6)), "torch")
    assert torch.equal(part.view(torch.uint8), packed[1:3, :, 1:3])
    with pytest.raises(tonnage.SliceError, match="inside a byte"):
        checkpoint["F4"].slice((..., slice(1, 3)), "torch")


@pytest.mark.parametrize("key", [4, -5, (0, 6), (0, 0, 0, 0), (..., ..., 0), slice(None, None, 0)])
def test_keys_that_do_not_fit(checkpoint: Any, key: Any) -> None:
    with pytest.raises(tonnage.SliceError) as caught:
        checkpoint["F32"][key]
    assert isinstance(caught.value, IndexError)
    assert (caught.value.code, caught.value.tensor) == ("SLICE", "F32")


@pytest.mark.parametrize("key", ["a", None, True, [0, 1], np.array([0, 1]), 1.5, slice("a", "b")])
def test_keys_of_another_kind(checkpoint: Any, key: Any) -> None:
    with pytest.raises(TypeError):
        checkpoint["F32"][key]


def test_a_slice_reads_only_its_bytes() -> None:
    rows = 1 << 12
    data = content({"w": ("F32", [rows, 256], bytes(rows * 1024)), "v": ("U8", [2], b"ab")})
    source = Counting(data)
    ref = tonnage.open(source)["w"]
    source.taken = 0
    assert ref[17].shape == (256,)
    assert source.taken == 1024
    source.taken = 0
    assert ref[100:200].shape == (100, 256)
    assert source.taken == 100 * 1024
    source.taken = 0
    assert ref[:, 3].shape == (rows,)
    # One column: runs that lie close together are read together, and never more than the tensor.
    assert source.taken <= rows * 1024
    source.taken = 0
    assert ref[::1024, 0:4].shape == (4, 4)
    assert source.taken <= 4 * (16 << 10)


def test_nothing_is_read_until_asked() -> None:
    source = Counting(content({"w": ("F32", [1 << 16], bytes(4 << 16))}))
    checkpoint = tonnage.open(source)
    source.taken = 0
    ref = checkpoint["w"]
    shown = repr(ref) + repr(checkpoint) + checkpoint._repr_html_()
    assert "F32" in shown
    assert ref.shape == (1 << 16,)
    assert source.taken == 0


def test_views_are_private_and_share_pages(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = write_model(path)
    before = path.read_bytes()
    checkpoint = tonnage.open(path)
    first = checkpoint["embed.weight"].view("numpy")
    second = checkpoint["embed.weight"].view("torch")
    assert same(first, tensors["embed.weight"])
    first[0, 0] = 42
    assert second[0, 0] == 42
    assert path.read_bytes() == before
    del checkpoint
    assert first[0, 0] == 42
    # Bytes that Python may not change are viewed read-only by NumPy and copied for PyTorch.
    held = tonnage.open(before)
    assert not held["embed.weight"].view("numpy").flags.writeable
    held["embed.weight"].view("torch")[0, 0] = 1
    assert same(held["embed.weight"].numpy(), tensors["embed.weight"])


def test_misaligned_tensors_are_read_where_they_cannot_be_viewed(tmp_path: Path) -> None:
    data = content({"a": ("U8", [1], b"x"), "b": ("F32", [2], np.float32([1, 2]).tobytes())})
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    ref = tonnage.open(path)["b"]
    assert ref.offset % 4 == 1
    assert ref.view("torch").tolist() == ref.view("numpy").tolist() == [1.0, 2.0]


def test_numpys_and_dlpacks_protocols(checkpoint: Any, arrays: dict[str, Any]) -> None:
    ref = checkpoint["F32"]
    assert same(np.array(ref), arrays["F32"])
    assert np.asarray(ref, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="view"):
        ref.__array__(copy=False)
    assert ref.__dlpack_device__() == (1, 0)
    assert same(torch.from_dlpack(ref).numpy(), arrays["F32"])
    assert same(np.from_dlpack(checkpoint["I64"]), arrays["I64"])
    with pytest.raises(BufferError):
        checkpoint["BF16"].__dlpack__()


def test_jax(checkpoint: Any, arrays: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    for dtype in ("F32", "BF16", "I32", "F8_E4M3", "BOOL"):
        array = checkpoint[dtype].jax()
        assert isinstance(array, jax.Array)
        assert same(np.asarray(array), arrays[dtype])
    part = checkpoint["F32"].slice((slice(None, None, -2), 1), "jax")
    assert same(np.asarray(part), arrays["F32"][::-2, 1])


def test_unknown_frameworks_and_dtypes(checkpoint: Any) -> None:
    with pytest.raises(tonnage.UsageError, match="caffe"):
        checkpoint["F32"].read("caffe")
    strange = tonnage.open(content({"w": ("F128", [1], bytes(16))}))
    assert strange["w"].dtype == "F128"
    assert strange["w"].nbytes == 16
    for use in (strange["w"].numpy, strange["w"].view, lambda: strange["w"][0], strange.load):
        with pytest.raises(tonnage.UnsupportedError) as caught:
            use()
        assert (caught.value.code, caught.value.clause) == ("UNSUPPORTED_DTYPE", "5.2")


def test_a_truncated_file_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path)
    checkpoint = tonnage.open(path)
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size - 700)
    with pytest.raises(tonnage.StorageError) as caught:
        checkpoint.load(framework="numpy")
    assert caught.value.file == str(path)
    with pytest.raises(tonnage.UsageError, match="shorter"):
        checkpoint["embed.weight"].view()
