"""A driver that needs no card, for the tests of devices: where it is, and processes that use it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BEGIN = """
import sys
import numpy as np
import tonnage
from device_data import values

def equal(found, wanted):
    assert found.device == "cuda:0", found
    assert np.array_equal(found.numpy(), wanted), found
"""


@cache
def stub() -> Path:
    """The stub driver's library: the CUDA driver's entry points over memory that the host cannot
    touch, with copies that complete late.
    """
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
    return library


def on_stub(script: str, *arguments: object, **settings: str) -> str:
    """What a script prints that has the stub driver for CUDA's. Its end is checked for memory that
    was left, and for every rule of the driver.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "TONNAGE_CUDA_DRIVER": str(stub()),
        "STUB_DELAY_US": "200",
        "STUB_EXIT_CHECK": "memory",
        **settings,
    }
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def values() -> dict[str, object]:
    """Arrays of several sizes and dtypes: for shared regions, regions of their own, and none."""
    import numpy

    made = numpy.random.default_rng(5)
    arrays = {
        "large": made.standard_normal((1500, 700), dtype="float32"),
        "halves": made.standard_normal((1111, 777)).astype("float16"),
        "ints": numpy.arange(1001),
        "bools": made.standard_normal(77) > 0,
        "scalar": numpy.array(2.5),
        "empty": numpy.zeros((0, 4), "float32"),
    }
    small = {f"small.{at}": made.standard_normal((at % 9 + 1, 3)) for at in range(300)}
    return arrays | small
