"""Small checkpoints written by bitsandbytes' own layers, and what its CPU code makes of them.

    pip install bitsandbytes==0.50.2 torch transformers && python conformance/quant/generate/bitsandbytes_cases.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).parent))
import corpus

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
    return (torch.randn(rows, columns) * size * 0.1 + 0.03 * size).to(dtype)


def write(path: str, parts: dict, expected: dict, config: BitsAndBytesConfig, **row: object) -> None:
    where = corpus.folder(path)
    save_file({k: v.contiguous() for k, v in parts.items()}, where / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, where / "expected.safetensors")
    text = json.dumps({"quantization_config": config.to_dict()}, indent=2, sort_keys=True)
    (where / "config.json").write_text(text)
    corpus.case(path, library="bitsandbytes", version=bnb.__version__, **row)


def four(kind: str, dtype: torch.dtype, name: str, *, nested: bool = False, block: int = 64, storage: torch.dtype = torch.uint8,
         shapes: tuple = ((32, 128), (24, 96)), extra: str = "", notes: str = "") -> None:
    torch.manual_seed(17)
    parts, expected = {"norm": torch.ones(8, dtype=dtype)}, {}
    for path, (rows, columns) in zip(NAMES, shapes, strict=False):
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=nested, quant_storage=storage)
        layer.weight = bnb.nn.Params4bit(weights(rows, columns, dtype), requires_grad=False, quant_type=kind, blocksize=block,
                                         compress_statistics=nested, quant_storage=storage, module=layer)
        layer.to("cpu")
        for part, tensor in layer.state_dict().items():
            parts[f"{path}.{part}"] = tensor
        expected[f"{path}.weight"] = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).contiguous()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
                                bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=storage)
    write(f"bnb4/{kind}{'-nested' if nested else ''}-b{block}-{name}{extra}", parts, expected, config,
          scheme="bnb4", bits=4, group=block, how="bitsandbytes.functional.dequantize_4bit on a CPU",
          writer="Linear4bit.state_dict", notes=notes, table=kind, nested=nested)


def eight(dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(18)
    parts, expected = {"norm": torch.ones(8, dtype=dtype)}, {}
    for path, (rows, columns) in zip(NAMES, ((32, 128), (24, 100)), strict=True):
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weights(rows, columns, dtype), requires_grad=False, has_fp16_weights=False)
        layer.to("cpu")
        state = layer.state_dict()
        for part, tensor in state.items():
            parts[f"{path}.{part}"] = tensor
        expected[f"{path}.weight"] = functional.int8_vectorwise_dequant(state["weight"], state["SCB"]).contiguous()
    write(f"bnb8/{name}", parts, expected, BitsAndBytesConfig(load_in_8bit=True), scheme="bnb8", bits=8, group=0,
          how="bitsandbytes.functional.int8_vectorwise_dequant on a CPU", writer="Linear8bitLt.state_dict",
          notes="the scale is the largest weight of the row, and is multiplied by 1/127")


if __name__ == "__main__":
    for kind in ("nf4", "fp4"):
        for dtype, name in ((BF16, "bf16"), (F16, "f16"), (F32, "f32"))[: 3 if kind == "nf4" else 2]:
            four(kind, dtype, name)
        four(kind, BF16, "bf16", nested=True, notes="absmax is itself quantised")
        four(kind, F16, "f16", nested=True, shapes=((160, 128), (24, 96)), notes="absmax is itself quantised, in two blocks")
    four("nf4", BF16, "bf16", block=128)
    four("nf4", BF16, "bf16", block=256, nested=True, shapes=((64, 128), (24, 96)), notes="the last block is not full")
    four("nf4", BF16, "bf16", storage=BF16, extra="-stored-bf16", notes="the codes lie in a BF16 tensor: the same bytes")
    four("nf4", F16, "f16", shapes=((24, 100),), extra="-ragged", notes="the last block is not full; rows begin inside blocks")
    eight(F16, "f16")
    eight(BF16, "bf16")
    corpus.finish()
