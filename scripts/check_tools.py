"""Say in one line what is missing on this machine, before a build fails in its own words."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

RUST = (1, 88)
PYTHON = (3, 11)


def problems() -> list[str]:
    found = []
    if sys.version_info < PYTHON:
        found.append(
            f"CPython {sys.version.split()[0]} is too old: 3.11 or newer is needed (set PYTHON=)"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        found.append("this Python cannot make environments: apt-get install python3-venv")
    if shutil.which("cargo") is None:
        found.append("cargo is not on PATH: install Rust from https://rustup.rs")
    else:
        text = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout
        match = re.match(r"rustc (\d+)\.(\d+)", text)
        if match is None or (int(match[1]), int(match[2])) < RUST:
            found.append(
                f"{text.strip() or 'rustc'}: Rust 1.88 or newer is needed (https://rustup.rs)"
            )
    if shutil.which("cc") is None:
        found.append("no C linker (cc): apt-get install gcc")
    return found


if __name__ == "__main__":
    missing = problems()
    for line in missing:
        print(line, file=sys.stderr)
    sys.exit(bool(missing))
