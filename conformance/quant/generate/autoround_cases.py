"""Small checkpoints packed by AutoRound's own linear layers, and the weights that these layers multiply with.

    pip install auto-round==0.16.1 && python conformance/quant/generate/autoround_cases.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import auto_round
import torch
from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import corpus

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
# `auto_round` stores zero points, `auto_round:auto_gptq` stores them less one, 0 staying 0.
KINDS = {"auto-round": (qlinear_torch, "auto_round"), "auto-round-gptq": (qlinear_torch_zp, "auto_round:auto_gptq")}


def multiplied(layer: torch.nn.Module) -> torch.Tensor:
    """The weight as the layer's forward dequantises it: it has no other way to ask."""
    seen = []
    plain = torch.matmul

    def watch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        return plain(x, weight)

    torch.matmul = watch
    try:
        layer(torch.zeros(1, layer.infeatures, dtype=torch.float16))
    finally:
        torch.matmul = plain
    return seen[0].T.contiguous()


@torch.no_grad()
def make(scheme: str, bits: int, group: int, sym: bool, *, positive: bool = False, notes: str = "") -> None:
    torch.manual_seed(37)
    module, packing = KINDS[scheme]
    parts, expected = {"norm": torch.ones(8, dtype=torch.float16)}, {}
    for name, (rows, columns) in ((Q, (32, 128)), (DOWN, (32, 64))):
        size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
        weight = torch.randn(rows, columns) * size * 0.1 + 0.03 * size
        if positive:
            weight[::2] = weight[::2].abs()
        linear = torch.nn.Linear(columns, rows, bias=False)
        wide = min(group, columns)
        linear.weight.data, scale, zero = (quant_tensor_sym if sym else quant_tensor_asym)(weight, bits=bits, group_size=wide)
        scale = scale.reshape(rows, -1)
        zero = zero if isinstance(zero, int) else zero.reshape(rows, -1)
        layer = module.QuantLinear(bits, wide, columns, rows, bias=False)
        layer.device = "cpu"
        layer.pack(linear, scale, zero, device="cpu")
        parts |= {f"{name}.{part}": tensor.clone().contiguous() for part, tensor in layer.state_dict().items()}
        expected[f"{name}.weight"] = multiplied(layer)
    path = f"{scheme}/w{bits}-g{group}-{'sym' if sym else 'asym'}{'-zero0' if positive else ''}"
    where = corpus.folder(path)
    save_file(parts, where / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, where / "expected.safetensors")
    config = {"quant_method": "auto-round", "packing_format": packing, "bits": bits, "group_size": group, "sym": sym,
              "data_type": "int", "autoround_version": auto_round.__version__}
    (where / "config.json").write_text(json.dumps({"quantization_config": config}, indent=2))
    corpus.case(path, library="auto-round", version=auto_round.__version__, scheme=scheme, bits=bits, group=group, symmetric=sym,
                how="the weight that QuantLinear.forward multiplies with", writer=f"{quant_tensor_sym.__name__ if sym else quant_tensor_asym.__name__}, {module.__name__}.QuantLinear.pack",
                notes=notes)


if __name__ == "__main__":
    for bits in (2, 3, 4, 5, 6, 7, 8):
        make("auto-round", bits, 32, False, notes="5, 6 and 7 bits are one stream of bits, not planes" if bits in (5, 6, 7) else "")
    make("auto-round", 4, 64, True, notes="scales may be negative")
    for bits in (2, 4, 5, 8):
        make("auto-round-gptq", bits, 32, False)
    make("auto-round-gptq", 4, 64, True, notes="scales may be negative")
    for bits in (4, 5):
        make("auto-round-gptq", bits, 32, False, positive=True,
             notes="zero points of 0: at 2, 4 and 8 bits the library stores 0 for them and reads 1; expected has what it reads")
    corpus.finish()
