"""One rank of the oracle's process group: our tensors beside `distribute_tensor(...).to_local()`.

Run by torchrun with the folder of the models. The placements that ours are held to are those that
transformers gives the model's parameters in this very process group; the values are those of the
model loaded by one process. Each rank writes what differs, case by case.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent))
import models
import tonnage
import transformers
from loading import load_rank
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.pipeline_parallel import PipelineStage
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.initialization import no_tie_weights

State = dict[str, torch.Tensor]


@cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of all ranks, each form of it once: its process groups have threads of their own."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def single(folder: Path) -> Any:
    """The model as one process loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def cut(config: Any, layout: models.Layout, dense: DeviceMesh, experts: DeviceMesh) -> Any:
    """The model on the meta device, its parameters made DTensors by transformers."""
    # Tied parameters are cut one by one, as when transformers loads a model.
    with torch.device("meta"), no_tie_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    wanted = DistributedConfig(tp_size=layout.tp, ep_size=layout.ep, fsdp_size=layout.fsdp)
    model.config.distributed_config = wanted
    tp_plan, ep_plan, fsdp_plan = model._resolve_parallel_plans(wanted)
    if layout.tp > 1:
        apply_tensor_parallelism(model, dense["tp"], tp_plan)
    if layout.ep > 1:
        apply_expert_parallelism(model, experts["ep"], dense["tp"], ep_plan)
    if layout.fsdp > 1:
        both = TransformersDeviceMesh(dense, experts)
        apply_fully_sharded_data_parallelism(model, both, fsdp_plan, ep_plan)
    return model


def expected(whole: Any, config: Any, layout: models.Layout, mesh: DeviceMesh) -> State:
    """This rank's tensors, by PyTorch."""
    dense = mesh["pp", "fsdp", "tp"]
    shape = (layout.pp, layout.fsdp * layout.tp // layout.ep, layout.ep)
    outside = dist.get_world_size() // (shape[0] * shape[1] * shape[2])
    names = ("outside", "pp", "efsdp", "ep")
    experts = mesh_of((outside, *shape), names)
    parameters = dict(cut(config, layout, dense, experts).named_parameters(remove_duplicate=False))
    stage = PipelineStage(mesh["pp"])
    layers = len(whole.base_model.layers) if layout.pp > 1 else 0
    made = {}
    for name, value in whole.state_dict(keep_vars=True).items():
        if layout.pp > 1:
            owner = stage.find_rank_for_key(name, layers, whole.base_model_prefix)
            assert owner is not None, name
            if owner != stage.pp_rank:
                continue
        value, cut_to = value.detach(), parameters.get(name)
        if isinstance(cut_to, DTensor):
            heads = by_heads(name, value, config, layout, mesh)
            value = heads if heads is not None else local(value, cut_to)
        made[name] = value
    return made


def local(value: torch.Tensor, like: DTensor) -> torch.Tensor:
    """The part of a tensor that this rank has, where `like` says how it is placed."""
    # Without a rank to scatter from, every rank cuts its own copy of the same tensor.
    placed = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()


def by_heads(
    name: str, value: torch.Tensor, config: Any, layout: models.Layout, mesh: DeviceMesh
) -> torch.Tensor | None:
    """Keys and values that have fewer heads than there are ranks, which transformers would cut
    inside a head: each head lies on as many ranks as share it.
    """
    kv = getattr(config, "num_key_value_heads", layout.tp)
    if ".k_proj." not in name and ".v_proj." not in name:
        return None
    if kv % layout.tp == 0 or config.model_type == "gpt_oss":
        return None
    outside = dist.get_world_size() // (layout.fsdp * layout.tp)
    shape = (outside, layout.fsdp, kv, layout.tp // kv)
    grouped = mesh_of(shape, ("outside", "fsdp", "kv", "copies"))
    if layout.fsdp > 1:
        assert kv == 1, "one head: FSDP cuts it, and both tensor-parallel ranks have it"
        where, how = grouped["fsdp", "copies"], [Shard(0), Replicate()]
    else:
        where, how = grouped["kv", "copies"], [Shard(0), Replicate()]
    return distribute_tensor(value, where, how, src_data_rank=None).to_local()


def differences(ours: State, theirs: State) -> list[str]:
    """What is not the same, bit for bit."""
    found = [f"{name}: only we have it" for name in ours.keys() - theirs.keys()]
    found += [f"{name}: we lack it" for name in theirs.keys() - ours.keys()]
    for name in ours.keys() & theirs.keys():
        one, two = ours[name], theirs[name].contiguous()
        if one.shape != two.shape or one.dtype != two.dtype:
            found.append(
                f"{name}: {one.dtype} {list(one.shape)}, not {two.dtype} {list(two.shape)}"
            )
        elif not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            found.append(f"{name}: other bytes")
    return found


def main(folder: Path) -> None:
    """All cases, one after the other."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    report: dict[str, Any] = {}
    for model in models.MODELS:
        path = folder / model
        whole, checkpoint = single(path), tonnage.open(path)
        for name, layout in models.LAYOUTS.items():
            if (model, name) in models.MEANINGLESS:
                continue
            ranks = layout.pp * layout.fsdp * layout.tp
            # A case for two ranks is run twice, side by side.
            shape = (world // ranks, layout.pp, layout.fsdp, layout.tp)
            mesh = mesh_of(shape, ("outside", "pp", "fsdp", "tp"))
            theirs = expected(whole, whole.config, layout, mesh)
            ours = load_rank(checkpoint, layout.mesh, rank % ranks)
            wrong = differences(ours, theirs)
            report[f"{model}-{name}"] = {"tensors": len(ours), "wrong": wrong}
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
