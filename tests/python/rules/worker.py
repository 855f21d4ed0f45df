"""One rank of the oracle's process group: our tensors beside `distribute_tensor(...).to_local()`.

Run with the folder of the models, by itself or by torchrun. The placements that ours are held to
are those that transformers gives the model's parameters in this very process group; the values are
those of the model loaded by one process. Each rank writes what differs, case by case.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

sys.path.insert(0, str(Path(__file__).parent))
import loading
import models
import tonnage
import transformers
from catalogs import Ref
from loading import load_rank
from tonnage import _rules as rules
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.pipeline_parallel import PipelineStage
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.initialization import no_tie_weights

State = dict[str, torch.Tensor]
#: Axes where heads of keys and values lie on several ranks each.
HEADS = ("outside", "fsdp", "kv", "copies")


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


def expert_mesh(layout: models.Layout) -> DeviceMesh:
    """The ranks as experts see them."""
    shape = (layout.pp, layout.fsdp * layout.tp // layout.ep, layout.ep)
    return mesh_of((dist.get_world_size() // prod(shape), *shape), ("outside", "pp", "efsdp", "ep"))


def expected(
    whole: Any, placed: Any, config: Any, layout: models.Layout, mesh: DeviceMesh
) -> State:
    """This rank's tensors, by PyTorch."""
    parameters = dict(placed.named_parameters(remove_duplicate=False))
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
            heads = by_heads(name, value, config, layout)
            value = heads if heads is not None else local(value, cut_to)
        made[name] = value
    return made


def local(value: torch.Tensor, like: DTensor) -> torch.Tensor:
    """The part of a tensor that this rank has, where `like` says how it is placed."""
    # Without a rank to scatter from, every rank cuts its own copy of the same tensor.
    placed = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()


def as_placed(whole: Any, placed: Any) -> State:
    """This rank's tensors, as the parameters of `placed` lie."""
    parameters = dict(placed.named_parameters(remove_duplicate=False))
    made = {}
    for name, value in whole.state_dict(keep_vars=True).items():
        like, made[name] = parameters.get(name), value.detach()
        if isinstance(like, DTensor):
            made[name] = local(value.detach(), like)
    return made


def placements(world: int) -> dict[str, Any]:
    """Tensors and placements that models do not have: what differs from PyTorch, by case."""
    mesh, flat = mesh_of((2, 2), ("dp", "tp")), mesh_of((world,), ("flat",))
    strided = StridedShard
    cases: dict[str, tuple[tuple[int, ...], DeviceMesh, list[Any]]] = {
        "rows twice": ((9, 4), mesh, [Shard(0), Shard(0)]),
        "fewer rows than ranks": ((3, 4), mesh, [Shard(0), Shard(0)]),
        "fsdp outside of tp": ((8, 4), mesh, [strided(0, split_factor=2), Shard(0)]),
        "fsdp outside of tp, uneven": ((7, 3), mesh, [strided(0, split_factor=2), Shard(0)]),
        "strided in another dimension": ((4, 12), mesh, [Shard(0), strided(1, split_factor=3)]),
        "strided twice": ((16, 2), mesh, [strided(0, split_factor=4), strided(0, split_factor=2)]),
        "both dimensions": ((5, 7), mesh, [Shard(1), Shard(0)]),
        "from the end": ((2, 3, 5), mesh, [Replicate(), Shard(2)]),
        "one axis": ((6, 2), mesh["tp"], [Shard(0)]),
        "one axis, outer": ((6, 2), mesh["dp"], [Shard(1)]),
        "all ranks": ((10, 2), flat, [Shard(0)]),
        "no dimension": ((), mesh, [Replicate(), Replicate()]),
        "no element": ((0, 4), mesh, [Shard(0), Replicate()]),
    }
    whole, made = {}, {}
    for at, (name, (shape, where, how)) in enumerate(cases.items()):
        whole[name] = torch.arange(1000 * at, 1000 * at + prod(shape)).reshape(shape)
        meta = torch.empty(shape, dtype=torch.int64, device="meta")
        made[name] = distribute_tensor(meta, where, how, src_data_rank=None)
    refs = {name: Ref(tuple(one.shape), "I64") for name, one in whole.items()}
    request = rules.request(refs, made)
    arrays = {name: one.numpy() for name, one in whole.items()}
    found = loading.load(request, arrays, dist.get_rank())
    ours = {name: torch.from_numpy(one.copy()) for name, one in found.items()}
    return {"wrong": differences(ours, {name: local(whole[name], made[name]) for name in cases})}


def by_heads(
    name: str, value: torch.Tensor, config: Any, layout: models.Layout
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
    grouped = mesh_of((outside, layout.fsdp, kv, layout.tp // kv), HEADS)
    if layout.fsdp > 1:
        assert kv == 1, "one head: FSDP cuts it, and both tensor-parallel ranks have it"
        where, how = grouped["fsdp", "copies"], [Shard(0), Replicate()]
    else:
        where, how = grouped["kv", "copies"], [Shard(0), Replicate()]
    return distribute_tensor(value, where, how, src_data_rank=None).to_local()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes."""
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


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
        elif not torch.equal(raw(one), raw(two)):
            found.append(f"{name}: other bytes")
    return found


def prepare() -> None:
    """Makes all meshes, which takes all ranks; the cases for two ranks are for two of them."""
    world = dist.get_world_size()
    for layout in models.LAYOUTS.values():
        mesh_of_layout(layout)
        expert_mesh(layout)
        for kv in (1, 2):
            if kv < layout.tp:
                outside = world // (layout.fsdp * layout.tp)
                mesh_of((outside, layout.fsdp, kv, layout.tp // kv), HEADS)


def mesh_of_layout(layout: models.Layout) -> DeviceMesh:
    """The ranks as a layout has them; where it needs two, it is there twice."""
    shape = (layout.pp, layout.fsdp, layout.tp)
    return mesh_of((dist.get_world_size() // prod(shape), *shape), ("outside", "pp", "fsdp", "tp"))


def case(folder: Path, model: str, name: str, whole: Any) -> dict[str, Any]:
    """What is wrong with this rank's tensors of a model on a mesh."""
    layout, rank, checkpoint = models.LAYOUTS[name], dist.get_rank(), tonnage.open(folder / model)
    mesh = mesh_of_layout(layout)
    placed = cut(whole.config, layout, mesh["pp", "fsdp", "tp"], expert_mesh(layout))
    theirs = expected(whole, placed, whole.config, layout, mesh)
    ours = load_rank(checkpoint, layout.mesh, rank % layout.mesh.size)
    report: dict[str, Any] = {"tensors": len(ours), "wrong": differences(ours, theirs)}
    if layout.pp == 1:
        # The same from the DTensors themselves, planned for all four ranks at once.
        ours = load_rank(checkpoint, placed, rank)
        report["from_dtensors"] = differences(ours, as_placed(whole, placed))
    return report


def main(folder: Path) -> None:
    """This rank's cases, one after the other."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    prepare()
    report: dict[str, Any] = {"placements": placements(world)}
    for model in models.MODELS:
        whole = single(folder / model)
        mine = [
            name
            for at, (one, name) in enumerate(models.MEANT)
            # The first and the last two ranks share the cases for two ranks.
            if one == model and (models.LAYOUTS[name].mesh.size == world or rank // 2 == at % 2)
        ]
        for name in mine:
            report[f"{model}-{name}"] = case(folder, model, name, whole)
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, ranks: int) -> int:
    """Starts the ranks as torchrun does, from a process that has imported everything: 0 if all
    ended well.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                main(folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        failed |= status
        if failed:
            # The others would wait for it until a timeout.
            for other in children:
                os.kill(other, signal.SIGKILL)
    return 1 if failed else 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]))
    else:
        sys.exit(launch(Path(sys.argv[1]), 4))
