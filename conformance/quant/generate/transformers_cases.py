"""Small checkpoints in formats that transformers reads, and what its own code makes of them.

    pip install transformers==5.24.0 nvidia-modelopt==0.47.0 && python conformance/quant/generate/transformers_cases.py

transformers only reads some of these formats on a CPU. Where it cannot write one, another library's quantiser
made the numbers (`writer` says which), or, for a reader without any writer, each code occurs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TORCH_COMPILE_DISABLE"] = "1"

import torch
import transformers
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor
from safetensors.torch import save_file
from transformers import BitNetQuantConfig, FineGrainedFP8Config, MetalConfig, Mxfp4Config
from transformers.integrations import finegrained_fp8, gemma_quant, metal_quantization
from transformers.integrations.bitnet import (
    AutoBitLinear,
    BitLinear,
    WeightQuant,
    pack_weights,
    unpack_weights,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

sys.path.insert(0, str(Path(__file__).parent))
import corpus

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def weights(*shape: int) -> torch.Tensor:
    size = torch.exp2(torch.arange(shape[-2]) % 5 - 2.0)[:, None]
    return torch.randn(*shape) * size * 0.1 + 0.03 * size


def write(path: str, parts: dict, expected: dict, config: dict, **row: object) -> None:
    where = corpus.folder(path)
    save_file({k: v.contiguous() for k, v in parts.items()}, where / "model.safetensors", metadata={"format": "pt"})
    save_file({k: v.contiguous() for k, v in expected.items()}, where / "expected.safetensors")
    text = json.dumps({"quantization_config": config}, indent=2, sort_keys=True, default=str)
    (where / "config.json").write_text(text)
    corpus.case(path, library="transformers", version=transformers.__version__, scheme=path.split("/")[0], **row)


def fp8_blocks() -> None:
    config = FineGrainedFP8Config().to_dict()
    for scheme, name in ((None, "256x128"), ("ue8m0", "256x128-ue8m0")):
        torch.manual_seed(31)
        holder = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt=scheme))
        key = f"{Q}.weight"
        parts = finegrained_fp8.Fp8Quantize(holder).convert({key: weights(256, 128).to(BF16)})
        back = finegrained_fp8.Fp8Dequantize(holder)._dequantize_one(parts[key], parts[f"{key}_scale_inv"], BF16)
        write(f"fp8-block/{name}", parts, {key: back}, dict(config, scale_fmt=scheme) if scheme else config, bits=8, group=[128, 128],
              how="finegrained_fp8.Fp8Dequantize._dequantize_one", writer="finegrained_fp8.Fp8Quantize.convert",
              notes="weight_scale_inv is multiplied, whatever its name says" + ("; scales are powers of two" if scheme else ""))
    for rows, columns, dtype in ((192, 256, BF16), (320, 200, BF16), (130, 136, F32)):
        torch.manual_seed(32)
        value = weights(rows, columns).to(BF16)
        _, scale = FP8QTensor.quantize(value, block_sizes={-1: 128, -2: 128})
        # With a scale that is BF16 already, the library's rounding of it to the wanted dtype changes nothing. It is
        # made a little larger first, so that no weight falls outside what E4M3 can hold.
        scale = scale.float() if dtype == F32 else (scale.float() * (1 + 2**-7)).to(BF16).float()
        made, scale = FP8QTensor.quantize(value.float(), scale, block_sizes={-1: 128, -2: 128})
        parts = {f"{Q}.weight": made._quantized_data, f"{Q}.weight_scale_inv": scale.float()}
        back = finegrained_fp8._dequantize_fp8_weight(made._quantized_data, scale, [128, 128], dtype)
        write(f"fp8-block/{rows}x{columns}{'-f32' if dtype == F32 else ''}", parts, {f"{Q}.weight": back}, config, bits=8, group=[128, 128],
              how="finegrained_fp8._dequantize_fp8_weight", writer="modelopt FP8QTensor.quantize, with the names that transformers reads",
              notes="the last blocks are not full; Fp8Dequantize of the same library divides rows by rows of scales, and reads such a weight wrongly or refuses it")


def fp4_experts() -> None:
    torch.manual_seed(33)
    parts, expected = {"model.layers.0.mlp.router.bias": torch.zeros(2, dtype=BF16)}, {}
    for name, shape in (("gate_up_proj", (2, 64, 64)), ("down_proj", (2, 32, 64))):
        made, scale = MXFP4QTensor.quantize(weights(*shape).to(BF16), 32)
        blocks = made._quantized_data.reshape(shape[0], shape[1], shape[2] // 32, 16)
        scales = scale.reshape(shape[0], shape[1], shape[2] // 32)
        key = f"model.layers.0.mlp.experts.{name}"
        parts[f"{key}_blocks"], parts[f"{key}_scales"] = blocks, scales
        expected[key] = convert_moe_packed_tensors(blocks, scales, dtype=BF16)
    turned = "experts, 3-D; the library's result is [experts, in, out], the stored order [experts, out, in]"
    write("mxfp4/experts", parts, expected, Mxfp4Config().to_dict(), bits=4, group=32,
          how="mxfp4.convert_moe_packed_tensors", writer="modelopt MXFP4QTensor.quantize, with the names of gpt-oss", notes=turned)
    every = torch.randint(0, 256, (2, 32, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 32, 4), dtype=torch.uint8)
    key = "model.layers.0.mlp.experts.down_proj"
    write("mxfp4/every-code", {f"{key}_blocks": every, f"{key}_scales": scales}, {key: convert_moe_packed_tensors(every, scales, dtype=BF16)},
          Mxfp4Config().to_dict(), bits=4, group=32, how="mxfp4.convert_moe_packed_tensors",
          writer="random codes, with the names of gpt-oss", notes=turned)

    parts, expected = {}, {}
    holder = SimpleNamespace(quantization_config=None)
    reader = finegrained_fp8.Fp8Dequantize(holder)
    for expert, name in enumerate(("w1", "w2")):
        made, scale = MXFP4QTensor.quantize(weights(48, 96).to(BF16), 32)
        packed = made._quantized_data.reshape(48, 48).view(torch.int8)
        scale = scale.reshape(48, 3).view(torch.float8_e8m0fnu)
        key = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
        parts[key], parts[f"{key}_scale_inv"] = packed, scale
        expected[key] = reader._dequantize_one(packed, scale, BF16)
    config = dict(FineGrainedFP8Config().to_dict(), expert_dtype="fp4", scale_fmt="ue8m0")
    write("deepseek-fp4/experts", parts, expected, config, bits=4, group=32, how="finegrained_fp8.Fp8Dequantize._dequantize_one",
          writer="modelopt MXFP4QTensor.quantize, with the names and dtypes that transformers reads",
          notes="I8 holds two codes of 4 bits; scales are F8_E8M0")


def bitnet() -> None:
    torch.manual_seed(34)
    for kind in ("bitlinear", "autobitlinear"):
        parts, expected = {}, {}
        for name, (rows, columns) in ((Q, (64, 48)), (DOWN, (36, 64))):
            layer = BitLinear(columns, rows, bias=False, dtype=BF16)
            weight = weights(rows, columns).to(BF16)
            if kind == "bitlinear":
                scale = (1.0 / weight.float().abs().mean()).to(BF16).reshape(1)
                codes = (weight.float() * scale.float()).round().clamp(-1, 1)
            else:
                scale = weight.float().abs().mean().to(BF16).reshape(1)
                codes = WeightQuant.apply(weight).sign().float()
            layer.weight, layer.weight_scale = pack_weights(codes.to(torch.int8)), scale
            parts |= {f"{name}.{part}": tensor.clone() for part, tensor in layer.state_dict().items()}
            plain = unpack_weights(layer.weight, dtype=BF16)
            if kind == "bitlinear":
                expected[f"{name}.weight"] = layer.post_quant_process(plain, torch.ones(1, dtype=BF16), scale)
            else:
                twin = AutoBitLinear(columns, rows, bias=False, dtype=BF16)
                twin.weight.data, twin.weight_scale = plain, scale
                # One input at a time: what the layer gives is the weight's column, scaled.
                expected[f"{name}.weight"] = twin(torch.eye(columns, dtype=BF16)).T
        config = BitNetQuantConfig(linear_class=kind, quantization_mode="offline").to_dict()
        way = "divides" if kind == "bitlinear" else "multiplies"
        write(f"bitnet/{kind}", parts, {k: v.detach() for k, v in expected.items()}, config, bits=2, group=None,
              how="unpack_weights and BitLinear.post_quant_process" if kind == "bitlinear" else "unpack_weights and AutoBitLinear.forward of the identity",
              writer="pack_weights, BitLinear.state_dict", notes=f"ternary; weight_scale {way}")


def gemma() -> None:
    torch.manual_seed(35)
    parts, expected = {}, {}
    for name, bits, rows, columns in ((Q, 4, 32, 65), (DOWN, 2, 40, 63), ("model.layers.0.mlp.up_proj", 8, 16, 64)):
        layer = gemma_quant.QuantizedLinear(columns, rows, num_bits=bits)
        low, high = (-128, 128) if bits == 8 else (0, 256)
        layer.weight.data = torch.randint(low, high, layer.weight.shape).to(layer.weight.dtype)
        layer.weight_scale.data = (torch.rand(rows, 1) + 0.01) * 0.05
        parts |= {f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()}
        expected[f"{name}.weight"] = layer._dequantize_weights().detach()
    config = {"quant_method": "gemma", "num_bits": 4, "quantize_embeddings": False, "modules_to_not_convert": None,
              "module_quant_configs": {r"mlp\.down_proj": {"num_bits": 2}, r"mlp\.up_proj": {"num_bits": 8}}}
    write("gemma/mixed", parts, expected, config, bits=4, group=0, how="gemma_quant.QuantizedLinear._dequantize_weights to F32",
          writer="QuantizedLinear.state_dict with random codes: the library has no quantiser",
          notes="4, 2 and 8 bits, by the config's patterns; rows end inside a byte", bits_of={Q: 4, DOWN: 2, "model.layers.0.mlp.up_proj": 8})


def metal() -> None:
    for bits in (2, 4, 8):
        torch.manual_seed(36)
        parts, expected = {}, {}
        for name, shape in ((Q, (32, 128)), (DOWN, (24, 64))):
            codes, scales, biases = metal_quantization._affine_quantize_tensor(weights(*shape).to(BF16), 64, bits)
            parts |= {f"{name}.weight": codes, f"{name}.scales": scales.to(BF16), f"{name}.qbiases": biases.to(BF16)}
            expected[f"{name}.weight"] = metal_quantization._affine_dequantize_tensor(codes, scales.to(BF16), biases.to(BF16), 64, bits)
        write(f"metal/w{bits}-g64", parts, expected, MetalConfig(bits=bits, group_size=64).to_dict(), bits=bits, group=64,
              how="metal_quantization._affine_dequantize_tensor", writer="metal_quantization._affine_quantize_tensor")


if __name__ == "__main__":
    fp8_blocks()
    fp4_experts()
    bitnet()
    gemma()
    metal()
    corpus.finish()
