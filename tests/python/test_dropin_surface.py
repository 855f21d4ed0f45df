"""The drop-in has the reference's names, signatures and bytes."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import tonnage
import tonnage.numpy
import tonnage.torch
import torch
from tonnage import SafetensorError, TensorSpec, _native, safe_open


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# ---- names and signatures -------------------------------------------------------------------


@pytest.mark.parametrize("module", ["numpy", "torch"])
def test_every_function_of_the_reference_is_there_with_its_signature(module: str) -> None:
    theirs = importlib.import_module(f"safetensors.{module}")
    ours = importlib.import_module(f"tonnage.{module}")
    functions = inspect.getmembers(theirs, inspect.isfunction)
    assert len(functions) > 6
    for name, function in functions:
        expected = inspect.signature(function).parameters
        found = inspect.signature(getattr(ours, name)).parameters
        for parameter in expected.values():
            same = found[parameter.name]
            assert (same.kind, same.default) == (parameter.kind, parameter.default), name
        # What we add is keyword-only or comes with a default: old calls mean what they meant.
        for extra in found.keys() - expected.keys():
            assert found[extra].default is not inspect.Parameter.empty, (name, extra)


def test_every_name_of_the_reference_package_is_there() -> None:
    public = {name for name in dir(safetensors) if not name.startswith("__")}
    assert public - {"numpy", "torch", "_safetensors_rust"} <= set(dir(tonnage))
    for name in ("_safe_open_handle", "safe_open"):
        theirs, ours = getattr(safetensors, name), getattr(tonnage, name)
        methods = {name for name in dir(theirs) if not name.startswith("__")}
        assert methods <= set(dir(ours))
    assert safe_open.__module__ == safetensors.safe_open.__module__ == "builtins"
    assert not hasattr(safe_open, "__iter__")


def test_private_names_that_packages_import_from_the_torch_module() -> None:
    module, tensor = tonnage.torch, torch.arange(4, dtype=torch.int16)
    assert module._TYPES["BF16"] is module._getdtype("BF16") is torch.bfloat16
    assert {name: module._TYPES[name] for name in safetensors.torch._TYPES} == (
        safetensors.torch._TYPES
    )
    assert {dtype: module._SIZE[dtype] for dtype in safetensors.torch._SIZE} == (
        safetensors.torch._SIZE
    )
    assert module._tobytes(tensor, "t") == tensor.numpy().tobytes()
    data, owner = module._to_ndarray(tensor)
    assert (data.nbytes, owner.data_ptr()) == (8, tensor.data_ptr())
    assert module._flatten({"t": tensor})["t"] == {
        "dtype": "int16", "shape": (4,), "data": tensor.numpy().tobytes(),
    }  # fmt: skip
    keep: list[Any] = []
    specs = module._flatten_as_ptr(
        {"t": tensor, "c": torch.zeros(1, dtype=torch.cfloat).conj()}, keep
    )
    assert specs["t"].data_ptr == tensor.data_ptr()
    assert keep
    content = tonnage.serialize(specs)
    assert torch.equal(module._view2torch(tonnage.deserialize(content))["t"], tensor)
    module._evaluate_tensors_for_save({"t": tensor})


def test_private_names_of_the_numpy_module() -> None:
    module, array = tonnage.numpy, np.arange(4, dtype=">i2")
    assert module._getdtype("I16") is np.int16
    assert module._getdtype("BF16").name == "bfloat16"
    assert not module._is_little_endian(array)
    assert module._is_little_endian(array.astype("<i2"))
    keep: list[Any] = []
    content = tonnage.serialize(module._flatten({"a": array, "b": np.zeros(2)}, keep))
    assert module._view2np(tonnage.deserialize(content))["a"].tolist() == [0, 1, 2, 3]


# ---- bytes ----------------------------------------------------------------------------------

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 4), (0, 5), (2, 1, 3, 2), (1, 0), (17,)]


def every_dtype_and_shape() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in TORCH_DTYPES:
        for shape in SHAPES:
            if dtype is torch.float4_e2m1fn_x2 and not shape:
                continue  # half a byte has no form
            nbytes = int(np.prod(shape)) * dtype.itemsize
            raw = torch.randint(0, 2, (nbytes,), generator=generator, dtype=torch.uint8)
            view = raw.view(dtype) if nbytes else torch.empty(0, dtype=dtype)
            tensors[f'{dtype} {shape} \u00e9\n"\\/'] = view.reshape(shape)
    return tensors


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt \u00fc\u2028"}])
def test_bytes_are_the_references(metadata: dict[str, str] | None, path: Path) -> None:
    tensors = every_dtype_and_shape()
    content = tonnage.torch.save(tensors, metadata)
    assert content == safetensors.torch.save(tensors, metadata)
    tonnage.torch.save_file(tensors, path, metadata)
    assert path.read_bytes() == content
    tonnage.torch.save_file(tensors, path, metadata, fsync=False)
    assert path.read_bytes() == content


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_every_dtype_and_shape_comes_back(backend: str, path: Path) -> None:
    tensors = every_dtype_and_shape()
    path.write_bytes(safetensors.torch.save(tensors))
    for loaded in (
        tonnage.torch.load_file(path, backend=backend),
        tonnage.torch.load(path.read_bytes()),
    ):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            got = loaded[name]
            assert (got.dtype, got.shape, got.device.type) == (tensor.dtype, tensor.shape, "cpu")
            assert got.is_contiguous()
            if got.numel():
                raw = [t.reshape(-1).view(torch.uint8) for t in (got, tensor)]
                assert torch.equal(*raw), name


def test_many_small_and_some_large_tensors_share_reads_and_writes(path: Path) -> None:
    arrays = {f"small {i}": np.full(i % 7, i, np.float32) for i in range(3000)}
    arrays |= {f"large {i}": np.arange(100_000 + i, dtype=np.float64) for i in range(3)}
    tonnage.numpy.save_file(arrays, path)
    assert path.read_bytes() == safetensors.numpy.save(arrays)
    for backend in ("mmap", "pread"):
        loaded = tonnage.numpy.load_file(path, backend=backend)
        assert loaded.keys() == arrays.keys()
        assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)


# ---- what loading gives ---------------------------------------------------------------------


def test_mapped_tensors_are_private_shared_and_no_larger_than_themselves(path: Path) -> None:
    tonnage.torch.save_file({"a": torch.arange(8), "b": torch.ones(3)}, path)
    before = path.read_bytes()
    with safe_open(path, "pt") as file:
        one, two = file.get_tensor("a"), file.get_tensor("a")
        row = file.get_slice("a")[2:4]
    one[2] = 99
    assert two[2] == row[0] == 99
    assert path.read_bytes() == before
    assert one.untyped_storage().nbytes() == 64
    assert tonnage.torch._is_complete(one)
    assert tonnage.torch.load_file(path)["a"][2] == 2


def test_arrays_are_writable_and_of_their_own(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.arange(8)}, path)
    one, two = tonnage.numpy.load_file(path)["a"], tonnage.numpy.load_file(path)["a"]
    one[0] = 5
    assert two[0] == 0
    assert one.flags.writeable


def test_tensors_outlive_file_and_handle(path: Path) -> None:
    tonnage.torch.save_file({"a": torch.arange(100_000)}, path)
    tensor = tonnage.torch.load_file(path)["a"]
    with safe_open(path, "pt") as file:
        part = file.get_slice("a")
    path.unlink()
    assert int(tensor.sum()) == sum(range(100_000))
    assert part[-1] == 99_999


def test_meta_tensors_cost_no_bytes(path: Path) -> None:
    tonnage.torch.save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, path)
    for device in ("meta", torch.device("meta")):
        with safe_open(path, "pt", device=device) as file:
            for tensor in (file.get_tensor("a"), file.get_tensors()["a"]):
                assert (tensor.device.type, tensor.shape) == ("meta", (2, 3))
                assert tensor.dtype == torch.bfloat16
            assert file.get_slice("a")[:, :2].shape == (2, 2)


def test_get_tensor_meta_says_what_the_header_says(path: Path) -> None:
    tonnage.torch.save_file({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.int8)}, path)
    with safe_open(path, "pt") as file:
        meta = file.get_tensor_meta("b")
        assert (meta.dtype, meta.shape, meta.data_offsets) == ("I8", [1], (24, 25))
        assert repr(meta) == "TensorMeta(dtype='I8', shape=[1], data_offsets=(24, 25))"
        with pytest.raises(SafetensorError, match="File does not contain tensor c"):
            file.get_tensor_meta("c")


def test_keys_are_sorted_and_offset_keys_follow_the_file(path: Path) -> None:
    tensors = {"b": torch.zeros(1), "a": torch.zeros(1), "z": torch.zeros(1, dtype=torch.int64)}
    tonnage.torch.save_file(tensors, path)
    with safe_open(path, "pt") as file:
        assert file.keys() == ["a", "b", "z"]
        assert file.offset_keys() == ["z", "a", "b"]
        assert list(file.get_tensors()) == ["z", "a", "b"]
        assert file.metadata() is None
    assert [name for name, _ in tonnage.deserialize(path.read_bytes())] == ["z", "a", "b"]


def test_a_file_object_is_opened_by_its_name(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.ones(2)}, path)
    with open(path, "rb") as stream, tonnage._safe_open_handle(stream, "np") as file:
        assert file.keys() == file.offset_keys() == ["a"]
        assert file.get_tensor("a").tolist() == [1, 1]
        assert file.get_tensors()["a"].tolist() == [1, 1]
        assert file.get_slice("a")[1:].tolist() == [1]
        assert file.metadata() is None
    with pytest.raises(AttributeError):
        tonnage._safe_open_handle(object(), "np")


def test_framework_names(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.ones(2)}, path)
    for name in ("pt", "torch", "pytorch"):
        assert isinstance(safe_open(path, name).get_tensor("a"), torch.Tensor)
    for name in ("np", "numpy"):
        assert isinstance(safe_open(path, name).get_tensor("a"), np.ndarray)


# ---- threads, processes, imports ------------------------------------------------------------


def test_one_handle_serves_many_threads(path: Path) -> None:
    arrays = {f"t{i}": np.full((64, 64), i) for i in range(64)}
    tonnage.numpy.save_file(arrays, path)
    for framework in ("np", "pt"):
        for backend in ("mmap", "pread"):
            with safe_open(path, framework, backend=backend) as file:

                def check(i: int, file: Any = file) -> bool:
                    name = f"t{i % 64}"
                    whole, row = file.get_tensor(name), file.get_slice(name)[i % 64]
                    return bool((whole == i % 64).all()) and bool((row == i % 64).all())

                with ThreadPoolExecutor(8) as pool:
                    assert all(pool.map(check, range(512)))


def test_closing_while_others_read_is_safe(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.ones((256, 256))}, path)
    for _ in range(20):
        file = safe_open(path, "pt")
        start = threading.Barrier(4)
        outcomes: list[object] = []

        def read(
            file: Any = file, start: threading.Barrier = start, outcomes: list[object] = outcomes
        ) -> None:
            start.wait()
            for _ in range(50):
                try:
                    outcomes.append(float(file.get_tensor("a").sum()))
                except SafetensorError as error:
                    outcomes.append(str(error))

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        start.wait()
        file.__exit__(None, None, None)
        for thread in threads:
            thread.join()
        assert len(outcomes) == 150
        assert set(outcomes) <= {65536.0, "File is closed"}


def test_saving_releases_the_gil(path: Path) -> None:
    array = np.zeros(1 << 25, np.uint8)
    done = threading.Event()
    counted = 0

    def save() -> None:
        for i in range(4):
            tonnage.numpy.save_file({"a": array}, path.with_name(f"{i}.st"), fsync=False)
        done.set()

    thread = threading.Thread(target=save)
    thread.start()
    while not done.is_set():
        counted += 1
    thread.join()
    # With the GIL held through each save the loop would come round a few times only.
    assert counted > 100


def test_importing_tonnage_imports_no_framework() -> None:
    code = (
        "import sys, tonnage\n"
        "names = {'numpy', 'torch', 'jax', 'tensorflow', 'mlx', 'paddle', 'tqdm', 'ml_dtypes'}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_can_be_pickled_and_keep_what_they_know(path: Path) -> None:
    path.write_bytes(b"123")
    with pytest.raises(SafetensorError) as caught:
        safe_open(path, "np")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is SafetensorError
    assert (str(copy), copy.code, copy.file) == (str(caught.value), "FILE_TOO_SMALL", str(path))
    importlib.import_module(SafetensorError.__module__)
    for name in dir(_native):
        if name.startswith("Safetensor"):
            assert type(pickle.loads(pickle.dumps(getattr(_native, name)("text")))).__name__ == name


# ---- TensorSpec -----------------------------------------------------------------------------


def test_a_tensor_spec_shows_what_it_was_given() -> None:
    spec = TensorSpec(dtype="float32", shape=[2, 3], data_ptr=7, data_len=24)
    assert repr(spec) == "TensorSpec(dtype='F32', shape=[2, 3], data_ptr=7, data_len=24)"
    assert (spec.dtype, spec.shape, spec.data_ptr, spec.data_len) == ("F32", [2, 3], 7, 24)
    assert TensorSpec(dtype="float4_e2m1fn_x2", shape=[2, 3], data_ptr=0, data_len=6).shape == [
        2,
        6,
    ]
    with pytest.raises(AttributeError):
        spec.shape = [1]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", ["F32", "nonsense", "complex128", "str"])
def test_a_tensor_spec_refuses_dtypes_it_does_not_know(dtype: str) -> None:
    text = f'Unknown dtype "{dtype}". Supported dtypes: bool, '
    with pytest.raises(SafetensorError, match=text) as caught:
        TensorSpec(dtype=dtype, shape=[1], data_ptr=0, data_len=0)
    assert isinstance(caught.value, ValueError)


def test_serialize_takes_specs_and_a_path(path: Path) -> None:
    array = np.arange(3, dtype=np.float32)
    spec = TensorSpec(
        dtype="float32", shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
    )
    content = tonnage.serialize({"a": spec}, metadata={"k": "v"})
    assert content == safetensors.numpy.save({"a": array}, {"k": "v"})
    tonnage.serialize_file({"a": spec}, os.fspath(path), {"k": "v"}, fsync=False)
    assert path.read_bytes() == content
    with pytest.raises(TypeError):
        tonnage.serialize({"a": {"dtype": "float32"}})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        tonnage.serialize_file({"a": spec}, bytes(path))  # type: ignore[arg-type]
    for wrong in (bytearray(content), memoryview(content), "text"):
        with pytest.raises(TypeError):
            tonnage.deserialize(wrong)  # type: ignore[arg-type]
        if not isinstance(wrong, str):  # which is a path to `load`
            with pytest.raises(TypeError):
                tonnage.torch.load(wrong)  # type: ignore[arg-type]


def test_a_tensor_that_cannot_be_copied_leaves_no_file(path: Path) -> None:
    meta = torch.zeros(2, device="meta")
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        tonnage.torch.save_file({"a": torch.zeros(3), "m": meta}, path)
    assert os.listdir(path.parent) == []


def test_tensors_are_fetched_one_at_a_time_in_the_order_of_the_file(path: Path) -> None:
    import gc
    import weakref

    alive: list[int] = []
    handed: list[weakref.ref[Any]] = []
    names: list[str] = []

    def fetch(name: str) -> tuple[TensorSpec, object]:
        gc.collect()
        alive.append(sum(ref() is not None for ref in handed))
        names.append(name)
        array = np.full(4, ord(name), np.float32)
        handed.append(weakref.ref(array))
        return spec_of(array.ctypes.data), array

    def spec_of(address: int) -> TensorSpec:
        return TensorSpec(dtype="float32", shape=[4], data_ptr=address, data_len=16)

    here = np.full(4, 1, np.float32)
    specs = {"c": spec_of(0), "b": spec_of(here.ctypes.data), "a": spec_of(0), "d": spec_of(0)}
    _native._write_tensors(specs, fetch, path, None, True)
    assert names == ["a", "c", "d"]
    assert alive == [0, 0, 0]
    loaded = tonnage.numpy.load_file(path)
    assert {name: array[0] for name, array in loaded.items()} == {
        "a": 97,
        "b": 1,
        "c": 99,
        "d": 100,
    }
