"""Small checkpoints written by compressed-tensors, and what it makes of them itself.

    pip install compressed-tensors==0.20.0 && python conformance/quant/generate/compressed_tensors_cases.py
    pip install compressed-tensors==0.17.1 && python conformance/quant/generate/compressed_tensors_cases.py
    pip install compressed-tensors==0.12.2 && python conformance/quant/generate/compressed_tensors_cases.py

Each version is one environment; the version that is installed decides which cases are made. From 0.18 on, codes
of 3, 5, 6 and 7 bits are packed densely; before that, as many as fit go into one word, under the same format name.
"""

from __future__ import annotations

import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

if int(compressed_tensors.__version__.split(".")[1]) < 15:
    from compressed_tensors.config import SparsityCompressionConfig

sys.path.insert(0, str(Path(__file__).parent))
import corpus

VERSION = compressed_tensors.__version__
MINOR = int(VERSION.split(".")[1])
WRITER = (
    "ModelCompressor.compress_model, ModelCompressor.update_config, safetensors.torch.save_file"
)
HOW = "ModelCompressor.decompress_model"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Model(torch.nn.Module):
    """Linears under the names that models use, beside two tensors that stay plain."""

    def __init__(self, shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, (rows, columns) in shapes.items():
            at: torch.nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if step not in at._modules:
                    at.add_module(step, torch.nn.Module())
                at = at._modules[step]
            linear = torch.nn.Linear(columns, rows, bias=False)
            # Rows of unlike sizes, so that a scale of the wrong row shows.
            size = torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
            linear.weight = torch.nn.Parameter(
                (torch.randn(rows, columns) * size * 0.1 + 0.03 * size).to(dtype),
                requires_grad=False,
            )
            at.add_module(last, linear)
        self.register_buffer("norm", torch.ones(8, dtype=dtype))
        self.lm_head = torch.nn.Linear(8, 4, bias=False, dtype=dtype)
        self.lm_head.weight.requires_grad_(False)


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest weight under each scale; the library's observers live in another package."""
    rows, columns = weight.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        high, wide = args.block_structure
        cells = [
            [weight[r : r + high, c : c + wide] for c in range(0, columns, wide)]
            for r in range(0, rows, high)
        ]
        low = torch.stack([torch.stack([cell.min() for cell in row]) for row in cells])
        top = torch.stack([torch.stack([cell.max() for cell in row]) for row in cells])
        return low, top
    groups = weight.reshape(rows, columns // args.group_size, args.group_size)
    return groups.amin(-1), groups.amax(-1)


def calibrate(model: Model, act_order: bool) -> None:
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        args, weight = scheme.weights, module.weight.data
        if act_order:
            groups = weight.shape[1] // args.group_size
            index = torch.arange(groups).repeat_interleave(args.group_size)
            index = index[torch.randperm(weight.shape[1])].to(torch.int32)
            module.weight_g_idx.data = index
            weight = weight[:, torch.argsort(index, stable=True)]
        low, top = extremes(weight, args)
        extra = {}
        if hasattr(module, "weight_global_scale"):
            whole = generate_gparam(weight.min(), weight.max())
            module.weight_global_scale.data = whole
            extra["global_scale"] = whole
        scale, zero = calculate_qparams(low, top, args, **extra)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
        for name, size in (("input_scale", 0.0625), ("input_global_scale", 96.0)):
            if hasattr(module, name):
                getattr(module, name).data.fill_(size)
        if hasattr(module, "input_zero_point"):
            module.input_zero_point.data.zero_()


def make(
    path: str,
    scheme: str,
    weights: dict,
    shapes: list[tuple[int, int]],
    *,
    dtype: torch.dtype = BF16,
    inputs: dict | None = None,
    form: str | None = None,
    notes: str = "",
) -> None:
    torch.manual_seed(7)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    model = Model(dict(zip(names, shapes, strict=False)), dtype)
    args = QuantizationArgs(**weights)
    kinds = {"input_activations": QuantizationArgs(**inputs)} if inputs else {}
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args, **kinds)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    calibrate(model, weights.get("actorder") == "group")
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    where = corpus.folder(path)
    (where / "config.json").write_text("{}")
    compressor.update_config(str(where))
    state = {name: part.contiguous() for name, part in model.state_dict().items()}
    save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    compressor.decompress_model(model)
    expected = {
        f"{name}.weight": model.get_submodule(name).weight.data for name in names[: len(shapes)]
    }
    save_file({k: v.contiguous() for k, v in expected.items()}, where / "expected.safetensors")
    group = {"tensor": None, "channel": 0, "block": weights.get("block_structure")}.get(
        weights["strategy"], weights.get("group_size")
    )
    corpus.case(
        path,
        library="compressed-tensors",
        version=VERSION,
        scheme=scheme,
        bits=weights["num_bits"],
        group=group,
        how=HOW,
        writer=WRITER,
        notes=notes,
    )


def ints(bits: int, group: int, symmetric: bool, **more: object) -> dict:
    if group == 0:
        return dict(num_bits=bits, type="int", symmetric=symmetric, strategy="channel", **more)
    return dict(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group, **more
    )


PAIR = [(32, 128), (40, 128)]
RAGGED = [(24, 100), (40, 72)]


def packed(scheme: str, bits_of: list[int]) -> None:
    for bits in bits_of:
        make(
            f"{scheme}/w{bits}-g32-sym-bf16",
            scheme,
            ints(bits, 32, True),
            PAIR,
            form="pack-quantized",
        )
        make(
            f"{scheme}/w{bits}-g32-asym-bf16",
            scheme,
            ints(bits, 32, False),
            PAIR[1:],
            form="pack-quantized",
            notes="40 rows: the packed zero points of a column end inside a word at some widths",
        )
    if scheme == "ct-pack-word":
        # At 4 bits, words and dense packing are the same bytes.
        make(f"{scheme}/w3-channel-sym-bf16", scheme, ints(3, 0, True), RAGGED, form="pack-quantized",
             notes="rows end inside a word")
        return
    make(
        f"{scheme}/w4-g128-sym-f16",
        scheme,
        ints(4, 128, True),
        PAIR,
        dtype=F16,
        form="pack-quantized",
    )
    make(
        f"{scheme}/w4-g128-asym-f16",
        scheme,
        ints(4, 128, False),
        PAIR,
        dtype=F16,
        form="pack-quantized",
    )
    make(
        f"{scheme}/w4-channel-sym-bf16",
        scheme,
        ints(4, 0, True),
        RAGGED,
        form="pack-quantized",
        notes="rows end inside a word",
    )
    make(
        f"{scheme}/w4-channel-asym-bf16",
        scheme,
        ints(4, 0, False),
        RAGGED,
        form="pack-quantized",
        notes="rows end inside a word",
    )
    make(
        f"{scheme}/w3-channel-sym-bf16",
        scheme,
        ints(3, 0, True),
        RAGGED,
        form="pack-quantized",
        notes="rows end inside a word",
    )


def whole(scheme: str) -> None:
    dynamic = dict(num_bits=8, type="int", strategy="token", dynamic=True)
    make(f"{scheme}/w8a8-channel-sym-bf16", scheme, ints(8, 0, True), RAGGED, inputs=dynamic)
    make(
        f"{scheme}/w8a8-channel-asym-f16",
        scheme,
        ints(8, 0, False),
        RAGGED,
        inputs=dynamic,
        dtype=F16,
    )
    tensor = dict(num_bits=8, type="int", symmetric=True, strategy="tensor")
    make(f"{scheme}/w8a8-tensor-sym-bf16", scheme, tensor, RAGGED, inputs=dynamic)
    make(
        f"{scheme}/w4a8-g32-naive-bf16",
        scheme,
        ints(4, 32, True),
        PAIR,
        form="naive-quantized",
        notes="codes of 4 bits, one to a byte",
    )


def floats() -> None:
    scheme = "ct-float"
    eight = dict(num_bits=8, type="float", symmetric=True)
    static = dict(num_bits=8, type="float", strategy="tensor", dynamic=False)
    token = dict(num_bits=8, type="float", strategy="token", dynamic=True)
    make(
        f"{scheme}/fp8-tensor-static-bf16",
        scheme,
        dict(eight, strategy="tensor"),
        RAGGED,
        inputs=static,
    )
    make(
        f"{scheme}/fp8-channel-dynamic-bf16",
        scheme,
        dict(eight, strategy="channel"),
        RAGGED,
        inputs=token,
    )
    make(
        f"{scheme}/fp8-channel-dynamic-f16",
        scheme,
        dict(eight, strategy="channel"),
        RAGGED,
        inputs=token,
        dtype=F16,
    )
    block = dict(eight, strategy="block", block_structure=[128, 128])
    make(
        f"{scheme}/fp8-block-136x192-bf16",
        scheme,
        block,
        [(136, 192)],
        inputs=token,
        notes="the second block of rows has 8 rows, the second of columns 64 columns",
    )
    make(
        f"{scheme}/fp8-block-144x136-bf16",
        scheme,
        block,
        [(144, 136)],
        inputs=token,
        notes="the last block of rows has 16 rows, the last block of columns has 8",
    )
    make(
        f"{scheme}/fp8-block-16x32-bf16",
        scheme,
        dict(eight, strategy="block", block_structure=[16, 32]),
        [(40, 72)],
        inputs=token,
        notes="a block that is not square",
    )


def micro() -> None:
    mx = dict(
        type="float",
        symmetric=True,
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
        zp_dtype="torch.uint8",
    )
    for bits in (4, 6, 8):
        make(f"ct-mxfp{bits}/mxfp{bits}-bf16", f"ct-mxfp{bits}", dict(mx, num_bits=bits), PAIR)
    nv = dict(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype="torch.float8_e4m3fn",
        zp_dtype="torch.float8_e4m3fn",
    )
    make("ct-nvfp4/nvfp4a16-bf16", "ct-nvfp4", nv, PAIR, notes="the global scale divides")
    make(
        "ct-nvfp4/nvfp4-bf16",
        "ct-nvfp4",
        nv,
        PAIR,
        inputs=dict(nv, dynamic="local"),
        notes="the global scale divides; an input_global_scale beside it",
    )


def prune(weight: torch.Tensor, form: str) -> torch.Tensor:
    """Two of every four kept, or whole rows emptied and others kept, for the masks to tell apart."""
    rows, columns = weight.shape
    if form == "sparse-bitmask":
        kept = torch.rand(rows, columns) < torch.linspace(0, 1, rows)[:, None]
        return weight * kept
    quads = weight.abs().reshape(rows, columns // 4, 4)
    kept = torch.zeros_like(quads, dtype=torch.bool).scatter_(-1, quads.topk(2, -1).indices, True)
    return weight * kept.reshape(rows, columns)


def sparse(form: str, dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(8)
    shapes = dict(zip(["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"], [(64, 96), (40, 100)], strict=True))
    model = Model(shapes, dtype)
    for path in shapes:
        linear = model.get_submodule(path)
        linear.weight.data = prune(linear.weight.data, form)
    structure = "2:4" if form == "sparse-24-bitmask" else "unstructured"
    config = SparsityCompressionConfig.load_from_registry(
        form, targets=["re:model.*proj"], ignore=["lm_head"], sparsity_structure=structure
    )
    compressor = ModelCompressor.from_pretrained_model(model, sparsity_config_or_format=config)
    compressor.compress_model(model)
    path = f"ct-{form}/{name}"
    where = corpus.folder(path)
    (where / "config.json").write_text("{}")
    compressor.update_config(str(where))
    state = {key: part.contiguous() for key, part in model.state_dict().items()}
    save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    compressor.decompress_model(model)
    expected = {f"{key}.weight": model.get_submodule(key).weight.data.contiguous() for key in shapes}
    save_file(expected, where / "expected.safetensors")
    corpus.case(path, library="compressed-tensors", version=VERSION, scheme=f"ct-{form}", bits=16, group=None,
                how=HOW, writer=WRITER, notes="not quantised: values and a mask, which the library dropped in 0.15")


def marlin(bits: int, group: int) -> None:
    """The library packs 2:4 weights for a GPU kernel and cannot unpack them: expected is what it packed."""
    torch.manual_seed(9)
    name = "model.layers.0.mlp.down_proj"
    model = Model({name: (64, 256)}, F16)
    args = QuantizationArgs(**ints(bits, group, True))
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    linear = model.get_submodule(name)
    linear.weight.data = prune(linear.weight.data, "2:4")
    calibrate(model, False)
    # A kept weight whose code is zero would leave the mask to chance: it gets the smallest code instead.
    wide = group or linear.weight.shape[1]
    step = linear.weight_scale.data.repeat_interleave(wide, 1)
    small = (linear.weight.data != 0) & (linear.weight.data.abs() < step * 0.75)
    linear.weight.data = torch.where(small, step, linear.weight.data)
    expected = fake_quantize(linear.weight.data, linear.weight_scale.data, None, args)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="marlin-24")
    packed = BaseCompressor.load_from_registry("marlin-24").compress(
        dict(model.state_dict()), {name: linear.quantization_scheme}
    )
    path = f"ct-marlin-24/w{bits}-{f'g{group}' if group else 'channel'}-f16"
    where = corpus.folder(path)
    (where / "config.json").write_text("{}")
    compressor.update_config(str(where))
    save_file({key: part.contiguous() for key, part in packed.items()}, where / "model.safetensors", metadata={"format": "pt"})
    save_file({f"{name}.weight": expected.contiguous()}, where / "expected.safetensors")
    corpus.case(path, library="compressed-tensors", version=VERSION, scheme="ct-marlin-24", bits=bits, group=group,
                how="fake_quantize of the weight that was then packed: the library has no decompressor for this format",
                writer="Marlin24Compressor.compress, ModelCompressor.update_config, safetensors.torch.save_file",
                notes="2:4 sparse, tiled for a kernel")


if __name__ == "__main__":
    if MINOR >= 18:
        packed("ct-pack-dense", [2, 3, 4, 5, 6, 7, 8])
        whole("ct-int")
        floats()
        micro()
    elif MINOR >= 15:
        packed("ct-pack-word", [3, 4, 5, 6, 7])
        for bits in (3, 4, 8):
            make(f"ct-pack-word/w{bits}-g32-actorder", "ct-pack-word", ints(bits, 32, True, actorder="group"),
                 PAIR, form="pack-quantized", notes="weight_g_idx names the group of each input")
    else:
        for bits in (3, 4, 5):
            make(f"ct-pack-word/v0.12-w{bits}-g32-sym-f16", "ct-pack-word", ints(bits, 32, True), PAIR, dtype=F16,
                 form="pack-quantized")
        make("ct-pack-word/v0.12-w3-g32-actorder-f16", "ct-pack-word", ints(3, 32, True, actorder="group"), PAIR,
             dtype=F16, form="pack-quantized", notes="weight_g_idx names the group of each input")
        for form in ("sparse-bitmask", "sparse-24-bitmask"):
            for dtype, name in ((BF16, "bf16"), (F16, "f16")):
                sparse(form, dtype, name)
        marlin(4, 0)
        marlin(4, 128)
        marlin(8, 0)
    corpus.finish()
