"""A real Q4_K_M model: read beside the `gguf` package, loaded to devices, there and back."""

from __future__ import annotations

import filecmp
import json
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tonnage
from gguf_data import real_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_data import on_stub

MIB = 1 << 20


@pytest.fixture(scope="module")
def model() -> Path:
    return real_model()


@pytest.fixture(scope="module")
def reader(model: Path) -> gguf.GGUFReader:
    """Seconds: the package reads every token of the vocabulary in Python."""
    return gguf.GGUFReader(model)


def test_all_of_it_is_what_the_gguf_package_reads(model: Path, reader: gguf.GGUFReader) -> None:
    checkpoint = tonnage.open(model)
    info = checkpoint.gguf
    assert info is not None
    assert (info.version, info.alignment, info.architecture) == (3, 32, "gemma3")
    assert len(reader.tensors) == len(checkpoint) == 236
    kinds: dict[str, int] = {}
    loaded = checkpoint.load(framework="numpy")
    for tensor in reader.tensors:
        mine = info.tensors[tensor.name]
        kinds[mine.type] = kinds.get(mine.type, 0) + 1
        assert mine.type == tensor.tensor_type.name
        assert mine.shape == tuple(int(extent) for extent in tensor.shape[::-1])
        assert (mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert np.array_equal(loaded[tensor.name], tensor.data), tensor.name
    assert kinds == {"Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9, "F32": 109}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert info.metadata[key] == field.contents(), key
    assert info.to_hf("blk.3.post_ffw_norm.weight") == (
        "model.layers.3.post_feedforward_layernorm.weight"
    )
    assert all(info.to_hf(name) for name in checkpoint)
    assert tonnage.verify(model).ok


def test_its_values_are_those_of_the_gguf_package(model: Path, reader: gguf.GGUFReader) -> None:
    checkpoint = tonnage.open(model)
    assert checkpoint.quantization.schemes["ggml/Q4_K@1"] == 27
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    seen = 0
    for name, values in checkpoint.stream(framework="numpy", dequantize=True):
        tensor = tensors[name]
        # The vocabulary's 168 million values take the package long: its first and last rows.
        rows = slice(None) if tensor.data.size < 1 << 24 else np.r_[0:64, -64:0]
        wanted = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        assert np.array_equal(values[rows].view(np.uint32), wanted.view(np.uint32)), name
        seen += 1
    assert seen == len(tensors) == 236


def test_a_slice_is_the_rows_of_the_file(model: Path, reader: gguf.GGUFReader) -> None:
    checkpoint = tonnage.open(model)
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    rows = checkpoint["token_embd.weight"][1000:1010]
    assert np.array_equal(rows, tensor.data[1000:1010])


def test_to_safetensors_and_back_it_is_the_same_file(model: Path, tmp_path: Path) -> None:
    tonnage.convert(model, tmp_path / "m.safetensors", max_shard_size="100MB", fsync=False)
    # Any reader of safetensors sees ordinary tensors.
    checkpoint = tonnage.open(tmp_path)
    assert len(checkpoint.files) > 1
    assert len(checkpoint) == 237
    maps = json.loads(checkpoint.metadata["quant.map"])
    assert {scheme["preset"] for scheme in maps["schemes"].values()} == {
        "ggml/Q5_0@1",
        "ggml/Q4_K@1",
        "ggml/Q8_0@1",
        "ggml/Q6_K@1",
    }
    tonnage.convert(tmp_path, tmp_path / "again.gguf", fsync=False)
    assert filecmp.cmp(model, tmp_path / "again.gguf", shallow=False)


#: Loads to a device, and prints by how much anonymous memory grew, without the device's own.
WATCHED = """
import sys, threading, time
import tonnage

def anonymous():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10

path, device, staging = sys.argv[1], sys.argv[2], int(sys.argv[3])
dequantize = sys.argv[4] == "True"
checkpoint = tonnage.open(path)
# The driver and its context are there before anything is measured.
checkpoint.load("output_norm.weight", device=device, framework="tonnage", staging=staging)
before, most, over = anonymous(), [0], threading.Event()

def watch():
    while not over.is_set():
        most[0] = max(most[0], anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
found = checkpoint.load(
    device=device, framework="tonnage", staging=staging, dequantize=dequantize
)
over.set()
watcher.join()
grown = max(most[0], anonymous()) - before
peak = checkpoint.report.peak_staging
held = anonymous()
sums = {name: tensor.numpy() for name, tensor in found.items() if "blk.7" in name}
wanted = checkpoint.load("blk.7.*", framework="numpy", dequantize=dequantize)
assert sums and all((sums[name] == wanted[name]).all() for name in wanted)
nbytes = sum(tensor.nbytes for tensor in found.values())
whole = checkpoint.quantization.numbers if dequantize else checkpoint
assert nbytes == whole.nbytes, (nbytes, whole.nbytes)
del sums, wanted, found
freed = held - anonymous()
# Memory of a device that is none is the process's own: what of it came back was the device's.
own = nbytes if freed > nbytes // 2 else 0
print(grown - own, peak)
"""


def within(printed: str, staging: int) -> None:
    extra, peak = (int(number) for number in printed.split()[-2:])
    assert peak <= staging, peak
    assert extra <= staging + 32 * MIB, f"{extra / MIB:.1f} MiB besides the model"


BUDGETS = pytest.mark.parametrize(
    ("staging", "dequantize"), [(8 * MIB, False), (64 * MIB, False), (8 * MIB, True)]
)


@BUDGETS
def test_loading_to_a_card_takes_the_staging_budget(
    model: Path, staging: int, dequantize: bool
) -> None:
    printed = on_stub(WATCHED, model, "cuda:0", staging, dequantize, STUB_MEM_MIB="2048")
    print(printed)
    within(printed, staging)


@BUDGETS
def test_loading_to_vulkan_takes_the_staging_budget(
    model: Path, staging: int, dequantize: bool
) -> None:
    kinds = {kind.kind: kind for kind in tonnage.devices()}
    if not kinds["vulkan"].devices:
        assert "CI" not in os.environ, kinds["vulkan"].missing
        pytest.skip(str(kinds["vulkan"].missing))
    printed = on_stub(WATCHED, model, "vulkan:0", staging, dequantize)
    print(printed)
    within(printed, staging)
