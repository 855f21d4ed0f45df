"""Ranks of a process group: which one this is, and whether all of them mean the same."""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from typing import Any, NamedTuple

from tonnage import _errors

#: Seconds that ranks wait for each other, by default.
TIMEOUT = 300.0


class Member(NamedTuple):
    """A rank, and the group whose ranks agree first; `None` where it is on its own."""

    rank: int
    group: Any
    alone: bool


def member(size: int, rank: int | None, group: Any) -> Member:
    """This process among `size` ranks: as said, or as `torch.distributed` has it.

    Raises `UsageError` where nobody says, or the group has another number of ranks.
    """
    dist = _distributed(group is not None)
    if rank is not None and group is None:
        return Member(_within(rank, size), None, True)
    if dist is None:
        if rank is None and size == 1:
            return Member(0, None, True)
        text = f"which of the {size} ranks this is: give rank=, or start torch.distributed"
        raise _errors.usage(text, "RANK")
    world = dist.get_world_size(group)
    if world != size:
        text = f"the plan is for {size} ranks, and the group has {world}"
        raise _errors.usage(text, "RANK", found=str(world), needed=str(size))
    mine = dist.get_rank(group)
    if rank is not None and rank != mine:
        text = f"rank={rank} was given, and the group says that this is rank {mine}"
        raise _errors.usage(text, "RANK")
    return Member(mine, group, world == 1)


def _within(rank: int, size: int) -> int:
    if not 0 <= rank < size:
        text = f"rank {rank} is not one of the {size} of the plan"
        raise _errors.usage(text, "RANK", found=str(rank))
    return rank


def _distributed(wanted: bool) -> Any:
    """`torch.distributed`, where this process has started it."""
    if "torch" not in sys.modules and not wanted:
        return None
    dist = importlib.import_module("torch.distributed")
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist


def agree(digest: str, who: Member, timeout: float | None) -> None:
    """Compares a digest on all ranks of a group, before any of them does anything else.

    Raises `UsageError` on every rank where two differ, or where a rank does not answer in time.
    """
    if who.alone:
        return
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    by_nccl = dist.get_backend(who.group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if by_nccl else "cpu"
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(who.group))]
    limit = TIMEOUT if timeout is None else timeout
    try:
        work = dist.all_gather(all_of_them, mine, group=who.group, async_op=True)
        work.wait(timedelta(seconds=limit))
        found = [bytes(one.cpu().tolist()).hex() for one in all_of_them]
    except RuntimeError as error:
        text = f"the other ranks did not tell their plans within {limit:g} s: {error}"
        raise _errors.usage(text, "PLAN_DIGEST") from error
    others = [rank for rank, one in enumerate(found) if one != digest]
    if others:
        text = (
            f"the plan of rank {who.rank} ({digest[:12]}…) is not that of "
            f"{'rank' if len(others) == 1 else 'ranks'} {', '.join(map(str, others))} "
            f"({found[others[0]][:12]}…): plans must be made alike on all ranks"
        )
        raise _errors.usage(text, "PLAN_DIGEST", found=found[others[0]], needed=digest)
