"""One load by one loader, in its own process: `python -m bench.peers SIDE FILE SMALL_FILE`.

Imports, loads a small file once, prints `ready`, waits for a line, loads, sums every byte, prints
what that took, waits, ends. All sides sum with the same code, so that views pay for what they put
off.

Loaders other than the reference 0.8 live in folders of their own (`python -m bench --install`), so
that no environment has to hold two versions of one package.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".peers"

#: What is installed for each side that needs a folder of its own; torch and NumPy are here already.
PACKAGES: dict[str, list[str]] = {
    "safetensors 0.9": ["safetensors==0.9.0rc1"],
    "fastsafetensors": ["fastsafetensors==0.5.0"],
    "Run:ai": ["runai-model-streamer==0.17.0", "humanize"],
    "tensorizer": [
        *("tensorizer==2.12.1", "redis", "hiredis", "boto3", "botocore", "s3transfer", "jmespath"),
        *("python-dateutil", "six", "urllib3", "psutil", "libnacl", "protobuf", "zstandard"),
    ],
}

Tensors = dict[str, Any]
Loader = Callable[[str], Any]


def folder(side: str) -> Path:
    return HOME / side.replace(":", "").replace(" ", "-").replace(".", "-").lower()


def install() -> None:
    for side, packages in PACKAGES.items():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--disable-pip-version-check", "--target", str(folder(side)), *packages]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        print(f"{side}: {'installed' if done.returncode == 0 else done.stderr.strip()}")


def tonnage() -> Loader:
    import tonnage

    return lambda path: tonnage.open(path).load(framework="torch")


def tonnage_views() -> Loader:
    from tonnage.torch import load_file

    return load_file


def reference() -> Loader:
    from safetensors.torch import load_file

    return load_file


def reference_eager() -> Loader:
    from safetensors.torch import load

    return lambda path: load(Path(path).read_bytes())


def reference_clone() -> Loader:
    from safetensors.torch import load_file

    return lambda path: {name: tensor.clone() for name, tensor in load_file(path).items()}


def fastsafetensors() -> Loader:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def job(path: str) -> tuple[Tensors, object]:
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        loader.add_filenames({0: [path]})
        buffer = loader.copy_files_to_device()
        names = loader.get_keys()
        return {name: buffer.get_tensor(name) for name in names}, (loader, buffer)

    return job


def runai() -> Loader:
    from runai_model_streamer import SafetensorsStreamer

    def job(path: str) -> tuple[Tensors, object]:
        # Left open: its tensors lie in its buffer.
        streamer = SafetensorsStreamer().__enter__()
        streamer.stream_file(path)
        return dict(streamer.get_tensors()), streamer

    return job


def tensorizer() -> Loader:
    from tensorizer import TensorDeserializer

    def job(path: str) -> tuple[Tensors, object]:
        file = TensorDeserializer(path + ".tensors", device="cpu", num_readers=4)
        return {name: tensor.detach() for name, tensor in file.items()}, file

    return job


def tensorizer_file(path: str) -> None:
    """The same tensors in tensorizer's own format, beside the file."""
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    writer = TensorSerializer(path + ".tensors")
    writer.write_state_dict(load_file(path))
    writer.close()


def mlx() -> Loader:
    import mlx.core as mx

    def job(path: str) -> Tensors:
        tensors = mx.load(path)
        mx.eval(tensors)
        return tensors

    return job


SIDES: dict[str, Callable[[], Loader]] = {
    "tonnage": tonnage,
    "tonnage load_file": tonnage_views,
    "reference load_file": reference,
    "reference load": reference_eager,
    "reference clone": reference_clone,
    "safetensors 0.9": reference,
    "fastsafetensors": fastsafetensors,
    "Run:ai": runai,
    "tensorizer": tensorizer,
    "MLX": mlx,
}


def total(tensors: Tensors) -> int:
    """The sum of every byte, eight at a time, on one thread."""
    import numpy as np

    sum_ = 0
    for tensor in tensors.values():
        array = np.asarray(memoryview(tensor) if type(tensor).__module__ == "mlx.core" else tensor)
        sum_ += int(array.reshape(-1).view(np.uint64).sum(dtype=np.uint64))
    return sum_ % 2**64


def main(side: str, path: str, small: str) -> None:
    if side == "make tensorizer":
        for file in (path, small):
            tensorizer_file(file)
        return
    loader = SIDES[side]()
    warm = loader(small)
    total(warm[0] if isinstance(warm, tuple) else warm)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    result = loader(path)
    loaded = time.perf_counter()
    found = total(result[0] if isinstance(result, tuple) else result)
    end = time.perf_counter()
    print(json.dumps({"load": loaded - start, "all": end - start, "sum": found}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
