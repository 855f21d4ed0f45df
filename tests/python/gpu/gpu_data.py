"""What the tests on a GPU share: names of the device, tensors, and how they are compared."""

from __future__ import annotations

from typing import Any

import torch

MIB = 1 << 20
DEVICE = "cuda:0"
#: The engine's name for PyTorch's device.
ENGINE = "rocm:0" if torch.version.hip else "cuda:0"


def values() -> dict[str, Any]:
    """Tensors of many dtypes and sizes: shared regions, regions of their own, none at all."""
    generator = torch.Generator().manual_seed(7)

    def floats(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    tensors = {
        "large.f32": floats(2048, 1536),
        "large.bf16": floats(4096, 1000).to(torch.bfloat16),
        "odd.f16": floats(333, 777).to(torch.float16),
        "bool": floats(1000) > 0,
        "f64": floats(7, 5).double(),
        "i64": torch.arange(1001),
        "u8": torch.arange(255, dtype=torch.uint8),
        "c64": torch.complex(floats(5, 3), floats(5, 3)),
        "f8": floats(64, 64).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    tensors |= {f"small.{at}": floats(at % 37 + 1, 3) for at in range(500)}
    return tensors


def same(found: Any, wanted: Any) -> bool:
    """Whether two tensors have the same bits, wherever they are."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    left, right = found.cpu().contiguous(), wanted.cpu().contiguous()
    if not left.numel():
        return True
    as_bytes = torch.uint8
    return torch.equal(left.reshape(-1).view(as_bytes), right.reshape(-1).view(as_bytes))
