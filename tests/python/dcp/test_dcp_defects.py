"""What PyTorch 2.15's own safetensors classes get wrong, each with ours in their place: the result
is right, or the error says what is wrong.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tonnage
import tonnage.torch
import torch
import torch.distributed.checkpoint as dcp
from tonnage.torch.dcp import StorageReader, StorageWriter


def through(state: dict[str, Any], target: dict[str, Any], path: Path) -> dict[str, Any]:
    dcp.save(state, storage_writer=StorageWriter(path))
    dcp.load(target, storage_reader=StorageReader(path))
    return target


def test_d1_a_tensor_without_dimensions_keeps_its_value(tmp_path: Path) -> None:
    # PyTorch's consolidation makes it 0.0.
    found = through({"step": torch.tensor(3.5)}, {"step": torch.tensor(0.0)}, tmp_path)
    assert found["step"].item() == 3.5
    assert tonnage.open(tmp_path)["step"].torch().item() == 3.5


def test_d2_integers_and_flags_are_tensors_like_others(tmp_path: Path) -> None:
    # PyTorch's consolidation asks `torch.finfo` of them.
    state = {"i": torch.arange(5), "b": torch.tensor([True, False])}
    found = through(state, {name: torch.zeros_like(t) for name, t in state.items()}, tmp_path)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_d3_numbers_beside_tensors_do_not_spoil_the_file(tmp_path: Path) -> None:
    # PyTorch writes them in front of the header.
    state = {"w": torch.ones(3), "step": 3, "lr": 1e-3}
    found = through(state, {"w": torch.zeros(3), "step": 0, "lr": 0.0}, tmp_path)
    assert (found["step"], found["lr"]) == (3, 1e-3)
    assert tonnage.verify(tmp_path).ok


def test_d4_no_box_of_a_tensor_of_several_is_lost(ranks: Any, tmp_path: Path) -> None:
    # PyTorch keeps the last one.
    ranks.run("checkpointable", 2, tmp_path, layout="hf")


def test_d5_and_d6_strided_shards_are_saved_and_loaded(ranks: Any, tmp_path: Path) -> None:
    results = ranks.run("strided", 2, tmp_path)
    for refusal, ours, theirs, needed in results:
        assert "overlapping" in refusal
        assert ours == needed
        # PyTorch's reader loads rows of another rank, and says nothing.
        print(f"PyTorch's reader: {theirs}, right: {needed}")
    assert tonnage.open(tmp_path / "out")["w"].torch().tolist() == list(range(8))


def test_d7_a_file_that_is_missing_is_an_error_that_names_it(ranks: Any, tmp_path: Path) -> None:
    # PyTorch leaves the target's rows as they were.
    ranks.run("save_parts", 2, tmp_path)
    lost = sorted((tmp_path / "out").glob("shard-00001-*"))[0]
    lost.rename(tmp_path / "aside")
    for error in ranks.errors("load_into", 2, tmp_path, path="out", shape=[8, 4]):
        assert lost.name in error["text"]
    # Without the record, as PyTorch's own files are: then it is a hole.
    (tmp_path / "out" / "tonnage.shards.json").unlink()
    for error in ranks.errors("load_into", 2, tmp_path, path="out", shape=[8, 4]):
        assert "w: no file of the checkpoint has [0:4, 0:4]" in error["text"]


def test_d7_a_file_of_an_index_that_is_missing_is_an_error(tmp_path: Path) -> None:
    tonnage.save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path, max_shard_size=16)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        StorageReader(tmp_path).read_metadata()


def test_d8_the_index_says_which_file_has_a_tensor(tmp_path: Path) -> None:
    # PyTorch reads whichever it comes to last.
    tonnage.save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path, max_shard_size=16)
    for name in ("consolidated", "zzz"):
        tonnage.save({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / f"{name}.safetensors")
    target = {"a": torch.zeros(4), "b": torch.zeros(4)}
    dcp.load(target, storage_reader=StorageReader(tmp_path))
    assert target["a"].tolist() == target["b"].tolist() == [1.0] * 4


def test_d8_without_an_index_two_files_with_one_name_are_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tonnage.save({"w": torch.zeros(4)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(tonnage.TonnageError):
        StorageReader(tmp_path).read_metadata()


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no F4")
def test_d9_four_bits_come_back(tmp_path: Path) -> None:
    # PyTorch writes them and cannot read them.
    content = torch.arange(24, dtype=torch.uint8).reshape(3, 8)
    state = {"w": content.view(torch.float4_e2m1fn_x2)}
    target = {"w": torch.zeros(3, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    found = through(state, target, tmp_path)
    assert torch.equal(found["w"].view(torch.uint8), content)
    assert tonnage.open(tmp_path)["w"].shape == (3, 16)


def test_d10_headers_are_padded_and_say_what_they_should(tmp_path: Path) -> None:
    # PyTorch's consolidation does neither.
    dcp.save(
        {"w": torch.ones(3)},
        storage_writer=StorageWriter(tmp_path, metadata={"format": "pt", "x": "y"}),
    )
    content = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert tonnage.open(tmp_path).metadata == {"format": "pt", "x": "y"}


def test_d11_nothing_is_pickled_and_nothing_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    def never(*args: object, **options: object) -> None:
        raise AssertionError("pickle")

    for module, name in [(torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, name, never)
    state = {"w": torch.ones(3), "n": {"lr": 0.1, "betas": (0.9, 0.99)}}
    target = {"w": torch.zeros(3), "n": {"lr": 0.0, "betas": None}}
    assert through(state, target, tmp_path)["n"] == state["n"]


def test_d12_headers_are_read_once_for_all_ranks(ranks: Any, tmp_path: Path) -> None:
    # With PyTorch, every rank opens every file.
    tensors = {f"t{i}": torch.ones(4) for i in range(9)} | {"w": torch.arange(32.0).reshape(8, 4)}
    tonnage.save(tensors, tmp_path / "out", max_shard_size=16)
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    apart = ranks.run("load_into", 2, tmp_path, path="out", shape=[8, 4])
    together = ranks.run("load_into", 2, tmp_path, path="out", shape=[8, 4], together=True)
    assert [opened for _, opened in apart] == [files] * 2
    assert [opened for _, opened in together] == [files, 0]
    for number, (rows, _) in enumerate(together):
        assert rows == tensors["w"][4 * number : 4 * number + 4].tolist()


def test_no_part_is_there_twice(tmp_path: Path) -> None:
    for name, begin in (("a", 0), ("b", 2)):
        metadata = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [begin]}})}
        tonnage.torch.save_file({"w": torch.ones(4)}, tmp_path / f"{name}.safetensors", metadata)
    with pytest.raises(BaseException, match=r"a\.safetensors and .*b\.safetensors both have part"):
        dcp.load({"w": torch.zeros(6)}, storage_reader=StorageReader(tmp_path))
    assert os.listdir(tmp_path)
