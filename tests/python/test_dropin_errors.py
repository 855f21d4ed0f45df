"""Messages start with the reference's words, and say more; exceptions carry codes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import tonnage
import tonnage.numpy
import tonnage.torch
import torch
from tonnage import SafetensorError, _native, safe_open


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def f32(begin: int, end: int, count: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [count], "data_offsets": [begin, end]}


BAD: dict[str, bytes] = {
    "FILE_TOO_SMALL": b"1234567",
    "HEADER_TOO_LARGE": (100_000_001).to_bytes(8, "little") + b"{}",
    "HEADER_PAST_END": (100).to_bytes(8, "little") + b"{}",
    "INVALID_UTF8": file_of(b'{"\xff":{}}'),
    "JSON_SYNTAX": file_of(b'{"a" {}}'),
    "OFFSETS_REVERSED": file_of({"a": f32(4, 0, 1)}, b"0000"),
    "HOLE": file_of({"a": f32(4, 8, 1)}, b"00000000"),
    "SIZE_MISMATCH": file_of({"a": f32(0, 4, 2)}, b"0000"),
    "SIZE_OVERFLOW": file_of({"a": {"dtype": "U8", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
    "DATA_TRUNCATED": file_of({"a": f32(0, 8, 2)}, b"0000"),
    "TRAILING_DATA": file_of({"a": f32(0, 4, 1)}, b"00000"),
    "PARTIAL_BYTE": file_of({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}}),
}


@pytest.mark.parametrize("code", BAD)
def test_a_bad_file_is_refused_with_the_references_words_first(code: str, path: Path) -> None:
    path.write_bytes(BAD[code])
    with pytest.raises(safetensors.SafetensorError) as theirs:
        safetensors.safe_open(path, "np")
    for framework in ("np", "pt"):
        with pytest.raises(SafetensorError) as ours:
            safe_open(path, framework)
        # Theirs without what their JSON and UTF-8 parsers add.
        words = str(theirs.value).split(": ", 2)
        assert str(ours.value).startswith(": ".join(words[:2]))
        assert (ours.value.code, ours.value.file) == (code, str(path))
        assert ours.value.clause
        assert str(path) in str(ours.value)
    with pytest.raises(SafetensorError, match="Error while deserializing: ") as from_bytes:
        tonnage.deserialize(BAD[code])
    assert from_bytes.value.code == code
    with pytest.raises(SafetensorError, match="Error while deserializing: "):
        tonnage.torch.load(BAD[code])


def test_duplicate_names_are_refused_by_default(path: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    path.write_bytes(file_of(b"{" + entry + b"," + entry + b"}", b"0"))
    with pytest.raises(SafetensorError) as caught:
        safe_open(path, "np")
    assert (caught.value.code, caught.value.tensor) == ("DUPLICATE_TENSOR", "a")


def test_an_unknown_dtype_refuses_its_tensor_only(path: Path) -> None:
    header = {"a": f32(0, 4, 1), "b": {"dtype": "Q9", "shape": [3], "data_offsets": [4, 9]}}
    path.write_bytes(file_of(header, bytes(9)))
    for framework in ("np", "pt"):
        with safe_open(path, framework) as file:
            assert file.keys() == ["a", "b"]
            assert file.get_slice("b").get_dtype() == file.get_tensor_meta("b").dtype == "Q9"
            assert file.get_tensor("a").shape == (1,)
            for ask in (lambda: file.get_tensor("b"), file.get_tensors):
                with pytest.raises(SafetensorError, match="Dtype not understood: Q9") as caught:
                    ask()
                assert (caught.value.code, caught.value.tensor) == ("UNSUPPORTED_DTYPE", "b")


def test_torch_has_no_six_bit_floats(path: Path) -> None:
    header = {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    path.write_bytes(file_of(header, bytes(3)))
    with pytest.raises(SafetensorError, match="Dtype not understood: F6_E2M3"):
        tonnage.torch.load_file(path)


def test_f4_with_an_odd_last_dimension_has_no_torch_shape(path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    path.write_bytes(file_of(header, bytes(3)))
    for backend in ("mmap", "pread"):
        with pytest.raises(SafetensorError, match="f4_x2 dtype requires that the last dim be"):
            tonnage.torch.load_file(path, backend=backend)
    assert tonnage.numpy.load_file(path)["a"].shape == (2, 3)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"framework": "caffe"}, "framework caffe is invalid"),
    ({"framework": "pt", "device": "tpu"}, "device tpu is invalid"),
    ({"framework": "pt", "device": "cuda:x"}, "invalid digit found in string"),
    (
        {"framework": "pt", "device": "mps:1"},
        "device mps:1 is invalid: only mps or mps:0 is supported",
    ),
    ({"framework": "pt", "device": 1.5}, "device 1.5 is invalid"),
    ({"framework": "np", "device": "cuda"}, "Device cuda:0 is not supported for framework numpy"),
    ({"framework": "np", "device": 3}, "Device 3 is not supported for framework numpy"),
    ({"framework": "np", "device": "meta"}, "Device meta is not supported for framework numpy"),
    (
        {"framework": "pt", "backend": "x"},
        'backend "x" is invalid (expected one of: "mmap", "pread")',
    ),
]


@pytest.mark.parametrize(("arguments", "text"), ARGUMENTS, ids=str)
def test_wrong_arguments_are_named(arguments: dict[str, Any], text: str, path: Path) -> None:
    tonnage.numpy.save_file({"a": np.zeros(1)}, path)
    with pytest.raises(SafetensorError) as caught:
        safe_open(path, **arguments)
    assert text in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:1", "npu", "xpu:0", "xla", "mlu", "musa:2", "hpu", "mps"]
)
def test_device_names_of_the_reference_are_understood(device: str, path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator: the claim is about machines without")
    # No such device is here: torch says so, not the argument check.
    tonnage.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(Exception) as caught:
        tonnage.torch.load_file(path, device=device)
    assert not isinstance(caught.value, SafetensorError)


def test_a_closed_file_says_so(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.zeros((3, 2))}, path)
    with safe_open(path, "np") as file:
        part = file.get_slice("a")
    for call in (
        file.keys, file.offset_keys, file.metadata, file.get_tensors,
        lambda: file.get_tensor("a"), lambda: file.get_slice("a"),
        lambda: file.get_tensor_meta("a"),
    ):  # fmt: skip
        with pytest.raises(SafetensorError, match=r"^File is closed$") as caught:
            call()
        assert caught.value.code == "CLOSED"
    assert part[1:].shape == (2, 2)
    file.__exit__(None, None, None)


def test_a_missing_tensor_is_named(path: Path) -> None:
    tonnage.numpy.save_file({"a": np.zeros(1)}, path)
    with safe_open(path, "np") as file:
        for call in (file.get_tensor, file.get_slice):
            with pytest.raises(SafetensorError) as caught:
                call("b")
            assert str(caught.value) == "File does not contain tensor b"
            fields = (caught.value.code, caught.value.tensor, caught.value.file)
            assert fields == ("UNKNOWN_TENSOR", "b", str(path))


SLICE_ERRORS: list[tuple[Any, str, type[Exception]]] = [
    (np.s_[2:, -6], "Invalid index -6 for dimension 1 of size 5", IndexError),
    (np.s_[2:, 20], "Error during slicing [2:, 20] with shape [10, 5]: index 20 out of bounds for"
     " tensor dimension #1 of size 5", IndexError),
    (np.s_[1, 2, 3], "more slicing indexes than dimensions in tensor", IndexError),
    (np.s_[::-1], "Slice step must be a positive integer, got -1", ValueError),
    (np.s_[::0], "Slice step must be a positive integer, got 0", ValueError),
    (np.s_[..., ...], "Only one ellipsis (...) is allowed in slice index", ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "kind"), SLICE_ERRORS, ids=lambda case: str(case)[:30])
def test_wrong_slices_are_errors_everywhere(
    key: Any, text: str, kind: type[Exception], path: Path
) -> None:
    tonnage.numpy.save_file({"a": np.zeros((10, 5))}, path)
    for framework in ("np", "pt"):
        for backend in ("mmap", "pread"):
            with safe_open(path, framework, backend=backend) as file:
                with pytest.raises(SafetensorError) as caught:
                    file.get_slice("a")[key]
                assert text in str(caught.value)
                assert isinstance(caught.value, kind)


NUMPY_SLICE_ERRORS: list[tuple[Any, str]] = [
    (np.s_[:20], "Error during slicing [:20] with shape [10, 5]: index 19 out of bounds for tensor"
     " dimension #0 of size 10"),
    (np.s_[12:], "Error during slicing [12:] with shape [10, 5]: index 12 out of bounds"),
    (np.s_[: 2**70], "out of bounds for tensor dimension #0 of size 10"),
    ([0, 1], "Non empty lists are not implemented"),
    (None, "Unsupported slice index at position 0: expected slice, int, or ellipsis"),
    (np.s_[1, "x"], "Unsupported slice index at position 1: expected slice, int, or ellipsis"),
    (1.0, "Unsupported slice index at position 0"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), NUMPY_SLICE_ERRORS, ids=lambda case: str(case)[:30])
def test_numpy_slices_are_checked_as_in_the_reference(key: Any, text: str, path: Path) -> None:
    tonnage.numpy.save_file({"a": np.zeros((10, 5))}, path)
    for backend in ("mmap", "pread"):
        with safe_open(path, "np", backend=backend) as file:
            with pytest.raises(SafetensorError) as caught:
                file.get_slice("a")[key]
            assert text in str(caught.value)


def test_a_save_that_fails_says_what_the_system_said(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(1)}
    cases: list[tuple[Path, type[OSError], int]] = [
        (tmp_path / "missing" / "file", FileNotFoundError, 2),
        (tmp_path, IsADirectoryError, 21),
    ]
    for target, kind, errno in cases:
        with pytest.raises(SafetensorError, match="Error while serializing: I/O error: ") as caught:
            tonnage.numpy.save_file(tensors, target)
        assert isinstance(caught.value, kind)
        assert (caught.value.errno, caught.value.code) == (errno, "IO")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "kind", "text"),
    [
        ({"a": [1.0]}, TypeError, "Key `a` is invalid, expected numpy.ndarray"),
        ({"a": np.array(["x"])}, SafetensorError, 'Unknown dtype "str'),
        ({"a": np.zeros(1, np.complex128)}, SafetensorError, 'Unknown dtype "complex128"'),
    ],
)
def test_numpy_refuses_what_it_cannot_save(tensors: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        tonnage.numpy.save(tensors)


def test_torch_refuses_what_it_cannot_save() -> None:
    base = torch.zeros(4, 4)
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            "notadict",
            ValueError,
            r"Expected a dict of \[str, torch.Tensor\] but received <class 'str'>",
        ),
        (
            {"a": 1},
            ValueError,
            "Key `a` is invalid, expected torch.Tensor but received <class 'int'>",
        ),
        ({"a": base.T}, ValueError, "You are trying to save a non contiguous tensor: `a`"),
        ({"a": base, "b": base[:1]}, RuntimeError, "Some tensors share memory"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, SafetensorError, "Unknown dtype"),
    ]
    for tensors, kind, text in cases:
        with pytest.raises(kind, match=text):
            tonnage.torch.save(tensors)
    tonnage.torch.save({"a": base[:1], "b": base[1:]})


def test_pack_refuses_parts_of_bytes() -> None:
    assert _native._pack(bytes([1, 2, 3, 4]), 4) == bytes([0x21, 0x43])
    assert _native._pack(bytes([0x3F, 0, 0x3F, 0]), 6) == bytes([0x3F, 0xF0, 0x03])
    for elements, bits in ((b"\1", 4), (b"\1\1", 6), (b"\1", 8)):
        with pytest.raises(ValueError, match="do not fill whole bytes"):
            _native._pack(elements, bits)
