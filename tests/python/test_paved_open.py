"""`tonnage.open`: everything it takes, and what it says about what it does not take."""

from __future__ import annotations

import gzip
import io
import json
import mmap
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tonnage
from paved_data import Counting, content, model, same, write_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_model(path, format="pt", made_by="a test")
    return path


def sharded(folder: Path, tensors: dict[str, Any]) -> dict[str, str]:
    """Two files and an index, by hand and by the reference package."""
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        safetensors.numpy.save_file({key: tensors[key] for key in part}, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def check(checkpoint: tonnage.Checkpoint, tensors: dict[str, Any]) -> None:
    assert set(checkpoint) == set(tensors)
    for name, array in tensors.items():
        assert same(checkpoint[name].numpy(), array), name
    loaded = checkpoint.load(framework="numpy")
    assert all(same(loaded[name], array) for name, array in tensors.items())


def test_it_is_a_mapping_in_file_order(file: Path) -> None:
    checkpoint = tonnage.open(file)
    with safetensors.safe_open(file, "np") as reference:
        order = reference.offset_keys()
    assert (
        list(checkpoint) == order == list(checkpoint.keys()) == [k for k, _ in checkpoint.items()]
    )
    assert len(checkpoint) == len(model())
    assert "step" in checkpoint
    assert "absent" not in checkpoint
    assert 3 not in checkpoint
    assert checkpoint.get("absent") is None
    assert checkpoint.metadata == {"format": "pt", "made_by": "a test"}
    assert checkpoint.nbytes == sum(array.nbytes for array in model().values())
    assert checkpoint.parameters == sum(array.size for array in model().values())
    (info,) = checkpoint.files
    assert (info.label, info.nbytes, info.tensors) == (str(file), file.stat().st_size, len(model()))
    assert info.data_start + checkpoint.nbytes == info.nbytes
    assert checkpoint.notes == ()
    assert checkpoint.label == str(file)


@pytest.mark.parametrize("how", [str, Path, lambda p: [p], lambda p: (str(p),)])
def test_paths_and_lists_of_paths(file: Path, how: Any) -> None:
    check(tonnage.open(how(file)), model())


def test_a_folder_with_an_index_the_index_and_a_list(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path, model())
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors.index.json"):
        checkpoint = tonnage.open(source)
        check(checkpoint, model())
        assert len(checkpoint.files) == 2
        for name, shard in weight_map.items():
            assert Path(checkpoint[name].file).name == shard
    check(tonnage.open(sorted(tmp_path.glob("*.safetensors"))), model())


def test_bytes_and_all_that_has_a_buffer(file: Path) -> None:
    data = file.read_bytes()
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        sources = [data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8), mapped]
        for source in sources:
            check(tonnage.open(source), model())
        # Lets go of the map before it is closed.
        del sources, source
    with pytest.raises(tonnage.UsageError, match="contiguous"):
        tonnage.open(memoryview(data)[::2])


def test_a_list_may_mix_sources(file: Path) -> None:
    other = content({"other": ("U8", [3], b"abc")})
    checkpoint = tonnage.open([file, other, io.BytesIO(content({"third": ("U8", [1], b"z")}))])
    assert bytes(checkpoint["other"].numpy()) == b"abc"
    assert bytes(checkpoint["third"].numpy()) == b"z"
    assert same(checkpoint["step"].numpy(), model()["step"])
    labels = [info.label for info in checkpoint.files]
    assert labels == [str(file), "<bytes 2>", "<BytesIO 3>"]


def test_a_plain_file_object_is_read_by_position(file: Path) -> None:
    with file.open("rb") as opened:
        opened.seek(5)
        checkpoint = tonnage.open(opened)
        assert checkpoint.label == str(file)
        check(checkpoint, model())
        assert opened.tell() == 5
    # The file was duplicated, so the checkpoint outlives the object.
    check(checkpoint, model())


def test_a_file_that_has_no_name_any_more(file: Path) -> None:
    with tempfile.TemporaryFile() as opened:
        opened.write(file.read_bytes())
        # What is still in the object's buffer is part of the file.
        check(tonnage.open(opened), model())
    with tempfile.NamedTemporaryFile() as named:
        named.write(file.read_bytes())
        check(tonnage.open(named), model())


def test_a_file_object_that_only_seeks_is_not_read_whole() -> None:
    big = content({"a": ("U8", [1 << 20], bytes(1 << 20)), "b": ("U8", [4], b"wxyz")})
    source = Counting(big)
    checkpoint = tonnage.open(source)
    assert source.taken < 70_000
    before = source.taken
    assert bytes(checkpoint["b"].numpy()) == b"wxyz"
    assert source.taken - before == 4


def test_gzip_has_a_descriptor_that_is_not_its_content(file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "model.safetensors.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    with gzip.open(packed) as opened:
        check(tonnage.open(opened), model())


def test_a_pipe_is_read_to_its_end(file: Path) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as opened:
        with os.fdopen(write_end, "wb") as out:
            out.write(file.read_bytes())
        check(tonnage.open(opened), model())


def test_text_files_lend_their_bytes(file: Path) -> None:
    with file.open("r", encoding="latin-1") as opened:
        check(tonnage.open(opened), model())
    with pytest.raises(TypeError, match="not text"):
        tonnage.open(io.StringIO("text"))


def test_what_a_file_object_raises_comes_back() -> None:
    class Broken(Counting):
        def read(self, size: int = -1) -> bytes:
            raise ZeroDivisionError("the reader broke")

    with pytest.raises(ZeroDivisionError, match="the reader broke"):
        tonnage.open(Broken(content({})))

    class Short(Counting):
        def read(self, size: int = -1) -> bytes:
            return super().read(max(size // 2, 1)) if self.tell() < 8 else b""

    with pytest.raises(tonnage.StorageError):
        tonnage.open(Short(content({"a": ("U8", [4], b"wxyz")})))

    class Text(Counting):
        def read(self, size: int = -1) -> Any:
            return "text"

    with pytest.raises(TypeError, match="not bytes"):
        tonnage.open(Text(content({})))


@pytest.mark.parametrize("source", [3.5, None, {}, object()])
def test_other_things_are_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError):
        tonnage.open(source)


def test_no_files_and_a_file_that_is_not_readable(tmp_path: Path) -> None:
    with pytest.raises(tonnage.UsageError, match="no files"):
        tonnage.open([])
    with (tmp_path / "out").open("wb") as out, pytest.raises(tonnage.UsageError, match="reading"):
        tonnage.open(out)


def test_a_missing_path_is_the_builtin_people_expect(tmp_path: Path) -> None:
    missing = tmp_path / "absent.safetensors"
    for source in (missing, [missing], str(missing)):
        with pytest.raises(FileNotFoundError) as caught:
            tonnage.open(source)
        error = caught.value
        assert isinstance(error, tonnage.TonnageError)
        assert isinstance(error, OSError)
        assert isinstance(error, tonnage.SafetensorError)
        assert error.errno == 2
        assert error.code == "IO"
        assert error.file == str(missing)
    with pytest.raises(FileNotFoundError):
        tonnage.open(tmp_path)
    with pytest.raises(IsADirectoryError):
        tonnage.open([tmp_path])
    (tmp_path / "plain").write_text("")
    with pytest.raises(NotADirectoryError):
        tonnage.open(tmp_path / "plain" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_not_a_missing_file(file: Path) -> None:
    file.chmod(0)
    with pytest.raises(PermissionError):
        tonnage.open(file)


def edit_index(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("value", "code", "clause"),
    [
        ("../model.safetensors", "INDEX_PATH", "8.4"),
        ("/etc/x.safetensors", "INDEX_PATH", "8.4"),
        ("a\\b.safetensors", "INDEX_PATH", "8.4"),
        ("weights.bin", "INDEX_EXTENSION", "8.5"),
        ("absent.safetensors", "INDEX_FILE_MISSING", "8.8"),
    ],
)
def test_index_paths_that_lead_elsewhere(
    tmp_path: Path, value: str, code: str, clause: str
) -> None:
    sharded(tmp_path, model())
    edit_index(tmp_path, lambda weight_map: weight_map.update(step=value))
    with pytest.raises(tonnage.FormatError) as caught:
        tonnage.open(tmp_path)
    assert (caught.value.code, caught.value.clause) == (code, clause)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FileNotFoundError) == (code == "INDEX_FILE_MISSING")


def test_a_link_out_of_the_folder_needs_permission(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere.safetensors"
    folder.mkdir()
    sharded(folder, model())
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    with pytest.raises(tonnage.FormatError) as caught:
        tonnage.open(folder)
    assert caught.value.code == "INDEX_ESCAPES"
    check(tonnage.open(folder, allow_symlinks=True), model())


def test_missing_and_doubled_shards(tmp_path: Path) -> None:
    sharded(tmp_path, model())
    index = tmp_path / "model.safetensors.index.json"
    edit_index(tmp_path, lambda weight_map: weight_map.update(absent=weight_map["step"]))
    with pytest.raises(tonnage.FormatError) as lacking:
        tonnage.open(tmp_path)
    assert (lacking.value.code, lacking.value.tensor) == ("INDEX_TENSOR_MISSING", "absent")
    index.unlink()
    check(tonnage.open(tmp_path), model())
    second = tmp_path / "model-00002-of-00002.safetensors"
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        tonnage.open(tmp_path)
    assert isinstance(missing.value, tonnage.MissingShardError)
    assert missing.value.code == "INDEX_SHARD_MISSING"
    with pytest.raises(tonnage.TonnageError) as twice:
        tonnage.open([data, data])
    assert twice.value.code == "INDEX_TENSOR_TWICE"


def test_a_total_size_that_disagrees_is_a_note(tmp_path: Path) -> None:
    sharded(tmp_path, model())
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    (note,) = tonnage.open(tmp_path).notes
    assert note.code == "INDEX_TOTAL_SIZE"
    assert note.file == str(path)


def test_a_malformed_file_says_what_where_and_which_rule(tmp_path: Path) -> None:
    path = tmp_path / "hole.safetensors"
    header = {"w": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(tonnage.FormatError) as caught:
        tonnage.open(path)
    error = caught.value
    assert (error.code, error.clause, error.tensor, error.file) == ("HOLE", "6.4", "w", str(path))
    assert str(path) in str(error)
    assert error.found
    assert error.needed
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert (copied.code, copied.found, copied.tensor) == (error.code, error.found, "w")
    deep = content({"w": ("U8", [1] * 100_000, b"x")})
    with pytest.raises(tonnage.LimitError):
        tonnage.open(deep)


def test_an_unknown_name_is_a_key_error_with_near_names(file: Path) -> None:
    checkpoint = tonnage.open(file)
    with pytest.raises(KeyError) as caught:
        checkpoint["layers.0.attn.wieght"]
    error = caught.value
    assert isinstance(error, tonnage.UnknownTensorError)
    assert error.code == "UNKNOWN_TENSOR"
    assert error.tensor == "layers.0.attn.wieght"
    assert "layers.0.attn.weight" in error.suggestions
    assert "layers.0.attn.weight" in str(error)
    assert not str(error).startswith(("'", '"'))
    again = pickle.loads(pickle.dumps(error))
    assert again.suggestions == error.suggestions


def test_errno_survives_pickling(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        tonnage.open(tmp_path / "absent")
    assert pickle.loads(pickle.dumps(caught.value)).errno == 2


def test_a_closed_checkpoint_reads_no_more(file: Path) -> None:
    with tonnage.open(file) as checkpoint:
        ref = checkpoint["step"]
        assert ref.numpy() == 7
    assert "closed" in repr(checkpoint)
    assert "closed" in checkpoint._repr_html_()
    for use in (ref.numpy, checkpoint.load, lambda: checkpoint["step"], lambda: len(checkpoint)):
        with pytest.raises(tonnage.UsageError, match="closed"):
            use()
