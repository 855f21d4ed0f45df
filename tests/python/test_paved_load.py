"""`Checkpoint.load` and `stream`: selection, frameworks, casts, existing tensors, and the
report.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
import torch
from paved_data import DTYPES, Counting, content, model, same, values, write_model
from safetensors.torch import load_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_model(path)
    return path


@pytest.fixture
def checkpoint(path: Path) -> tonnage.Checkpoint:
    return tonnage.open(path)


def test_all_of_it_equals_the_references(path: Path, checkpoint: tonnage.Checkpoint) -> None:
    reference = load_file(path)
    loaded = checkpoint.load(framework="torch")
    assert list(loaded) == list(checkpoint)
    assert loaded.keys() == reference.keys()
    for name, tensor in reference.items():
        assert loaded[name].dtype == tensor.dtype
        assert same(loaded[name].numpy(), tensor.numpy())
    report = checkpoint.report
    assert report is not None
    assert (report.loaded, report.bytes) == (len(reference), checkpoint.nbytes)
    assert report.seconds > 0
    assert report.threads >= 1
    assert report.gb_per_s == pytest.approx(report.bytes / report.seconds / 1e9)
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], [])
    assert "7 tensors" in str(report)


def test_loaded_tensors_own_their_memory(path: Path, checkpoint: tonnage.Checkpoint) -> None:
    loaded = checkpoint.load(framework="torch")
    before = loaded["step"].clone()
    del checkpoint
    path.write_bytes(b"\0" * path.stat().st_size)
    gc.collect()
    assert torch.equal(loaded["step"], before)
    loaded["step"] += 1


def test_many_tensors_and_many_threads() -> None:
    arrays = {f"t{i:04}": values("F32", (i % 17, 3), i) for i in range(3000)}
    rows = {n: ("F32", list(a.shape), a.tobytes()) for n, a in arrays.items()}
    checkpoint = tonnage.open(content(rows))
    for threads in (1, 4):
        loaded = checkpoint.load(framework="numpy", threads=threads)
        assert all(same(loaded[name], array) for name, array in arrays.items())
        assert checkpoint.report.threads <= threads


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("step", ["step"]),
        ("layers.0.*", ["layers.0.attn.bias", "layers.0.attn.weight"]),
        ("*.bias", ["layers.0.attn.bias", "layers.1.attn.bias"]),
        ("layers.[!0].*.weight", ["layers.1.attn.weight"]),
        ("ste?", ["step"]),
        (["step", "*.1.*bias", "step"], ["layers.1.attn.bias", "step"]),
        (lambda name: name.endswith("bias"), ["layers.0.attn.bias", "layers.1.attn.bias"]),
        (iter(["step"]), ["step"]),
    ],
)
def test_select(checkpoint: tonnage.Checkpoint, select: Any, expected: list[str]) -> None:
    loaded = checkpoint.load(select, framework="numpy")
    assert sorted(loaded) == sorted(expected)
    assert list(loaded) == [name for name in checkpoint if name in loaded]


def test_select_that_finds_nothing(checkpoint: tonnage.Checkpoint) -> None:
    with pytest.raises(KeyError) as caught:
        checkpoint.load(["step", "layers.0.attn.wight"])
    assert isinstance(caught.value, tonnage.UnknownTensorError)
    assert "layers.0.attn.weight" in caught.value.suggestions
    for nothing in ("lora.*", lambda name: False, []):
        with pytest.raises(tonnage.UnknownTensorError, match="matches"):
            checkpoint.load(nothing)
    assert list(checkpoint.load(["step", "lora.*"], framework="numpy")) == ["step"]
    assert checkpoint.report.missing == ["lora.*"]
    with pytest.raises(TypeError):
        checkpoint.load([3])


def test_names_with_marks_of_patterns_in_them() -> None:
    rows = {n: ("U8", [1], b"x") for n in ("a[0]", "a0", "b*", "bc")}
    checkpoint = tonnage.open(content(rows))
    assert list(checkpoint.load("a[0]", framework="numpy")) == ["a[0]"]
    assert list(checkpoint.load("b*", framework="numpy")) == ["b*"]
    assert list(checkpoint.load("b[c]", framework="numpy")) == ["bc"]


def test_the_default_framework_is_torch_once_it_is_imported(checkpoint: Any) -> None:
    assert isinstance(checkpoint.load("step")["step"], torch.Tensor)


# Several of these frameworks do not bear each other in one process, so each gets its own.
IN_A_PROCESS = """
import sys
import numpy as np
import tonnage
from paved_data import model, same

path, framework = sys.argv[1:]
checkpoint = tonnage.open(path)
loaded = checkpoint.load(["*.weight", "*.bias"], framework=framework)
assert len(loaded) == 5
for name, tensor in loaded.items():
    assert type(tensor).__module__.split(".")[0].startswith(framework[:3]), type(tensor)
    assert same(np.asarray(tensor), model()[name]), name
ref = checkpoint["embed.weight"]
assert same(np.asarray(ref.slice((slice(4, 2, -1), 3), framework)), ref.numpy()[4:2:-1, 3])
out = path + ".out.safetensors"
tonnage.save(loaded, out)
again = tonnage.open(out)
assert all(same(again[name].numpy(), model()[name]) for name in loaded)
print("done")
"""


@pytest.mark.parametrize("framework", ["jax", "tensorflow", "mlx", "paddle"])
def test_other_frameworks(path: Path, framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    command = [sys.executable, "-c", IN_A_PROCESS, str(path), framework]
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


def test_other_frameworks_stay_on_the_host(checkpoint: tonnage.Checkpoint) -> None:
    with pytest.raises(tonnage.DeviceError, match="numpy"):
        checkpoint.load(framework="numpy", device="cuda:0")
    with pytest.raises(RuntimeError):
        checkpoint.load(framework="torch", device="no-such-device")
    meta = checkpoint.load(framework="torch", device="meta")
    assert all(tensor.device.type == "meta" for tensor in meta.values())


CASTS = ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2"]


@pytest.mark.parametrize("target", CASTS)
def test_casts_are_those_of_ml_dtypes(target: str) -> None:
    arrays = {source: np.linspace(-9, 9, 64).astype(DTYPES[source]) for source in CASTS}
    arrays["I32"] = np.arange(64, dtype=np.int32)
    rows = {n: (n, [64], a.tobytes()) for n, a in arrays.items()}
    checkpoint = tonnage.open(content(rows))
    kind = np.dtype(DTYPES[target])
    for framework in ("numpy", "torch"):
        loaded = checkpoint.load(framework=framework, dtype=target)
        for name, array in arrays.items():
            found = loaded[name]
            if framework == "torch":
                found = found.view(torch.uint8).numpy().view(array.dtype if name == "I32" else kind)
            if name == "I32":
                assert same(found, array)
            elif name == "F64":
                # One rounding, where ml_dtypes may round twice from 64 bits.
                assert np.allclose(found.astype(np.float64), array, rtol=0.13)
            else:
                assert same(found, array.astype(kind)), name


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        "BF16",
        "bf16",
        "torch.bfloat16",
        torch.bfloat16,
        DTYPES["BF16"],
        np.dtype(DTYPES["BF16"]),
    ],
)
def test_ways_to_say_a_dtype(checkpoint: tonnage.Checkpoint, dtype: Any) -> None:
    loaded = checkpoint.load(framework="torch", dtype=dtype)
    assert loaded["embed.weight"].dtype == torch.bfloat16
    assert loaded["step"].dtype == torch.int64


def test_dtypes_that_are_none_or_no_target(checkpoint: tonnage.Checkpoint) -> None:
    import jax.numpy

    loaded = checkpoint.load(framework="numpy", dtype=jax.numpy.float16)
    assert loaded["embed.weight"].dtype == np.float16
    assert checkpoint.load(framework="numpy", dtype=np.float64)["embed.weight"].dtype == np.float64
    for wrong in ("float31", "F4", "int8", object(), torch.int32, "F8_E8M0"):
        with pytest.raises(tonnage.UsageError) as caught:
            checkpoint.load(dtype=wrong)
        assert isinstance(caught.value, ValueError)


def places(kind: str) -> dict[str, Any]:
    arrays = {name: np.full_like(array, 1) for name, array in model().items()}
    return arrays if kind == "numpy" else {n: torch.from_numpy(a) for n, a in arrays.items()}


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_into_existing_tensors(checkpoint: tonnage.Checkpoint, kind: str) -> None:
    into = places(kind)
    where = {n: np.asarray(value).__array_interface__["data"][0] for n, value in into.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled = checkpoint.load(into=into)
    assert filled.keys() == into.keys()
    for name, array in model().items():
        assert filled[name] is into[name]
        found = np.asarray(into[name])
        assert same(found, array)
        assert not array.size or found.__array_interface__["data"][0] == where[name]
    assert checkpoint.report.loaded == len(into)
    assert checkpoint.report.peak_staging == 0


def test_into_tensors_of_other_dtypes_strides_and_kinds(checkpoint: tonnage.Checkpoint) -> None:
    expected = model()
    into = {
        "embed.weight": torch.zeros(8, 16, dtype=torch.float64).t(),
        "layers.0.attn.weight": torch.zeros(8, 8, dtype=torch.bfloat16),
        "layers.0.attn.bias": np.zeros(16, np.float32)[::2],
        "layers.1.attn.bias": np.zeros(8, ">f4"),
        "step": np.zeros((), np.int64),
    }
    checkpoint.load(into=into, strict=False)
    assert np.array_equal(into["embed.weight"].numpy(), expected["embed.weight"], equal_nan=True)
    half = torch.from_numpy(expected["layers.0.attn.weight"]).to(torch.bfloat16)
    assert torch.equal(into["layers.0.attn.weight"].nan_to_num(), half.nan_to_num())
    for name in ("layers.0.attn.bias", "layers.1.attn.bias"):
        assert np.array_equal(into[name], expected[name], equal_nan=True)
    assert into["step"] == 7
    assert sorted(checkpoint.report.unexpected) == ["empty", "layers.1.attn.weight"]


def test_into_tied_tensors_that_are_one_memory() -> None:
    rows = {n: ("F32", [4], values("F32", (4,), 3).tobytes()) for n in ("a", "b")}
    checkpoint = tonnage.open(content(rows))
    tied = torch.zeros(4)
    checkpoint.load(into={"a": tied, "b": tied})
    assert tied.numpy().tobytes() == rows["a"][2]
    whole = np.zeros(6, np.float32)
    checkpoint.load(into={"a": whole[:4], "b": whole[2:]})
    assert whole[2:].tobytes() == rows["b"][2]


def test_into_a_module(tmp_path: Path) -> None:
    make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))  # noqa: E731
    source, target = make(), make()
    path = tmp_path / "module.safetensors"
    tonnage.save(source.state_dict(), path)
    filled = tonnage.open(path).load(into=target, strict=True)
    assert filled.keys() == target.state_dict().keys()
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_what_does_not_fit_is_reported_warned_of_or_refused(checkpoint: Any) -> None:
    def into() -> dict[str, Any]:
        return {
            "step": np.zeros((), np.int64),
            "embed.weigth": np.zeros((16, 8), np.float32),
            "layers.0.attn.bias": np.zeros(9, np.float32),
            "layers.1.attn.bias": np.zeros(8, np.int32),
        }

    with pytest.warns(tonnage.IncompleteLoadWarning, match=r"embed\.weight"):
        filled = checkpoint.load(into=into())
    assert list(filled) == ["step"]
    report = checkpoint.report
    assert report.missing == ["embed.weigth"]
    assert "embed.weight" in report.suggestions["embed.weigth"]
    assert "embed.weight" in report.unexpected
    reasons = dict(report.mismatched)
    assert reasons["layers.0.attn.bias"].startswith("shape [8]")
    assert reasons["layers.1.attn.bias"].startswith("dtype F32")
    strict = into()
    with pytest.raises(tonnage.UsageError, match="missing: embed"):
        checkpoint.load(into=strict, strict=True)
    assert strict["step"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load(into=into(), strict=False)
        checkpoint.load("step", into=into())
    assert checkpoint.report.missing == []


def test_what_cannot_be_loaded_into(checkpoint: tonnage.Checkpoint) -> None:
    import jax.numpy

    fixed = np.zeros((), np.int64)
    fixed.flags.writeable = False
    for place in (jax.numpy.zeros(()), fixed, 3.0, "text"):
        with pytest.raises(TypeError, match="step"):
            checkpoint.load("step", into={"step": place})
    for into in (3, [1], "text"):
        with pytest.raises(TypeError, match="into"):
            checkpoint.load(into=into)
    for more in ({"framework": "numpy"}, {"dtype": "F32"}, {"device": "meta"}):
        with pytest.raises(tonnage.UsageError):
            checkpoint.load(into={}, **more)
    with pytest.raises(tonnage.UsageError):
        checkpoint.load(strict=True)


def test_a_truncated_file_ends_a_load_in_an_error(path: Path) -> None:
    checkpoint = tonnage.open(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="model") as caught:
        checkpoint.load()
    assert isinstance(caught.value, tonnage.StorageError)


def test_stream_yields_all_in_order(checkpoint: tonnage.Checkpoint) -> None:
    streamed = list(checkpoint.stream(framework="numpy"))
    assert [name for name, _ in streamed] == list(checkpoint)
    assert all(same(tensor, model()[name]) for name, tensor in streamed)
    assert checkpoint.report.loaded == len(streamed)
    assert checkpoint.report.bytes == checkpoint.nbytes


def test_stream_in_an_order_of_ones_own(checkpoint: tonnage.Checkpoint) -> None:
    order = ["step", "embed.weight", "layers.0.attn.bias"]
    streamed = dict(checkpoint.stream(order, framework="torch", dtype="float16"))
    assert list(streamed) == order
    assert streamed["embed.weight"].dtype == torch.float16
    names = [name for name, _ in checkpoint.stream(select="*.bias", framework="numpy")]
    assert names == [name for name in checkpoint if name.endswith(".bias")]
    with pytest.raises(tonnage.UnknownTensorError):
        checkpoint.stream(["absent"])
    with pytest.raises(tonnage.UsageError):
        checkpoint.stream(["step"], select="*")
    with pytest.raises(tonnage.UsageError):
        checkpoint.stream(budget="many")


def test_stream_reads_no_further_ahead_than_its_budget() -> None:
    size, count = 1 << 20, 64
    rows = {f"t{i:02}": ("U8", [size], bytes([i]) * size) for i in range(count)}
    source = Counting(content(rows))
    checkpoint = tonnage.open(source)
    source.taken = 0
    furthest = 0
    for done, (name, tensor) in enumerate(checkpoint.stream(framework="numpy", budget="8MiB"), 1):
        assert tensor[0] == int(name[1:])
        furthest = max(furthest, source.taken - (done - 1) * size)
    assert source.taken == count * size
    assert size <= furthest <= 10 * size
    assert checkpoint.report.peak_staging <= 8 << 20


def test_a_stream_that_is_left_early_ends_its_reading(checkpoint: tonnage.Checkpoint) -> None:
    import threading

    stream = checkpoint.stream(framework="numpy")
    next(stream)
    stream.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("tonnage-stream")]


def test_stream_tells_of_a_failed_read(path: Path) -> None:
    checkpoint = tonnage.open(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(tonnage.StorageError):
        list(checkpoint.stream())


@pytest.mark.parametrize("strategy", ["auto", "lazy", "direct", "buffered", "mmap"])
def test_a_load_to_the_host_reads_as_it_is_asked_and_says_why(
    tmp_path: Path, strategy: str
) -> None:
    path = tmp_path / "m.safetensors"
    data = np.arange(1 << 20, dtype="float32")
    tonnage.save({"a": data, "b": data[:7]}, path)
    checkpoint = tonnage.open(path)
    loaded = checkpoint.load(framework="numpy", strategy=strategy)
    assert all((loaded[name] == data[: len(loaded[name])]).all() for name in ("a", "b"))
    assert checkpoint.report is not None
    assert checkpoint.report.reason
    with pytest.raises(tonnage.UsageError, match="strategy"):
        checkpoint.load(framework="numpy", strategy="fastest")
