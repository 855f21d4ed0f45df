"""Bytes between the ranks of a group, and errors that reach all of them.

Everything goes as `uint8`: gloo has no other form for most of the dtypes that checkpoints have, and
nothing that one rank tells another is ever unpickled. A rank that is gone makes the next exchange
fail on those that wait for it: at once where its connection breaks, at the group's timeout at the
latest.
"""

from __future__ import annotations

import json
import socket
import zlib
from typing import Any

import torch
import torch.distributed as dist

from .. import _errors


class Ranks:
    """The ranks that save or load together; one alone where there is no group."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.alone = not dist.is_available() or not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)
        if self.rank < 0:
            raise _errors.usage("this process is not in the group", "GROUP")
        self.alone = self.alone or self.size == 1
        self.device = torch.device("cpu")
        if not self.alone:
            kinds = getattr(group or dist.group.WORLD, "_device_types", [self.device])
            if self.device not in kinds:
                index = getattr(torch, kinds[0].type).current_device()
                self.device = torch.device(kinds[0].type, index)

    @property
    def leads(self) -> bool:
        """Whether this is the coordinator: the group's first rank."""
        return self.rank == 0

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank gives, on the coordinator; elsewhere nothing."""
        if self.alone:
            return [data]
        sizes = self._sizes(len(data))
        if not self.leads:
            self._send(data, 0)
            return []
        return [data, *(self._receive(sizes[rank], rank) for rank in range(1, self.size))]

    def scatter(self, parts: list[bytes]) -> bytes:
        """What the coordinator has for this rank."""
        if self.alone:
            return parts[0]
        sizes = torch.tensor([len(part) for part in parts] if self.leads else [0] * self.size)
        sizes = sizes.to(self.device)
        dist.broadcast(sizes, src=self._global(0), group=self.group)
        if not self.leads:
            return self._receive(int(sizes[self.rank]), 0)
        for rank in range(1, self.size):
            self._send(parts[rank], rank)
        return parts[0]

    def _sizes(self, size: int) -> list[int]:
        mine = torch.tensor([size], device=self.device)
        sizes = [torch.zeros_like(mine) for _ in range(self.size)]
        dist.all_gather(sizes, mine, group=self.group)
        return [int(size) for size in sizes]

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _send(self, data: bytes, rank: int) -> None:
        if data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
            dist.send(buffer, dst=self._global(rank), group=self.group)

    def _receive(self, size: int, rank: int) -> bytes:
        if not size:
            return b""
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        dist.recv(buffer, src=self._global(rank), group=self.group)
        return bytes(buffer.cpu().numpy())


def pack(head: object, body: bytes = b"") -> bytes:
    """A value of JSON and bytes, as one message. Names repeat, so it is packed."""
    text = json.dumps(head, separators=(",", ":")).encode()
    return zlib.compress(len(text).to_bytes(8, "little") + text + body, 1)


def unpack(message: bytes) -> tuple[Any, bytes]:
    """The other way."""
    data = zlib.decompress(message)
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def failure(error: BaseException) -> dict[str, Any]:
    """An error, as one rank tells others of it."""
    text = str(error) or type(error).__name__
    return {
        "error": text,
        "code": getattr(error, "code", None),
        "tensor": getattr(error, "tensor", None),
        "file": getattr(error, "file", None),
    }


def failed(heads: list[Any]) -> dict[str, Any] | None:
    """The first rank's failure among what all ranks say, with its rank."""
    for rank, head in enumerate(heads):
        if "error" in head:
            return {**head, "rank": head.get("rank", rank)}
    return None


def raise_for(head: dict[str, Any]) -> None:
    """Raises the failure that another rank told of, if this is one."""
    if "error" not in head:
        return
    text = f"rank {head['rank']}: {head['error']}"
    raise _errors.make(
        "Rank",
        text,
        code=head.get("code") or "RANK",
        tensor=head.get("tensor"),
        file=head.get("file"),
    )


def host() -> str:
    """What tells this machine from others."""
    return socket.gethostname()
