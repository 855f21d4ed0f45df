"""Small checkpoints packed by GPTQModel's own linear layers, and what these layers make of them.

    pip install gptqmodel==7.7.0 && python conformance/quant/generate/gptqmodel_cases.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The plain path: on a CPU, no compiled kernel takes its place.
os.environ["GPTQ_TORCH_TRITON_DEQUANT"] = "0"

import gptqmodel
import torch
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import FORMAT
from gptqmodel.quantization.quantizer import Quantizer
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import corpus

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
FORMS = {"gptq": FORMAT.GPTQ, "gptq-v2": FORMAT.GPTQ_V2, "gptq-planar": FORMAT.GPTQ_P}


def weights(rows: int, columns: int, positive: bool) -> torch.Tensor:
    """Rows of unlike sizes; where `positive`, every other row has no weight below zero, so its zero point is 0."""
    size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
    weight = torch.randn(rows, columns) * size * 0.1 + 0.03 * size
    if positive:
        weight[::2] = weight[::2].abs()
    return weight


def layer(config: QuantizeConfig, rows: int, columns: int, form: FORMAT, act_order: bool, positive: bool, bias: bool) -> TorchLinear:
    linear = torch.nn.Linear(columns, rows, bias=bias)
    linear.weight.data = weights(rows, columns, positive)
    group = config.group_size if config.group_size > 0 else columns
    index = torch.arange(columns) // group
    if act_order:
        index = index[torch.randperm(columns)]
    scales, zeros = [], []
    for number in range(columns // group):
        quantizer = Quantizer(config)
        quantizer.configure(perchannel=True)
        quantizer.find_params(linear.weight.data[:, index == number], weight=True)
        scales.append(quantizer.scale.reshape(rows, 1))
        zeros.append(quantizer.zero.reshape(rows, 1))
    made = TorchLinear(
        bits=config.bits, group_size=config.group_size, sym=config.sym, desc_act=config.desc_act,
        in_features=columns, out_features=rows, bias=bias, format=form,
    )
    made.pack_original(linear, torch.cat(scales, 1), torch.cat(zeros, 1), index.to(torch.int32))
    return made.eval()


@torch.inference_mode()
def make(
    scheme: str, bits: int, group: int, sym: bool, *, act_order: bool = False, positive: bool = False,
    bias: bool = False, shapes: list[tuple[int, int]] | None = None, extra: str = "", notes: str = "",
) -> None:
    torch.manual_seed(11)
    shapes = shapes or ([(32, 96), (64, 32)] if 0 < group <= 64 else [(32, 256 if group > 0 else 128)])
    form = FORMS[scheme]
    config = QuantizeConfig(bits=bits, group_size=group, sym=sym, desc_act=act_order, format=form, offload_to_disk=False)
    parts, expected = {"norm": torch.ones(8, dtype=torch.float16)}, {}
    for name, (rows, columns) in zip(NAMES, shapes, strict=False):
        made = layer(config, rows, columns, form, act_order, positive, bias)
        expected[f"{name}.weight"] = made.dequantize_weight().T.contiguous()
        if scheme == "gptq":
            convert_gptq_v2_to_v1_format_module(made, config)
        for part, tensor in made.state_dict().items():
            parts[f"{name}.{part}"] = tensor.clone().contiguous()
    span = "channel" if group == -1 else f"g{group}"
    path = f"{scheme}/w{bits}-{span}-{'sym' if sym else 'asym'}{'-actorder' if act_order else ''}{extra}"
    where = corpus.folder(path)
    save_file(parts, where / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, where / "expected.safetensors")
    config.meta_set_versionable(key="quantizer", value=[f"gptqmodel:{gptqmodel.__version__}"])
    config.save_pretrained(str(where))
    corpus.case(
        path, library="gptqmodel", version=gptqmodel.__version__, scheme=scheme, bits=bits,
        group=max(group, 0), how="TorchLinear.dequantize_weight on a CPU, before zero points become those of the format",
        writer="Quantizer.find_params, TorchLinear.pack_original, convert_gptq_v2_to_v1_format_module (gptq), QuantizeConfig.save_pretrained",
        notes=notes, act_order=act_order, symmetric=sym,
    )


if __name__ == "__main__":
    for scheme in ("gptq", "gptq-v2"):
        for bits in (2, 3, 4, 8):
            make(scheme, bits, 32, True)
            make(scheme, bits, 32, False)
        if scheme == "gptq":
            make(scheme, 4, 128, True)
            make(scheme, 4, 128, False, bias=True, extra="-bias", notes="a bias beside the weight, which stays plain")
            make(scheme, 4, -1, True)
            make(scheme, 3, -1, False)
        make(scheme, 4, 32, True, act_order=True, notes="g_idx is in no order")
        make(scheme, 4, 32, False, act_order=True, notes="g_idx is in no order")
        make(scheme, 3, 32, False, act_order=True, notes="g_idx is in no order")
    for bits in (2, 3, 4, 8):
        make("gptq", bits, 32, False, positive=True, extra="-zero0",
             notes="zero points of 0: the library subtracts 1 from whole words at 2, 4 and 8 bits, so a 0 borrows from "
             "the next field, and from each field at 3; expected holds the values before that")
    for bits in (3, 5, 6, 7):
        make("gptq-planar", bits, 32, True)
        make("gptq-planar", bits, 32, False)
    make("gptq-planar", 5, 128, False)
    make("gptq-planar", 6, 32, False, act_order=True, notes="g_idx is in no order")
    corpus.finish()
