"""Small checkpoints that NVIDIA's Model Optimizer exported, and what its tensor classes make of them.

    pip install nvidia-modelopt==0.47.0 transformers==5.24.0 && python conformance/quant/generate/modelopt_cases.py
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import sys
import tempfile
from pathlib import Path

import modelopt
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import from_quantized_weight
from modelopt.torch.quantization.qtensor import (
    FP8QTensor,
    INT4QTensor,
    MXFP4QTensor,
    MXFP8QTensor,
    NVFP4QTensor,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import corpus

BF16, F32 = torch.bfloat16, torch.float32


def fp8(weight: torch.Tensor, part: dict) -> torch.Tensor:
    scale = part["weight_scale"]
    scale = scale if scale.dim() == 0 else scale[:, None]
    return FP8QTensor(weight.shape, BF16, weight).dequantize(F32, scale=scale)


def nvfp4(weight: torch.Tensor, part: dict) -> torch.Tensor:
    shape = torch.Size([weight.shape[0], weight.shape[1] * 2])
    return NVFP4QTensor(shape, BF16, weight).dequantize(
        BF16, scale=part["weight_scale"], double_scale=part["weight_scale_2"], block_sizes={-1: 16}
    )


def mxfp8(weight: torch.Tensor, part: dict) -> torch.Tensor:
    return MXFP8QTensor(weight.shape, BF16, weight).dequantize(BF16, scale=part["weight_scale"])


def mxfp4(weight: torch.Tensor, part: dict) -> torch.Tensor:
    shape = torch.Size([weight.shape[0], weight.shape[1] * 2])
    return MXFP4QTensor(shape, BF16, weight).dequantize(BF16, scale=part["weight_scale"], block_sizes={-1: 32})


def int8(weight: torch.Tensor, part: dict) -> torch.Tensor:
    return from_quantized_weight(weight, part["weight_scale"], "int8_sq", F32)


def model() -> LlamaForCausalLM:
    torch.manual_seed(29)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=16, head_dim=16, architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).to(BF16)


def make(path: str, config: dict, decode: object, scheme: str, bits: int, group: int | None, how: str, notes: str = "") -> None:
    whole = model()
    mtq.quantize(whole, copy.deepcopy(config), lambda made: made(torch.arange(16)[None]))
    where = corpus.folder(path)
    with tempfile.TemporaryDirectory() as made, torch.no_grad(), contextlib.redirect_stdout(None):
        export_hf_checkpoint(whole, export_dir=made)
        for name in ("config.json", "hf_quant_config.json", "model.safetensors"):
            shutil.copyfile(Path(made) / name, where / name)
    parts = load_file(where / "model.safetensors")
    expected = {}
    for name, weight in parts.items():
        stem = name.removesuffix(".weight")
        if stem != name and f"{stem}.weight_scale" in parts:
            own = {key.removeprefix(f"{stem}."): value for key, value in parts.items() if key.startswith(f"{stem}.")}
            expected[name] = decode(weight, own).contiguous()
    save_file(expected, where / "expected.safetensors")
    corpus.case(path, library="nvidia-modelopt", version=modelopt.__version__, scheme=scheme, bits=bits, group=group,
                how=how, writer="modelopt.torch.quantization.quantize, export_hf_checkpoint", notes=notes)


def in_memory() -> None:
    torch.manual_seed(30)
    parts, expected = {}, {}
    for name, shape in (("model.layers.0.self_attn.q_proj", (32, 128)), ("model.layers.0.mlp.down_proj", (40, 64))):
        weight = (torch.randn(shape) * 0.1).to(BF16)
        made, scale = INT4QTensor.quantize(weight, 32)
        parts[f"{name}.weight"], parts[f"{name}.weight_scale"] = made._quantized_data, scale
        expected[f"{name}.weight"] = made.dequantize(BF16, scale=scale, block_sizes={-1: 32}).contiguous()
    where = corpus.folder("modelopt-int4-qtensor/g32-bf16")
    save_file(parts, where / "model.safetensors")
    save_file(expected, where / "expected.safetensors")
    corpus.case("modelopt-int4-qtensor/g32-bf16", library="nvidia-modelopt", version=modelopt.__version__,
                scheme="modelopt-int4-qtensor", bits=4, group=32, how="INT4QTensor.dequantize", writer="INT4QTensor.quantize",
                notes="the class's own packing, which an export does not use: high nibble first, offset 8, and the scale divides")


if __name__ == "__main__":
    exact = "expected is F32; in another dtype the library rounds the scale to it before it multiplies"
    make("fp8-tensor/modelopt", mtq.FP8_DEFAULT_CFG, fp8, "fp8-tensor", 8, None, "FP8QTensor.dequantize to F32", exact)
    make("fp8-row/modelopt", mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, fp8, "fp8-row", 8, 0, "FP8QTensor.dequantize to F32", exact)
    make("nvfp4-mul/modelopt", mtq.NVFP4_DEFAULT_CFG, nvfp4, "nvfp4-mul", 4, 16, "NVFP4QTensor.dequantize", "weight_scale_2 multiplies")
    make("nvfp4-mul/modelopt-weight-only", mtq.W4A16_NVFP4_CFG, nvfp4, "nvfp4-mul", 4, 16, "NVFP4QTensor.dequantize", "weight_scale_2 multiplies; no input_scale")
    make("modelopt-mxfp8/bf16", mtq.MXFP8_DEFAULT_CFG, mxfp8, "modelopt-mxfp8", 8, 32, "MXFP8QTensor.dequantize")
    make("modelopt-mxfp4/bf16", mtq.MXFP4_DEFAULT_CFG, mxfp4, "modelopt-mxfp4", 4, 32, "MXFP4QTensor.dequantize", "scales are U8, named as NVFP4's")
    make("modelopt-int8/f32", mtq.INT8_DEFAULT_CFG, int8, "modelopt-int8", 8, 0, "from_quantized_weight(int8_sq) to F32", exact)
    in_memory()
    corpus.finish()
