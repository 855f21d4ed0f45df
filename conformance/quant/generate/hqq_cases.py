"""Small checkpoints written by HQQ's own linear layer, and what it makes of them.

    pip install hqq==0.2.8.post1 && python conformance/quant/generate/hqq_cases.py
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import corpus

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
BF16, F16 = torch.bfloat16, torch.float16


def make(bits: int, group: int | None, dtype: torch.dtype, name: str, *, axis: int = 1, bias: bool = False, extra: str = "", notes: str = "") -> None:
    torch.manual_seed(41)
    parts, expected = {"norm": torch.ones(8, dtype=dtype)}, {}
    for path, (rows, columns) in ((Q, (16, 128)), (DOWN, (24, 64))):
        linear = torch.nn.Linear(columns, rows, bias=bias)
        size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
        linear.weight.data = torch.randn(rows, columns) * size * 0.1 + 0.03 * size
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        layer = HQQLinear(linear.to(dtype), config, compute_dtype=dtype, device="cpu")
        parts |= {f"{path}.{part}": tensor.detach().clone() for part, tensor in layer.state_dict().items()}
        expected[f"{path}.weight"] = layer.dequantize().detach().contiguous()
    case = f"hqq/w{bits}-{f'g{group}' if group else 'channel'}-axis{axis}-{name}{extra}"
    where = corpus.folder(case)
    save_file({k: v.contiguous() for k, v in parts.items()}, where / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, where / "expected.safetensors")
    corpus.case(case, library="hqq", version=version("hqq"), scheme="hqq", bits=bits, group=group or 0, how="HQQLinear.dequantize",
                writer="HQQLinear.state_dict, encoded", notes=notes, axis=axis)


if __name__ == "__main__":
    plain = "the library's own loader evaluates the text of compute_dtype; a reader must not"
    for bits in (1, 2, 3, 4, 8):
        make(bits, 64, F16, "f16", notes=plain)
    make(4, 64, BF16, "bf16")
    make(3, 64, BF16, "bf16", notes="groups do not fill the last words")
    make(4, 64, F16, "f16", axis=0, notes="groups run down the columns")
    make(3, 64, F16, "f16", axis=0, notes="groups run down the columns, and do not fill the last words")
    make(5, 64, F16, "f16", notes="one code to a byte")
    make(4, None, F16, "f16", bias=True, extra="-bias", notes="one group a row; a bias beside the weight")
    corpus.finish()
