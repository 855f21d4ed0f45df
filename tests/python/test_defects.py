"""The reference package's known defects, each as a claim that Tonnage gets it right.

The release meant is 0.8.0. Numbers are issues of `safetensors/safetensors`. What concerns a
framework other than NumPy and PyTorch stands in `frameworks/`.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tonnage
import tonnage.numpy
import tonnage.torch
import torch
from tonnage import SafetensorError, TensorSpec, safe_open

F4 = torch.float4_e2m1fn_x2


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# ---- what is written is what was there ------------------------------------------------------

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": lambda a: a.T,
    "strided": lambda a: a[::2, ::3],
    "reversed": lambda a: a[::-1],
    "fortran": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a[:1], (5, a.shape[1])),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "big-endian transposed": lambda a: a.astype(a.dtype.newbyteorder(">")).T,
    "scalar": lambda a: a[0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "int16", "complex64", "bfloat16"])
def test_numpy_arrays_of_any_memory_order_are_saved_right(
    layout: str, dtype: str, path: Path
) -> None:  # 825
    array = LAYOUTS[layout](np.arange(24).reshape(4, 6).astype(np.dtype(dtype)))
    tonnage.numpy.save_file({"a": array}, path)
    for loaded in (tonnage.numpy.load_file(path)["a"], tonnage.numpy.load(path.read_bytes())["a"]):
        assert loaded.shape == array.shape
        assert (loaded == array).all()


def test_conjugated_and_negated_views_are_saved_as_what_they_show(path: Path) -> None:
    conj = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    neg = torch.tensor([5 + 6j], dtype=torch.complex64).conj().imag
    assert conj.is_conj()
    assert conj.is_contiguous()
    assert neg.is_neg()
    assert neg.is_contiguous()
    tensors = {"conj": conj, "neg": neg}
    tonnage.torch.save_file(tensors, path)
    for loaded in (tonnage.torch.load_file(path), tonnage.torch.load(tonnage.torch.save(tensors))):
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor.resolve_conj().resolve_neg()), name


# ---- the file ------------------------------------------------------------------------------


def test_new_files_follow_the_umask_and_old_ones_keep_their_mode(path: Path) -> None:  # 782
    before = os.umask(0o027)
    try:
        tonnage.torch.save_file({"a": torch.zeros(2)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o664)
        tonnage.torch.save_file({"a": torch.ones(2)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o664
    finally:
        os.umask(before)


def test_a_symlink_is_written_through(tmp_path: Path) -> None:  # 782
    target, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    tonnage.numpy.save_file({"a": np.zeros(2)}, target)
    link.symlink_to(target.name)
    tonnage.numpy.save_file({"a": np.ones(2)}, link)
    assert link.is_symlink()
    assert (tonnage.numpy.load_file(target)["a"] == 1).all()
    assert sorted(os.listdir(tmp_path)) == ["link.safetensors", "real.safetensors"]


@pytest.mark.parametrize("metadata", [None, {}, {"a": "b"}])
def test_a_file_without_tensors_can_be_read(metadata: dict[str, str] | None, path: Path) -> None:
    content = tonnage.torch.save({}, metadata=metadata)
    assert tonnage.torch.load(content) == {}
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        assert file.keys() == []
        assert file.metadata() == metadata


def test_a_tensor_may_not_take_the_name_of_the_metadata(path: Path) -> None:
    with pytest.raises(SafetensorError, match="__metadata__") as caught:
        tonnage.numpy.save_file({"__metadata__": np.zeros(2)}, path)
    assert caught.value.code == "WRITE_RESERVED_NAME"
    assert not path.exists()
    assert os.listdir(path.parent) == []


def test_equal_input_gives_equal_bytes() -> None:  # 584
    keys = [f"key {i}" for i in range(50)]
    tensors = {"a": np.zeros(3), "b": np.ones(3)}
    one = tonnage.numpy.save(tensors, metadata={key: key for key in keys})
    two = tonnage.numpy.save(
        dict(reversed(tensors.items())), metadata={key: key for key in reversed(keys)}
    )
    assert one == two


def test_saving_onto_the_file_that_the_tensors_view_keeps_both(path: Path) -> None:  # 762
    tonnage.torch.save_file({"a": torch.arange(1000)}, path)
    loaded = tonnage.torch.load_file(path)
    loaded["a"][0] = 7
    tonnage.torch.save_file(loaded, path)
    assert loaded["a"][:3].tolist() == [7, 1, 2]
    assert tonnage.torch.load_file(path)["a"][:3].tolist() == [7, 1, 2]


# ---- dtypes ---------------------------------------------------------------------------------


def packed_tensors() -> dict[str, torch.Tensor]:
    raw = torch.arange(16, dtype=torch.uint8)
    return {
        "F4": raw.view(2, 8).view(F4),
        "F8_E8M0": raw.view(4, 4).view(torch.float8_e8m0fnu),
        "F8_E4M3": raw.view(torch.float8_e4m3fn),
        "F8_E5M2": raw.clone().view(torch.float8_e5m2),
        "F8_E4M3FNUZ": raw.clone().view(torch.float8_e4m3fnuz),
        "F8_E5M2FNUZ": raw.clone().view(torch.float8_e5m2fnuz),
    }


@pytest.mark.parametrize("name", packed_tensors())
def test_torch_loads_small_dtypes_from_bytes_and_by_both_backends(name: str, path: Path) -> None:
    tensor = packed_tensors()[name]
    content = tonnage.torch.save({"t": tensor})
    path.write_bytes(content)
    for loaded in (
        tonnage.torch.load(content),
        tonnage.torch.load_file(path),
        tonnage.torch.load_file(path, backend="pread"),
    ):
        assert loaded["t"].dtype == tensor.dtype
        assert loaded["t"].shape == tensor.shape
        assert as_bytes(loaded["t"]) == as_bytes(tensor)


def test_f4_slices_work_on_both_backends_and_end_on_bytes(path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.uint8).view(3, 4).view(F4)  # 3 rows of 8 elements
    tonnage.torch.save_file({"t": tensor}, path)
    raw = tensor.view(torch.uint8)
    for backend in ("mmap", "pread"):
        with safe_open(path, "pt", backend=backend) as file:
            taken = file.get_slice("t")
            assert taken.get_shape() == [3, 8]
            assert as_bytes(taken[:]) == as_bytes(tensor)
            assert as_bytes(taken[1:, 2:6]) == raw[1:, 1:3].contiguous().numpy().tobytes()
            assert as_bytes(taken[-1]) == raw[-1].numpy().tobytes()
            assert taken[1:, 2:6].shape == (2, 2)
            with pytest.raises(SafetensorError, match="does not end up at a byte boundary") as no:
                taken[:, 1:3]
            assert (no.value.code, no.value.tensor) == ("PARTIAL_BYTE", "t")


NUMPY_EXTRA = [
    "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn",
]  # fmt: skip


@pytest.mark.parametrize("name", NUMPY_EXTRA)
def test_numpy_has_the_dtypes_of_ml_dtypes_in_every_way(name: str, path: Path) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = 8 * dtype.itemsize if "float4" not in name and "float6" not in name else int(name[5])
    raw = (np.arange(24) % min(1 << bits, 24)).astype(f"u{dtype.itemsize}")
    array = raw.view(dtype).reshape(3, 8)
    content = tonnage.numpy.save({"a": array})
    tonnage.numpy.save_file({"a": array.T}, path)
    header_end = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header_end == 24 * bits // 8
    for loaded, expected in (
        (tonnage.numpy.load(content), array),
        (tonnage.numpy.load_file(path), array.T),
        (tonnage.numpy.load_file(path, backend="pread"), array.T),
    ):
        assert loaded["a"].dtype == dtype
        assert loaded["a"].tobytes() == expected.tobytes()
    with safe_open(path, "np") as file:
        assert file.get_slice("a")[4:8].tobytes() == array.T[4:8].tobytes()


def test_numpy_and_torch_agree_on_the_nibbles_of_f4() -> None:
    array = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).reshape(2, 8)
    packed = tonnage.torch.load(tonnage.numpy.save({"a": array}))["a"]
    low = packed.view(torch.uint8) & 15
    high = packed.view(torch.uint8) >> 4
    assert torch.stack([low, high], -1).flatten().tolist() == list(range(16))


# ---- slices ---------------------------------------------------------------------------------


def bytes_read() -> int:
    with open("/proc/self/io") as counters:
        return int(counters.readline().split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts bytes in /proc")
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_one_row_by_pread_reads_one_row(framework: str, path: Path) -> None:
    array = np.arange(1 << 20, dtype=np.float32).reshape(256, 4096)
    tonnage.numpy.save_file({"a": array}, path)
    with safe_open(path, framework, backend="pread") as file:
        rows = file.get_slice("a")
        rows[0:1]  # whatever the framework reads on first use
        noise = -bytes_read() + bytes_read()
        before = bytes_read()
        row = rows[100:101]
        read = bytes_read() - before - noise
    assert np.array_equal(np.asarray(row), array[100:101])
    assert read == row.nbytes == 4096 * 4


SLICES: list[Any] = [
    np.s_[5:3], np.s_[10:10], np.s_[-2:], np.s_[:-1], np.s_[-3:-1], np.s_[:, -2:], np.s_[3:3, 1],
    np.s_[..., 1:], np.s_[1, ...], np.s_[::2], np.s_[1::3, ::2], np.s_[-1, -1], np.s_[-1],
    np.s_[...], np.s_[-100:2], np.s_[2:, 3:1], np.s_[np.int64(2)], (), np.s_[9:10, 4:5],
]  # fmt: skip


@pytest.mark.parametrize("key", SLICES, ids=str)
def test_slices_are_numpys_on_every_framework_and_backend(key: Any, path: Path) -> None:
    array = np.arange(50, dtype=np.float32).reshape(10, 5)
    tonnage.numpy.save_file({"a": array}, path)
    for framework in ("pt", "np"):
        for backend in ("mmap", "pread"):
            with safe_open(path, framework, backend=backend) as file:
                taken = np.asarray(file.get_slice("a")[key])
            assert taken.shape == array[key].shape
            assert np.array_equal(taken, array[key])


def test_zero_length_axes_can_be_sliced(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.zeros((3, 0, 2), np.int16)}, path)
    for framework in ("pt", "np"):
        for backend in ("mmap", "pread"):
            with safe_open(path, framework, backend=backend) as file:
                taken = file.get_slice("a")
                assert tuple(taken[:].shape) == (3, 0, 2)
                assert tuple(taken[1:, :, 0].shape) == (2, 0)
                assert tuple(taken[:, 0:0].shape) == (3, 0, 2)


def test_a_bool_is_no_index_where_the_framework_has_no_masks(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.zeros((3, 2))}, path)
    with safe_open(path, "np") as file:
        with pytest.raises(SafetensorError, match="Unsupported slice index at position 0"):
            file.get_slice("a")[True]


@pytest.mark.parametrize(
    "key", [np.s_[3:100], np.s_[100:], [1, 2], None, torch.tensor([True] * 10)]
)
def test_torch_slices_are_torchs_on_both_backends(key: Any, path: Path) -> None:
    tensor = torch.arange(50).reshape(10, 5)
    tonnage.torch.save_file({"a": tensor}, path)
    for backend in ("mmap", "pread"):
        with safe_open(path, "pt", backend=backend) as file:
            assert torch.equal(file.get_slice("a")[key], tensor[key])


# ---- errors and arguments -------------------------------------------------------------------


def in_child(check: Callable[[], str]) -> str:
    """What `check` returns in a process without root's rights."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            os.write(writer, check().encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/") and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    secret = tmp_path / "secret.safetensors"
    tonnage.numpy.save_file({"a": np.zeros(1)}, secret)
    secret.chmod(0)

    def check() -> str:
        try:
            safe_open(secret, "np")
        except OSError as error:
            return f"{type(error).__name__} {error.errno} {error}"
        return "opened"

    assert in_child(check) == f"PermissionError 13 Permission denied: {secret}"


def test_what_cannot_be_opened_is_called_what_it_is(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught:
        safe_open(missing, "np")
    assert str(caught.value) == f"No such file or directory: {missing}"
    with pytest.raises(IsADirectoryError):
        safe_open(tmp_path, "np")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        safe_open(tmp_path / "file" / "inner", "np")


def test_a_file_that_shrinks_is_an_error_and_not_a_signal(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.zeros(1 << 16), "b": np.zeros(4)}, path)
    for framework, backend in (("np", "mmap"), ("np", "pread"), ("pt", "pread")):
        content = path.read_bytes()
        with safe_open(path, framework, backend=backend) as file:
            os.truncate(path, 5000)
            with pytest.raises(
                SafetensorError, match="Could not read tensor a from file"
            ) as caught:
                file.get_tensor("a")
            assert isinstance(caught.value, OSError)
            assert (caught.value.code, caught.value.tensor) == ("IO", "a")
            assert caught.value.file == str(path)
        path.write_bytes(content)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3)
        self.b = self.a


def test_save_model_leaves_the_callers_metadata_alone_and_load_model_returns_lists(
    path: Path,
) -> None:
    metadata = {"format": "pt"}
    tonnage.torch.save_model(Tied(), str(path), metadata=metadata)
    assert metadata == {"format": "pt"}
    with safe_open(path, "pt") as file:
        expected = {"format": "pt", "b.bias": "a.bias", "b.weight": "a.weight"}
        assert file.metadata() == expected
    assert tonnage.torch.load_model(Tied(), path) == ([], [])
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    missing, unexpected = tonnage.torch.load_model(other, path, strict=False)
    assert (missing, sorted(unexpected)) == (["0.bias", "0.weight"], ["a.bias", "a.weight"])
    text = r'in loading state_dict for Sequential:\n    Missing key\(s\) in state_dict: "0.bias"'
    with pytest.raises(RuntimeError, match=text):
        tonnage.torch.load_model(other, path)


def test_a_tensor_that_covers_two_others_is_the_one_that_is_kept() -> None:
    whole = torch.zeros(10)
    state = {"a": whole, "b": whole[:2], "c": whole[4:6]}
    assert tonnage.torch._remove_duplicate_names(state) == {"a": ["b", "c"]}


def test_a_spec_with_the_wrong_length_is_refused(path: Path) -> None:
    array = np.zeros(4, np.float32)
    address = array.__array_interface__["data"][0]
    short = TensorSpec(dtype="float32", shape=[4], data_ptr=address, data_len=15)
    null = TensorSpec(dtype="float32", shape=[4], data_ptr=0, data_len=16)
    for spec in (short, null):
        with pytest.raises(SafetensorError, match="Error while serializing") as caught:
            tonnage.serialize({"a": spec})
        assert (caught.value.code, caught.value.tensor) == ("WRITE_SIZE", "a")
        with pytest.raises(SafetensorError):
            tonnage.serialize_file({"a": spec}, path)
    assert os.listdir(path.parent) == []
