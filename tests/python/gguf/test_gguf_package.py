"""Files that the `gguf` package wrote, read beside it: metadata, places and bytes of tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tonnage
from gguf_data import BIG_BLOCKS, BLOCKS, arrays, metadata, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_data import on_stub

Arrays = dict[str, tuple[np.ndarray[Any, Any], str]]


def check(checkpoint: tonnage.Checkpoint, wanted: Arrays) -> None:
    assert checkpoint.gguf is not None
    described = checkpoint.gguf.tensors
    assert set(checkpoint) == set(wanted) == set(described)
    loaded = checkpoint.load(framework="numpy")
    for name, (array, kind) in wanted.items():
        assert described[name].type == kind
        assert np.array_equal(loaded[name], array), name
        assert np.array_equal(checkpoint[name].numpy(), array), name
        assert np.array_equal(checkpoint[name][-1:], array[-1:]), name
        assert loaded[name].dtype == array.dtype
        if kind in BLOCKS:
            per = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
            assert described[name].shape == (3, 512)
            assert 512 % per == 0
        else:
            assert described[name].shape == array.shape


def check_metadata(found: dict[str, Any]) -> None:
    assert found["general.architecture"] == "llama"
    for key, (_, value) in metadata().items():
        assert found[key] == value, key
        assert type(found[key]) is type(value), key


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_files_of_the_writer(tmp_path: Path, big: bool, alignment: int | None) -> None:
    path = tmp_path / "m.gguf"
    wanted = arrays(BIG_BLOCKS if big else BLOCKS)
    write(path, wanted, big=big, alignment=alignment)
    checkpoint = tonnage.open(path)
    info = checkpoint.gguf
    assert info is not None
    assert (info.version, info.byte_order) == (3, "big" if big else "little")
    assert info.alignment == (alignment or 32)
    check_metadata(info.metadata)
    check(checkpoint, wanted)
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        mine = info.tensors[tensor.name]
        assert mine.type == tensor.tensor_type.name
        assert mine.shape == tuple(int(extent) for extent in tensor.shape[::-1])
        assert (mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
    assert tonnage.verify(path).ok
    for opened in (tonnage.open(path.read_bytes()), tonnage.open(path.open("rb"))):
        check(opened, wanted)


@pytest.mark.parametrize("big", [False, True])
def test_there_and_back(tmp_path: Path, big: bool) -> None:
    path = tmp_path / "m.gguf"
    wanted = arrays(BIG_BLOCKS if big else BLOCKS)
    write(path, wanted, big=big)
    there = tmp_path / "m.safetensors"
    saved = tonnage.convert(path, there)
    assert saved.files == (str(there),)
    carried = tonnage.open(there)
    assert carried.gguf is None
    for name, (array, _) in wanted.items():
        assert np.array_equal(carried[name].numpy(), array), name
    tonnage.convert(there, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("big", [False, True])
def test_split_models(tmp_path: Path, big: bool) -> None:
    # As llama.cpp's gguf-split names and marks its files.
    wanted = arrays(BIG_BLOCKS if big else BLOCKS)
    names = list(wanted)
    paths = [tmp_path / f"m-{no + 1:05}-of-00003.gguf" for no in range(3)]
    for no, path in enumerate(paths):
        part = {name: wanted[name] for name in names[no::3]}
        place = {
            "split.no": ("add_uint16", no),
            "split.count": ("add_uint16", 3),
            "split.tensors.count": ("add_int32", len(wanted)),
        }
        write(path, part, big=big, extra=place)
    for source in (*paths, tmp_path):
        checkpoint = tonnage.open(source)
        check(checkpoint, wanted)
        assert checkpoint.gguf is not None
        check_metadata(checkpoint.gguf.metadata)
    out = tmp_path / "out"
    out.mkdir()
    tonnage.convert(tmp_path, out / "m.safetensors")
    saved = tonnage.convert(out / "m.safetensors", out / "m.gguf")
    assert [Path(file).name for file in saved.files] == [path.name for path in paths]
    for path in paths:
        assert (out / path.name).read_bytes() == path.read_bytes()
    tonnage.convert(tmp_path, out / "one.gguf")
    check(tonnage.open(out / "one.gguf"), wanted)
    assert {tensor.name for tensor in gguf.GGUFReader(out / "one.gguf").tensors} == set(wanted)
    paths[1].unlink()
    with pytest.raises(tonnage.FormatError, match=r"m-00002-of-00003\.gguf"):
        tonnage.open(paths[0])


def test_big_endian_blocks_without_a_form_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, arrays(["Q5_1"]), big=True)
    with pytest.raises(tonnage.UnsupportedError, match=r"Q5_1.*gguf G6\.2") as raised:
        tonnage.open(path)
    assert (raised.value.code, raised.value.tensor) == ("GGUF_BIG_ENDIAN_BLOCKS", "blk.0.Q5_1")


BOTH_ORDERS = """
little, big = (tonnage.open(path) for path in sys.argv[1:3])
wanted = little.load(framework="numpy")
for staging in ("1MiB", "128KiB"):
    for found in (
        big.load(device="cuda:0", framework="tonnage", staging=staging),
        dict(big.stream(device="cuda:0", framework="tonnage", staging=staging)),
    ):
        assert set(found) == set(wanted)
        for name, array in wanted.items():
            equal(found[name], array)
        del found
print("equal")
"""


def test_both_byte_orders_are_the_same_on_a_device(tmp_path: Path) -> None:
    wanted = arrays(BIG_BLOCKS)
    wanted["large"] = (np.arange(500_000, dtype="float32").reshape(500, 1000), "F32")
    for name, big in (("little.gguf", False), ("big.gguf", True)):
        write(tmp_path / name, wanted, big=big)
    printed = on_stub(BOTH_ORDERS, tmp_path / "little.gguf", tmp_path / "big.gguf")
    assert printed == "equal\n"


def test_text_that_is_not_utf8_comes_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, arrays([]), extra={"a.raw": ("add_array", [b"\xff\xfe", b"fine"])})
    found = tonnage.open(path).gguf
    assert found is not None
    assert found.metadata["a.raw"] == [b"\xff\xfe", "fine"]


def test_only_files_that_carry_a_header_become_gguf(tmp_path: Path) -> None:
    tonnage.save({"w": np.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(tonnage.UsageError) as raised:
        tonnage.convert(tmp_path / "m.safetensors", tmp_path / "m.gguf")
    assert raised.value.code == "GGUF_NO_HEADER"
    assert not (tmp_path / "m.gguf").exists()
