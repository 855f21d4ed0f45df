"""Bounds and bad ends on a GPU: host memory, a full device, Ctrl-C, a file that is cut short."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tonnage
import torch
from gpu_data import DEVICE, MIB

Saved = tuple[Path, dict[str, Any]]

PEAK = """
import sys, torch, tonnage
path, staging = sys.argv[1:]
torch.zeros(1, device="cuda:0")
checkpoint = tonnage.open(path)
checkpoint.load("layer.0.weight", device="cuda:0", staging="1MiB")
tensors = checkpoint.load(device="cuda:0", staging=staging)
print(checkpoint.report.peak_staging, checkpoint.report.peak_host, len(tensors))
"""


@pytest.mark.parametrize("mib", [16, 64, 256])
def test_host_memory_is_the_budget(big: Saved, mib: int) -> None:
    command = [sys.executable, "-c", PEAK, str(big[0]), f"{mib}MiB"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    staging, host, count = map(int, out.split())
    assert count == len(big[1])
    # More than a slot passed through it, and never more than the budget.
    assert 2 * MIB <= staging <= mib * MIB
    assert host <= (mib + 32) * MIB


def test_a_full_device_says_so_and_everything_is_free_again(big: Saved, clean: None) -> None:
    path, tensors = big
    total = sum(tensor.nbytes for tensor in tensors.values())
    free, _ = torch.cuda.mem_get_info(0)
    hog = torch.empty(free - total // 2, dtype=torch.uint8, device=DEVICE)
    allocated = torch.cuda.memory_allocated()
    before, _ = torch.cuda.mem_get_info(0)
    checkpoint = tonnage.open(path)
    with pytest.raises(tonnage.DeviceError, match=r"out of memory: \d+ bytes needed, \d+ free"):
        checkpoint.load(device=DEVICE)
    with pytest.raises(tonnage.DeviceError, match=r"out of memory: \d+ bytes needed, \d+ free"):
        checkpoint.load(device=DEVICE, framework="tonnage")
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == allocated
    after, _ = torch.cuda.mem_get_info(0)
    assert before - after <= 32 * MIB
    del hog
    torch.cuda.empty_cache()
    assert len(checkpoint.load(device=DEVICE)) == len(tensors)


def test_ctrl_c_ends_a_load_and_frees_everything(big: Saved, clean: None) -> None:
    path, _ = big
    checkpoint = tonnage.open(path)
    before = torch.cuda.memory_allocated()
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def slow(done: int, total: int) -> None:
        time.sleep(0.005)

    def load_for_long() -> None:
        for _ in range(1000):
            checkpoint.load(device=DEVICE, staging="1MiB", threads=1, progress=slow)

    # A busy machine adds to it what it likes: the soonest of a few shows what the load takes.
    soonest = 60.0
    for _ in range(3):
        timer = threading.Timer(0.03, press)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            load_for_long()
        soonest = min(soonest, time.monotonic() - pressed[-1])
        timer.join()
    assert soonest < 0.25, f"{soonest:.3f} s"
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_file_that_is_cut_short_is_an_error(big: Saved, tmp_path: Path, clean: None) -> None:
    path, _ = big
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes())
    checkpoint = tonnage.open(short)
    os.truncate(short, short.stat().st_size // 2)
    before = torch.cuda.memory_allocated()
    with pytest.raises(tonnage.StorageError, match=r"layer\.\d+\.weight"):
        checkpoint.load(device=DEVICE)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_many_threads_load_at_a_time(saved: Saved) -> None:
    folder, tensors = saved
    checkpoint = tonnage.open(folder)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found = checkpoint.load(device=DEVICE, staging="8MiB")
            assert torch.equal(found["large.f32"].cpu(), tensors["large.f32"])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
