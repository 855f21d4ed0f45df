"""NVIDIA's own bindings run on the stub driver as on the real one: an independent client of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

#: What a process ends with that broke a rule of the driver, or left something behind.
EXIT = 86
ROOT = Path(__file__).resolve().parents[2]

BEGIN = """
import ctypes
from cuda.bindings import driver as cu

def ok(result):
    assert result[0] == cu.CUresult.CUDA_SUCCESS, result
    return result[1] if len(result) == 2 else result[1:]

ok(cu.cuInit(0))
device = ok(cu.cuDeviceGet(0))
"""

CONTEXT = """
context = ok(cu.cuDevicePrimaryCtxRetain(device))
ok(cu.cuCtxSetCurrent(context))
stream = ok(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the stub driver under the real one's name."""
    cargo = shutil.which("cargo")
    if cargo is None:
        assert "CI" not in os.environ, "CI has Rust"
        pytest.skip("the stub driver is built with Rust")
    command = [cargo, "build", "--quiet", "--locked", "-p", "tonnage-stubdriver"]
    command += ["--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    names = [name for message in messages for name in message.get("filenames", [])]
    (library,) = (Path(name) for name in names if name.endswith("libtonnage_stubdriver.so"))
    home = tmp_path_factory.mktemp("stub-driver")
    (home / "libcuda.so.1").symlink_to(library)
    return home


def run(folder: Path, script: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process that finds the stub driver."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), **settings}
    script = BEGIN + textwrap.dedent(script)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_there_is(folder: Path) -> None:
    script = """
        assert ok(cu.cuDeviceGetCount()) == 2
        assert ok(cu.cuDriverGetVersion()) == 13000
        assert ok(cu.cuDeviceGetName(64, device)).startswith(b"Stub device 0")
        assert ok(cu.cuDeviceTotalMem(device)) == 64 << 20
        assert cu.cuDeviceGet(2)[0] == cu.CUresult.CUDA_ERROR_INVALID_DEVICE
        assert cu.cuMemAlloc(100)[0] == cu.CUresult.CUDA_ERROR_INVALID_CONTEXT
        name = ok(cu.cuGetErrorName(cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY))
        assert name == b"CUDA_ERROR_OUT_OF_MEMORY", name
    """
    done = run(folder, script, STUB_DEVICES="2", STUB_MEM_MIB="64")
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_copies_streams_and_events(folder: Path, tmp_path: Path) -> None:
    script = (
        CONTEXT
        + """
N = 1 << 20
wanted = bytes(i * 31 % 251 for i in range(N))
free, total = ok(cu.cuMemGetInfo())
memory = ok(cu.cuMemAlloc(N))
# From and to memory that is not page-locked: over when the call returns.
ok(cu.cuMemcpyHtoDAsync(memory, wanted, N, stream))
back = bytearray(N)
ok(cu.cuMemcpyDtoHAsync(back, memory, N, stream))
assert back == wanted
# Page-locked: later, in the order of the streams, which an event joins.
pinned = ok(cu.cuMemHostAlloc(2 * N, cu.CU_MEMHOSTALLOC_PORTABLE))
view = (ctypes.c_ubyte * (2 * N)).from_address(pinned)
other = ok(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
event = ok(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING))
for value in range(10):
    ctypes.memset(pinned, value, N)
    ok(cu.cuMemcpyHtoDAsync(memory, pinned, N, stream))
    ok(cu.cuEventRecord(event, stream))
    ok(cu.cuStreamWaitEvent(other, event, 0))
    ok(cu.cuMemcpyDtoHAsync(pinned + N, memory, N, other))
    assert cu.cuStreamQuery(other)[0] == cu.CUresult.CUDA_ERROR_NOT_READY
    ok(cu.cuStreamSynchronize(other))
    assert bytes(view)[N:] == bytes([value]) * N
    ok(cu.cuStreamSynchronize(stream))
# Columns.
grid = cu.CUDA_MEMCPY2D()
grid.srcMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_HOST
grid.srcHost = pinned
grid.srcPitch = 100
grid.dstMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
grid.dstDevice = memory
grid.dstPitch = 50
grid.WidthInBytes, grid.Height = 10, 7
ctypes.memset(pinned, 77, N)
ok(cu.cuMemcpy2DAsync(grid, stream))
ok(cu.cuStreamSynchronize(stream))
ok(cu.cuMemcpyDtoH(back, memory, N))
assert back[:70] == (bytes([77]) * 10 + bytes([9]) * 40) + bytes([77]) * 10 + bytes([9]) * 10
assert cu.cuMemAlloc(65 << 20)[0] == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY
assert cu.cuMemcpyHtoD(memory, wanted, N + 1)[0] == cu.CUresult.CUDA_ERROR_INVALID_VALUE
ok(cu.cuMemFree(memory))
ok(cu.cuMemFreeHost(pinned))
assert ok(cu.cuMemGetInfo()) == (free, total)
ok(cu.cuEventDestroy(event))
ok(cu.cuStreamDestroy(other))
ok(cu.cuStreamDestroy(stream))
ok(cu.cuCtxSetCurrent(cu.CUcontext(0)))
ok(cu.cuDevicePrimaryCtxRelease(device))
"""
    )
    journal = tmp_path / "journal"
    settings = {"STUB_MEM_MIB": "64", "STUB_DELAY_US": "20000", "STUB_JOURNAL": str(journal)}
    done = run(folder, script, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    issued = sum(line["op"] == "issue" for line in lines)
    assert issued == sum(line["op"] == "done" for line in lines) == 24
    assert [line["bytes"] for line in lines if line["op"] == "alloc"] == [1 << 20]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("", "alive"),
        ("ok(cu.cuMemFree(memory)); cu.cuMemFree(memory)", "freed twice"),
        ("ok(cu.cuMemFree(memory)); cu.cuMemsetD8(memory, 0, 1)", "used after it was freed"),
    ],
)
def test_what_a_client_does_wrong_is_said(folder: Path, mistake: str, said: str) -> None:
    done = run(folder, CONTEXT + "memory = ok(cu.cuMemAlloc(100))\n" + mistake)
    assert done.returncode == EXIT, done
    assert said in done.stderr


def test_the_host_cannot_touch_device_memory(folder: Path) -> None:
    script = CONTEXT + "ctypes.string_at(int(ok(cu.cuMemAlloc(100))), 1)"
    assert run(folder, script).returncode < 0
