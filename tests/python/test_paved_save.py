"""`save`, `Writer` and `verify`, held against the reference package and the Hub's own tools."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import tonnage
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from paved_data import DTYPES, content, model, same, values, write_model


def state() -> dict[str, torch.Tensor]:
    """A state dict that is no longer in alphabetical order, of several dtypes."""
    torch.manual_seed(3)
    tensors = {"lm_head.weight": torch.randn(40, 16), "norm.weight": torch.randn(16)}
    for layer in range(6):
        tensors[f"layers.{layer}.up.weight"] = torch.randn(16, 24).to(torch.bfloat16)
        tensors[f"layers.{layer}.up.bias"] = torch.randn(24).to(torch.float16)
        tensors[f"layers.{layer}.step"] = torch.tensor(layer)
    tensors["embed.weight"] = torch.randn(100, 16)
    return tensors


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_file_has_the_references_bytes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    for tensors, module in ((state(), safetensors.torch), (model(), safetensors.numpy)):
        for metadata in (None, {"format": "pt"}):
            saved = tonnage.save(tensors, ours, metadata=metadata)
            module.save_file(tensors, theirs, metadata=metadata)
            assert ours.read_bytes() == theirs.read_bytes()
            assert (saved.files, saved.index) == ((str(ours),), None)
            assert saved.total_size == sum(tensor.nbytes for tensor in tensors.values())
            assert saved.seconds > 0
            assert saved.gb_per_s >= 0
    assert names_in(tmp_path) == {"ours.safetensors", "theirs.safetensors"}


@pytest.mark.parametrize("size", ["2KB", 3000, "5KB", "1KiB", "1GB"])
def test_shards_are_those_of_the_hub(tmp_path: Path, size: int | str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    limit = 1024 if size == "1KiB" else size
    theirs.mkdir()
    save_torch_state_dict(state(), theirs, max_shard_size=limit)
    saved = tonnage.save(state(), ours, max_shard_size=size, metadata={"format": "pt"})
    assert names_in(ours) == names_in(theirs)
    split = split_torch_state_dict_into_shards(state(), max_shard_size=limit)
    assert [Path(file).name for file in saved.files] == list(split.filename_to_tensors)
    assert (saved.index is not None) == split.is_sharded
    for name in names_in(theirs):
        written = (theirs / name).read_bytes()
        if name.endswith(".json"):
            # What models on the Hub have is transformers' index: this one sorted, with a newline.
            written = (json.dumps(json.loads(written), indent=2, sort_keys=True) + "\n").encode()
        assert (ours / name).read_bytes() == written
    back = tonnage.open(ours).load(framework="torch")
    assert all(torch.equal(back[name], tensor) for name, tensor in state().items())


def test_shards_beside_a_named_file(tmp_path: Path) -> None:
    saved = tonnage.save(state(), tmp_path / "tiny.safetensors", max_shard_size="4KB")
    assert Path(saved.index or "").name == "tiny.safetensors.index.json"
    assert all(Path(file).name.startswith("tiny-0000") for file in saved.files)
    assert tonnage.verify(saved.index).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_goes_there_and_back(tmp_path: Path, dtype: str) -> None:
    array = values(dtype, (4, 8), 1)
    path = tmp_path / "m.safetensors"
    tonnage.save({"a": array, "turned": array.T, "none": array[:0]}, path)
    checkpoint = tonnage.open(path)
    assert checkpoint["a"].dtype == dtype
    assert same(checkpoint["a"].numpy(), array)
    assert same(checkpoint["turned"].numpy(), np.ascontiguousarray(array.T))
    assert checkpoint["none"].shape == (0, 8)


def test_tensors_of_any_framework_and_layout_mixed(tmp_path: Path) -> None:
    import jax.numpy

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    half = torch.randn(5, 4).to(torch.bfloat16)
    wave = torch.complex(torch.randn(3, 2), torch.randn(3, 2))
    tensors = {
        "plain": base.clone(),
        "turned": base.clone().t(),
        "every other": base.clone()[::2, 1::2],
        "expanded": torch.tensor([1.5]).expand(3, 4),
        "grad": torch.nn.Parameter(half),
        "conjugated": wave.conj(),
        "big-endian": np.arange(5, dtype=">i4"),
        "scalar": np.float32(2.5),
        "jax": jax.numpy.ones((2, 3), jax.numpy.bfloat16),
        "numpy F": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    path = tmp_path / "m.safetensors"
    tonnage.save(tensors, path)
    back = safetensors.torch.load_file(path)
    for name in ("plain", "turned", "every other", "expanded", "grad"):
        assert torch.equal(back[name], tensors[name])
    assert torch.equal(back["conjugated"], wave.conj().resolve_conj())
    assert back["big-endian"].tolist() == [0, 1, 2, 3, 4]
    assert back["scalar"].item() == 2.5
    assert back["jax"].dtype == torch.bfloat16
    assert back["numpy F"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_checkpoint_can_be_saved_again_without_being_loaded(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    rows = {"f6": ("F6_E2M3", [4], b"abc"), "f4": ("F4", [2, 2], b"xy"), "u8": ("U8", [1], b"z")}
    source.write_bytes(content(rows))
    checkpoint = tonnage.open(source)
    tonnage.save(checkpoint, tmp_path / "out", max_shard_size=3)
    again = tonnage.open(tmp_path / "out")
    for name in rows:
        assert same(again[name].numpy(), checkpoint[name].numpy())
        assert again[name].dtype == checkpoint[name].dtype


def test_shared_memory_is_refused_or_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tied = torch.randn(4, 3)
    tensors = {"head": tied, "embed": tied, "other": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="share memory") as ours:
        tonnage.save(tensors, path)
    with pytest.raises(RuntimeError) as theirs:
        safetensors.torch.save_file(tensors, path)
    assert str(ours.value).split("A potential")[0] == str(theirs.value).split("A potential")[0]
    assert not path.exists()
    tonnage.save(tensors, path, dedupe=True, metadata={"format": "pt"})
    checkpoint = tonnage.open(path)
    assert checkpoint.metadata == {"format": "pt", "head": "embed"}
    assert sorted(checkpoint) == ["embed", "other"]
    with pytest.raises(RuntimeError, match="share memory"):
        tonnage.save({"a": tied, "b": tied[1:]}, path, dedupe=True)
    # Views of one memory that do not meet are no trouble.
    tonnage.save({"a": tied[:2], "b": tied[2:]}, path)


class Tied(torch.nn.Module):
    """A module with one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(3, 3, bias=False)
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


def test_the_reference_loads_a_deduped_module(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    source, target = Tied(), Tied()
    tonnage.save(source.state_dict(), path, dedupe=True)
    missing, unexpected = safetensors.torch.load_model(target, path)
    assert not missing
    assert not unexpected
    assert torch.equal(target.head.weight, source.embed.weight)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path)
    before = path.read_bytes()
    array = np.zeros(2, np.float32)
    for wrong in ({"a": [1, 2]}, {"a": "text"}, {3: array}, {"a": object()}):
        with pytest.raises(TypeError):
            tonnage.save(wrong, path)
    for metadata in ({"a": 1}, {2: "b"}):
        with pytest.raises(TypeError, match="metadata"):
            tonnage.save({"a": array}, path, metadata=metadata)
    with pytest.raises(tonnage.UsageError) as caught:
        tonnage.save({"__metadata__": array}, path)
    assert caught.value.code == "WRITE_RESERVED_NAME"
    for size in ("5 apples", 0, -3, "0"):
        with pytest.raises(tonnage.UsageError):
            tonnage.save({"a": array}, path, max_shard_size=size)
    with pytest.raises((TypeError, ValueError)):
        tonnage.save({"a": np.array(["text"])}, path)
    with pytest.raises(ValueError, match="sparse"):
        tonnage.save({"a": torch.zeros(2, 2).to_sparse()}, path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == {path.name}


def test_where_nothing_can_be_saved(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(2, np.float32)}
    with pytest.raises(FileNotFoundError):
        tonnage.save(tensors, tmp_path / "absent" / "m.safetensors")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(NotADirectoryError):
        tonnage.save(tensors, tmp_path / "file" / "m.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path)
    before = path.read_bytes()
    big = {"a": np.ones(1 << 20, np.float32), "b": torch.ones(1 << 10, 1 << 10).t()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        for some in (big, {"a": big["a"]}):
            with pytest.raises(OSError, match="File too large") as caught:
                tonnage.save(some, path)
            assert isinstance(caught.value, tonnage.StorageError)
            assert caught.value.errno
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == {path.name}


def test_saving_over_itself_and_over_shards(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tonnage.save(state(), folder, max_shard_size="4KB")
    checkpoint = tonnage.open(folder)
    tonnage.save(checkpoint, folder, max_shard_size="8KB", fsync=False)
    found = tonnage.verify(folder)
    assert found.ok, found
    again = tonnage.open(folder).load(framework="torch")
    assert all(torch.equal(again[name], tensor) for name, tensor in state().items())
    tonnage.save(state(), folder)
    assert tonnage.verify(folder).ok
    assert set(tonnage.open(folder)) == set(state())


def test_empty_checkpoints(tmp_path: Path) -> None:
    tonnage.save({}, tmp_path / "m.safetensors", metadata={})
    assert len(tonnage.open(tmp_path / "m.safetensors")) == 0
    with tonnage.Writer(tmp_path / "w.safetensors", metadata={"a": "b"}):
        pass
    assert tonnage.open(tmp_path / "w.safetensors").metadata == {"a": "b"}


def test_the_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        tonnage.save(model(), tmp_path / "m.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("size", [None, "4KB"])
def test_a_writer_streams_any_tensors(tmp_path: Path, size: str | None) -> None:
    out = tmp_path / "out"
    with tonnage.Writer(out, max_shard_size=size, metadata={"format": "pt"}) as writer:
        for name, tensor in state().items():
            writer.add(name, tensor)
        writer.add("turned", torch.arange(6.0).reshape(2, 3).t())
        assert writer.saved is None
        assert not list(out.glob("*.json"))
    assert writer.saved is not None
    assert writer.finish() is writer.saved
    assert (writer.saved.index is not None) == (size is not None)
    checkpoint = tonnage.open(out)
    loaded = checkpoint.load(framework="torch")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())
    assert loaded["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert checkpoint.metadata == {"format": "pt"}
    assert tonnage.verify(out).ok
    if size is not None:
        index = json.loads(Path(writer.saved.index or "").read_text())
        assert set(index["weight_map"]) == set(loaded)
        assert index["metadata"]["total_size"] == writer.saved.total_size
    for file in writer.saved.files:
        assert safetensors.torch.load_file(file)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tonnage.save(state(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    writer = tonnage.Writer(folder, max_shard_size="2KB")

    def interrupted() -> None:
        with writer:
            for name, tensor in state().items():
                writer.add(name, tensor)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert writer.saved is None
    with pytest.raises(tonnage.UsageError, match="closed"):
        writer.add("late", torch.zeros(1))
    with pytest.raises(tonnage.UsageError, match="closed"):
        writer.finish()
    writer.abort()


def test_a_writer_refuses_what_save_refuses(tmp_path: Path) -> None:
    writer = tonnage.Writer(tmp_path / "m.safetensors")
    writer.add("a", np.zeros(2, np.float32))
    with pytest.raises(TypeError):
        writer.add("b", [1, 2])
    with pytest.raises(tonnage.UsageError) as caught:
        writer.add("a", np.zeros(2, np.float32))
    assert caught.value.code == "WRITE_DUPLICATE"
    writer.abort()
    assert names_in(tmp_path) == set()


def test_verify_finds_all_that_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tonnage.save(state(), folder, max_shard_size="2KB")
    good = tonnage.verify(folder)
    assert good
    assert good.ok
    assert good.errors == ()
    assert repr(good).startswith("ok: ")
    assert sum(file.tensors for file in good.files) == len(state())
    files = sorted(folder.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes() + b"x")
    files[1].unlink()
    bad = tonnage.verify(folder)
    assert not bad
    codes = {finding.code for finding in bad.errors}
    assert {"TRAILING_DATA", "INDEX_FILE_MISSING"} <= codes
    trailing = next(finding for finding in bad.errors if finding.code == "TRAILING_DATA")
    assert (trailing.severity, trailing.clause) == ("error", "6.8")
    assert trailing.file == str(files[0])
    assert str(files[0]) in str(trailing)
    assert "NOT OK" in repr(bad)
    with pytest.raises(FileNotFoundError):
        tonnage.verify(tmp_path / "absent")


def flipped(path: Path, offset: int) -> None:
    """Turns one bit of a file round."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x20]))


@pytest.mark.parametrize("way", ["save", "writer"])
def test_checksums_are_stored_verified_and_readable_by_others(tmp_path: Path, way: str) -> None:
    path = tmp_path / "m.safetensors"
    if way == "save":
        tonnage.save(state(), path, checksums="blake3", metadata={"format": "pt"})
    else:
        with tonnage.Writer(path, checksums="blake3", metadata={"format": "pt"}) as writer:
            for name, tensor in state().items():
                writer.add(name, tensor)
    checkpoint = tonnage.open(path)
    assert checkpoint.metadata["safetensors.checksums"].startswith("crc64-nvme;8388608;")
    same(checkpoint.load(framework="torch", verify=True), state())
    same(safetensors.torch.load_file(path), state())
    found = tonnage.verify(path)
    assert found
    assert (found.files[0].chunks, found.files[0].hashed) == (1, True)
    digest, _, name = (tmp_path / "m.safetensors.b3").read_text().partition("  ")
    assert (len(digest), name) == (64, "m.safetensors\n")

    ref = checkpoint["norm.weight"]
    flipped(path, ref.offset + 5)
    damaged = tonnage.open(path)
    with pytest.raises(tonnage.FormatError, match="chunk 0") as caught:
        damaged.load(framework="torch", verify=True)
    assert caught.value.code == "CHECKSUM_MISMATCH"
    damaged.load(framework="torch")
    found = tonnage.verify(path)
    assert [finding.code for finding in found.errors] == ["CHECKSUM_MISMATCH"] * 2
    assert tonnage.verify(path, headers_only=True)


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tonnage.save(state(), path)
    assert not tonnage.open(path).metadata
    with pytest.raises(tonnage.UsageError, match="no checksums") as caught:
        tonnage.open(path).load(framework="torch", verify=True)
    assert caught.value.code == "NO_CHECKSUMS"
    with pytest.raises(tonnage.UsageError, match="blake3"):
        tonnage.save(state(), path, checksums="md5")  # type: ignore[arg-type]
    folder = tmp_path / "sharded"
    tonnage.save(state(), folder, checksums=True, max_shard_size="5KB")
    assert not tonnage.open(folder).metadata
    tonnage.open(folder).load(framework="numpy", select="*.step", verify=True)


def test_the_drop_in_keeps_no_checksums_of_other_data(tmp_path: Path) -> None:
    """Metadata taken over from a file with checksums, and a sidecar beside the target (spec 13.11,
    13.15)."""
    import tonnage.numpy

    path = tmp_path / "m.safetensors"
    tonnage.save({"a": np.arange(4.0)}, path, checksums="blake3", metadata={"k": "v"})
    assert path.with_name("m.safetensors.b3").exists()
    metadata = tonnage.open(path).metadata
    tonnage.numpy.save_file({"a": np.arange(5.0)}, path, metadata=dict(metadata))
    assert not path.with_name("m.safetensors.b3").exists()
    assert tonnage.open(path).metadata == {"k": "v"}
    assert tonnage.verify(path).ok
