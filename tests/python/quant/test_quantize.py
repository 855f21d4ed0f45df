"""`tonnage.quantize`, `repack` and `save_gguf`, beside what other libraries make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage


def weight(rows: int = 64, columns: int = 256) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(4)
    made: np.ndarray[Any, Any] = random.normal(0, 0.02, (rows, columns)).astype(np.float32)
    return made


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_ggml_types_are_read_by_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    ty, values = gguf.GGMLQuantizationType[name], weight()
    made = tonnage.quantize(values, name.lower())
    (blocks,) = made.parts.values()
    assert made.scheme == f"ggml/{name}@1"
    assert blocks.dtype == np.uint8
    assert np.array_equal(gguf.quants.dequantize(blocks, ty), made.dequantize())
    if "K" not in name:
        assert np.array_equal(gguf.quants.quantize(values, ty), blocks)
    assert np.abs(made.dequantize() - values).max() < 0.02


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 64), (6, 128), (8, 64)])
def test_affine_codes_are_those_of_mlx(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    mx.set_default_device(mx.cpu)
    values = weight()
    made = tonnage.quantize(values, "mlx", bits=bits, group=group, name="proj.weight")
    codes, scales, biases = mx.quantize(mx.array(values), group_size=group, bits=bits)
    parts = made.parts
    assert np.array_equal(parts["proj.weight"], np.array(codes))
    assert np.array_equal(parts["proj.scales"], np.array(scales))
    assert np.array_equal(parts["proj.biases"], np.array(biases))
    back = mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
    assert np.array_equal(made.dequantize(), np.array(back))


def test_a_torch_tensor_becomes_torch_parts() -> None:
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(weight()).to(torch.bfloat16)
    made = tonnage.quantize(values, "fp8-row", name="proj.weight")
    assert made.dtype == "BF16"
    codes, scales = made.parts["proj.weight"], made.parts["proj.weight_scale"]
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (64, 1)
    ours = made.dequantize()
    assert torch.equal(ours, (codes.float() * scales).bfloat16().float())
    # The step of a row is its largest magnitude by 448.
    assert torch.equal(scales[:, 0], values.float().abs().amax(1) / 448)
    # What is not contiguous is quantised as it is.
    turned = tonnage.quantize(values.t(), "fp8-row", name="proj.weight")
    assert turned.shape == (256, 64)


def test_repacking_keeps_bits_or_is_refused() -> None:
    awq = tonnage.quantize(weight().astype(np.float16), "awq", group=64, name="proj.weight")
    there = tonnage.repack(awq, "compressed-tensors")
    assert there.report is not None
    assert there.report.how == "rearranged"
    assert np.array_equal(there.dequantize(), awq.dequantize())
    back = tonnage.repack(there, "awq")
    for name, part in awq.parts.items():
        assert np.array_equal(back.parts[name], part)
    with pytest.raises(tonnage.UsageError, match="zero points are not in the middle") as refused:
        tonnage.repack(awq, "marlin")
    assert refused.value.code == "QUANT_LOSSY"
    lossy = tonnage.repack(awq, "marlin", lossy=True)
    assert lossy.report is not None
    assert lossy.report.how == "requantised"
    assert 0 < lossy.report.changed <= lossy.report.elements == 64 * 256
    apart = np.abs(lossy.dequantize() - awq.dequantize()).max()
    assert lossy.report.max_error == pytest.approx(apart, rel=1e-6)


def test_what_can_not_be_quantised_is_refused() -> None:
    with pytest.raises(tonnage.UsageError, match="there are gptq"):
        tonnage.quantize(weight(), "int3000")
    with pytest.raises(tonnage.UsageError, match="what=1"):
        tonnage.quantize(weight(), "awq", what=1)
    with pytest.raises(tonnage.UsageError, match="element 3"):
        tonnage.quantize(np.array([[1, 2, 3, np.nan] * 64], np.float32), "q8_0")
    with pytest.raises(tonnage.UsageError, match="I32"):
        tonnage.quantize(np.zeros((32, 32), np.int32), "q8_0")
    assert "ct-pack" in tonnage.schemes()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tensors = {
        "model.embed_tokens.weight": weight(96, 64),
        "model.layers.0.self_attn.q_proj.weight": weight(64, 64),
        "model.layers.0.mlp.down_proj.weight": weight(64, 256),
        "model.layers.0.input_layernorm.weight": weight(1, 64)[0],
        "lm_head.weight": weight(96, 64),
    }
    tonnage.save(tensors, folder)
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 3, "content": "<end>", "special": True}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_model_becomes_gguf_for_the_gguf_package(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    where = tmp_path / "tiny.gguf"
    saved = tonnage.save_gguf(
        model,
        where,
        "q8_0",
        types={"*.down_proj.weight": "q4_k"},
        metadata={"general.author": "us", "tokenizer.ggml.pre": "llama-bpe", "a.list": [1, 2]},
    )
    assert saved.tensors["blk.0.ffn_down.weight"] == "Q4_K"
    assert any("rms" in note for note in saved.notes)
    reader = gguf.GGUFReader(where)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count"] == 4
    assert fields["general.author"] == "us"
    assert fields["a.list"] == [1, 2]
    assert fields["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<end>"]
    assert fields["tokenizer.ggml.token_type"] == [1, 1, 1, 3]
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    found = {tensor.name: tensor for tensor in reader.tensors}
    down = found["blk.0.ffn_down.weight"]
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert np.array_equal(values, tonnage.quantize(weight(64, 256), "q4_k").dequantize())
    # Rows of queries: pairs that are turned together lie side by side.
    query = found["blk.0.attn_q.weight"]
    rows = gguf.quants.dequantize(query.data, query.tensor_type)
    turned = weight(64, 64).reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.abs(rows - turned).max() < 0.001
    with pytest.raises(tonnage.UsageError, match="q9"):
        tonnage.save_gguf(model, where, "q9")


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("gptq:group=32", "gptq"),
        ("awq:group=32", "awq"),
        ("fp8-block", "fp8"),
        ("bnb4", "bitsandbytes"),
    ],
)
def test_configurations_are_transformers_own(
    model: Path, tmp_path: Path, scheme: str, method: str
) -> None:
    auto = pytest.importorskip("transformers.quantizers.auto")
    made = tonnage.quantize_checkpoint(model, tmp_path / "out", scheme)
    assert len(made.tensors) == 2
    assert made.config is not None
    said = json.loads(Path(made.config).read_text())["quantization_config"]
    assert said["quant_method"] == method
    parsed = auto.AutoQuantizationConfig.from_dict(said)
    if "group" in scheme:
        assert parsed.group_size == 32
    again = tonnage.open(tmp_path / "out")
    assert again["lm_head.weight"].shape == (96, 64)
    assert "quant.map" in again.metadata
