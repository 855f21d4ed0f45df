"""`load(gds=True)`: GPUDirect Storage over the drivers that the tests build."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import tonnage
from device_data import on_stub, stub

LOAD = """
import json, sys
path, arguments = sys.argv[1], json.loads(sys.argv[2])
checkpoint = tonnage.open(path)
wanted = checkpoint.load(framework="numpy")
for name, tensor in checkpoint.stream(device="cuda:0", framework="tonnage", gds=True):
    equal(tensor, wanted[name])
tensor = None
found = checkpoint.load(device="cuda:0", framework="tonnage", gds=True, **arguments)
for name, value in wanted.items():
    equal(found[name], value)
print(json.dumps([checkpoint.report.strategy, checkpoint.report.reason]))
found = None
"""


def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    random = np.random.default_rng(2)
    tensors = {"large": random.standard_normal((3000, 1001), dtype="float32")}
    tensors |= {f"small.{at}": random.standard_normal((at + 1, 3)) for at in range(20)}
    tonnage.save(tensors, path, checksums=True)
    return path


def signs(tmp_path: Path) -> str:
    """A root with what NVIDIA's kernel module shows where it serves a device."""
    folder = tmp_path / "root/proc/driver/nvidia-fs"
    folder.mkdir(parents=True)
    (folder / "devcount").write_text("1\n")
    return str(tmp_path / "root")


def loaded(path: Path, arguments: dict[str, object], **settings: str) -> tuple[str, str]:
    strategy, reason = json.loads(on_stub(LOAD, path, json.dumps(arguments), **settings))
    return strategy, reason


def test_without_the_kernel_s_part_bytes_go_through_staging_memory(tmp_path: Path) -> None:
    root = tmp_path / "none"
    root.mkdir()
    _, reason = loaded(model(tmp_path), {}, TONNAGE_GDS_ROOT=str(root))
    assert "nvidia-fs" in reason


def test_pages_go_straight_to_the_card(tmp_path: Path) -> None:
    library = {"TONNAGE_CUFILE_LIBRARY": str(stub()), "TONNAGE_GDS_ROOT": signs(tmp_path)}
    path = model(tmp_path)
    plain = loaded(path, {}, TONNAGE_GDS_ROOT=str(tmp_path))
    direct = loaded(path, {}, **library)
    assert "no GPUDirect" in plain[1]
    assert direct[0] == "gds"
    assert "no GPUDirect" not in direct[1]
    # Chunks are compared in host memory.
    _, reason = loaded(path, {"verify": True}, **library)
    assert "checksums" in reason


def test_devices_tells_of_it(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TONNAGE_CUDA_DRIVER": str(stub()),
        "TONNAGE_GDS_ROOT": str(tmp_path),
    }
    command = [os.environ["TONNAGE_BIN"], "devices", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)["gpudirect_storage"]
    assert "nvidia-fs" in json.dumps(told)
