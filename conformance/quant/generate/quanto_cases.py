"""Small checkpoints written by optimum-quanto, and what its tensors make of themselves.

    pip install optimum-quanto==0.2.7 && python conformance/quant/generate/quanto_cases.py
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from optimum import quanto
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import corpus

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def make(kind: str, bits: int, dtype: torch.dtype, name: str, *, shapes: tuple = ((32, 128), (16, 256)), notes: str = "") -> None:
    torch.manual_seed(43)
    whole = torch.nn.Module()
    for path, (rows, columns) in zip(NAMES, shapes, strict=True):
        at = whole
        *steps, last = path.split(".")
        for step in steps:
            if step not in at._modules:
                at.add_module(step, torch.nn.Module())
            at = at._modules[step]
        linear = torch.nn.Linear(columns, rows, bias=False)
        size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
        linear.weight.data = (torch.randn(rows, columns) * size * 0.1 + 0.03 * size).to(dtype)
        at.add_module(last, linear)
    quanto.quantize(whole, weights=getattr(quanto, kind))
    quanto.freeze(whole)
    tensors = {}
    for path in NAMES:
        tensor = whole.get_submodule(path).weight
        # A class for one kernel, which is written to a file as the plain class.
        tensors[path] = tensor.weight_qbits_tensor() if "TinyGemm" in type(tensor).__name__ else tensor
    expected = {f"{path}.weight": tensor.dequantize().detach().contiguous() for path, tensor in tensors.items()}
    case = f"quanto/{kind}-{name}"
    where = corpus.folder(case)
    save_file({k: v.detach().contiguous() for k, v in whole.state_dict().items()}, where / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, where / "expected.safetensors")
    # The map is all that the library writes: the group, the axis and the shape are in no file.
    (where / "quanto_qmap.json").write_text(json.dumps(quanto.quantization_map(whole), indent=4))
    groups = {f"{path}.weight": getattr(tensor, "_group_size", None) or 0 for path, tensor in tensors.items()}
    corpus.case(case, library="optimum-quanto", version=version("optimum-quanto"), scheme="quanto", bits=bits,
                group=max(groups.values()), how=f"{type(tensors[NAMES[0]]).__name__}.dequantize",
                writer="quantize, freeze, state_dict, quantization_map", notes=notes, axis=0, groups=groups)


if __name__ == "__main__":
    for dtype, name in ((BF16, "bf16"), (F16, "f16"), (F32, "f32")):
        make("qint8", 8, dtype, name)
        make("qint4", 4, dtype, name, notes="neither the group nor the axis nor the shape is in the files")
    make("qint2", 2, BF16, "bf16", notes="neither the group nor the axis nor the shape is in the files")
    make("qint4", 4, BF16, "bf16-g64", shapes=((32, 64), (16, 192)), notes="128 does not divide the inputs, so the library takes a smaller group")
    make("qfloat8_e4m3fn", 8, BF16, "bf16")
    make("qfloat8_e5m2", 8, BF16, "bf16")
    make("qfloat8_e4m3fnuz", 8, F16, "f16")
    corpus.finish()
