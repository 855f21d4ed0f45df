"""Checkpoints that are quantised here are recognised: by their map, and without it by what their
libraries go by.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tonnage

FORMS = {
    "gptq:bits=4,group=128": "gptq@1",
    "gptq-v2:bits=4,group=128": "gptq-v2@1",
    "awq:group=64": "awq-gemm@1",
    "ct-pack:bits=8,group=32": "ct-pack-dense@1",
    "fp8-block": "fp8-block@1",
    "nvfp4": "nvfp4-mul@1",
    "mlx:bits=4,group=64": "mlx-affine@1",
    "bnb4": "bnb4@1",
    "q4_k": "ggml/Q4_K@1",
}
#: What nobody but the map says of a file of safetensors.
BY_MAP_ALONE = {"q4_k"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    random = np.random.default_rng(5)
    tensors = {
        f"model.layers.{layer}.{name}.weight": random.standard_normal((256, 256), dtype="float32")
        for layer in range(2)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    tensors["model.norm.weight"] = np.ones(256, np.float32)
    tonnage.save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_by_the_map_and_by_the_configuration(form: str, plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    tonnage.quantize_checkpoint(plain, target, form)
    checkpoint = tonnage.open(target)
    found = checkpoint.quantization
    assert found.schemes == {FORMS[form]: 4}
    assert (found.ambiguities, found.refused, found.warnings) == ((), {}, ())
    assert {one.source for tensor in found.values() for one in tensor.evidence} == {"quant.map"}
    values = checkpoint.load(framework="numpy", dequantize=True)
    original = tonnage.open(plain).load(framework="numpy")
    assert set(values) == set(original)
    assert np.array_equal(values["model.norm.weight"], original["model.norm.weight"])
    for name in found:
        single = tonnage.quantize(original[name], form).dequantize()
        assert np.array_equal(np.asarray(values[name], np.float32), np.asarray(single, np.float32))
    if form in BY_MAP_ALONE:
        return
    metadata = {key: text for key, text in checkpoint.metadata.items() if key != "quant.map"}
    parts = checkpoint.load(framework="numpy")
    checkpoint.close()
    (path,) = target.glob("*.safetensors")
    tonnage.save(parts, path, metadata=metadata)
    again = tonnage.open(target)
    assert again.quantization.schemes == {FORMS[form]: 4}
    again.quantization.require_certain()
    assert "quant.map" not in {
        one.source for tensor in again.quantization.values() for one in tensor.evidence
    }
    loaded = again.load(framework="numpy", dequantize=True)
    assert all(np.array_equal(loaded[name], values[name]) for name in values)
