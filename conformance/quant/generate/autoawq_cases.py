"""Small checkpoints packed by AutoAWQ's own linear layers, and what AutoAWQ makes of the codes.

    pip download --no-deps --no-binary :all: autoawq==0.2.9 && tar xf autoawq-0.2.9.tar.gz
    PYTHONPATH=autoawq-0.2.9 python conformance/quant/generate/autoawq_cases.py

The package's top imports every model it knows, and no longer works with a new transformers. So its folder is
put in place as a bare package, and only the modules for packing and quantising are imported.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import corpus

found = importlib.util.find_spec("awq")
assert found is not None
FOLDER = Path(found.submodule_search_locations[0])
for name in ("awq", "awq.modules", "awq.utils", "awq.models", "awq.quantize"):
    bare = types.ModuleType(name)
    bare.__path__ = [str(FOLDER.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = bare
# The quantiser's module imports the models' calibration; only one of its functions is used here.
scale = types.ModuleType("awq.quantize.scale")
scale.apply_scale = scale.apply_clip = None
sys.modules["awq.quantize.scale"] = scale
texts = types.ModuleType("awq.utils.calib_data")
texts.get_calib_dataset = None
sys.modules["awq.utils.calib_data"] = texts

from awq.models._config import AwqConfig
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
from awq.modules.linear.marlin import WQLinear_Marlin
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm

VERSION = re.search(r'__version__ = "(.*)"', (FOLDER / "__init__.py").read_text())[1]
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
KINDS = {
    "awq-gemm": (WQLinear_GEMM, "gemm"),
    "awq-gemv": (WQLinear_GEMV, "gemv"),
    "awq-gemv-fast": (WQLinear_GEMVFast, "gemv_fast"),
    "marlin": (WQLinear_Marlin, "marlin"),
}


def quantised(rows: int, columns: int, group: int, asymmetric: bool) -> tuple:
    """A linear whose weights are exact multiples, its scales and its zero points, as AutoAWQ finds them."""
    linear = torch.nn.Linear(columns, rows, bias=False)
    size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
    linear.weight.data = (torch.randn(rows, columns) * size * 0.1 + 0.03 * size).half()
    quantizer = AwqQuantizer.__new__(AwqQuantizer)
    quantizer.w_bit, quantizer.group_size, quantizer.zero_point = 4, group, asymmetric
    linear.weight.data, scales, zeros = quantizer.pseudo_quantize_tensor(linear.weight.data)
    return linear, scales, zeros


def make(scheme: str, group: int, shapes: list[tuple[int, int]], notes: str = "", extra: str = "") -> None:
    torch.manual_seed(13)
    kind, version = KINDS[scheme]
    asymmetric = scheme != "marlin"
    turned = scheme == "awq-gemm"
    parts, expected = {"norm": torch.ones(8, dtype=torch.float16)}, {}
    for name, (rows, columns) in zip(NAMES, shapes, strict=False):
        wide = group if group > 0 else columns
        linear, scales, zeros = quantised(rows, columns, wide, asymmetric)
        given = [part.t().contiguous() if turned and part is not None else part for part in (scales, zeros)]
        made = kind.from_linear(linear, 4, wide, False, *given)
        for part, tensor in made.state_dict().items():
            parts[f"{name}.{part}"] = tensor.contiguous()
        if turned:
            value = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, wide).t()
        elif asymmetric:
            # The same codes through the layout that the library can take apart on a CPU.
            twin = WQLinear_GEMM.from_linear(linear, 4, wide, False, scales.t().contiguous(), zeros.t().contiguous())
            value = dequantize_gemm(twin.qweight, twin.qzeros, twin.scales, 4, wide).t()
        else:
            value = linear.weight.data
        expected[f"{name}.weight"] = value.contiguous()
    path = f"{scheme}/w4-{f'g{group}' if group > 0 else 'channel'}{extra}"
    where = corpus.folder(path)
    save_file(parts, where / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, where / "expected.safetensors")
    config = AwqConfig(zero_point=asymmetric, q_group_size=group, w_bit=4, version=version)
    text = json.dumps({"quantization_config": config.to_transformers_dict()}, indent=2)
    (where / "config.json").write_text(text)
    how = {
        "awq-gemm": "awq.utils.packing_utils.dequantize_gemm",
        "marlin": "AwqQuantizer.pseudo_quantize_tensor, whose result was then packed: the library unpacks it on a GPU only",
    }.get(scheme, "dequantize_gemm of the same codes packed by WQLinear_GEMM: the library unpacks this layout on a GPU only")
    corpus.case(
        path, library="autoawq", version=VERSION, scheme=scheme, bits=4, group=max(group, 0), how=how,
        writer=f"AwqQuantizer.pseudo_quantize_tensor, {kind.__name__}.from_linear, AwqConfig.to_transformers_dict",
        notes=notes,
    )


if __name__ == "__main__":
    for group in (32, 64, 128, -1):
        make("awq-gemm", group, [(32, 128), (32, 256)])
        make("awq-gemv", group, [(32, 128), (32, 256)], "columns of scales and zero points are padded with zeros")
        make("awq-gemv-fast", group, [(32, 128), (32, 256)],
             "qzeros holds -scale * zero rounded to F16; expected has the zero point itself")
    make("marlin", 128, [(64, 256)], "scales are permuted within 64 columns")
    make("marlin", 128, [(64, 128)], "one group: scales are permuted within 32 columns", extra="-onegroup")
    make("marlin", -1, [(64, 128), (64, 192)], "scales are permuted within 32 columns")
    corpus.finish()
