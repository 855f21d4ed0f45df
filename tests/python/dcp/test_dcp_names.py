"""Writer and reader under PyTorch's names, with PyTorch's arguments and names of files."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tonnage
import torch
import torch.distributed.checkpoint as dcp
from tonnage.torch.dcp import HuggingFaceStorageReader, HuggingFaceStorageWriter

STATE = {"a": torch.arange(12.0).reshape(3, 4), "b.c": torch.ones(5, dtype=torch.bfloat16)}
ONE = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def save(folder: Path, state: dict[str, Any] = STATE, **arguments: Any) -> list[str]:
    writer = HuggingFaceStorageWriter(str(folder), **arguments)
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    return sorted(os.listdir(folder))


def loads(folder: Path, reader: Any, state: dict[str, Any] = STATE) -> None:
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(found, storage_reader=reader(str(folder), 2), no_dist=True)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["HuggingFaceStorageReader", "HuggingFaceStorageWriter"])
def test_the_arguments_are_those_of_pytorch(name: str) -> None:
    ours, theirs = getattr(tonnage.torch.dcp, name), getattr(dcp, name)
    found, wanted = (inspect.signature(kind).parameters.values() for kind in (ours, theirs))
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in wanted]


@pytest.mark.parametrize("how", [{}, {"save_distributed": True, "enable_consolidation": True}])
def test_whole_tensors_are_in_one_numbered_file_with_an_index(
    tmp_path: Path, how: dict[str, bool]
) -> None:
    assert save(tmp_path, thread_count=2, **how) == [ONE, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(STATE, ONE)
    assert index["metadata"]["total_size"] == 58
    loads(tmp_path, HuggingFaceStorageReader)
    loads(tmp_path, dcp.HuggingFaceStorageReader)
    # The next save takes its place, whatever its files are.
    next_one = {name: tensor + 1 for name, tensor in STATE.items()}
    assert save(tmp_path, next_one, **how) == [ONE, INDEX]
    loads(tmp_path, dcp.HuggingFaceStorageReader, next_one)


def test_a_mapping_says_which_file_has_a_tensor(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    assert save(tmp_path, fqn_to_index_mapping={"a": 2, "b.c": 1}) == names
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {"a": names[1], "b.c": names[0]}
    loads(tmp_path, HuggingFaceStorageReader)
    loads(tmp_path, dcp.HuggingFaceStorageReader)


def test_a_rank_keeps_its_own_files_where_nothing_is_put_together(tmp_path: Path) -> None:
    names = save(tmp_path, save_distributed=True, fqn_to_index_mapping={"a": 2, "b.c": 1})
    assert len(names) == 2
    assert names[0].startswith("shard-00001-model-00001-of-00001.")
    loads(tmp_path, HuggingFaceStorageReader)
    loads(tmp_path, dcp.HuggingFaceStorageReader)
