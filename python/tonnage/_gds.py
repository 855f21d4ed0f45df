"""GPUDirect Storage: the process that tries whether NVIDIA's cuFile starts.

Its start may never return, or end its process, so another Python does it first, which loads nothing
but the native module.
"""

from __future__ import annotations

import os
import sys

from tonnage import _native

_TRY = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tonnage._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.exit(native._gds_attempt())
"""


def program() -> list[str]:
    """The program with its arguments; nothing where this Python has no program of its own."""
    # Without it, cuFile writes cufile.log into the current folder. Its own setters do not change
    # that; it asks the environment.
    os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)
    if not sys.executable:
        return []
    return [sys.executable, "-I", "-S", "-c", _TRY, _native.__file__ or ""]
