"""Small checkpoints written by MLX and mlx-lm, and what MLX makes of them on a CPU.

pip install mlx[cpu]==0.32.4 mlx-lm==0.32.2 && python conformance/quant/generate/mlx_cases.py
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import quantize_model, save_config, save_model

sys.path.insert(0, str(Path(__file__).parent))
import corpus

mx.set_default_device(mx.cpu)


class Attention(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(columns, rows, bias=False)


class Mlp(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(columns, rows, bias=False)


class Layer(nn.Module):
    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(*shapes[0]), Mlp(*shapes[1])


class Inner(nn.Module):
    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = [Layer(shapes)]
        self.norm = nn.RMSNorm(8)


class Model(nn.Module):
    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.model = Inner(shapes)


def make(
    bits: int,
    group: int,
    mode: str,
    dtype: mx.Dtype,
    name: str,
    *,
    mixed: bool = False,
    notes: str = "",
) -> None:
    mx.random.seed(23)
    shapes = [(16, 128), (24, 256 if group == 128 else 96)]
    if group == 64:
        shapes[1] = (24, 64)
    whole = Model(shapes)
    layer = whole.model.layers[0]
    linears = {
        "model.layers.0.self_attn.q_proj": layer.self_attn.q_proj,
        "model.layers.0.mlp.down_proj": layer.mlp.down_proj,
    }
    for linear in linears.values():
        rows, columns = linear.weight.shape
        size = mx.power(2.0, mx.arange(rows) % 5 - 2.0)[:, None]
        linear.weight = (mx.random.normal((rows, columns)) * size * 0.1 + 0.03 * size).astype(dtype)
    whole.model.norm.weight = whole.model.norm.weight.astype(dtype)
    choice = None
    if mixed:

        def choice(path, module):
            own = {"group_size": 32, "bits": 8, "mode": "affine"}
            return own if "down" in path else "q_proj" in path

    whole, config = quantize_model(
        whole, {"model_type": "llama"}, group, bits, mode, quant_predicate=choice
    )
    scheme = f"mlx-{mode}"
    path = f"{scheme}/{f'w{bits}-' if mode == 'affine' else ''}g{group}-{name}{'-mixed' if mixed else ''}"
    where = corpus.folder(path)
    save_model(where, whole)
    (where / "model.safetensors.index.json").unlink()
    save_config(config, where / "config.json")
    layer = whole.model.layers[0]
    expected = {}
    for at, linear in (
        ("self_attn.q_proj", layer.self_attn.q_proj),
        ("mlp.down_proj", layer.mlp.down_proj),
    ):
        expected[f"model.layers.0.{at}.weight"] = mx.dequantize(
            linear.weight,
            linear.scales,
            linear.get("biases"),
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    mx.save_safetensors(str(where / "expected.safetensors"), expected, metadata={"format": "mlx"})
    corpus.case(
        path,
        library="mlx",
        version=f"{version('mlx')} with mlx-lm {version('mlx-lm')}",
        scheme=scheme,
        bits=bits,
        group=group,
        how="mlx.core.dequantize on a CPU",
        writer="mlx_lm.utils.quantize_model, save_model, save_config",
        notes=notes,
    )


if __name__ == "__main__":
    twice = "two roundings: of the product, and of the sum"
    for bits in (2, 3, 4, 5, 6, 8):
        make(bits, 32, "affine", mx.bfloat16, "bf16", notes=twice)
        make(bits, 64, "affine", mx.float16, "f16", notes=twice)
    make(4, 128, "affine", mx.float16, "f16", notes=twice)
    make(3, 128, "affine", mx.bfloat16, "bf16", notes=twice)
    make(4, 64, "affine", mx.float32, "f32")
    make(
        4,
        64,
        "affine",
        mx.bfloat16,
        "bf16",
        mixed=True,
        notes="one layer has bits and a group of its own; " + twice,
    )
    make(4, 32, "mxfp4", mx.bfloat16, "bf16")
    make(8, 32, "mxfp8", mx.bfloat16, "bf16")
    make(4, 16, "nvfp4", mx.bfloat16, "bf16")
    make(4, 16, "nvfp4", mx.float16, "f16")
    corpus.finish()
