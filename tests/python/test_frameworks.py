"""Each framework's module, in a process of its own: TensorFlow and Paddle crash each other."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "frameworks"
IMPORTS = {"jax": "jax", "tensorflow": "tensorflow", "mlx": "mlx", "paddle": "paddle"}


@pytest.mark.parametrize("framework", IMPORTS)
def test_framework(framework: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(IMPORTS[framework]) is None:
        pytest.skip(f"{framework} is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--strict-config", f"--basetemp={tmp_path / 'tests'}", f"check_{framework}.py"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # A file that collects nothing, or skips, would pass for the wrong reason.
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
