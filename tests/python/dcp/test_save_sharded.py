"""`tonnage.torch.save_sharded` on real ranks: what they write together is what one process writes,
whatever the placements; what goes wrong on one is an error on all and costs nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tonnage
import tonnage.torch
import torch
import worker

MESHES = [
    pytest.param([2], ["S0"], id="rows"),
    pytest.param([2], ["S1"], id="columns"),
    pytest.param([3], ["S0"], id="uneven rows of three"),
    pytest.param([2], ["R"], id="replicas"),
    pytest.param([2], ["_S0/3"], id="strided"),
    pytest.param([2, 2], ["_S0/2", "S0"], id="fsdp by tp, rows"),
    pytest.param([2, 2], ["S0", "S1"], id="fsdp by tp"),
    pytest.param([2, 2], ["S0", "_S1/2"], id="fused columns"),
    pytest.param([2, 2], ["R", "S0"], id="hsdp"),
]


def size(shape: list[int]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


@pytest.mark.parametrize(("shape", "names"), MESHES)
def test_one_file_has_the_bytes_that_one_process_writes(
    ranks: Any, tmp_path: Path, shape: list[int], names: list[str]
) -> None:
    values = ranks.run("save", size(shape), tmp_path, to="out", shape=shape, names=names)
    alone = tonnage.save(worker.whole(), tmp_path / "alone", metadata={"format": "pt"})
    (file,), index, total = values[0]
    assert values == [values[0]] * size(shape)
    assert index is None
    assert total == alone.total_size
    assert Path(file).read_bytes() == Path(alone.files[0]).read_bytes()
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("layout", ["single", "hf", "per_rank"])
@pytest.mark.parametrize(
    ("shape", "names", "again"),
    [([2], ["S0"], ["_S0/2"]), ([2, 2], ["_S0/2", "S0"], ["S1", "S0"]), ([3], ["S1"], ["S0"])],
    ids=["rows to strided", "2-D to 2-D", "columns to rows"],
)
def test_what_one_placement_saves_another_loads(
    ranks: Any, tmp_path: Path, layout: str, shape: list[int], names: list[str], again: list[str]
) -> None:
    options = {"max_shard_size": 9000} if layout == "hf" else {}
    ranks.run(
        "save_load", size(shape), tmp_path,
        to="out", shape=shape, names=names, again=again, layout=layout, **options,
    )  # fmt: skip
    if layout == "hf":
        assert (tmp_path / "out" / "model.safetensors.index.json").exists()
        assert len(list((tmp_path / "out").glob("model-0000*-of-0000*.safetensors"))) > 2


def test_the_reference_package_reads_every_file(ranks: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    options = {"layout": "hf", "max_shard_size": 9000}
    ((files, _, _), *_) = ranks.run(
        "save", 2, tmp_path, to="out", shape=[2], names=["S1"], checksums=True, **options
    )
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= safetensors.load_file(file)
    state = worker.whole()
    assert found.keys() == state.keys()
    assert all(worker.same(found[name], value) for name, value in state.items())
    assert tonnage.verify(tmp_path / "out").ok


@pytest.mark.parametrize("layout", ["single", "hf", "per_rank"])
def test_tensors_of_several_boxes_lose_none(ranks: Any, tmp_path: Path, layout: str) -> None:
    ranks.run("checkpointable", 2, tmp_path, layout=layout)


def test_stages_with_layers_of_their_own_become_one_state(ranks: Any, tmp_path: Path) -> None:
    ranks.run("stages", 2, tmp_path)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("hole", "PLAN_DESTINATION", ["'w'", "4:5"]),
        ("overlap", "PLAN_DESTINATION", ["4:8", "0:5"]),
        ("dtype", "PLAN_DISAGREE", ["F64", "rank 1"]),
        ("settings", "GROUP", ["rank 1"]),
        ("leaf", None, ["object"]),
        ("leaves", "STRUCTURE", ["lr"]),
        ("partial", "PLACEMENT", ["w", "reduce"]),
        ("write", "IO", ["gone"]),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all_and_costs_nothing(
    ranks: Any, tmp_path: Path, how: str, code: str | None, words: list[str]
) -> None:
    tonnage.save({"old": torch.zeros(3)}, tmp_path / "out")
    errors = ranks.errors("refused", 2, tmp_path, how=how)
    for error in errors:
        assert all(word.strip("'") in error["text"] for word in words), error
        assert code is None or error["code"] == code, error
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert list(tonnage.open(tmp_path / "out")) == ["old"]


def test_a_rank_that_never_comes_is_an_error_within_the_timeout(ranks: Any, tmp_path: Path) -> None:
    waited, _ = ranks.run("absent", 2, tmp_path, group_timeout=4)
    assert waited < 15
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


KILLS = int(os.environ.get("TONNAGE_KILLS", "20"))


@pytest.mark.parametrize("layout", ["single", "hf", "per_rank"])
def test_a_rank_killed_at_any_moment_leaves_the_old_checkpoint_or_the_new(
    ranks: Any, tmp_path: Path, layout: str
) -> None:
    took = max(ranks.run("save_version", 2, tmp_path, version=0, layout=layout))
    current, seen = 0, {"old": 0, "new": 0}
    for version in range(1, -(-KILLS // 3) + 1):
        codes = ranks.codes(
            "save_version", 2, tmp_path,
            version=version, layout=layout, kill_within=1.3 * took, group_timeout=20, timeout=60,
        )  # fmt: skip
        # The killed one was killed, if it had not ended before; the other ended by itself.
        assert sorted(codes) in ([-9, 0], [0, 0]), (codes, ranks.logs(tmp_path))
        found = versions(tmp_path / "out")
        assert found in (current, version), f"neither {current} nor {version}: {found}"
        seen["new" if found == version else "old"] += 1
        current = found
    print(f"{layout}: {seen}")


def versions(path: Path) -> int:
    """The one number that all of a checkpoint is made of."""
    import torch.distributed.checkpoint as dcp
    from tonnage.torch.dcp import StorageReader

    state = {
        "rows": torch.zeros(1024, 2048),
        "columns": torch.zeros(1024, 2048),
        "step": torch.zeros(()),
    }
    metadata = StorageReader(path).read_metadata().state_dict_metadata
    state = {name: torch.zeros(entry.size) for name, entry in metadata.items()}
    assert state.keys() == {"rows", "columns", "step"}
    dcp.load(state, storage_reader=StorageReader(path), no_dist=True)
    numbers = {float(value) for tensor in state.values() for value in tensor.unique()}
    (number,) = numbers
    return int(number)


@pytest.mark.parametrize("layout", ["single", "per_rank"])
@pytest.mark.parametrize("how", ["save_sharded", "dcp"])
def test_a_rank_takes_little_memory_besides_its_tensors(
    ranks: Any, tmp_path: Path, layout: str, how: str
) -> None:
    peaks = ranks.run("memory", 2, tmp_path, layout=layout, how=how)
    print(f"{layout} {how}: {[peak >> 20 for peak in peaks]} MiB besides 256")
    assert max(peaks) <= 64 << 20


def test_one_process_without_a_group_saves_too(tmp_path: Path) -> None:
    state = {"a": torch.arange(12).reshape(3, 4).t(), "n": {"lr": 0.1}}
    saved = tonnage.torch.save_sharded(state, tmp_path / "out.safetensors")
    assert saved.files == (str(tmp_path / "out.safetensors"),)
    found = tonnage.torch.load(tmp_path / "out.safetensors")
    assert torch.equal(found["a"], state["a"])
    assert found["n"] == {"lr": 0.1}
