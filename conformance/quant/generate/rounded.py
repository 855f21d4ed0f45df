"""Tensors that libraries quantised by rounding to nearest, with the values that they were made of.

One file a library: `rounded/<library>.safetensors`. A case has `<case>.values` (F32), and parts as
the library computed them: `.codes` one a byte or as the library packs them, `.scale`, `.zero`,
`.global`. Run this once in each library's environment, with its name:
`python conformance/quant/generate/rounded.py compressed-tensors`, `torchao`, `mlx` or
`bitsandbytes`.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[1] / "rounded"


def values(rows: int = 8, columns: int = 128) -> np.ndarray[Any, Any]:
    """Weights of several sizes, a block of zeros, and one outlier."""
    random = np.random.default_rng(5)
    made = random.normal(0, 0.05, (rows, columns)).astype(np.float32)
    made *= np.exp2(np.arange(rows) % 5 - 2).astype(np.float32)[:, None]
    made[2, 32:64] = np.abs(made[2, 32:64])
    made[3, 64:96] = -np.abs(made[3, 64:96])
    made[5, 17] = 3.75
    return made


def compressed_tensors() -> dict[str, Any]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    made: dict[str, Any] = {}
    weight = torch.from_numpy(values())

    def put(name: str, blocks: Any, **said: Any) -> None:
        args = QuantizationArgs(**said)
        low, high = blocks
        scale, zero = calculate_qparams(low, high, args)
        kept = None if args.symmetric else zero
        codes = quantize(weight, scale, kept, args, dtype=args.pytorch_dtype())
        made[f"{name}.values"] = weight.clone()
        made[f"{name}.codes"] = codes.contiguous()
        made[f"{name}.scale"] = scale.contiguous()
        if kept is not None:
            made[f"{name}.zero"] = kept.to(torch.int8).contiguous()

    def groups(size: int) -> Any:
        cut = weight.reshape(8, -1, size)
        return cut.amin(-1), cut.amax(-1)

    for bits in (4, 8):
        for symmetric in (True, False):
            kind = "sym" if symmetric else "asym"
            put(
                f"int{bits}-g32-{kind}",
                groups(32),
                num_bits=bits,
                type="int",
                symmetric=symmetric,
                strategy="group",
                group_size=32,
            )
    whole = (weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True))
    put("int8-channel-sym", whole, num_bits=8, type="int", symmetric=True, strategy="channel")
    put("fp8-row", whole, num_bits=8, type="float", symmetric=True, strategy="channel")
    one = (weight.amin().reshape(1), weight.amax().reshape(1))
    put("fp8-tensor", one, num_bits=8, type="float", symmetric=True, strategy="tensor")
    return made


def torchao() -> dict[str, Any]:
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    made: dict[str, Any] = {}
    weight = torch.from_numpy(values())
    for name, element in (("mxfp8", torch.float8_e4m3fn), ("mxfp4", torch.float4_e2m1fn_x2)):
        scale, codes = to_mx(weight, element, 32, ScaleCalculationMode.FLOOR)
        made[f"{name}.values"] = weight.clone()
        made[f"{name}.codes"] = codes.view(torch.uint8).contiguous()
        made[f"{name}.scale"] = scale.view(torch.uint8).reshape(8, -1).contiguous()
    whole = per_tensor_amax_to_scale(weight.abs().max())
    scale, codes = nvfp4_quantize(weight, 16, per_tensor_scale=whole)
    made["nvfp4.values"] = weight.clone()
    made["nvfp4.codes"] = codes.view(torch.uint8).contiguous()
    made["nvfp4.scale"] = scale.view(torch.uint8).reshape(8, -1).contiguous()
    made["nvfp4.global"] = whole.reshape(1).float()
    return made


def mlx() -> dict[str, Any]:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    made: dict[str, Any] = {}
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64):
            name = f"mlx-b{bits}-g{group}"
            codes, scales, biases = mx.quantize(mx.array(values()), group_size=group, bits=bits)
            made[f"{name}.values"] = values()
            made[f"{name}.codes"] = np.array(codes)
            made[f"{name}.scale"] = np.array(scales)
            made[f"{name}.zero"] = np.array(biases)
    return made


def bitsandbytes() -> dict[str, Any]:
    import bitsandbytes.functional as f
    import torch

    made: dict[str, Any] = {}
    for block in (64, 128):
        weight = torch.from_numpy(values())
        codes, state = f.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        made[f"nf4-b{block}.values"] = weight
        made[f"nf4-b{block}.codes"] = codes.view(torch.uint8).contiguous()
        made[f"nf4-b{block}.scale"] = state.absmax.contiguous()
    return made


def main() -> None:
    library = sys.argv[1]
    made = globals()[library.replace("-", "_")]()
    if library == "mlx":
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    HERE.mkdir(exist_ok=True)
    save_file(made, HERE / f"{library}.safetensors", {"library": f"{library} {version(library)}"})


if __name__ == "__main__":
    main()
