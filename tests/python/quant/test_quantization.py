"""`ckpt.quantization`, `ckpt.quantized` and `load(dequantize=True)` over checkpoints that other
libraries wrote, with those libraries' own values.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
import torch

CORPUS = Path(__file__).resolve().parents[3] / "conformance/quant"
CASES: list[dict[str, Any]] = json.loads((CORPUS / "cases.json").read_bytes())["cases"]
#: Families that are carried as their parts; and one whose library rounds in several steps, in
#: another dtype than its files say (the Rust tests have its values).
LEFT_OUT = {"ct-marlin-24", "ct-sparse-24-bitmask", "ct-sparse-bitmask", "metal"}
#: One checkpoint of each kind.
KINDS = {case["scheme"]: case for case in reversed(CASES) if case["scheme"] not in LEFT_OUT}


def model(case: dict[str, Any]) -> Path:
    return CORPUS / case["path"] / "model.safetensors"


def expected(case: dict[str, Any]) -> dict[str, Any]:
    return tonnage.open(CORPUS / case["path"] / "expected.safetensors").load(framework="torch")


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal values, in the dtype that was recognised; zeros have no sign here.

    quanto's files don't say the shape, and Gemma's not how many columns are padding.
    """
    if found.dim() == 3 and found.shape != wanted.shape:
        wanted = wanted.transpose(-1, -2)  # gpt-oss computes with experts of [in, out].
    if found.numel() != wanted.numel():
        found = found[..., : wanted.shape[-1]]
    return bool(torch.equal(found.reshape(wanted.shape), wanted.to(found.dtype)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_numbers_are_the_library_s_own(kind: str) -> None:
    case = KINDS[kind]
    wanted = expected(case)
    with tonnage.open(model(case)) as checkpoint:
        assert set(checkpoint.quantized) == set(wanted)
        loaded = checkpoint.load(framework="torch", dequantize=True)
        report = checkpoint.report
        assert report is not None
        assert report.loaded == len(loaded)
        parts = {ref.name for q in checkpoint.quantized.values() for ref in q.components.values()}
        assert not parts & (set(loaded) - set(wanted))
        for name, value in wanted.items():
            assert same(loaded[name], value), name
            one = checkpoint.quantized[name]
            assert one.evidence
            assert same(one.dequantize(framework="torch"), value), name
        streamed = dict(checkpoint.stream(framework="torch", dequantize=True))
        assert set(streamed) == set(loaded)
        assert all(torch.equal(streamed[name], loaded[name]) for name in loaded)


def gptq(tmp_path: Path, config: bool = True) -> Path:
    case = next(case for case in CASES if case["path"] == "gptq/w4-g32-sym")
    folder = CORPUS / case["path"]
    shutil.copy(folder / "model.safetensors", tmp_path)
    if config:
        shutil.copy(folder / "quantize_config.json", tmp_path)
    return tmp_path / "model.safetensors"


def test_what_is_known_of_a_tensor(tmp_path: Path) -> None:
    checkpoint = tonnage.open(gptq(tmp_path))
    found = checkpoint.quantization
    assert found is checkpoint.quantized
    assert found.schemes == {"gptq@1": len(found)}
    assert "gptq@1" in repr(found)
    found.require_certain()
    name = next(iter(found))
    tensor = found[name.removesuffix(".weight")]
    assert (tensor.name, tensor.scheme, tensor.params["bits"]) == (name, "gptq@1", 4)
    assert tensor.params["group"] == 32
    assert {one.source for one in tensor.evidence} & {"quantize_config.json"}
    assert set(tensor.components) >= {"codes", "scale", "zero"}
    assert tensor.nbytes == sum(ref.nbytes for ref in tensor.components.values())
    assert name in repr(tensor)
    with pytest.raises(tonnage.UnknownTensorError):
        found["nothing"]


def test_the_map_that_is_written_is_read_back(tmp_path: Path) -> None:
    path = gptq(tmp_path)
    checkpoint = tonnage.open(path)
    text = checkpoint.quantization.to_json()
    values = checkpoint.load(framework="numpy", dequantize=True)
    tensors = checkpoint.load(framework="numpy")
    (tmp_path / "alone").mkdir()
    tonnage.save(tensors, tmp_path / "alone/model.safetensors", metadata={"quant.map": text})
    again = tonnage.open(tmp_path / "alone/model.safetensors")
    assert again.quantization.schemes == checkpoint.quantization.schemes
    one = next(iter(again.quantized.values()))
    assert {evidence.source for evidence in one.evidence} == {"quant.map"}
    loaded = again.load(framework="numpy", dequantize=True)
    assert all(np.array_equal(loaded[name], values[name]) for name in values)


def test_several_readings_are_told_and_refused_where_certainty_is_asked_for() -> None:
    case = next(c for c in CASES if c["scheme"] == "quanto" and c["bits"] == 4)
    found = tonnage.open(model(case)).quantization
    assert {one.field for one in found.ambiguities} == {"shape"}
    assert all(len(one.readings) > 1 and one.why for one in found.ambiguities)
    with pytest.raises(tonnage.UsageError, match="shape"):
        found.require_certain()


def test_dtype_into_select_and_verify(tmp_path: Path) -> None:
    path = gptq(tmp_path)
    tensors = tonnage.open(path).load(framework="numpy")
    summed = tmp_path / "summed.safetensors"
    tonnage.save(tensors, summed, checksums=True)
    checkpoint = tonnage.open(summed)
    name = next(iter(checkpoint.quantized))
    own = checkpoint.load(name, framework="torch", dequantize=True)
    assert list(own) == [name]
    wide = checkpoint.load(name, framework="torch", dtype="float32", dequantize=True, verify=True)
    assert wide[name].dtype == torch.float32
    assert torch.equal(wide[name], own[name].float())
    place = {name: torch.empty_like(own[name])}
    checkpoint.load(into=place, dequantize=True)
    assert torch.equal(place[name], own[name])
    ref = checkpoint.quantized[name].components["codes"]
    flipped = bytearray(summed.read_bytes())
    flipped[ref.offset] ^= 1
    summed.write_bytes(flipped)
    with pytest.raises(tonnage.FormatError) as caught:
        tonnage.open(summed).load(name, dequantize=True, verify=True)
    assert caught.value.code == "CHECKSUM_MISMATCH"


def test_a_recognised_tensor_is_repacked(tmp_path: Path) -> None:
    checkpoint = tonnage.open(gptq(tmp_path))
    tensor = next(iter(checkpoint.quantized.values()))
    packed = tonnage.repack(tensor.read(), "ct-pack-dense")
    assert packed.scheme == "ct-pack-dense@1"
    assert np.array_equal(packed.dequantize(), tensor.dequantize(framework="numpy"))


def test_plain_checkpoints_have_none_and_load_alike(tmp_path: Path) -> None:
    tonnage.save({"a": np.ones((2, 3), np.float32)}, tmp_path / "a.safetensors")
    with tonnage.open(tmp_path / "a.safetensors") as checkpoint:
        assert not checkpoint.quantization
        assert "nothing" in repr(checkpoint.quantization)
        assert checkpoint.load(framework="numpy", dequantize=True)["a"].sum() == 6
