"""Small checkpoints written by torchao, and what its tensor classes make of themselves.

    pip install torchao==0.18.0 torch safetensors && python conformance/quant/generate/torchao_cases.py

Its int4 classes need a GPU package to pack, so they are not here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchao
from safetensors.torch import save_file
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor
from torchao.quantization.quant_primitives import MappingType

sys.path.insert(0, str(Path(__file__).parent))
import corpus

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
BF16, F16 = torch.bfloat16, torch.float16


def model(shapes: list[tuple[int, int]], dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(19)
    whole = torch.nn.Module()
    for name, (rows, columns) in zip(NAMES, shapes, strict=False):
        at = whole
        *path, last = name.split(".")
        for step in path:
            if step not in at._modules:
                at.add_module(step, torch.nn.Module())
            at = at._modules[step]
        linear = torch.nn.Linear(columns, rows, bias=False)
        size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
        linear.weight.data = (torch.randn(rows, columns) * size * 0.1 + 0.03 * size).to(dtype)
        at.add_module(last, linear)
    return whole


def write(path: str, state: dict, *, scheme: str, bits: int, group: int | None, how: str, writer: str, notes: str = "") -> None:
    expected = {name: tensor.dequantize().contiguous() for name, tensor in state.items()}
    state["norm.weight"] = torch.ones(8, dtype=BF16)
    parts, metadata = flatten_tensor_state_dict(state)
    where = corpus.folder(path)
    save_file({k: v.contiguous() for k, v in parts.items()}, where / "model.safetensors", metadata=metadata)
    corpus.steady(where / "model.safetensors")
    save_file(expected, where / "expected.safetensors")
    corpus.case(path, library="torchao", version=torchao.__version__, scheme=scheme, bits=bits, group=group, how=how,
                writer=writer, notes=notes)


def configured(path: str, config: object, scheme: str, bits: int, group: int | None, *, dtype: torch.dtype = BF16, notes: str = "") -> None:
    whole = model([(24, 128), (20, 96)], dtype)
    quantize_(whole, config)
    state = {f"{name}.weight": whole.get_submodule(name).weight.data for name in NAMES}
    kind = type(state[f"{NAMES[0]}.weight"]).__name__
    write(path, state, scheme=scheme, bits=bits, group=group, how=f"{kind}.dequantize",
          writer=f"quantize_({type(config).__name__}), flatten_tensor_state_dict", notes=notes)


def micro(path: str, make: object, scheme: str, bits: int, group: int, shapes: list[tuple[int, int]], notes: str) -> None:
    whole = model(shapes, BF16)
    state = {f"{name}.weight": make(whole.get_submodule(name).weight.data) for name in NAMES[: len(shapes)]}
    kind = type(state[f"{NAMES[0]}.weight"]).__name__
    write(path, state, scheme=scheme, bits=bits, group=group, how=f"{kind}.dequantize",
          writer=f"{kind}, flatten_tensor_state_dict", notes=notes)


def nv(swizzled: bool, scaled: bool) -> object:
    def make(weight: torch.Tensor) -> NVFP4Tensor:
        whole = per_tensor_amax_to_scale(weight.abs().max().float()) if scaled else None
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole, is_swizzled_scales=swizzled)

    return make


def mx(dtype: object, swizzled: bool) -> object:
    return lambda weight: MXTensor.to_mx(weight, dtype, is_swizzled_scales=swizzled)


if __name__ == "__main__":
    configured("torchao-int8/weight-only-channel", Int8WeightOnlyConfig(), "torchao-int8", 8, 0)
    configured("torchao-int8/weight-only-channel-f16", Int8WeightOnlyConfig(), "torchao-int8", 8, 0, dtype=F16)
    configured("torchao-int8/weight-only-tensor", Int8WeightOnlyConfig(granularity=PerTensor()), "torchao-int8", 8, None)
    configured("torchao-int8/dynamic-channel", Int8DynamicActivationInt8WeightConfig(), "torchao-int8", 8, 0)
    for bits in (2, 3, 4, 8):
        dtype = getattr(torch, f"int{bits}")
        configured(f"torchao-intx/int{bits}-g32", IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(32)), "torchao-intx", bits, 32)
    asymmetric = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC)
    configured("torchao-intx/int4-g32-asym", asymmetric, "torchao-intx", 4, 32)
    configured("torchao-intx/int4-channel-f16", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)), "torchao-intx", 4, 0, dtype=F16)
    configured("torchao-float8/weight-only-row", Float8WeightOnlyConfig(), "torchao-float8", 8, 0)

    even, ragged = [(128, 64)], [(32, 128), (136, 64)]
    swizzle = "block scales in tiles of 128 rows and 4 columns"
    micro("torchao-nvfp4/swizzled", nv(True, True), "torchao-nvfp4", 4, 16, even, swizzle)
    micro("torchao-nvfp4/swizzled-padded", nv(True, True), "torchao-nvfp4", 4, 16, ragged, swizzle + ", padded to whole tiles")
    micro("torchao-nvfp4/plain", nv(False, True), "torchao-nvfp4", 4, 16, ragged, "block scales in rows")
    micro("torchao-nvfp4/plain-one-level", nv(False, False), "torchao-nvfp4", 4, 16, ragged, "no scale of the whole tensor")
    for dtype, name, bits in ((torch.float8_e4m3fn, "e4m3", 8), (torch.float8_e5m2, "e5m2", 8), (torch.float4_e2m1fn_x2, "e2m1", 4)):
        micro(f"torchao-mx/{name}", mx(dtype, False), "torchao-mx", bits, 32, [(32, 128), (40, 96)], "block scales in rows")
        micro(f"torchao-mx/{name}-swizzled", mx(dtype, True), "torchao-mx", bits, 32, ragged, swizzle + ", padded to whole tiles")
    corpus.finish()
