"""`Checkpoint.plan` over quantised tensors: the ranks' pieces, as numbers, are the slices of what
the library that wrote the checkpoint says its tensors are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
from tonnage import Mesh, Replicate, Shard

ROOT = Path(__file__).resolve().parents[3] / "conformance" / "quant"
CASES: dict[str, dict[str, Any]] = {
    one["path"]: one for one in json.loads((ROOT / "cases.json").read_text())["cases"]
}
GROUPED = ("bits", "group")
#: Checkpoints, the preset that they are, and what it has to be told of the case.
WANTED = {
    "gptq/w4-g128-sym": ("gptq", GROUPED),
    "gptq/w4-g32-asym-actorder": ("gptq", GROUPED),
    "gptq/w8-g32-asym": ("gptq", GROUPED),
    "gptq-v2/w4-g32-sym-actorder": ("gptq-v2", GROUPED),
    "awq-gemm/w4-g64": ("awq-gemm", ("group",)),
    "ct-pack-dense/w4-g32-asym-bf16": ("ct-pack-dense", ("bits", "group", "shape")),
    "ct-nvfp4/nvfp4-bf16": ("nvfp4-div", ()),
    "fp8-block/320x200": ("fp8-block", ("block",)),
    "fp8-block/130x136-f32": ("fp8-block", ("block",)),
    "mlx-affine/w5-g32-bf16": ("mlx-affine", GROUPED),
    "mxfp4/experts": ("mxfp4", ()),
}


def params(case: dict[str, Any], keys: tuple[str, ...], told: dict[str, Any]) -> dict[str, Any]:
    known = {
        "bits": case["bits"],
        "group": case["group"],
        "block": case["group"],
        "shape": told["shape"],
    }
    return {**{key: known[key] for key in keys}, "dtype": told["dtype"]}


Numbers = np.ndarray[Any, Any]


def wide(values: Any) -> Numbers:
    made: Numbers = np.asarray(values).astype(np.float32)
    return made


def together(plan: tonnage.Plan, name: str, shape: tuple[int, ...]) -> Numbers:
    """What all ranks have of a tensor, each piece where it lies."""
    whole: Numbers = np.full(shape, np.nan, np.float32)
    for rank in range(plan.ranks):
        local = plan.load(rank, framework="numpy", dequantize=True)
        for piece in plan.pieces(rank):
            if piece.name == name:
                place = tuple(
                    slice(begin, begin + size)
                    for begin, size in zip(piece.start, piece.shape, strict=True)
                )
                whole[place] = wide(local[name])
    return whole


@pytest.mark.parametrize("path", WANTED)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_have_the_slices_of_the_library_s_values(path: str, ranks: int) -> None:
    case, (preset, keys) = CASES[path], WANTED[path]
    expected = tonnage.open(ROOT / path / "expected.safetensors").load(framework="numpy")
    checkpoint = tonnage.open(ROOT / path / "model.safetensors")
    said, names = {}, {}
    for name, told in case["tensors"].items():
        logical = name if name.endswith(".weight") else f"{name}.weight"
        said[logical] = {"preset": preset, "params": params(case, keys, told)}
        values = wide(expected[name])
        # transformers turns the last two axes of experts.
        names[logical] = values.swapaxes(1, 2) if preset == "mxfp4" else values
    for dim in range(next(iter(names.values())).ndim):
        rules = {**dict.fromkeys(said, Shard(dim)), "*": Replicate()}
        plan = checkpoint.plan(Mesh(tp=ranks), rules=rules, quantized=said)
        assert plan.verify() == plan.proof
        for name, values in names.items():
            np.testing.assert_array_equal(together(plan, name, values.shape), values)
            assert preset in plan.explain(0)


def test_parts_of_a_rank_are_a_checkpoint_of_the_scheme() -> None:
    name = "model.layers.0.mlp.down_proj"
    checkpoint = tonnage.open(ROOT / "awq-gemm/w4-g128/model.safetensors")
    said = {"*down_proj.weight": {"preset": "awq-gemm", "params": {"group": 128}}}
    rules = {"*down_proj.weight": Shard(1), "*": Replicate()}
    plan = checkpoint.plan(Mesh(tp=4), rules=rules, quantized=said)
    local = plan.load(1, framework="numpy")
    whole = checkpoint.load(framework="numpy")
    # 64 of 256 inputs: half of a group of 128, which becomes groups of 64.
    np.testing.assert_array_equal(local[f"{name}.qweight"], whole[f"{name}.qweight"][64:128])
    np.testing.assert_array_equal(local[f"{name}.scales"], whole[f"{name}.scales"][:1])
    np.testing.assert_array_equal(local[f"{name}.qzeros"], whole[f"{name}.qzeros"][:1])
    assert "groups of 128 as groups of 64" in plan.explain(1)
    (piece,) = plan.pieces(1)
    assert (piece.name, piece.shape, piece.start) == (f"{name}.weight", (32, 64), (0, 64))
    assert set(piece.parts) <= set(local)
    # Without smaller groups the cut is moved: two ranks have a group each, and two have nothing.
    moved = checkpoint.plan(Mesh(tp=4), rules=rules, quantized=said, cuts="aligned")
    assert "uneven, in multiples of 128" in moved.explain(1)
    assert [len(moved.pieces(rank)) for rank in range(4)] == [1, 1, 0, 0]


def test_gguf_says_itself_what_its_blocks_are(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    random, made = np.random.default_rng(5), {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, kind, shape in (
        ("blk.0.ffn_up.weight", gguf.GGMLQuantizationType.Q8_0, (10, 96)),
        ("blk.0.ffn_down.weight", gguf.GGMLQuantizationType.Q4_0, (7, 128)),
    ):
        blocks = gguf.quants.quantize(random.standard_normal(shape, np.float32), kind)
        made[name] = gguf.quants.dequantize(blocks, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = tonnage.open(tmp_path / "m.gguf")
    for ranks in (2, 3, 4):
        for dim in (0, 1):
            plan = checkpoint.plan(Mesh(tp=ranks), rules={"blk.*": Shard(dim), "*": Replicate()})
            for name, values in made.items():
                np.testing.assert_array_equal(together(plan, name, values.shape), values)


def test_mistakes_are_told() -> None:
    checkpoint = tonnage.open(ROOT / "gptq/w4-g128-sym/model.safetensors")
    rules = {"*": Replicate()}
    with pytest.raises(tonnage.UsageError, match="no scheme is called"):
        checkpoint.plan(Mesh(tp=2), rules=rules, quantized={"*": {"preset": "gptq@9"}})
    with pytest.raises(tonnage.UsageError, match="cuts must be"):
        checkpoint.plan(Mesh(tp=2), rules=rules, cuts="crooked")
    said = {"*": {"preset": "gptq", "params": {"bits": 4, "group": 128}}}
    plan = checkpoint.plan(Mesh(tp=2), rules=rules, quantized=said)
    with pytest.raises(tonnage.UsageError, match="new tensors"):
        plan.load(0, dequantize=True, out="checkpointable")
    loaded = plan.load(0, framework="numpy", dtype="float32", dequantize=True, select="*q_proj*")
    assert [one.dtype for one in loaded.values()] == [np.float32]
