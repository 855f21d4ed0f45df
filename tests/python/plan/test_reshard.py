"""`tonnage.reshard`: from a checkpoint to ranks, from ranks to ranks, and back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tonnage

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    rng = np.random.default_rng(7)

    def made(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "model.embed_tokens.weight": made(131, 24),
        "model.layers.0.self_attn.q_proj.weight": made(32, 24),
        "model.layers.0.self_attn.o_proj.weight": made(24, 32),
        "model.layers.1.mlp.gate_up_proj.weight": made(64, 24),
        "model.norm.weight": made(24),
        "step": np.array(3, dtype=np.int64),
    }


@pytest.fixture(scope="module")
def whole(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tonnage.save(tensors, folder, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    return folder


def same(path: Path, tensors: Tensors) -> None:
    found = tonnage.open(path).load(framework="numpy")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert np.array_equal(found[name], tensor), name


#: FSDP outside of tensor parallelism, as PyTorch lays it, to another number of ranks, to stages.
RULES: dict[str, Any] = {
    "*.q_proj.weight": {"fsdp": tonnage.StridedShard(0, 2), "tp": tonnage.Shard(0)},
    "*.o_proj.weight": {"fsdp": tonnage.Shard(0), "tp": tonnage.Shard(1)},
    "*.gate_up_proj.weight": {"fsdp": tonnage.Replicate(), "tp": tonnage.StridedShard(0, 2)},
    "*.embed_tokens.weight": {"fsdp": tonnage.Shard(1), "tp": tonnage.Shard(0)},
    "*": tonnage.Replicate(),
}


def test_from_one_mesh_to_another_and_back(whole: Path, tensors: Tensors, tmp_path: Path) -> None:
    first = tonnage.reshard(whole, tmp_path / "a", tonnage.Mesh(fsdp=2, tp=2), RULES)
    assert (first.ranks, first.tensors, len(first.files)) == (4, len(tensors), 4)
    fsdp = tonnage.reshard(
        tmp_path / "a", tmp_path / "b", tonnage.Mesh(fsdp=3), {"*": tonnage.Replicate()}
    )
    assert fsdp.total_size == 3 * sum(one.nbytes for one in tensors.values())
    # [0-3] is a range, as in every pattern.
    rules = {"*.layers.[0-3].*": tonnage.Shard(0), "*": tonnage.Replicate()}
    tonnage.reshard(tmp_path / "b", tmp_path / "c", tonnage.Mesh(tp=8), rules)
    tonnage.reshard(tmp_path / "c", tmp_path / "d", tonnage.Mesh(pp=2), "auto")
    tonnage.reshard(tmp_path / "d", tmp_path / "e.safetensors", checksums=True)
    same(tmp_path / "e.safetensors", tensors)
    assert tonnage.open(tmp_path / "e.safetensors").metadata["format"] == "pt"
    assert tonnage.verify(tmp_path / "e.safetensors").ok


def test_a_ranks_file_is_what_a_plan_would_load(
    whole: Path, tensors: Tensors, tmp_path: Path
) -> None:
    plan = tonnage.open(whole).plan(tonnage.Mesh(fsdp=2, tp=2), RULES)
    done = tonnage.reshard(whole, tmp_path / "a", plan)
    for rank, file in enumerate(done.files):
        wanted = plan.load(rank=rank, framework="numpy")
        # The reference's package reads it as well.
        found = safetensors.numpy.load_file(file)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_names_say_where_tensors_go(whole: Path, tmp_path: Path) -> None:
    done = tonnage.reshard(whole, tmp_path / "tp", tonnage.Mesh(tp=4))
    shapes = {name: ref.shape for name, ref in tonnage.open(done.files[3]).items()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (8, 24)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (24, 8)
    assert shapes["model.norm.weight"] == (24,)


def test_progress_is_in_bytes_of_all_ranks(whole: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = tonnage.reshard(
        whole,
        tmp_path / "tp",
        tonnage.Mesh(tp=4),
        progress=lambda *at: told.append(at),
    )
    assert told[0] == (0, done.total_size)
    assert told[-1] == (done.total_size, done.total_size)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in (tmp_path / "tp").iterdir())
    with pytest.raises(KeyboardInterrupt):
        tonnage.reshard(whole, tmp_path / "tp", tonnage.Mesh(tp=3), progress=stop)
    assert sorted(path.name for path in (tmp_path / "tp").iterdir()) == before
    # Into the folder that is read.
    tonnage.reshard(tmp_path / "tp", tmp_path / "tp", tonnage.Mesh(tp=2))
    assert len(list((tmp_path / "tp").iterdir())) == 2


def test_what_is_wrong_is_refused(whole: Path, tmp_path: Path) -> None:
    done = tonnage.reshard(whole, tmp_path / "tp", tonnage.Mesh(tp=2))
    with pytest.raises(tonnage.UsageError, match="no rule"):
        tonnage.reshard(whole, tmp_path / "x", tonnage.Mesh(tp=2), {"step": tonnage.Replicate()})
    with pytest.raises(tonnage.UsageError, match="'auto' or a dict"):
        tonnage.reshard(whole, tmp_path / "x", tonnage.Mesh(tp=2), "guess")
    plan = tonnage.open(whole).plan(tonnage.Mesh(tp=2), {"*": tonnage.Replicate()})
    with pytest.raises(tonnage.UsageError, match="a plan has its rules"):
        tonnage.reshard(whole, tmp_path / "x", plan, "auto")
    Path(done.files[1]).unlink()
    with pytest.raises(tonnage.UsageError, match="2 ranks, and 1 are there"):
        tonnage.reshard(tmp_path / "tp", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_each_rank_saved_in_files_of_its_own_becomes_one_checkpoint(
    tensors: Tensors, tmp_path: Path
) -> None:
    """By `save_sharded`, with its record beside them, and by PyTorch's own writer, without one."""
    torch = pytest.importorskip("torch")
    import tonnage.torch
    import torch.distributed.checkpoint as dcp

    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    tonnage.torch.save_sharded(state, tmp_path / "ours", layout="per_rank", max_shard_size=4096)
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    for name in ("ours", "theirs"):
        ranks, whole = tmp_path / f"{name}-tp2", tmp_path / f"{name}-whole"
        tonnage.reshard(tmp_path / name, ranks, tonnage.Mesh(fsdp=1, tp=2), rules=RULES)
        tonnage.reshard(ranks, whole, tonnage.Mesh(tp=1), rules={"*": tonnage.Replicate()})
        same(whole, tensors)
