"""`tonnage.torch.dcp` in the place of PyTorch's own classes for safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tonnage
import torch
import torch.distributed.checkpoint as dcp
from tonnage.torch.dcp import SavePlanner, StorageReader, StorageWriter


@pytest.mark.parametrize("planner", ["default", "ours"])
@pytest.mark.parametrize("layout", ["single", "hf", "per_rank"])
def test_an_optimiser_comes_back_as_it_was(
    ranks: Any, tmp_path: Path, layout: str, planner: str
) -> None:
    ranks.run("optimiser", 2, tmp_path, layout=layout, planner=planner)
    if layout != "per_rank":
        found = tonnage.torch.load(tmp_path / "out")
        assert found["optim"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert found["optim"]["state"]["embed"]["step"].item() == 5.0


def test_a_save_may_go_on_in_the_background(ranks: Any, tmp_path: Path) -> None:
    ranks.run("asynchronous", 2, tmp_path)


@pytest.mark.parametrize("consolidate", [False, True], ids=["parts", "consolidated"])
def test_what_pytorch_writes_is_read(ranks: Any, tmp_path: Path, consolidate: bool) -> None:
    ranks.run("torch_writes", 2, tmp_path, consolidate=consolidate)


def test_pytorch_reads_what_is_written(ranks: Any, tmp_path: Path) -> None:
    ranks.run("torch_reads", 2, tmp_path)


def test_one_process_saves_and_loads_without_a_group(tmp_path: Path) -> None:
    state = {"w": torch.arange(6).reshape(2, 3), "lr": 0.5}
    dcp.save(state, storage_writer=StorageWriter(tmp_path / "a.safetensors", "single"))
    target = {"w": torch.zeros(2, 3, dtype=torch.int64), "lr": 0.0}
    dcp.load(target, storage_reader=StorageReader(tmp_path / "a.safetensors"))
    assert target["lr"] == 0.5
    assert torch.equal(target["w"], state["w"])
    # Cast, and to memory that is not in a row.
    turned = {"w": torch.zeros(3, 2, dtype=torch.float64).t()}
    dcp.load(turned, storage_reader=StorageReader(tmp_path / "a.safetensors"))
    assert torch.equal(turned["w"], state["w"].double())


def test_each_tensor_may_have_its_file_named(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.zeros(4)}
    numbers = {"a": 2, "b": 1}
    dcp.save(state, storage_writer=StorageWriter(tmp_path, fqn_to_index_mapping=numbers))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00002-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
    }


def test_a_layout_takes_the_place_of_another(tmp_path: Path) -> None:
    for number, layout in enumerate(["hf", "per_rank", "single", "per_rank", "hf"]):
        state = {"w": torch.full((3,), float(number))}
        dcp.save(state, storage_writer=StorageWriter(tmp_path, layout))
        target = {"w": torch.zeros(3)}
        dcp.load(target, storage_reader=StorageReader(tmp_path))
        assert target["w"].tolist() == [number] * 3
        assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_leaves_that_do_not_fit_their_room_cost_a_copy_and_nothing_else(tmp_path: Path) -> None:
    state = {"w": torch.arange(1000.0), "text": "x" * 100_000}
    dcp.save(state, storage_writer=StorageWriter(tmp_path, "single", checksums=True))
    target = {"w": torch.zeros(1000), "text": ""}
    dcp.load(target, storage_reader=StorageReader(tmp_path))
    assert target["text"] == state["text"]
    assert torch.equal(target["w"], state["w"])
    assert tonnage.verify(tmp_path).ok


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, lambda: 0, (torch.zeros(2),)],
    ids=["object", "set", "code", "tuple"],
)
def test_what_has_no_form_without_pickle_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(BaseException, match="bad"):
        dcp.save({"bad": value}, storage_writer=StorageWriter(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_planner_of_ones_own_gets_and_gives_bytes(tmp_path: Path) -> None:
    class Halves(dcp.DefaultSavePlanner):
        def transform_object(self, item: Any, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value / 2
            return super().transform_object(item, value)

    class Told(dcp.DefaultLoadPlanner):
        def load_bytes(self, item: Any, value: Any) -> None:
            told[item.dest_index.fqn] = torch.load(value, weights_only=True)

    told: dict[str, object] = {}
    state = {"w": torch.arange(4.0), "n": 5}
    dcp.save(state, storage_writer=StorageWriter(tmp_path), planner=Halves())
    target = {"w": torch.zeros(4), "n": 0}
    dcp.load(target, storage_reader=StorageReader(tmp_path), planner=Told())
    assert target["w"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert told == {"n": 5}


def test_plans_from_another_save_are_refused(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    state = {"w": torch.zeros(2)}
    dcp.save(state, storage_writer=StorageWriter(tmp_path / "a"), planner=planner)
    again = dcp.DefaultSavePlanner(enable_plan_caching=True)
    with pytest.raises(BaseException, match="enable_plan_caching"):
        dcp.save(state, storage_writer=StorageWriter(tmp_path / "b"), planner=again)


def test_a_plain_folder_is_a_checkpoint(tmp_path: Path) -> None:
    state = {"a": torch.randn(50, 7), "b": torch.randn(9).to(torch.bfloat16)}
    tonnage.save(state, tmp_path, max_shard_size=600)
    target = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load(target, storage_reader=StorageReader(tmp_path))
    assert all(torch.equal(target[name], value) for name, value in state.items())
    with pytest.raises(BaseException, match="a"):
        dcp.load({"a": torch.zeros(7, 50)}, storage_reader=StorageReader(tmp_path))


def test_the_planner_is_pytorchs_where_nothing_is_strided(tmp_path: Path) -> None:
    state = {"w": torch.ones(3), "n": [1, (2, 3)]}
    dcp.save(state, storage_writer=StorageWriter(tmp_path), planner=SavePlanner())
    target: dict[str, Any] = {"w": torch.zeros(3), "n": None}
    dcp.load(target, storage_reader=StorageReader(tmp_path))
    assert target["n"] == [1, (2, 3)]


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"version":2}', '{"version":1,"files":["../x.safetensors"],"metadata":{}}', "{",
     '{"version":1,"files":[],"metadata":{"a":1}}'],
)  # fmt: skip
def test_a_record_that_is_not_ours_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tonnage.shards.json").write_text(text)
    with pytest.raises(tonnage.FormatError, match=r"tonnage\.shards\.json"):
        StorageReader(tmp_path).read_metadata()


@pytest.mark.parametrize(
    "info", ["", "[]", '{"w":3}', '{"w":{"saved_offsets":[-1]}}', '{"w":{"saved_offsets":[0,0]}}']
)
def test_sharding_information_that_makes_no_sense_is_refused(tmp_path: Path, info: str) -> None:
    metadata = {"DCP_SHARDING_INFO": info}
    tonnage.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(tonnage.FormatError, match="DCP_SHARDING_INFO"):
        StorageReader(tmp_path).read_metadata()
